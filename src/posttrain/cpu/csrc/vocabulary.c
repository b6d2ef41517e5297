/* What a tile of logits adds to each position's softmax, in one pass: largest, total, and the logits' weighted sum. */
#include "kernels.h"

#define BLOCK 512 /* logits whose weights are added in float32 before float64 takes them */

typedef struct {
    float *z, *top, *total, *weighted;
    long m, v;
    int keep;
    long next;
} absorb_t;

static void absorb_row(const absorb_t *j, long row) {
    float *z = j->z + row * j->v, top = j->top[row];
    vec most = all(-__builtin_inff());
    long i = 0;
    for (; i + WIDTH <= j->v; i += WIDTH) {
        const vec x = *(const vec *)(z + i);
        const vec_int more = x > most;
        most = (vec)(((vec_int)x & more) | ((vec_int)most & ~more));
    }
    for (int e = 0; e < WIDTH; e++)
        top = most[e] > top ? most[e] : top;
    for (; i < j->v; i++)
        top = z[i] > top ? z[i] : top;
    /* What was added before is in terms of an earlier largest. */
    const float less = weight_of(all(j->top[row] - top))[0];
    double total = (double)j->total[row] * less;
    double weighted = j->weighted && total > 0 ? less * (double)j->weighted[row] + total * (j->top[row] - top) : 0;
    for (long begin = 0; begin < j->v; begin += BLOCK) {
        const long end = begin + BLOCK < j->v ? begin + BLOCK : j->v;
        vec sum = {0}, moment = {0};
        float rest = 0, rest_moment = 0;
        for (i = begin; i + WIDTH <= end; i += WIDTH) {
            const vec x = *(const vec *)(z + i) - top, e = weight_of(x);
            sum += e;
            if (j->weighted)
                moment += e * (vec)((vec_int)x & ((vec_int)e != 0)); /* no weight times -inf is nothing */
            if (j->keep)
                *(vec *)(z + i) = e;
        }
        for (; i < end; i++) {
            const float x = z[i] - top, e = weight_of(all(x))[0];
            rest += e;
            if (e != 0)
                rest_moment += e * x;
            if (j->keep)
                z[i] = e;
        }
        total += (double)sum_of(sum) + rest;
        weighted += (double)sum_of(moment) + rest_moment;
    }
    j->top[row] = top;
    j->total[row] = total;
    if (j->weighted)
        j->weighted[row] = weighted;
}

static void absorb_part(void *data) {
    absorb_t *j = data;
    for (long row = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED); row < j->m;
         row = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED))
        absorb_row(j, row);
}

/* z (m, v), a tile's logits; top, total, weighted (m): the largest so far, the sums of e^(z - top) and of that times
 * (z - top). weighted may be NULL. keep: z becomes e^(z - top), of the new top. */
void absorb(float *z, float *top, float *total, float *weighted, long m, long v, int keep) {
    absorb_t job = {z, top, total, weighted, m, v, keep, 0};
    run(absorb_part, &job);
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
    double *sums = (double *)room(0, 2 * pool.threads * ((v + BINS - 1) / BINS));
    if (!sums)
        return 1;
    draw_t job = {z, u, token, logprob, sums, m, v};
    run(draw_part, &job);
    return 0;
}
