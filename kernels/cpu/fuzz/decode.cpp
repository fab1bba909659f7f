// Fuzzes the decoder of coded tensors: whatever the bytes are, it reads and writes nothing outside of its two buffers and ends.
//
// Checksums would stop nearly every mutation at the door, so a copy of each input gets them set right before it is decoded again. Input
// and output are blocks of memory of exactly their size, with AddressSanitizer's red zones around them. With clang this is a target
// for libFuzzer; with GCC, or LOWBIT_FUZZ_MAIN, it has a main of its own that mutates the files of a folder at random:
//
//     lowbit_fuzz SEEDS SECONDS [SEED]
//
// Sources are compiled as in the library, once for each instruction set, and each input runs on one of them.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../kernels.h"

namespace lowbit {

#define DECLARE(isa)                                                                                                         \
    namespace isa {                                                                                                          \
    void pack(const uint8_t *, uint16_t *, int64_t, int, int64_t, int64_t);                                                  \
    void unpack(const uint16_t *, uint8_t *, int64_t, int, int64_t, int64_t);                                                \
    void pack_pairs(const uint8_t *, uint16_t *, int64_t);                                                                   \
    int decode_symbols(const CodedSymbols *, int, const Slot *);                                                             \
    }
#define COPY(isa) copy(isa::pack, isa::unpack, isa::pack_pairs, isa::decode_symbols)
// A table of kernels with what the decoder calls.
static Kernels copy(decltype(Kernels::pack) pack, decltype(Kernels::unpack) unpack, decltype(Kernels::pack_pairs) pack_pairs,
                    decltype(Kernels::decode_symbols) decode_symbols) {
    Kernels made{};
    made.pack = pack, made.unpack = unpack, made.pack_pairs = pack_pairs, made.decode_symbols = decode_symbols;
    return made;
}
DECLARE(portable)
#if defined(LOWBIT_X86)
DECLARE(avx2)
DECLARE(avx512)
static const Kernels COPIES[] = {COPY(portable), COPY(avx2), COPY(avx512)};
static int copies() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") ? 3 : __builtin_cpu_supports("avx2") ? 2 : 1; }
#else
static const Kernels COPIES[] = {COPY(portable)};
static int copies() { return 1; }
#endif
static const Kernels *current = COPIES;
const Kernels *kernels() { return current; }

}  // namespace lowbit

namespace {

uint32_t crc32(const uint8_t *bytes, size_t size) {
    uint32_t c = ~0u;
    for (size_t i = 0; i < size; i++) {
        c ^= bytes[i];
        for (int k = 0; k < 8; k++) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
    }
    return ~c;
}

uint32_t number(const uint8_t *at) {
    uint32_t value;
    std::memcpy(&value, at, 4);
    return value;
}

// Sets every checksum right that lies inside.
void seal(uint8_t *data, size_t size) {
    if (size < 40) return;
    const size_t head = number(data + 8) < 40 ? 40 : number(data + 8) > size ? size : number(data + 8);
    const size_t index = 40 + 8 * (size_t)data[15], blocks = number(data + 36);
    for (size_t b = 0, at = head; b < blocks && index + 8 * b + 8 <= head; b++) {
        const size_t length = number(data + index + 8 * b) & 0x7fffffff;
        if (length > size - at) break;
        const uint32_t sum = crc32(data + at, length);
        std::memcpy(data + index + 8 * b + 4, &sum, 4);
        at += length;
    }
    const uint32_t sum = crc32(data + 8, head - 8);
    std::memcpy(data + 4, &sum, 4);
}

void decode(const uint8_t *data, size_t size) {
    int64_t rows = 0, bytes = 0;
    if (size >= 40) {
        std::memcpy(&rows, data + 16, 8);
        std::memcpy(&bytes, data + 24, 8);
    }
    const int64_t most = 1 << 20, out = rows > 0 && rows <= most && bytes > 0 && bytes <= most / rows ? rows * bytes : 64;
    const std::unique_ptr<uint8_t[]> to(new uint8_t[(size_t)out]);
    lowbit_decode(data, (int64_t)size, to.get(), out, 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    lowbit::current = lowbit::COPIES + (size ? data[size - 1] ^ data[size / 2] : 0) % lowbit::copies();
    const std::unique_ptr<uint8_t[]> copy(new uint8_t[size ? size : 1]);
    std::memcpy(copy.get(), data, size);
    decode(copy.get(), size);
    seal(copy.get(), size);
    decode(copy.get(), size);
    return 0;
}

#if defined(LOWBIT_FUZZ_MAIN)

#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

int main(int count, char **arguments) {
    if (count < 3) return std::fprintf(stderr, "usage: lowbit_fuzz SEEDS SECONDS [SEED]\n"), 2;
    std::vector<std::vector<uint8_t>> seeds;
    for (const auto &entry : std::filesystem::directory_iterator(arguments[1])) {
        std::ifstream file(entry.path(), std::ios::binary);
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    if (seeds.empty()) return std::fprintf(stderr, "%s holds no file\n", arguments[1]), 2;
    std::mt19937_64 random(count > 3 ? std::strtoull(arguments[3], nullptr, 10) : 0);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(arguments[2]));
    uint64_t runs = 0;
    for (const auto &seed : seeds) LLVMFuzzerTestOneInput(seed.data(), seed.size());
    const uint64_t special[] = {0, 1, 2, 31, 32, 255, 4095, 4096, 65535, 0x7fffffff, 0x80000000, 0xffffffff, ~0ull, 1ull << 40, 1ull << 62};
    for (; std::chrono::steady_clock::now() < end; runs++) {
        std::vector<uint8_t> data = seeds[random() % seeds.size()];
        for (int changes = 1 + (int)(random() % 6); changes && !data.empty(); changes--) {
            // Most mutations go to the head, where lengths are.
            const size_t place = random() % 3 ? random() % (data.size() < 96 ? data.size() : 96) : random() % data.size();
            const size_t width = 1u << random() % 4;
            const uint64_t value = random() % 2 ? special[random() % std::size(special)] : random() >> random() % 64;
            switch (random() % 6) {
                case 0: data[place] ^= (uint8_t)(1u << random() % 8); break;
                case 1: std::memcpy(data.data() + place, &value, width < data.size() - place ? width : data.size() - place); break;
                case 2: data[place] = (uint8_t)(data[place] + random() % 9 - 4); break;
                case 3: data.resize(place + 1); break;
                case 4: data.insert(data.begin() + (ptrdiff_t)place, width, (uint8_t)value); break;
                default: data.erase(data.begin() + (ptrdiff_t)place, data.begin() + (ptrdiff_t)std::min(place + width, data.size()));
            }
        }
        LLVMFuzzerTestOneInput(data.data(), data.size());
    }
    std::printf("%llu inputs from %zu seeds, no fault\n", (unsigned long long)runs, seeds.size());
}

#endif
