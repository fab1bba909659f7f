// The C interface: checks, the choice of an instruction set, and the split of work among threads.

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "int8.h"
#include "kernels.h"
#include "lowbit_cpu.h"
#include "parallel.h"

using namespace lowbit;

namespace {

constexpr int64_t PART_WEIGHTS = 32768;  // of a part: some ten microseconds, far above what handing one out costs
constexpr int PARTS_PER_THREAD = 4;

// An instruction set: the copies that serve it.
struct Isa {
    const Int8Kernels *int8;  // has the name: there may be a better copy of these than of the others
    const Kernels *kernels;
    bool here() const { return kernels->here() && int8->here(); }
};

// All that were compiled, the best first; the portable one runs everywhere.
const Isa ALL[] = {
#if defined(LOWBIT_X86)
    {&int8_avx512vnni(), &kernels_avx512()},
    {&int8_avx512(), &kernels_avx512()},
    {&int8_avx2(), &kernels_avx2()},
#elif defined(LOWBIT_ARM64)
    {&int8_neondot(), &kernels_neon()},
    {&int8_neon(), &kernels_neon()},
#endif
    {&int8_portable(), &kernels_portable()}};

const Isa *best() {
    for (const Isa &isa : ALL)
        if (isa.here()) return &isa;
    return nullptr;
}

std::atomic<const Isa *> chosen{nullptr};

const Isa *isa() {
    const Isa *found = chosen.load(std::memory_order_relaxed);
    if (!found) chosen = found = best();
    return found;
}

// Of rows, inputs and threads: far above any real one, and no product of two of them overflows.
constexpr int64_t MOST = (int64_t)1 << 31, MOST_THREADS = 1 << 16;

bool within(int64_t count, int64_t least, int64_t most = MOST) { return count >= least && count <= most; }

bool sound(const lowbit_weight *w) {
    if (!w || !w->codes || !within(w->rows, 0) || !within(w->inputs, 1) || w->bits < 0 || w->bits > 8) return false;
    if (w->group && (w->group < 16 || (w->group & (w->group - 1)))) return false;
    if (w->scale < LOWBIT_SCALE_NONE || w->scale > LOWBIT_SCALE_BYTE || (w->scale && !w->scales)) return false;
    if (w->scale == LOWBIT_SCALE_BYTE && !w->scale_table) return false;
    if (w->zero < LOWBIT_ZERO_FIXED || w->zero > LOWBIT_ZERO_F16 || (w->zero && !w->zeros)) return false;
    if (w->table && w->zero) return false;  // levels need no zero point
    if (w->table < LOWBIT_TABLE_NONE || w->table > LOWBIT_TABLE_ROW || (w->table && (!w->levels || w->bits == 0))) return false;
    return true;
}

bool packable(int64_t rows, int64_t inputs, int bits, int threads) {
    return within(rows, 0) && within(inputs, 1) && within(bits, 0, 8) && within(threads, 1, MOST_THREADS);
}

bool known(int dtype) { return dtype >= LOWBIT_F32 && dtype <= LOWBIT_BF16; }

// Splits `count` rows of `width` weights; never so small that handing them out would show.
struct Split {
    int64_t count, size;
    int parts;
    Split(int64_t count, int64_t width, int threads) : count(count) {
        int64_t least = PART_WEIGHTS / (width > 0 ? width : 1) + 1;
        size = threads <= 1 ? count : (count + threads * PARTS_PER_THREAD - 1) / (threads * PARTS_PER_THREAD);
        if (size < least) size = least;
        parts = size ? (int)((count + size - 1) / size) : 0;
    }
    int64_t first(int part) const { return part * size; }
    int64_t last(int part) const { return (part + 1) * size < count ? (part + 1) * size : count; }
};

template <class Body> void run(const Split &split, int threads, Body &body) {
    run_parts([](void *context, int part) { (*(Body *)context)(part); }, &body, split.parts, threads);
}

struct Free { void operator()(void *p) const { std::free(p); } };
template <class T> using Memory = std::unique_ptr<T, Free>;
template <class T> Memory<T> memory(int64_t count) {
    return Memory<T>((T *)std::aligned_alloc(64, ((size_t)count * sizeof(T) + 63) / 64 * 64));
}
typedef Memory<float> Floats;
Floats floats(int64_t count) { return memory<float>(count); }

}  // namespace

const Kernels *lowbit::kernels() { return isa()->kernels; }

extern "C" {

int lowbit_version(void) { return LOWBIT_VERSION; }

int lowbit_linear(const lowbit_weight *w, const void *x, const void *bias, void *out, int64_t m, int dtype, int threads) {
    if (!sound(w)) return LOWBIT_BAD_WEIGHT;
    if (!within(m, 0) || !known(dtype) || !within(threads, 1, MOST_THREADS) || (m && w->rows && (!x || !out))) return LOWBIT_BAD_ARGUMENT;
    if (m == 0 || w->rows == 0) return LOWBIT_OK;
    const Kernels *k = kernels();
    const int64_t stride = arranged_inputs(w), own = scratch_floats(w, m);
    const Split split(w->rows, w->inputs * (m < 8 ? m : 8), threads);
    Floats arranged = floats(m * stride), scratch = floats(split.parts * own);
    if (!arranged || !scratch) return LOWBIT_NO_MEMORY;
    k->arrange(w, x, arranged.get(), dtype, 0, m);
    auto body = [&](int part) {
        k->linear(w, arranged.get(), m, bias, out, dtype, split.first(part), split.last(part), scratch.get() + part * own);
    };
    run(split, threads, body);
    return LOWBIT_OK;
}

int lowbit_linear_int8(const lowbit_weight *w, const uint8_t *levels, const float *steps, const void *x, const void *bias, void *out,
                       int64_t m, int dtype, int threads) {
    if (!sound(w)) return LOWBIT_BAD_WEIGHT;
    if (!within(m, 0) || !known(dtype) || !within(threads, 1, MOST_THREADS) || (m && w->rows && (!x || !out))) return LOWBIT_BAD_ARGUMENT;
    if (w->table && (!levels || !steps)) return LOWBIT_BAD_ARGUMENT;
    if (m == 0 || w->rows == 0) return LOWBIT_OK;
    const Int8Kernels *k = isa()->int8;
    const int64_t stride = (w->inputs + 63) / 64 * 64, units = (stride + int8_unit(w) - 1) / int8_unit(w);
    const int64_t rows = INT8_STRIP * INT8_STRIPS, own = int8_scratch(w, m) / 64 * 64 + 64;
    const Split tokens(m, 4 * stride, threads), split((w->rows + rows - 1) / rows, rows * stride * (m < 8 ? m : 8), threads);
    const Memory<int8_t> codes = memory<int8_t>(m * stride + 64);
    const Floats scales = floats(2 * m * units), wide = floats(tokens.parts * stride);
    const Memory<uint8_t> scratch = memory<uint8_t>(split.parts * own);
    if (!codes || !scales || !wide || !scratch) return LOWBIT_NO_MEMORY;
    std::memset(codes.get() + m * stride, 0, 64);  // blocks are read in pairs
    const Tokens quantized{codes.get(), scales.get(), scales.get() + m * units, m, stride, units};
    auto quantize = [&](int part) {
        k->quantize(w, x, dtype, quantized, tokens.first(part), tokens.last(part), wide.get() + part * stride);
    };
    run(tokens, threads, quantize);
    auto multiply = [&](int part) {
        const int64_t last = split.last(part) * rows;
        k->linear(w, {levels, steps}, quantized, bias, out, dtype, split.first(part) * rows, last < w->rows ? last : w->rows,
                  scratch.get() + part * own);
    };
    run(split, threads, multiply);
    return LOWBIT_OK;
}

int lowbit_dequantize(const lowbit_weight *w, const int64_t *index, int64_t first, int64_t count, void *out, int dtype,
                      int threads) {
    if (!sound(w)) return LOWBIT_BAD_WEIGHT;
    if (!within(count, 0) || !known(dtype) || !within(threads, 1, MOST_THREADS) || (count && !out)) return LOWBIT_BAD_ARGUMENT;
    if (!index && (first < 0 || first > w->rows - count)) return LOWBIT_BAD_ARGUMENT;
    for (int64_t i = 0; index && i < count; i++)
        if (index[i] < 0 || index[i] >= w->rows) return LOWBIT_BAD_ARGUMENT;
    if (count == 0) return LOWBIT_OK;
    const Kernels *k = kernels();
    const Split split(count, w->inputs, threads);
    const int64_t own = scratch_floats(w, 0);
    Floats scratch = floats(split.parts * own);
    if (!scratch) return LOWBIT_NO_MEMORY;
    auto body = [&](int part) {
        k->dequantize(w, index, first, out, dtype, split.first(part), split.last(part), scratch.get() + part * own);
    };
    run(split, threads, body);
    return LOWBIT_OK;
}

int lowbit_pack(const uint8_t *codes, uint16_t *lanes, int64_t rows, int64_t inputs, int bits, int threads) {
    if (!packable(rows, inputs, bits, threads) || (rows && (!codes || !lanes))) return LOWBIT_BAD_ARGUMENT;
    const Split split(rows, inputs, threads);
    auto body = [&](int part) { kernels()->pack(codes, lanes, inputs, bits, split.first(part), split.last(part)); };
    run(split, threads, body);
    return LOWBIT_OK;
}

int lowbit_unpack(const uint16_t *lanes, uint8_t *codes, int64_t rows, int64_t inputs, int bits, int threads) {
    if (!packable(rows, inputs, bits, threads) || (rows && (!codes || !lanes))) return LOWBIT_BAD_ARGUMENT;
    const Split split(rows, inputs, threads);
    auto body = [&](int part) { kernels()->unpack(lanes, codes, inputs, bits, split.first(part), split.last(part)); };
    run(split, threads, body);
    return LOWBIT_OK;
}

int64_t lowbit_row_lanes(int64_t inputs, int bits) {
    return !packable(0, inputs, bits, 1) ? (int64_t)LOWBIT_BAD_ARGUMENT : row_lanes(inputs, bits);
}

const char *lowbit_isas(void) {
    static const std::string names = [] {
        std::string found;
        for (const Isa &isa : ALL)
            if (isa.here()) found += (found.empty() ? "" : ",") + std::string(isa.int8->name);
        return found;
    }();
    return names.c_str();
}

const char *lowbit_isa(void) { return isa()->int8->name; }

int lowbit_force_isa(const char *name) {
    for (const Isa &isa : ALL)
        if (name && !std::strcmp(isa.int8->name, name) && isa.here()) {
            chosen = &isa;
            return LOWBIT_OK;
        }
    return LOWBIT_BAD_ARGUMENT;
}

}  // extern "C"
