// How values are read from a packed weight, for the files that are compiled once for each instruction set.
//
// A row of the weight is walked in blocks of 64 values, four vectors of 16. Whatever the width, the planes of a block become
// words whose nibble v holds the low bits of the codes of vector v (the layout of docs/format.md makes that a load and at most
// one shift), so one shift a vector gives an index. For up to four bits the index goes straight into a table of 16 values that
// a group's scale and zero point have been multiplied into: shift, look up. Wider codes are put together and converted. Either
// way the value is exactly the dequantized weight, (code - zero) * scale rounded as in plain PyTorch.
#pragma once

#include "kernels.h"

#include "number.h"
#include "simd.h"

namespace lowbit {
namespace LOWBIT_ISA {

// Of codes wider than 4 bits; a table of up to 16 levels is a grid like any other, whose zero point is 0.
enum Kind { INTEGER, TABLE };

// ---------------------------------------------------------------- scales and zero points

INLINE int64_t groups_of(const lowbit_weight *w) { return w->group ? (w->inputs + w->group - 1) / w->group : 1; }

static inline void widen(const void *from, float *to, int64_t count, int dtype) {
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

INLINE F load_as(const void *p, int64_t i, int dtype) {
    if (dtype == LOWBIT_F32) return load((const float *)p + i);
    return dtype == LOWBIT_F16 ? from_halves((const uint16_t *)p + i) : from_bhalves((const uint16_t *)p + i);
}

// The scales of groups `from` to `to` - 1 of a row, as floats, to scales[from] and on.
static inline void read_scales(const lowbit_weight *w, int64_t row, int64_t from, int64_t to, float *scales) {
    const int64_t first = row * groups_of(w) + from, count = to - from;
    scales += from;
    switch (w->scale) {
        case LOWBIT_SCALE_BYTE:
            for (int64_t g = 0; g < count; g++) scales[g] = w->scale_table[((const uint8_t *)w->scales)[first + g]];
            return;
        case LOWBIT_SCALE_F16: return widen((const uint16_t *)w->scales + first, scales, count, LOWBIT_F16);
        case LOWBIT_SCALE_BF16: return widen((const uint16_t *)w->scales + first, scales, count, LOWBIT_BF16);
        case LOWBIT_SCALE_F32: return widen((const float *)w->scales + first, scales, count, LOWBIT_F32);
        default:
            for (int64_t g = 0; g < count; g++) scales[g] = 1.0f;
    }
}

// The zero points of groups `from` (a multiple of 8) to `to` - 1 of a row, as floats, to zeros[from] and on.
template <int BITS> static inline void read_zeros(const lowbit_weight *w, int64_t row, int64_t from, int64_t to, float *zeros) {
    const int64_t groups = groups_of(w);
    if (w->zero == LOWBIT_ZERO_FIXED) {
        for (int64_t g = from; g < to; g++) zeros[g] = w->fixed_zero;
    } else if (w->zero == LOWBIT_ZERO_F16) {
        widen((const uint16_t *)w->zeros + row * groups + from, zeros + from, to - from, LOWBIT_F16);
    } else {
        const int64_t size = (groups * BITS + 7) / 8;
        const uint8_t *stream = (const uint8_t *)w->zeros + row * size + from / 8 * BITS;
        const uint8_t *const end = (const uint8_t *)w->zeros + w->rows * size;
        for (int64_t g = from; g < to; g += 16, stream += 2 * BITS) {
            uint8_t copy[16] = {0};
            const uint8_t *here = stream;
            if (end - stream < 16) here = (const uint8_t *)memcpy(copy, stream, (size_t)(end - stream));
            const F sixteen = to_float(stream16<BITS>(here));
            if (g + 16 <= to)
                store(zeros + g, sixteen);
            else
                store_first(zeros + g, sixteen, (int)(to - g));
        }
    }
}

// What turns an index or a code of a group into a value: a table of 16, or a zero point and a scale.
struct Grid {
    F table;  // of values (up to 4 bits), or the zero point
    F scale;
    const float *levels;
};

// Levels, or codes themselves without any, over and over.
template <int BITS> INLINE F first_levels(const float *levels) {
    alignas(64) static const float codes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (BITS == 4) return load(levels ? levels : codes);
    float repeated[16];
    for (int i = 0; i < 16; i++) repeated[i] = (levels ? levels : codes)[i & ((1 << BITS) - 1)];
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
    } else if constexpr (BITS < 8) {
        constexpr int LOW = BITS - 4, DOWN = 4 * V - LOW;
        const U high = DOWN > 0 ? shift<(DOWN > 0 ? DOWN : 0)>(word[0]) : shift_up<(DOWN > 0 ? 0 : -DOWN)>(word[0]);
        return mask(choose(high, shift<4 * V>(word[1]), 15u << LOW), (1u << BITS) - 1);
    } else {
        return V < 2 ? mask(word[V & 1], 255) : shift<8>(word[V & 1]);
    }
}

template <int BITS, Kind KIND, int V> INLINE F value(const U (&word)[2], const Grid &grid) {
    U c = code<BITS, V>(word);
    if constexpr (BITS <= 4)
        return lookup(grid.table, c);
    else if constexpr (KIND == TABLE)
        return mul(lookup_wide<BITS>(grid.levels, c), grid.scale);
    else
        return mul(sub(to_float(c), grid.table), grid.scale);
}

template <int V> struct Number { static constexpr int value = V; };  // a number that a lambda can take as a constant

// Words in the order of evens_odds take fewer instructions, but for planes of 4 and 8 bits alone.
template <int BITS> constexpr bool arranged() { return BITS != 4 && BITS != 8; }

// The same words in that order, if so.
template <int BITS> INLINE void load_arranged(U (&word)[2], const uint16_t *row, int64_t blocks, int64_t b) {
    if constexpr (BITS == 1) word[0] = nibbles4(row + 4 * b);
    if constexpr (BITS == 2) word[0] = nibbles8<0>(row + 8 * b);
    if constexpr (BITS == 3) word[0] = choose(nibbles8<1>(row + 8 * b), nibbles4(row + 8 * blocks + 4 * b), 0x6666);
    if constexpr (!arranged<BITS>()) load_words<BITS>(word, row, blocks, b);
    if constexpr (BITS > 4 && BITS < 8) word[0] = nibbles16(row + 16 * b);
    if constexpr (BITS == 5) word[1] = nibbles4(row + 16 * blocks + 4 * b);
    if constexpr (BITS == 6) word[1] = nibbles8<0>(row + 16 * blocks + 8 * b);
    if constexpr (BITS == 7) word[1] = choose(nibbles8<1>(row + 16 * blocks + 8 * b), nibbles4(row + 24 * blocks + 4 * b), 0x6666);
}

// The scales and zero points of a row, 2 * groups floats.
template <int BITS, Kind KIND> static inline void read_grids(const lowbit_weight *w, int64_t row, float *grids) {
    const int64_t groups = groups_of(w);
    read_scales(w, row, 0, groups, grids);
    if (KIND == INTEGER) read_zeros<BITS>(w, row, 0, groups, grids + groups);
}

// Calls use(k, values) for the 16 values from k on, for blocks `from` to `to` - 1 of a row, in the order of load_arranged if ARRANGED.
// `FINE`: groups smaller than a block. `scales`, `zeros`: of the row.
template <int BITS, Kind KIND, bool FINE, bool ARRANGED, class Use>
INLINE void walk(const lowbit_weight *w, int64_t row, int64_t from, int64_t to, const float *scales, const float *zeros, Use use) {
    const int64_t blocks = (w->inputs + 63) / 64, groups = groups_of(w);
    const uint16_t *lanes = w->codes + row * (4 * BITS * blocks);
    const int64_t per_group = w->group ? w->group >> 6 : blocks;  // blocks; 0 if FINE
    Grid grid;
    grid.levels = w->table ? w->levels + (w->table == LOWBIT_TABLE_ROW ? row << BITS : 0) : nullptr;
    const F levels = BITS <= 4 ? first_levels<BITS>(grid.levels) : zero();
    int64_t group = w->group ? 64 * from >> __builtin_ctzll((uint64_t)w->group) : 0, left = 0;
    const int64_t begun = FINE ? 0 : w->group ? from & (per_group - 1) : from;
    if (begun) {
        enter_group<BITS, KIND>(grid, levels, scales + group, zeros + group);
        group++;
        left = per_group - begun;
    }
    for (int64_t b = from; b < to; b++) {
        U word[2];
        if constexpr (ARRANGED)
            load_arranged<BITS>(word, lanes, blocks, b);
        else
            load_words<BITS>(word, lanes, blocks, b);
        if (!FINE && left-- == 0) {
            enter_group<BITS, KIND>(grid, levels, scales + group, zeros + group);
            group++;
            left = per_group - 1;
        }
#define VECTOR(V)                                                                           \
        if (FINE && (V % 2 == 0 || w->group == 16)) {                                       \
            const int64_t g = group < groups ? group : groups - 1; /* behind the row's end */ \
            enter_group<BITS, KIND>(grid, levels, scales + g, zeros + g);                   \
            group++;                                                                        \
        }                                                                                   \
        use(64 * b + 16 * V, value<BITS, KIND, V>(word, grid));
        VECTOR(0) VECTOR(1) VECTOR(2) VECTOR(3)
#undef VECTOR
    }
}

// ---------------------------------------------------------------- ternary: base 3, ten digits to a lane

// Values of a row to out (inputs floats, and 16 more that may be written); `scales`: room for one a group.
static inline void ternary_row(const lowbit_weight *w, int64_t row, float *out, float *scales) {
    const int64_t lanes = (w->inputs + 9) / 10, groups = groups_of(w);
    read_scales(w, row, 0, groups, scales);
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

// Calls use(k, values, 0 .. 3) for places k on of a row that was arranged (pieces of 32 lanes, all ten digits of these, lanes at
// even places first), pieces `from` to `to` - 1. `scales`: one a group; without, values are -1, 0 and 1.
template <class Use>
INLINE void walk_ternary(const lowbit_weight *w, int64_t row, int64_t from, int64_t to, const float *scales, Use use) {
    const int64_t lanes = (w->inputs + 9) / 10, groups = groups_of(w);
    const int shift_to_group = w->group ? __builtin_ctzll((uint64_t)w->group) : 62;
    alignas(64) static const float digit_values[16] = {-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0};
    const F values = load(digit_values);
    for (int64_t piece = from; piece < to; piece++) {
        const int64_t first = piece * TERNARY_LANES;
        const uint16_t *here = w->codes + row * lanes + first;
        uint16_t copy[TERNARY_LANES] = {0};
        if (lanes - first < TERNARY_LANES) here = (const uint16_t *)memcpy(copy, here, 2 * (size_t)(lanes - first));
        U rest = words16(here);
        const int64_t place = piece * TERNARY_PIECE;
        for (int j = 0; j < 10; j++) {
            const U digits = next_digits(rest);
            F evens = lookup8(values, digits), odds = lookup8(values, shift<16>(digits));
            if (scales) {
                const int64_t k = j * lanes + first;
                int64_t g = k >> shift_to_group;
                if (g >= groups) g = groups - 1;  // behind the row's end
                F even_scales = set1(scales[g]), odd_scales = even_scales;
                for (int64_t left = ((g + 1) << shift_to_group) - k; w->group && left < TERNARY_LANES && g + 1 < groups; left += w->group) {
                    const F next = set1(scales[++g]);
                    even_scales = splice(even_scales, next, (int)(left + 1) / 2);
                    odd_scales = splice(odd_scales, next, (int)left / 2);
                }
                evens = mul(evens, even_scales);
                odds = mul(odds, odd_scales);
            }
            use(place + TERNARY_LANES * j, evens, j % 2 * 2);
            use(place + TERNARY_LANES * j + 16, odds, j % 2 * 2 + 1);
        }
    }
}

// ---------------------------------------------------------------- from numbers to template arguments

#define FOR_KIND(BITS)                      \
    if (w->table) {                         \
        CALL(BITS, TABLE)                   \
    } else {                                \
        CALL(BITS, INTEGER)                 \
    }
#define FOR_BITS                            \
    switch (w->bits) {                      \
        case 1: CALL(1, INTEGER)            \
        case 2: CALL(2, INTEGER)            \
        case 3: CALL(3, INTEGER)            \
        case 4: CALL(4, INTEGER)            \
        case 5: FOR_KIND(5)                 \
        case 6: FOR_KIND(6)                 \
        case 7: FOR_KIND(7)                 \
        default: FOR_KIND(8)                \
    }

INLINE bool fine(const lowbit_weight *w) { return w->group && w->group < 64; }

// ---------------------------------------------------------------- results

// Places k to k + 15 of a row of K, which begins at `row`, those within it.
INLINE void put(void *out, int64_t row, int64_t k, int64_t K, int dtype, F v) {
    if (k + 16 <= K && dtype == LOWBIT_F32) {
        store((float *)out + row + k, v);
    } else if (k + 16 <= K) {
        (dtype == LOWBIT_F16 ? to_halves : to_bhalves)((uint16_t *)out + row + k, v);
    } else {
        float values[16];
        store(values, v);
        for (int64_t j = 0; j < 16 && k + j < K; j++) write(out, row + k + j, dtype, values[j]);
    }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
