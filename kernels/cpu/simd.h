// Sixteen floats, and sixteen 32-bit numbers, on each instruction set: just what the kernels need.
//
// One header for all: LOWBIT_AVX512, LOWBIT_AVX2, LOWBIT_NEON or none of them (plain loops that any compiler takes and good ones
// vectorise) is defined by the build for each copy of the kernels. `lookup` reads a table of 16 by the low four bits of an index.
//
// evens_odds: of 16 numbers those at even places first. Words that come from lanes without a shuffle are in this order:
// nibbles16, nibbles8 and nibbles4 read the lanes of a plane of 4, 2 or 1 bits of a block, so that the low bits of nibble v of
// word i are those of the code at place i, in that order, of vector v; other bits are anything. stream16: 16 numbers of BITS
// bits, one after the other, from 16 bytes that must be readable. lookup8 reads a table by the low three bits, lookup_wide one of
// 2^BITS, from 5 bits. words16: 32 lanes, two to a word. next_digits: their next digits in base 3, of which they are fractions.
// splice: n of a, then b. add_sums: sums of TILE_ROWS vectors, added to numbers; so many rows of the weight fit the registers when
// they are multiplied by several rows of x.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"
#include "number.h"

#if defined(LOWBIT_AVX512) || defined(LOWBIT_AVX2)
#include <immintrin.h>
#elif defined(LOWBIT_NEON)
#include <arm_neon.h>
#endif

namespace lowbit {
namespace LOWBIT_ISA {

// For stream16: which bytes of a stream, a pair in each word, hold a number of BITS bits, and how far up (0x80: none).
template <int BITS> struct Stream {
    uint32_t byte[16], shift[16];
    constexpr Stream() : byte(), shift() {
        for (uint32_t i = 0; i < 16; i++) {
            const uint32_t first = i * BITS / 8, second = i * BITS % 8 + BITS > 8 ? first + 1 : 0x80;
            byte[i] = first | second << 8 | 0x80800000;
            shift[i] = i * BITS % 8;
        }
    }
};

#if defined(LOWBIT_AVX512)

typedef __m512 F;
typedef __m512i U;
INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F set1(float a) { return _mm512_set1_ps(a); }
INLINE F load(const float *p) { return _mm512_loadu_ps(p); }
INLINE F load_held(const float *p) {
    F a = load(p);
    asm("" : "+v"(a));
    return a;
}
INLINE void store(float *p, F a) { _mm512_storeu_ps(p, a); }
INLINE void store_first(float *p, F a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
constexpr int TILE_ROWS = 4;
INLINE void add_sums(float *to, const F (&a)[TILE_ROWS]) {  // a transposition: half the instructions of four sums
    const F first = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const F second = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const F all = add(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xEE));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
}
INLINE F lookup(F table, U index) { return _mm512_permutexvar_ps(index, table); }
INLINE F lookup8(F table, U index) { return lookup(table, index); }
INLINE U next_digits(U &rest) {
    const U three = _mm512_set1_epi16(3), digits = _mm512_mulhi_epu16(rest, three);
    rest = _mm512_mullo_epi16(rest, three);
    return digits;
}
INLINE U words16(const uint16_t *p) { return _mm512_loadu_si512(p); }
INLINE F splice(F a, F b, int n) { return _mm512_mask_blend_ps((__mmask16)(0xFFFFu << n), a, b); }
INLINE F gather(const float *table, U index) { return _mm512_i32gather_ps(index, table, 4); }
template <int BITS> INLINE F lookup_wide(const float *table, U index) {
    F found = _mm512_permutex2var_ps(load(table), index, load(table + 16));
    if constexpr (BITS > 5) {  // a register's worth of tables at a time is faster than the instruction that gathers
        const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
        const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
        const __mmask16 top = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
        auto pair = [&](int i) __attribute__((always_inline)) {
            const F low = _mm512_permutex2var_ps(load(table + 64 * i), index, load(table + 64 * i + 16));
            const F high = _mm512_permutex2var_ps(load(table + 64 * i + 32), index, load(table + 64 * i + 48));
            return _mm512_mask_blend_ps(odd, low, high);
        };
        found = pair(0);
        if (BITS > 6) found = _mm512_mask_blend_ps(upper, found, pair(1));
        if (BITS > 7) found = _mm512_mask_blend_ps(top, found, _mm512_mask_blend_ps(upper, pair(2), pair(3)));
    }
    return found;
}
INLINE F to_float(U a) { return _mm512_cvtepi32_ps(a); }
INLINE F from_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE F from_bhalves(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE void to_halves(uint16_t *p, F a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void to_bhalves(uint16_t *p, F a) {
    const U bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    U rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(64));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(rounded));
}
INLINE U lanes16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
INLINE U lanes8(const uint16_t *p) {  // eight lanes, twice
    return _mm512_cvtepu16_epi32(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)));
}
INLINE U lanes4(const uint16_t *p) {  // four lanes, four times
    uint64_t four;
    memcpy(&four, p, 8);
    return _mm512_cvtepu16_epi32(_mm256_set1_epi64x((long long)four));
}
template <int N> INLINE U shift(U a) { return N ? _mm512_srli_epi32(a, N) : a; }
template <int N> INLINE U shift_up(U a) { return _mm512_slli_epi32(a, N); }
INLINE U halves_shift(U a) {  // 0 bits down in the first half, 2 in the second
    return _mm512_srlv_epi32(a, _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0));
}
INLINE U quarters_shift(U a) {  // 0, 1, 2, 3 bits down in the quarters
    return _mm512_srlv_epi32(a, _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0));
}
INLINE U mask(U a, uint32_t m) { return _mm512_and_si512(a, _mm512_set1_epi32((int)m)); }
INLINE U either(U a, U b) { return _mm512_or_si512(a, b); }
INLINE U choose(U a, U b, uint32_t m) {  // bits of a where m has a one, of b elsewhere
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32((int)m), 0xE4);
}
INLINE U plus(U a, U b) { return _mm512_add_epi32(a, b); }
INLINE F evens_odds(F a) {
    return _mm512_permutexvar_ps(_mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0), a);
}
INLINE U nibbles16(const uint16_t *p) {
    return _mm512_srlv_epi32(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p)),
                             _mm512_set_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0));
}
template <int UP> INLINE U nibbles8(const uint16_t *p) {
    const U lanes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
    if (UP) return _mm512_rorv_epi32(lanes, _mm512_set_epi32(17, 17, 17, 17, 15, 15, 15, 15, 1, 1, 1, 1, 31, 31, 31, 31));
    return _mm512_srlv_epi32(lanes, _mm512_set_epi32(18, 18, 18, 18, 16, 16, 16, 16, 2, 2, 2, 2, 0, 0, 0, 0));
}
INLINE U nibbles4(const uint16_t *p) {
    uint64_t four;
    memcpy(&four, p, 8);
    return _mm512_srlv_epi32(_mm512_set1_epi64((long long)four),
                             _mm512_set_epi32(19, 19, 18, 18, 17, 17, 16, 16, 3, 3, 2, 2, 1, 1, 0, 0));
}
template <int BITS> INLINE U stream16(const uint8_t *p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    if (BITS == 8) return _mm512_cvtepu8_epi32(bytes);
    alignas(64) static const Stream<BITS> from;
    const U pairs = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), _mm512_load_si512(from.byte));
    return _mm512_and_si512(_mm512_srlv_epi32(pairs, _mm512_load_si512(from.shift)), _mm512_set1_epi32((1 << BITS) - 1));
}

#elif defined(LOWBIT_AVX2)

struct F { __m256 v[2]; };
struct U { __m256i v[2]; };
#define BOTH(type, expression) { type r; UNROLL for (int i = 0; i < 2; i++) r.v[i] = expression; return r; }
INLINE F zero() BOTH(F, _mm256_setzero_ps())
INLINE F set1(float a) BOTH(F, _mm256_set1_ps(a))
INLINE F load(const float *p) BOTH(F, _mm256_loadu_ps(p + 8 * i))
INLINE F load_held(const float *p) { return load(p); }
INLINE void store(float *p, F a) { _mm256_storeu_ps(p, a.v[0]); _mm256_storeu_ps(p + 8, a.v[1]); }
INLINE void store_first(float *p, F a, int n) { float t[16]; store(t, a); memcpy(p, t, 4 * (size_t)n); }
INLINE F add(F a, F b) BOTH(F, _mm256_add_ps(a.v[i], b.v[i]))
INLINE F sub(F a, F b) BOTH(F, _mm256_sub_ps(a.v[i], b.v[i]))
INLINE F mul(F a, F b) BOTH(F, _mm256_mul_ps(a.v[i], b.v[i]))
INLINE F fma(F a, F b, F c) BOTH(F, _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]))
INLINE float sum(F a) {
    __m256 s = _mm256_add_ps(a.v[0], a.v[1]);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
INLINE F lookup(F table, U index)  // bit 3 chooses the half of the table: it goes to the sign, which blends
    BOTH(F, _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.v[0], index.v[i]), _mm256_permutevar8x32_ps(table.v[1], index.v[i]),
                             _mm256_castsi256_ps(_mm256_slli_epi32(index.v[i], 28))))
INLINE F lookup8(F table, U index) BOTH(F, _mm256_permutevar8x32_ps(table.v[0], index.v[i]))
INLINE U next_digits(U &rest) {
    const __m256i three = _mm256_set1_epi16(3);
    U digits;
    UNROLL
    for (int i = 0; i < 2; i++) {
        digits.v[i] = _mm256_mulhi_epu16(rest.v[i], three);
        rest.v[i] = _mm256_mullo_epi16(rest.v[i], three);
    }
    return digits;
}
INLINE U words16(const uint16_t *p) BOTH(U, _mm256_loadu_si256((const __m256i *)(p + 16 * i)))
INLINE F splice(F a, F b, int n) {
    const __m256i count = _mm256_set1_epi32(n), places = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    F r;
    UNROLL
    for (int i = 0; i < 2; i++) {
        const __m256i mine = _mm256_cmpgt_epi32(count, _mm256_add_epi32(places, _mm256_set1_epi32(8 * i)));
        r.v[i] = _mm256_blendv_ps(b.v[i], a.v[i], _mm256_castsi256_ps(mine));
    }
    return r;
}
INLINE F gather(const float *table, U index) BOTH(F, _mm256_i32gather_ps(table, index.v[i], 4))
template <int> INLINE F lookup_wide(const float *table, U index) { return gather(table, index); }
INLINE F to_float(U a) BOTH(F, _mm256_cvtepi32_ps(a.v[i]))
INLINE F from_halves(const uint16_t *p) BOTH(F, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8 * i))))
INLINE F from_bhalves(const uint16_t *p)
    BOTH(F, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i))), 16)))
INLINE void to_halves(uint16_t *p, F a) {
    UNROLL
    for (int i = 0; i < 2; i++) _mm_storeu_si128((__m128i *)(p + 8 * i), _mm256_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT));
}
INLINE void to_bhalves(uint16_t *p, F a) {
    UNROLL
    for (int i = 0; i < 2; i++) {
        const __m256i bits = _mm256_castps_si256(a.v[i]), high = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v[i], a.v[i], _CMP_UNORD_Q));
        const __m256i chosen = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(64)), nan);
        _mm_storeu_si128((__m128i *)(p + 8 * i),
                         _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1)));
    }
}
INLINE U lanes16(const uint16_t *p) BOTH(U, _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i))))
INLINE U lanes8(const uint16_t *p) {
    __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return U{{a, a}};
}
INLINE U lanes4(const uint16_t *p) {
    uint64_t four;
    memcpy(&four, p, 8);
    __m256i a = _mm256_cvtepu16_epi32(_mm_set1_epi64x((long long)four));
    return U{{a, a}};
}
template <int N> INLINE U shift(U a) BOTH(U, _mm256_srli_epi32(a.v[i], N))
template <int N> INLINE U shift_up(U a) BOTH(U, _mm256_slli_epi32(a.v[i], N))
INLINE U halves_shift(U a) { return U{{a.v[0], _mm256_srli_epi32(a.v[1], 2)}}; }
INLINE U quarters_shift(U a) {
    return U{{_mm256_srlv_epi32(a.v[0], _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0)),
              _mm256_srlv_epi32(a.v[1], _mm256_set_epi32(3, 3, 3, 3, 2, 2, 2, 2))}};
}
INLINE U mask(U a, uint32_t m) BOTH(U, _mm256_and_si256(a.v[i], _mm256_set1_epi32((int)m)))
INLINE U either(U a, U b) BOTH(U, _mm256_or_si256(a.v[i], b.v[i]))
INLINE U plus(U a, U b) BOTH(U, _mm256_add_epi32(a.v[i], b.v[i]))
INLINE U choose(U a, U b, uint32_t m) { return either(mask(a, m), mask(b, ~m)); }
INLINE F evens_odds(F a) {
    const __m256d evens = _mm256_castps_pd(_mm256_shuffle_ps(a.v[0], a.v[1], 0x88));
    const __m256d odds = _mm256_castps_pd(_mm256_shuffle_ps(a.v[0], a.v[1], 0xDD));
    return F{{_mm256_castpd_ps(_mm256_permute4x64_pd(evens, 0xD8)), _mm256_castpd_ps(_mm256_permute4x64_pd(odds, 0xD8))}};
}
INLINE U nibbles16(const uint16_t *p) {
    const __m256i lanes = _mm256_loadu_si256((const __m256i *)p);
    return U{{lanes, _mm256_srli_epi32(lanes, 16)}};
}
template <int UP> INLINE U nibbles8(const uint16_t *p) {
    const __m256i lanes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return U{{_mm256_srlv_epi32(UP ? _mm256_slli_epi32(lanes, 1) : lanes, _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0)),
              _mm256_srlv_epi32(lanes, _mm256_set_epi32(18 - UP, 18 - UP, 18 - UP, 18 - UP, 16 - UP, 16 - UP, 16 - UP, 16 - UP))}};
}
INLINE U nibbles4(const uint16_t *p) {
    uint64_t four;
    memcpy(&four, p, 8);
    const __m256i lanes = _mm256_set1_epi64x((long long)four);
    return U{{_mm256_srlv_epi32(lanes, _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0)),
              _mm256_srlv_epi32(lanes, _mm256_set_epi32(19, 19, 18, 18, 17, 17, 16, 16))}};
}
template <int BITS> INLINE U stream16(const uint8_t *p) {
    alignas(64) static const Stream<BITS> from;
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    U r;
    UNROLL
    for (int i = 0; i < 2; i++) {
        const __m256i pairs = _mm256_shuffle_epi8(bytes, _mm256_load_si256((const __m256i *)(from.byte + 8 * i)));
        r.v[i] = _mm256_and_si256(_mm256_srlv_epi32(pairs, _mm256_load_si256((const __m256i *)(from.shift + 8 * i))),
                                  _mm256_set1_epi32((1 << BITS) - 1));
    }
    return r;
}
#undef BOTH

#elif defined(LOWBIT_NEON)
#include "simd_neon.h"
#else

struct F { float v[16]; };
struct U { uint32_t v[16]; };
#define EACH(type, expression) { type r; for (int i = 0; i < 16; i++) r.v[i] = expression; return r; }
INLINE F zero() EACH(F, 0)
INLINE F set1(float a) EACH(F, a)
INLINE F load(const float *p) EACH(F, p[i])
INLINE F load_held(const float *p) { return load(p); }
INLINE void store(float *p, F a) { memcpy(p, a.v, sizeof a.v); }
INLINE void store_first(float *p, F a, int n) { memcpy(p, a.v, 4 * (size_t)n); }
INLINE F add(F a, F b) EACH(F, a.v[i] + b.v[i])
INLINE F sub(F a, F b) EACH(F, a.v[i] - b.v[i])
INLINE F mul(F a, F b) EACH(F, a.v[i] * b.v[i])
INLINE F fma(F a, F b, F c) EACH(F, a.v[i] * b.v[i] + c.v[i])
INLINE float sum(F a) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
    return a.v[0];
}
INLINE F lookup(F table, U index) EACH(F, table.v[index.v[i] & 15])
INLINE F lookup8(F table, U index) EACH(F, table.v[index.v[i] & 7])
INLINE U next_digits(U &rest) {
    U digits;
    for (int i = 0; i < 16; i++) {
        const uint32_t low = 3 * (rest.v[i] & 0xFFFF), high = 3 * (rest.v[i] >> 16);
        digits.v[i] = low >> 16 | (high & 0xFFFF0000);
        rest.v[i] = (low & 0xFFFF) | high << 16;
    }
    return digits;
}
INLINE U words16(const uint16_t *p) EACH(U, p[2 * i] | (uint32_t)p[2 * i + 1] << 16)
INLINE F splice(F a, F b, int n) EACH(F, i < n ? a.v[i] : b.v[i])
INLINE F gather(const float *table, U index) EACH(F, table[index.v[i]])
template <int> INLINE F lookup_wide(const float *table, U index) { return gather(table, index); }
INLINE F to_float(U a) EACH(F, (float)(int32_t)a.v[i])
INLINE F from_halves(const uint16_t *p) EACH(F, from_f16(p[i]))
INLINE F from_bhalves(const uint16_t *p) EACH(F, from_bf16(p[i]))
INLINE void to_halves(uint16_t *p, F a) { for (int i = 0; i < 16; i++) p[i] = to_f16(a.v[i]); }
INLINE void to_bhalves(uint16_t *p, F a) { for (int i = 0; i < 16; i++) p[i] = to_bf16(a.v[i]); }
INLINE U lanes16(const uint16_t *p) EACH(U, p[i])
INLINE U lanes8(const uint16_t *p) EACH(U, p[i % 8])
INLINE U lanes4(const uint16_t *p) EACH(U, p[i % 4])
template <int N> INLINE U shift(U a) EACH(U, a.v[i] >> N)
template <int N> INLINE U shift_up(U a) EACH(U, a.v[i] << N)
INLINE U halves_shift(U a) EACH(U, a.v[i] >> (i / 8 * 2))
INLINE U quarters_shift(U a) EACH(U, a.v[i] >> (i / 4))
INLINE U mask(U a, uint32_t m) EACH(U, a.v[i] & m)
INLINE U either(U a, U b) EACH(U, a.v[i] | b.v[i])
INLINE U plus(U a, U b) EACH(U, a.v[i] + b.v[i])
INLINE U choose(U a, U b, uint32_t m) EACH(U, (a.v[i] & m) | (b.v[i] & ~m))
INLINE int even_odd(int i) { return i < 8 ? 2 * i : 2 * i - 15; }
INLINE F evens_odds(F a) EACH(F, a.v[even_odd(i)])
INLINE U nibbles16(const uint16_t *p) EACH(U, p[even_odd(i)])
template <int UP> INLINE U nibbles8(const uint16_t *p) EACH(U, (uint32_t)(p[even_odd(i) % 8] >> (even_odd(i) / 8 * 2) << UP))
INLINE U nibbles4(const uint16_t *p) EACH(U, p[even_odd(i) % 4] >> (even_odd(i) / 4))
template <int BITS> INLINE U stream16(const uint8_t *p)
    EACH(U, (p[i * BITS / 8] | (uint32_t)(i * BITS % 8 + BITS > 8 ? p[i * BITS / 8 + 1] : 0) << 8) >> (i * BITS % 8) & ((1u << BITS) - 1))
#undef EACH

#endif

#if !defined(LOWBIT_AVX512)
constexpr int TILE_ROWS = 2;
INLINE void add_sums(float *to, const F (&a)[TILE_ROWS]) { for (int r = 0; r < TILE_ROWS; r++) to[r] += sum(a[r]); }
#endif

}  // namespace LOWBIT_ISA
}  // namespace lowbit
