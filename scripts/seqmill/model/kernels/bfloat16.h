/* Arithmetic in bfloat16 and float32 on AVX512-BF16. */
#include <immintrin.h>

#include "positions.h"

/* Lanes 0 to count - 1, or all. */
INLINE __mmask16 lane_mask(int count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

INLINE __m512 to_float(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

/* Round to nearest even. */
INLINE __m256i to_bfloat16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

/* 2^x for x <= 0 to 3e-6 relative, and exactly 1 at 0; NaN stays NaN.
 *
 * 2^x is 2^floor(x) p(x - floor(x)). Of the polynomials of degree 4 with p(0) = 1, p has the smallest largest relative
 * error on [0, 1] (Lawson's iteration). The error is 600 times less than the rounding of a weight to bfloat16.
 */
INLINE __m512 exp2_of(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(1.34266866e-2f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.22424690e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.41280213e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.93044841e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x); /* p 2^floor(x) */
}

/* Compute one row's unnormalized softmax weights for 32 keys, rounded to bfloat16; add the exact weights to `sum`.
 * The scores are in units of log2. */
INLINE __m512 exponentiate(const float *scores, __m512 maximum, uint16_t *weights, __m512 sum) {
    const __m512 first = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores), maximum));
    const __m512 second = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + LANES), maximum));
    _mm512_storeu_si512(weights, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    return _mm512_add_ps(sum, _mm512_add_ps(first, second));
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

/* Transpose 16 rows of 16 elements of 32 bits. */
INLINE void transpose(__m512i rows[LANES]) {
    __m512i t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) { /* row i + c: column c of each quarter, of rows i to i + 3 */
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xee);
        const __m512i e = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xee);
        rows[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        rows[4 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        rows[8 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
        rows[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
}
