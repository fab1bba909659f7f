// Decoding symbols: 32 interleaved range coders (rANS) over one stream of 16-bit words; compiled once for each instruction set.
//
// Symbol i is lane i % 32's. A lane reads a word when its state falls below 2^16, and the lanes take words in their order: so the words
// of a round lie side by side, and a vector of lanes is served by one load that is expanded to the lanes in need. What limits the
// speed is the chain of one lane (slot, table, product, refill), some 65 cycles: so all lanes are in flight at once, and two blocks
// are decoded in turns wherever there are two, which takes hardly longer than one. Four at once gain no more.

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

// A block on its way.
struct Stream {
    alignas(64) uint32_t states[LANES];
    const uint8_t *at, *end;
    uint8_t *symbols;
    size_t rounds;  // whole ones that are left
};

// One step of lanes 0 .. lanes - 1, each byte checked.
inline bool step(Stream &s, int lanes, const Slot *table) {
    for (int l = 0; l < lanes; l++) {
        uint32_t x = s.states[l];
        const Slot slot = table[x & (SLOTS - 1)];
        *s.symbols++ = (uint8_t)slot;
        x = (((slot >> 8) & (SLOTS - 1)) + 1) * (x >> FREQUENCY_BITS) + (slot >> 20);
        if (x < LEAST_STATE) {
            if (s.end - s.at < 2) return false;
            uint16_t word;
            memcpy(&word, s.at, 2);
            s.at += 2;
            x = x << 16 | word;
        }
        s.states[l] = x;
    }
    return true;
}

// The states of a stream while whole rounds are made; a round may read ROUND_BYTES and does not look at what is left.
#if defined(LOWBIT_AVX512)

inline void lanes16(__m512i &x, const Slot *table, const uint8_t *&at, uint8_t *symbols) {
    __mmask16 all = 0xffff;
    asm("" : "+Yk"(all));  // GCC leaves the target as it is where it sees that all are loaded, and so makes every load wait for the last
    const __m512i place = _mm512_and_si512(x, _mm512_set1_epi32(SLOTS - 1));
    const __m512i slot = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), all, place, (const int *)table, 4);
    _mm_storeu_si128((__m128i *)symbols, _mm512_cvtepi32_epi8(slot));
    const __m512i frequency =
        _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(slot, 8), _mm512_set1_epi32(SLOTS - 1)), _mm512_set1_epi32(1));
    x = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(x, FREQUENCY_BITS)), _mm512_srli_epi32(slot, 20));
    const __mmask16 need = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32((int)LEAST_STATE));
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
    x = _mm512_mask_or_epi32(x, need, _mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(need, words));
    at += 2 * __builtin_popcount(need);
}

struct Lanes {
    __m512i a, b;
    explicit Lanes(const uint32_t *states) : a(_mm512_loadu_si512(states)), b(_mm512_loadu_si512(states + 16)) {}
    void store(uint32_t *states) const {
        _mm512_storeu_si512(states, a);
        _mm512_storeu_si512(states + 16, b);
    }
    void round(const Slot *table, const uint8_t *&at, uint8_t *symbols) {
        lanes16(a, table, at, symbols);
        lanes16(b, table, at, symbols + 16);
    }
};

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
    __m256i all = _mm256_set1_epi32(-1);
    asm("" : "+x"(all));  // GCC leaves the target as it is where it sees that all are loaded, and so makes every load wait for the last
    const __m256i place = _mm256_and_si256(x, _mm256_set1_epi32(SLOTS - 1));
    const __m256i slot = _mm256_mask_i32gather_epi32(_mm256_setzero_si256(), (const int *)table, place, all, 4);
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

struct Lanes {
    __m256i a, b, c, d;
    explicit Lanes(const uint32_t *states) : a(load(states)), b(load(states + 8)), c(load(states + 16)), d(load(states + 24)) {}
    static __m256i load(const uint32_t *states) { return _mm256_loadu_si256((const __m256i *)states); }
    void store(uint32_t *states) const {
        const __m256i all[] = {a, b, c, d};
        memcpy(states, all, STATES_BYTES);
    }
    void round(const Slot *table, const uint8_t *&at, uint8_t *symbols) {
        lanes8(a, table, at, symbols);
        lanes8(b, table, at, symbols + 8);
        lanes8(c, table, at, symbols + 16);
        lanes8(d, table, at, symbols + 24);
    }
};

#else

struct Lanes {
    uint32_t states[LANES];
    explicit Lanes(const uint32_t *from) { memcpy(states, from, STATES_BYTES); }
    void store(uint32_t *to) const { memcpy(to, states, STATES_BYTES); }
    void round(const Slot *table, const uint8_t *&at, uint8_t *symbols) {
        for (int l = 0; l < LANES; l++) {
            const uint32_t x = states[l];
            const Slot slot = table[x & (SLOTS - 1)];
            symbols[l] = (uint8_t)slot;
            const uint32_t next = (((slot >> 8) & (SLOTS - 1)) + 1) * (x >> FREQUENCY_BITS) + (slot >> 20);
            uint16_t word;
            memcpy(&word, at, 2);
            const uint32_t need = (next >> 16 ? 0u : ~0u);  // no branch: which lane needs a word cannot be foreseen
            states[l] = next << (need & 16) | (word & need);
            at += need & 2;
        }
    }
};

#endif

// Whole rounds of N streams, as many as can be made of all without looking at what is left of their words.
template <int N> void rounds(Stream *const *streams, const Slot *table) {
    static_assert(N == 1 || N == 2, "which are written out below");
    Stream &s = *streams[0], &t = *streams[N - 1];
    Lanes first(s.states), second(t.states);
    const uint8_t *at = s.at, *other = t.at;
    size_t done = 0, most = s.rounds < t.rounds ? s.rounds : t.rounds;
    for (; done < most && s.end - at >= (ptrdiff_t)ROUND_BYTES && (N == 1 || t.end - other >= (ptrdiff_t)ROUND_BYTES); done++) {
        first.round(table, at, s.symbols + done * LANES);
        if (N == 2) second.round(table, other, t.symbols + done * LANES);
    }
    for (int n = 0; n < N; n++) {
        Stream &to = *streams[n];
        (n ? second : first).store(to.states);
        to.at = n ? other : at;
        to.symbols += done * LANES;
        to.rounds -= done;
    }
}

}  // namespace

int decode_symbols(const CodedSymbols *coded, int blocks, const Slot *table) {
    Stream streams[2], *const two[] = {&streams[0], &streams[1]};
    for (int n = 0; n < blocks; n++) {
        if (coded[n].size < STATES_BYTES) return n;
        memcpy(streams[n].states, coded[n].coded, STATES_BYTES);
        streams[n].at = coded[n].coded + STATES_BYTES;
        streams[n].end = coded[n].coded + coded[n].size;
        streams[n].symbols = coded[n].symbols;
        streams[n].rounds = coded[n].count / LANES;
    }
    if (blocks == 2) rounds<2>(two, table);
    for (int n = 0; n < blocks; n++) {
        Stream &s = streams[n];
        rounds<1>(two + n, table);
        for (; s.rounds; s.rounds--)
            if (!step(s, LANES, table)) return n;
        if (!step(s, (int)(coded[n].count % LANES), table)) return n;
        uint32_t other = 0;
        for (int l = 0; l < LANES; l++) other |= s.states[l] ^ LEAST_STATE;
        if (s.at != s.end || other) return n;
    }
    return blocks;
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
