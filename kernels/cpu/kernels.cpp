// Products, decoded rows and the entries to them, compiled once for each instruction set (LOWBIT_ISA names the copy).
//
// Products take x in the order in which weights are decoded with the fewest instructions, into which `arrange` brings it once. One
// row of x is multiplied while the weight is decoded, and a group's scale multiplies the group's sum; its zero point goes into
// the table of values, so nothing is subtracted afterwards that could cancel. For more rows of x a small panel of the weight is
// decoded. A sum differs from another only in its order, which depends on neither the number of threads nor the other rows.
//
// No function of the standard library is used here that could be shared, compiled for the wrong processor, with other files.

#include "decode.h"

namespace lowbit {
namespace LOWBIT_ISA {

// ---------------------------------------------------------------- x, in the order in which weights are decoded

static void arrange_ternary(const lowbit_weight *w, const void *x, float *to, int dtype, int64_t row) {
    const int64_t K = w->inputs, lanes = (K + 9) / 10;
    for (int64_t l = 0; l < lanes; l += TERNARY_LANES)
        for (int64_t j = 0; j < 10; j++, to += TERNARY_LANES)
            for (int64_t i = 0; i < TERNARY_LANES; i++) {
                const int64_t k = j * lanes + l + i;
                to[i / 2 + i % 2 * 16] = l + i < lanes && k < K ? read(x, row * K + k, dtype) : 0.0f;
            }
}

static void arrange(const lowbit_weight *w, const void *x, float *to, int dtype, int64_t first, int64_t last) {
    const int64_t K = w->inputs, stride = arranged_inputs(w);
    const bool natural = w->bits == 4 || w->bits == 8;
    for (int64_t i = first; i < last; i++) {
        float *row = to + i * stride;
        if (w->bits == 0) {
            arrange_ternary(w, x, row, dtype, i);
            continue;
        }
        int64_t k = 0;
        for (; k + 16 <= K; k += 16) {
            const F values = load_as(x, i * K + k, dtype);
            store(row + k, natural ? values : evens_odds(values));
        }
        for (; k < stride; k += 16) {
            float values[16];
            for (int64_t j = 0; j < 16; j++) values[j] = k + j < K ? read(x, i * K + k + j, dtype) : 0.0f;
            store(row + k, natural ? load(values) : evens_odds(load(values)));
        }
    }
}

// ---------------------------------------------------------------- one row of x: multiply while decoding

#if defined(LOWBIT_AVX512)
constexpr int AT_ONCE = MOST_AT_ONCE;
#else
constexpr int AT_ONCE = 1;  // fewer registers, or none that the compiler is sure to use
#endif

// Rows of the weight that are multiplied at once.
struct Rows {
    const uint16_t *lanes[AT_ONCE];
    const uint8_t *bytes[AT_ONCE];  // scales in 8 bits
    const float *scales[AT_ONCE], *zeros[AT_ONCE], *levels[AT_ONCE];
    F first[AT_ONCE], grid[AT_ONCE], part[AT_ONCE], total[AT_ONCE];  // first: levels for up to 4 bits
};

// Vector V of a block, the values at x; g: the first group of the block. The scale of a group multiplies its sum, or that of each
// block in it.
template <int BITS, Kind KIND, int UNIT, bool BYTE, int V>
INLINE void step(Rows &rows, const U (&word)[AT_ONCE][2], const float *x, const float *table, int64_t g) {
    constexpr bool first = 16 * V % UNIT == 0, last = 16 * (V + 1) % UNIT == 0;
    g += 16 * V / UNIT;
    const F a = load_held(x + 16 * V);
    UNROLL
    for (int r = 0; r < AT_ONCE; r++) {
        if (first && KIND == INTEGER) {
            rows.grid[r] = set1(rows.zeros[r][g]);
            if (BITS <= 4) rows.grid[r] = sub(rows.first[r], rows.grid[r]);
        }
        const U c = code<BITS, V>(word[r]);
        F v;
        if constexpr (BITS <= 3)
            v = lookup8(rows.grid[r], c);
        else if constexpr (BITS == 4)
            v = lookup(rows.grid[r], c);
        else if constexpr (KIND == TABLE)
            v = lookup_wide<BITS>(rows.levels[r], c);
        else
            v = sub(to_float(c), rows.grid[r]);
        rows.part[r] = first ? mul(v, a) : fma(v, a, rows.part[r]);
        if (last) rows.total[r] = fma(set1(BYTE ? table[rows.bytes[r][g]] : rows.scales[r][g]), rows.part[r], rows.total[r]);
    }
}

template <int BITS, Kind KIND, int UNIT, bool BYTE>
static void product(const lowbit_weight *w, const float *x, const void *bias, void *out, int dtype, int64_t first, int64_t last,
                    float *scratch) {
    constexpr int64_t UNITS = 64 / UNIT;
    const int64_t blocks = (w->inputs + 63) / 64, groups = groups_of(w), tail = groups / UNITS * UNITS;
    const int shift = UNITS > 1 ? 0 : w->group ? __builtin_ctzll((uint64_t)w->group / 64) : 62;  // from a block to its group
    const bool fixed = w->zero == LOWBIT_ZERO_FIXED;  // zero points and levels are the same for all rows
    for (int r = 0; fixed && KIND == INTEGER && r < AT_ONCE; r++) read_zeros<BITS>(w, first, 0, groups, scratch + (2 * r + 1) * (groups + 4));
    const F shared = first_levels<BITS <= 4 ? BITS : 4>(w->table ? w->levels : nullptr);
    for (int64_t row = first; row < last; row += AT_ONCE) {
        Rows rows;
        uint8_t ends[AT_ONCE][4];
        UNROLL
        for (int r = 0; r < AT_ONCE; r++) {
            const int64_t here = row + r < last ? row + r : last - 1;  // a last row may be computed twice
            float *const scales = scratch + 2 * r * (groups + 4), *const zeros = scales + groups + 4;
            rows.lanes[r] = w->codes + here * (4 * BITS * blocks);
            rows.levels[r] = w->table == LOWBIT_TABLE_ROW ? w->levels + (here << BITS) : w->levels;
            if (BITS <= 4) rows.first[r] = w->table == LOWBIT_TABLE_ROW ? first_levels<BITS>(rows.levels[r]) : shared;
            rows.total[r] = zero();
            rows.bytes[r] = (const uint8_t *)w->scales + here * groups;
            if (!BYTE) read_scales(w, here, 0, groups, scales);
            if (KIND == INTEGER && !fixed) read_zeros<BITS>(w, here, 0, groups, zeros);
            for (int64_t g = groups; UNITS > 1 && g < groups + 4; g++) {  // behind the row's end, where x is 0
                scales[g] = zeros[g] = 0.0f;
                if (BYTE) ends[r][g % UNITS] = 0;
            }
            for (int64_t g = tail; BYTE && g < groups; g++) ends[r][g % UNITS] = rows.bytes[r][g];
            rows.scales[r] = scales;
            rows.zeros[r] = zeros;
        }
        // The codes of the next rows lie in one piece, and are fetched bit by bit: a processor does not see several rows as one stream.
        const uint8_t *const next = (const uint8_t *)rows.lanes[row + 2 * AT_ONCE <= last ? AT_ONCE - 1 : 0] + 8 * BITS * blocks;
        constexpr int64_t STRIDE = AT_ONCE * 8 * BITS;
        for (int64_t b = 0; b < blocks; b++) {
            if (STRIDE >= 64 || b % (STRIDE < 64 ? 64 / STRIDE : 1) == 0)
                for (int64_t i = 0; i < STRIDE; i += 64) __builtin_prefetch(next + b * STRIDE + i, 0, 3);
            const int64_t g = UNITS > 1 ? UNITS * b : b >> shift;
            if (UNITS > 1 && BYTE && g == tail)
                UNROLL
                for (int r = 0; r < AT_ONCE; r++) rows.bytes[r] = ends[r] - tail;
            U word[AT_ONCE][2];
            UNROLL
            for (int r = 0; r < AT_ONCE; r++) load_arranged<BITS>(word[r], rows.lanes[r], blocks, b);
            step<BITS, KIND, UNIT, BYTE, 0>(rows, word, x + 64 * b, w->scale_table, g);
            step<BITS, KIND, UNIT, BYTE, 1>(rows, word, x + 64 * b, w->scale_table, g);
            step<BITS, KIND, UNIT, BYTE, 2>(rows, word, x + 64 * b, w->scale_table, g);
            step<BITS, KIND, UNIT, BYTE, 3>(rows, word, x + 64 * b, w->scale_table, g);
        }
        float totals[AT_ONCE];
        UNROLL
        for (int r = 0; r < AT_ONCE; r++) totals[r] = sum(rows.total[r]);
        for (int r = 0; r < AT_ONCE && row + r < last; r++)
            write(out, row + r, dtype, totals[r] + (bias ? read(bias, row + r, dtype) : 0.0f));
    }
}

static void ternary_product(const lowbit_weight *w, const float *x, const void *bias, void *out, int dtype, int64_t first,
                            int64_t last, float *scratch) {
    const int64_t pieces = arranged_inputs(w) / TERNARY_PIECE;
    for (int64_t row = first; row < last; row++) {
        F total[4] = {zero(), zero(), zero(), zero()};
        read_scales(w, row, 0, groups_of(w), scratch);
        walk_ternary(w, row, 0, pieces, w->group ? scratch : nullptr, [&](int64_t k, F v, int sum) __attribute__((always_inline)) {
            total[sum] = fma(v, load(x + k), total[sum]);
        });
        const float all = sum(add(add(total[0], total[1]), add(total[2], total[3])));
        write(out, row, dtype, all * (w->group ? 1.0f : scratch[0]) + (bias ? read(bias, row, dtype) : 0.0f));
    }
}

// ---------------------------------------------------------------- more rows of x: decode a panel, then multiply

#if defined(LOWBIT_AVX512)
constexpr int TILE = 6;  // rows of x whose sums with TILE_ROWS of the weight are held in registers
#else
constexpr int TILE = 3;
#endif

// sums (M, PANEL_ROWS) += x (M, stride) times panel (TILE_ROWS, count) transposed.
template <int M> static void multiply(const float *panel, int64_t count, const float *x, int64_t stride, float *sums) {
    F total[M][TILE_ROWS];
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int r = 0; r < TILE_ROWS; r++) total[m][r] = zero();
    for (int64_t k = 0; k < count; k += 16) {
        F v[TILE_ROWS];
        UNROLL
        for (int r = 0; r < TILE_ROWS; r++) v[r] = load(panel + r * count + k);
        UNROLL
        for (int m = 0; m < M; m++) {
            const F a = load(x + m * stride + k);
            UNROLL
            for (int r = 0; r < TILE_ROWS; r++) total[m][r] = fma(v[r], a, total[m][r]);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) add_sums(sums + m * PANEL_ROWS, total[m]);
}

template <int M> static void multiply_rest(const float *panel, int64_t count, const float *x, int64_t stride, int64_t m, float *sums) {
    if (m == M) return multiply<M>(panel, count, x, stride, sums);
    if constexpr (M > 1) multiply_rest<M - 1>(panel, count, x, stride, m, sums);
}

static void multiply_rows(const float *panel, int64_t count, const float *x, int64_t stride, int64_t m, float *sums) {
    for (; m > TILE; m -= TILE, x += TILE * stride, sums += TILE * PANEL_ROWS) multiply<TILE>(panel, count, x, stride, sums);
    multiply_rest<TILE>(panel, count, x, stride, m, sums);
}

// How `products` reads a weight: pieces of a row, whose grids were read before.
template <int BITS, Kind KIND, bool FINE> struct Codes {
    static constexpr int64_t PIECE = 64;
    static void grids(const lowbit_weight *w, int64_t row, float *to) { read_grids<BITS, KIND>(w, row, to); }
    static void decode(const lowbit_weight *w, int64_t row, int64_t from, int64_t to, const float *grids, float *panel) {
        panel -= PIECE * from;
        walk<BITS, KIND, FINE, true>(w, row, from, to, grids, grids + groups_of(w),
                                     [&](int64_t k, F v) __attribute__((always_inline)) { store(panel + k, v); });
    }
};

struct TernaryCodes {
    static constexpr int64_t PIECE = TERNARY_PIECE;
    static void grids(const lowbit_weight *w, int64_t row, float *to) { read_scales(w, row, 0, groups_of(w), to); }
    static void decode(const lowbit_weight *w, int64_t row, int64_t from, int64_t to, const float *grids, float *panel) {
        panel -= PIECE * from;
        walk_ternary(w, row, from, to, grids, [&](int64_t k, F v, int) __attribute__((always_inline)) { store(panel + k, v); });
    }
};

template <class Codes>
static void some_products(const lowbit_weight *w, const float *x, int64_t m, const void *bias, void *out, int dtype, int64_t first,
                          int64_t last, float *scratch) {
    constexpr int64_t step = PANEL_INPUTS / Codes::PIECE;
    const int64_t stride = arranged_inputs(w), pieces = stride / Codes::PIECE, own = 2 * groups_of(w);
    float *const panel = scratch + PANEL_ROWS * own, *const sums = panel + TILE_ROWS * PANEL_INPUTS;
    for (int64_t row = first; row < last; row += PANEL_ROWS) {
        const int rows = (int)(last - row < PANEL_ROWS ? last - row : PANEL_ROWS);
        for (int r = 0; r < rows; r++) Codes::grids(w, row + r, scratch + r * own);
        for (int64_t i = 0; i < m * PANEL_ROWS; i++) sums[i] = 0;
        for (int64_t from = 0; from < pieces; from += step) {
            const int64_t to = from + step < pieces ? from + step : pieces, count = Codes::PIECE * (to - from);
            for (int tile = 0; tile < rows; tile += TILE_ROWS) {
                for (int r = 0; r < TILE_ROWS; r++) {  // the last row again where a tile is not full
                    const int one = tile + r < rows ? tile + r : rows - 1;
                    Codes::decode(w, row + one, from, to, scratch + one * own, panel + r * count);
                }
                multiply_rows(panel, count, x + Codes::PIECE * from, stride, m, sums + tile);
            }
        }
        for (int64_t i = 0; i < m; i++)
            for (int r = 0; r < rows; r++)
                write(out, i * w->rows + row + r, dtype,
                      sums[i * PANEL_ROWS + r] + (bias ? read(bias, row + r, dtype) : 0.0f));
    }
}

// For each MOST_ROWS rows of x, which a core's second cache holds, the weight is decoded again: less work than reading x again.
template <class Codes>
static void products(const lowbit_weight *w, const float *x, int64_t m, const void *bias, void *out, int dtype, int64_t first,
                     int64_t last, float *scratch) {
    const int64_t element = dtype == LOWBIT_F32 ? 4 : 2;
    for (int64_t i = 0; i < m; i += MOST_ROWS)
        some_products<Codes>(w, x + i * arranged_inputs(w), m - i < MOST_ROWS ? m - i : MOST_ROWS, bias,
                             (char *)out + i * w->rows * element, dtype, first, last, scratch);
}

template <int BITS, Kind KIND, bool FINE>
static void coded_products(const lowbit_weight *w, const float *x, int64_t m, const void *bias, void *out, int dtype,
                           int64_t first, int64_t last, float *scratch) {
    products<Codes<BITS, KIND, FINE>>(w, x, m, bias, out, dtype, first, last, scratch);
}

// ---------------------------------------------------------------- rows of the weight

template <int BITS, Kind KIND, bool FINE>
static void dequantize_rows(const lowbit_weight *w, const int64_t *index, int64_t start, void *out, int dtype, int64_t first,
                            int64_t last, float *scratch) {
    const int64_t K = w->inputs;
    for (int64_t i = first; i < last; i++) {
        const int64_t row = index ? index[i] : start + i;
        read_grids<BITS, KIND>(w, row, scratch);
        walk<BITS, KIND, FINE, false>(w, row, 0, (K + 63) / 64, scratch, scratch + groups_of(w),
                                      [&](int64_t k, F v) __attribute__((always_inline)) {
            put(out, i * K, k, K, dtype, v);
        });
    }
}

// ---------------------------------------------------------------- the entries

// Scales of 8 bits are looked up where they are needed, or, where that is no great loss, before.
#if defined(LOWBIT_AVX512)
template <int BITS, Kind KIND, int UNIT> constexpr bool by_byte() { return UNIT > 16 && (BITS <= 4 || KIND == INTEGER); }
#else
template <int BITS, Kind KIND, int UNIT> constexpr bool by_byte() { return false; }
#endif

template <int BITS, Kind KIND, int UNIT>
static void product_of_units(const lowbit_weight *w, const float *x, const void *bias, void *out, int dtype, int64_t first,
                             int64_t last, float *scratch) {
    if (by_byte<BITS, KIND, UNIT>() && w->scale == LOWBIT_SCALE_BYTE)
        return product<BITS, KIND, UNIT, by_byte<BITS, KIND, UNIT>()>(w, x, bias, out, dtype, first, last, scratch);
    product<BITS, KIND, UNIT, false>(w, x, bias, out, dtype, first, last, scratch);
}

template <int BITS, Kind KIND>
static void product_of_groups(const lowbit_weight *w, const float *x, const void *bias, void *out, int dtype, int64_t first,
                              int64_t last, float *scratch) {
    if (w->group == 16) return product_of_units<BITS, KIND, 16>(w, x, bias, out, dtype, first, last, scratch);
    if (w->group == 32) return product_of_units<BITS, KIND, 32>(w, x, bias, out, dtype, first, last, scratch);
    product_of_units<BITS, KIND, 64>(w, x, bias, out, dtype, first, last, scratch);
}

static void linear(const lowbit_weight *w, const float *x, int64_t m, const void *bias, void *out, int dtype, int64_t first,
                   int64_t last, float *scratch) {
    if (w->bits == 0) {
        if (m == 1) return ternary_product(w, x, bias, out, dtype, first, last, scratch);
        return products<TernaryCodes>(w, x, m, bias, out, dtype, first, last, scratch);
    }
    if (m == 1) {
#define CALL(BITS, KIND) return product_of_groups<BITS, KIND>(w, x, bias, out, dtype, first, last, scratch);
        FOR_BITS
#undef CALL
    }
#define CALL(BITS, KIND) \
    return (fine(w) ? coded_products<BITS, KIND, true> : coded_products<BITS, KIND, false>)(w, x, m, bias, out, dtype, first, last, scratch);
    FOR_BITS
#undef CALL
}

static void dequantize(const lowbit_weight *w, const int64_t *index, int64_t start, void *out, int dtype, int64_t first,
                       int64_t last, float *scratch) {
    if (w->bits == 0) {
        float *const values = scratch + 2 * groups_of(w);
        for (int64_t i = first; i < last; i++) {
            ternary_row(w, index ? index[i] : start + i, values, scratch);
            for (int64_t k = 0; k < w->inputs; k += 16) put(out, i * w->inputs, k, w->inputs, dtype, load(values + k));
        }
        return;
    }
#define CALL(BITS, KIND) \
    return (fine(w) ? dequantize_rows<BITS, KIND, true> : dequantize_rows<BITS, KIND, false>)(w, index, start, out, dtype, first, last, scratch);
    FOR_BITS
#undef CALL
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

static const Kernels KERNELS = {here, linear, dequantize, input_gradient, decoder, low_rank_dots, low_rank_wide,
                                low_rank_deep, arrange, pack, unpack, pack_pairs, decode_symbols};

}  // namespace LOWBIT_ISA

const Kernels &LOWBIT_COPY(kernels_)() { return LOWBIT_ISA::KERNELS; }

}  // namespace lowbit
