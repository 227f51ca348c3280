/* The positions of tokens: a rotation of queries and keys (ESM-2), the same after a layer norm (ESM C), linear biases on
 * the scores (DNABERT-S), or biases by relative position (T5). */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, MAX_HEAD_DIM = 128 }; /* LANES: float32 values per vector */
enum kind { ROTATION, NORMALIZED_ROTATION, LINEAR_BIASES, RELATIVE_BIASES };

#define LOG2_E 1.44269504088896340736f
/* Below any score. A row whose scores are all this low, as after an overflow, becomes NaN. */
#define MASKED -INFINITY
#define NEGLIGIBLE 32.0f /* in log2 */

/* A layer norm over all heads of each query, or of each key. */
typedef struct {
    const float *weight;         /* [head_dim] */
    const float *means, *scales; /* [position]; scales: 1 / spread */
} Norm;

/* The positions of tokens for one head, depending on `kind`. */
typedef struct {
    const float *cosines, *sines; /* rotations: [position][head_dim] */
    Norm query_norm, key_norm;    /* NORMALIZED_ROTATION */
    float slope;                  /* LINEAR_BIASES: reduction of a score per token of distance, in log2 */
    const float *biases;          /* RELATIVE_BIASES: [j - i] for query i and key j, in log2 */
} Positions;

INLINE int rotates(enum kind kind) { return kind == ROTATION || kind == NORMALIZED_ROTATION; }

/* The factor of scores, in log2. T5 does not scale them. */
INLINE float score_scale(enum kind kind, int head_dim) {
    return kind == RELATIVE_BIASES ? LOG2_E : LOG2_E / sqrtf((float)head_dim);
}

/* 1 / the spread. An overflow of the variance becomes NaN: 1 / infinity is a finite scale, and wrong. */
INLINE float inverse_spread(float variance, float eps) {
    return variance < INFINITY ? 1.0f / sqrtf(variance + eps) : NAN;
}
