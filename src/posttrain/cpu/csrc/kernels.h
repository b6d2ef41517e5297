/* What the compiled kernels share: vectors, exp, torch's threads, memory that stays. */
#ifndef POSTTRAIN_KERNELS_H
#define POSTTRAIN_KERNELS_H

#include <stddef.h>
#include <stdlib.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * WIDTH), aligned(4), may_alias));
typedef int vec_int __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef signed char byte;
typedef byte vec_byte __attribute__((vector_size(WIDTH), aligned(1), may_alias));

typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*number_t)(void);

/* The threads of the OpenMP library that torch brings. threads: asked for; a team may be smaller. */
typedef struct {
    parallel_t parallel;
    number_t number, size;
    int threads;
} pool_t;

extern pool_t pool __attribute__((visibility("hidden")));

static inline void run(void (*work)(void *), void *job) {
    if (pool.threads == 1)
        work(job);
    else
        pool.parallel(work, job, pool.threads, 0);
}

static inline int me(void) { return pool.threads == 1 ? 0 : pool.number(); }
static inline int team(void) { return pool.threads == 1 ? 1 : pool.size(); }

/* Memory that stays from call to call; calls come one at a time (Python's lock is held). NULL where there is none. */
#define ROOMS 2 /* 0: for a single operation; 1: for what a layer hands from one to the next */
float *room(int which, size_t floats) __attribute__((visibility("hidden")));

static inline vec all(float x) { return (vec){0} + x; }

/* WIDTH integers. GCC takes them apart one by one if it is only told to convert them. */
static inline vec read_byte(const void *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const vec_byte *)p, vec_int), vec);
#endif
}

/* ---------------------------------------------------------------------------------------------------- exp, to 2 ulp
 * 2^n times a polynomial of the rest, |rest| <= log(2) / 2 (Cephes' coefficients), for x from -87 to 88. */
static inline vec power(vec x) {
    const vec magic = all(12582912.0f);
    vec n = x * 1.44269504088896341f + magic;
    const vec_int exponent = ((vec_int)n - (vec_int)magic + 127) << 23;
    n -= magic;
    x -= n * 0.693359375f;
    x -= n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    return (p * x * x + x + 1.0f) * (vec)exponent;
}

/* what is beyond the range becomes its end; so does what is not a number */
static inline vec exponential(vec x) {
    const vec low = all(-87.0f), high = all(88.0f);
    x = (vec)(((vec_int)x & (x > low)) | ((vec_int)low & ~(x > low)));
    x = (vec)(((vec_int)x & (x < high)) | ((vec_int)high & ~(x < high)));
    return power(x);
}

/* e^(z - top), and exactly 0 where that is below e^-87: tokens that were cut off have no mass */
static inline vec mass(vec z, float top) {
    const vec x = z - top;
    return (vec)((vec_int)exponential(x) & (x > -87.0f));
}

/* e^x for x <= 0, exactly 0 below -87; what is not a number stays so: a broken model must show */
static inline vec weight_of(vec x) {
    const vec low = all(-87.0f);
    const vec_int less = x < low;
    return (vec)((vec_int)power((vec)(((vec_int)x & ~less) | ((vec_int)low & less))) & ~less);
}

#define NOTHING (-1e30f) /* the largest number before there is one */

/* the upper half onto the lower, until one is left */
static inline float sum_of(vec v) {
    half h = ((const half *)&v)[0] + ((const half *)&v)[1];
#if WIDTH == 16
    typedef float quarter __attribute__((vector_size(WIDTH), may_alias));
    const quarter q = ((const quarter *)&h)[0] + ((const quarter *)&h)[1];
    return (q[0] + q[2]) + (q[1] + q[3]);
#elif WIDTH == 8
    return (h[0] + h[2]) + (h[1] + h[3]);
#else
    return h[0] + h[1];
#endif
}

/* ---------------------------------------------------------------------------------------------- of quantized.c
 * A weight (n, k) in few bits, in tiles of 16 rows; see there. zero (tiles, groups, 16) and order (the column of x that
 * each packed column belongs to) may be NULL. */
#define LANES 16
typedef struct {
    const char *values;
    const byte *zero;
    const long *order;
    long n, k, group, bits;
} packed_t;

/* ys[i] (m, n) = x (m, k) ws[i]^T + biases[i], of at most four weights; a bias may be NULL. 0: done. */
int quantized_products(const float *x, long m, const packed_t *const *ws, const float *const *biases, float *const *ys,
                       int count) __attribute__((visibility("hidden")));

/* of decode.c: all rows in the calling thread */
void rms_norm(const float *x, const float *weight, float *y, long m, long h, float eps, float shift);
void rotate(const float *x, const long *x_strides, const float *cosine, const float *sine, float *y,
            const long *y_strides, long heads, long m, long size);

/* of attention.c */
int attend(const float *q, const float *k, const float *v, const long *strides, void *const *regions, float *out,
           const long *column, const long *prompt, const long *prompt_length, const long *sizes, float scale);

#endif
