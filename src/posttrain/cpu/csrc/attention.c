/* Attention of one decoding step. Row m's newest key and value go to column column[m] of slot m. Its queries then see the
 * columns of its prompt's slot (no shared region: none) and its own up to that one, the last `window` of them (0: all).
 * Softmax over both regions at once.
 *
 * Keys and values lie in float32, or in int8 with a scale for each token and head, as posttrain.sampling.int8_cache has
 * it. Integers are made float32 in registers; scales of keys multiply scores, and those of values the weights.
 */
#include "kernels.h"

typedef struct {
    char *k, *v;                /* (slots, kv, columns, size): float32, or int8 if there are scales */
    float *k_scales, *v_scales; /* (slots, kv, columns), or NULL */
    long columns;
} region_t;

typedef struct {
    const float *q, *k, *v;
    long q_head, q_row, k_head, k_row, v_head, v_row;
    region_t own, shared;
    float *out, *scratch;
    const long *column, *prompt, *prompt_length;
    long m, kv, groups, size, window, longest;
    float scale;
} attention_t;

/* ---------------------------------------------------------------------------------------------------- what is stored */
static inline vec read_float(const float *p) { return *(const vec *)p; }

/* x / scale to the nearest integer, ties to even as torch has it; a number that is none makes the scale none */
static void quantize(const float *x, byte *to, float *scale, long size) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to an integer */
    float top = 1e-30f, broken = 0.0f;
    for (long i = 0; i < size; i++) {
        const float a = __builtin_fabsf(x[i]);
        top = a > top ? a : top;
        broken += x[i] * 0.0f;
    }
    const float s = top / 127.0f;
    for (long i = 0; i < size; i++)
        to[i] = (byte)(int)(x[i] / s + magic - magic);
    *scale = s + broken;
}

static void store(const float *x, char *rows, float *scales, long row, long size) {
    if (scales)
        quantize(x, (byte *)rows + row * size, scales + row, size);
    else
        for (long i = 0; i < size; i++)
            ((float *)rows)[row * size + i] = x[i];
}

static inline long row_bytes(const region_t *r, long size) { return r->k_scales ? size : 4 * size; }

/* A row that is read soon. Memory is slower than these loops, and does not guess where the next region begins. */
static inline void fetch(const char *row, long bytes) {
    for (long i = 0; i < bytes; i += 64)
        __builtin_prefetch(row + i);
}

/* --------------------------------------------------------------------------------------------------------- products
 * Of G queries that share keys and values, and of N keys at a time: a number that is read is used for all of them. What
 * comes out is the same for any G and N, to the bit. */
#define DOTS(READ, G, N)                                                                                               \
    do {                                                                                                               \
        vec sum[N][G];                                                                                                 \
        for (int n = 0; n < N; n++)                                                                                    \
            for (int g = 0; g < G; g++)                                                                                \
                sum[n][g] = (vec){0};                                                                                  \
        long i = 0;                                                                                                    \
        for (; i + WIDTH <= size; i += WIDTH)                                                                          \
            for (int n = 0; n < N; n++) {                                                                              \
                const vec row = READ(k + n * size + i);                                                                \
                for (int g = 0; g < G; g++)                                                                            \
                    sum[n][g] += row * *(const vec *)(q + g * step + i);                                               \
            }                                                                                                          \
        for (int n = 0; n < N; n++)                                                                                    \
            for (int g = 0; g < G; g++)                                                                                \
                p[g * longest + c + n] = sum_of(sum[n][g]);                                                            \
        for (; i < size; i++)                                                                                          \
            for (int n = 0; n < N; n++)                                                                                \
                for (int g = 0; g < G; g++)                                                                            \
                    p[g * longest + c + n] += k[n * size + i] * q[g * step + i];                                       \
    } while (0)

/* p[g, c] = q[g] k[c] of `count` keys; rows of q are `step` apart, those of p `longest` */
#define COMPARE(NAME, TYPE, READ, G, N)                                                                                \
    static void NAME(const void *rows, const float *q, long step, long size, long count, float *p, long longest) {     \
        const TYPE *k = rows;                                                                                          \
        long c = 0;                                                                                                    \
        for (; c + N <= count; c += N, k += N * size)                                                                  \
            DOTS(READ, G, N);                                                                                          \
        for (; c < count; c++, k += size)                                                                              \
            DOTS(READ, G, 1);                                                                                          \
    }

#define WEIGHTED(READ, G, B)                                                                                           \
    for (; d + B * WIDTH <= size; d += B * WIDTH) {                                                                    \
        vec a[G][B];                                                                                                   \
        for (int g = 0; g < G; g++)                                                                                    \
            for (int b = 0; b < B; b++)                                                                                \
                a[g][b] = *(const vec *)(outs + g * size + d + b * WIDTH);                                             \
        for (long c = 0; c < count; c++)                                                                               \
            for (int b = 0; b < B; b++) {                                                                              \
                const vec row = READ(v + c * size + d + b * WIDTH);                                                    \
                for (int g = 0; g < G; g++)                                                                            \
                    a[g][b] += p[g * longest + c] * row;                                                               \
            }                                                                                                          \
        for (int g = 0; g < G; g++)                                                                                    \
            for (int b = 0; b < B; b++)                                                                                \
                *(vec *)(outs + g * size + d + b * WIDTH) = a[g][b];                                                   \
    }

/* outs[g] += p[g, c] v[c] of `count` values; a block of B vectors stays in registers */
#define WEIGH(NAME, TYPE, READ, G, B)                                                                                  \
    static void NAME(const void *rows, const float *p, long longest, long size, long count, float *outs) {             \
        const TYPE *v = rows;                                                                                          \
        long d = 0;                                                                                                    \
        WEIGHTED(READ, G, B)                                                                                           \
        WEIGHTED(READ, G, 1)                                                                                           \
        for (; d < size; d++)                                                                                          \
            for (long c = 0; c < count; c++)                                                                           \
                for (int g = 0; g < G; g++)                                                                            \
                    outs[g * size + d] += p[g * longest + c] * v[c * size + d];                                        \
    }

#define MOST 4 /* queries at a time */
typedef void (*compare_f)(const void *, const float *, long, long, long, float *, long);
typedef void (*weigh_f)(const void *, const float *, long, long, long, float *);

#define KIND(TYPE, READ)                                                                                               \
    COMPARE(compare_##TYPE##_1, TYPE, READ, 1, 4)                                                                      \
    COMPARE(compare_##TYPE##_2, TYPE, READ, 2, 2)                                                                      \
    COMPARE(compare_##TYPE##_3, TYPE, READ, 3, 2)                                                                      \
    COMPARE(compare_##TYPE##_4, TYPE, READ, 4, 2)                                                                      \
    WEIGH(weigh_##TYPE##_1, TYPE, READ, 1, 4)                                                                          \
    WEIGH(weigh_##TYPE##_2, TYPE, READ, 2, 4)                                                                          \
    WEIGH(weigh_##TYPE##_3, TYPE, READ, 3, 2)                                                                          \
    WEIGH(weigh_##TYPE##_4, TYPE, READ, 4, 2)                                                                          \
    static const compare_f compare_##TYPE[] = {compare_##TYPE##_1, compare_##TYPE##_2, compare_##TYPE##_3,             \
                                               compare_##TYPE##_4};                                                    \
    static const weigh_f weigh_##TYPE[] = {weigh_##TYPE##_1, weigh_##TYPE##_2, weigh_##TYPE##_3, weigh_##TYPE##_4};

KIND(float, read_float)
KIND(byte, read_byte)

static inline long least(long a, long b) { return a < b ? a : b; }

#define KEYS 8    /* at a time for all queries; meanwhile as many values are fetched */
#define VALUES 64 /* at a time: they stay in the innermost cache */

/* p[g, c] = scale q[g] k[c], for `count` keys from row `first` on and the queries that share them */
static void compare(const attention_t *j, const float *q, const region_t *r, long first, long count, float *p) {
    const long size = j->size, bytes = row_bytes(r, size);
    const compare_f *by_groups = r->k_scales ? compare_byte : compare_float;
    for (long c = 0; c < count; c += KEYS) {
        const long n = least(KEYS, count - c), at = (first + c) * bytes;
        for (long row = 0; row < n; row++)
            fetch(r->v + at + row * bytes, bytes);
        for (long g = 0; g < j->groups; g += MOST)
            by_groups[least(MOST, j->groups - g) - 1](r->k + at, q + g * j->q_head, j->q_head, size, n,
                                                      p + g * j->longest + c, j->longest);
    }
    for (long g = 0; g < j->groups; g++, p += j->longest)
        for (long c = 0; c < count; c++)
            p[c] *= r->k_scales ? j->scale * r->k_scales[first + c] : j->scale;
}

/* outs[g] += p[g, c] v[c] over `count` values from row `first` on; p changes */
static void weigh(const attention_t *j, float *p, const region_t *r, long first, long count, float *outs) {
    const long size = j->size, bytes = row_bytes(r, size);
    const weigh_f *by_groups = r->v_scales ? weigh_byte : weigh_float;
    for (long g = 0; r->v_scales && g < j->groups; g++)
        for (long c = 0; c < count; c++)
            p[g * j->longest + c] *= r->v_scales[first + c];
    for (long c = 0; c < count; c += VALUES)
        for (long g = 0; g < j->groups; g += MOST)
            by_groups[least(MOST, j->groups - g) - 1](r->v + (first + c) * bytes, p + g * j->longest + c, j->longest,
                                                      size, least(VALUES, count - c), outs + g * size);
}

/* p becomes e^(p - its largest); returns their sum. p has room for whole vectors. */
static float exponentials(float *p, long count) {
    const long filled = (count + WIDTH - 1) / WIDTH * WIDTH;
    for (long c = count; c < filled; c++)
        p[c] = -__builtin_inff();
    vec largest = *(const vec *)p, sums = {0};
    for (long c = WIDTH; c < filled; c += WIDTH) {
        const vec x = *(const vec *)(p + c);
        const vec_int more = x > largest;
        largest = (vec)(((vec_int)x & more) | ((vec_int)largest & ~more));
    }
    float top = largest[0];
    for (long i = 1; i < WIDTH; i++)
        top = largest[i] > top ? largest[i] : top;
    for (long c = 0; c < filled; c += WIDTH) {
        vec e = exponential(*(vec *)(p + c) - top);
        if (c + WIDTH > count)
            for (long i = count - c; i < WIDTH; i++)
                e[i] = 0.0f;
        *(vec *)(p + c) = e;
        sums += e;
    }
    return sum_of(sums);
}

static long scratch_of(const attention_t *j) { return (j->longest + 1) * j->groups; }

static void attend_part(void *data) {
    const attention_t *j = data;
    const region_t *own = &j->own, *shared = &j->shared;
    const long t = me(), all_of_us = team(), items = j->m * j->kv, size = j->size;
    float *p = j->scratch + t * scratch_of(j), *totals = p + j->longest * j->groups;
    for (long item = items * t / all_of_us; item < items * (t + 1) / all_of_us; item++) {
        const long m = item / j->kv, h = item % j->kv, column = j->column[m], own_row = item * own->columns;
        store(j->k + h * j->k_head + m * j->k_row, own->k, own->k_scales, own_row + column, size);
        store(j->v + h * j->v_head + m * j->v_row, own->v, own->v_scales, own_row + column, size);
        const long length = shared->k ? j->prompt_length[m] : 0, total = length + column + 1;
        const long first = j->window && total > j->window ? total - j->window : 0;
        const long from = least(first, length), own_from = first - from;
        const long slot = shared->k ? (j->prompt[m] * j->kv + h) * shared->columns + from : 0;
        const long seen = length - from, own_seen = column + 1 - own_from;
        const float *q = j->q + h * j->groups * j->q_head + m * j->q_row;
        compare(j, q, shared, slot, seen, p);
        compare(j, q, own, own_row + own_from, own_seen, p + seen);
        const long bytes = row_bytes(own, size);
        const char *next = own->k + (own_row + own->columns) * bytes;
        const long next_seen = item + 1 < items ? j->column[(item + 1) / j->kv] : 0;
        for (long c = 0; c < next_seen && c < own_seen; c++)
            fetch(next + c * bytes, bytes);
        float *outs = j->out + item * j->groups * size;
        for (long g = 0; g < j->groups; g++)
            totals[g] = exponentials(p + g * j->longest, seen + own_seen);
        for (long i = 0; i < j->groups * size; i++)
            outs[i] = 0.0f;
        weigh(j, p, shared, slot, seen, outs);
        weigh(j, p + seen, own, own_row + own_from, own_seen, outs);
        for (long g = 0; g < j->groups; g++)
            for (long i = 0; i < size; i++)
                outs[g * size + i] /= totals[g];
    }
}

/* q, k, v: (heads, rows, size) with these strides, the last 1; regions: k, its scales, v, its scales, of the own and of the
 * shared region, NULL for what is not there; sizes: m, kv, groups, size, columns of both regions, window; out (m, heads,
 * size). 0: done. */
int attend(const float *q, const float *k, const float *v, const long *strides, void *const *regions, float *out,
           const long *column, const long *prompt, const long *prompt_length, const long *sizes, float scale) {
    const region_t own = {regions[0], regions[2], regions[1], regions[3], sizes[4]};
    const region_t shared = {regions[4], regions[6], regions[5], regions[7], sizes[5]};
    const long longest = sizes[4] + (shared.k ? sizes[5] : 0) + 2 * WIDTH;
    attention_t job = {q, k, v, strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], own, shared,
                       out, NULL, column, prompt, prompt_length,
                       sizes[0], sizes[1], sizes[2], sizes[3], sizes[6], longest, scale};
    job.scratch = room(0, scratch_of(&job) * pool.threads);
    if (!job.scratch)
        return 1;
    run(attend_part, &job);
    return 0;
}
