// Products with activations in 8 bits: what one instruction set offers to the interface, and how its memory is cut.
//
// Inputs are cut into units, the largest runs within which weight and activation have one scale each. A sum of products within a
// unit is an exact integer.
#pragma once

#include <cstdint>

#include "lowbit_cpu.h"

namespace lowbit {

constexpr int INT8_STRIP = 16;    // rows of the weight that lie side by side in a vector
constexpr int INT8_STRIPS = 2;    // at most, that are multiplied at once
constexpr int INT8_CHUNK = 8;     // blocks of 64 inputs that are decoded at once, 8 KB a strip
constexpr int INT8_TOKENS = 512;  // rows of x that share what was decoded
constexpr int INT8_UNITS = 64 * INT8_CHUNK / 16;  // of a chunk, at most

static inline int64_t int8_unit(const lowbit_weight *w) { return w->group && w->group < 128 ? w->group : 128; }
static inline int64_t int8_group(const lowbit_weight *w) { return int8_unit(w) < 32 ? 32 : int8_unit(w); }

// Rows of x in 8 bits. `codes` (count, stride), zero from the weight's inputs on; `scales` and `sums` (count, units): what a code
// of a unit is worth, NaN in a row with anything that is not finite, and that times the sum of its codes.
struct Tokens {
    int8_t *codes;
    float *scales, *sums;
    int64_t count, stride, units;
};

// Levels of a table (1 or rows, 2^bits), 128 added, and what one step of them is worth (1 or rows); null without a table.
struct Int8Table {
    const uint8_t *levels;
    const float *steps;
};

// Bytes of scratch memory that `linear` needs.
static inline int64_t int8_scratch(const lowbit_weight *w, int64_t m) {
    const int64_t rows = INT8_STRIPS * INT8_STRIP, blocks = (w->inputs + 63) / 64;
    return rows * (64 * INT8_CHUNK + 8 * INT8_UNITS + 4 * (m < INT8_TOKENS ? m : INT8_TOKENS) + (w->bits ? 0 : 64 * blocks)) + 64;
}

struct Int8Kernels {
    const char *name;
    bool (*here)();
    // Rows first .. last - 1 of x to tokens; `row`: stride floats of scratch memory.
    void (*quantize)(const lowbit_weight *, const void *x, int dtype, const Tokens &, int64_t first, int64_t last, float *row);
    void (*linear)(const lowbit_weight *, const Int8Table &, const Tokens &, const void *bias, void *out, int dtype, int64_t first,
                   int64_t last, uint8_t *scratch);
};

const Int8Kernels &int8_avx512vnni();
const Int8Kernels &int8_avx512();
const Int8Kernels &int8_avx2();
const Int8Kernels &int8_neondot();
const Int8Kernels &int8_neon();
const Int8Kernels &int8_portable();

}  // namespace lowbit
