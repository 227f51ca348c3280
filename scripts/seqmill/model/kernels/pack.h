/* The walk over a pack's sequences and heads, and the two functions that every attention library exports.
 *
 * A kernel includes this file after it has defined:
 *   element                             the type of queries, keys, values and outputs in memory
 *   workspace_bytes(longest, head_dim)  the memory for one head of the longest sequence
 *   prepare(head_dim)                   what the thread needs before its first head
 *   attend(...)                         one head of one sequence; inlined, so that head_dim and kind are constants
 *   finish()                            the end of the thread's work
 * One call computes all heads of the given sequences, one after the other, on the calling thread. A sequence's result
 * depends only on that sequence.
 */
#include <stdlib.h>

INLINE int attend_pack(enum kind kind, const element *qkv, const float *cosines, const float *sines,
                       const float *slopes, const int64_t *starts, const int64_t *lengths, int64_t num_sequences,
                       int64_t num_heads, int64_t head_dim, element *output) {
    long longest = 0;
    for (long i = 0; i < num_sequences; i++)
        if (lengths[i] > longest) longest = lengths[i];
    char *memory = aligned_alloc(64, (workspace_bytes(longest, head_dim) + 63) / 64 * 64);
    if (!memory) return 1;
    const long stride = 3 * num_heads * head_dim, output_stride = num_heads * head_dim;
    int status = 0;
    prepare(head_dim);
    for (long i = 0; i < num_sequences && !status; i++)
        for (long h = 0; h < num_heads; h++) {
            const element *q = qkv + starts[i] * stride + h * head_dim;
            const element *k = q + output_stride, *v = k + output_stride;
            element *place = output + starts[i] * output_stride + h * head_dim;
            const Positions positions = {cosines, sines, kind == LINEAR_BIASES ? slopes[h] * LOG2_E : 0.0f};
#define CASE(n)                                                                                        \
    case n:                                                                                            \
        attend(n, kind, q, k, v, stride, positions, lengths[i], longest, memory, place, output_stride); \
        break;
            switch (head_dim) {
                CASE(16) CASE(24) CASE(32) CASE(64) CASE(128)
                default: status = 2;
            }
        }
    finish();
    free(memory);
    return status;
}

/* Let every sequence of a pack attend to itself.
 *
 * qkv: [tokens][3][num_heads][head_dim]; output: [tokens][num_heads][head_dim]; starts, lengths: the sequences, in
 * tokens; cosines, sines: float [longest length][head_dim]; slopes: float [num_heads].
 * Returns 0 on success, 1 if memory is short, 2 if head_dim is not supported.
 */
int rope_attention(const element *qkv, const float *cosines, const float *sines, const int64_t *starts,
                   const int64_t *lengths, int64_t num_sequences, int64_t num_heads, int64_t head_dim,
                   element *output) {
    return attend_pack(ROTATION, qkv, cosines, sines, NULL, starts, lengths, num_sequences, num_heads, head_dim,
                       output);
}

int alibi_attention(const element *qkv, const float *slopes, const int64_t *starts, const int64_t *lengths,
                    int64_t num_sequences, int64_t num_heads, int64_t head_dim, element *output) {
    return attend_pack(LINEAR_BIASES, qkv, NULL, NULL, slopes, starts, lengths, num_sequences, num_heads, head_dim,
                       output);
}
