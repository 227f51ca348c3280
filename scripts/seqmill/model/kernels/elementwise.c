/* The elementwise steps around the matrix products, each in one pass over memory: residual + norm + rounding, and gated
 * GELU or SiLU (a plain GELU is part of the product before it). The arithmetic is in float32, rounded once when the result
 * is stored; a row's bits depend only on that row.
 *
 * An `element` is bfloat16 where the processor rounds to it, else float32.
 */
#include "vectors.h"

#ifdef __AVX512BF16__
typedef uint16_t element;

INLINE Floats load_elements(const element *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}
INLINE void store_elements(element *x, Floats a) {
    _mm256_storeu_si256((__m256i *)x, (__m256i)_mm512_cvtneps_pbh(a));
}
#else
typedef float element;

INLINE Floats load_elements(const element *x) { return load(x); }
INLINE void store_elements(element *x, Floats a) { store(x, a); }
#endif

/* x * (1 + erf(x / sqrt(2))) / 2, to 6e-7 absolute (PyTorch's float32: 1.2e-6); NaN stays NaN.
 *
 * erf(x / sqrt(2)) is x times a polynomial of x^2 on [-5.25, 5.25], where it reaches 1 in float32. The polynomial of
 * degree 14 is a least-squares fit at Chebyshev nodes, in t from -1 to 1, so that its coefficients are small.
 */
INLINE Floats gelu_of(Floats x) {
    const Floats inside = largest(splat(-5.25f), smallest(splat(5.25f), x));
    const Floats t = multiply_add(multiply(inside, inside), splat(1 / 13.78125f), splat(-1.0f));
    Floats p = splat(4.816301807e-04f);
    p = multiply_add(p, t, splat(-1.321014017e-03f));
    p = multiply_add(p, t, splat(1.329880673e-03f));
    p = multiply_add(p, t, splat(-2.057781909e-03f));
    p = multiply_add(p, t, splat(5.776127335e-03f));
    p = multiply_add(p, t, splat(-1.091872901e-02f));
    p = multiply_add(p, t, splat(1.684643701e-02f));
    p = multiply_add(p, t, splat(-2.554021776e-02f));
    p = multiply_add(p, t, splat(3.707209975e-02f));
    p = multiply_add(p, t, splat(-5.008613691e-02f));
    p = multiply_add(p, t, splat(6.406394392e-02f));
    p = multiply_add(p, t, splat(-7.952662557e-02f));
    p = multiply_add(p, t, splat(9.929149598e-02f));
    p = multiply_add(p, t, splat(-1.342536360e-01f));
    p = multiply_add(p, t, splat(2.693186998e-01f));
    const Floats erf = largest(splat(-1.0f), smallest(splat(1.0f), multiply(inside, p)));
    const Floats half = multiply(x, splat(0.5f));
    return multiply_add(half, erf, half);
}

/* x / (1 + exp(-x)), to 8e-7 relative from -10 on and 5e-6 below; NaN stays NaN, and -infinity becomes NaN.
 *
 * The exponential is the square of exp(-x / 2), which overflows only where x / infinity, -0, is the result.
 */
INLINE Floats silu_of(Floats x) {
    const Floats root = exp2_of(smallest(splat(127.0f), multiply(x, splat(-0.5f * LOG2_E))));
    return divide(x, multiply_add(root, root, splat(1.0f)));
}

/* Add to the residual stream, and write the norm of the sum; `centered` is a constant where this is inlined.
 *
 * A layer norm's variance is the mean of squared differences from the mean. An RMS norm's mean is 0.
 */
INLINE void add_norm_of(int centered, float *x, const element *delta, const float *weight, const float *bias, float eps,
                        int64_t rows, int64_t dim, element *y, int32_t post) {
    for (long row = 0; row < rows; row++, x += dim) {
        Floats sum = splat(0), squares = splat(0), mean = splat(0);
        for (long d = 0; d < dim; d += LANES) {
            Floats value = load(x + d);
            if (delta) {
                value = add(value, load_elements(delta + row * dim + d));
                store(x + d, value);
            }
            if (centered)
                sum = add(sum, value);
            else
                squares = multiply_add(value, value, squares);
        }
        if (centered) {
            mean = splat(sum_of_lanes(sum) / (float)dim);
            for (long d = 0; d < dim; d += LANES) {
                const Floats difference = subtract(load(x + d), mean);
                squares = multiply_add(difference, difference, squares);
            }
        }
        const Floats scale = splat(inverse_spread(sum_of_lanes(squares) / (float)dim, eps));
        for (long d = 0; d < dim; d += LANES) {
            Floats value = load(x + d);
            if (centered) value = subtract(value, mean);
            value = multiply(value, scale);
            value = bias ? multiply_add(value, load(weight + d), load(bias + d)) : multiply(value, load(weight + d));
            if (post) store(x + d, value);
            if (y) store_elements(y + row * dim + d, value);
        }
    }
}

/* Add to the residual stream, and write the norm of the sum: a layer norm (Ba et al. 2016, arXiv:1607.06450), or if not
 * `centered` an RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467).
 *
 * x: float [rows][dim], becomes x + delta, or the norm of that if `post`; delta: [rows][dim] or NULL; bias: float [dim]
 * or NULL; y: [rows][dim] or NULL; dim is a multiple of LANES.
 */
void add_norm(float *x, const element *delta, const float *weight, const float *bias, float eps, int64_t rows,
              int64_t dim, element *y, int32_t post, int32_t centered) {
    if (centered)
        add_norm_of(1, x, delta, weight, bias, eps, rows, dim, y, post);
    else
        add_norm_of(0, x, delta, weight, bias, eps, rows, dim, y, post);
}

INLINE void gate_by(int silu, const element *h, element *gated, int64_t rows, int64_t dim) {
    for (int64_t row = 0; row < rows; row++, h += 2 * dim, gated += dim)
        for (int64_t d = 0; d < dim; d += LANES) {
            const Floats first = load_elements(h + d), activated = silu ? silu_of(first) : gelu_of(first);
            store_elements(gated + d, multiply(activated, load_elements(h + dim + d)));
        }
}

/* The activation of the first half of each row times the second half: SiLU (Shazeer 2020, arXiv:2002.05202) if `silu`,
 * else the exact GELU. h: [rows][2][dim]; gated: [rows][dim]; dim is a multiple of LANES. */
void gate(const element *h, element *gated, int64_t rows, int64_t dim, int32_t silu) {
    if (silu)
        gate_by(1, h, gated, rows, dim);
    else
        gate_by(0, h, gated, rows, dim);
}
