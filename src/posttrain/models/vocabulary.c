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
