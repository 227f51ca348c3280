/* The elementwise steps around the matrix products, each in one pass over memory: residual + layer norm + rounding, and
 * gated GELU (a plain GELU is part of the product before it). The arithmetic is in float32, rounded once when the result
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

/* Add to the residual stream, and write the layer norm of the sum (Ba et al. 2016, arXiv:1607.06450).
 *
 * The variance is the mean of squared differences from the mean. x: float [rows][dim], becomes x + delta, or the layer
 * norm of that if `post`; delta: [rows][dim] or NULL; y: [rows][dim] or NULL; dim is a multiple of LANES.
 */
void add_norm(float *x, const element *delta, const float *weight, const float *bias, float eps, int64_t rows,
              int64_t dim, element *y, int32_t post) {
    for (long row = 0; row < rows; row++, x += dim) {
        Floats sum = splat(0), squares = splat(0);
        for (long d = 0; d < dim; d += LANES) {
            Floats value = load(x + d);
            if (delta) {
                value = add(value, load_elements(delta + row * dim + d));
                store(x + d, value);
            }
            sum = add(sum, value);
        }
        const Floats mean = splat(sum_of_lanes(sum) / (float)dim);
        for (long d = 0; d < dim; d += LANES) {
            const Floats centered = subtract(load(x + d), mean);
            squares = multiply_add(centered, centered, squares);
        }
        const Floats scale = splat(1.0f / sqrtf(sum_of_lanes(squares) / (float)dim + eps));
        for (long d = 0; d < dim; d += LANES) {
            const Floats normal = multiply(subtract(load(x + d), mean), scale);
            const Floats value = multiply_add(normal, load(weight + d), load(bias + d));
            if (post) store(x + d, value);
            if (y) store_elements(y + row * dim + d, value);
        }
    }
}

/* The exact GELU of the first half of each row times the second half. h: [rows][2][dim]; gated: [rows][dim]; dim is a
 * multiple of LANES. */
void gate(const element *h, element *gated, int64_t rows, int64_t dim) {
    for (int64_t row = 0; row < rows; row++, h += 2 * dim, gated += dim)
        for (int64_t d = 0; d < dim; d += LANES)
            store_elements(gated + d, multiply(gelu_of(load_elements(h + d)), load_elements(h + dim + d)));
}
