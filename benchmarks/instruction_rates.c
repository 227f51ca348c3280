/* Prints the FLOP/s that one core reaches with nothing but multiply-add instructions, without memory: a line for each
   kind of instruction that the processor has, name and rate separated by a tab.

   cc -O3 -march=native instruction_rates.c -o instruction_rates && ./instruction_rates */

#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
typedef __m512 vector;
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#elif defined(__FMA__)
typedef __m256 vector;
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#else
typedef float vector __attribute__((vector_size(16)));
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
#if defined(__x86_64__)
#define HIDE(value) __asm__ volatile("" : "+v"(value)) /* the compiler knows nothing of the value */
#else
#define HIDE(value) __asm__ volatile("" : "+w"(value))
#endif

enum { CHAINS = 12, STEPS = 200000, TRIALS = 50 }; /* 12 independent chains hide a latency of 4 on 2 to 3 ports */

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

static void report(const char *name, double (*work)(void)) {
    double best = 0;
    for (int trial = 0; trial < TRIALS; trial++) {
        double start = seconds(), flop = work(), rate = flop / (seconds() - start);
        best = rate > best ? rate : best;
    }
    printf("%s\t%.4g\n", name, best);
}

static double float32(void) {
    vector sums[CHAINS], a, b;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    memset(sums, 0, sizeof sums);
    for (int chain = 0; chain < CHAINS; chain++) HIDE(sums[chain]);
    for (int step = 0; step < STEPS; step++) {
        HIDE(a);
        for (int chain = 0; chain < CHAINS; chain++) sums[chain] = MULTIPLY_ADD(a, b, sums[chain]);
    }
    for (int chain = 0; chain < CHAINS; chain++) HIDE(sums[chain]);
    return 2.0 * sizeof(vector) / sizeof(float) * CHAINS * STEPS;
}

#if defined(__AVX512BF16__)
static double bfloat16(void) {
    __m512 sums[CHAINS], bits = _mm512_setzero_ps();
    memset(sums, 0, sizeof sums);
    for (int chain = 0; chain < CHAINS; chain++) HIDE(sums[chain]);
    for (int step = 0; step < STEPS; step++) {
        HIDE(bits);
        for (int chain = 0; chain < CHAINS; chain++)
            sums[chain] = _mm512_dpbf16_ps(sums[chain], (__m512bh)bits, (__m512bh)bits);
    }
    for (int chain = 0; chain < CHAINS; chain++) HIDE(sums[chain]);
    return 64.0 * CHAINS * STEPS; /* 16 sums of 2 products each */
}
#endif

#if defined(__AMX_BF16__) && defined(__linux__)
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 }; /* Linux asm/prctl.h */

static double tiles(void) {
    for (int step = 0; step < STEPS / 16; step++) { /* 4 sums, as in a product of 32 x 32 */
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return 4.0 * 2 * 16 * 16 * 32 * (STEPS / 16);
}
#endif

int main(void) {
    report("float32 multiply-add", float32);
#if defined(__AVX512BF16__)
    report("bfloat16 vdpbf16ps", bfloat16);
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
    if (!syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) {
        /* Palette 1, then 8 tiles of 16 rows of 64 bytes. */
        struct { unsigned char palette, start, unused[14]; unsigned short bytes[16]; unsigned char rows[16]; } layout = {1};
        for (int tile = 0; tile < 8; tile++) layout.bytes[tile] = 64, layout.rows[tile] = 16;
        _tile_loadconfig(&layout);
        report("bfloat16 AMX tdpbf16ps", tiles);
        _tile_release();
    }
#endif
    return 0;
}
