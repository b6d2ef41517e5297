/* Products of few rows with weights of 8 or 4 bits: y = x W^T + b with w[n, k] = (q[n, k] - zero[n, g]) scale[n, g].
 *
 * What a decoding step costs is what reading the weights costs, so they are read as they are packed and become floats
 * in registers. A tile has 16 rows of W, one a lane: a column of a tile is one vector, its product with x[k] needs no
 * sum over lanes, and a group's scale is one vector too. For each tile and group of columns, one behind the other:
 *
 *     16 floats, the scales;  8 bits: (columns, 16) signed bytes;  4 bits: (columns / 8, 16) words of 8 nibbles
 *
 * The activations stay floats. Every number is one chain of multiply-adds a group, then one over groups, whatever the
 * number of rows or threads: a row's result does not depend, to the last bit, on what else is in the batch.
 */
#include "kernels.h"

/* A column of a tile is PARTS registers: a vector that is wider than those is kept in memory by the compiler. */
#define PARTS (LANES / WIDTH)
#if defined(__AVX512F__)
#define MOST 8 /* rows of x that go over a tile together */
#define WIDE(M) (M == 8 ? 2 : 4) /* tiles side by side: enough chains, few enough registers */
#elif defined(__AVX2__)
#define MOST 4
#define WIDE(M) (M == 1 ? 2 : 1)
#else
#define MOST 4
#define WIDE(M) 1
#endif

/* nibble u of each word, two's complement */
static inline vec of_nibble(vec_int words, int u) {
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return (vec)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, 4 * u), table);
#else
    return __builtin_convertvector((words << (28 - 4 * u)) >> 28, vec);
#endif
}

#define EACH(T) _Pragma("GCC unroll 8") for (int t = 0; t < T; t++) _Pragma("GCC unroll 8") for (int h = 0; h < PARTS; h++)
#define ROWS(M) _Pragma("GCC unroll 8") for (int m = 0; m < M; m++)
#define PLACE(M) (vec *)(y + (t * M + m) * LANES + h * WIDTH)

/* x: (k, M); sums: (groups, M) of x, or NULL; y: (MOST, 16 tiles), where T tiles from `tile` are written. */
#define START(T, M)                                                                                                    \
    const packed_t *w = j->w;                                                                                          \
    const long groups = w->k / w->group, block = 64 + w->group * 2 * w->bits, size = groups * block;                   \
    const char *p = w->values + tile * size;                                                                           \
    EACH(T) ROWS(M) *PLACE(M) = (vec){0};                                                                              \
    for (long g = 0; g < groups; g++, p += block) {                                                                    \
        vec sum[T][PARTS][M];                                                                                          \
        EACH(T) ROWS(M) sum[t][h][m] = (vec){0};                                                                       \
        for (int t = 0; t < T; t++)                                                                                    \
            __builtin_prefetch(p + (t + T) * size);                                                                    \
        const char *q = p + 64;

#define FINISH(T, M)                                                                                                   \
    if (w->zero)                                                                                                       \
        EACH(T) {                                                                                                      \
            const vec zero = read_byte(w->zero + ((tile + t) * groups + g) * LANES + h * WIDTH);                       \
            ROWS(M) sum[t][h][m] -= zero * sums[g * M + m];                                                            \
        }                                                                                                              \
    EACH(T) {                                                                                                          \
        const vec scale = *(const vec *)(p + t * size + h * 4 * WIDTH);                                                \
        ROWS(M) *PLACE(M) += scale * sum[t][h][m];                                                                     \
    }                                                                                                                  \
    }

#define PRODUCT(NAME, M, T)                                                                                            \
    static void NAME##_8(const job_t *j, const float *x, const float *sums, float *y, long tile) {                     \
        START(T, M)                                                                                                    \
        for (long i = 0; i < w->group; i++, q += LANES, x += M) {                                                      \
            EACH(T) {                                                                                                  \
                const vec v = read_byte(q + t * size + h * WIDTH);                                                     \
                ROWS(M) sum[t][h][m] += v * x[m];                                                                      \
            }                                                                                                          \
            if (i % 4 == 0)                                                                                            \
                for (int t = 0; t < T; t++)                                                                            \
                    __builtin_prefetch(q + (t + T) * size);                                                            \
        }                                                                                                              \
        FINISH(T, M)                                                                                                   \
    }                                                                                                                  \
    static void NAME##_4(const job_t *j, const float *x, const float *sums, float *y, long tile) {                     \
        START(T, M)                                                                                                    \
        for (long i = 0; i < w->group; i += 8, q += 4 * LANES, x += 8 * M) {                                           \
            vec_int words[T][PARTS];                                                                                   \
            EACH(T) words[t][h] = *(const vec_int *)(q + t * size + h * 4 * WIDTH);                                    \
            for (int t = 0; t < T; t++)                                                                                \
                __builtin_prefetch(q + (t + T) * size);                                                                \
            _Pragma("GCC unroll 8") for (int u = 0; u < 8; u++)                                                        \
                EACH(T) {                                                                                              \
                    const vec v = of_nibble(words[t][h], u);                                                           \
                    ROWS(M) sum[t][h][m] += v * x[u * M + m];                                                          \
                }                                                                                                      \
        }                                                                                                              \
        FINISH(T, M)                                                                                                   \
    }

typedef struct {
    const packed_t *w;
    const float *bias, *columns, *sums;
    float *y;
    long m;
} job_t;

typedef struct {
    job_t *jobs;
    int count;
} jobs_t;

PRODUCT(wide_1, 1, WIDE(1))
PRODUCT(wide_2, 2, WIDE(2))
PRODUCT(wide_4, 4, WIDE(4))
PRODUCT(one_1, 1, 1)
PRODUCT(one_2, 2, 1)
PRODUCT(one_4, 4, 1)
#if MOST == 8
PRODUCT(wide_8, 8, WIDE(8))
PRODUCT(one_8, 8, 1)
#endif

typedef void (*product_f)(const job_t *, const float *, const float *, float *, long);

/* by the number of rows (1, 2, 4, 8), whether tiles lie side by side, and the bits */
static const product_f products[4][2][2] = {
    {{one_1_4, one_1_8}, {wide_1_4, wide_1_8}},
    {{one_2_4, one_2_8}, {wide_2_4, wide_2_8}},
    {{one_4_4, one_4_8}, {wide_4_4, wide_4_8}},
#if MOST == 8
    {{one_8_4, one_8_8}, {wide_8_4, wide_8_8}},
#endif
};
static const int side_by_side[4] = {WIDE(1), WIDE(2), WIDE(4), WIDE(8)};

/* how many rows a block that has `left` of them takes, as a power of two */
static inline int power_of(long left) { return left >= MOST ? (MOST == 8 ? 3 : 2) : left > 4 ? 3 : left > 2 ? 2 : left - 1; }

static void part(void *data) {
    const jobs_t *all_of_it = data;
    const long t = me(), all_of_us = team();
    float done[4 * MOST * LANES] __attribute__((aligned(64)));
    for (int i = 0; i < all_of_it->count; i++) {
        const job_t *j = all_of_it->jobs + i;
        const long n = j->w->n, tiles = (n + LANES - 1) / LANES, k = j->w->k, groups = k / j->w->group;
        const long end = tiles * (t + 1) / all_of_us;
        for (long tile = tiles * t / all_of_us, next; tile < end; tile = next) {
            next = tile + 4 < end ? tile + 4 : end; /* all rows go over four tiles: they stay in the cache */
            for (long m0 = 0; m0 < j->m; m0 += MOST) {
                const int power = power_of(j->m - m0), m = 1 << power, wide = side_by_side[power];
                for (long at = tile, step; at < next; at += step) {
                    step = at + wide <= next ? wide : 1;
                    products[power][step == wide][j->w->bits == 8](j, j->columns + m0 * k, j->sums + m0 * groups, done, at);
                    for (long r = 0; r < m && m0 + r < j->m; r++)
                        for (long s = 0; s < step; s++) {
                            const long first = (at + s) * LANES, last = first + LANES < n ? LANES : n - first;
                            float *y = j->y + (m0 + r) * n + first;
                            const float *from = done + (s * m + r) * LANES;
                            for (long e = 0; e < last; e++)
                                y[e] = from[e] + (j->bias ? j->bias[first + e] : 0.0f);
                        }
                }
            }
        }
    }
}

/* x (m, k) in blocks of 8, 4, 2 or 1 rows, a column behind the other; rows that are not there are 0. */
static void turn(const float *x, const packed_t *w, long m, float *columns, float *sums) {
    const long k = w->k, group = w->group, groups = k / group;
    for (long m0 = 0; m0 < m; m0 += MOST) {
        const long wide = 1 << power_of(m - m0);
        float *to = columns + m0 * k, *sum = sums + m0 * groups;
        for (long e = 0; e < wide; e++) {
            const float *from = x + (m0 + e) * k;
            for (long i = 0; i < k; i++)
                to[i * wide + e] = m0 + e >= m ? 0.0f : from[w->order ? w->order[i] : i];
            if (w->zero)
                for (long g = 0; g < groups; g++) {
                    float s = 0.0f;
                    for (long i = g * group; i < (g + 1) * group; i++)
                        s += to[i * wide + e];
                    sum[g * wide + e] = s;
                }
        }
    }
}

int quantized_products(const float *x, long m, const packed_t *const *ws, const float *const *biases, float *const *ys,
                       int count) {
    job_t jobs[4] = {{0}};
    const long rows = (m + MOST - 1) / MOST * MOST;
    size_t floats = 0;
    for (int i = 0; i < count; i++)
        floats += rows * (ws[i]->k + ws[i]->k / ws[i]->group);
    float *at = room(0, floats);
    if (!at || count > 4)
        return 1;
    for (int i = 0; i < count; i++) {
        const packed_t *w = ws[i], *first = ws[0];
        jobs[i] = (job_t){w, biases[i], jobs[0].columns, jobs[0].sums, ys[i], m};
        if (i && !w->order && !first->order && !w->zero == !first->zero && w->group == first->group)
            continue; /* the same columns */
        turn(x, w, m, at, at + rows * w->k);
        jobs[i].columns = at, jobs[i].sums = at + rows * w->k;
        at += rows * (w->k + w->k / w->group);
    }
    run(part, &(jobs_t){jobs, count});
    return 0;
}

typedef struct {
    const packed_t *w;
    const long *rows;
    long m;
    float *out;
} whole_t;

static void unpack(void *data) {
    const whole_t *j = data;
    const packed_t *w = j->w;
    const long groups = w->k / w->group, block = 64 + w->group * 2 * w->bits, all_of_us = team();
    for (long r = j->m * me() / all_of_us, end = j->m * (me() + 1) / all_of_us; r < end; r++) {
        const long n = j->rows ? j->rows[r] : r, tile = n / LANES, lane = n % LANES;
        const char *p = w->values + tile * groups * block;
        float *y = j->out + r * w->k;
        for (long g = 0, i = 0; g < groups; g++, p += block) {
            const float scale = ((const float *)p)[lane];
            const int zero = w->zero ? w->zero[(tile * groups + g) * LANES + lane] : 0;
            const byte *bytes = (const byte *)p + 64;
            const int *words = (const int *)(p + 64);
            for (long c = 0; c < w->group; c++, i++) {
                const int q = w->bits == 8 ? bytes[c * LANES + lane]
                                           : (int)((unsigned)words[c / 8 * LANES + lane] << (28 - c % 8 * 4)) >> 28;
                y[w->order ? w->order[i] : i] = (float)(q - zero) * scale;
            }
        }
    }
}

/* out (m, k): rows of w as floats, the same numbers as QuantizedWeight.dense(); rows: which, or NULL for the first m */
void dequantize(const packed_t *w, const long *rows, float *out, long m) { run(unpack, &(whole_t){w, rows, m, out}); }

int quantized_linear(const float *x, const packed_t *w, const float *bias, float *y, long m) {
    return quantized_products(x, m, &w, &bias, &y, 1);
}
