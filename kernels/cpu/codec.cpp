// Decoding symbols: 32 interleaved range coders (rANS) over one stream of 16-bit words; compiled once for each instruction set.
//
// Symbol i is lane i % 32's. A lane reads a word when its state falls below 2^16, and the lanes take words in their order: so the words
// of a round lie side by side, and a vector of lanes is served by one load that is expanded to the lanes in need. What limits the
// speed is the chain of one lane (slot, table, product, refill), so all lanes are in flight at once.

#include <cstddef>
#include <cstring>

#include "kernels.h"

#if defined(LOWBIT_AVX512) || defined(LOWBIT_AVX2)
#include <immintrin.h>
#endif

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr size_t ROUND_BYTES = 2 * LANES;  // the most that a round reads

// One step of lanes first .. last - 1, each byte checked.
inline bool step(uint32_t *states, int lanes, const Slot *table, const uint8_t *&at, const uint8_t *end, uint8_t *symbols) {
    for (int l = 0; l < lanes; l++) {
        uint32_t x = states[l];
        const Slot slot = table[x & (SLOTS - 1)];
        symbols[l] = (uint8_t)slot;
        x = (((slot >> 8) & (SLOTS - 1)) + 1) * (x >> FREQUENCY_BITS) + (slot >> 20);
        if (x < LEAST_STATE) {
            if (end - at < 2) return false;
            uint16_t word;
            memcpy(&word, at, 2);
            at += 2;
            x = x << 16 | word;
        }
        states[l] = x;
    }
    return true;
}

// As many whole rounds as can be made without looking at what is left: at least ROUND_BYTES are there before each.
#if defined(LOWBIT_AVX512)

inline void lanes16(__m512i &x, const Slot *table, const uint8_t *&at, uint8_t *symbols) {
    const __m512i slot = _mm512_i32gather_epi32(_mm512_and_si512(x, _mm512_set1_epi32(SLOTS - 1)), (const int *)table, 4);
    _mm_storeu_si128((__m128i *)symbols, _mm512_cvtepi32_epi8(slot));
    const __m512i frequency =
        _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(slot, 8), _mm512_set1_epi32(SLOTS - 1)), _mm512_set1_epi32(1));
    x = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(x, FREQUENCY_BITS)), _mm512_srli_epi32(slot, 20));
    const __mmask16 need = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32((int)LEAST_STATE));
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
    x = _mm512_mask_or_epi32(x, need, _mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(need, words));
    at += 2 * __builtin_popcount(need);
}

inline size_t rounds(uint32_t *states, const Slot *table, const uint8_t *&at, const uint8_t *end, uint8_t *symbols, size_t most) {
    __m512i a = _mm512_loadu_si512(states), b = _mm512_loadu_si512(states + 16);
    size_t done = 0;
    for (; done < most && end - at >= (ptrdiff_t)ROUND_BYTES; done++, symbols += LANES) {
        lanes16(a, table, at, symbols);
        lanes16(b, table, at, symbols + 16);
    }
    _mm512_storeu_si512(states, a);
    _mm512_storeu_si512(states + 16, b);
    return done;
}

#elif defined(LOWBIT_AVX2)

// For a mask of eight lanes: which word each of them takes.
struct Expand {
    uint64_t order[256];
    constexpr Expand() : order() {
        for (int mask = 0; mask < 256; mask++) {
            uint64_t taken = 0;
            for (int l = 0; l < 8; l++)
                if (mask >> l & 1) order[mask] |= taken++ << (8 * l);
        }
    }
};
constexpr Expand EXPAND;

inline void lanes8(__m256i &x, const Slot *table, const uint8_t *&at, uint8_t *symbols) {
    const __m256i slot = _mm256_i32gather_epi32((const int *)table, _mm256_and_si256(x, _mm256_set1_epi32(SLOTS - 1)), 4);
    const __m256i low = _mm256_shuffle_epi8(slot, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12,
                                                                   -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const uint64_t eight = (uint32_t)_mm256_cvtsi256_si32(low) | (uint64_t)(uint32_t)_mm256_extract_epi32(low, 4) << 32;
    memcpy(symbols, &eight, 8);
    const __m256i frequency =
        _mm256_add_epi32(_mm256_and_si256(_mm256_srli_epi32(slot, 8), _mm256_set1_epi32(SLOTS - 1)), _mm256_set1_epi32(1));
    x = _mm256_add_epi32(_mm256_mullo_epi32(frequency, _mm256_srli_epi32(x, FREQUENCY_BITS)), _mm256_srli_epi32(slot, 20));
    const __m256i need = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(need));
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&EXPAND.order[mask]));
    const __m256i filled = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_permutevar8x32_epi32(words, order));
    x = _mm256_blendv_epi8(x, filled, need);
    at += 2 * __builtin_popcount((unsigned)mask);
}

inline size_t rounds(uint32_t *states, const Slot *table, const uint8_t *&at, const uint8_t *end, uint8_t *symbols, size_t most) {
    __m256i x[4];
    for (int i = 0; i < 4; i++) x[i] = _mm256_loadu_si256((const __m256i *)(states + 8 * i));
    size_t done = 0;
    for (; done < most && end - at >= (ptrdiff_t)ROUND_BYTES; done++, symbols += LANES)
        for (int i = 0; i < 4; i++) lanes8(x[i], table, at, symbols + 8 * i);
    for (int i = 0; i < 4; i++) _mm256_storeu_si256((__m256i *)(states + 8 * i), x[i]);
    return done;
}

#else

inline size_t rounds(uint32_t *states, const Slot *table, const uint8_t *&at, const uint8_t *end, uint8_t *symbols, size_t most) {
    size_t done = 0;
    for (; done < most && end - at >= (ptrdiff_t)ROUND_BYTES; done++, symbols += LANES)
        for (int l = 0; l < LANES; l++) {
            const uint32_t x = states[l];
            const Slot slot = table[x & (SLOTS - 1)];
            symbols[l] = (uint8_t)slot;
            const uint32_t next = (((slot >> 8) & (SLOTS - 1)) + 1) * (x >> FREQUENCY_BITS) + (slot >> 20);
            uint16_t word;
            memcpy(&word, at, 2);
            const bool need = next < LEAST_STATE;  // no branch: which lane needs a word cannot be foreseen
            states[l] = need ? next << 16 | word : next;
            at += need ? 2 : 0;
        }
    return done;
}

#endif

}  // namespace

bool decode_symbols(const uint8_t *coded, size_t size, const Slot *table, uint8_t *symbols, size_t count) {
    if (size < STATES_BYTES) return false;
    alignas(64) uint32_t states[LANES];
    memcpy(states, coded, STATES_BYTES);
    const uint8_t *at = coded + STATES_BYTES, *const end = coded + size;
    size_t whole = count / LANES;
    const size_t fast = rounds(states, table, at, end, symbols, whole);
    symbols += fast * LANES;
    for (whole -= fast; whole; whole--, symbols += LANES)
        if (!step(states, LANES, table, at, end, symbols)) return false;
    if (!step(states, (int)(count % LANES), table, at, end, symbols)) return false;
    uint32_t other = 0;
    for (int l = 0; l < LANES; l++) other |= states[l] ^ LEAST_STATE;
    return at == end && !other;
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
