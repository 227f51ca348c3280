/* Softmax attention over a pack of sequences, in bfloat16 on AMX tiles, with any kind of positions: see positions.h.
 *
 * As attention_avx512_bf16.c, with its packed keys and values, but both products are computed by tiles: 16 queries
 * times 32 keys, and 16 rows of weights times 32 keys' values. Between them AVX512 computes the exact softmax of whole
 * rows in float32. A tile product sums even and odd dimensions apart, so results differ from the other kernel's in the
 * last bits; a sequence's result still depends only on that sequence.
 *
 * This version has not run on a processor with AMX. The tests run its machine code with the tile instructions
 * emulated. A prototype with the same layout ran on an Intel processor of the Sapphire Rapids class: 6.8 us a token at
 * length 350 with 20 heads of 16 dimensions, 13.0 with 64, most of it in scalar rotation, packing and softmax, which
 * are in vectors here. Without its tile instructions this kernel takes 1.5 and 2.2 us at 3.6 GHz on AMD's Zen 4.
 * What follows is estimated from the prototype's and published figures, to be checked on Intel:
 * - A product takes 16 cycles, a tile load 8 from L1 and some 20 from L2, a store 16. At length 350 a token of one
 *   head takes 22 cycles for each 32 dimensions of its scores, 22 for their stores, and 11 for each 16 dimensions of its
 *   mean; the softmax takes 6 to 7 cycles for each 16 keys, so some 150. So the exponentials decide, and tile products
 *   run while AVX512 computes exponentials, as in `average`.
 * - Blocks of 32 queries would halve the loads of keys and values, but a row block of 32 * 350 scores fills L1, and its
 *   tiles leave none for the queries of 64 dimensions, which would be loaded again for each key.
 */
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ROWS = 16 };

#include "operands_bfloat16.h"

/* Tiles. Scores: 0 and 1, queries 2 to 5 (32 dimensions each), keys 6 and 7 (16 keys).
 * Means: 0 to 3 (16 dimensions each), weights 4, values 5. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* Compilers do not know that tile instructions read this memory, so this makes them finish all stores before. */
#define FINISH_STORES(memory) __asm__ volatile("" ::"r"(memory) : "memory")
#define LOAD_TILE(tile, base, row_bytes)    \
    do {                                    \
        FINISH_STORES(base);                \
        _tile_loadd(tile, base, row_bytes); \
    } while (0)

/* Ask Linux for the permission to use tiles, for the process. Returns 0 or the error's number. */
int prepare_processor(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) ? errno : 0;
}

/* Shape the calling thread's tiles. Queries and keys of less than 32 dimensions need smaller ones. */
INLINE void prepare(long head_dim) {
    const int pairs = head_dim / 2 < LANES ? (int)head_dim / 2 : LANES;
    TileShapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.rows[tile] = tile < 6 ? LANES : (uint8_t)pairs;
        shapes.row_bytes[tile] = tile == 2 ? (uint16_t)(4 * pairs) : 4 * LANES;
    }
    FINISH_STORES(&shapes);
    _tile_loadconfig(&shapes);
}

INLINE void finish(void) { _tile_release(); }

/* Compute the scores of ROWS queries with the keys from `begin` to `end`, without scale and biases of `kind`. */
INLINE void score(int head_dim, uint16_t queries[ROWS][MAX_HEAD_DIM], long begin, long end, Workspace work) {
    const int pairs = head_dim / 2, chunks = (head_dim + 31) / 32;
    LOAD_TILE(2, queries[0], 2 * MAX_HEAD_DIM);
    if (chunks > 1) LOAD_TILE(3, queries[0] + 32, 2 * MAX_HEAD_DIM);
    if (chunks > 2) LOAD_TILE(4, queries[0] + 64, 2 * MAX_HEAD_DIM);
    if (chunks > 3) LOAD_TILE(5, queries[0] + 96, 2 * MAX_HEAD_DIM);
    for (long key = begin; key < end; key += KEY_BLOCK) {
        const uint32_t *left = work.keys + key * pairs, *right = left + pairs * LANES;
        _tile_zero(0);
        _tile_zero(1);
#define ADD_PRODUCTS(chunk, query_tile)                             \
    if (chunk < chunks) {                                           \
        LOAD_TILE(6, left + chunk * LANES * LANES, 4 * LANES);      \
        _tile_dpbf16ps(0, query_tile, 6);                           \
        LOAD_TILE(7, right + chunk * LANES * LANES, 4 * LANES);     \
        _tile_dpbf16ps(1, query_tile, 7);                           \
    }
        ADD_PRODUCTS(0, 2)
        ADD_PRODUCTS(1, 3)
        ADD_PRODUCTS(2, 4)
        ADD_PRODUCTS(3, 5)
        _tile_stored(0, work.scores + key, 4 * work.row);
        _tile_stored(1, work.scores + key + LANES, 4 * work.row);
    }
}

/* Scale and bias the scores of the query at position t in place, mask keys past the end; return the row's maximum. */
INLINE float complete_scores(enum kind kind, float *scores, long t, long begin, long end, float scale,
                             Positions positions, long length) {
    const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 even = _mm512_set1_ps(MASKED), odd = even;
    if (end > length)
        for (long key = end - KEY_BLOCK; key < end; key += LANES) {
            const __mmask16 past = key < length ? ~lane_mask((int)(length - key)) : 0xffff;
            _mm512_mask_storeu_ps(scores + key, past, _mm512_set1_ps(MASKED));
        }
    for (long key = begin; key < end; key += KEY_BLOCK) {
        __m512 a = _mm512_loadu_ps(scores + key), b = _mm512_loadu_ps(scores + key + LANES);
        if (kind == LINEAR_BIASES) {
            const __m512 ahead = _mm512_add_ps(_mm512_set1_ps((float)(key - t)), lanes);
            const __m512 far = _mm512_add_ps(ahead, _mm512_set1_ps(LANES));
            const __m512 step = _mm512_set1_ps(positions.slope), factor = _mm512_set1_ps(scale);
            a = _mm512_fmsub_ps(a, factor, _mm512_mul_ps(step, _mm512_abs_ps(ahead)));
            b = _mm512_fmsub_ps(b, factor, _mm512_mul_ps(step, _mm512_abs_ps(far)));
        }
        if (kind == RELATIVE_BIASES) {
            const float *biases = positions.biases + (key - t);
            a = _mm512_fmadd_ps(a, _mm512_set1_ps(scale), _mm512_loadu_ps(biases));
            b = _mm512_fmadd_ps(b, _mm512_set1_ps(scale), _mm512_loadu_ps(biases + LANES));
        }
        if (!rotates(kind)) {
            _mm512_storeu_ps(scores + key, a);
            _mm512_storeu_ps(scores + key + LANES, b);
        }
        even = _mm512_max_ps(even, a);
        odd = _mm512_max_ps(odd, b);
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
}

/* Compute the softmax weights and the mean of the values, 64 dimensions at a time.
 *
 * In the last block, rows past `rows` have any weights: no other row depends on them, and they are not written.
 */
INLINE void average(int head_dim, int rows, const float maxima[ROWS], long begin, long end, Workspace work,
                    uint16_t *output, long output_stride) {
    const int width = (int)padded_width(head_dim);
    float sums[ROWS][4 * LANES] __attribute__((aligned(64))), inverse_sums[ROWS];
    __m512 totals[ROWS];
    for (int r = 0; r < ROWS; r++) totals[r] = _mm512_setzero_ps();
#define EXPONENTIATE(from, key)                                                                              \
    for (int r = from; r < from + 4 && from < rows; r++)                                                     \
        totals[r] = exponentiate(work.scores + r * work.row + (key), _mm512_set1_ps(maxima[r]),              \
                                 work.weights + r * work.row + (key), totals[r]);
    EXPONENTIATE(0, begin)
    EXPONENTIATE(4, begin)
    EXPONENTIATE(8, begin)
    EXPONENTIATE(12, begin)
    for (int d = 0; d < width; d += 4 * LANES) {
        const int tiles = (width - d) / LANES < 4 ? (width - d) / LANES : 4;
        _tile_zero(0);
        if (tiles > 1) _tile_zero(1);
        if (tiles > 2) _tile_zero(2);
        if (tiles > 3) _tile_zero(3);
        for (long key = begin; key < end; key += KEY_BLOCK) {
            const uint32_t *values = work.values + key / 2 * width + d;
            const long next = key + KEY_BLOCK;
            LOAD_TILE(4, work.weights + key, 2 * work.row);
/* A quarter of the next block's exponentials with each product: the processor computes both at once. */
#define ADD_VALUES(tile)                                                                                     \
    if (tile < tiles) {                                                                                      \
        LOAD_TILE(5, values + tile * LANES, 4 * width);                                                      \
        _tile_dpbf16ps(tile, 4, 5);                                                                          \
    }                                                                                                        \
    if (d == 0 && next < end) EXPONENTIATE(4 * tile, next)
            ADD_VALUES(0)
            ADD_VALUES(1)
            ADD_VALUES(2)
            ADD_VALUES(3)
        }
        _tile_stored(0, sums[0], sizeof sums[0]);
        if (tiles > 1) _tile_stored(1, sums[0] + LANES, sizeof sums[0]);
        if (tiles > 2) _tile_stored(2, sums[0] + 2 * LANES, sizeof sums[0]);
        if (tiles > 3) _tile_stored(3, sums[0] + 3 * LANES, sizeof sums[0]);
        for (int r = 0; r < rows; r++) {
            if (d == 0) inverse_sums[r] = 1.0f / _mm512_reduce_add_ps(totals[r]);
            for (int v = 0; v < tiles; v++)
                write_means(head_dim - d - v * LANES, _mm512_load_ps(sums[r] + v * LANES), inverse_sums[r],
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
        uint16_t placed[ROWS][MAX_HEAD_DIM] __attribute__((aligned(64)));
        place_queries(head_dim, kind, queries, stride, positions, scale, first, length, placed);
        long begin = 0, end = padded;
        if (kind == LINEAR_BIASES)
            find_span(head_dim, queries, keys, stride, first, rows, scale, positions.slope, largest_key, length, padded,
                      &begin, &end);
        score(head_dim, placed, begin, end, work);
        float maxima[ROWS] = {0};
        for (int r = 0; r < rows; r++)
            maxima[r] = complete_scores(kind, work.scores + r * work.row, first + r, begin, end, scale, positions, length);
        average(head_dim, rows, maxima, begin, end, work, output + first * output_stride, output_stride);
    }
}

#include "pack.h"
