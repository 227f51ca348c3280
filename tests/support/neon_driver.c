/* Calls one function of a float32 kernel: arrays from standard input, numbers from the arguments, results to standard
 * output. test_neon.py says in which order. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int rope_attention(const float *, const float *, const float *, const int64_t *, const int64_t *, int64_t, int64_t,
                   int64_t, float *);
int normalized_rope_attention(const float *, const float *, const float *, const float *, const float *, float,
                              const int64_t *, const int64_t *, int64_t, int64_t, int64_t, float *);
int alibi_attention(const float *, const float *, const int64_t *, const int64_t *, int64_t, int64_t, int64_t, float *);
int relative_attention(const float *, const float *, int64_t, const int64_t *, const int64_t *, int64_t, int64_t,
                       int64_t, float *);
void add_norm(float *, const float *, const float *, const float *, float, int64_t, int64_t, float *, int32_t, int32_t);
void gate(const float *, float *, int64_t, int64_t, int32_t);

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory) exit(10);
    return memory;
}

static void *take(size_t count, size_t size) {
    void *array = allocate(count * size);
    if (fread(array, size, count, stdin) != count) exit(11);
    return array;
}

static void give(const float *array, size_t count) {
    if (fwrite(array, sizeof *array, count, stdout) != count) exit(12);
}

static float *floats(size_t count) { return take(count, sizeof(float)); }

/* `last` is the longest length, or the biases' span. */
static int attention(const char *function, int64_t num_tokens, int64_t num_sequences, int64_t num_heads,
                     int64_t head_dim, int64_t last) {
    const int64_t *starts = take(num_sequences, sizeof *starts), *lengths = take(num_sequences, sizeof *lengths);
    const float *qkv = floats(3 * num_tokens * num_heads * head_dim);
    float *output = allocate(num_tokens * num_heads * head_dim * sizeof *output);
    int status;
    if (strstr(function, "rope")) {
        const float *cosines = floats(last * head_dim), *sines = floats(last * head_dim);
        if (!strcmp(function, "rope_attention")) {
            status = rope_attention(qkv, cosines, sines, starts, lengths, num_sequences, num_heads, head_dim, output);
        } else {
            const float *query_weight = floats(num_heads * head_dim), *key_weight = floats(num_heads * head_dim);
            status = normalized_rope_attention(qkv, cosines, sines, query_weight, key_weight, 1e-5f, starts, lengths,
                                               num_sequences, num_heads, head_dim, output);
        }
    } else if (!strcmp(function, "relative_attention")) {
        const float *biases = floats(num_heads * (2 * last + 1));
        status = relative_attention(qkv, biases, last, starts, lengths, num_sequences, num_heads, head_dim, output);
    } else {
        const float *slopes = floats(num_heads);
        status = alibi_attention(qkv, slopes, starts, lengths, num_sequences, num_heads, head_dim, output);
    }
    give(output, num_tokens * num_heads * head_dim);
    return status;
}

int main(int argc, char **argv) {
    const char *function = argv[1];
    int64_t numbers[5] = {0};
    for (int i = 2; i < argc; i++) numbers[i - 2] = atoll(argv[i]);
    if (strstr(function, "attention"))
        return attention(function, numbers[0], numbers[1], numbers[2], numbers[3],
                         numbers[4]);
    const int64_t rows = numbers[0], dim = numbers[1];
    float *result = allocate(rows * dim * sizeof *result);
    if (!strcmp(function, "gate")) {
        gate(floats(2 * rows * dim), result, rows, dim, numbers[2]);
    } else {
        float *x = floats(rows * dim), *delta = floats(rows * dim), *weight = floats(dim);
        const float *bias = numbers[4] ? floats(dim) : NULL;
        add_norm(x, delta, weight, bias, 1e-5f, rows, dim, result, numbers[2], numbers[3]);
        give(x, rows * dim);
    }
    give(result, rows * dim);
    return 0;
}
