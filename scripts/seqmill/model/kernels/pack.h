/* The walk over a pack's sequences and heads, and the functions that every attention library exports.
 *
 * A kernel includes this file after it has defined:
 *   element                             the type of queries, keys, values and outputs in memory
 *   padded_length(length)               the keys in whole blocks; at least the queries in whole blocks
 *   workspace_bytes(longest, head_dim)  the memory for one head of the longest sequence
 *   measure(x, width, eps, mean, scale) the mean and 1 / spread of one token's query or key, over all heads
 *   prepare(head_dim)                   what the thread needs before its first head
 *   attend(...)                         one head of one sequence; inlined, so that head_dim and kind are constants
 *   finish()                            the end of the thread's work
 * One call computes all heads of the given sequences, one after the other, on the calling thread. A sequence's result
 * depends only on that sequence.
 */
#include <stdlib.h>

/* The positions of tokens for all heads, depending on `kind`. */
typedef struct {
    const float *cosines, *sines;
    const float *query_weight, *key_weight; /* NORMALIZED_ROTATION: [num_heads][head_dim] */
    float eps;
    const float *slopes; /* LINEAR_BIASES: [num_heads] */
    const float *biases; /* RELATIVE_BIASES: [num_heads][2 * span + 1] */
    long span;
} Tables;

/* The memory, in float32 values, for the positions of one sequence of the longest length. */
INLINE size_t position_values(enum kind kind, long longest) {
    if (kind == NORMALIZED_ROTATION) return 4 * longest;
    return kind == RELATIVE_BIASES ? 2 * padded_length(longest) : 0;
}

/* Measure the queries and keys of one sequence: write means and scales of queries, then those of keys. */
INLINE void measure_all(const element *q, long width, long length, float eps, float *measures) {
    for (long t = 0; t < length; t++)
        for (long part = 0; part < 2; part++) {
            float *place = measures + 2 * part * length + t;
            measure(q + (3 * t + part) * width, width, eps, place, place + length);
        }
}

/* Write one head's biases for all distances from -padded to padded - 1, in log2, so that neighboring keys have
 * neighboring biases; return the place of distance 0. Distances past the span have the bias of the span. */
INLINE const float *expand(const float *biases, long span, long padded, float *expanded) {
    for (long distance = -padded; distance < padded; distance++) {
        const long near = distance < -span ? -span : distance > span ? span : distance;
        expanded[padded + distance] = biases[span + near] * LOG2_E;
    }
    return expanded + padded;
}

/* The positions for head h of a sequence. `values` holds its measures, or becomes its expanded biases. */
INLINE Positions positions_of(enum kind kind, Tables tables, long h, long head_dim, long length, float *values) {
    Positions found = {.cosines = tables.cosines, .sines = tables.sines};
    if (kind == NORMALIZED_ROTATION) {
        found.query_norm = (Norm){tables.query_weight + h * head_dim, values, values + length};
        found.key_norm = (Norm){tables.key_weight + h * head_dim, values + 2 * length, values + 3 * length};
    }
    if (kind == LINEAR_BIASES) found.slope = tables.slopes[h] * LOG2_E;
    if (kind == RELATIVE_BIASES)
        found.biases = expand(tables.biases + h * (2 * tables.span + 1), tables.span, padded_length(length), values);
    return found;
}

INLINE int attend_pack(enum kind kind, const element *qkv, Tables tables, const int64_t *starts,
                       const int64_t *lengths, int64_t num_sequences, int64_t num_heads, int64_t head_dim,
                       element *output) {
    long longest = 0;
    for (long i = 0; i < num_sequences; i++)
        if (lengths[i] > longest) longest = lengths[i];
    const size_t bytes = (workspace_bytes(longest, head_dim) + 63) / 64 * 64;
    char *memory = aligned_alloc(64, bytes + (position_values(kind, longest) * sizeof(float) + 63) / 64 * 64);
    if (!memory) return 1;
    float *values = (float *)(memory + bytes);
    const long stride = 3 * num_heads * head_dim, output_stride = num_heads * head_dim;
    int status = 0;
    prepare(head_dim);
    for (long i = 0; i < num_sequences && !status; i++) {
        if (kind == NORMALIZED_ROTATION)
            measure_all(qkv + starts[i] * stride, output_stride, lengths[i], tables.eps, values);
        for (long h = 0; h < num_heads; h++) {
            const element *q = qkv + starts[i] * stride + h * head_dim;
            const element *k = q + output_stride, *v = k + output_stride;
            element *place = output + starts[i] * output_stride + h * head_dim;
            const Positions positions = positions_of(kind, tables, h, head_dim, lengths[i], values);
#define CASE(n)                                                                                        \
    case n:                                                                                            \
        attend(n, kind, q, k, v, stride, positions, lengths[i], longest, memory, place, output_stride); \
        break;
            switch (head_dim) {
                CASE(16) CASE(24) CASE(32) CASE(64) CASE(128)
                default: status = 2;
            }
        }
    }
    finish();
    free(memory);
    return status;
}

/* Let every sequence of a pack attend to itself.
 *
 * qkv: [tokens][3][num_heads][head_dim]; output: [tokens][num_heads][head_dim]; starts, lengths: the sequences, in
 * tokens; cosines, sines: float [longest length][head_dim].
 * Returns 0 on success, 1 if memory is short, 2 if head_dim is not supported.
 */
int rope_attention(const element *qkv, const float *cosines, const float *sines, const int64_t *starts,
                   const int64_t *lengths, int64_t num_sequences, int64_t num_heads, int64_t head_dim,
                   element *output) {
    const Tables tables = {.cosines = cosines, .sines = sines};
    return attend_pack(ROTATION, qkv, tables, starts, lengths, num_sequences, num_heads, head_dim, output);
}

/* As rope_attention, after a layer norm without bias of each token's query and of its key, over all heads.
 *
 * query_weight, key_weight: float [num_heads][head_dim]; eps: added to the variances.
 */
int normalized_rope_attention(const element *qkv, const float *cosines, const float *sines, const float *query_weight,
                              const float *key_weight, float eps, const int64_t *starts, const int64_t *lengths,
                              int64_t num_sequences, int64_t num_heads, int64_t head_dim, element *output) {
    const Tables tables = {
        .cosines = cosines, .sines = sines, .query_weight = query_weight, .key_weight = key_weight, .eps = eps};
    return attend_pack(NORMALIZED_ROTATION, qkv, tables, starts, lengths, num_sequences, num_heads, head_dim, output);
}

/* slopes: float [num_heads]. */
int alibi_attention(const element *qkv, const float *slopes, const int64_t *starts, const int64_t *lengths,
                    int64_t num_sequences, int64_t num_heads, int64_t head_dim, element *output) {
    const Tables tables = {.slopes = slopes};
    return attend_pack(LINEAR_BIASES, qkv, tables, starts, lengths, num_sequences, num_heads, head_dim, output);
}

/* Scores are not scaled. biases: float [num_heads][2 * span + 1]; that of key j for query i is at
 * span + clamp(j - i, -span, span). */
int relative_attention(const element *qkv, const float *biases, int64_t span, const int64_t *starts,
                       const int64_t *lengths, int64_t num_sequences, int64_t num_heads, int64_t head_dim,
                       element *output) {
    const Tables tables = {.biases = biases, .span = span};
    return attend_pack(RELATIVE_BIASES, qkv, tables, starts, lengths, num_sequences, num_heads, head_dim, output);
}
