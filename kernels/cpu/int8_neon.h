// Bytes in vectors of sixteen 32-bit numbers on AArch64. Included by int8_simd.h, in its namespace.
//
// LOWBIT_DOT: the processor has the dot product of signed bytes. Codes of 128 and above are taken as signed ones, 128 less.

constexpr int STRIPS = 1, TOKENS = 2;
#define FOUR(type, expression) { type r; for (int i = 0; i < 4; i++) r.v[i] = expression; return r; }
INLINE U load_bytes(const void *p) FOUR(U, vreinterpretq_u32_u8(vld1q_u8((const uint8_t *)p + 16 * i)))
INLINE void store_bytes(void *p, U a) {
    for (int i = 0; i < 4; i++) vst1q_u8((uint8_t *)p + 16 * i, vreinterpretq_u8_u32(a.v[i]));
}
INLINE U no_sums() FOUR(U, vdupq_n_u32(0))
INLINE U four_bytes(const int8_t *p) {
    uint32_t four;
    memcpy(&four, p, 4);
    FOUR(U, vdupq_n_u32(four))
}
INLINE int32x4_t four_products(int8x16_t codes, int8x16_t x) {
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(x)), high = vmull_high_s8(codes, x);
    return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}
template <bool SMALL> INLINE uint32x4_t dot4(uint32x4_t sums, uint32x4_t codes, uint32x4_t x) {
    const int32x4_t before = vreinterpretq_s32_u32(sums);
    const int8x16_t factors = vreinterpretq_s8_u32(x);
    const int8x16_t near = vreinterpretq_s8_u32(SMALL ? codes : veorq_u32(codes, vdupq_n_u32(0x80808080)));
#if defined(LOWBIT_DOT)
    int32x4_t after = vdotq_s32(before, near, factors);
    if (!SMALL)
        for (int i = 0; i < 2; i++) after = vdotq_s32(after, factors, vdupq_n_s8(64));
#else
    int32x4_t after = vaddq_s32(before, four_products(near, factors));
    if (!SMALL) after = vaddq_s32(after, vshlq_n_s32(vpaddlq_s16(vpaddlq_s8(factors)), 7));
#endif
    return vreinterpretq_u32_s32(after);
}
template <bool SMALL> INLINE U dot(U sums, U codes, U x) FOUR(U, dot4<SMALL>(sums.v[i], codes.v[i], x.v[i]))
template <bool SMALL> INLINE U dot_four(U sums, U codes, const int8_t *x) { return dot<SMALL>(sums, codes, four_bytes(x)); }
INLINE U down_by(U a, int n) FOUR(U, vshlq_u32(a.v[i], vdupq_n_s32(-n)))
INLINE U up_by(U a, int n) FOUR(U, vshlq_u32(a.v[i], vdupq_n_s32(n)))
INLINE F unless_zero(F a, U b) FOUR(F, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v[i]), vtstq_u32(b.v[i], b.v[i]))))
INLINE F half_to_float(U a) FOUR(F, vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a.v[i]))))
INLINE F as_floats(U a) FOUR(F, vreinterpretq_f32_u32(a.v[i]))
INLINE U bits_of(F a) FOUR(U, vreinterpretq_u32_f32(a.v[i]))
INLINE U larger(U a, U b) FOUR(U, vmaxq_u32(a.v[i], b.v[i]))
INLINE uint32_t largest(U a) { return vmaxvq_u32(vmaxq_u32(vmaxq_u32(a.v[0], a.v[1]), vmaxq_u32(a.v[2], a.v[3]))); }
INLINE U rounded(F a) FOUR(U, vreinterpretq_u32_s32(vcvtnq_s32_f32(a.v[i])))
INLINE void store_narrow(void *p, U a) {  // the low bytes
    const uint16x8_t low = vcombine_u16(vmovn_u32(a.v[0]), vmovn_u32(a.v[1]));
    const uint16x8_t high = vcombine_u16(vmovn_u32(a.v[2]), vmovn_u32(a.v[3]));
    vst1q_u8((uint8_t *)p, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}
template <bool SEPARATE> INLINE void quad(U (&out)[4], const uint8_t *p, int64_t bytes) {
    for (int i = 0; i < 4; i++) {
        uint32x4_t a[4];
        for (int r = 0; r < 4; r++) {
            const uint8x16_t row = vld1q_u8(p + (4 * i + r) * bytes);
            const uint8x16_t apart = vcombine_u8(vget_low_u8(vuzp1q_u8(row, row)), vget_low_u8(vuzp2q_u8(row, row)));
            a[r] = vreinterpretq_u32_u8(SEPARATE ? apart : row);
        }
        const uint64x2_t b0 = vreinterpretq_u64_u32(vtrn1q_u32(a[0], a[1])), b1 = vreinterpretq_u64_u32(vtrn2q_u32(a[0], a[1]));
        const uint64x2_t b2 = vreinterpretq_u64_u32(vtrn1q_u32(a[2], a[3])), b3 = vreinterpretq_u64_u32(vtrn2q_u32(a[2], a[3]));
        out[0].v[i] = vreinterpretq_u32_u64(vtrn1q_u64(b0, b2));
        out[1].v[i] = vreinterpretq_u32_u64(vtrn1q_u64(b1, b3));
        out[2].v[i] = vreinterpretq_u32_u64(vtrn2q_u64(b0, b2));
        out[3].v[i] = vreinterpretq_u32_u64(vtrn2q_u64(b1, b3));
    }
}
INLINE U levels_of(U codes, const uint8_t *table, int parts) {
    U found = no_sums();
    for (int part = 0; part < parts; part++) {
        const uint8x16_t levels = vld1q_u8(table + 16 * part), first = vdupq_n_u8((uint8_t)(16 * part));
        for (int i = 0; i < 4; i++) {  // an index of 16 and above gives 0
            const uint8x16_t here = vqtbl1q_u8(levels, vsubq_u8(vreinterpretq_u8_u32(codes.v[i]), first));
            found.v[i] = vorrq_u32(found.v[i], vreinterpretq_u32_u8(here));
        }
    }
    return found;
}
#undef FOUR
