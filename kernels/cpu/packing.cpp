// Packing codes to lanes and back; compiled once for each instruction set (LOWBIT_ISA names the copy).
//
// A lane of 16 bits is two bytes, and each byte takes its fields from as many runs of consecutive codes: so a plane of a block is
// shifts and ORs of whole vectors of bytes, with no code looked at alone. Vectors are the compiler's own of 16 bytes, which every
// processor of today has; reading a byte a code, these loops are limited by memory and gain nothing from longer ones.

#include <cstring>

#include "kernels.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t Half __attribute__((vector_size(8)));
typedef uint16_t Words __attribute__((vector_size(16)));  // eight lanes
typedef uint64_t Longs __attribute__((vector_size(16)));

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low byte of a lane comes first");

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Bytes{__VA_ARGS__})
#endif
inline Bytes even(Bytes a, Bytes b) { return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }
inline Bytes odd(Bytes a, Bytes b) { return PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
inline Bytes zip_first(Bytes a, Bytes b) { return PICK(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
inline Bytes zip_last(Bytes a, Bytes b) { return PICK(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
inline Bytes zip_halves(Bytes a) { return PICK(a, a, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15); }
#undef PICK

// Shifts of whole words: what crosses from byte to byte is masked away, or is zero.
inline Bytes down(Bytes a, int n) { return (Bytes)((Words)a >> (uint16_t)n); }
inline Bytes up(Bytes a, int n) { return (Bytes)((Words)a << (uint16_t)n); }
inline Bytes load(const void *p) {
    Bytes a;
    memcpy(&a, p, 16);
    return a;
}
inline void store(void *p, Bytes a) { memcpy(p, &a, 16); }

// Bits LOW to LOW + P - 1 of the codes of a block, v[0] to v[3], to 4 * P lanes.
template <int P, int LOW> inline void pack_plane(const Bytes (&v)[4], uint16_t *lanes) {
    Bytes field[4];
    for (int i = 0; i < 4; i++) field[i] = down(v[i], LOW) & (uint8_t)((1 << P) - 1);
    if constexpr (P == 8) {
        for (int i = 0; i < 2; i++) {
            store(lanes + 16 * i, zip_first(field[i], field[2 + i]));
            store(lanes + 16 * i + 8, zip_last(field[i], field[2 + i]));
        }
    } else {
        const Bytes low = field[0] | up(field[1], 4), high = field[2] | up(field[3], 4);
        if constexpr (P == 4) {
            store(lanes, zip_first(low, high));
            store(lanes + 8, zip_last(low, high));
        } else {  // two halves of fields, then two quarters, go beside each other
            const Longs a = (Longs)low, b = (Longs)high;
            Longs two = Longs{a[0], b[0]} | Longs{a[1], b[1]} << 2;
            if constexpr (P == 1) two |= two >> 31;
            const Bytes joined = zip_halves((Bytes)two);
            memcpy(lanes, &joined, 8 * P);
        }
    }
}

template <int P, int LOW> inline void unpack_plane(Bytes (&v)[4], const uint16_t *lanes) {
    Bytes field[4];
    if constexpr (P == 8) {
        for (int i = 0; i < 2; i++) {
            const Bytes a = load(lanes + 16 * i), b = load(lanes + 16 * i + 8);
            field[i] = even(a, b);
            field[2 + i] = odd(a, b);
        }
    } else {
        Bytes a, b;  // lanes, the later ones shifted down where there are too few of them
        if constexpr (P == 1) {
            uint64_t four;
            memcpy(&four, lanes, 8);
            a = (Bytes)Longs{four, four >> 1};
            b = (Bytes)Longs{four >> 2, four >> 3};
        } else {
            a = load(lanes);
            b = P == 2 ? down(a, 2) : load(lanes + 2 * P);
        }
        const Bytes both[2] = {even(a, b), odd(a, b)};
        for (int i = 0; i < 4; i++) field[i] = down(both[i / 2], i % 2 * 4) & (uint8_t)((1 << P) - 1);
    }
    for (int i = 0; i < 4; i++) v[i] |= up(field[i], LOW);
}

// Planes of a code of BITS, the most significant first: the first has FIRST bits.
constexpr int first_plane(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

template <int BITS> inline void pack_block(const Bytes (&v)[4], uint16_t *row, int64_t blocks, int64_t b) {
    constexpr int P = first_plane(BITS);
    pack_plane<P, BITS - P>(v, row + 4 * P * b);
    if constexpr (BITS > P) pack_block<BITS - P>(v, row + 4 * P * blocks, blocks, b);
}

template <int BITS> inline void unpack_block(Bytes (&v)[4], const uint16_t *row, int64_t blocks, int64_t b) {
    constexpr int P = first_plane(BITS);
    unpack_plane<P, BITS - P>(v, row + 4 * P * b);
    if constexpr (BITS > P) unpack_block<BITS - P>(v, row + 4 * P * blocks, blocks, b);
}

template <int BITS> void pack_row(const uint8_t *codes, uint16_t *lanes, int64_t inputs) {
    const int64_t blocks = (inputs + 63) / 64;
    for (int64_t b = 0; b < blocks; b++) {
        Bytes v[4] = {};
        if (inputs - 64 * b >= 64)
            memcpy(v, codes + 64 * b, 64);
        else
            memcpy(v, codes + 64 * b, (size_t)(inputs - 64 * b));
        pack_block<BITS>(v, lanes, blocks, b);
    }
}

template <int BITS> void unpack_row(const uint16_t *lanes, uint8_t *codes, int64_t inputs) {
    const int64_t blocks = (inputs + 63) / 64;
    for (int64_t b = 0; b < blocks; b++) {
        Bytes v[4] = {};
        unpack_block<BITS>(v, lanes, blocks, b);
        if (inputs - 64 * b >= 64)
            memcpy(codes + 64 * b, v, 64);
        else
            memcpy(codes + 64 * b, v, (size_t)(inputs - 64 * b));
    }
}

// Eight lanes of ten digits at a time. The last eight overlap those before them; rows of fewer than eight lanes are copied.
template <class Use> inline void by_eight(int64_t lanes, Use use) {
    int64_t l = 0;
    for (; l + 8 <= lanes; l += 8) use(l);
    if (l < lanes) use(lanes > 8 ? lanes - 8 : 0);
}

void pack_ternary_row(const uint8_t *codes, uint16_t *lanes, int64_t inputs) {
    const int64_t count = (inputs + 9) / 10;
    by_eight(count, [&](int64_t l) {
        Words number = {};
        for (int64_t j = 0, k = l; j < 10; j++, k += count) {
            Half digit = {};
            if (k + 8 <= inputs)
                memcpy(&digit, codes + k, 8);
            else if (k < inputs)
                memcpy(&digit, codes + k, (size_t)(inputs - k));
            number = number * 3 + __builtin_convertvector(digit, Words);
        }
        uint16_t value[8];
        for (int i = 0; i < 8; i++) value[i] = (uint16_t)(((uint64_t)number[i] * 65536 + 59048) / 59049);
        memcpy(lanes + l, value, count < 8 ? 2 * (size_t)count : 16);
    });
}

void unpack_ternary_row(const uint16_t *lanes, uint8_t *codes, int64_t inputs) {
    const int64_t count = (inputs + 9) / 10, width = count < 8 ? count : 8;
    by_eight(count, [&](int64_t l) {
        Words rest = {};
        memcpy(&rest, lanes + l, 2 * (size_t)width);
        for (int64_t k = l; k < inputs; k += count) {
            // The integer part of 3 * rest / 2^16: how many of the two thresholds it reaches (a comparison gives -1 or 0).
            const Words part = (Words)-((rest >= 21846) + (rest >= 43691));
            const Bytes digit = even((Bytes)part, (Bytes)part);
            if (inputs - k >= 8 && width == 8)
                memcpy(codes + k, &digit, 8);
            else
                memcpy(codes + k, &digit, (size_t)(inputs - k < width ? inputs - k : width));
            rest = rest * 3;
        }
    });
}

#define FOR_BITS(CALL)                                        \
    switch (bits) {                                           \
        case 0: return CALL(CALL##_ternary_row);              \
        case 1: return CALL(CALL##_row<1>);                   \
        case 2: return CALL(CALL##_row<2>);                   \
        case 3: return CALL(CALL##_row<3>);                   \
        case 4: return CALL(CALL##_row<4>);                   \
        case 5: return CALL(CALL##_row<5>);                   \
        case 6: return CALL(CALL##_row<6>);                   \
        case 7: return CALL(CALL##_row<7>);                   \
        default: return CALL(CALL##_row<8>);                  \
    }

}  // namespace

void pack(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last) {
    const int64_t width = row_lanes(inputs, bits);
    const auto pack = [&](void (*row)(const uint8_t *, uint16_t *, int64_t)) {
        for (int64_t r = first; r < last; r++) row(codes + r * inputs, lanes + r * width, inputs);
    };
    FOR_BITS(pack)
}

void pack_pairs(const uint8_t *pairs, uint16_t *lanes, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) {
        const Bytes first = load(pairs + 32 * b), second = load(pairs + 32 * b + 16);
        const Bytes v[4] = {first & 7, second & 7, down(first, 3) & 7, down(second, 3) & 7};
        pack_block<3>(v, lanes, blocks, b);
    }
}

void unpack(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last) {
    const int64_t width = row_lanes(inputs, bits);
    const auto unpack = [&](void (*row)(const uint16_t *, uint8_t *, int64_t)) {
        for (int64_t r = first; r < last; r++) row(lanes + r * width, codes + r * inputs, inputs);
    };
    FOR_BITS(unpack)
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
