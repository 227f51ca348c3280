/* Arithmetic in bfloat16 and float32 on AVX512-BF16. */
#include <immintrin.h>

#include "positions.h"

INLINE float to_float(uint16_t value) {
    const uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Round to nearest even. A NaN stays one: its quiet bit is among the upper 16. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

/* 2^x for x <= 0 to 3e-7 relative (Taylor series of 2^r, |r| <= 1/2, to degree 6); NaN stays NaN. */
INLINE __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x); /* the second operand is returned if either is NaN */
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* Rotate one head's query or key by halves of its dimension, times `scale`; round once. */
INLINE void rotate(int head_dim, const uint16_t *x, const float *cosines, const float *sines, float scale,
                   uint16_t *rotated) {
    const int half = head_dim / 2;
    for (int d = 0; d < half; d++) {
        const float a = to_float(x[d]) * scale, b = to_float(x[d + half]) * scale;
        rotated[d] = to_bfloat16(a * cosines[d] - b * sines[d]);
        rotated[d + half] = to_bfloat16(b * cosines[d + half] + a * sines[d + half]);
    }
}

/* Two neighboring bfloat16 values as one element of a dot product's operand. */
INLINE __m512bh broadcast_pair(const uint16_t *pairs, long pair) {
    int32_t bits;
    memcpy(&bits, pairs + 2 * pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

/* Dot product of two queries or keys: exact products, summed in float32. */
INLINE float dot(int head_dim, const uint16_t *x, const uint16_t *y) {
    __m512 sum = _mm512_setzero_ps();
    for (int d = 0; d < head_dim; d += 2 * LANES) {
        const __mmask32 live = head_dim - d >= 2 * LANES ? 0xffffffffu : (1u << (head_dim - d)) - 1;
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(live, x + d),
                               (__m512bh)_mm512_maskz_loadu_epi16(live, y + d));
    }
    return _mm512_reduce_add_ps(sum);
}
