// Many rows of bfloat16, forward and backward, where the processor multiplies pairs of it and adds to float32.
//
// One product serves both: a left matrix, of which a pair of neighbours in a row is broadcast, times a panel of pairs, 64 columns side
// by side, in tiles of sums that registers hold. Forward, columns are rows of the weight and pairs run along the inputs: 16 decoded
// rows at a time are transposed. Backward, columns are inputs and pairs are two rows of the weight. Decoded weights are rounded once to
// bfloat16; the sums of a panel begin at zero and are added to those before in float32, in an order that depends on the shape of the
// weight alone.

#include "bfloat16.h"

#include <immintrin.h>

#include <cstring>

#include "macros.h"

namespace lowbit {
namespace {

constexpr int TILE = BFLOAT16_TILE, VECTORS = 4, PAIRS = BFLOAT16_PAIRS, COLUMNS = BFLOAT16_COLUMNS;
constexpr int AT_ONCE = 16;  // rows of the weight

// sums (M, stride), 64 of them, += left (M, PAIRS) times panel (pairs, 64).
template <int M> void add_products(const uint32_t *panel, int64_t pairs, const uint32_t *left, float *sums, int64_t stride) {
    __m512 total[M][VECTORS];
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int i = 0; i < VECTORS; i++) total[m][i] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh v[VECTORS];
        UNROLL
        for (int i = 0; i < VECTORS; i++) v[i] = (__m512bh)_mm512_loadu_si512(panel + 64 * p + 16 * i);
        UNROLL
        for (int m = 0; m < M; m++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)left[m * PAIRS + p]);
            UNROLL
            for (int i = 0; i < VECTORS; i++) total[m][i] = _mm512_dpbf16_ps(total[m][i], v[i], a);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int i = 0; i < VECTORS; i++) {
            float *const to = sums + m * stride + 16 * i;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), total[m][i]));
        }
}

template <int M> void add_rest(const uint32_t *panel, int64_t pairs, const uint32_t *left, int64_t m, float *sums, int64_t stride) {
    if (m == M) return add_products<M>(panel, pairs, left, sums, stride);
    if constexpr (M > 1) add_rest<M - 1>(panel, pairs, left, m, sums, stride);
}

// sums (m, width) += left (m, PAIRS) times the panels of `width` columns.
void multiply(const uint32_t *panel, int64_t pairs, const uint32_t *left, int64_t m, float *sums, int64_t width) {
    for (int64_t k = 0; k < width; k += 64) {
        int64_t i = 0;
        for (; i + TILE <= m; i += TILE) add_products<TILE>(panel + k * PAIRS, pairs, left + i * PAIRS, sums + i * width + k, width);
        if (i < m) add_rest<TILE - 1>(panel + k * PAIRS, pairs, left + i * PAIRS, m - i, sums + i * width + k, width);
    }
}

// Columns `first` to `last` - 1 of m rows of (.., columns), from row i on, to pairs; a last one alone beside zero.
void copy(const uint16_t *from, int64_t i, int64_t m, int64_t columns, int64_t first, int64_t last, uint32_t *to) {
    for (const uint16_t *row = from + i * columns + first; m--; row += columns, to += PAIRS) {
        to[(last - first) / 2] = 0;
        memcpy(to, row, 2 * (size_t)(last - first));
    }
}

// 16 x 16 numbers transposed, to rows 64 numbers apart.
INLINE void transpose(const __m512i (&a)[16], uint32_t *to) {
    __m512i b[16], c[16];
    UNROLL
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 in each quarter of a register
        const __m512i w = _mm512_unpacklo_epi32(a[i], a[i + 1]), x = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        const __m512i y = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), z = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
        b[i] = _mm512_unpacklo_epi64(w, y), b[i + 1] = _mm512_unpackhi_epi64(w, y);
        b[i + 2] = _mm512_unpacklo_epi64(x, z), b[i + 3] = _mm512_unpackhi_epi64(x, z);
    }
    UNROLL
    for (int j = 0; j < 4; j++) {  // quarters
        c[j] = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), c[4 + j] = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD);
        c[8 + j] = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88), c[12 + j] = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD);
        _mm512_storeu_si512(to + 64 * j, _mm512_shuffle_i32x4(c[j], c[8 + j], 0x88));
        _mm512_storeu_si512(to + 64 * (4 + j), _mm512_shuffle_i32x4(c[4 + j], c[12 + j], 0x88));
        _mm512_storeu_si512(to + 64 * (8 + j), _mm512_shuffle_i32x4(c[j], c[8 + j], 0xDD));
        _mm512_storeu_si512(to + 64 * (12 + j), _mm512_shuffle_i32x4(c[4 + j], c[12 + j], 0xDD));
    }
}

INLINE __m512i rounded(const float *first, const float *second) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(second), _mm512_loadu_ps(first));
}

struct Scratch {
    float *grids, *rows, *sums;
    uint32_t *panel, *left;
    Scratch(const lowbit_weight *w, int64_t m, float *at)
        : grids(at), rows(at + grid_floats(w)), sums(rows + AT_ONCE * COLUMNS), panel((uint32_t *)(sums + m * COLUMNS)),
          left(panel + PAIRS * COLUMNS) {}
};

int64_t floats_for(const lowbit_weight *w, int64_t m) {
    const int64_t most = m < BFLOAT16_MOST ? m : BFLOAT16_MOST;
    return (grid_floats(w) + (AT_ONCE + PAIRS + most) * COLUMNS + most * PAIRS + 1 + 63) / 64 * 64;
}

void clear(float *sums, int64_t count) { memset(sums, 0, 4 * (size_t)count); }

// Rows `first` to `last` - 1 of the weight, inputs from `from` pieces on to `to`: a column each.
void columns_of_rows(const lowbit_weight *w, Decode *decode, int64_t first, int64_t last, int64_t from, int64_t to, const Scratch &s) {
    for (int64_t row = first; row < last; row += AT_ONCE) {
        const int64_t behind = row + AT_ONCE < last ? row + AT_ONCE : last, column = row - first;
        decode(w, row, behind, from, to, s.grids, s.rows, COLUMNS, 64);
        for (int64_t k = 0; k < 64 * (to - from); k += 32) {
            __m512i pairs[16];
            UNROLL
            for (int r = 0; r < 16; r++) pairs[r] = rounded(s.rows + COLUMNS * r + k, s.rows + COLUMNS * r + k + 16);
            transpose(pairs, s.panel + column / 64 * (64 * PAIRS) + k / 2 * 64 + column % 64);
        }
    }
}

void linear(const lowbit_weight *w, Decode *decode, const uint16_t *x, const uint16_t *bias, uint16_t *out, int64_t begin, int64_t end,
            int64_t from, int64_t to, float *scratch) {
    const int64_t K = w->inputs, pieces = (K + 63) / 64, step = 2 * PAIRS / 64, width = 64 * (to - from), first = 64 * from;
    const int64_t last = 64 * to < w->rows ? 64 * to : w->rows, most = end - begin < BFLOAT16_MOST ? end - begin : BFLOAT16_MOST;
    const Scratch s(w, most, scratch);
    memset(s.rows, 0, 4 * AT_ONCE * COLUMNS);
    for (int64_t i = begin; i < end; i += most) {
        const int64_t m = end - i < most ? end - i : most;
        clear(s.sums, m * width);
        for (int64_t p = 0; p < pieces; p += step) {
            const int64_t q = p + step < pieces ? p + step : pieces, behind = 64 * q < K ? 64 * q : K;
            columns_of_rows(w, decode, first, last, p, q, s);
            copy(x, i, m, K, 64 * p, behind, s.left);
            multiply(s.panel, (behind - 64 * p + 1) / 2, s.left, m, s.sums, width);
        }
        for (int64_t j = 0; j < m; j++)
            for (int64_t n = first; n < last; n += 16) {
                const __mmask16 inside = (__mmask16)(last - n < 16 ? (1u << (last - n)) - 1 : 0xFFFFu);
                __m512 sum = _mm512_loadu_ps(s.sums + j * width + n - first);
                if (bias) {
                    const __m512i added = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, bias + n));
                    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(added, 16)));
                }
                _mm256_mask_storeu_epi16(out + (i + j) * w->rows + n, inside, (__m256i)_mm512_cvtneps_pbh(sum));
            }
    }
}

// Rows `first` to `last` - 1 of the weight, a pair of them for each pair of neighbours in the gradient.
void pairs_of_rows(const lowbit_weight *w, Decode *decode, int64_t first, int64_t last, int64_t from, int64_t to, const Scratch &s) {
    alignas(64) static const uint16_t INTERLEAVE[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(INTERLEAVE);
    for (int64_t row = first; row < last; row += AT_ONCE) {
        const int64_t behind = row + AT_ONCE < last ? row + AT_ONCE : last;
        decode(w, row, behind, from, to, s.grids, s.rows, COLUMNS, 64);
        if ((behind - row) % 2) clear(s.rows + COLUMNS * (behind - row), COLUMNS);
        for (int64_t r = 0; r < behind - row; r += 2)
            for (int64_t k = 0; k < 64 * (to - from); k += 16) {
                const float *const two = s.rows + COLUMNS * r + k;
                const __m512i pairs = _mm512_permutexvar_epi16(interleave, rounded(two, two + COLUMNS));
                _mm512_storeu_si512(s.panel + k / 64 * (64 * PAIRS) + (row - first + r) / 2 * 64 + k % 64, pairs);
            }
    }
}

void input_gradient(const lowbit_weight *w, Decode *decode, const uint16_t *gradient, uint16_t *out, int64_t begin, int64_t end,
                    int64_t from, int64_t to, float *scratch) {
    const int64_t width = 64 * (to - from), first = 64 * from, last = 64 * to < w->inputs ? 64 * to : w->inputs;
    const int64_t most = end - begin < BFLOAT16_MOST ? end - begin : BFLOAT16_MOST;
    const Scratch s(w, most, scratch);
    for (int64_t i = begin; i < end; i += most) {
        const int64_t m = end - i < most ? end - i : most;
        clear(s.sums, m * width);
        for (int64_t n = 0; n < w->rows; n += 2 * PAIRS) {
            const int64_t behind = n + 2 * PAIRS < w->rows ? n + 2 * PAIRS : w->rows;
            pairs_of_rows(w, decode, n, behind, from, to, s);
            copy(gradient, i, m, w->rows, n, behind, s.left);
            multiply(s.panel, (behind - n + 1) / 2, s.left, m, s.sums, width);
        }
        for (int64_t j = 0; j < m; j++)
            for (int64_t k = first; k < last; k += 16) {
                const __mmask16 inside = (__mmask16)(last - k < 16 ? (1u << (last - k)) - 1 : 0xFFFFu);
                const __m512 sum = _mm512_loadu_ps(s.sums + j * width + k - first);
                _mm256_mask_storeu_epi16(out + (i + j) * w->inputs + k, inside, (__m256i)_mm512_cvtneps_pbh(sum));
            }
    }
}

bool here() { return __builtin_cpu_supports("avx512bf16"); }

const Bfloat16Kernels KERNELS = {here, floats_for, linear, input_gradient};

}  // namespace

const Bfloat16Kernels &bfloat16_avx512() { return KERNELS; }

}  // namespace lowbit
