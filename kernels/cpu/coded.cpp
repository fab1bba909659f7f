// Coded tensors: the container of docs/format.md read with every length checked, blocks decoded in any order, and written.
//
// A block stands for whole rows. Its symbols are decoded by codec.cpp and become rows here: as they are, as codes packed to planes, as
// ten digits a lane, or as the upper halves of words. A block that is as long as its rows is stored as it is.

#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "lowbit_cpu.h"
#include "parallel.h"

#if defined(LOWBIT_X86)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

// ---------------------------------------------------------------- checksums

// CRC-32 as in zlib, eight bytes at a time.
struct Crc {
    uint32_t table[8][256];
    constexpr Crc() : table() {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
            table[0][i] = c;
        }
        for (int t = 1; t < 8; t++)
            for (uint32_t i = 0; i < 256; i++) table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
    }
};
constexpr Crc CRC;

uint32_t crc_by_eight(uint32_t c, const uint8_t *bytes, size_t size) {
    for (; size >= 8; size -= 8, bytes += 8) {
        uint64_t v;
        memcpy(&v, bytes, 8);
        v ^= c;
        c = 0;
        for (int i = 0; i < 8; i++) c ^= CRC.table[7 - i][v >> (8 * i) & 255];
    }
    for (; size; size--) c = c >> 8 ^ CRC.table[0][(c ^ *bytes++) & 255];
    return c;
}

#if defined(LOWBIT_X86)

// The same sixteen bytes at a time: four registers, folded by products without carries (Gopal and others, "Fast CRC Computation for
// Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009). The constants are powers of x modulo the polynomial, bits reversed.
// Takes a multiple of 64 bytes, at least 64; c is the state so far, without the inversions at both ends.
__attribute__((target("pclmul,sse4.1"))) uint32_t crc_folded(uint32_t c, const uint8_t *bytes, size_t size) {
    const auto load = [&](size_t i) { return _mm_loadu_si128((const __m128i *)(bytes + 16 * i)); };
    const __m128i by512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    const auto fold = [](__m128i a, __m128i by, __m128i next) __attribute__((target("pclmul,sse4.1"))) {
        return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(a, by, 0x00), _mm_clmulepi64_si128(a, by, 0x11)), next);
    };
    __m128i a[4] = {_mm_xor_si128(load(0), _mm_cvtsi32_si128((int)c)), load(1), load(2), load(3)};
    for (bytes += 64, size -= 64; size >= 64; bytes += 64, size -= 64)
        for (int i = 0; i < 4; i++) a[i] = fold(a[i], by512, load((size_t)i));
    __m128i all = a[0];
    for (int i = 1; i < 4; i++) all = fold(all, by128, a[i]);
    uint8_t left[16];
    _mm_storeu_si128((__m128i *)left, all);
    return crc_by_eight(0, left, 16);
}

#endif

uint32_t crc32(const uint8_t *bytes, size_t size) {
    uint32_t c = ~0u;
#if defined(LOWBIT_X86)
    static const bool here = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    if (here && size >= 64) {
        const size_t folded = size / 64 * 64;
        c = crc_folded(c, bytes, folded);
        bytes += folded, size -= folded;
    }
#endif
    return ~crc_by_eight(c, bytes, size);
}

// ---------------------------------------------------------------- symbols

// How rows become symbols: the header's byte.
enum Symbols { BYTES = 0, TERNARY = 10, UPPER = 16, EXPONENTS = 17 };  // or 3, 5, 6, 7: codes of that width, packed to planes

bool known(int kind) { return kind == BYTES || kind == 3 || (kind >= 5 && kind <= 7) || kind == TERNARY || kind == UPPER || kind == EXPONENTS; }
bool words(int kind) { return kind == UPPER || kind == EXPONENTS; }
bool planes(int kind) { return kind >= 3 && kind <= 7; }

// Bytes that rows are made of.
int64_t unit(int kind) { return planes(kind) ? 8 * kind : kind == BYTES ? 1 : 2; }

// Symbols of a row of `bytes` bytes.
int64_t symbols_of(int kind, int64_t bytes) {
    if (planes(kind)) return bytes / (8 * kind) * (kind == 3 ? 32 : 64);
    return words(kind) ? bytes / 2 : bytes;
}

// Symbols (and lower bytes, for words) to rows.
void to_rows(int kind, const uint8_t *symbols, const uint8_t *low, uint8_t *out, int64_t rows, int64_t bytes) {
    const int64_t own = symbols_of(kind, bytes);
    if (planes(kind)) {
        const int64_t blocks = bytes / (8 * kind);
        for (int64_t r = 0; r < rows; r++, symbols += own, out += bytes) {
            if (kind == 3)
                kernels()->pack_pairs(symbols, (uint16_t *)out, blocks);
            else
                kernels()->pack(symbols, (uint16_t *)out, 64 * blocks, kind, 0, 1);
        }
    } else if (kind == TERNARY) {
        for (int64_t i = 0; i < rows * bytes; i += 2) {
            const uint32_t n = 243 * symbols[i] + symbols[i + 1], lane = (n * 65536 + 59048) / 59049;
            out[i] = (uint8_t)lane;
            out[i + 1] = (uint8_t)(lane >> 8);
        }
    } else {
        for (int64_t i = 0; i < rows * own; i++) {
            uint32_t word = (uint32_t)symbols[i] << 8 | low[i];
            if (kind == EXPONENTS) word = word >> 1 | (word & 1) << 15;
            out[2 * i] = (uint8_t)word;
            out[2 * i + 1] = (uint8_t)(word >> 8);
        }
    }
}

// The inverse; `wide` has room for twice the symbols of a row.
void from_rows(int kind, const uint8_t *in, uint8_t *symbols, uint8_t *low, int64_t rows, int64_t bytes, uint8_t *wide) {
    const int64_t own = symbols_of(kind, bytes);
    if (planes(kind)) {
        const int64_t inputs = bytes / (8 * kind) * 64;
        for (int64_t r = 0; r < rows; r++, symbols += own, in += bytes) {
            kernels()->unpack((const uint16_t *)in, kind == 3 ? wide : symbols, inputs, kind, 0, 1);
            if (kind == 3)
                for (int64_t b = 0; b < inputs; b += 64)
                    for (int i = 0; i < 32; i++) symbols[b / 2 + i] = (uint8_t)(wide[b + i] | wide[b + 32 + i] << 3);
        }
    } else if (kind == TERNARY) {
        for (int64_t i = 0; i < rows * bytes; i += 2) {
            const uint32_t n = (uint32_t)((in[i] | (uint64_t)in[i + 1] << 8) * 59049 >> 16);
            symbols[i] = (uint8_t)(n / 243);
            symbols[i + 1] = (uint8_t)(n % 243);
        }
    } else if (words(kind)) {
        for (int64_t i = 0; i < rows * own; i++) {
            uint32_t word = in[2 * i] | (uint32_t)in[2 * i + 1] << 8;
            if (kind == EXPONENTS) word = (word << 1 & 0xffff) | word >> 15;
            symbols[i] = (uint8_t)(word >> 8);
            low[i] = (uint8_t)word;
        }
    } else {
        memcpy(symbols, in, (size_t)(rows * bytes));
    }
}

// ---------------------------------------------------------------- the container

constexpr int64_t FIXED_BYTES = 40, MOST_BYTES = (int64_t)1 << 46, MOST_BLOCK = (int64_t)1 << 30;
constexpr uint8_t ITEM_BYTES[] = {1, 1, 2, 2, 2};  // of the dtypes
constexpr uint32_t RAW = 1u << 31;  // of a block's size

template <class T> T at(const uint8_t *bytes) {
    T value;
    memcpy(&value, bytes, sizeof(T));
    return value;
}

struct Container {
    int kind;
    int64_t rows, bytes, step, blocks;  // bytes of a row, rows of a block
    const uint8_t *index, *payload;
    std::vector<int64_t> starts;  // of the blocks, and the end
    Slot table[SLOTS];

    // Reads everything but the blocks. Every length is compared with what is there.
    int read(const uint8_t *coded, int64_t size, int64_t out_size) {
        if (size < FIXED_BYTES || memcmp(coded, "LBC1", 4)) return LOWBIT_BAD_CODED;
        const int64_t head = at<uint32_t>(coded + 8);
        if (head < FIXED_BYTES || head > size || crc32(coded + 8, (size_t)head - 8) != at<uint32_t>(coded + 4)) return LOWBIT_BAD_CODED;
        kind = coded[13];
        rows = at<int64_t>(coded + 16), bytes = at<int64_t>(coded + 24);
        step = at<uint32_t>(coded + 32), blocks = at<uint32_t>(coded + 36);
        if (coded[12] != 1 || !known(kind) || rows < 1 || rows > MOST_BYTES || bytes < 1 || bytes > MOST_BYTES / rows) return LOWBIT_BAD_CODED;
        if (rows * bytes != out_size) return LOWBIT_BAD_ARGUMENT;
        if (bytes % unit(kind) || step < 1 || step > MOST_BLOCK / bytes || blocks != (rows + step - 1) / step) return LOWBIT_BAD_CODED;
        const int64_t dims = 8 * (int64_t)coded[15], frequencies = FIXED_BYTES + dims + 8 * blocks;
        if (frequencies > head) return LOWBIT_BAD_CODED;
        index = coded + FIXED_BYTES + dims;
        if (!fits(coded)) return LOWBIT_BAD_CODED;
        if (!read_table(coded + frequencies, coded + head)) return LOWBIT_BAD_CODED;
        payload = coded + head;
        starts.resize((size_t)blocks + 1);
        for (int64_t b = 0, sum = 0; b < blocks; b++) {
            sum += at<uint32_t>(index + 8 * b) & ~RAW;
            if (sum > size - head) return LOWBIT_BAD_CODED;
            starts[(size_t)b + 1] = sum;
        }
        const int64_t end = head + starts[(size_t)blocks];
        if (size != (end + 7) / 8 * 8) return LOWBIT_BAD_CODED;
        for (int64_t i = end; i < size; i++)
            if (coded[i]) return LOWBIT_BAD_CODED;
        return LOWBIT_OK;
    }

    // Whether dtype and shape are those of the rows.
    bool fits(const uint8_t *coded) const {
        if (coded[14] >= sizeof(ITEM_BYTES)) return false;
        int64_t product = ITEM_BYTES[coded[14]];
        for (int d = 0; d < coded[15]; d++) {
            const uint64_t length = at<uint64_t>(coded + FIXED_BYTES + 8 * d);
            if (length < 1 || length > (uint64_t)(MOST_BYTES / product)) return false;
            product *= (int64_t)length;
        }
        return product == rows * bytes;
    }

    // First and last symbol, then the frequency of each from the first to the last, seven bits a byte, low ones first.
    bool read_table(const uint8_t *from, const uint8_t *end) {
        if (end - from < 2) return false;
        const int first = from[0], last = from[1];
        uint32_t slots = 0;
        from += 2;
        for (int symbol = first; symbol <= last; symbol++) {
            uint32_t frequency = 0;
            for (int shift = 0;; shift += 7) {
                if (from == end || shift > 7) return false;
                frequency |= (uint32_t)(*from & 127) << shift;
                if (*from++ < 128) break;
            }
            if (frequency > SLOTS - slots) return false;
            for (uint32_t i = 0; i < frequency; i++) table[slots++] = (uint32_t)symbol | (frequency - 1) << 8 | i << 20;
        }
        return slots == SLOTS && from == end;
    }

    int64_t rows_of(int64_t b) const { return b + 1 < blocks ? step : rows - b * step; }

    // Checks and decodes blocks first .. last - 1, two at most, to their rows: LOWBIT_OK, an error, or the number of a damaged one plus 1.
    int64_t decode(int64_t first, int64_t last, uint8_t *out) const {
        CodedSymbols parts[2];
        int64_t number[2], symbols = 0;
        int found = 0;
        for (int64_t b = first; b < last; b++) {
            const uint8_t *from = payload + starts[(size_t)b];
            const int64_t size = starts[(size_t)b + 1] - starts[(size_t)b], count = rows_of(b), n = count * symbols_of(kind, bytes);
            if (crc32(from, (size_t)size) != at<uint32_t>(index + 8 * b + 4)) return b + 1;
            uint8_t *const to = out + b * step * bytes;
            if (at<uint32_t>(index + 8 * b) & RAW) {
                if (size != count * bytes) return b + 1;
                memcpy(to, from, (size_t)size);
                continue;
            }
            const int64_t low = words(kind) ? n : 0;
            if (size < low) return b + 1;
            number[found] = b;
            parts[found++] = {from, (size_t)(size - low), to, (size_t)n};
            symbols += n;
        }
        if (!found) return LOWBIT_OK;
        std::unique_ptr<uint8_t[]> memory;
        if (kind != BYTES) {
            memory.reset(new (std::nothrow) uint8_t[(size_t)symbols]);
            if (!memory) return LOWBIT_NO_MEMORY;
            for (int i = 0; i < found; i++) parts[i].symbols = memory.get() + (i ? parts[0].count : 0);
        }
        const int sound = kernels()->decode_symbols(parts, found, table);
        if (sound < found) return number[sound] + 1;
        for (int i = 0; i < found && kind != BYTES; i++)
            to_rows(kind, parts[i].symbols, parts[i].coded + parts[i].size, out + number[i] * step * bytes, rows_of(number[i]), bytes);
        return LOWBIT_OK;
    }
};

// ---------------------------------------------------------------- writing

struct Ranges {
    uint32_t frequency[256], start[256];
};

// States and words of symbols (count) to `out` (room bytes); their size, or 0 if there is no room or a symbol without a frequency. Words are written from the end,
// since the last symbol is coded first.
size_t encode_symbols(const uint8_t *symbols, size_t count, const Ranges &ranges, uint8_t *out, size_t room) {
    uint32_t states[LANES];
    for (uint32_t &x : states) x = LEAST_STATE;
    size_t at = room;
    for (size_t i = count; i--;) {
        uint32_t x = states[i % LANES];
        const uint32_t f = ranges.frequency[symbols[i]];
        if (!f) return 0;
        if (x >= (uint64_t)f << (32 - FREQUENCY_BITS)) {
            if (at < STATES_BYTES + 2) return 0;
            at -= 2;
            const uint16_t word = (uint16_t)x;
            memcpy(out + at, &word, 2);
            x >>= 16;
        }
        states[i % LANES] = (x / f << FREQUENCY_BITS) + x % f + ranges.start[symbols[i]];
    }
    if (at < STATES_BYTES) return 0;
    memmove(out + STATES_BYTES, out + at, room - at);
    memcpy(out, states, STATES_BYTES);
    return STATES_BYTES + room - at;
}

// One block of `size` bytes to `out`, which has room for as many; how many were written, fewer than `size` unless it stays as it is,
// or -1 without memory.
int64_t encode_block(int kind, const uint8_t *in, int64_t count, int64_t bytes, const Ranges &ranges, uint8_t *out) {
    const int64_t size = count * bytes, n = count * symbols_of(kind, bytes), low = words(kind) ? n : 0, wide = 2 * symbols_of(kind, bytes);
    const std::unique_ptr<uint8_t[]> memory(new (std::nothrow) uint8_t[(size_t)(n + low + wide + (kind == TERNARY ? size : 0))]);
    if (!memory) return -1;
    uint8_t *const symbols = memory.get(), *const lower = symbols + n, *const again = lower + low + wide;
    from_rows(kind, in, symbols, lower, count, bytes, lower + low);
    bool exact = true;
    if (kind == TERNARY) {  // a lane that is not ten digits has no symbols
        to_rows(kind, symbols, lower, again, count, bytes);
        exact = !memcmp(in, again, (size_t)size);
    }
    const int64_t coded = exact ? (int64_t)encode_symbols(symbols, (size_t)n, ranges, out, (size_t)(size - low)) : 0;
    if (coded == 0 || coded + low >= size) {
        memcpy(out, in, (size_t)size);
        return size;
    }
    memcpy(out + coded, lower, (size_t)low);
    return coded + low;
}

template <class Body> void each(int64_t parts, int threads, Body &body) {
    run_parts([](void *context, int part, int) { (*(Body *)context)(part); }, &body, (int)parts, threads);
}

bool sound(const void *in, int64_t rows, int64_t bytes, int kind) {
    return in && known(kind) && rows >= 1 && rows <= MOST_BYTES && bytes >= 1 && bytes <= MOST_BYTES / rows && bytes % unit(kind) == 0;
}

bool aligned(const void *rows, int kind) { return !planes(kind) || (uintptr_t)rows % 2 == 0; }

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

int64_t lowbit_decode(const uint8_t *coded, int64_t size, uint8_t *out, int64_t out_size, int threads) {
    if (!coded || !out || size < 0 || threads < 1) return LOWBIT_BAD_ARGUMENT;
    const std::unique_ptr<Container> container(new (std::nothrow) Container);
    if (!container) return LOWBIT_NO_MEMORY;
    if (const int refused = container->read(coded, size, out_size)) return refused;
    if (!aligned(out, container->kind)) return LOWBIT_BAD_ARGUMENT;
    std::atomic<int64_t> result{LOWBIT_OK};
    auto body = [&](int pair) {
        if (result.load(std::memory_order_relaxed)) return;
        const int64_t first = 2 * (int64_t)pair, last = first + 2 < container->blocks ? first + 2 : container->blocks;
        if (const int64_t refused = container->decode(first, last, out)) result = refused;
    };
    each((container->blocks + 1) / 2, threads, body);
    return result;
}

int lowbit_count_symbols(const uint8_t *in, int64_t rows, int64_t bytes, int kind, int64_t *counts) {
    if (!sound(in, rows, bytes, kind) || !counts || !aligned(in, kind)) return LOWBIT_BAD_ARGUMENT;
    const int64_t own = symbols_of(kind, bytes), low = words(kind) ? own : 0;
    const std::unique_ptr<uint8_t[]> memory(new (std::nothrow) uint8_t[(size_t)(own + low + 2 * own)]);
    if (!memory) return LOWBIT_NO_MEMORY;
    memset(counts, 0, 256 * sizeof(int64_t));
    for (int64_t r = 0; r < rows; r++) {
        from_rows(kind, in + r * bytes, memory.get(), memory.get() + own, 1, bytes, memory.get() + own + low);
        for (int64_t i = 0; i < own; i++) counts[memory[(size_t)i]]++;
    }
    return LOWBIT_OK;
}

int64_t lowbit_encode(const uint8_t *in, int64_t rows, int64_t bytes, int64_t step, int kind, const uint16_t *frequencies, uint8_t *out,
                      uint32_t *index, int threads) {
    if (!sound(in, rows, bytes, kind) || !frequencies || !out || !index || step < 1 || step > MOST_BLOCK / bytes || threads < 1)
        return LOWBIT_BAD_ARGUMENT;
    const int64_t blocks = (rows + step - 1) / step;
    if (!aligned(in, kind) || blocks > INT32_MAX) return LOWBIT_BAD_ARGUMENT;
    Ranges ranges;
    uint32_t sum = 0;
    for (int s = 0; s < 256; s++) {
        ranges.frequency[s] = frequencies[s];
        ranges.start[s] = sum;
        sum += frequencies[s];
    }
    if (sum != SLOTS) return LOWBIT_BAD_ARGUMENT;
    std::atomic<bool> failed{false};
    auto body = [&](int b) {
        const int64_t first = b * step, count = rows - first < step ? rows - first : step;
        const int64_t size = encode_block(kind, in + first * bytes, count, bytes, ranges, out + first * bytes);
        if (size < 0) failed = true;
        index[2 * b] = size == count * bytes ? (uint32_t)size | RAW : (uint32_t)size;
        index[2 * b + 1] = crc32(out + first * bytes, size < 0 ? 0 : (size_t)size);
    };
    each(blocks, threads, body);
    if (failed) return LOWBIT_NO_MEMORY;
    int64_t total = 0;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t size = index[2 * b] & ~RAW;
        memmove(out + total, out + b * step * bytes, (size_t)size);
        total += size;
    }
    return total;
}

}  // extern "C"
