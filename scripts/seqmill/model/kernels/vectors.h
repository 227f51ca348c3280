/* Vectors of 16 float32 lanes for AVX512, AVX2 and NEON, with the same bits on each.
 *
 * Where the hardware's vectors are shorter, one Floats is several of them. Reductions add and compare in the same order
 * everywhere: halves, quarters, pairs, neighbors.
 */
#include "positions.h"

#ifdef __AVX512F__
#include <immintrin.h>

typedef __m512 Floats;

INLINE Floats load(const float *x) { return _mm512_loadu_ps(x); }
INLINE void store(float *x, Floats a) { _mm512_storeu_ps(x, a); }
INLINE Floats splat(float x) { return _mm512_set1_ps(x); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats largest(Floats a, Floats b) { return _mm512_max_ps(a, b); }  /* b if either is NaN */
INLINE Floats smallest(Floats a, Floats b) { return _mm512_min_ps(a, b); } /* b if either is NaN */
INLINE Floats absolute(Floats a) { return _mm512_abs_ps(a); }
INLINE Floats round_even(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* a * 2^power for a whole power of at least -126 */
INLINE Floats scale_by_power(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }
/* The first `count` lanes of a, the others of b. */
INLINE Floats first_lanes(int count, Floats a, Floats b) {
    return _mm512_mask_blend_ps((__mmask16)((1u << count) - 1), b, a);
}

#elif defined(__AVX2__)
#include <immintrin.h>

typedef struct {
    __m256 low, high;
} Floats;

#define BOTH(name, function)                                                                                \
    INLINE Floats name(Floats a, Floats b) {                                                                \
        return (Floats){function(a.low, b.low), function(a.high, b.high)};                                  \
    }
INLINE Floats load(const float *x) { return (Floats){_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
INLINE void store(float *x, Floats a) {
    _mm256_storeu_ps(x, a.low);
    _mm256_storeu_ps(x + 8, a.high);
}
INLINE Floats splat(float x) { return (Floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
BOTH(add, _mm256_add_ps)
BOTH(subtract, _mm256_sub_ps)
BOTH(multiply, _mm256_mul_ps)
BOTH(divide, _mm256_div_ps)
BOTH(largest, _mm256_max_ps)
BOTH(smallest, _mm256_min_ps)
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE Floats absolute(Floats a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (Floats){_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
INLINE Floats round_even(Floats a) {
    enum { NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    return (Floats){_mm256_round_ps(a.low, NEAREST), _mm256_round_ps(a.high, NEAREST)};
}
INLINE __m256 power_of_two(__m256 power) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23));
}
INLINE Floats scale_by_power(Floats a, Floats power) {
    return (Floats){_mm256_mul_ps(a.low, power_of_two(power.low)), _mm256_mul_ps(a.high, power_of_two(power.high))};
}
INLINE Floats first_lanes(int count, Floats a, Floats b) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
    const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lanes);
    return (Floats){_mm256_blendv_ps(b.low, a.low, _mm256_castsi256_ps(low)),
                    _mm256_blendv_ps(b.high, a.high, _mm256_castsi256_ps(high))};
}

#else
#include <arm_neon.h>

typedef struct {
    float32x4_t parts[4];
} Floats;

#define EACH(expression)                                       \
    Floats result;                                             \
    for (int i = 0; i < 4; i++) result.parts[i] = expression; \
    return result
INLINE Floats load(const float *x) { EACH(vld1q_f32(x + 4 * i)); }
INLINE void store(float *x, Floats a) {
    for (int i = 0; i < 4; i++) vst1q_f32(x + 4 * i, a.parts[i]);
}
INLINE Floats splat(float x) { EACH(vdupq_n_f32(x)); }
INLINE Floats add(Floats a, Floats b) { EACH(vaddq_f32(a.parts[i], b.parts[i])); }
INLINE Floats subtract(Floats a, Floats b) { EACH(vsubq_f32(a.parts[i], b.parts[i])); }
INLINE Floats multiply(Floats a, Floats b) { EACH(vmulq_f32(a.parts[i], b.parts[i])); }
INLINE Floats divide(Floats a, Floats b) { EACH(vdivq_f32(a.parts[i], b.parts[i])); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { EACH(vfmaq_f32(c.parts[i], a.parts[i], b.parts[i])); }
INLINE Floats largest(Floats a, Floats b) {
    EACH(vbslq_f32(vcgtq_f32(a.parts[i], b.parts[i]), a.parts[i], b.parts[i]));
}
INLINE Floats smallest(Floats a, Floats b) {
    EACH(vbslq_f32(vcltq_f32(a.parts[i], b.parts[i]), a.parts[i], b.parts[i]));
}
INLINE Floats absolute(Floats a) { EACH(vabsq_f32(a.parts[i])); }
INLINE Floats round_even(Floats a) { EACH(vrndnq_f32(a.parts[i])); }
INLINE float32x4_t power_of_two(float32x4_t power) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(power), vdupq_n_s32(127)), 23));
}
INLINE Floats scale_by_power(Floats a, Floats power) { EACH(vmulq_f32(a.parts[i], power_of_two(power.parts[i]))); }
INLINE Floats first_lanes(int count, Floats a, Floats b) {
    const int32x4_t lanes = {0, 1, 2, 3};
    EACH(vbslq_f32(vcgtq_s32(vdupq_n_s32(count - 4 * i), lanes), a.parts[i], b.parts[i]));
}
#endif

/* Lanes from `count` on are not read, and are 0. */
INLINE Floats load_first(const float *x, int count) {
    float lanes[LANES] = {0};
    memcpy(lanes, x, count * sizeof *x);
    return load(lanes);
}

INLINE void store_first(float *x, int count, Floats a) {
    float lanes[LANES];
    store(lanes, a);
    memcpy(x, lanes, count * sizeof *x);
}

/* The sum of the lanes: halves are added until one number is left. */
INLINE float sum_of_lanes(Floats a) {
    float lanes[LANES];
    store(lanes, a);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] + lanes[i + half];
    return lanes[0];
}

INLINE float largest_lane(Floats a) {
    float lanes[LANES];
    store(lanes, a);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

/* 2^x for x <= 127 to 1.7e-7 relative, at least 2^-126, and 1 at 0; NaN stays NaN.
 *
 * The polynomial of degree 5 is a minimax fit to 2^r, |r| <= 1/2, with 1 as its constant.
 */
INLINE Floats exp2_of(Floats x) {
    x = largest(splat(-126.0f), x);
    const Floats whole = round_even(x), rest = subtract(x, whole);
    Floats p = splat(1.326472615e-3f);
    p = multiply_add(p, rest, splat(9.671512991e-3f));
    p = multiply_add(p, rest, splat(5.550733581e-2f));
    p = multiply_add(p, rest, splat(2.402224243e-1f));
    p = multiply_add(p, rest, splat(6.931470037e-1f));
    p = multiply_add(p, rest, splat(1.0f));
    return scale_by_power(p, whole);
}
