/* One decoding step's work on a CPU: products with few rows, norms, gates and whole layers, all in float32.
 *
 * Few rows times a large matrix cost what reading the matrix costs, if the kernel keeps up with the memory. Every
 * number here is one chain of multiply-adds in a fixed order, whatever the number of rows or threads: a row's result
 * does not depend, to the last bit, on what else is in the batch.
 *
 * Compiled where posttrain runs, by posttrain.cpu.library, with the compiler's -march=native; threads are those of
 * the OpenMP library that torch brings, whose entry points are handed in.
 */
#include "kernels.h"

pool_t pool = {NULL, NULL, NULL, 1};

void use_threads(parallel_t p, number_t n, number_t s, int count) { pool = (pool_t){p, n, s, count}; }

/* Each calling thread has memory of its own: one may sample while another trains. */
float *room(int which, size_t floats) {
    static _Thread_local float *kept[ROOMS];
    static _Thread_local size_t size[ROOMS];
    if (floats > size[which]) {
        free(kept[which]);
        size[which] = 0;
        if (posix_memalign((void **)&kept[which], 64, floats * sizeof(float)))
            return kept[which] = NULL;
        size[which] = floats;
    }
    return kept[which];
}

/* ------------------------------------------------------------------------------------------------------- y = x W^T + b
 * Tiles of R rows of W by C vectors and H half vectors of rows of x, held in registers; x lies turned round, a column of a
 * tile's rows behind the other. W is read once for all tiles, R rows side by side, the next R being fetched meanwhile. */
typedef struct product {
    const float *w, *bias, *columns;
    float *y;
    long m, k, n, wide;
    const struct product *next; /* another with the same x: no thread waits for the others in between */
} product_t;

#define FEW (WIDTH / 2)
#define SPAN(C, H) (WIDTH * C + FEW * H) /* rows of x in a tile */
#define MULTIPLY(U, C, H, R)                                                                                           \
    for (int r = 0; r < R; r++) {                                                                                      \
        for (int c = 0; c < C; c++)                                                                                    \
            sum[r][c] += w[r][U] * *(const vec *)(x + WIDTH * c);                                                      \
        for (int h = 0; h < H; h++)                                                                                    \
            rest[r][h] += w[r][U] * *(const half *)(x + WIDTH * C);                                                    \
    }

#define TILE(NAME, C, H, R)                                                                                            \
    static void NAME(const product_t *j, long m0, long n0, long n1) {                                                  \
        const long k = j->k;                                                                                           \
        for (long start = n0; start < n1; start += R) {                                                                \
            const long n = start + R <= n1 ? start : n1 - R; /* the last tile overlaps the one before */               \
            const long ahead = n + 2 * R <= j->n ? R * k : 0;                                                          \
            const float *x = j->columns + m0 * k, *w[R];                                                               \
            vec sum[R][C];                                                                                             \
            half rest[R][H];                                                                                           \
            float done[R][SPAN(C, H)];                                                                                 \
            for (int r = 0; r < R; r++) {                                                                              \
                w[r] = j->w + (n + r) * k;                                                                             \
                for (int c = 0; c < C; c++)                                                                            \
                    sum[r][c] = (vec){0};                                                                              \
                for (int h = 0; h < H; h++)                                                                            \
                    rest[r][h] = (half){0};                                                                            \
            }                                                                                                          \
            long i = 0;                                                                                                \
            for (; i + 16 <= k; i += 16) {                                                                             \
                for (int r = 0; r < R; r++)                                                                            \
                    __builtin_prefetch(w[r] + i + ahead);                                                              \
                for (int u = 0; u < 16; u++, x += SPAN(C, H))                                                          \
                    MULTIPLY(i + u, C, H, R)                                                                           \
            }                                                                                                          \
            for (; i < k; i++, x += SPAN(C, H))                                                                        \
                MULTIPLY(i, C, H, R)                                                                                   \
            for (int r = 0; r < R; r++) {                                                                              \
                const float shift = j->bias ? j->bias[n + r] : 0.0f;                                                   \
                for (int c = 0; c < C; c++)                                                                            \
                    *(vec *)(done[r] + WIDTH * c) = sum[r][c] + shift;                                                 \
                for (int h = 0; h < H; h++)                                                                            \
                    *(half *)(done[r] + WIDTH * C) = rest[r][h] + shift;                                               \
            }                                                                                                          \
            for (int e = 0; e < SPAN(C, H) && m0 + e < j->m; e++)                                                      \
                for (int r = 0; r < R; r++)                                                                            \
                    j->y[(m0 + e) * j->n + n + r] = done[r][e];                                                        \
        }                                                                                                              \
    }

#if REGISTERS == 32
TILE(tile_1, 0, 1, 8)
TILE(tile_2, 1, 0, 8)
TILE(tile_3, 1, 1, 8)
TILE(tile_4, 2, 0, 8)
TILE(tile_5, 2, 1, 8)
TILE(tile_6, 3, 0, 8)
TILE(tile_8, 4, 0, 6)
#else
TILE(tile_1, 0, 1, 8)
TILE(tile_2, 1, 0, 8)
TILE(tile_3, 1, 1, 4)
TILE(tile_4, 2, 0, 6)
TILE(tile_5, 2, 1, 4)
TILE(tile_6, 3, 0, 4)
TILE(tile_8, 4, 0, 3)
#endif
#define LEAST 8 /* columns of y that a tile needs */
#define BLOCK 48 /* rows of W that all tiles go over before the next: they stay in the cache; a multiple of every R */

static void product(void *data) {
    const long t = me(), all_of_us = team();
    for (const product_t *j = data; j; j = j->next) {
        const long blocks = j->n / BLOCK > 0 ? j->n / BLOCK : 1;
        for (long b = blocks * t / all_of_us; b < blocks * (t + 1) / all_of_us; b++) {
            const long n0 = b * BLOCK, n1 = b == blocks - 1 ? j->n : n0 + BLOCK;
            for (long m0 = 0; m0 < j->wide; m0 += 4 * WIDTH) {
                switch ((j->wide - m0) / FEW) {
                case 1: tile_1(j, m0, n0, n1); break;
                case 2: tile_2(j, m0, n0, n1); break;
                case 3: tile_3(j, m0, n0, n1); break;
                case 4: tile_4(j, m0, n0, n1); break;
                case 5: tile_5(j, m0, n0, n1); break;
                case 6: tile_6(j, m0, n0, n1); break;
                default: tile_8(j, m0, n0, n1);
                }
            }
        }
    }
}

/* Whether half a vector beside whole ones costs as much as a whole one: so it is where the processor multiplies whole
 * vectors in one go, and half of that where it does so in two halves. The results are the same to the last bit. */
static int whole_alone;
void use_whole_vectors(int alone) { whole_alone = alone; }

/* x (m, k), its rows those of tiles: as many as fill them, a column of a tile's behind the other. NULL: no memory. */
static float *turned(const float *x, long m, long k, long *wide) {
    *wide = (m + FEW - 1) / FEW * FEW;
    if (*wide > WIDTH && (whole_alone || *wide % (4 * WIDTH) == 7 * FEW)) /* there is no tile of seven halves */
        *wide = (m + WIDTH - 1) / WIDTH * WIDTH;
    float *columns = room(0, *wide * k);
    for (long m0 = 0; columns && m0 < *wide; m0 += 4 * WIDTH) {
        const long span = *wide - m0 < 4 * WIDTH ? *wide - m0 : 4 * WIDTH;
        float *to = columns + m0 * k;
        for (long i = 0; i < k; i++)
            for (long e = 0; e < span; e++)
                to[i * span + e] = m0 + e < m ? x[(m0 + e) * k + i] : 0.0f;
    }
    return columns;
}

/* Products of x (m, k) with each matrix of the chain, w (n, k), y (m, n); n >= LEAST. 0: done. */
static int products(const float *x, long m, long k, product_t *chain, int count) {
    long wide;
    const float *columns = turned(x, m, k, &wide);
    for (int i = 0; i < count; i++) {
        if (!columns || chain[i].n < LEAST)
            return 1;
        chain[i].columns = columns, chain[i].m = m, chain[i].k = k, chain[i].wide = wide;
        chain[i].next = i + 1 < count ? chain + i + 1 : NULL;
    }
    run(product, chain);
    return 0;
}

int linear(const float *x, const float *w, const float *bias, float *y, long m, long k, long n) {
    return products(x, m, k, &(product_t){.w = w, .bias = bias, .y = y, .n = n}, 1);
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

/* ------------------------------------------------------------------------------------------------------ rotary positions
 * y = x cos + (-second half of x, first half) sin; x and y (heads, m, size) with strides, cos and sin (m, size). y may be
 * x. */
void rotate(const float *x, const long *x_strides, const float *cosine, const float *sine, float *y,
            const long *y_strides, long heads, long m, long size) {
    const long n = size / 2;
    for (long row = 0; row < m; row++)
        for (long h = 0; h < heads; h++) {
            const float *c = cosine + row * size, *s = sine + row * size;
            const float *from = x + h * x_strides[0] + row * x_strides[1];
            float *to = y + h * y_strides[0] + row * y_strides[1];
            long i = 0;
            for (; i + WIDTH <= n; i += WIDTH) {
                const vec a = *(const vec *)(from + i), b = *(const vec *)(from + i + n);
                *(vec *)(to + i) = a * *(const vec *)(c + i) - b * *(const vec *)(s + i);
                *(vec *)(to + i + n) = b * *(const vec *)(c + i + n) + a * *(const vec *)(s + i + n);
            }
            for (; i < n; i++) {
                const float a = from[i], b = from[i + n];
                to[i] = a * c[i] - b * s[i];
                to[i + n] = b * c[i + n] + a * s[i + n];
            }
        }
}

/* --------------------------------------------------------------------------------------------------- a whole layer at once
 *     h = x + o(attend(rotate(q(norm x)), rotate(k(norm x)), v(norm x))),  y = h + down(silu(gate(norm h)) up(norm h))
 * as the most usual decoders have it, with low-rank adapters or without, by the functions above in the same order: what
 * comes out is theirs to the bit. A step has some ten small operations between two products, and calling each from Python takes as long as it does. */
typedef struct {
    const float *w, *bias, *a, *b; /* w (n, k); a (rank, k), b (n, rank): an adapter, or NULL */
    const packed_t *packed;        /* in place of w, or NULL */
    long n, rank;
    float scale; /* of the adapter */
} matrix_t;

typedef struct {
    const float *norm, *after, *q_norm, *k_norm;
    matrix_t q, k, v, o, gate, up, down;
    long hidden, heads, kv, size, inner, rank; /* rank: the largest */
    float eps, head_eps, after_eps, scale;
} layer_t;

/* y = x W^T + bias + scale (x A^T) B^T of each matrix; low: room for `count` times (m, rank) and once (m, n). 0: done. */
static int project(const float *x, long m, long k, const matrix_t *const *matrices, float *const *ys, int count,
                   long rank, float *low) {
    product_t chain[6];
    const packed_t *packed[3];
    const float *biases[3];
    float *of_packed[3];
    int length = 0, few_bits = 0;
    for (int i = 0; i < count; i++) {
        const matrix_t *w = matrices[i];
        if (w->packed) {
            packed[few_bits] = w->packed, biases[few_bits] = w->bias, of_packed[few_bits++] = ys[i];
            continue;
        }
        chain[length++] = (product_t){.w = w->w, .bias = w->bias, .y = ys[i], .n = w->n};
    }
    if (few_bits && quantized_products(x, m, packed, biases, of_packed, few_bits))
        return 1;
    for (int i = 0; i < count; i++)
        if (matrices[i]->a)
            chain[length++] = (product_t){.w = matrices[i]->a, .y = low + i * m * rank, .n = matrices[i]->rank};
    if (length && products(x, m, k, chain, length))
        return 1;
    float *more = low + count * m * rank;
    for (int i = 0; i < count; i++) {
        const matrix_t *w = matrices[i];
        if (!w->a)
            continue;
        if (linear(low + i * m * rank, w->b, NULL, more, m, w->rank, w->n))
            return 1;
        for (long e = 0; e < m * w->n; e++)
            ys[i][e] += w->scale * more[e];
    }
    return 0;
}

/* x, y (m, hidden); sizes: m, own_columns, shared_columns; the rest as `attend` has it. 0: done. */
int layer(const layer_t *l, const float *x, float *y, const float *cosine, const float *sine, void *const *regions,
          const long *column, const long *prompt, const long *prompt_length, const long *sizes) {
    const long m = sizes[0], wide = l->heads * l->size, narrow = l->kv * l->size;
    const long inner = l->inner > wide ? l->inner : wide, widest = inner > l->hidden ? inner : l->hidden;
    float *normed = room(1, m * (2 * l->hidden + 4 * widest + 2 * narrow + 3 * l->rank));
    if (!normed)
        return 1;
    float *made = normed + m * l->hidden, *q = made + m * l->hidden, *heads = q + m * widest;
    float *gates = heads + m * widest, *k = gates + m * widest, *v = k + m * narrow, *low = v + m * narrow;
    rms_norm(x, l->norm, normed, m, l->hidden, l->eps, 0.0f);
    if (project(normed, m, l->hidden, (const matrix_t *const[]){&l->q, &l->k, &l->v}, (float *const[]){q, k, v}, 3,
                l->rank, low))
        return 1;
    if (l->q_norm) {
        rms_norm(q, l->q_norm, q, m * l->heads, l->size, l->head_eps, 0.0f);
        rms_norm(k, l->k_norm, k, m * l->kv, l->size, l->head_eps, 0.0f);
    }
    const long of_q[] = {l->size, wide}, of_k[] = {l->size, narrow};
    rotate(q, of_q, cosine, sine, q, of_q, l->heads, m, l->size);
    rotate(k, of_k, cosine, sine, k, of_k, l->kv, m, l->size);
    const long strides[] = {l->size, wide, l->size, narrow, l->size, narrow};
    const long attended[] = {m, l->kv, l->heads / l->kv, l->size, sizes[1], sizes[2], 0};
    if (attend(q, k, v, strides, regions, heads, column, prompt, prompt_length, attended, l->scale) ||
        project(heads, m, wide, (const matrix_t *const[]){&l->o}, &made, 1, l->rank, low))
        return 1;
    for (long i = 0; i < m * l->hidden; i++)
        y[i] = x[i] + made[i];
    rms_norm(y, l->after, normed, m, l->hidden, l->after_eps, 0.0f);
    if (project(normed, m, l->hidden, (const matrix_t *const[]){&l->gate, &l->up}, (float *const[]){gates, q}, 2,
                l->rank, low))
        return 1;
    gated(gates, q, heads, m * l->inner);
    if (project(heads, m, l->inner, (const matrix_t *const[]){&l->down}, &made, 1, l->rank, low))
        return 1;
    for (long i = 0; i < m * l->hidden; i++)
        y[i] += made[i];
    return 0;
}
