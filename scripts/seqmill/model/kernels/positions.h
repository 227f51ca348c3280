/* The positions of tokens: a rotation of queries and keys (ESM-2), or linear biases on the scores (DNABERT-S). */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, MAX_HEAD_DIM = 128 }; /* LANES: float32 values per vector */
enum kind { ROTATION, LINEAR_BIASES };

#define LOG2_E 1.44269504088896340736f
#define MASKED -1e30f /* far below any score, and finite */
#define NEGLIGIBLE 32.0f /* in log2 */

/* The positions of tokens for one head, depending on `kind`. */
typedef struct {
    const float *cosines, *sines; /* ROTATION: [position][head_dim] */
    float slope;                  /* LINEAR_BIASES: reduction of a score per token of distance, in log2 */
} Positions;
