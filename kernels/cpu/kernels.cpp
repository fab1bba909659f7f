// Products, decoded rows and the entries to them, compiled once for each instruction set (LOWBIT_ISA names the copy).
//
// Products multiply what decode.h reads; a sum differs from another only in its order.
//
// No function of the standard library is used here that could be shared, compiled for the wrong processor, with other files.

#include "decode.h"

namespace lowbit {
namespace LOWBIT_ISA {

// ---------------------------------------------------------------- one row of x: multiply while decoding

template <int BITS, Kind KIND, bool FINE>
static void product(const lowbit_weight *w, const float *x, const void *bias, void *out, int dtype, int64_t first, int64_t last,
                    float *scratch) {
    for (int64_t row = first; row < last; row++) {
        F total[2] = {zero(), zero()};  // two sums hide the latency of an addition
        walk<BITS, KIND, FINE>(w, row, 0, (w->inputs + 63) / 64, scratch, [&](int64_t k, F v, auto vector) __attribute__((always_inline)) {
            constexpr int half = decltype(vector)::value & 1;
            total[half] = fma(v, load(x + k), total[half]);
        });
        write(out, row, dtype, sum(add(total[0], total[1])) + (bias ? read(bias, row, dtype) : 0.0f));
    }
}

static void ternary_product(const lowbit_weight *w, const float *x, const void *bias, void *out, int dtype, int64_t first,
                            int64_t last, float *scratch) {
    const int64_t whole = (w->inputs + 15) / 16 * 16;
    float *const values = scratch + 2 * groups_of(w);
    for (int64_t row = first; row < last; row++) {
        ternary_row(w, row, values, scratch);
        for (int64_t k = w->inputs; k < whole; k++) values[k] = 0;
        F total = zero();
        for (int64_t k = 0; k < whole; k += 16) total = fma(load(values + k), load(x + k), total);
        write(out, row, dtype, sum(total) + (bias ? read(bias, row, dtype) : 0.0f));
    }
}

// ---------------------------------------------------------------- more rows of x: decode a panel, then multiply

template <int BITS, Kind KIND, bool FINE>
static void decode(const lowbit_weight *w, int64_t first, int rows, int64_t from, int64_t to, float *panel, float *scratch) {
    for (int r = 0; r < rows; r++) {
        float *p = panel + r * 64 * (to - from) - 64 * from;
        walk<BITS, KIND, FINE>(w, first + r, from, to, scratch, [&](int64_t k, F v, auto) __attribute__((always_inline)) { store(p + k, v); });
    }
}

// sums (M, PANEL_ROWS) += x (M, stride) times panel (R, count) transposed.
template <int R, int M>
static void multiply(const float *panel, int64_t count, const float *x, int64_t stride, float *sums) {
    F total[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) total[r][m] = zero();
    for (int64_t k = 0; k < count; k += 16) {
        F v[R];
        for (int r = 0; r < R; r++) v[r] = load(panel + r * count + k);
        for (int m = 0; m < M; m++) {
            const F a = load(x + m * stride + k);
            for (int r = 0; r < R; r++) total[r][m] = fma(v[r], a, total[r][m]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) sums[m * PANEL_ROWS + r] += sum(total[r][m]);
}

template <int R> static void multiply_rows(const float *panel, int64_t count, const float *x, int64_t stride, int64_t m, float *sums) {
    for (; m >= 6; m -= 6, x += 6 * stride, sums += 6 * PANEL_ROWS) multiply<R, 6>(panel, count, x, stride, sums);
    switch (m) {
        case 5: return multiply<R, 5>(panel, count, x, stride, sums);
        case 4: return multiply<R, 4>(panel, count, x, stride, sums);
        case 3: return multiply<R, 3>(panel, count, x, stride, sums);
        case 2: return multiply<R, 2>(panel, count, x, stride, sums);
        case 1: return multiply<R, 1>(panel, count, x, stride, sums);
    }
}

typedef void (*Decode)(const lowbit_weight *, int64_t, int, int64_t, int64_t, float *, float *);

static void ternary_decode(const lowbit_weight *w, int64_t first, int rows, int64_t, int64_t to, float *panel, float *scratch) {
    for (int r = 0; r < rows; r++) {  // whole rows: digits of a lane lie far apart
        float *row = panel + r * 64 * to;
        ternary_row(w, first + r, row, scratch);
        for (int64_t k = w->inputs; k < 64 * to; k++) row[k] = 0;
    }
}

static void products(const lowbit_weight *w, Decode decode, const float *x, int64_t stride, int64_t m, const void *bias, void *out,
                     int dtype, int64_t first, int64_t last, float *scratch) {
    const int64_t blocks = (w->inputs + 63) / 64, step = w->bits ? PANEL_BLOCKS : blocks;
    float *const panel = scratch + 2 * groups_of(w), *const sums = panel + PANEL_ROWS * 64 * (step < blocks ? step : blocks);
    for (int64_t row = first; row < last; row += PANEL_ROWS) {
        const int rows = (int)(last - row < PANEL_ROWS ? last - row : PANEL_ROWS);
        for (int64_t i = 0; i < m * PANEL_ROWS; i++) sums[i] = 0;
        for (int64_t from = 0; from < blocks; from += step) {
            const int64_t to = from + step < blocks ? from + step : blocks, count = 64 * (to - from);
            decode(w, row, rows, from, to, panel, scratch);
            int r = 0;
            for (; r + 4 <= rows; r += 4) multiply_rows<4>(panel + r * count, count, x + 64 * from, stride, m, sums + r);
            for (; r < rows; r++) multiply_rows<1>(panel + r * count, count, x + 64 * from, stride, m, sums + r);
        }
        for (int64_t i = 0; i < m; i++)
            for (int r = 0; r < rows; r++)
                write(out, i * w->rows + row + r, dtype,
                      sums[i * PANEL_ROWS + r] + (bias ? read(bias, row + r, dtype) : 0.0f));
    }
}

// ---------------------------------------------------------------- rows of the weight

template <int BITS, Kind KIND, bool FINE>
static void dequantize_rows(const lowbit_weight *w, const int64_t *index, int64_t start, void *out, int dtype, int64_t first,
                            int64_t last, float *scratch) {
    const int64_t K = w->inputs;
    for (int64_t i = first; i < last; i++) {
        walk<BITS, KIND, FINE>(w, index ? index[i] : start + i, 0, (K + 63) / 64, scratch,
                               [&](int64_t k, F v, auto) __attribute__((always_inline)) {
            if (k + 16 <= K && dtype == LOWBIT_F32) {
                store((float *)out + i * K + k, v);
            } else if (k + 16 <= K) {
                (dtype == LOWBIT_F16 ? to_halves : to_bhalves)((uint16_t *)out + i * K + k, v);
            } else {
                float values[16];
                store(values, v);
                for (int64_t j = 0; j < 16 && k + j < K; j++) write(out, i * K + k + j, dtype, values[j]);
            }
        });
    }
}

// ---------------------------------------------------------------- the entries: from numbers to template arguments

#define FOR_GROUP(CALL, BITS, KIND) return fine ? CALL<BITS, KIND, true> ARGUMENTS : CALL<BITS, KIND, false> ARGUMENTS;
#define FOR_KIND(CALL, BITS)                       \
    if (w->table) FOR_GROUP(CALL, BITS, TABLE)     \
    FOR_GROUP(CALL, BITS, INTEGER)
#define FOR_BITS(CALL)                             \
    switch (w->bits) {                             \
        case 1: FOR_GROUP(CALL, 1, INTEGER)        \
        case 2: FOR_GROUP(CALL, 2, INTEGER)        \
        case 3: FOR_GROUP(CALL, 3, INTEGER)        \
        case 4: FOR_GROUP(CALL, 4, INTEGER)        \
        case 5: FOR_KIND(CALL, 5)                  \
        case 6: FOR_KIND(CALL, 6)                  \
        case 7: FOR_KIND(CALL, 7)                  \
        default: FOR_KIND(CALL, 8)                 \
    }

static void linear_one(const lowbit_weight *w, const float *x, const void *bias, void *out, int dtype, int64_t first, int64_t last,
                       float *scratch) {
    if (w->bits == 0) return ternary_product(w, x, bias, out, dtype, first, last, scratch);
    const bool fine = w->group && w->group < 64;
#define ARGUMENTS (w, x, bias, out, dtype, first, last, scratch)
    FOR_BITS(product)
#undef ARGUMENTS
}

static Decode decoder(const lowbit_weight *w) {
    if (w->bits == 0) return ternary_decode;
    const bool fine = w->group && w->group < 64;
#define ARGUMENTS
    FOR_BITS(decode)
#undef ARGUMENTS
}

static void linear(const lowbit_weight *w, const float *x, int64_t stride, int64_t m, const void *bias, void *out, int dtype,
                   int64_t first, int64_t last, float *scratch) {
    if (m == 1) return linear_one(w, x, bias, out, dtype, first, last, scratch);
    products(w, decoder(w), x, stride, m, bias, out, dtype, first, last, scratch);
}

static void dequantize(const lowbit_weight *w, const int64_t *index, int64_t start, void *out, int dtype, int64_t first,
                       int64_t last, float *scratch) {
    if (w->bits == 0) {
        for (int64_t i = first; i < last; i++) {
            float *const values = scratch + 2 * groups_of(w);
            ternary_row(w, index ? index[i] : start + i, values, scratch);
            for (int64_t k = 0; k < w->inputs; k++) write(out, i * w->inputs + k, dtype, values[k]);
        }
        return;
    }
    const bool fine = w->group && w->group < 64;
#define ARGUMENTS (w, index, start, out, dtype, first, last, scratch)
    FOR_BITS(dequantize_rows)
#undef ARGUMENTS
}

// ---------------------------------------------------------------- this copy

static bool here() {
#if defined(LOWBIT_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
#elif defined(LOWBIT_AVX2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return true;
#endif
}

static const Kernels KERNELS = {LOWBIT_ISA_NAME, here, linear, dequantize, widen, pack, unpack};

}  // namespace LOWBIT_ISA

const Kernels &LOWBIT_COPY(kernels_)() { return LOWBIT_ISA::KERNELS; }

}  // namespace lowbit
