/* Rotary position embedding and softmax attention over a pack of sequences, in bfloat16 on AVX512-BF16.
 *
 * One call does all heads of the given sequences, one after the other, on the calling thread. A head is
 * computed in blocks of ROWS queries: scores in float32 by bfloat16 dot products, exact softmax over the
 * whole row (no rescaling), weights rounded to bfloat16, weighted sum of the values in float32. A
 * sequence's result depends on that sequence alone. Scores never leave the cache: the working memory is
 * 6 * ROWS bytes a key, and keys and values of one head.
 *
 * Why not PyTorch's kernel: at ESM-2's head dimensions (16 to 64) it is 3 to 5 times slower, whatever the
 * dtype; see docs/performance.md.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 8, LANES = 16, KEY_BLOCK = 32, MAX_HEAD_DIM = 128 };

#define LOG2_E 1.44269504088896340736f
#define MASKED -1e30f /* far below any score, and finite */

#define INLINE static inline __attribute__((always_inline))

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

typedef struct {
    uint32_t *keys;   /* [block of LANES keys][pair of dimensions][key]: pairs of bfloat16 */
    uint32_t *values; /* [pair of keys][dimension, padded to LANES]: pairs of bfloat16 */
    float *scores;    /* [ROWS][padded length] */
    uint16_t *weights; /* [ROWS][padded length] */
} Workspace;

/* Lay one head's keys (rotated) and values out as the dot products want them; pad with zeros. */
INLINE void pack_keys_and_values(int head_dim, const uint16_t *keys, const uint16_t *values, long stride,
                                 const float *cosines, const float *sines, long length, long padded,
                                 Workspace work) {
    const int pairs = head_dim / 2, width = (head_dim + LANES - 1) / LANES * LANES;
    uint16_t rotated[MAX_HEAD_DIM];
    for (long t = 0; t < padded; t++) {
        uint32_t *column = work.keys + (t / LANES) * pairs * LANES + t % LANES;
        if (t < length)
            rotate(head_dim, keys + t * stride, cosines + t * head_dim, sines + t * head_dim, 1.0f, rotated);
        else
            memset(rotated, 0, sizeof rotated);
        for (int pair = 0; pair < pairs; pair++) memcpy(column + pair * LANES, rotated + 2 * pair, 4);
    }
    for (long t = 0; t < padded; t += 2) {
        uint32_t *row = work.values + (t / 2) * width;
        const uint16_t *first = values + t * stride, *second = first + stride;
        for (int d = 0; d < head_dim; d++) {
            const uint32_t low = t < length ? first[d] : 0, high = t + 1 < length ? second[d] : 0;
            row[d] = low | high << 16;
        }
        for (int d = head_dim; d < width; d++) row[d] = 0;
    }
}

/* Scores of ROWS queries with all keys, in units of log2; returns each row's maximum in `maxima`. */
INLINE void score(int head_dim, uint16_t queries[ROWS][MAX_HEAD_DIM], long length, long padded, Workspace work,
                  __m512 maxima[ROWS]) {
    const int pairs = head_dim / 2;
    for (int r = 0; r < ROWS; r++) maxima[r] = _mm512_set1_ps(MASKED);
    for (long key = 0; key < padded; key += KEY_BLOCK) {
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

/* Unnormalized softmax weights, rounded; returns one over the sum of the exact ones. */
INLINE float softmax(const float *scores, uint16_t *weights, long padded, __m512 maxima) {
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(maxima));
    __m512 sum = _mm512_setzero_ps();
    for (long key = 0; key < padded; key += LANES) {
        const __m512 weight = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + key), maximum));
        sum = _mm512_add_ps(sum, weight);
        _mm256_storeu_si256((__m256i *)(weights + key), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

/* Weighted sum of the values for one or two vectors of dimensions, from dimension `first` on. */
INLINE void weigh(int head_dim, int first, int vectors, int rows, const float *inverse_sums, long padded,
                  Workspace work, uint16_t *output, long output_stride) {
    const int width = (head_dim + LANES - 1) / LANES * LANES;
    __m512 sums[ROWS][2];
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (long pair = 0; pair < padded / 2; pair++) {
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

/* One head of one sequence. `head_dim` is a constant wherever this is inlined. */
INLINE void attend(int head_dim, const uint16_t *queries, const uint16_t *keys, const uint16_t *values, long stride,
                   const float *cosines, const float *sines, long length, Workspace work, uint16_t *output,
                   long output_stride) {
    const long padded = (length + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    const float scale = LOG2_E / sqrtf((float)head_dim);
    pack_keys_and_values(head_dim, keys, values, stride, cosines, sines, length, padded, work);
    for (long first = 0; first < length; first += ROWS) {
        const int rows = length - first < ROWS ? (int)(length - first) : ROWS;
        uint16_t rotated[ROWS][MAX_HEAD_DIM];
        for (int r = 0; r < ROWS; r++) {
            const long t = r < rows ? first + r : length - 1; /* the last block repeats the last query */
            rotate(head_dim, queries + t * stride, cosines + t * head_dim, sines + t * head_dim, scale, rotated[r]);
        }
        __m512 maxima[ROWS];
        float inverse_sums[ROWS];
        score(head_dim, rotated, length, padded, work, maxima);
        for (int r = 0; r < ROWS; r++)
            inverse_sums[r] = softmax(work.scores + r * padded, work.weights + r * padded, padded, maxima[r]);
        uint16_t *place = output + first * output_stride;
        for (int d = 0; d < head_dim; d += 2 * LANES)
            weigh(head_dim, d, head_dim - d > LANES ? 2 : 1, rows, inverse_sums, padded, work, place, output_stride);
    }
}

/* Attention of every sequence of a pack over itself.
 *
 * qkv: bfloat16 [tokens][3][num_heads][head_dim]; output: bfloat16 [tokens][num_heads][head_dim];
 * cosines, sines: float [longest length][head_dim]; starts, lengths: the sequences, in tokens.
 * Returns 0; 1 if memory is short; 2 if there is no code for head_dim.
 */
int rope_attention(const uint16_t *qkv, const float *cosines, const float *sines, const int64_t *starts,
                   const int64_t *lengths, int64_t num_sequences, int64_t num_heads, int64_t head_dim,
                   uint16_t *output) {
    long longest = 0;
    for (long i = 0; i < num_sequences; i++)
        if (lengths[i] > longest) longest = lengths[i];
    const size_t padded = (size_t)(longest + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    const size_t width = (size_t)(head_dim + LANES - 1) / LANES * LANES;
    const size_t keys = padded * head_dim * 2, values = padded * width * 2, scores = padded * ROWS * 4;
    char *memory = aligned_alloc(64, (keys + values + scores + padded * ROWS * 2 + 63) / 64 * 64);
    if (!memory) return 1;
    const Workspace work = {(uint32_t *)memory, (uint32_t *)(memory + keys), (float *)(memory + keys + values),
                            (uint16_t *)(memory + keys + values + scores)};
    const long stride = 3 * num_heads * head_dim, output_stride = num_heads * head_dim;
    int status = 0;
    for (long i = 0; i < num_sequences && !status; i++)
        for (long h = 0; h < num_heads; h++) {
            const uint16_t *q = qkv + starts[i] * stride + h * head_dim;
            const uint16_t *k = q + output_stride, *v = k + output_stride;
            uint16_t *place = output + starts[i] * output_stride + h * head_dim;
#define CASE(n)                                                                                                 \
    case n:                                                                                                     \
        attend(n, q, k, v, stride, cosines, sines, lengths[i], work, place, output_stride);                     \
        break;
            switch (head_dim) {
                CASE(16) CASE(24) CASE(32) CASE(64) CASE(128)
                default: status = 2;
            }
        }
    free(memory);
    return status;
}
