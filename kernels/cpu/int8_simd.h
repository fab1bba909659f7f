// What products in 8 bits need beyond simd.h: bytes in vectors of sixteen 32-bit numbers, one for each of 16 rows of the weight.
//
// `dot` adds to each of 16 sums four products of unsigned codes and signed x; SMALL: codes below 128, so that the sum of two
// products fits into 16 bits. `quad` loads 16 bytes from each of 16 rows, `bytes` apart, and gives four vectors, one for every four
// bytes; SEPARATE puts the even ones of the 16 bytes first.
#pragma once

#include "simd.h"

namespace lowbit {
namespace LOWBIT_ISA {

#if defined(LOWBIT_AVX512)

constexpr int STRIPS = 2, TOKENS = 6;
INLINE U load_bytes(const void *p) { return _mm512_loadu_si512(p); }
INLINE void store_bytes(void *p, U a) { _mm512_storeu_si512(p, a); }
INLINE U no_sums() { return _mm512_setzero_si512(); }
INLINE U four_bytes(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}
template <bool SMALL> INLINE U dot(U sums, U codes, U x) {
#if defined(LOWBIT_VNNI)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));  // compilers copy sums about
    return sums;
#else
    if (SMALL) return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
    const U even = _mm512_madd_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    const U odd = _mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(sums, _mm512_add_epi32(even, odd));
#endif
}
template <bool SMALL> INLINE U dot_four(U sums, U codes, const int8_t *x) {  // x: four bytes for all
#if defined(LOWBIT_VNNI)
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*(const int8_t(*)[4])x));  // compilers load x by itself
    return sums;
#else
    return dot<SMALL>(sums, codes, four_bytes(x));
#endif
}
INLINE U down_by(U a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
INLINE U up_by(U a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
INLINE F unless_zero(F a, U b) { return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(b, b), a); }
INLINE F half_to_float(U a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
INLINE F as_floats(U a) { return _mm512_castsi512_ps(a); }
INLINE U bits_of(F a) { return _mm512_castps_si512(a); }
INLINE U larger(U a, U b) { return _mm512_max_epu32(a, b); }
INLINE uint32_t largest(U a) { return _mm512_reduce_max_epu32(a); }
INLINE U rounded(F a) { return _mm512_cvtps_epi32(a); }
INLINE void store_narrow(void *p, U a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
INLINE __m512i four_rows(const uint8_t *p, int64_t bytes) {
    const auto part = [&](int i) { return _mm_loadu_si128((const __m128i *)(p + 4 * i * bytes)); };
    __m512i a = _mm512_castsi128_si512(part(0));
    a = _mm512_mask_broadcast_i32x4(a, 0x00F0, part(1));
    a = _mm512_mask_broadcast_i32x4(a, 0x0F00, part(2));
    return _mm512_mask_broadcast_i32x4(a, 0xF000, part(3));
}
template <bool SEPARATE> INLINE void quad(U (&out)[4], const uint8_t *p, int64_t bytes) {
    __m512i a[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        a[r] = four_rows(p + r * bytes, bytes);
        if (SEPARATE)
            a[r] = _mm512_shuffle_epi8(a[r], _mm512_broadcast_i32x4(_mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0)));
    }
    const __m512i b0 = _mm512_unpacklo_epi32(a[0], a[1]), b1 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i b2 = _mm512_unpacklo_epi32(a[2], a[3]), b3 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(b0, b2);
    out[1] = _mm512_unpackhi_epi64(b0, b2);
    out[2] = _mm512_unpacklo_epi64(b1, b3);
    out[3] = _mm512_unpackhi_epi64(b1, b3);
}
// Levels of codes, by a table of `parts` times 16 bytes.
INLINE U levels_of(U codes, const uint8_t *table, int parts) {
    const __m512i low = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
    __m512i found = _mm512_setzero_si512();
    for (int i = 0; i < parts; i++)
        found = _mm512_mask_shuffle_epi8(found, _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8((char)i)),
                                         _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(table + 16 * i))), low);
    return found;
}

#elif defined(LOWBIT_AVX2)

constexpr int STRIPS = 1, TOKENS = 2;
#define BOTH(type, expression) { type r; for (int i = 0; i < 2; i++) r.v[i] = expression; return r; }
INLINE U load_bytes(const void *p) BOTH(U, _mm256_loadu_si256((const __m256i *)p + i))
INLINE void store_bytes(void *p, U a) { for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)p + i, a.v[i]); }
INLINE U no_sums() BOTH(U, _mm256_setzero_si256())
INLINE U four_bytes(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    BOTH(U, _mm256_set1_epi32(four))
}
INLINE __m256i dot_big(__m256i codes, __m256i x) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    return _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8)));
}
template <bool SMALL> INLINE U dot(U sums, U codes, U x)
    BOTH(U, _mm256_add_epi32(sums.v[i], SMALL ? _mm256_madd_epi16(_mm256_maddubs_epi16(codes.v[i], x.v[i]), _mm256_set1_epi16(1))
                                              : dot_big(codes.v[i], x.v[i])))
template <bool SMALL> INLINE U dot_four(U sums, U codes, const int8_t *x) { return dot<SMALL>(sums, codes, four_bytes(x)); }
INLINE U down_by(U a, int n) BOTH(U, _mm256_srl_epi32(a.v[i], _mm_cvtsi32_si128(n)))
INLINE U up_by(U a, int n) BOTH(U, _mm256_sll_epi32(a.v[i], _mm_cvtsi32_si128(n)))
INLINE F unless_zero(F a, U b)
    BOTH(F, _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(b.v[i], _mm256_setzero_si256())), a.v[i]))
INLINE F as_floats(U a) BOTH(F, _mm256_castsi256_ps(a.v[i]))
INLINE U bits_of(F a) BOTH(U, _mm256_castps_si256(a.v[i]))
INLINE U larger(U a, U b) BOTH(U, _mm256_max_epu32(a.v[i], b.v[i]))
INLINE U rounded(F a) BOTH(U, _mm256_cvtps_epi32(a.v[i]))
INLINE __m128i halves_of(__m256i a) { return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)); }
INLINE F half_to_float(U a) BOTH(F, _mm256_cvtph_ps(halves_of(a.v[i])))
INLINE uint32_t largest(U a) {
    const __m256i b = _mm256_max_epu32(a.v[0], a.v[1]);
    __m128i c = _mm_max_epu32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_max_epu32(c, _mm_shuffle_epi32(c, 0x4E));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(c, _mm_shuffle_epi32(c, 0xB1)));
}
INLINE void store_narrow(void *p, U a) {  // the low bytes
    const __m256i low = _mm256_set1_epi32(255);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi16(halves_of(_mm256_and_si256(a.v[0], low)), halves_of(_mm256_and_si256(a.v[1], low))));
}
template <bool SEPARATE> INLINE void quad(U (&out)[4], const uint8_t *p, int64_t bytes) {
    const __m128i order = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    for (int half = 0; half < 2; half++) {
        __m256i a[4];
        for (int r = 0; r < 4; r++) {
            const __m128i *low = (const __m128i *)(p + (8 * half + r) * bytes), *high = (const __m128i *)(p + (8 * half + r + 4) * bytes);
            a[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1);
            if (SEPARATE) a[r] = _mm256_shuffle_epi8(a[r], _mm256_broadcastsi128_si256(order));
        }
        const __m256i b0 = _mm256_unpacklo_epi32(a[0], a[1]), b1 = _mm256_unpackhi_epi32(a[0], a[1]);
        const __m256i b2 = _mm256_unpacklo_epi32(a[2], a[3]), b3 = _mm256_unpackhi_epi32(a[2], a[3]);
        out[0].v[half] = _mm256_unpacklo_epi64(b0, b2);
        out[1].v[half] = _mm256_unpackhi_epi64(b0, b2);
        out[2].v[half] = _mm256_unpacklo_epi64(b1, b3);
        out[3].v[half] = _mm256_unpackhi_epi64(b1, b3);
    }
}
INLINE U levels_of(U codes, const uint8_t *table, int parts) {
    U found = no_sums();
    for (int i = 0; i < parts; i++) {
        const __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16 * i)));
        for (int h = 0; h < 2; h++) {
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes.v[h], 4), _mm256_set1_epi8(15));
            const __m256i here = _mm256_shuffle_epi8(levels, _mm256_and_si256(codes.v[h], _mm256_set1_epi8(15)));
            found.v[h] = _mm256_blendv_epi8(found.v[h], here, _mm256_cmpeq_epi8(high, _mm256_set1_epi8((char)i)));
        }
    }
    return found;
}
#undef BOTH

#elif defined(LOWBIT_NEON)
#include "int8_neon.h"
#else

constexpr int STRIPS = 1, TOKENS = 1;
#define EACH(type, expression) { type r; for (int i = 0; i < 16; i++) r.v[i] = expression; return r; }
INLINE U load_bytes(const void *p) { U a; memcpy(a.v, p, 64); return a; }
INLINE void store_bytes(void *p, U a) { memcpy(p, a.v, 64); }
INLINE U no_sums() EACH(U, 0)
INLINE U four_bytes(const int8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    EACH(U, four)
}
INLINE int32_t product(uint32_t codes, uint32_t x, int shift) { return (int32_t)(codes >> shift & 255) * (int8_t)(x >> shift & 255); }
template <bool SMALL> INLINE U dot(U sums, U codes, U x)
    EACH(U, (uint32_t)((int32_t)sums.v[i] + product(codes.v[i], x.v[i], 0) + product(codes.v[i], x.v[i], 8) +
                       product(codes.v[i], x.v[i], 16) + product(codes.v[i], x.v[i], 24)))
template <bool SMALL> INLINE U dot_four(U sums, U codes, const int8_t *x) { return dot<SMALL>(sums, codes, four_bytes(x)); }
INLINE U down_by(U a, int n) EACH(U, n < 32 ? a.v[i] >> n : 0)
INLINE U up_by(U a, int n) EACH(U, n < 32 ? a.v[i] << n : 0)
INLINE F unless_zero(F a, U b) EACH(F, b.v[i] ? a.v[i] : 0)
INLINE F half_to_float(U a) EACH(F, from_f16((uint16_t)a.v[i]))
INLINE F as_floats(U a) EACH(F, as_float(a.v[i]))
INLINE U bits_of(F a) EACH(U, as_bits(a.v[i]))
INLINE U larger(U a, U b) EACH(U, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
INLINE uint32_t largest(U a) {
    for (int i = 1; i < 16; i++) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
    return a.v[0];
}
INLINE U rounded(F a) EACH(U, as_bits(a.v[i] + 12582912.0f) - 0x4B400000)  // 3 * 2^22: whole numbers, to nearest even
INLINE void store_narrow(void *p, U a) { for (int i = 0; i < 16; i++) ((uint8_t *)p)[i] = (uint8_t)a.v[i]; }
template <bool SEPARATE> INLINE void quad(U (&out)[4], const uint8_t *p, int64_t bytes) {
    for (int i = 0; i < 16; i++) {
        const uint8_t *row = p + i * bytes;
        for (int d = 0; d < 4; d++) {
            uint32_t four = 0;
            for (int b = 0; b < 4; b++) four |= (uint32_t)row[SEPARATE ? 8 * (d & 1) + 2 * b + (d >> 1) : 4 * d + b] << (8 * b);
            out[d].v[i] = four;
        }
    }
}
INLINE U levels_of(U codes, const uint8_t *table, int)
    EACH(U, table[codes.v[i] & 255] | (uint32_t)table[codes.v[i] >> 8 & 255] << 8 | (uint32_t)table[codes.v[i] >> 16 & 255] << 16 |
                (uint32_t)table[codes.v[i] >> 24] << 24)
#undef EACH

#endif

}  // namespace LOWBIT_ISA
}  // namespace lowbit
