// Half-precision numbers, in integers: no instruction set needed, and round to nearest even as torch does.
#pragma once

#include <cstdint>
#include <cstring>

#include "lowbit_cpu.h"

namespace lowbit {
namespace LOWBIT_ISA {

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float from_bf16(uint16_t a) { return as_float((uint32_t)a << 16); }

static inline uint16_t to_bf16(float value) {
    uint32_t bits = as_bits(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 64);  // a quiet NaN
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline float from_f16(uint16_t a) {
    // The exponent is moved by a multiplication, which is exact and handles subnormal numbers.
    uint32_t sign = (uint32_t)(a & 0x8000) << 16, rest = (uint32_t)(a & 0x7FFF) << 13;
    if (rest >= 0x0F800000) return as_float(sign | rest | 0x7F800000);  // infinity or NaN
    return as_float(sign | as_bits(as_float(rest) * as_float(0x77800000)));  // 2^112
}

static inline uint16_t to_f16(float value) {
    uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (bits >> 13 & 0x1FF));
    if (bits >= 0x477FF000) return (uint16_t)(sign | 0x7C00);  // 65520 and above
    if (bits < 0x38800000) {  // subnormal: adding 0.5 leaves the result in the low bits, rounded
        return (uint16_t)(sign | (as_bits(as_float(bits) + 0.5f) - 0x3F000000));
    }
    return (uint16_t)(sign | ((bits + 0xFFF + (bits >> 13 & 1) - 0x38000000) >> 13));
}

static inline float read(const void *p, int64_t i, int dtype) {
    if (dtype == LOWBIT_F32) return ((const float *)p)[i];
    uint16_t half = ((const uint16_t *)p)[i];
    return dtype == LOWBIT_F16 ? from_f16(half) : from_bf16(half);
}

static inline void write(void *p, int64_t i, int dtype, float value) {
    if (dtype == LOWBIT_F32)
        ((float *)p)[i] = value;
    else
        ((uint16_t *)p)[i] = dtype == LOWBIT_F16 ? to_f16(value) : to_bf16(value);
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
