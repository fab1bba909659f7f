// One row of x in integer arithmetic, where the processor multiplies bytes and adds to 32 bits (AVX512-VNNI) and permutes them (VBMI).
//
// A chunk is what 64 bytes of codes hold. Its bytes are put in such an order (`separate`) that four neighbours belong to one group of
// 32 inputs; then every field of P bits is one instruction to take out and one to multiply by 64 bytes of x, which were brought into
// the order of that field once for all rows. So sixteen sums of 32 bits come from the fields of a chunk, each within one group.
//
// Activations in 8 bits are one byte. Those in floating point are three, digits of base 256 from -128 to 127: x / scale rounded to an
// integer below 2^23, its scale a power of two for every 32 inputs. That is a float's precision relative to the largest of 32 neighbours,
// and all that follows is exact: the sum over a chunk's fields of (code - zero point) * x is below 2^31, and is rounded once,
// to float32. A row of x that holds what is not finite, or is too small to have such a scale, is left to the other kernels.
//
// Rows of the weight are taken one after the other, so that memory is read as one stream; their scales and zero points become floats
// and integers a row at a time. Scales of 8 bits are looked up bytewise: four tables of 256 bytes for four bytes of a float.

#include "one_row.h"

#include <immintrin.h>

#include <cstring>

#include "macros.h"
#include "number.h"

namespace lowbit {
namespace LOWBIT_ISA {

typedef __m512i U;
typedef __m512 F;

constexpr int UNIT = 32;  // inputs that share a scale of x, at least
constexpr int AT_ONCE = ONE_ROW_TILE;
constexpr int AHEAD_SCALES = 1024, AHEAD_ZEROS = 512;  // bytes that are fetched ahead
constexpr int TABLES = 4 * 256;  // bytes of the table of scales, by byte

// Of a width: bits of the plane whose order x has, inputs of a chunk and fields of its bytes.
template <int BITS> struct Chunk {
    static constexpr int plane = BITS == 3 ? 2 : BITS, inputs = 512 / plane, fields = 8 / plane, units = inputs / UNIT;
    static constexpr int unit_of(int sum) { return sum / 4 * 16 / (8 * plane) * 2 + sum % 4 / 2; }  // to which a sum belongs
};

// A chunk of x: digits of its fields, the most significant first, and for each of the 16 sums the sum of x with its sign turned, and the scale.
template <int BITS, int DIGITS> struct Piece {
    int8_t codes[Chunk<BITS>::fields][DIGITS][64];
    int32_t sums[16];
    float scales[16];
};

// All that is prepared: tables of scales, of levels, then pieces.
struct Head {
    uint8_t scales[TABLES];
    uint8_t levels[64];
};

INLINE int64_t groups_of(const lowbit_weight *w) { return w->group ? (w->inputs + w->group - 1) / w->group : 1; }
INLINE int64_t chunks_of(const lowbit_weight *w, int inputs) { return (w->inputs + inputs - 1) / inputs; }
INLINE int64_t padded(int64_t groups) { return (groups + 63) / 64 * 64 + 64; }
INLINE __mmask16 first16(int64_t n) { return (__mmask16)(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1); }
INLINE __mmask64 first64(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

// Bytes of a vector such that of 16 neighbours the even ones come first.
INLINE U separate(U a) {
    return _mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(_mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0)));
}

INLINE U dot(U sums, U codes, U x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));  // compilers copy sums about
    return sums;
}

// ---------------------------------------------------------------- x

INLINE F load_x(const void *x, int64_t k, int64_t K, int dtype) {
    const __mmask16 inside = first16(K - k);
    if (dtype == LOWBIT_F32) return _mm512_maskz_loadu_ps(inside, (const float *)x + k);
    const __m256i halves = _mm256_maskz_loadu_epi16(inside, (const uint16_t *)x + k);
    return dtype == LOWBIT_F16 ? _mm512_cvtph_ps(halves) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE void narrow(int8_t *to, U a) { _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(a)); }

// `units` units of x from input k on, to bytes in their order (digits, 64 * ..) and a scale a unit. As in int8.cpp.
static bool quantize(const void *x, int64_t k, int64_t K, int dtype, int64_t count, int8_t *codes, float *scale) {
    U most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16)
        most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(load_x(x, k + i, K, dtype))));
    const uint32_t bits = _mm512_reduce_max_epu32(most);  // in this order whatever is not finite is largest
    *scale = bits < 0x7F800000 ? as_float(bits) / 127.0f : as_float(0x7FC00000);
    float inverse = 1.0f / *scale;
    const bool any = inverse < as_float(0x7F800000) && inverse != 0;
    for (int64_t i = 0; i < count; i += 16)
        narrow(codes + i, any ? _mm512_cvtps_epi32(_mm512_mul_ps(load_x(x, k + i, K, dtype), _mm512_set1_ps(inverse))) : _mm512_setzero_si512());
    return true;
}

// A unit of x in three digits, `apart` bytes from one to the next.
static bool quantize_finely(const void *x, int64_t k, int64_t K, int dtype, int8_t *codes, int64_t apart, float *scale) {
    const F values[2] = {load_x(x, k, K, dtype), load_x(x, k + 16, K, dtype)};
    const uint32_t bits = _mm512_reduce_max_epu32(
        _mm512_max_epu32(_mm512_castps_si512(_mm512_abs_ps(values[0])), _mm512_castps_si512(_mm512_abs_ps(values[1]))));
    const uint32_t exponent = bits ? (bits + 0x20000) >> 23 : 127;  // of what is at least 1.016 times the largest: the digits' range ends there
    if (bits >= 0x7F800000 || exponent < 27) return false;
    *scale = as_float((exponent - 22) << 23);
    for (int i = 0; i < 2; i++) {
        U v = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], _mm512_set1_ps(as_float((276 - exponent) << 23))));
        for (int digit = 2; digit >= 0; digit--) {
            narrow(codes + digit * apart + 16 * i, v);
            v = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        }
    }
    return true;
}

template <int BITS, int DIGITS>
static bool prepare_pieces(const lowbit_weight *w, const void *x, int dtype, int factor, float step, Piece<BITS, DIGITS> *to) {
    typedef Chunk<BITS> C;
    const int64_t K = w->inputs, chunks = chunks_of(w, C::inputs);
    const int64_t group = w->group && w->group < 128 ? w->group : 128;
    alignas(64) int8_t natural[DIGITS][C::inputs < 128 ? 128 : C::inputs];
    float scales[sizeof natural[0] / UNIT];
    const U one = _mm512_set1_epi8(1);
    for (int64_t c = 0; c < chunks; c++, to++) {
        const int64_t k = c * C::inputs;
        if (DIGITS == 3) {
            for (int u = 0; u < C::units; u++)
                if (!quantize_finely(x, k + UNIT * u, K, dtype, natural[0] + UNIT * u, sizeof natural[0], scales + u)) return false;
        } else if (k % group == 0) {
            for (int64_t u = 0; u < (C::inputs < group ? group : C::inputs); u += group) {
                quantize(x, k + u, K, dtype, group, natural[0] + u, scales + u / UNIT);
                for (int64_t i = 1; i < group / UNIT; i++) scales[u / UNIT + i] = scales[u / UNIT];
            }
        }
        const int64_t from = DIGITS == 3 ? 0 : k % (C::inputs < group ? group : C::inputs);  // a chunk may be less than a group of x
        U sums[DIGITS];
        for (int d = 0; d < DIGITS; d++) {
            const int8_t *const plain = natural[d] + from;
            sums[d] = _mm512_setzero_si512();
            for (int f = 0; f < C::fields; f++) {
                int8_t *const codes = to->codes[f][d];
                for (int q = 0; q < 8; q++) {  // eight bytes: of one half of a block neighbours
                    const int place = q / 2 * 16, block = place / (8 * C::plane), in = place % (8 * C::plane) / 2;
                    memcpy(codes + 8 * q, plain + 64 * block + 32 * (q % 2) + 4 * C::plane * f + in, 8);
                }
                sums[d] = _mm512_dpbusd_epi32(sums[d], one, _mm512_loadu_si512(codes));
            }
        }
        U sum = sums[0];
        for (int d = 1; d < DIGITS; d++) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), sums[d]);
        sum = _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), _mm512_set1_epi32(factor));
        _mm512_storeu_si512(to->sums, sum);
        for (int i = 0; i < 16; i++) to->scales[i] = scales[from / UNIT + C::unit_of(i)] * step;
    }
    return true;
}

// ---------------------------------------------------------------- scales and zero points of a row

// Scales of 8 bits, four bytes each from a table of its own, in the order 0 .. 15, 16 .. 31 and so on.
INLINE void look_up(U (&found)[4], const Head &head, U q) {
    q = _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), q);
    const __mmask64 high = _mm512_movepi8_mask(q);
    U bytes[4];
    UNROLL
    for (int p = 0; p < 4; p++) {
        const uint8_t *const table = head.scales + 256 * p;
        const U low = _mm512_permutex2var_epi8(_mm512_load_si512(table), q, _mm512_load_si512(table + 64));
        bytes[p] = _mm512_mask_blend_epi8(high, low, _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), q, _mm512_load_si512(table + 192)));
    }
    const U a = _mm512_unpacklo_epi8(bytes[0], bytes[1]), b = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    const U c = _mm512_unpacklo_epi8(bytes[2], bytes[3]), d = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    found[0] = _mm512_unpacklo_epi16(a, c);
    found[1] = _mm512_unpackhi_epi16(a, c);
    found[2] = _mm512_unpacklo_epi16(b, d);
    found[3] = _mm512_unpackhi_epi16(b, d);
}

// Scales of a row that are floats of any kind, or all 1; as read_scales.
static void read_wide_scales(const lowbit_weight *w, int64_t row, int64_t groups, float *to) {
    for (int64_t g = 0; g < groups; g += 16) {
        const __mmask16 inside = first16(groups - g);
        F found = _mm512_set1_ps(1.0f);
        if (w->scale != LOWBIT_SCALE_NONE) {
            const int dtype = w->scale == LOWBIT_SCALE_F32 ? LOWBIT_F32 : w->scale == LOWBIT_SCALE_F16 ? LOWBIT_F16 : LOWBIT_BF16;
            found = load_x((const char *)w->scales + row * groups * (dtype == LOWBIT_F32 ? 4 : 2), g, groups, dtype);
        }
        _mm512_mask_storeu_ps(to + g, inside, found);
    }
}

// Scales of a row to floats; `to` has room for padded(groups), those behind the row's stay what they are.
INLINE void read_scales(const lowbit_weight *w, const Head &head, int64_t row, int64_t groups, float *to) {
    if (w->scale != LOWBIT_SCALE_BYTE) return read_wide_scales(w, row, groups, to);
    const uint8_t *const from = (const uint8_t *)w->scales + row * groups;
    int64_t g = 0;
    U found[4];
    for (; g + 64 <= groups; g += 64) {
        _mm_prefetch((const char *)from + g + AHEAD_SCALES, _MM_HINT_T0);
        look_up(found, head, _mm512_loadu_si512(from + g));
        UNROLL
        for (int i = 0; i < 4; i++) _mm512_storeu_si512(to + g + 16 * i, found[i]);
    }
    if (g == groups) return;
    _mm_prefetch((const char *)from + g + AHEAD_SCALES, _MM_HINT_T0);
    look_up(found, head, _mm512_maskz_loadu_epi8(first64(groups - g), from + g));
    for (int i = 0; g < groups; g += 16, i++) _mm512_mask_storeu_epi32(to + g, first16(groups - g), found[i]);
}

// Of 64 numbers of BITS bits in a stream: the bytes that hold each eight, and how far up each of these is.
template <int BITS> struct Places {
    uint8_t byte[64], shift[64];
    constexpr Places() : byte(), shift() {
        for (int i = 0; i < 64; i++) {
            byte[i] = (uint8_t)((i / 8 * BITS + i % 8) & 63);
            shift[i] = (uint8_t)(i % 8 * BITS);
        }
    }
};

// Zero points of a row, a stream of bits, to bytes; `to` has room for whole vectors.
template <int BITS> INLINE void read_zeros(const lowbit_weight *w, int64_t row, int64_t groups, uint8_t *to) {
    const int64_t size = (groups * BITS + 7) / 8;
    const uint8_t *const from = (const uint8_t *)w->zeros + row * size;
    alignas(64) static constexpr Places<BITS> places;
    const U bytes = _mm512_load_si512(places.byte), shifts = _mm512_load_si512(places.shift), most = _mm512_set1_epi8((char)((1 << BITS) - 1));
    const auto unpack = [&](int64_t at, __mmask64 inside) __attribute__((always_inline)) {
        const U stream = _mm512_maskz_loadu_epi8(inside, from + at);
        _mm512_storeu_si512(to + at / BITS * 8, _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(bytes, stream)), most));
    };
    int64_t at = 0;
    for (; at + 8 * BITS <= size; at += 8 * BITS) unpack(at, BITS == 8 ? ~0ull : (1ull << (8 * BITS % 64)) - 1);
    if (at < size) unpack(at, first64(size - at));
    for (int64_t i = 0; i < size; i += 64) _mm_prefetch((const char *)from + i + AHEAD_ZEROS, _MM_HINT_T0);
}

// ---------------------------------------------------------------- rows of the weight

// Codes of a chunk, as loaded.
template <int BITS> struct Words {
    U word, more;
};

struct Twice {  // of 16 bytes for a block: the bytes of its first half twice, then those of the second
    uint8_t byte[64];
    constexpr Twice() : byte() {
        for (int i = 0; i < 64; i++) byte[i] = (uint8_t)(i / 16 * 8 + i % 4 * 2 + i % 16 / 8);
    }
};

template <int BITS> INLINE Words<BITS> load_words(const uint8_t *row, int64_t blocks, int64_t c, int64_t left) {
    Words<BITS> words;
    const uint8_t *const from = row + 64 * c;
    words.word = separate(left < 0 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(first64(left), from));
    if (BITS == 3) {
        const uint8_t *const ones = row + 16 * blocks + 32 * c;
        const __m256i bits = left < 0 ? _mm256_loadu_si256((const __m256i *)ones) : _mm256_maskz_loadu_epi8((__mmask32)first64(left / 2), ones);
        alignas(64) static constexpr Twice order;
        const U twice = _mm512_permutexvar_epi8(_mm512_load_si512(order.byte), _mm512_castsi256_si512(bits));
        words.more = _mm512_srlv_epi32(twice, _mm512_set1_epi64(1ll << 32));
    }
    return words;
}

// Field FIELD of each byte, as a number.
template <int BITS, int FIELD> INLINE U code(const Words<BITS> &words) {
    if constexpr (BITS == 8) {
        return words.word;
    } else if constexpr (BITS == 3) {
        constexpr int ODD = FIELD & 1;
        const U high = ODD ? _mm512_srli_epi16(words.word, 1) : _mm512_slli_epi16(words.word, 1);
        const U low = ODD ? _mm512_srli_epi16(words.more, 2) : words.more;
        const U both = _mm512_ternarylogic_epi32(high, low, _mm512_set1_epi8(0x66), 0xE4);
        return _mm512_and_si512(FIELD & 2 ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(7));
    } else {
        return _mm512_and_si512(FIELD ? _mm512_srli_epi16(words.word, BITS * FIELD) : words.word, _mm512_set1_epi8((1 << BITS) - 1));
    }
}

// Rows of the weight that share a load of x.
template <int BITS> struct Rows {
    const uint8_t *codes[AT_ONCE];
    const float *scales[AT_ONCE];
    const uint8_t *zeros[AT_ONCE];
    F total[AT_ONCE];
};

template <int BITS, int DIGITS, bool TABLE, int FIELD>
INLINE void add_field(U (&sums)[AT_ONCE][DIGITS], const Words<BITS> (&words)[AT_ONCE], const Piece<BITS, DIGITS> &x, U levels) {
    if constexpr (FIELD < Chunk<BITS>::fields) {
        U c[AT_ONCE];
        UNROLL
        for (int r = 0; r < AT_ONCE; r++) {
            c[r] = code<BITS, FIELD>(words[r]);
            if (TABLE) c[r] = _mm512_shuffle_epi8(levels, c[r]);
        }
        UNROLL
        for (int d = 0; d < DIGITS; d++) {
            const U digits = _mm512_load_si512(x.codes[FIELD][d]);
            UNROLL
            for (int r = 0; r < AT_ONCE; r++) sums[r][d] = dot(sums[r][d], c[r], digits);
        }
        add_field<BITS, DIGITS, TABLE, FIELD + 1>(sums, words, x, levels);
    }
}

// The scales and zero points of a chunk, one a unit at most. No more is loaded, since what was stored just before in two pieces would have
// to reach memory first.
template <int BITS> INLINE F load_scales(const float *p) {
    if (Chunk<BITS>::units == 8) return _mm512_castps256_ps512(_mm256_loadu_ps(p));
    if (Chunk<BITS>::units == 4) return _mm512_castps128_ps512(_mm_loadu_ps(p));
    return _mm512_castps128_ps512(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)p)));
}

template <int BITS> INLINE U load_zeros(const uint8_t *p) {
    if (Chunk<BITS>::units == 8) return _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)p));
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_castsi128_si512(_mm_cvtsi32_si128(four));
}

// Chunk c, its products added to the totals; g: the first group of it. `left`: bytes of its first plane, if it is the last one.
template <int BITS, int DIGITS, bool FIXED, bool TABLE>
INLINE void add_chunk(Rows<BITS> &rows, const Piece<BITS, DIGITS> &x, int64_t blocks, int64_t c, int64_t left, int64_t g, U order, U levels) {
    Words<BITS> words[AT_ONCE];
    U sums[AT_ONCE][DIGITS];
    const U shared = _mm512_load_si512(x.sums);
    UNROLL
    for (int r = 0; r < AT_ONCE; r++) {
        words[r] = load_words<BITS>(rows.codes[r], blocks, c, left);
        UNROLL
        for (int d = 0; d + 1 < DIGITS; d++) sums[r][d] = _mm512_setzero_si512();
        sums[r][DIGITS - 1] = FIXED ? shared : _mm512_mullo_epi32(shared, _mm512_maskz_permutexvar_epi8(0x1111111111111111, order, load_zeros<BITS>(rows.zeros[r] + g)));
    }
    add_field<BITS, DIGITS, TABLE, 0>(sums, words, x, levels);
    const F scale = _mm512_load_ps(x.scales);
    UNROLL
    for (int r = 0; r < AT_ONCE; r++) {
        U sum = sums[r][0];
        UNROLL
        for (int d = 1; d < DIGITS; d++) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), sums[r][d]);
        const F worth = _mm512_mul_ps(_mm512_permutexvar_ps(order, load_scales<BITS>(rows.scales[r] + g)), scale);
        rows.total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), worth, rows.total[r]);
    }
}

INLINE void fetch(const uint8_t *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + i, _MM_HINT_T0);
}

template <int BITS, int DIGITS, bool FIXED, bool TABLE>
static void product(const lowbit_weight *w, const uint8_t *prepared, const void *bias, void *out, int dtype, int64_t first, int64_t last,
                    float *scratch) {
    typedef Chunk<BITS> C;
    const Head &head = *(const Head *)prepared;
    const Piece<BITS, DIGITS> *const x = (const Piece<BITS, DIGITS> *)(prepared + sizeof(Head));
    const int64_t groups = groups_of(w), blocks = (w->inputs + 63) / 64, width = 8 * BITS * blocks;
    const int64_t chunks = chunks_of(w, C::inputs), whole = blocks * 64 / C::inputs, own = padded(groups);
    const int shift = w->group ? __builtin_ctzll((uint64_t)w->group / UNIT) : 62;  // from a unit to its group
    fetch((const uint8_t *)w->codes + first * width, AT_ONCE * width);
    memset(scratch, 0, sizeof(float) * 2 * AT_ONCE * (size_t)own);
    alignas(64) int32_t places[16];
    for (int i = 0; i < 16; i++) places[i] = C::unit_of(i) >> shift;
    const U order = _mm512_load_si512(places), levels = _mm512_load_si512(head.levels);
    for (int64_t row = first; row < last; row += AT_ONCE) {
        Rows<BITS> rows;
        UNROLL
        for (int r = 0; r < AT_ONCE; r++) {
            const int64_t here = row + r < last ? row + r : last - 1;  // a last row may be computed twice
            float *const scales = scratch + 2 * r * own;
            uint8_t *const zeros = (uint8_t *)(scales + own);
            read_scales(w, head, here, groups, scales);
            if constexpr (!FIXED) read_zeros<BITS>(w, here, groups, zeros);
            rows.codes[r] = (const uint8_t *)w->codes + here * width;
            rows.scales[r] = scales;
            rows.zeros[r] = zeros;
            rows.total[r] = _mm512_setzero_ps();
        }
        // The next rows lie in one piece, and are fetched bit by bit: a processor does not see several rows as one stream.
        const uint8_t *next = rows.codes[0] + AT_ONCE * width;
        for (int64_t c = 0; c < whole; c++) {
            UNROLL
            for (int i = 0; i < AT_ONCE * BITS / C::plane; i++, next += 64) _mm_prefetch((const char *)next, _MM_HINT_T0);
            add_chunk<BITS, DIGITS, FIXED, TABLE>(rows, x[c], blocks, c, -1, (c * C::units) >> shift, order, levels);
        }
        if (whole < chunks)
            add_chunk<BITS, DIGITS, FIXED, TABLE>(rows, x[whole], blocks, whole, 8 * C::plane * blocks - 64 * whole, (whole * C::units) >> shift, order,
                                                  levels);
        for (int r = 0; r < AT_ONCE && row + r < last; r++)
            write(out, row + r, dtype, _mm512_reduce_add_ps(rows.total[r]) + (bias ? read(bias, row + r, dtype) : 0.0f));
    }
}

// ---------------------------------------------------------------- the entries

static bool here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

static bool serves(const lowbit_weight *w, int digits) {
    if (w->group && w->group < UNIT) return false;
    if (w->table) return digits == 1 && w->bits == 4 && w->table == LOWBIT_TABLE_SHARED;
    if (w->bits != 2 && w->bits != 3 && w->bits != 4 && (w->bits != 8 || digits != 1)) return false;
    if (w->zero == LOWBIT_ZERO_FIXED) return w->fixed_zero == (float)(int)w->fixed_zero;
    return w->zero == LOWBIT_ZERO_STREAM;
}

#define FOR_WIDTH(DIGITS)                                                       \
    switch (w->bits) {                                                          \
        case 2: CALL(2, DIGITS)                                                 \
        case 3: CALL(3, DIGITS)                                                 \
        case 4: CALL(4, DIGITS)                                                 \
        default: CALL(8, 1)                                                     \
    }
#define FOR_DIGITS                                                              \
    if (digits == 3) {                                                          \
        FOR_WIDTH(3)                                                            \
    } else {                                                                    \
        FOR_WIDTH(1)                                                            \
    }

static int64_t prepared_bytes(const lowbit_weight *w, int digits) {
#define CALL(BITS, DIGITS) return (int64_t)sizeof(Head) + chunks_of(w, Chunk<BITS>::inputs) * (int64_t)sizeof(Piece<BITS, DIGITS>);
    FOR_DIGITS
#undef CALL
}

static int64_t scratch_floats(const lowbit_weight *w) { return 2 * AT_ONCE * padded(groups_of(w)); }

static bool prepare(const lowbit_weight *w, const uint8_t *levels, const float *steps, const void *x, int dtype, int digits, uint8_t *to) {
    Head &head = *(Head *)to;
    for (int q = 0; q < 256 && w->scale == LOWBIT_SCALE_BYTE; q += 16)
        for (int p = 0; p < 4; p++) narrow((int8_t *)head.scales + 256 * p + q, _mm512_srli_epi32(_mm512_loadu_si512(w->scale_table + q), 8 * p));
    for (int i = 0; i < 64; i++) head.levels[i] = w->table ? levels[i % 16] : 0;
    const int factor = w->table ? 128 : w->zero == LOWBIT_ZERO_FIXED ? (int)w->fixed_zero : 1;
    const float step = w->table ? steps[0] : 1.0f;
#define CALL(BITS, DIGITS) return prepare_pieces<BITS, DIGITS>(w, x, dtype, factor, step, (Piece<BITS, DIGITS> *)(to + sizeof(Head)));
    FOR_DIGITS
#undef CALL
}

static void linear(const lowbit_weight *w, int digits, const uint8_t *prepared, const void *bias, void *out, int dtype, int64_t first,
                   int64_t last, float *scratch) {
    if (w->table) return product<4, 1, true, true>(w, prepared, bias, out, dtype, first, last, scratch);
#define CALL(BITS, DIGITS)                                                                                              \
    return (w->zero == LOWBIT_ZERO_FIXED ? product<BITS, DIGITS, true, false> : product<BITS, DIGITS, false, false>)(   \
        w, prepared, bias, out, dtype, first, last, scratch);
    FOR_DIGITS
#undef CALL
}

static const OneRowKernels KERNELS = {here, serves, prepared_bytes, scratch_floats, prepare, linear};

}  // namespace LOWBIT_ISA

const OneRowKernels &one_row_avx512vbmi() { return LOWBIT_ISA::KERNELS; }

}  // namespace lowbit
