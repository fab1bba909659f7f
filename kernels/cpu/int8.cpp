// Products with activations in 8 bits, compiled once for each instruction set.
//
// x is quantized token by token, in groups of the weight's group size but at least 32 and at most 128 inputs: scale = largest
// magnitude / 127, code = x / scale rounded to nearest even. Sixteen rows of the weight, a strip, lie side by side in a vector of
// 32-bit numbers, four inputs of a row in each; so one instruction multiplies 64 codes with four of x, and nothing is summed
// across a vector. The layout of docs/format.md gives that almost for nothing: of the 16-bit lanes of a block, low bytes hold
// its first 32 values and high bytes the others, four neighbouring bytes hold, shifted and masked, four neighbouring values, and
// so packed bytes are turned (`quad`) before they are taken apart. Decoded codes of a chunk of inputs wait in the first cache
// (`tile`) for all rows of x. A unit's sum is exact; then it is worth
//
//     scale of the weight * scale of x * (sum of codes * x - zero point * sum of x)
//
// in float32. Tables have levels in 8 bits here (the caller rounds them), 128 added and taken off as a zero point.

#include "int8_decode.h"

#if !defined(LOWBIT_AVX512) && !defined(LOWBIT_AVX2) && !defined(LOWBIT_NEON)
#define LOWBIT_PLAIN
#endif

#if defined(LOWBIT_DOT) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace lowbit {
namespace LOWBIT_ISA {
namespace int8 {

// ---------------------------------------------------------------- activations

static void quantize_row(const float *x, const Tokens &to, int64_t token, int64_t unit, int64_t group) {
    int8_t *const codes = to.codes + token * to.stride;
    float *const scales = to.scales + token * to.units, *const sums = to.sums + token * to.units;
    for (int64_t from = 0; from < to.stride; from += group) {
        const int64_t end = from + group < to.stride ? from + group : to.stride;
        U most = no_sums();
        for (int64_t k = from; k < end; k += 16) most = larger(most, mask(bits_of(load(x + k)), 0x7FFFFFFF));
        const uint32_t bits = largest(most);  // in this order whatever is not finite is largest
        const float scale = bits < 0x7F800000 ? as_float(bits) / 127.0f : as_float(0x7FC00000);
        float inverse = 1.0f / scale;
        if (!(inverse < as_float(0x7F800000))) inverse = 0;
        for (int64_t start = from; start < end; start += unit) {
            const int64_t stop = start + unit < end ? start + unit : end;
            F total = zero();
            for (int64_t k = start; k < stop; k += 16) {
                const U code = inverse == 0 ? no_sums() : rounded(mul(load(x + k), set1(inverse)));
                store_narrow(codes + k, code);
                total = add(total, to_float(code));
            }
            scales[start / unit] = scale;
            sums[start / unit] = scale * sum(total);
        }
    }
}

static void quantize(const lowbit_weight *w, const void *x, int dtype, const Tokens &to, int64_t first, int64_t last, float *row) {
    const int64_t K = w->inputs, element = dtype == LOWBIT_F32 ? 4 : 2;
    for (int64_t i = first; i < last; i++) {
        const void *from = (const char *)x + i * K * element;
        if (dtype != LOWBIT_F32 || to.stride != K) {
            widen(from, row, K, dtype);
            for (int64_t k = K; k < to.stride; k++) row[k] = 0;
            from = row;
        }
        quantize_row((const float *)from, to, i, int8_unit(w), int8_group(w));
    }
}

// ---------------------------------------------------------------- one row of x: multiply while decoding

// exact[h] += products of 32 inputs, half h of two blocks, with the plane of P bits whose first byte is at `offset`. `levels`: of a
// table of 16, or null.
template <int P, int LOW, bool TABLE> INLINE void plane_products(const Strip &strip, int64_t offset, const int8_t *x, const uint8_t *levels,
                                                                 U (&exact)[4]) {
    U sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
#pragma GCC unroll 8
    for (int part = 0; part < P; part++) {
        U word[4];
        quad_of<true>(word, strip, offset + 16 * part);
#pragma GCC unroll 4
        for (int d = 0; d < 4; d++) {
            const int place = 2 * part + (d & 1), half = place / P * 2 + (d >> 1);
            each<8 / P>([&](auto f) __attribute__((always_inline)) {
                constexpr int F = decltype(f)::value;
                const U code = field<P, 0, F>(word[d]);
                sums[half] = dot_four<(P < 8 && !TABLE)>(sums[half], TABLE ? levels_of(code, levels, 1) : code, x + 32 * half + 4 * (P * F + place % P));
            });
        }
    }
    for (int h = 0; h < 4; h++) exact[h] = plus(exact[h], shift_up<LOW>(sums[h]));
}

// sums += the products of one row of x, whose codes from this chunk on are x, and what a unit's codes are worth, `scales` and `totals`.
template <int BITS, int UNIT, bool TABLE>
static void direct(const Strip &strip, int64_t blocks, int64_t from, int64_t count, const int8_t *x, const float *scales, const float *totals,
                   int64_t units, int units_per_group, const Grid &grid, const Ahead &ahead, const uint8_t *levels, float *sums) {
    constexpr int HIGH = Width<BITS>::high, REST = Width<BITS>::rest, UNITS = 128 / UNIT;
    F result[2] = {load(sums), zero()}, offset[2] = {zero(), zero()};
    for (int64_t b = 0, u = 0; b < count; b += 2, u += UNITS, x += 128) {
        ahead.fetch(16 * BITS * 16, (from + b) / 2);
        U exact[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        plane_products<HIGH, REST, TABLE>(strip, 8 * HIGH * (from + b), x, levels, exact);
        if constexpr (REST >= 2) plane_products<2, REST - 2, false>(strip, 8 * HIGH * blocks + 16 * (from + b), x, levels, exact);
        if constexpr (REST % 2) plane_products<1, 0, false>(strip, 8 * (BITS - 1) * blocks + 8 * (from + b), x, levels, exact);
        if constexpr (UNIT >= 64) exact[0] = plus(exact[0], exact[1]), exact[1] = plus(exact[2], exact[3]);
        if constexpr (UNIT == 128) exact[0] = plus(exact[0], exact[1]);
#pragma GCC unroll 4
        for (int i = 0; i < UNITS; i++) {
            if (i && u + i >= units) break;
            const int64_t g = (u + i) >> units_per_group;
            result[i & 1] = fma(to_float(exact[i]), mul(load(grid.scales[g]), set1(scales[u + i])), result[i & 1]);
            offset[i & 1] = fma(load(grid.shifts[g]), set1(totals[u + i]), offset[i & 1]);
        }
    }
    store(sums, add(add(result[0], result[1]), add(offset[0], offset[1])));
}

typedef void (*Direct)(const Strip &, int64_t, int64_t, int64_t, const int8_t *, const float *, const float *, int64_t, int, const Grid &, const Ahead &,
                       const uint8_t *, float *);
#define UNITS(BITS, TABLE) {direct<BITS, 32, TABLE>, direct<BITS, 64, TABLE>, direct<BITS, 128, TABLE>}
#if defined(LOWBIT_PLAIN)  // code for vectors gains nothing, and takes minutes to compile
static const Direct DIRECT[9][3] = {};
#else
static const Direct DIRECT[9][3] = {UNITS(4, true), UNITS(1, false), UNITS(2, false), UNITS(3, false), UNITS(4, false),
                                     UNITS(5, false), UNITS(6, false), UNITS(7, false), UNITS(8, false)};
#endif
#undef UNITS

// ---------------------------------------------------------------- a tile times rows of x

struct Chunk {
    const uint8_t *tile;  // (strips, TILE)
    const Grid *grid;     // (strips)
    int64_t steps, per_unit, unit;  // unit: the first one's number
    int units_per_group;  // as a shift
};

// sums (M, STRIPS, 16) += rows of x times R strips.
template <int R, int M, bool SMALL> static void multiply(const Chunk &chunk, const Tokens &tokens, int64_t token, float *sums) {
    const int8_t *x = tokens.codes + token * tokens.stride + chunk.unit * 4 * chunk.per_unit;
    const float *scales = tokens.scales + token * tokens.units + chunk.unit, *totals = tokens.sums + token * tokens.units + chunk.unit;
    F result[M][R];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) result[m][r] = load(sums + 16 * (STRIPS * m + r));
    const uint8_t *tile = chunk.tile;
    for (int64_t from = 0, u = 0; from < chunk.steps; from += chunk.per_unit, u++) {
        const int64_t to = from + chunk.per_unit < chunk.steps ? from + chunk.per_unit : chunk.steps;
        U exact[M][R];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) exact[m][r] = no_sums();
        for (int64_t s = from; s < to; s += 4) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                U codes[R];
#pragma GCC unroll 2
                for (int r = 0; r < R; r++) codes[r] = load_bytes(tile + r * TILE + i * STEP);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) {
                    const U four = four_bytes(x + m * tokens.stride + 4 * i);
#pragma GCC unroll 2
                    for (int r = 0; r < R; r++) exact[m][r] = dot<SMALL>(exact[m][r], codes[r], four);
                }
            }
            tile += 4 * STEP;
            x += 16;
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            const int64_t g = u >> chunk.units_per_group;
            const F scale = load(chunk.grid[r].scales[g]), offset = load(chunk.grid[r].shifts[g]);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const F worth = mul(scale, set1(scales[m * tokens.units + u]));
                result[m][r] = fma(to_float(exact[m][r]), worth, result[m][r]);
                result[m][r] = fma(offset, set1(totals[m * tokens.units + u]), result[m][r]);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) store(sums + 16 * (STRIPS * m + r), result[m][r]);
}

template <int R, bool SMALL, int M = TOKENS> INLINE void multiply_rest(const Chunk &chunk, const Tokens &tokens, int64_t token, int64_t last,
                                                                       float *sums) {
    if (last - token == M) return multiply<R, M, SMALL>(chunk, tokens, token, sums);
    if constexpr (M > 1) multiply_rest<R, SMALL, M - 1>(chunk, tokens, token, last, sums);
}

template <int R, bool SMALL> static void multiply_all(const Chunk &chunk, const Tokens &tokens, int64_t first, int64_t last, float *sums) {
    for (; first + TOKENS < last; first += TOKENS, sums += 16 * STRIPS * TOKENS) multiply<R, TOKENS, SMALL>(chunk, tokens, first, sums);
    multiply_rest<R, SMALL>(chunk, tokens, first, last, sums);
}

// ---------------------------------------------------------------- strips

static void write_strip(const lowbit_weight *w, const float *sums, int64_t tokens, int64_t token, int64_t row, int64_t last,
                        const void *bias, void *out, int dtype) {
    const int count = (int)(last - row < 16 ? last - row : 16);
    float offset[16] = {0};
    for (int r = 0; bias && r < count; r++) offset[r] = read(bias, row + r, dtype);
    for (int64_t i = 0; i < tokens; i++, sums += 16 * STRIPS) {
        const F value = add(load(sums), load(offset));
        const int64_t at = (token + i) * w->rows + row;
        if (count == 16 && dtype == LOWBIT_F32) {
            store((float *)out + at, value);
        } else if (count == 16) {
            (dtype == LOWBIT_F16 ? to_halves : to_bhalves)((uint16_t *)out + at, value);
        } else {
            float values[16];
            store(values, value);
            for (int r = 0; r < count; r++) write(out, at + r, dtype, values[r]);
        }
    }
}

typedef void (*Decode)(const Strip &, int64_t, int64_t, int64_t, const Ahead &, uint8_t *);
static const Decode DECODE[9] = {nullptr, planes<1>, planes<2>, planes<3>, planes<4>, planes<5>, planes<6>, planes<7>, planes<8>};

// `row` .. and some more rows, R strips, times tokens first .. last - 1.
template <int R, bool SMALL>
static void strips(const lowbit_weight *w, const Int8Table &table, const Factors &factors, const Tokens &tokens, const void *bias, void *out, int dtype,
                   int64_t row, int64_t end, int64_t first, int64_t last, uint8_t *scratch) {
    const int64_t blocks = (w->inputs + 63) / 64, width = 2 * row_lanes(w->inputs, w->bits), unit = int8_unit(w);
    uint8_t *const tile = scratch;
    Grid *const grid = (Grid *)(tile + INT8_STRIPS * TILE);
    float *const sums = (float *)(grid + INT8_STRIPS);
    uint8_t *const bytes = (uint8_t *)(sums + 16 * INT8_STRIPS * (tokens.count < INT8_TOKENS ? tokens.count : INT8_TOKENS));
    Parts parts[R];
    for (int r = 0; r < R; r++) {
        parts[r] = parts_of(w, table, row + 16 * r);
        if (w->bits) continue;
        uint8_t *const to = bytes + 16 * r * 64 * blocks;
        for (int64_t i = 0; i < 16; i++) {
            const int64_t at = row + 16 * r + i < w->rows ? i : 0;
            ternary_bytes((const uint16_t *)(parts[r].codes.base + at * width), w->inputs, 64 * blocks, to + i * 64 * blocks);
        }
        parts[r].codes = {to, 64 * blocks, to + 16 * 64 * blocks};
    }
    memset(sums, 0, sizeof(float) * 16 * STRIPS * (size_t)(last - first));
    // A row of x alone is multiplied without a tile, where codes are numbers or levels are few.
    const bool small_table = w->table == LOWBIT_TABLE_SHARED && w->bits == 4;
    const bool one = DIRECT[w->bits][0] && last - first == 1 && w->bits && (!w->table || small_table) && unit > 16;
    Chunk chunk{tile, grid, 0, unit / 4, 0, w->group == 0 || w->group > 256 ? 2 : w->group > 128 ? 1 : 0};
    for (int64_t block = 0; block < blocks; block += INT8_CHUNK) {
        const int64_t count = blocks - block < INT8_CHUNK ? blocks - block : INT8_CHUNK;
        const int64_t group = w->group ? 64 * block / w->group : 0;
        const int64_t ends = w->group ? (64 * (block + count) + w->group - 1) / w->group : 1;
        const int64_t groups = (ends < groups_of(w) ? ends : groups_of(w)) - group;
        for (int r = 0; r < R; r++) {
            uint8_t *const to = tile + r * TILE;
            Ahead(parts[r].scales, R).fetch(16 * INT8_CHUNK * parts[r].scales.bytes / blocks + 1, block / INT8_CHUNK);
            Ahead(parts[r].zeros, R).fetch(16 * INT8_CHUNK * parts[r].zeros.bytes / blocks + 1, block / INT8_CHUNK);
            read_grid(w, factors, parts[r], group, groups, grid[r]);
            if (one) continue;
            if (w->bits)
                DECODE[w->bits](parts[r].codes, blocks, block, count, Ahead(parts[r].codes, R), to);
            else
                from_bytes(parts[r].codes, block, count, to);
            if (w->table) apply_table(w, table, row + 16 * r, 16 * count, to);
        }
        chunk.steps = 16 * count;
        chunk.unit = 64 * block / unit;
        if (64 * (block + count) > w->inputs && unit < 64) {  // units behind the end have no scale
            const int64_t used = (w->inputs - 64 * block + unit - 1) / unit;
            chunk.steps = used * chunk.per_unit;
        }
        const int64_t at = first * tokens.units + chunk.unit;
        for (int r = 0; one && r < R; r++)
            DIRECT[w->table ? 0 : w->bits][unit / 64](parts[r].codes, blocks, block, count, tokens.codes + first * tokens.stride + 64 * block, tokens.scales + at,
                            tokens.sums + at, (chunk.steps + chunk.per_unit - 1) / chunk.per_unit, chunk.units_per_group, grid[r], Ahead(parts[r].codes, R), table.levels, sums + 16 * r);
        if (one) continue;
        multiply_all<R, SMALL>(chunk, tokens, first, last, sums);
    }
    for (int r = 0; r < R; r++) write_strip(w, sums + 16 * r, last - first, first, row + 16 * r, end, bias, out, dtype);
}

template <bool SMALL>
static void all_strips(const lowbit_weight *w, const Int8Table &table, const Tokens &tokens, const void *bias, void *out, int dtype,
                       int64_t first, int64_t last, uint8_t *scratch) {
    const Factors factors = factors_of(w->scale == LOWBIT_SCALE_BYTE ? w->scale_table : nullptr);
    for (int64_t token = 0; token < tokens.count; token += INT8_TOKENS) {
        const int64_t ends = token + INT8_TOKENS < tokens.count ? token + INT8_TOKENS : tokens.count;
        int64_t row = first;
        for (; ends - token > 1 && row + 16 * (STRIPS - 1) < last; row += 16 * STRIPS)
            strips<STRIPS, SMALL>(w, table, factors, tokens, bias, out, dtype, row, last, token, ends, scratch);
        for (; row < last; row += 16) strips<1, SMALL>(w, table, factors, tokens, bias, out, dtype, row, last, token, ends, scratch);
    }
}

static void linear(const lowbit_weight *w, const Int8Table &table, const Tokens &tokens, const void *bias, void *out, int dtype,
                   int64_t first, int64_t last, uint8_t *scratch) {
    const bool small = w->bits < 8 && !w->table;
    return (small ? all_strips<true> : all_strips<false>)(w, table, tokens, bias, out, dtype, first, last, scratch);
}

static bool here() {
#if defined(LOWBIT_VNNI)
    if (!__builtin_cpu_supports("avx512vnni")) return false;
#endif
#if defined(LOWBIT_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
#elif defined(LOWBIT_AVX2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#elif defined(LOWBIT_DOT) && defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // of Apple's processors all have dot products
#endif
}

static const Int8Kernels INT8 = {LOWBIT_ISA_NAME, here, quantize, linear};

}  // namespace int8
}  // namespace LOWBIT_ISA

const Int8Kernels &LOWBIT_COPY(int8_)() { return LOWBIT_ISA::int8::INT8; }

}  // namespace lowbit
