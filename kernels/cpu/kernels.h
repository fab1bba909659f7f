// What one instruction set offers to the interface. Arguments were checked by it; rows are first .. last - 1.
#pragma once

#include <cstdint>

#include "lowbit_cpu.h"

namespace lowbit {

// A panel: rows of the weight and blocks of 64 inputs that are decoded at once, 64 KB; what a core's second cache holds beside x.
constexpr int PANEL_ROWS = 16, PANEL_BLOCKS = 16;

// Floats of scratch memory that `linear` needs for m rows of x, and `dequantize` for m = 0.
static inline int64_t scratch_floats(const lowbit_weight *w, int64_t m) {
    const int64_t blocks = (w->inputs + 63) / 64, step = w->bits && blocks > PANEL_BLOCKS ? PANEL_BLOCKS : blocks;
    const int64_t groups = w->group ? (w->inputs + w->group - 1) / w->group : 1;
    const int64_t row = w->bits ? 0 : 64 * blocks;
    return (2 * groups + (m <= 1 ? row : PANEL_ROWS * (64 * step + m)) + 63) / 64 * 64;
}

struct Kernels {
    const char *name;
    bool (*here)();  // whether this processor has it
    // x (m, stride), zero from `inputs` on; out (m, rows); scratch as many floats as scratch_floats says.
    void (*linear)(const lowbit_weight *, const float *x, int64_t stride, int64_t m, const void *bias, void *out, int dtype,
                   int64_t first, int64_t last, float *scratch);
    // out (.., inputs); scratch as for m = 0.
    void (*dequantize)(const lowbit_weight *, const int64_t *index, int64_t start, void *out, int dtype, int64_t first,
                       int64_t last, float *scratch);
    void (*widen)(const void *from, float *to, int64_t count, int dtype);
    void (*pack)(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last);
    void (*unpack)(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last);
};

// The table of each copy: kernels_ and the name of its instruction set.
const Kernels &kernels_avx512();
const Kernels &kernels_avx2();
const Kernels &kernels_neon();
const Kernels &kernels_portable();

#define LOWBIT_JOIN(a, b) a##b
#define LOWBIT_JOINED(a, b) LOWBIT_JOIN(a, b)
#define LOWBIT_COPY(name) LOWBIT_JOINED(name, LOWBIT_ISA)

static inline int64_t row_lanes(int64_t inputs, int bits) {
    return bits == 0 ? (inputs + 9) / 10 : (inputs + 63) / 64 * 4 * bits;
}

// Of a copy, in packing.cpp; arguments as in Kernels.
namespace LOWBIT_ISA {
void pack(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last);
void unpack(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last);
}  // namespace LOWBIT_ISA

}  // namespace lowbit
