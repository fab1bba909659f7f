// The kernels, compiled once for each instruction set (LOWBIT_ISA names the copy).
//
// A row of the weight is walked in blocks of 64 values, four vectors of 16. Whatever the width, the planes of a block become
// words whose nibble v holds the low bits of the codes of vector v (the layout of docs/format.md makes that a load and at most
// one shift), so one shift a vector gives an index. For up to four bits the index goes straight into a table of 16 values that
// a group's scale and zero point have been multiplied into: shift, look up, multiply and add. Wider codes are put together and
// converted. Either way the value is exactly the dequantized weight, (code - zero) * scale rounded as in plain PyTorch; a sum
// differs from another only in its order.
//
// No function of the standard library is used here that could be shared, compiled for the wrong processor, with other files.

#include "kernels.h"

#include "number.h"
#include "simd.h"

namespace lowbit {
namespace LOWBIT_ISA {

// Of codes wider than 4 bits; a table of up to 16 levels is a grid like any other, whose zero point is 0.
enum Kind { INTEGER, TABLE };

// ---------------------------------------------------------------- scales and zero points

INLINE int64_t groups_of(const lowbit_weight *w) { return w->group ? (w->inputs + w->group - 1) / w->group : 1; }

static void widen(const void *from, float *to, int64_t count, int dtype) {
    if (dtype == LOWBIT_F32) {
        memcpy(to, from, 4 * (size_t)count);
        return;
    }
    const uint16_t *halves = (const uint16_t *)from;
    int64_t i = 0;
    if (dtype == LOWBIT_F16)
        for (; i + 16 <= count; i += 16) store(to + i, from_halves(halves + i));
    else
        for (; i + 16 <= count; i += 16) store(to + i, from_bhalves(halves + i));
    for (; i < count; i++) to[i] = read(from, i, dtype);
}

// The scales of a row, as floats.
static void read_scales(const lowbit_weight *w, int64_t row, int64_t groups, float *scales) {
    const int64_t first = row * groups;
    switch (w->scale) {
        case LOWBIT_SCALE_BYTE:
            for (int64_t g = 0; g < groups; g++) scales[g] = w->scale_table[((const uint8_t *)w->scales)[first + g]];
            return;
        case LOWBIT_SCALE_F16: return widen((const uint16_t *)w->scales + first, scales, groups, LOWBIT_F16);
        case LOWBIT_SCALE_BF16: return widen((const uint16_t *)w->scales + first, scales, groups, LOWBIT_BF16);
        case LOWBIT_SCALE_F32: return widen((const float *)w->scales + first, scales, groups, LOWBIT_F32);
        default:
            for (int64_t g = 0; g < groups; g++) scales[g] = 1.0f;
    }
}

// The zero points of a row, as floats.
template <int BITS> static void read_zeros(const lowbit_weight *w, int64_t row, int64_t groups, float *zeros) {
    if (w->zero == LOWBIT_ZERO_FIXED) {
        for (int64_t g = 0; g < groups; g++) zeros[g] = w->fixed_zero;
    } else if (w->zero == LOWBIT_ZERO_F16) {
        widen((const uint16_t *)w->zeros + row * groups, zeros, groups, LOWBIT_F16);
    } else {
        const uint8_t *stream = (const uint8_t *)w->zeros + row * ((groups * BITS + 7) / 8);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t bit = g * BITS;
            uint32_t word = stream[bit / 8];
            if (8 % BITS && bit % 8 + BITS > 8) word |= (uint32_t)stream[bit / 8 + 1] << 8;  // never past the row
            zeros[g] = (float)(word >> (bit % 8) & ((1 << BITS) - 1));
        }
    }
}

// What turns an index or a code of a group into a value: a table of 16, or a zero point and a scale.
struct Grid {
    F table;  // of values (up to 4 bits), or the zero point
    F scale;
    const float *levels;
};

template <int BITS> INLINE F first_levels(const float *levels) {
    float repeated[16];
    for (int i = 0; i < 16; i++) repeated[i] = levels ? levels[i & ((1 << BITS) - 1)] : (float)(i & ((1 << BITS) - 1));
    return load(repeated);
}

template <int BITS, Kind KIND> INLINE void enter_group(Grid &grid, F levels, const float *scale, const float *zero) {
    grid.scale = set1(*scale);
    if constexpr (KIND == TABLE) return;
    grid.table = set1(*zero);
    if constexpr (BITS <= 4) grid.table = mul(sub(levels, grid.table), grid.scale);
}

// ---------------------------------------------------------------- codes of a block

// Nibble words of block b, and for more than 4 bits a second word; `row` is the row's first lane.
template <int BITS> INLINE void load_words(U (&word)[2], const uint16_t *row, int64_t blocks, int64_t b) {
    if constexpr (BITS == 1) word[0] = quarters_shift(lanes4(row + 4 * b));
    if constexpr (BITS == 2) word[0] = halves_shift(lanes8(row + 8 * b));
    if constexpr (BITS == 3) {
        U two = halves_shift(lanes8(row + 8 * b)), one = quarters_shift(lanes4(row + 8 * blocks + 4 * b));
        word[0] = choose(shift_up<1>(two), one, 0x6666);  // bit 3 of a nibble is left over
    }
    if constexpr (BITS >= 4 && BITS < 8) word[0] = lanes16(row + 16 * b);
    if constexpr (BITS == 5) word[1] = quarters_shift(lanes4(row + 16 * blocks + 4 * b));
    if constexpr (BITS == 6) word[1] = halves_shift(lanes8(row + 16 * blocks + 8 * b));
    if constexpr (BITS == 7) {
        U two = halves_shift(lanes8(row + 16 * blocks + 8 * b));
        word[1] = choose(shift_up<1>(two), quarters_shift(lanes4(row + 24 * blocks + 4 * b)), 0x6666);
    }
    if constexpr (BITS == 8) {
        word[0] = lanes16(row + 32 * b);
        word[1] = lanes16(row + 32 * b + 16);
    }
}

// Codes of vector V; up to 4 bits with bits above the code that a repeated table ignores.
template <int BITS, int V> INLINE U code(const U (&word)[2]) {
    if constexpr (BITS <= 4) {
        return shift<4 * V>(word[0]);
    } else if constexpr (BITS == 8) {
        return V < 2 ? mask(word[V & 1], 255) : shift<8>(word[V & 1]);
    } else {
        U high = shift_up<BITS - 4>(mask(shift<4 * V>(word[0]), 15));
        return either(high, mask(shift<4 * V>(word[1]), (1u << (BITS - 4)) - 1));
    }
}

template <int BITS, Kind KIND, int V> INLINE F value(const U (&word)[2], const Grid &grid) {
    U c = code<BITS, V>(word);
    if constexpr (BITS <= 4)
        return lookup(grid.table, c);
    else if constexpr (KIND == TABLE)
        return mul(gather(grid.levels, c), grid.scale);
    else
        return mul(sub(to_float(c), grid.table), grid.scale);
}

template <int V> struct Number { static constexpr int value = V; };  // a number that a lambda can take as a constant

// Calls use(k, values, V) for the 16 values from k on, vector V of a block, for blocks `from` to `to` - 1 of a row. `FINE`: groups
// smaller than a block. `scratch`: 2 * groups floats.
template <int BITS, Kind KIND, bool FINE, class Use>
INLINE void walk(const lowbit_weight *w, int64_t row, int64_t from, int64_t to, float *scratch, Use use) {
    const int64_t blocks = (w->inputs + 63) / 64, groups = groups_of(w);
    float *const scales = scratch, *const zeros = scratch + groups;
    read_scales(w, row, groups, scales);
    if constexpr (KIND == INTEGER) read_zeros<BITS>(w, row, groups, zeros);
    const uint16_t *lanes = w->codes + row * (4 * BITS * blocks);
    const int64_t per_group = w->group ? w->group / 64 : blocks;  // blocks; 0 if FINE
    Grid grid;
    grid.levels = w->table ? w->levels + (w->table == LOWBIT_TABLE_ROW ? row << BITS : 0) : nullptr;
    const F levels = BITS <= 4 ? first_levels<BITS>(grid.levels) : zero();
    int64_t group = FINE ? from * 64 / w->group : from / per_group, left = 0;
    if (!FINE && from % per_group) {
        enter_group<BITS, KIND>(grid, levels, scales + group, zeros + group);
        group++;
        left = per_group - from % per_group;
    }
    for (int64_t b = from; b < to; b++) {
        U word[2];
        load_words<BITS>(word, lanes, blocks, b);
        if (!FINE && left-- == 0) {
            enter_group<BITS, KIND>(grid, levels, scales + group, zeros + group);
            group++;
            left = per_group - 1;
        }
#define VECTOR(V)                                                                           \
        if (FINE && (V == 0 || (16 * V) % w->group == 0)) {                                 \
            const int64_t g = group < groups ? group : groups - 1; /* behind the row's end */ \
            enter_group<BITS, KIND>(grid, levels, scales + g, zeros + g);                   \
            group++;                                                                        \
        }                                                                                   \
        use(64 * b + 16 * V, value<BITS, KIND, V>(word, grid), Number<V>());
        VECTOR(0) VECTOR(1) VECTOR(2) VECTOR(3)
#undef VECTOR
    }
}

// ---------------------------------------------------------------- ternary: base 3, ten digits to a lane

// Values of a row to out (inputs floats, and 16 more that may be written); `scales`: room for one a group.
static void ternary_row(const lowbit_weight *w, int64_t row, float *out, float *scales) {
    const int64_t lanes = (w->inputs + 9) / 10, groups = groups_of(w);
    read_scales(w, row, groups, scales);
    const uint16_t *from = w->codes + row * lanes;
    for (int64_t l = 0; l < lanes; l += 16) {
        const int64_t here = lanes - l < 16 ? lanes - l : 16;
        uint16_t copy[16] = {0};
        memcpy(copy, from + l, 2 * (size_t)here);
        U rest = lanes16(copy);
        for (int64_t k = l; k < w->inputs; k += lanes) {
            U tripled = plus(rest, shift_up<1>(rest));
            F digit = sub(to_float(shift<16>(tripled)), set1(1.0f));
            const int64_t inside = w->inputs - k < here ? w->inputs - k : here;
            if (inside == 16)
                store(out + k, digit);
            else
                store_first(out + k, digit, (int)inside);
            rest = mask(tripled, 0xFFFF);
        }
    }
    for (int64_t g = 0; g < groups; g++) {
        const F scale = set1(scales[g]);
        const int64_t end = w->group && (g + 1) * w->group < w->inputs ? (g + 1) * w->group : w->inputs;
        for (int64_t k = g * w->group; k < end; k += 16) store(out + k, mul(load(out + k), scale));
    }
}

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

// ---------------------------------------------------------------- packing

template <int P> INLINE void pack_plane(const uint8_t *codes, uint16_t *lanes, int low) {
    for (int l = 0; l < 4 * P; l++) {
        uint32_t lane = 0;
        for (int j = 0; j < 16 / P; j++) lane |= (uint32_t)(codes[4 * P * j + l] >> low & ((1 << P) - 1)) << (P * j);
        lanes[l] = (uint16_t)lane;
    }
}

template <int P> INLINE void unpack_plane(uint8_t *codes, const uint16_t *lanes, int low) {
    for (int j = 0; j < 16 / P; j++)
        for (int l = 0; l < 4 * P; l++) codes[4 * P * j + l] |= (uint8_t)((lanes[l] >> (P * j) & ((1 << P) - 1)) << low);
}

static void pack_ternary(const uint8_t *codes, uint16_t *lanes, int64_t inputs) {
    const int64_t count = (inputs + 9) / 10;
    for (int64_t l = 0; l < count; l++) {
        uint64_t n = 0;
        for (int64_t j = 0; j < 10; j++) n = 3 * n + (count * j + l < inputs ? codes[count * j + l] : 0);
        lanes[l] = (uint16_t)((n * 65536 + 59048) / 59049);
    }
}

static void unpack_ternary(const uint16_t *lanes, uint8_t *codes, int64_t inputs) {
    const int64_t count = (inputs + 9) / 10;
    for (int64_t l = 0; l < count; l++) {
        uint32_t rest = lanes[l];
        for (int64_t k = l; k < inputs; k += count, rest = 3 * rest & 0xFFFF) codes[k] = (uint8_t)(3 * rest >> 16);
    }
}

static void pack(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last) {
    const int64_t blocks = (inputs + 63) / 64, width = row_lanes(inputs, bits);
    const Planes planes = planes_of(bits);
    for (int64_t row = first; row < last; row++) {
        const uint8_t *from = codes + row * inputs;
        uint16_t *to = lanes + row * width;
        if (bits == 0) {
            pack_ternary(from, to, inputs);
            continue;
        }
        for (int64_t b = 0; b < blocks; b++) {
            uint8_t block[64] = {0};
            memcpy(block, from + 64 * b, (size_t)(inputs - 64 * b < 64 ? inputs - 64 * b : 64));
            uint16_t *plane = to;
            int low = bits;
            for (int i = 0; i < 3 && planes.width[i]; i++) {
                const int p = planes.width[i];
                low -= p;
                if (p == 1) pack_plane<1>(block, plane + 4 * b, low);
                if (p == 2) pack_plane<2>(block, plane + 8 * b, low);
                if (p == 4) pack_plane<4>(block, plane + 16 * b, low);
                if (p == 8) pack_plane<8>(block, plane + 32 * b, low);
                plane += 4 * p * blocks;
            }
        }
    }
}

static void unpack(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last) {
    const int64_t blocks = (inputs + 63) / 64, width = row_lanes(inputs, bits);
    const Planes planes = planes_of(bits);
    for (int64_t row = first; row < last; row++) {
        const uint16_t *from = lanes + row * width;
        uint8_t *to = codes + row * inputs;
        if (bits == 0) {
            unpack_ternary(from, to, inputs);
            continue;
        }
        for (int64_t b = 0; b < blocks; b++) {
            uint8_t block[64] = {0};
            const uint16_t *plane = from;
            int low = bits;
            for (int i = 0; i < 3 && planes.width[i]; i++) {
                const int p = planes.width[i];
                low -= p;
                if (p == 1) unpack_plane<1>(block, plane + 4 * b, low);
                if (p == 2) unpack_plane<2>(block, plane + 8 * b, low);
                if (p == 4) unpack_plane<4>(block, plane + 16 * b, low);
                if (p == 8) unpack_plane<8>(block, plane + 32 * b, low);
                plane += 4 * p * blocks;
            }
            memcpy(to + 64 * b, block, (size_t)(inputs - 64 * b < 64 ? inputs - 64 * b : 64));
        }
    }
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

#if defined(LOWBIT_AVX512)
const Kernels &kernels_avx512() { return LOWBIT_ISA::KERNELS; }
#elif defined(LOWBIT_AVX2)
const Kernels &kernels_avx2() { return LOWBIT_ISA::KERNELS; }
#else
const Kernels &kernels_portable() { return LOWBIT_ISA::KERNELS; }
#endif

}  // namespace lowbit
