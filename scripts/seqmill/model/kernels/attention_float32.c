/* Softmax attention over a pack of sequences, in float32 on AVX512, AVX2 or NEON, with any kind of positions: see
 * positions.h.
 *
 * A head is computed in blocks of ROWS queries: scores, exact softmax over the whole row (no rescaling), weighted sum of
 * the values. Each score and each output is a sum in the order of dimensions and keys, so the bits are the same on every
 * processor. The working memory is 4 * ROWS bytes per key, plus the keys and values of one head: for proteins it stays in
 * the cache.
 */
#include "vectors.h"

/* A block's sums fill the registers: 16 of AVX512, 8 of AVX2's 16, 16 of NEON's 32. */
#ifdef __AVX512F__
enum { ROWS = 8, VECTORS = 2 };
#else
enum { ROWS = 4, VECTORS = 1 };
#endif
enum { KEY_BLOCK = VECTORS * LANES, AHEAD = 8 };
enum { SPAN_ROWS = 8, SPAN_KEYS = 32 }; /* multiples of all ROWS and KEY_BLOCKs: the same keys count everywhere */

typedef float element;

typedef struct {
    float *keys;   /* [block of LANES keys][dimension][key] */
    float *values; /* [key][dimension, padded to LANES] */
    float *scores; /* [ROWS][padded length]; the weights replace them */
} Workspace;

INLINE size_t padded_length(long length) { return (length + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK; }
INLINE size_t padded_width(long head_dim) { return (head_dim + LANES - 1) / LANES * LANES; }

INLINE size_t workspace_bytes(long longest, long head_dim) {
    return padded_length(longest) * (head_dim + padded_width(head_dim) + ROWS) * sizeof(float);
}

INLINE Workspace arrange(long longest, long head_dim, char *memory) {
    float *keys = (float *)memory, *values = keys + padded_length(longest) * head_dim;
    return (Workspace){keys, values, values + padded_length(longest) * padded_width(head_dim)};
}

/* Tokens of one head are far apart in memory, so the processor does not foresee them. */
INLINE void prefetch(int head_dim, const float *x) {
    for (int d = 0; d < head_dim; d += 16) __builtin_prefetch(x + d);
}

/* A query or key with its position, times `scale`. */
INLINE void place(int head_dim, enum kind kind, const float *restrict x, long t, Positions positions, Norm norm,
                  float scale, float *restrict placed) {
    const int half = head_dim / 2;
    float normal[MAX_HEAD_DIM];
    if (!rotates(kind)) {
        for (int d = 0; d < head_dim; d++) placed[d] = x[d] * scale;
        return;
    }
    if (kind == NORMALIZED_ROTATION) {
        for (int d = 0; d < head_dim; d++) normal[d] = (x[d] - norm.means[t]) * norm.scales[t] * norm.weight[d];
        x = normal;
    }
    const float *restrict cosines = positions.cosines + t * head_dim, *restrict sines = positions.sines + t * head_dim;
    for (int d = 0; d < half; d++) {
        const float a = x[d], b = x[d + half];
        placed[d] = (a * cosines[d] - b * sines[d]) * scale;
        placed[d + half] = (b * cosines[d + half] + a * sines[d + half]) * scale;
    }
}

/* The mean and 1 / spread of one token's query or key, over all heads. */
INLINE void measure(const float *x, long width, float eps, float *mean, float *scale) {
    const long whole = width / LANES * LANES;
    const int left = (int)(width - whole);
    Floats sum = load_first(x + whole, left), squares = splat(0);
    for (long d = 0; d < whole; d += LANES) sum = add(sum, load(x + d));
    *mean = sum_of_lanes(sum) / (float)width;
    for (long d = 0; d < whole; d += LANES) {
        const Floats centered = subtract(load(x + d), splat(*mean));
        squares = multiply_add(centered, centered, squares);
    }
    const Floats centered = first_lanes(left, subtract(load_first(x + whole, left), splat(*mean)), splat(0));
    squares = multiply_add(centered, centered, squares);
    *scale = inverse_spread(sum_of_lanes(squares) / (float)width, eps);
}

INLINE float dot(int head_dim, const float *x, const float *y) {
    Floats sum = splat(0);
    for (int d = 0; d < head_dim; d += LANES) {
        const int count = head_dim - d < LANES ? head_dim - d : LANES;
        sum = multiply_add(load_first(x + d, count), load_first(y + d, count), sum);
    }
    return sum_of_lanes(sum);
}

/* Arrange one head's keys and values; pad with zeros.
 *
 * Returns, for linear biases, the largest norm of a key; infinity if a key or a value is not finite.
 */
INLINE float arrange_keys_and_values(int head_dim, enum kind kind, const float *keys, const float *values, long stride,
                                     Positions positions, long length, long padded, Workspace work) {
    const int width = (int)padded_width(head_dim);
    float placed[MAX_HEAD_DIM], largest_key = 0, odd = 0;
    for (long t = 0; t < padded; t++) {
        float *column = work.keys + t / LANES * head_dim * LANES + t % LANES, *row = work.values + t * width;
        if (t >= length) {
            for (int d = 0; d < head_dim; d++) column[d * LANES] = 0;
            memset(row, 0, width * sizeof *row);
            continue;
        }
        prefetch(head_dim, keys + (t + AHEAD) * stride);
        prefetch(head_dim, values + (t + AHEAD) * stride);
        place(head_dim, kind, keys + t * stride, t, positions, positions.key_norm, 1.0f, placed);
        /* An infinite key can have scores of -infinity, which would be weights of zero, finite and wrong. */
        if (kind == RELATIVE_BIASES)
            for (int d = 0; d < head_dim; d++) placed[d] += placed[d] * 0.0f; /* infinity: NaN */
        for (int d = 0; d < head_dim; d++) column[d * LANES] = placed[d];
        memcpy(row, values + t * stride, head_dim * sizeof *row);
        memset(row + head_dim, 0, (width - head_dim) * sizeof *row);
        if (kind == LINEAR_BIASES) {
            const float squared = dot(head_dim, placed, placed);
            if (!(squared <= largest_key)) largest_key = squared < INFINITY ? squared : INFINITY; /* NaN: infinity */
            for (int d = 0; d < head_dim; d++) odd += row[d] * 0.0f; /* NaN if a value is infinite or NaN */
        }
    }
    return odd == 0 ? sqrtf(largest_key) : INFINITY;
}

/* Find the range of keys, in blocks of SPAN_KEYS, whose weights count for SPAN_ROWS queries from `first` on.
 *
 * A score is at most |query| |key| minus its bias, and a query's largest score is at least that with its own
 * key, which has no bias. So each key beyond some distance has less than 2^-NEGLIGIBLE of the total weight, and
 * weights fall with distance: all such keys together stay below float32's rounding. For steep heads the time
 * thus grows with the length, not with its square. The distance depends only on this sequence; if it is not a
 * number, no key is skipped.
 */
INLINE void find_span(int head_dim, const float *queries, const float *keys, long stride, long first, float scale,
                      float slope, float largest_key, long length, long padded, long *begin, long *end) {
    *begin = 0;
    *end = padded;
    if (!(slope * (float)length > NEGLIGIBLE)) return;
    long from = length, to = 0;
    for (long t = first; t < first + SPAN_ROWS && t < length; t++) {
        const float *query = queries + t * stride;
        const float best = sqrtf(dot(head_dim, query, query)) * largest_key;
        const float own = dot(head_dim, query, keys + t * stride);
        const float distance = ((best - own) * scale + NEGLIGIBLE) / slope;
        if (!(distance < (float)length)) return;
        if (t - (long)distance < from) from = t - (long)distance;
        if (t + (long)distance > to) to = t + (long)distance;
    }
    if (from > 0) *begin = from / SPAN_KEYS * SPAN_KEYS;
    to = (to / SPAN_KEYS + 1) * SPAN_KEYS;
    if (to < padded) *end = to;
}

/* Compute the scores of ROWS queries from `first` on with the keys from `begin` to `end`, in units of log2;
 * write each row's maximum to `maxima`. */
INLINE void score(int head_dim, enum kind kind, float queries[ROWS][MAX_HEAD_DIM], long first, long begin, long end,
                  Positions positions, long length, long padded, Workspace work, float maxima[ROWS]) {
    static const float numbers[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Floats best[ROWS];
    for (int r = 0; r < ROWS; r++) best[r] = splat(MASKED);
    for (long key = begin; key < end; key += KEY_BLOCK) {
        const float *keys = work.keys + key * head_dim;
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] = splat(0);
        for (int d = 0; d < head_dim; d++) {
            Floats columns[VECTORS];
            for (int v = 0; v < VECTORS; v++) columns[v] = load(keys + (v * head_dim + d) * LANES);
            for (int r = 0; r < ROWS; r++) {
                const Floats query = splat(queries[r][d]);
                for (int v = 0; v < VECTORS; v++) sums[r][v] = multiply_add(query, columns[v], sums[r][v]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) {
                const long place = key + v * LANES;
                Floats sum = sums[r][v];
                if (kind == LINEAR_BIASES) {
                    const Floats ahead = add(splat((float)(place - first - r)), load(numbers));
                    sum = subtract(sum, multiply(splat(positions.slope), absolute(ahead)));
                }
                if (kind == RELATIVE_BIASES) sum = add(sum, load(positions.biases + (place - first - r)));
                if (place + LANES > length)
                    sum = first_lanes(place < length ? (int)(length - place) : 0, sum, splat(MASKED));
                best[r] = largest(best[r], sum);
                store(work.scores + r * padded + place, sum);
            }
    }
    for (int r = 0; r < ROWS; r++) maxima[r] = largest_lane(best[r]);
}

/* Replace scores by unnormalized softmax weights; return 1 / their sum. */
INLINE float softmax(float *scores, long begin, long end, float maximum) {
    Floats sum = splat(0);
    for (long key = begin; key < end; key += LANES) {
        const Floats weight = exp2_of(subtract(load(scores + key), splat(maximum)));
        sum = add(sum, weight);
        store(scores + key, weight);
    }
    return 1.0f / sum_of_lanes(sum);
}

/* Compute the weighted sum of the values for up to VECTORS vectors of dimensions, from dimension `first` on. */
INLINE void weigh(int head_dim, int first, int rows, const float *inverse_sums, long begin, long end, long padded,
                  Workspace work, float *output, long output_stride) {
    const int width = (int)padded_width(head_dim);
    const int vectors = (width - first) / LANES < VECTORS ? (width - first) / LANES : VECTORS;
    Floats sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = splat(0);
    for (long key = begin; key < end; key++) {
        const float *row = work.values + key * width + first;
        for (int v = 0; v < vectors; v++) {
            const Floats value = load(row + v * LANES);
            for (int r = 0; r < ROWS; r++)
                sums[r][v] = multiply_add(splat(work.scores[r * padded + key]), value, sums[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const int dimension = first + v * LANES, left = head_dim - dimension;
            const Floats mean = multiply(sums[r][v], splat(inverse_sums[r]));
            if (left >= LANES)
                store(output + r * output_stride + dimension, mean);
            else
                store_first(output + r * output_stride + dimension, left, mean);
        }
}

/* Compute one head of one sequence. `head_dim` and `kind` are constants where this is inlined. */
INLINE void attend(int head_dim, enum kind kind, const float *queries, const float *keys, const float *values,
                   long stride, Positions positions, long length, long longest, char *memory, float *output,
                   long output_stride) {
    const Workspace work = arrange(longest, head_dim, memory);
    const long padded = padded_length(length);
    const float scale = score_scale(kind, head_dim);
    const float largest_key =
        arrange_keys_and_values(head_dim, kind, keys, values, stride, positions, length, padded, work);
    long begin = 0, end = padded;
    for (long first = 0; first < length; first += ROWS) {
        const int rows = length - first < ROWS ? (int)(length - first) : ROWS;
        float placed[ROWS][MAX_HEAD_DIM], maxima[ROWS], inverse_sums[ROWS];
        for (int r = 0; r < ROWS; r++) {
            const long t = r < rows ? first + r : length - 1; /* the last block repeats the last query */
            prefetch(head_dim, queries + (t + ROWS) * stride);
            place(head_dim, kind, queries + t * stride, t, positions, positions.query_norm, scale, placed[r]);
        }
        if (kind == LINEAR_BIASES && first % SPAN_ROWS == 0)
            find_span(head_dim, queries, keys, stride, first, scale, positions.slope, largest_key, length, padded, &begin,
                      &end);
        score(head_dim, kind, placed, first, begin, end, positions, length, padded, work, maxima);
        for (int r = 0; r < ROWS; r++) inverse_sums[r] = softmax(work.scores + r * padded, begin, end, maxima[r]);
        for (int d = 0; d < head_dim; d += VECTORS * LANES)
            weigh(head_dim, d, rows, inverse_sums, begin, end, padded, work, output + first * output_stride,
                  output_stride);
    }
}

INLINE void prepare(long head_dim) { (void)head_dim; }
INLINE void finish(void) {}

#include "pack.h"
