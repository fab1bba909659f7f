// Sixteen floats, and sixteen 32-bit numbers, on AArch64: four registers each. Included by simd.h, in its namespace.

struct F { float32x4_t v[4]; };
struct U { uint32x4_t v[4]; };
#define FOUR(type, expression) { type r; for (int i = 0; i < 4; i++) r.v[i] = expression; return r; }
INLINE F zero() FOUR(F, vdupq_n_f32(0))
INLINE F set1(float a) FOUR(F, vdupq_n_f32(a))
INLINE F load(const float *p) FOUR(F, vld1q_f32(p + 4 * i))
INLINE void store(float *p, F a) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]); }
INLINE void store_first(float *p, F a, int n) { float t[16]; store(t, a); memcpy(p, t, 4 * (size_t)n); }
INLINE F add(F a, F b) FOUR(F, vaddq_f32(a.v[i], b.v[i]))
INLINE F sub(F a, F b) FOUR(F, vsubq_f32(a.v[i], b.v[i]))
INLINE F mul(F a, F b) FOUR(F, vmulq_f32(a.v[i], b.v[i]))
INLINE F fma(F a, F b, F c) FOUR(F, vfmaq_f32(c.v[i], a.v[i], b.v[i]))
INLINE float sum(F a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
INLINE F lookup(F table, U index) {  // bytes 4 * index to 4 * index + 3 of the table's 64
    uint8x16x4_t bytes;
    for (int i = 0; i < 4; i++) bytes.val[i] = vreinterpretq_u8_f32(table.v[i]);
    FOUR(F, vreinterpretq_f32_u8(vqtbl4q_u8(
                bytes, vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), vandq_u32(index.v[i], vdupq_n_u32(15)),
                                                      vdupq_n_u32(0x04040404))))))
}
INLINE F gather(const float *table, U index) {
    uint32_t at[16];
    float found[16];
    for (int i = 0; i < 4; i++) vst1q_u32(at + 4 * i, index.v[i]);
    for (int i = 0; i < 16; i++) found[i] = table[at[i]];
    return load(found);
}
INLINE F to_float(U a) FOUR(F, vcvtq_f32_s32(vreinterpretq_s32_u32(a.v[i])))
INLINE F from_halves(const uint16_t *p) FOUR(F, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))))
INLINE F from_bhalves(const uint16_t *p) FOUR(F, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)))
INLINE void to_halves(uint16_t *p, F a) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
INLINE void to_bhalves(uint16_t *p, F a) {
    for (int i = 0; i < 4; i++) {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(64 << 16));  // of a NaN
        vst1_u16(p + 4 * i, vshrn_n_u32(vbslq_u32(vceqq_f32(a.v[i], a.v[i]), rounded, quiet), 16));
    }
}
INLINE U lanes16(const uint16_t *p) FOUR(U, vmovl_u16(vld1_u16(p + 4 * i)))
INLINE U lanes8(const uint16_t *p) FOUR(U, vmovl_u16(vld1_u16(p + i % 2 * 4)))
INLINE U lanes4(const uint16_t *p) FOUR(U, vmovl_u16(vld1_u16(p)))
template <int N> INLINE U shift(U a) {
    if constexpr (N == 0) return a;
    else FOUR(U, vshrq_n_u32(a.v[i], N))
}
template <int N> INLINE U shift_up(U a) FOUR(U, vshlq_n_u32(a.v[i], N))
INLINE U halves_shift(U a) { return U{{a.v[0], a.v[1], vshrq_n_u32(a.v[2], 2), vshrq_n_u32(a.v[3], 2)}}; }
INLINE U quarters_shift(U a) { return U{{a.v[0], vshrq_n_u32(a.v[1], 1), vshrq_n_u32(a.v[2], 2), vshrq_n_u32(a.v[3], 3)}}; }
INLINE U mask(U a, uint32_t m) FOUR(U, vandq_u32(a.v[i], vdupq_n_u32(m)))
INLINE U either(U a, U b) FOUR(U, vorrq_u32(a.v[i], b.v[i]))
INLINE U plus(U a, U b) FOUR(U, vaddq_u32(a.v[i], b.v[i]))
INLINE U choose(U a, U b, uint32_t m) FOUR(U, vbslq_u32(vdupq_n_u32(m), a.v[i], b.v[i]))
INLINE F load_held(const float *p) { return load(p); }
INLINE F evens_odds(F a) {
    return F{{vuzp1q_f32(a.v[0], a.v[1]), vuzp1q_f32(a.v[2], a.v[3]), vuzp2q_f32(a.v[0], a.v[1]), vuzp2q_f32(a.v[2], a.v[3])}};
}
INLINE uint32x4_t pairs8(const uint16_t *p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }
INLINE uint32x4_t down(uint32x4_t a, int i0, int i1, int i2, int i3) {
    const int32_t by[4] = {-i0, -i1, -i2, -i3};
    return vshlq_u32(a, vld1q_s32(by));
}
INLINE U nibbles16(const uint16_t *p) {
    const uint32x4_t a = pairs8(p), b = pairs8(p + 8);
    return U{{a, b, vshrq_n_u32(a, 16), vshrq_n_u32(b, 16)}};
}
template <int UP> INLINE U nibbles8(const uint16_t *p) {
    const uint32x4_t a = pairs8(p);
    return U{{UP ? vshlq_n_u32(a, 1) : a, vshrq_n_u32(a, 2 - UP), vshrq_n_u32(a, 16 - UP), vshrq_n_u32(a, 18 - UP)}};
}
INLINE U nibbles4(const uint16_t *p) {
    const uint32x2_t two = vreinterpret_u32_u16(vld1_u16(p));
    const uint32x4_t a = vcombine_u32(two, two);
    return U{{down(a, 0, 0, 1, 1), down(a, 2, 2, 3, 3), down(a, 16, 16, 17, 17), down(a, 18, 18, 19, 19)}};
}
template <int BITS> INLINE U stream16(const uint8_t *p) {
    static const Stream<BITS> from;
    const uint8x16_t bytes = vld1q_u8(p);
    FOUR(U, vandq_u32(vshlq_u32(vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vld1q_u8((const uint8_t *)(from.byte + 4 * i)))),
                                vnegq_s32(vreinterpretq_s32_u32(vld1q_u32(from.shift + 4 * i)))),
                      vdupq_n_u32((1u << BITS) - 1)))
}
INLINE F lookup8(F table, U index) {  // bytes 4 * index to 4 * index + 3 of 32
    const uint8x16x2_t bytes = {{vreinterpretq_u8_f32(table.v[0]), vreinterpretq_u8_f32(table.v[1])}};
    FOUR(F, vreinterpretq_f32_u8(vqtbl2q_u8(
                bytes, vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), vandq_u32(index.v[i], vdupq_n_u32(7)),
                                                      vdupq_n_u32(0x04040404))))))
}
template <int> INLINE F lookup_wide(const float *table, U index) { return gather(table, index); }
INLINE U words16(const uint16_t *p) FOUR(U, vreinterpretq_u32_u16(vld1q_u16(p + 8 * i)))
INLINE U next_digits(U &rest) {
    U digits;
    for (int i = 0; i < 4; i++) {
        const uint16x8_t lanes = vreinterpretq_u16_u32(rest.v[i]), three = vdupq_n_u16(3);
        const uint32x4_t low = vmull_u16(vget_low_u16(lanes), vget_low_u16(three)), high = vmull_high_u16(lanes, three);
        digits.v[i] = vreinterpretq_u32_u16(vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high)));
        rest.v[i] = vreinterpretq_u32_u16(vmulq_u16(lanes, three));
    }
    return digits;
}
INLINE F splice(F a, F b, int n) {
    static const int32_t places[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    FOUR(F, vbslq_f32(vcgtq_s32(vdupq_n_s32(n), vld1q_s32(places + 4 * i)), a.v[i], b.v[i]))
}
#undef FOUR
