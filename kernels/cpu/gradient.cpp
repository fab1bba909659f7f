// The gradient of a product with respect to x: out (m, inputs) = gradient (m, rows) times the weight, compiled once for each
// instruction set.
//
// Here a decoded row of the weight meets one number of the gradient, so 16 inputs are one vector of sums, and nothing is added up
// within a vector. GRADIENT_ROWS rows of the weight, GRADIENT_INPUTS wide, are decoded into a panel that a core's second cache
// holds, 64 inputs side by side, and multiplied by all rows of the gradient, GRADIENT_MOST at most, whose part that meets the panel
// is copied beside it. Sums over a panel begin at zero and are added to those of the panels before, so the order of a sum depends on
// the number of rows of the weight alone.

#include "decode.h"

namespace lowbit {
namespace LOWBIT_ISA {

#if defined(LOWBIT_AVX512)
constexpr int TILE = GRADIENT_TILE, VECTORS = 4;  // rows of the gradient and vectors of inputs whose sums are held in registers
#elif defined(LOWBIT_AVX2) || defined(LOWBIT_NEON)
constexpr int TILE = GRADIENT_TILE, VECTORS = 1;
#else
constexpr int TILE = 2, VECTORS = 1;
#endif

// sums (M, stride), 64 of them, += gradient (M, GRADIENT_ROWS) times panel (rows, 64).
template <int M> static void add_products(const float *panel, int64_t rows, const float *gradient, float *sums, int64_t stride) {
    for (int64_t k = 0; k < 64; k += 16 * VECTORS) {
        F total[M][VECTORS];
        UNROLL
        for (int m = 0; m < M; m++)
            UNROLL
            for (int i = 0; i < VECTORS; i++) total[m][i] = zero();
        for (int64_t n = 0; n < rows; n++) {
            F v[VECTORS];
            UNROLL
            for (int i = 0; i < VECTORS; i++) v[i] = load(panel + 64 * n + k + 16 * i);
            UNROLL
            for (int m = 0; m < M; m++) {
                const F a = set1(gradient[m * GRADIENT_ROWS + n]);
                UNROLL
                for (int i = 0; i < VECTORS; i++) total[m][i] = fma(v[i], a, total[m][i]);
            }
        }
        UNROLL
        for (int m = 0; m < M; m++)
            UNROLL
            for (int i = 0; i < VECTORS; i++) {
                float *const to = sums + m * stride + k + 16 * i;
                store(to, add(load(to), total[m][i]));
            }
    }
}

template <int M> static void add_rest(const float *panel, int64_t rows, const float *gradient, int64_t m, float *sums, int64_t stride) {
    if (m == M) return add_products<M>(panel, rows, gradient, sums, stride);
    if constexpr (M > 1) add_rest<M - 1>(panel, rows, gradient, m, sums, stride);
}

// ---------------------------------------------------------------- decoding: 64 inputs of some rows, then the next 64

// A processor does not see short pieces of many rows as streams: what a row further on needs is fetched early, its first plane at least.
constexpr int64_t AHEAD = 8;

INLINE void fetch(const lowbit_weight *w, int64_t row, int64_t from, int64_t to, int64_t groups, int64_t start) {
    const int64_t bytes = 8 * (w->bits & 8 ? 8 : w->bits & 4 ? 4 : w->bits & 2 ? 2 : 1);  // of a block
    const char *const codes = (const char *)(w->codes + row * row_lanes(w->inputs, w->bits));
    for (int64_t i = bytes * from; i < bytes * to; i += 64) __builtin_prefetch(codes + i, 0, 3);
    if (w->scale == LOWBIT_SCALE_BYTE) __builtin_prefetch((const char *)w->scales + row * groups + start, 0, 3);
}

template <int BITS, Kind KIND, bool FINE>
static void decode(const lowbit_weight *w, int64_t first, int64_t last, int64_t from, int64_t to, float *grids, float *panel, int64_t row,
                   int64_t block) {
    const int64_t groups = groups_of(w), group = w->group ? w->group : 64 * to;
    const int64_t start = 64 * from / group & ~(int64_t)7, behind = (64 * to + group - 1) / group, end = behind < groups ? behind : groups;
    float *const zeros = grids + groups + 16;
    for (int64_t n = first; n < last; n++, panel += row) {
        if (n + AHEAD < w->rows) fetch(w, n + AHEAD, from, to, groups, start);
        read_scales(w, n, start, end, grids);
        if (KIND == INTEGER) read_zeros<BITS>(w, n, start, end, zeros);
        walk<BITS, KIND, FINE, false>(w, n, from, to, grids, zeros, [&](int64_t k, F v) __attribute__((always_inline)) {
            store(panel + ((k >> 6) - from) * block + (k & 63), v);
        });
    }
}

static void decode_ternary(const lowbit_weight *w, int64_t first, int64_t last, int64_t from, int64_t to, float *grids, float *panel,
                           int64_t row, int64_t block) {
    for (int64_t n = first; n < last; n++, panel += row) {
        read_scales(w, n, 0, groups_of(w), grids);
        walk_ternary(w, n, from, to, grids, [&](int64_t k, F v, int) __attribute__((always_inline)) {
            k -= TERNARY_PIECE * from;
            store(panel + (k >> 6) * block + (k & 63), v);
        });
    }
}

Decode *decoder(const lowbit_weight *w) {
    if (w->bits == 0) return decode_ternary;
#define CALL(BITS, KIND) return fine(w) ? decode<BITS, KIND, true> : decode<BITS, KIND, false>;
    FOR_BITS
#undef CALL
}

// ---------------------------------------------------------------- the entry

// Columns `first` to `last` - 1 of row i of (.., rows), as floats.
static void copy(const void *gradient, int64_t i, int64_t rows, int dtype, int64_t first, int64_t last, float *to) {
    int64_t n = first;
    for (; n + 16 <= last; n += 16, to += 16) store(to, load_as(gradient, i * rows + n, dtype));
    for (; n < last; n++) *to++ = read(gradient, i * rows + n, dtype);
}

// Sums of pieces `from` to `to` - 1 to row i of out.
static void write_sums(const lowbit_weight *w, const float *sums, void *out, int64_t i, int dtype, int64_t from, int64_t to) {
    const int64_t K = w->inputs, lanes = (K + 9) / 10;
    for (int64_t k = 64 * from; w->bits && k < 64 * to && k < K; k += 16) put(out, i * K, k, K, dtype, load(sums + k - 64 * from));
    for (int64_t l = TERNARY_LANES * from; w->bits == 0 && l < TERNARY_LANES * to; l += TERNARY_LANES)
        for (int64_t j = 0; j < 10; j++, sums += TERNARY_LANES)
            for (int64_t p = 0; p < TERNARY_LANES; p++) {
                const int64_t k = j * lanes + l + p;
                if (l + p < lanes && k < K) write(out, i * K + k, dtype, sums[p / 2 + p % 2 * 16]);
            }
}

void input_gradient(const lowbit_weight *w, const void *gradient, int64_t begin, int64_t end, void *out, int dtype, int64_t from,
                    int64_t to, float *scratch) {
    const int64_t width = piece_inputs(w) * (to - from), most = end - begin < GRADIENT_MOST ? end - begin : GRADIENT_MOST;
    float *const panel = scratch + grid_floats(w), *const part = panel + GRADIENT_ROWS * width;
    float *const sums = part + most * GRADIENT_ROWS;
    Decode *const decode = decoder(w);
    for (int64_t i = begin; i < end; i += most) {
        const int64_t m = end - i < most ? end - i : most;
        for (int64_t p = 0; p < m * width; p += 16) store(sums + p, zero());
        for (int64_t n = 0; n < w->rows; n += GRADIENT_ROWS) {
            const int64_t last = n + GRADIENT_ROWS < w->rows ? n + GRADIENT_ROWS : w->rows;
            decode(w, n, last, from, to, scratch, panel, 64, 64 * GRADIENT_ROWS);
            for (int64_t j = 0; j < m; j++) copy(gradient, i + j, w->rows, dtype, n, last, part + j * GRADIENT_ROWS);
            for (int64_t k = 0; k < width; k += 64) {
                const float *const here = panel + k * GRADIENT_ROWS;
                int64_t j = 0;
                for (; j + TILE <= m; j += TILE) add_products<TILE>(here, last - n, part + j * GRADIENT_ROWS, sums + j * width + k, width);
                if (j < m) add_rest<TILE - 1>(here, last - n, part + j * GRADIENT_ROWS, m - j, sums + j * width + k, width);
            }
        }
        for (int64_t j = 0; j < m; j++) write_sums(w, sums + j * width, out, i + j, dtype, from, to);
    }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
