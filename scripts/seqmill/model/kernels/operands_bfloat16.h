/* One head's queries, keys and values as operands of bfloat16 dot products, for AVX512-BF16 and for AMX tiles.
 *
 * A kernel defines ROWS, the queries of a block, before it includes this file.
 */
#include "bfloat16.h"

enum { KEY_BLOCK = 32 };

typedef uint16_t element;

typedef struct {
    uint32_t *keys;    /* [block of LANES keys][pair of dimensions][key]: pairs of bfloat16 */
    uint32_t *values;  /* [pair of keys][dimension, padded to LANES]: pairs of bfloat16 */
    float *scores;     /* [ROWS][row] */
    uint16_t *weights; /* [ROWS][row] */
    long row;          /* longer than the padded length: rows a multiple of 4096 bytes apart would share cache lines */
} Workspace;

INLINE long padded_length(long length) { return (length + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK; }

INLINE long padded_width(long head_dim) { return (head_dim + LANES - 1) / LANES * LANES; }

INLINE size_t workspace_bytes(long longest, long head_dim) {
    const size_t padded = padded_length(longest);
    return padded * (2 * head_dim + 2 * padded_width(head_dim)) + 6 * ROWS * (padded + KEY_BLOCK);
}

INLINE Workspace arrange(long longest, long head_dim, char *memory) {
    const long padded = padded_length(longest), row = padded + KEY_BLOCK;
    char *values = memory + padded * 2 * head_dim, *scores = values + padded * 2 * padded_width(head_dim);
    return (Workspace){(uint32_t *)memory, (uint32_t *)values, (float *)scores,
                       (uint16_t *)(scores + 4 * ROWS * row), row};
}

/* Fetch the next head's values of one token, which follow in memory, while this head is computed. */
INLINE void prefetch_next_head(int head_dim, const uint16_t *x) {
    for (int d = 0; d < head_dim; d += 32) _mm_prefetch((const char *)(x + head_dim + d), _MM_HINT_T0);
}

/* The mean and 1 / spread of one token's query or key, over all heads. Its second reading comes from the L1 cache. */
INLINE void measure(const uint16_t *x, long width, float eps, float *mean, float *scale) {
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (long d = 0; d < width; d += LANES) {
        const __mmask16 live = width - d < LANES ? lane_mask((int)(width - d)) : 0xffff;
        sum = _mm512_add_ps(sum, to_float(_mm256_maskz_loadu_epi16(live, x + d)));
    }
    *mean = _mm512_reduce_add_ps(sum) / (float)width;
    for (long d = 0; d < width; d += LANES) {
        const __mmask16 live = width - d < LANES ? lane_mask((int)(width - d)) : 0xffff;
        const __m512 values = to_float(_mm256_maskz_loadu_epi16(live, x + d));
        const __m512 centered = _mm512_maskz_sub_ps(live, values, _mm512_set1_ps(*mean));
        squares = _mm512_fmadd_ps(centered, centered, squares);
    }
    *scale = inverse_spread(_mm512_reduce_add_ps(squares) / (float)width, eps);
}

/* 16 values of dimensions d and later after the layer norm at position t, times `scale`. */
INLINE __m512 normalize(__m512 values, Norm norm, long t, float scale, int d, __mmask16 live) {
    const __m512 centered = _mm512_sub_ps(values, _mm512_set1_ps(norm.means[t]));
    const __m512 normal = _mm512_mul_ps(centered, _mm512_set1_ps(norm.scales[t] * scale));
    return _mm512_mul_ps(normal, _mm512_maskz_loadu_ps(live, norm.weight + d));
}

/* Load dimensions d to d + 15 of both halves of a query or key at position t: the lower and upper half of the result.
 *
 * A rotation turns them by halves of the dimension, after the norm if any, times `scale`, and rounds once. Lanes past a
 * half are 0.
 */
INLINE __m512i load_halves(int head_dim, enum kind kind, const uint16_t *x, long t, Positions positions, Norm norm,
                           float scale, int d) {
    const int half = head_dim / 2;
    const __mmask16 live = lane_mask(half - d);
    __m256i low = _mm256_maskz_loadu_epi16(live, x + d), high = _mm256_maskz_loadu_epi16(live, x + d + half);
    if (rotates(kind)) {
        const float *cosines = positions.cosines + t * head_dim + d, *sines = positions.sines + t * head_dim + d;
        const __m512 factor = _mm512_set1_ps(scale);
        __m512 a = to_float(low), b = to_float(high);
        a = kind == ROTATION ? _mm512_mul_ps(a, factor) : normalize(a, norm, t, scale, d, live);
        b = kind == ROTATION ? _mm512_mul_ps(b, factor) : normalize(b, norm, t, scale, d + half, live);
        low = to_bfloat16(_mm512_fmsub_ps(a, _mm512_maskz_loadu_ps(live, cosines),
                                          _mm512_mul_ps(b, _mm512_maskz_loadu_ps(live, sines))));
        high = to_bfloat16(_mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(live, cosines + half),
                                           _mm512_mul_ps(a, _mm512_maskz_loadu_ps(live, sines + half))));
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* Place a block of ROWS queries row by row. A rotation rounds anyway, so it applies the scale of scores as well.
 *
 * The last block repeats the last query.
 */
INLINE void place_queries(int head_dim, enum kind kind, const uint16_t *queries, long stride, Positions positions,
                          float scale, long first, long length, uint16_t placed[ROWS][MAX_HEAD_DIM]) {
    const int half = head_dim / 2;
    for (int r = 0; r < ROWS; r++) {
        const long t = first + r < length ? first + r : length - 1;
        prefetch_next_head(head_dim, queries + t * stride);
        for (int d = 0; d < half; d += LANES) {
            const __m512i both = load_halves(head_dim, kind, queries + t * stride, t, positions, positions.query_norm,
                                             scale, d);
            /* Lanes past the lower half are overwritten by the upper half. */
            _mm256_storeu_si256((__m256i *)(placed[r] + d), _mm512_castsi512_si256(both));
            _mm256_storeu_si256((__m256i *)(placed[r] + d + half), _mm512_extracti64x4_epi64(both, 1));
        }
    }
}

/* Make infinite values NaN. An infinite key can have scores of -infinity, which would be weights of zero, finite and
 * wrong. */
INLINE __m512i show_infinity(__m512i values) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const __mmask32 odd = _mm512_cmpeq_epi16_mask(_mm512_and_si512(values, exponent), exponent);
    return _mm512_mask_mov_epi16(values, odd, _mm512_set1_epi16(0x7fff));
}

/* Arrange one head's keys; pad with zeros.
 *
 * Returns, for linear biases, the largest norm of a key; infinity if a key is not finite.
 */
INLINE float pack_keys(int head_dim, enum kind kind, const uint16_t *keys, long stride, Positions positions,
                       long length, long padded, uint32_t *packed) {
    const int half = head_dim / 2, pairs = head_dim / 2;
    __m512 largest = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (long first = 0; first < padded; first += LANES, packed += pairs * LANES) {
        __m512 squared = _mm512_setzero_ps();
        for (int d = 0; d < half; d += LANES) {
            __m512i rows[LANES];
            for (int r = 0; r < LANES; r++) {
                const long t = first + r;
                rows[r] = _mm512_setzero_si512();
                if (t >= length) continue;
                rows[r] = load_halves(head_dim, kind, keys + t * stride, t, positions, positions.key_norm, 1.0f, d);
                if (kind == RELATIVE_BIASES) rows[r] = show_infinity(rows[r]);
                if (d == 0) prefetch_next_head(head_dim, keys + t * stride);
            }
            transpose(rows);
            const int live = half - d < LANES ? (half - d) / 2 : LANES / 2; /* pairs of each half */
            for (int pair = 0; pair < live; pair++) {
                const __m512i low = rows[pair], high = rows[LANES / 2 + pair];
                _mm512_storeu_si512(packed + (d / 2 + pair) * LANES, low);
                _mm512_storeu_si512(packed + ((d + half) / 2 + pair) * LANES, high);
                if (kind == LINEAR_BIASES) {
                    squared = _mm512_dpbf16_ps(squared, (__m512bh)low, (__m512bh)low);
                    squared = _mm512_dpbf16_ps(squared, (__m512bh)high, (__m512bh)high);
                }
            }
        }
        odd |= _mm512_cmp_ps_mask(squared, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        largest = _mm512_max_ps(largest, squared);
    }
    return odd ? INFINITY : sqrtf(_mm512_reduce_max_ps(largest));
}

/* Arrange one head's values; pad with zeros. Returns, for linear biases, whether a value is not finite. */
INLINE int pack_values(int head_dim, enum kind kind, const uint16_t *values, long stride, long length, long padded,
                       uint32_t *packed) {
    const int width = (int)padded_width(head_dim);
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 odd = 0;
    for (long t = 0; t < padded; t += 2) {
        const uint16_t *x = values + t * stride;
        prefetch_next_head(head_dim, x);
        prefetch_next_head(head_dim, x + stride);
        for (int d = 0; d < width; d += LANES) {
            const __mmask16 live = lane_mask(head_dim - d);
            const __m256i first = _mm256_maskz_loadu_epi16(t < length ? live : 0, x + d);
            const __m256i second = _mm256_maskz_loadu_epi16(t + 1 < length ? live : 0, x + stride + d);
            const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
            _mm512_storeu_si512(packed + t / 2 * width + d, pair);
            if (kind == LINEAR_BIASES)
                odd |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pair, exponent), exponent);
        }
    }
    return odd != 0;
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

/* Write the means of 16 dimensions (or of those left) from weighted sums. */
INLINE void write_means(int left, __m512 sums, float inverse_sum, uint16_t *output) {
    const __m256i means = to_bfloat16(_mm512_mul_ps(sums, _mm512_set1_ps(inverse_sum)));
    if (left >= LANES)
        _mm256_storeu_si256((__m256i *)output, means);
    else
        _mm256_mask_storeu_epi16(output, lane_mask(left), means);
}
