// What an instruction set with products of bfloat16 offers to the interface. Arguments were checked by it.
#pragma once

#include "kernels.h"

namespace lowbit {

// Rows of the left matrix whose sums registers hold, and that meet one decoded panel at most; pairs along a panel, and its columns.
constexpr int BFLOAT16_TILE = 6, BFLOAT16_PAIRS = 128, BFLOAT16_COLUMNS = 256;
constexpr int64_t BFLOAT16_MOST = 44 * BFLOAT16_TILE;
constexpr int64_t BFLOAT16_FEW = 32;  // rows from which on it is faster than float32

struct Bfloat16Kernels {
    bool (*here)();
    int64_t (*scratch_floats)(const lowbit_weight *, int64_t m);
    // out (.., rows) from x (.., inputs): their rows begin .. end - 1, and of the weight rows 64 * from .. 64 * to - 1, those that it
    // has, BFLOAT16_COLUMNS at most.
    void (*linear)(const lowbit_weight *, Decode *, const uint16_t *x, const uint16_t *bias, uint16_t *out, int64_t begin, int64_t end,
                   int64_t from, int64_t to, float *scratch);
    // out (.., inputs) from gradient (.., rows), likewise, inputs 64 * from .. 64 * to - 1.
    void (*input_gradient)(const lowbit_weight *, Decode *, const uint16_t *gradient, uint16_t *out, int64_t begin, int64_t end,
                           int64_t from, int64_t to, float *scratch);
};

const Bfloat16Kernels &bfloat16_avx512();

}  // namespace lowbit
