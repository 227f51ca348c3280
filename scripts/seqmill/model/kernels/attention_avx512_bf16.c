/* Softmax attention over a pack of sequences, in bfloat16 on AVX512-BF16, with any kind of positions: see positions.h.
 *
 * A head is computed in blocks of ROWS queries: scores in float32 by bfloat16 dot products, exact softmax over
 * the whole row (no rescaling), weights rounded to bfloat16, weighted sum of the values in float32. The
 * working memory is 6 * ROWS bytes per key, plus the keys and values of one head: for proteins it stays in the cache.
 *
 * Tuned on AMD's Zen 4. At length 350 the dot products alone, one instruction a cycle, would take 55 % (head dimension
 * 16) to 70 % (64) of the time measured there.
 * PyTorch's kernel is 3 to 5 times slower at ESM-2's head dimensions (16 to 64), for every dtype; see
 * docs/explanation/performance.md.
 */
enum { ROWS = 8 };

#include "operands_bfloat16.h"

/* Two neighboring bfloat16 values as one element of a dot product's operand. */
INLINE __m512bh broadcast_pair(const uint16_t *pairs, long pair) {
    int32_t bits;
    memcpy(&bits, pairs + 2 * pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

/* Compute the scores of ROWS queries from `first` on with the keys from `begin` to `end`, in units of log2;
 * write each row's maximum to `maxima`. */
INLINE void score(int head_dim, enum kind kind, uint16_t queries[ROWS][MAX_HEAD_DIM], long first, long begin, long end,
                  float scale, Positions positions, long length, Workspace work, __m512 maxima[ROWS]) {
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
                const __m512 step = _mm512_set1_ps(positions.slope), factor = _mm512_set1_ps(scale);
                a[r] = _mm512_fmsub_ps(a[r], factor, _mm512_mul_ps(step, _mm512_abs_ps(ahead)));
                b[r] = _mm512_fmsub_ps(b[r], factor, _mm512_mul_ps(step, _mm512_abs_ps(far)));
            }
        if (kind == RELATIVE_BIASES)
            for (int r = 0; r < ROWS; r++) {
                const float *biases = positions.biases + (key - first - r);
                a[r] = _mm512_fmadd_ps(a[r], _mm512_set1_ps(scale), _mm512_loadu_ps(biases));
                b[r] = _mm512_fmadd_ps(b[r], _mm512_set1_ps(scale), _mm512_loadu_ps(biases + LANES));
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
            _mm512_storeu_ps(work.scores + r * work.row + key, a[r]);
            _mm512_storeu_ps(work.scores + r * work.row + key + LANES, b[r]);
        }
    }
}

/* Add the weighted values of 32 keys from `key` on, for one or two vectors of dimensions from dimension `first` on. */
INLINE void weigh(int head_dim, int first, int vectors, long key, Workspace work, __m512 sums[ROWS][2]) {
    const int width = (int)padded_width(head_dim);
    for (long pair = key / 2; pair < (key + KEY_BLOCK) / 2; pair++) {
        const uint32_t *row = work.values + pair * width + first;
        const __m512bh v0 = (__m512bh)_mm512_loadu_si512(row);
        const __m512bh v1 = vectors > 1 ? (__m512bh)_mm512_loadu_si512(row + LANES) : v0;
        for (int r = 0; r < ROWS; r++) {
            const __m512bh weight = broadcast_pair(work.weights + r * work.row, pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], v0, weight);
            if (vectors > 1) sums[r][1] = _mm512_dpbf16_ps(sums[r][1], v1, weight);
        }
    }
}

/* Compute the softmax weights and the mean of the values.
 *
 * The weights of a block are computed between the sums of the blocks before: the processor does both at once, because
 * half of an exponential's instructions need no multiplier.
 */
INLINE void average(int head_dim, int rows, const __m512 maxima[ROWS], long begin, long end, Workspace work,
                    uint16_t *output, long output_stride) {
    float inverse_sums[ROWS];
    __m512 totals[ROWS], tops[ROWS];
    for (int r = 0; r < ROWS; r++) {
        tops[r] = _mm512_set1_ps(_mm512_reduce_max_ps(maxima[r]));
        totals[r] = exponentiate(work.scores + r * work.row + begin, tops[r], work.weights + r * work.row + begin,
                                 _mm512_setzero_ps());
    }
    for (int d = 0; d < head_dim; d += 2 * LANES) {
        const int vectors = head_dim - d > LANES ? 2 : 1;
        __m512 sums[ROWS][2];
        for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (long key = begin; key < end; key += KEY_BLOCK) {
            const long next = key + KEY_BLOCK;
            if (d == 0 && next < end)
                for (int r = 0; r < ROWS; r++)
                    totals[r] = exponentiate(work.scores + r * work.row + next, tops[r], work.weights + r * work.row + next,
                                             totals[r]);
            weigh(head_dim, d, vectors, key, work, sums);
        }
        for (int r = 0; r < rows; r++) {
            if (d == 0) inverse_sums[r] = 1.0f / _mm512_reduce_add_ps(totals[r]);
            for (int v = 0; v < vectors; v++)
                write_means(head_dim - d - v * LANES, sums[r][v], inverse_sums[r],
                            output + r * output_stride + d + v * LANES);
        }
    }
}

/* Compute one head of one sequence. `head_dim` and `kind` are constants where this is inlined. */
INLINE void attend(int head_dim, enum kind kind, const uint16_t *queries, const uint16_t *keys, const uint16_t *values,
                   long stride, Positions positions, long length, long longest, char *memory, uint16_t *output,
                   long output_stride) {
    const Workspace work = arrange(longest, head_dim, memory);
    const long padded = padded_length(length);
    const float scale = score_scale(kind, head_dim);
    float largest_key = pack_keys(head_dim, kind, keys, stride, positions, length, padded, work.keys);
    if (pack_values(head_dim, kind, values, stride, length, padded, work.values)) largest_key = INFINITY;
    for (long first = 0; first < length; first += ROWS) {
        const int rows = length - first < ROWS ? (int)(length - first) : ROWS;
        uint16_t placed[ROWS][MAX_HEAD_DIM];
        place_queries(head_dim, kind, queries, stride, positions, scale, first, length, placed);
        long begin = 0, end = padded;
        if (kind == LINEAR_BIASES)
            find_span(head_dim, queries, keys, stride, first, rows, scale, positions.slope, largest_key, length, padded,
                      &begin, &end);
        __m512 maxima[ROWS];
        score(head_dim, kind, placed, first, begin, end, scale, positions, length, work, maxima);
        average(head_dim, rows, maxima, begin, end, work, output + first * output_stride, output_stride);
    }
}

INLINE void prepare(long head_dim) { (void)head_dim; }
INLINE void finish(void) {}

#include "pack.h"
