// The branch of a low-rank adapter and its gradients, compiled once for each instruction set.
//
// Its products are thin: a rank of 8 to 64 on one side. Sums of a product are held in registers for a tile of RANKS ranks, and what is
// wide is read once, in its own dtype, for all of them. Factors come padded to whole tiles of ranks and whole vectors (PaddedFactor in
// api.cpp), so only x, the gradient and the results have ends to look after.

#include "decode.h"

namespace lowbit {
namespace LOWBIT_ISA {

#if defined(LOWBIT_AVX512)
constexpr int RANKS = 8, DOT_ROWS = 3, WIDE = 2, WIDE_ROWS = 4, DEEP = 3;
#else
constexpr int RANKS = 4, DOT_ROWS = 1, WIDE = 1, WIDE_ROWS = 3, DEEP = 1;
#endif
static_assert(RANK_TILE % RANKS == 0, "factors are padded to whole tiles");

// The last numbers of a row, `count` of them, then zeros.
static F load_end(const void *from, int64_t i, int64_t count, int dtype) {
    float values[16] = {0};
    for (int64_t j = 0; j < count; j++) values[j] = read(from, i + j, dtype);
    return load(values);
}

// total (M, V) = left, whose entry (m, d) is left[m * across + d * along], times vectors get(d, 0 .. V - 1), for d below `depth`.
template <int M, int V, class Get>
INLINE void outer(const float *left, int64_t across, int64_t along, int64_t depth, F (&total)[M][V], Get get) {
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int i = 0; i < V; i++) total[m][i] = zero();
    for (int64_t d = 0; d < depth; d++) {
        F v[V];
        UNROLL
        for (int i = 0; i < V; i++) v[i] = get(d, i);
        UNROLL
        for (int m = 0; m < M; m++) {
            const F a = set1(left[m * across + d * along]);
            UNROLL
            for (int i = 0; i < V; i++) total[m][i] = fma(v[i], a, total[m][i]);
        }
    }
}

// to (M, stride) = rows i .. i + M - 1 of x (.., width) times the factor (ranks, padded) transposed.
template <int M> static void dots(const void *x, int64_t i, int64_t width, int dtype, const PaddedFactor &factor, float *to) {
    for (int64_t rank = 0; rank < factor.ranks; rank += RANKS) {
        const float *const rows = factor.data + rank * factor.width;
        F total[M][RANKS];
        UNROLL
        for (int m = 0; m < M; m++)
            UNROLL
            for (int r = 0; r < RANKS; r++) total[m][r] = zero();
        auto step = [&](int64_t k, const F (&a)[M]) __attribute__((always_inline)) {
            UNROLL
            for (int r = 0; r < RANKS; r++) {
                const F v = load(rows + r * factor.width + k);
                UNROLL
                for (int m = 0; m < M; m++) total[m][r] = fma(v, a[m], total[m][r]);
            }
        };
        int64_t k = 0;
        F a[M];
        for (; k + 16 <= width; k += 16) {
            UNROLL
            for (int m = 0; m < M; m++) a[m] = load_as(x, (i + m) * width + k, dtype);
            step(k, a);
        }
        if (k < width) {
            for (int m = 0; m < M; m++) a[m] = load_end(x, (i + m) * width + k, width - k, dtype);
            step(k, a);
        }
        UNROLL
        for (int m = 0; m < M; m++)
            UNROLL
            for (int r = 0; r < RANKS; r++) to[m * factor.ranks + rank + r] = sum(total[m][r]);
    }
}

void low_rank_dots(const void *x, int64_t begin, int64_t end, int64_t width, int dtype, const PaddedFactor &factor, float *to) {
    int64_t i = begin;
    for (; i + DOT_ROWS <= end; i += DOT_ROWS) dots<DOT_ROWS>(x, i, width, dtype, factor, to + i * factor.ranks);
    for (; i < end; i++) dots<1>(x, i, width, dtype, factor, to + i * factor.ranks);
}

// Rows i .. i + M - 1, columns k on, V vectors of them.
template <int M, int V>
static void wide(const float *left, const PaddedFactor &factor, float scale, const void *added, void *out, int64_t i, int64_t k,
                 int64_t width, int dtype) {
    F total[M][V];
    outer<M, V>(left + i * factor.ranks, factor.ranks, 1, factor.ranks, total,
                [&](int64_t d, int v) __attribute__((always_inline)) { return load(factor.data + d * factor.width + k + 16 * v); });
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int v = 0; v < V; v++) {
            const int64_t row = (i + m) * width, at = k + 16 * v;
            F sums = mul(total[m][v], set1(scale));
            if (added) sums = add(sums, at + 16 <= width ? load_as(added, row + at, dtype) : load_end(added, row + at, width - at, dtype));
            put(out, row, at, width, dtype, sums);
        }
}

template <int M>
static void wide_rows(const float *left, const PaddedFactor &factor, float scale, const void *added, void *out, int64_t i, int64_t width,
                      int dtype) {
    int64_t k = 0;
    for (; k + 16 * WIDE <= width; k += 16 * WIDE) wide<M, WIDE>(left, factor, scale, added, out, i, k, width, dtype);
    for (; k < width; k += 16) wide<M, 1>(left, factor, scale, added, out, i, k, width, dtype);
}

void low_rank_wide(const float *left, const PaddedFactor &factor, float scale, const void *added, void *out, int64_t begin, int64_t end,
                   int64_t width, int dtype) {
    int64_t i = begin;
    for (; i + WIDE_ROWS <= end; i += WIDE_ROWS) wide_rows<WIDE_ROWS>(left, factor, scale, added, out, i, width, dtype);
    for (; i < end; i++) wide_rows<1>(left, factor, scale, added, out, i, width, dtype);
}

void low_rank_deep(const float *left, int64_t ranks, int64_t m, const void *x, int64_t width, int dtype, int64_t from, int64_t to,
                   float scale, float *out, int64_t rank, int64_t across, int64_t along) {
    for (int64_t first = 0; first < rank; first += RANKS) {
        auto keep = [&](int64_t k, F a, int r) __attribute__((always_inline)) {
            if (first + r >= rank) return;
            float values[16];
            store(values, mul(a, set1(scale)));
            for (int64_t j = 0; j < 16 && k + j < to; j++) out[(first + r) * across + (k + j) * along] = values[j];
        };
        int64_t k = from;
        for (; k + 16 * DEEP <= to; k += 16 * DEEP) {
            F total[RANKS][DEEP];
            outer<RANKS, DEEP>(left + first, 1, ranks, m, total, [&](int64_t d, int v) __attribute__((always_inline)) {
                return load_as(x, d * width + k + 16 * v, dtype);
            });
            UNROLL
            for (int r = 0; r < RANKS; r++)
                UNROLL
                for (int v = 0; v < DEEP; v++) keep(k + 16 * v, total[r][v], r);
        }
        for (; k < to; k += 16) {
            F total[RANKS][1];
            const int64_t count = to - k < 16 ? to - k : 16;
            outer<RANKS, 1>(left + first, 1, ranks, m, total, [&](int64_t d, int) __attribute__((always_inline)) {
                return count == 16 ? load_as(x, d * width + k, dtype) : load_end(x, d * width + k, count, dtype);
            });
            UNROLL
            for (int r = 0; r < RANKS; r++) keep(k, total[r][0], r);
        }
    }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
