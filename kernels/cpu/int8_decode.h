// How 16 rows of a packed weight, a strip, become codes and scales side by side in vectors, for int8.cpp, whose text says why.
#pragma once

#include "int8.h"

#include "decode.h"
#include "int8_simd.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace int8 {

constexpr int STEP = 64;  // bytes of a tile for four inputs of 16 rows; a block has 16 steps
constexpr int TILE = 16 * STEP * INT8_CHUNK;

// ---------------------------------------------------------------- codes of a chunk of a strip, to a tile

// Sixteen rows of a stored tensor, of `bytes` bytes each, and the end of it, which nothing is read behind.
struct Strip {
    const uint8_t *base;
    int64_t bytes;
    const uint8_t *end;
};

static Strip strip_of(const void *stored, int64_t bytes, int64_t first, int64_t count) {
    const uint8_t *base = (const uint8_t *)stored;
    return {base + first * bytes, bytes, base + count * bytes};
}

static __attribute__((noinline)) void copy_quad(uint8_t (&copy)[16 * 16], const Strip &strip, int64_t offset) {
    memset(copy, 0, sizeof copy);
    for (int r = 0; r < 16; r++) {
        const int64_t left = strip.end - strip.base - r * strip.bytes - offset;
        if (left > 0) memcpy(copy + 16 * r, strip.base + r * strip.bytes + offset, (size_t)(left < 16 ? left : 16));
    }
}

// The 16 bytes from `offset` on of each row; some may lie behind the row's end, and are zero behind the tensor's.
template <bool SEPARATE> INLINE void quad_of(U (&out)[4], const Strip &strip, int64_t offset) {
    if (__builtin_expect(strip.base + 15 * strip.bytes + offset + 16 <= strip.end, 1)) {
        quad<SEPARATE>(out, strip.base + offset, strip.bytes);
    } else {
        uint8_t copy[16 * 16];
        copy_quad(copy, strip, offset);
        quad<SEPARATE>(out, copy, 16);
    }
}

// What is read next lies in one piece. It is fetched bit by bit, since a processor does not see 16 rows as one stream.
struct Ahead {
    const uint8_t *from, *end;
    Ahead(const Strip &strip, int strips) : from(strip.base + 16 * strips * strip.bytes), end(strip.end) {}
    __attribute__((always_inline)) void fetch(int64_t bytes, int64_t turn) const {
        const uint8_t *p = from + turn * bytes;
        for (int64_t i = 0; i < bytes && p + i < end; i += 64) __builtin_prefetch(p + i, 0, 3);
    }
};

template <int N, int I = 0, class Body> INLINE void each(Body body) {  // with numbers 0 .. N - 1 that are constants
    if constexpr (I < N) {
        body(Number<I>());
        each<N, I + 1>(body);
    }
}

// Field FIELD of P bits of each byte, in bits LOW and up of it.
template <int P, int LOW, int FIELD> INLINE U field(U word) {
    constexpr int down = P * FIELD - LOW;
    if constexpr (down > 0) word = shift<(down > 0 ? down : 0)>(word);
    if constexpr (down < 0) word = shift_up<(down < 0 ? -down : 0)>(word);
    return P == 8 ? word : mask(word, 0x01010101u * (((1u << P) - 1) << LOW));
}

// Of a width: its widest plane, and what is left for the planes of 2 and 1 bits.
template <int BITS> struct Width { static constexpr int high = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1, rest = BITS - high; };

// The plane of P bits that begins at byte `start` of the rows: bits LOW and up of the codes.
template <int P, int LOW, bool FIRST> INLINE void plane(const Strip &strip, int64_t start, int64_t from, int64_t count, uint8_t *tile) {
    const int64_t first = start + 8 * P * from;
    for (int64_t offset = 0; offset < 8 * P * count; offset += 16) {
        U word[4];
        quad_of<true>(word, strip, first + offset);
#pragma GCC unroll 4
        for (int d = 0; d < 4; d++) {
            const int64_t place = offset / 8 + (d & 1);  // among fours of low bytes
            uint8_t *const to = tile + STEP * (place / P * 16 + (d >> 1) * 8 + place % P);
            each<8 / P>([&](auto f) __attribute__((always_inline)) {
                constexpr int F = decltype(f)::value;
                const U code = field<P, LOW, F>(word[d]);
                store_bytes(to + STEP * P * F, FIRST ? code : either(code, load_bytes(to + STEP * P * F)));
            });
        }
    }
}

template <int BITS> static void planes(const Strip &strip, int64_t blocks, int64_t from, int64_t count, const Ahead &ahead, uint8_t *tile) {
    constexpr int HIGH = Width<BITS>::high, REST = Width<BITS>::rest;
    ahead.fetch(16 * 8 * BITS * INT8_CHUNK, from / INT8_CHUNK);
    plane<HIGH, REST, true>(strip, 0, from, count, tile);
    if constexpr (REST >= 2) plane<2, REST - 2, false>(strip, 8 * HIGH * blocks, from, count, tile);
    if constexpr (REST % 2) plane<1, 0, false>(strip, 8 * (BITS - 1) * blocks, from, count, tile);
}

// Ten digits to a lane lie far apart, so rows are decoded whole, to bytes. (Compilers make vectors of the inner loop.)
static void ternary_bytes(const uint16_t *from, int64_t inputs, int64_t stride, uint8_t *to) {
    constexpr int WIDTH = 32;
    const int64_t lanes = (inputs + 9) / 10;
    for (int64_t l = 0; l < lanes; l += WIDTH) {
        const int64_t here = lanes - l < WIDTH ? lanes - l : WIDTH;
        uint16_t rest[WIDTH] = {0};
        memcpy(rest, from + l, 2 * (size_t)here);
        for (int64_t k = l; k < inputs; k += lanes) {
            uint8_t digits[WIDTH];
            for (int i = 0; i < WIDTH; i++) {
                digits[i] = (uint8_t)(rest[i] * 3u >> 16);
                rest[i] = (uint16_t)(rest[i] * 3u);
            }
            const int64_t inside = inputs - k < here ? inputs - k : here;
            if (inside == WIDTH)
                memcpy(to + k, digits, WIDTH);
            else
                memcpy(to + k, digits, (size_t)inside);
        }
    }
    memset(to + inputs, 0, (size_t)(stride - inputs));
}

static void from_bytes(const Strip &strip, int64_t from, int64_t count, uint8_t *tile) {
    for (int64_t k = 0; k < 64 * count; k += 16, tile += 4 * STEP) {
        U word[4];
        quad<false>(word, strip.base + 64 * from + k, strip.bytes);
        for (int d = 0; d < 4; d++) store_bytes(tile + STEP * d, word[d]);
    }
}

static void apply_table(const lowbit_weight *w, const Int8Table &table, int64_t first, int64_t steps, uint8_t *tile) {
    const int64_t count = (int64_t)1 << w->bits;
    uint8_t levels[256] = {0};
    if (w->table == LOWBIT_TABLE_SHARED) {
        memcpy(levels, table.levels, (size_t)count);
        for (int64_t s = 0; s < steps; s++, tile += STEP) store_bytes(tile, levels_of(load_bytes(tile), levels, (int)(count + 15) / 16));
        return;
    }
    for (int64_t s = 0; s < steps; s++)
        for (int r = 0; r < 16; r++, tile += 4) {
            const int64_t row = first + r < w->rows ? first + r : w->rows - 1;
            for (int i = 0; i < 4; i++) tile[i] = table.levels[row * count + tile[i]];
        }
}

// ---------------------------------------------------------------- scales and zero points of a chunk of a strip

struct Grid {
    float scales[INT8_UNITS][16], shifts[INT8_UNITS][16];  // by group; a shift is -scale * zero point
};

// A table of 256 scales as products, high[q / 16] * low[q % 16] and 0 for q = 0, where that is right to a relative 2^-20: so it is
// for scales on a logarithmic grid. Two tables of 16 are read within vectors, 16 numbers of memory one by one.
struct Factors {
    float high[16], low[16];
    bool right;
};

static Factors factors_of(const float *table) {
    Factors f;
    f.right = table && table[0] == 0;
    for (int i = 0; f.right && i < 16; i++) f.high[i] = table[16 * i + 8], f.low[i] = table[128 + i] / table[136];
    for (int q = 1; f.right && q < 256; q++) {
        const float error = f.high[q / 16] * f.low[q % 16] - table[q];
        f.right = (error < 0 ? -error : error) <= table[q] * 0x1p-20f;
    }
    return f;
}

// Numbers `from` .. `from` + `count` - 1 of each row, stored in SIZE bytes each: turn(word, number of the byte of it) makes floats.
template <int SIZE, class Turn> INLINE void read_across(const Strip &strip, int64_t from, int64_t count, float (*out)[16], Turn turn) {
    for (int64_t g = 0; g < count; g += 16 / SIZE) {
        U word[4];
        quad_of<false>(word, strip, SIZE * (from + g));
        each<4>([&](auto d) __attribute__((always_inline)) {
            constexpr int D = decltype(d)::value;
            if (g + 4 / SIZE * D >= count) return;
            each<4 / SIZE>([&](auto i) __attribute__((always_inline)) {  // `out` has room for whole words
                constexpr int I = decltype(i)::value;
                store(out[g + 4 / SIZE * D + I], turn(word[D], Number<SIZE * I>()));
            });
        });
    }
}

// Fields of BITS bits of a stream, as read_across.
template <int BITS> static void read_stream(const Strip &strip, int64_t from, int64_t count, float (*out)[16]) {
    const int64_t start = from * BITS / 8;
    const int before = (int)(from * BITS % 8);  // at most 119 of 128 bits are used, but 128 with 8 bits, where none are before
    for (int64_t g = 0; g < count; g += 16) {
        U word[4];
        quad_of<false>(word, strip, start + g * BITS / 8);
        if (before) {
            for (int d = 0; d < 3; d++) word[d] = either(down_by(word[d], before), up_by(word[d + 1], 32 - before));
            word[3] = down_by(word[3], before);
        }
        each<4>([&](auto four) __attribute__((always_inline)) {
            if (g + 4 * decltype(four)::value >= count) return;
            each<4>([&](auto i) __attribute__((always_inline)) {
                constexpr int I = 4 * decltype(four)::value + decltype(i)::value, AT = I * BITS, D = AT / 32, DOWN = AT % 32;
                U number = shift<DOWN>(word[D]);
                if constexpr (DOWN + BITS > 32) number = either(number, shift_up<DOWN ? 32 - DOWN : 0>(word[D + 1]));
                store(out[g + I], to_float(mask(number, (1u << BITS) - 1)));
            });
        });
    }
}

typedef void (*ReadStream)(const Strip &, int64_t, int64_t, float (*)[16]);
static const ReadStream READ_STREAM[9] = {nullptr, read_stream<1>, read_stream<2>, read_stream<3>, read_stream<4>,
                                          read_stream<5>, read_stream<6>, read_stream<7>, read_stream<8>};

struct Half {  // of a word, by the number of its first byte, as float
    template <int BYTE> F operator()(U word, Number<BYTE>) const { return half_to_float(mask(shift<8 * BYTE>(word), 0xFFFF)); }
};

// Where the parts of 16 rows of the weight lie.
struct Parts {
    Strip codes, scales, zeros;
    float steps[16];  // of tables
};

static Parts parts_of(const lowbit_weight *w, const Int8Table &table, int64_t first) {
    static const int64_t size[] = {0, 4, 2, 2, 1};
    const int64_t rows = w->rows, groups = groups_of(w);
    Parts parts;
    parts.codes = strip_of(w->codes, 2 * row_lanes(w->inputs, w->bits), first, rows);
    parts.scales = strip_of(w->scales, groups * size[w->scale], first, rows);
    const int64_t zeros[] = {0, (groups * w->bits + 7) / 8, 2 * groups};  // bytes of a row, by how they are stored
    parts.zeros = strip_of(w->zeros, zeros[w->zero], first, rows);
    for (int r = 0; r < 16 && w->table; r++)
        parts.steps[r] = table.steps[w->table != LOWBIT_TABLE_ROW ? 0 : first + r < rows ? first + r : rows - 1];
    return parts;
}

static void read_grid(const lowbit_weight *w, const Factors &factors, const Parts &parts, int64_t from, int64_t count, Grid &grid) {
    if (w->scale == LOWBIT_SCALE_BYTE && factors.right) {
        const F high = load(factors.high), low = load(factors.low);
        read_across<1>(parts.scales, from, count, grid.scales, [&](U word, auto byte) __attribute__((always_inline)) {
            constexpr int DOWN = 8 * decltype(byte)::value;
            return unless_zero(mul(lookup(high, shift<DOWN + 4>(word)), lookup(low, shift<DOWN>(word))), mask(shift<DOWN>(word), 255));
        });
    } else if (w->scale == LOWBIT_SCALE_BYTE) {
        read_across<1>(parts.scales, from, count, grid.scales, [&](U word, auto byte) __attribute__((always_inline)) {
            return gather(w->scale_table, mask(shift<8 * decltype(byte)::value>(word), 255));
        });
    } else if (w->scale == LOWBIT_SCALE_F16) {
        read_across<2>(parts.scales, from, count, grid.scales, Half());
    } else if (w->scale == LOWBIT_SCALE_BF16) {
        read_across<2>(parts.scales, from, count, grid.scales, [](U word, auto byte) __attribute__((always_inline)) {
            return as_floats(decltype(byte)::value ? mask(word, 0xFFFF0000) : shift_up<16>(word));
        });
    } else if (w->scale == LOWBIT_SCALE_F32) {
        read_across<4>(parts.scales, from, count, grid.scales,
                       [](U word, auto) __attribute__((always_inline)) { return as_floats(word); });
    } else {
        for (int64_t g = 0; g < count; g++) store(grid.scales[g], set1(1.0f));
    }
    for (int64_t g = 0; w->table && g < count; g++) store(grid.scales[g], mul(load(grid.scales[g]), load(parts.steps)));
    if (w->zero == LOWBIT_ZERO_STREAM)
        READ_STREAM[w->bits](parts.zeros, from, count, grid.shifts);
    else if (w->zero == LOWBIT_ZERO_F16)
        read_across<2>(parts.zeros, from, count, grid.shifts, Half());
    else
        for (int64_t g = 0; g < count; g++) store(grid.shifts[g], set1(w->table ? 128.0f : w->bits ? w->fixed_zero : 1.0f));
    for (int64_t g = 0; g < count; g++) store(grid.shifts[g], mul(load(grid.shifts[g]), sub(zero(), load(grid.scales[g]))));
}

}  // namespace int8
}  // namespace LOWBIT_ISA
}  // namespace lowbit
