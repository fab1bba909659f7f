// Packing codes to lanes and back; compiled once for each instruction set (LOWBIT_ISA names the copy).

#include <cstring>

#include "kernels.h"

namespace lowbit {
namespace LOWBIT_ISA {

template <int P> static inline void pack_plane(const uint8_t *codes, uint16_t *lanes, int low) {
    for (int l = 0; l < 4 * P; l++) {
        uint32_t lane = 0;
        for (int j = 0; j < 16 / P; j++) lane |= (uint32_t)(codes[4 * P * j + l] >> low & ((1 << P) - 1)) << (P * j);
        lanes[l] = (uint16_t)lane;
    }
}

template <int P> static inline void unpack_plane(uint8_t *codes, const uint16_t *lanes, int low) {
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

void pack(const uint8_t *codes, uint16_t *lanes, int64_t inputs, int bits, int64_t first, int64_t last) {
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

void unpack(const uint16_t *lanes, uint8_t *codes, int64_t inputs, int bits, int64_t first, int64_t last) {
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

}  // namespace LOWBIT_ISA
}  // namespace lowbit
