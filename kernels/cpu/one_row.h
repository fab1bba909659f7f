// What an instruction set with integer products of one row of x offers to the interface. Arguments were checked by it.
#pragma once

#include "kernels.h"

namespace lowbit {

constexpr int ONE_ROW_TILE = 4;  // rows of the weight that are multiplied at once

struct OneRowKernels {
    bool (*here)();
    // Whether a weight is served; `digits`: of x, 1 for activations in 8 bits, else 3.
    bool (*serves)(const lowbit_weight *, int digits);
    // Bytes that `prepare` fills, and floats of scratch memory that `linear` needs.
    int64_t (*prepared_bytes)(const lowbit_weight *, int digits);
    int64_t (*scratch_floats)(const lowbit_weight *);
    // One row of x, and what all rows of the weight share; levels and steps as in lowbit_linear_int8. False, with three digits, for an x
    // that is not finite or too small for them: then it is not to be multiplied here.
    bool (*prepare)(const lowbit_weight *, const uint8_t *levels, const float *steps, const void *x, int dtype, int digits, uint8_t *to);
    void (*linear)(const lowbit_weight *, int digits, const uint8_t *prepared, const void *bias, void *out, int dtype, int64_t first,
                   int64_t last, float *scratch);
};

const OneRowKernels &one_row_avx512vbmi();

}  // namespace lowbit
