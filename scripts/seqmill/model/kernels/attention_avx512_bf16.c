/* Softmax attention over a pack of sequences, in bfloat16 on AVX512-BF16, with either of two kinds of
 * positions: a rotation of queries and keys (ESM-2), or linear biases on the scores (DNABERT-S).
 *
 * One call computes all heads of the given sequences, one after the other, on the calling thread. A head is
 * computed in blocks of ROWS queries: scores in float32 by bfloat16 dot products, exact softmax over the
 * whole row (no rescaling), weights rounded to bfloat16, weighted sum of the values in float32. A
 * sequence's result depends only on that sequence. Scores never leave the cache: the working memory is
 * 6 * ROWS bytes per key, plus the keys and values of one head.
 *
 * PyTorch's kernel is 3 to 5 times slower at ESM-2's head dimensions (16 to 64), for every dtype; see
 * docs/performance.md.
 */
#include "bfloat16.h"

enum { ROWS = 8, KEY_BLOCK = 32 };

typedef uint16_t element;

/* A query or key as the dot products' operand. A rotation rounds anyway, so it applies the scale as well. */
INLINE void place(int head_dim, enum kind kind, const uint16_t *x, long t, Positions positions, float scale,
                  uint16_t *placed) {
    if (kind == ROTATION)
        rotate(head_dim, x, positions.cosines + t * head_dim, positions.sines + t * head_dim, scale, placed);
    else
        memcpy(placed, x, 2 * head_dim);
}

typedef struct {
    uint32_t *keys;   /* [block of LANES keys][pair of dimensions][key]: pairs of bfloat16 */
    uint32_t *values; /* [pair of keys][dimension, padded to LANES]: pairs of bfloat16 */
    float *scores;    /* [ROWS][padded length] */
    uint16_t *weights; /* [ROWS][padded length] */
} Workspace;

INLINE size_t workspace_bytes(long longest, long head_dim) {
    const size_t padded = (longest + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    const size_t width = (head_dim + LANES - 1) / LANES * LANES;
    return padded * (2 * head_dim + 2 * width + 6 * ROWS);
}

INLINE Workspace arrange(long longest, long head_dim, char *memory) {
    const size_t padded = (longest + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    const size_t width = (head_dim + LANES - 1) / LANES * LANES;
    char *values = memory + padded * 2 * head_dim, *scores = values + padded * 2 * width;
    return (Workspace){(uint32_t *)memory, (uint32_t *)values, (float *)scores,
                       (uint16_t *)(scores + padded * 4 * ROWS)};
}

/* Arrange one head's keys and values for the dot products; pad with zeros.
 *
 * Returns, for linear biases, the largest norm of a key; infinity if a key or a value is not finite.
 */
INLINE float pack_keys_and_values(int head_dim, enum kind kind, const uint16_t *keys, const uint16_t *values,
                                  long stride, Positions positions, long length, long padded, Workspace work) {
    const int pairs = head_dim / 2, width = (head_dim + LANES - 1) / LANES * LANES;
    uint16_t placed[MAX_HEAD_DIM];
    float largest = 0;
    for (long t = 0; t < padded; t++) {
        uint32_t *column = work.keys + (t / LANES) * pairs * LANES + t % LANES;
        if (t < length)
            place(head_dim, kind, keys + t * stride, t, positions, 1.0f, placed);
        else
            memset(placed, 0, sizeof placed);
        for (int pair = 0; pair < pairs; pair++) memcpy(column + pair * LANES, placed + 2 * pair, 4);
        if (kind == LINEAR_BIASES) {
            const float squared = dot(head_dim, placed, placed);
            if (!(squared <= largest)) largest = squared < INFINITY ? squared : INFINITY; /* NaN: infinity */
        }
    }
    uint32_t odd = 0;
    for (long t = 0; t < padded; t += 2) {
        uint32_t *row = work.values + (t / 2) * width;
        const uint16_t *first = values + t * stride, *second = first + stride;
        for (int d = 0; d < head_dim; d++) {
            const uint32_t low = t < length ? first[d] : 0, high = t + 1 < length ? second[d] : 0;
            row[d] = low | high << 16;
            if (kind == LINEAR_BIASES) odd |= (low & 0x7f80) == 0x7f80 || (high & 0x7f80) == 0x7f80;
        }
        for (int d = head_dim; d < width; d++) row[d] = 0;
    }
    return odd ? INFINITY : sqrtf(largest);
}

/* Find the range of keys, in whole blocks, whose weights count for the queries from `first` on.
 *
 * A score is at most |query| |key| minus its bias, and a query's largest score is at least that with its own
 * key, which has no bias. So each key beyond some distance has less than 2^-NEGLIGIBLE of the total weight, and
 * weights fall with distance: all such keys together stay below float32's rounding. For steep heads the time
 * thus grows with the length, not with its square. The distance depends only on this sequence; if it is not a
 * number, no key is skipped.
 */
INLINE void find_span(int head_dim, const uint16_t *queries, const uint16_t *keys, long stride, long first, int rows,
                      float scale, float slope, float largest_key, long length, long padded, long *begin, long *end) {
    *begin = 0;
    *end = padded;
    if (!(slope * (float)length > NEGLIGIBLE)) return;
    long from = length, to = 0;
    for (int r = 0; r < rows; r++) {
        const long t = first + r;
        const uint16_t *query = queries + t * stride;
        const float best = sqrtf(dot(head_dim, query, query)) * largest_key;
        const float own = dot(head_dim, query, keys + t * stride);
        const float distance = ((best - own) * scale + NEGLIGIBLE) / slope;
        if (!(distance < (float)length)) return;
        if (t - (long)distance < from) from = t - (long)distance;
        if (t + (long)distance > to) to = t + (long)distance;
    }
    if (from > 0) *begin = from / KEY_BLOCK * KEY_BLOCK;
    if (to < length) *end = (to / KEY_BLOCK + 1) * KEY_BLOCK;
}

/* Compute the scores of ROWS queries from `first` on with the keys from `begin` to `end`, in units of log2;
 * write each row's maximum to `maxima`. */
INLINE void score(int head_dim, enum kind kind, uint16_t queries[ROWS][MAX_HEAD_DIM], long first, long begin, long end,
                  float scale, float slope, long length, long padded, Workspace work, __m512 maxima[ROWS]) {
    const int pairs = head_dim / 2;
    const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int r = 0; r < ROWS; r++) maxima[r] = _mm512_set1_ps(MASKED);
    for (long key = begin; key < end; key += KEY_BLOCK) {
        const uint32_t *left = work.keys + key * pairs, *right = left + pairs * LANES;
        __m512 a[ROWS], b[ROWS];
        for (int r = 0; r < ROWS; r++) a[r] = b[r] = _mm512_setzero_ps();
        for (int pair = 0; pair < pairs; pair++) {
            const __m512bh l = (__m512bh)_mm512_loadu_si512(left + pair * LANES);
            const __m512bh h = (__m512bh)_mm512_loadu_si512(right + pair * LANES);
            for (int r = 0; r < ROWS; r++) {
                const __m512bh q = broadcast_pair(queries[r], pair);
                a[r] = _mm512_dpbf16_ps(a[r], l, q);
                b[r] = _mm512_dpbf16_ps(b[r], h, q);
            }
        }
        if (kind == LINEAR_BIASES)
            for (int r = 0; r < ROWS; r++) {
                const __m512 ahead = _mm512_add_ps(_mm512_set1_ps((float)(key - first - r)), lanes);
                const __m512 far = _mm512_add_ps(ahead, _mm512_set1_ps(LANES));
                const __m512 step = _mm512_set1_ps(slope), factor = _mm512_set1_ps(scale);
                a[r] = _mm512_fmsub_ps(a[r], factor, _mm512_mul_ps(step, _mm512_abs_ps(ahead)));
                b[r] = _mm512_fmsub_ps(b[r], factor, _mm512_mul_ps(step, _mm512_abs_ps(far)));
            }
        if (key + KEY_BLOCK > length) {
            const uint32_t live = (uint32_t)((1ull << (length - key)) - 1);
            for (int r = 0; r < ROWS; r++) {
                a[r] = _mm512_mask_blend_ps((__mmask16)live, _mm512_set1_ps(MASKED), a[r]);
                b[r] = _mm512_mask_blend_ps((__mmask16)(live >> LANES), _mm512_set1_ps(MASKED), b[r]);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            maxima[r] = _mm512_max_ps(maxima[r], _mm512_max_ps(a[r], b[r]));
            _mm512_storeu_ps(work.scores + r * padded + key, a[r]);
            _mm512_storeu_ps(work.scores + r * padded + key + LANES, b[r]);
        }
    }
}

/* Compute unnormalized, rounded softmax weights; return 1 / sum of the exact weights. */
INLINE float softmax(const float *scores, uint16_t *weights, long begin, long end, __m512 maxima) {
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(maxima));
    __m512 sum = _mm512_setzero_ps();
    for (long key = begin; key < end; key += LANES) {
        const __m512 weight = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + key), maximum));
        sum = _mm512_add_ps(sum, weight);
        _mm256_storeu_si256((__m256i *)(weights + key), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

/* Compute the weighted sum of the values for one or two vectors of dimensions, from dimension `first` on. */
INLINE void weigh(int head_dim, int first, int vectors, int rows, const float *inverse_sums, long begin, long end,
                  long padded, Workspace work, uint16_t *output, long output_stride) {
    const int width = (head_dim + LANES - 1) / LANES * LANES;
    __m512 sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (long pair = begin / 2; pair < end / 2; pair++) {
        const uint32_t *row = work.values + pair * width + first;
        const __m512bh v0 = (__m512bh)_mm512_loadu_si512(row);
        const __m512bh v1 = vectors > 1 ? (__m512bh)_mm512_loadu_si512(row + LANES) : v0;
        for (int r = 0; r < ROWS; r++) {
            const __m512bh weight = broadcast_pair(work.weights + r * padded, pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], v0, weight);
            if (vectors > 1) sums[r][1] = _mm512_dpbf16_ps(sums[r][1], v1, weight);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const int dimension = first + v * LANES, left = head_dim - dimension;
            const __mmask16 live = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
            const __m512 mean = _mm512_mul_ps(sums[r][v], _mm512_set1_ps(inverse_sums[r]));
            _mm256_mask_storeu_epi16(output + r * output_stride + dimension, live,
                                     (__m256i)_mm512_cvtneps_pbh(mean));
        }
}

/* Compute one head of one sequence. `head_dim` and `kind` are constants where this is inlined. */
INLINE void attend(int head_dim, enum kind kind, const uint16_t *queries, const uint16_t *keys, const uint16_t *values,
                   long stride, Positions positions, long length, long longest, char *memory, uint16_t *output,
                   long output_stride) {
    const Workspace work = arrange(longest, head_dim, memory);
    const long padded = (length + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    const float scale = LOG2_E / sqrtf((float)head_dim);
    const float largest_key =
        pack_keys_and_values(head_dim, kind, keys, values, stride, positions, length, padded, work);
    for (long first = 0; first < length; first += ROWS) {
        const int rows = length - first < ROWS ? (int)(length - first) : ROWS;
        uint16_t placed[ROWS][MAX_HEAD_DIM];
        for (int r = 0; r < ROWS; r++) {
            const long t = r < rows ? first + r : length - 1; /* the last block repeats the last query */
            place(head_dim, kind, queries + t * stride, t, positions, scale, placed[r]);
        }
        long begin = 0, end = padded;
        if (kind == LINEAR_BIASES)
            find_span(head_dim, queries, keys, stride, first, rows, scale, positions.slope, largest_key, length, padded,
                      &begin, &end);
        __m512 maxima[ROWS];
        float inverse_sums[ROWS];
        score(head_dim, kind, placed, first, begin, end, scale, positions.slope, length, padded, work, maxima);
        for (int r = 0; r < ROWS; r++)
            inverse_sums[r] = softmax(work.scores + r * padded, work.weights + r * padded, begin, end, maxima[r]);
        uint16_t *place = output + first * output_stride;
        for (int d = 0; d < head_dim; d += 2 * LANES)
            weigh(head_dim, d, head_dim - d > LANES ? 2 : 1, rows, inverse_sums, begin, end, padded, work, place,
                  output_stride);
    }
}

INLINE void prepare(long head_dim) { (void)head_dim; }
INLINE void finish(void) {}

#include "pack.h"
