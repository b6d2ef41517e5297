/* One decoding step's work on a CPU: products with few rows, norms, gates and attention, all in float32.
 *
 * Few rows times a large matrix cost what reading the matrix costs, if the kernel keeps up with the memory. Every
 * number here is one chain of multiply-adds in a fixed order, whatever the number of rows or threads: a row's result
 * does not depend, to the last bit, on what else is in the batch.
 *
 * Compiled where posttrain runs, by posttrain.models.native, with the compiler's -march=native; threads are those of
 * the OpenMP library that torch brings, whose entry points are handed in.
 */
#include "kernels.h"

pool_t pool = {NULL, NULL, NULL, 1};

void use_threads(parallel_t p, number_t n, number_t s, int count) { pool = (pool_t){p, n, s, count}; }

float *room(size_t floats) {
    static float *kept;
    static size_t size;
    if (floats > size) {
        free(kept);
        size = 0;
        if (posix_memalign((void **)&kept, 64, floats * sizeof(float)))
            return kept = NULL;
        size = floats;
    }
    return kept;
}

/* ------------------------------------------------------------------------------------------------------- y = x W^T + b
 * Tiles of R rows of W by C vectors of rows of x, held in registers; x lies turned round, a column of a tile's rows
 * behind the other. W is read once for all tiles, R rows side by side, the next R being fetched meanwhile. */
typedef struct {
    const float *w, *bias, *columns;
    float *y;
    long m, k, n, wide;
} product_t;

#define TILE(NAME, VEC, W, C, R)                                                                                       \
    static void NAME(const product_t *j, long m0, long n0, long n1) {                                                  \
        const long k = j->k;                                                                                           \
        for (long start = n0; start < n1; start += R) {                                                                \
            const long n = start + R <= n1 ? start : n1 - R; /* the last tile overlaps the one before */               \
            const long ahead = n + 2 * R <= j->n ? R * k : 0;                                                          \
            const float *x = j->columns + m0 * k, *w[R];                                                               \
            VEC sum[R][C];                                                                                             \
            for (int r = 0; r < R; r++) {                                                                              \
                w[r] = j->w + (n + r) * k;                                                                             \
                for (int c = 0; c < C; c++)                                                                            \
                    sum[r][c] = (VEC){0};                                                                              \
            }                                                                                                          \
            long i = 0;                                                                                                \
            for (; i + 16 <= k; i += 16) {                                                                             \
                for (int r = 0; r < R; r++)                                                                            \
                    __builtin_prefetch(w[r] + i + ahead);                                                              \
                for (int u = 0; u < 16; u++, x += W * C)                                                               \
                    for (int r = 0; r < R; r++)                                                                        \
                        for (int c = 0; c < C; c++)                                                                    \
                            sum[r][c] += w[r][i + u] * *(const VEC *)(x + W * c);                                      \
            }                                                                                                          \
            for (; i < k; i++, x += W * C)                                                                             \
                for (int r = 0; r < R; r++)                                                                            \
                    for (int c = 0; c < C; c++)                                                                        \
                        sum[r][c] += w[r][i] * *(const VEC *)(x + W * c);                                              \
            for (int c = 0; c < C; c++)                                                                                \
                for (int e = 0; e < W && m0 + W * c + e < j->m; e++) {                                                 \
                    float *y = j->y + (m0 + W * c + e) * j->n + n;                                                     \
                    for (int r = 0; r < R; r++)                                                                        \
                        y[r] = sum[r][c][e] + (j->bias ? j->bias[n + r] : 0.0f);                                       \
                }                                                                                                      \
        }                                                                                                              \
    }

#if REGISTERS == 32
TILE(tile_half_1, half, WIDTH / 2, 1, 8)
TILE(tile_half_3, half, WIDTH / 2, 3, 8)
TILE(tile_1, vec, WIDTH, 1, 8)
TILE(tile_2, vec, WIDTH, 2, 8)
TILE(tile_3, vec, WIDTH, 3, 8)
TILE(tile_4, vec, WIDTH, 4, 6)
#else
TILE(tile_half_1, half, WIDTH / 2, 1, 8)
TILE(tile_half_3, half, WIDTH / 2, 3, 4)
TILE(tile_1, vec, WIDTH, 1, 8)
TILE(tile_2, vec, WIDTH, 2, 6)
TILE(tile_3, vec, WIDTH, 3, 4)
TILE(tile_4, vec, WIDTH, 4, 3)
#endif
#define LEAST 8 /* columns of y that a tile needs */
#define BLOCK 48 /* rows of W that all tiles go over before the next: they stay in the cache; a multiple of every R */

static void product(void *data) {
    const product_t *j = data;
    const long blocks = j->n / BLOCK > 0 ? j->n / BLOCK : 1, t = me(), all_of_us = team();
    for (long b = blocks * t / all_of_us; b < blocks * (t + 1) / all_of_us; b++) {
        const long n0 = b * BLOCK, n1 = b == blocks - 1 ? j->n : n0 + BLOCK;
        for (long m0 = 0; m0 < j->wide; m0 += 4 * WIDTH) {
            switch ((j->wide - m0) / (WIDTH / 2)) {
            case 1: tile_half_1(j, m0, n0, n1); break;
            case 2: tile_1(j, m0, n0, n1); break;
            case 3: tile_half_3(j, m0, n0, n1); break;
            case 4: tile_2(j, m0, n0, n1); break;
            case 6: tile_3(j, m0, n0, n1); break;
            default: tile_4(j, m0, n0, n1);
            }
        }
    }
}

/* x (m, k), w (n, k), y (m, n); n >= LEAST. 0: done. */
int linear(const float *x, const float *w, const float *bias, float *y, long m, long k, long n) {
    static const long halves[] = {0, 1, 2, 3, 4, 6, 6, 8, 8}; /* of vectors, that a last tile of so many rounds up to */
    const long whole = m / (4 * WIDTH) * (4 * WIDTH), few = WIDTH / 2;
    const long wide = whole + halves[(m - whole + few - 1) / few] * few;
    float *columns = room(wide * k);
    if (!columns || n < LEAST)
        return 1;
    for (long m0 = 0; m0 < wide; m0 += 4 * WIDTH) {
        const long span = wide - m0 < 4 * WIDTH ? wide - m0 : 4 * WIDTH;
        float *to = columns + m0 * k;
        for (long i = 0; i < k; i++)
            for (long e = 0; e < span; e++)
                to[i * span + e] = m0 + e < m ? x[(m0 + e) * k + i] : 0.0f;
    }
    product_t job = {w, bias, columns, y, m, k, n, wide};
    run(product, &job);
    return 0;
}

/* ------------------------------------------------------------------------------------- y = gate / (1 + e^-gate) * up */
typedef struct {
    const float *gate, *up;
    float *y;
    long count;
} gated_t;

static void gated_part(void *data) {
    const gated_t *j = data;
    const long vectors = j->count / WIDTH, t = me(), all_of_us = team();
    for (long i = vectors * t / all_of_us * WIDTH; i < vectors * (t + 1) / all_of_us * WIDTH; i += WIDTH) {
        const vec g = *(const vec *)(j->gate + i);
        *(vec *)(j->y + i) = g / (1.0f + exponential(-g)) * *(const vec *)(j->up + i);
    }
    if (t == all_of_us - 1)
        for (long i = vectors * WIDTH; i < j->count; i++)
            j->y[i] = j->gate[i] / (1.0f + exponential(all(-j->gate[i]))[0]) * j->up[i];
}

void gated(const float *gate, const float *up, float *y, long count) {
    gated_t job = {gate, up, y, count};
    run(gated_part, &job);
}

/* ------------------------------------------------------------------------- y = x / sqrt(mean(x^2) + eps) (weight + shift) */
void rms_norm(const float *x, const float *weight, float *y, long m, long h, float eps, float shift) {
    for (long row = 0; row < m; row++, x += h, y += h) {
        vec squares = {0};
        long i = 0;
        for (; i + WIDTH <= h; i += WIDTH)
            squares += *(const vec *)(x + i) * *(const vec *)(x + i);
        float sum = sum_of(squares);
        for (; i < h; i++)
            sum += x[i] * x[i];
        const float scale = 1.0f / __builtin_sqrtf(sum / h + eps);
        for (i = 0; i + WIDTH <= h; i += WIDTH)
            *(vec *)(y + i) = *(const vec *)(x + i) * scale * (*(const vec *)(weight + i) + shift);
        for (; i < h; i++)
            y[i] = x[i] * scale * (weight[i] + shift);
    }
}

/* ---------------------------------------------------------------------------------------------------------- attention
 * Row m's newest key and value go to column column[m] of slot m. Its queries then see the columns of its prompt's slot
 * (shared_k; NULL: none) and its own up to that one, the last `window` of them (0: all). Regions are (slots, kv,
 * columns, size). Softmax over both regions at once. */
typedef struct {
    const float *q, *k, *v;
    long q_head, q_row, k_head, k_row, v_head, v_row;
    float *own_k, *own_v, *shared_k, *shared_v, *out, *scores;
    const long *column, *prompt, *prompt_length;
    long m, kv, groups, size, own_columns, shared_columns, window, longest;
    float scale;
} attention_t;

static inline float dot(const float *a, const float *b, long size) {
    vec sum = {0};
    long i = 0;
    for (; i + WIDTH <= size; i += WIDTH)
        sum += *(const vec *)(a + i) * *(const vec *)(b + i);
    float s = sum_of(sum);
    for (; i < size; i++)
        s += a[i] * b[i];
    return s;
}

/* sums += p * v over `count` values of one head, size wide; a block of vectors at a time stays in registers */
static void weigh(const float *p, const float *v, long count, long size, float *sums) {
    long d = 0;
    for (; d + 4 * WIDTH <= size; d += 4 * WIDTH) {
        vec a[4];
        for (int b = 0; b < 4; b++)
            a[b] = *(const vec *)(sums + d + b * WIDTH);
        for (long c = 0; c < count; c++)
            for (int b = 0; b < 4; b++)
                a[b] += p[c] * *(const vec *)(v + c * size + d + b * WIDTH);
        for (int b = 0; b < 4; b++)
            *(vec *)(sums + d + b * WIDTH) = a[b];
    }
    for (; d + WIDTH <= size; d += WIDTH) {
        vec a = *(const vec *)(sums + d);
        for (long c = 0; c < count; c++)
            a += p[c] * *(const vec *)(v + c * size + d);
        *(vec *)(sums + d) = a;
    }
    for (; d < size; d++)
        for (long c = 0; c < count; c++)
            sums[d] += p[c] * v[c * size + d];
}

static void attend_part(void *data) {
    const attention_t *j = data;
    const long t = me(), all_of_us = team(), items = j->m * j->kv, size = j->size;
    float *p = j->scores + t * j->longest;
    for (long item = items * t / all_of_us; item < items * (t + 1) / all_of_us; item++) {
        const long m = item / j->kv, h = item % j->kv, column = j->column[m];
        float *own_k = j->own_k + (m * j->kv + h) * j->own_columns * size;
        float *own_v = j->own_v + (m * j->kv + h) * j->own_columns * size;
        for (long i = 0; i < size; i++) {
            own_k[column * size + i] = j->k[h * j->k_head + m * j->k_row + i];
            own_v[column * size + i] = j->v[h * j->v_head + m * j->v_row + i];
        }
        const long length = j->shared_k ? j->prompt_length[m] : 0, total = length + column + 1;
        const long first = j->window && total > j->window ? total - j->window : 0;
        const long from = first < length ? first : length, own_from = first > length ? first - length : 0;
        const long slot = j->shared_k ? (j->prompt[m] * j->kv + h) * j->shared_columns * size : 0;
        const long seen = length - from, own_seen = column + 1 - own_from;
        for (long g = 0; g < j->groups; g++) {
            const float *q = j->q + (h * j->groups + g) * j->q_head + m * j->q_row;
            float *out = j->out + ((m * j->kv + h) * j->groups + g) * size;
            float top = -__builtin_inff();
            for (long c = 0; c < seen; c++)
                p[c] = dot(q, j->shared_k + slot + (from + c) * size, size) * j->scale;
            for (long c = 0; c < own_seen; c++)
                p[seen + c] = dot(q, own_k + (own_from + c) * size, size) * j->scale;
            const long count = seen + own_seen;
            for (long c = 0; c < count; c++)
                top = p[c] > top ? p[c] : top;
            long filled = (count + WIDTH - 1) / WIDTH * WIDTH;
            for (long c = count; c < filled; c++)
                p[c] = -__builtin_inff();
            vec sums = {0};
            for (long c = 0; c < filled; c += WIDTH) {
                vec e = exponential(*(vec *)(p + c) - top);
                if (c + WIDTH > count)
                    for (long i = count - c; i < WIDTH; i++)
                        e[i] = 0.0f;
                *(vec *)(p + c) = e;
                sums += e;
            }
            const float total_p = sum_of(sums);
            for (long i = 0; i < size; i++)
                out[i] = 0.0f;
            if (seen)
                weigh(p, j->shared_v + slot + from * size, seen, size, out);
            weigh(p + seen, own_v + own_from * size, own_seen, size, out);
            for (long i = 0; i < size; i++)
                out[i] /= total_p;
        }
    }
}

/* q, k, v: (heads, rows, size) with these strides, the last 1; out (m, heads, size). 0: done. */
int attend(const float *q, const float *k, const float *v, const long *strides, float *own_k, float *own_v,
           float *shared_k, float *shared_v, float *out, const long *column, const long *prompt,
           const long *prompt_length, const long *sizes, float scale) {
    const long longest = sizes[4] + (shared_k ? sizes[5] : 0) + 2 * WIDTH;
    float *scores = room(longest * pool.threads);
    if (!scores)
        return 1;
    attention_t job = {q, k, v, strides[0], strides[1], strides[2], strides[3], strides[4], strides[5],
                       own_k, own_v, shared_k, shared_v, out, scores, column, prompt, prompt_length,
                       sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], longest, scale};
    run(attend_part, &job);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------ rotary positions
 * y = x cos + (-second half of x, first half) sin; x and y (heads, m, size) with strides, cos and sin (m, size). */
void rotate(const float *x, const long *x_strides, const float *cosine, const float *sine, float *y,
            const long *y_strides, long heads, long m, long size) {
    const long half_size = size / 2;
    for (long row = 0; row < m; row++)
        for (long h = 0; h < heads; h++) {
            const float *c = cosine + row * size, *s = sine + row * size;
            const float *from = x + h * x_strides[0] + row * x_strides[1];
            float *to = y + h * y_strides[0] + row * y_strides[1];
            for (long i = 0; i < half_size; i++) {
                const float a = from[i], b = from[i + half_size];
                to[i] = a * c[i] - b * s[i];
                to[i + half_size] = b * c[i + half_size] + a * s[i + half_size];
            }
        }
}

/* ------------------------------------------------------------------------------------------------------------- drawing
 * Of each row of logits z (m, v): the first token whose cumulative probability exceeds u[row], and its logarithm. Sums of
 * BINS tokens at a time are kept in float64, so that the token is found among one bin's. Where a logit is not a number the
 * logarithm is none either: a broken model must show. */
#define BINS 256
typedef struct {
    const float *z;
    const double *u;
    long *token;
    float *logprob;
    double *sums;
    long m, v;
} draw_t;

static void draw_part(void *data) {
    const draw_t *j = data;
    const long t = me(), all_of_us = team(), bins = (j->v + BINS - 1) / BINS;
    double *sums = j->sums + t * bins;
    for (long row = j->m * t / all_of_us; row < j->m * (t + 1) / all_of_us; row++) {
        const float *z = j->z + row * j->v;
        float top = z[0];
        int broken = 0;
        for (long i = 0; i < j->v; i++) {
            top = z[i] > top ? z[i] : top;
            broken |= z[i] != z[i];
        }
        double total = 0;
        for (long b = 0; b < bins; b++) {
            const long end = (b + 1) * BINS < j->v ? (b + 1) * BINS : j->v;
            vec sum = {0};
            long i = b * BINS;
            for (; i + WIDTH <= end; i += WIDTH)
                sum += mass(*(const vec *)(z + i), top);
            float rest = sum_of(sum);
            for (; i < end; i++)
                rest += mass(all(z[i]), top)[0];
            total += sums[b] = rest;
        }
        const double target = j->u[row] * total;
        double before = 0;
        long b = 0, last = 0, found = -1;
        for (; b < bins && before + sums[b] <= target; b++)
            before += sums[b];
        for (long i = b * BINS; b < bins && i < j->v && i < (b + 1) * BINS && found < 0; i++) {
            const float p = mass(all(z[i]), top)[0];
            before += p;
            if (p > 0)
                last = i;
            if (before > target)
                found = i;
        }
        if (found < 0 && b >= bins) /* rounding left none: the last with any mass */
            for (long i = 0; i < j->v; i++)
                if (mass(all(z[i]), top)[0] > 0)
                    last = i;
        j->token[row] = found < 0 ? last : found;
        j->logprob[row] = broken ? __builtin_nanf("") : z[j->token[row]] - top - (float)__builtin_log(total);
    }
}

/* 0: done. */
int draw(const float *z, const double *u, long *token, float *logprob, long m, long v) {
    double *sums = (double *)room(2 * pool.threads * ((v + BINS - 1) / BINS));
    if (!sums)
        return 1;
    draw_t job = {z, u, token, logprob, sums, m, v};
    run(draw_part, &job);
    return 0;
}
