/* Norms, gates and rotations of many rows, forward and back: what lies between the products of a training step, in one
 * pass each. Threads share the rows; a row's result is a matter of the row alone. */
#include "kernels.h"

#define FEW 256 /* rows: up to so many one thread is quicker */

static inline void share(void (*work)(void *), void *job, long rows) {
    if (rows > FEW)
        run(work, job);
    else
        work(job);
}

/* where the rows of this thread begin; alone: outside of `run`, with all of them */
static inline long first_row(long rows, int next) {
    return rows <= FEW ? rows * next : rows * (me() + next) / team();
}

/* ------------------------------------------------------------------------------------------------------------ RMSNorm
 * Back, with r = 1 / sqrt(mean(x^2) + eps) and g = dy (weight + shift): dx = r (g - x r mean(g x r)). */
typedef struct {
    const float *x, *weight, *dy;
    float *y;
    long m, h;
    float eps, shift;
} norm_t;

static void norm_part(void *data) {
    const norm_t *j = data;
    const long from = first_row(j->m, 0), to = first_row(j->m, 1);
    rms_norm(j->x + from * j->h, j->weight, j->y + from * j->h, to - from, j->h, j->eps, j->shift);
}

void rms_norm_rows(const float *x, const float *weight, float *y, long m, long h, float eps, float shift) {
    norm_t job = {x, weight, NULL, y, m, h, eps, shift};
    share(norm_part, &job, m);
}

static void norm_back_part(void *data) {
    const norm_t *j = data;
    const long h = j->h, to = first_row(j->m, 1);
    for (long row = first_row(j->m, 0); row < to; row++) {
        const float *x = j->x + row * h, *dy = j->dy + row * h;
        float *dx = j->y + row * h;
        vec squares = {0}, inner = {0};
        long i = 0;
        for (; i + WIDTH <= h; i += WIDTH) {
            const vec a = *(const vec *)(x + i);
            squares += a * a;
            inner += *(const vec *)(dy + i) * (*(const vec *)(j->weight + i) + j->shift) * a;
        }
        float square = sum_of(squares), product = sum_of(inner);
        for (; i < h; i++) {
            square += x[i] * x[i];
            product += dy[i] * (j->weight[i] + j->shift) * x[i];
        }
        const float r = 1.0f / __builtin_sqrtf(square / h + j->eps), part = r * product / h;
        for (i = 0; i + WIDTH <= h; i += WIDTH)
            *(vec *)(dx + i) = r * (*(const vec *)(dy + i) * (*(const vec *)(j->weight + i) + j->shift) -
                                    *(const vec *)(x + i) * r * part);
        for (; i < h; i++)
            dx[i] = r * (dy[i] * (j->weight[i] + j->shift) - x[i] * r * part);
    }
}

void rms_norm_back(const float *x, const float *weight, const float *dy, float *dx, long m, long h, float eps,
                   float shift) {
    norm_t job = {x, weight, dy, dx, m, h, eps, shift};
    share(norm_back_part, &job, m);
}

/* ---------------------------------------------------------------------------------------------- y = silu(gate) * up, back
 * With s = 1 / (1 + e^-gate): d_gate = d up s (1 + gate (1 - s)) and d_up = d gate s. d_gate may be d. */
typedef struct {
    const float *gate, *up, *d;
    float *d_gate, *d_up;
    long count;
} gated_back_t;

static inline void gate_back(vec g, vec u, vec d, vec *d_gate, vec *d_up) {
    const vec e = exponential(-g), s = 1.0f / (1.0f + e);
    *d_up = d * g * s;
    *d_gate = d * u * s * (1.0f + g * (e * s));
}

static void gated_back_part(void *data) {
    const gated_back_t *j = data;
    const long vectors = j->count / WIDTH, t = me(), all_of_us = team();
    for (long i = vectors * t / all_of_us * WIDTH; i < vectors * (t + 1) / all_of_us * WIDTH; i += WIDTH)
        gate_back(*(const vec *)(j->gate + i), *(const vec *)(j->up + i), *(const vec *)(j->d + i),
                  (vec *)(j->d_gate + i), (vec *)(j->d_up + i));
    if (t == all_of_us - 1)
        for (long i = vectors * WIDTH; i < j->count; i++) {
            vec d_gate, d_up;
            gate_back(all(j->gate[i]), all(j->up[i]), all(j->d[i]), &d_gate, &d_up);
            j->d_gate[i] = d_gate[0], j->d_up[i] = d_up[0];
        }
}

void gated_back(const float *gate, const float *up, const float *d, float *d_gate, float *d_up, long count) {
    gated_back_t job = {gate, up, d, d_gate, d_up, count};
    run(gated_back_part, &job);
}

/* ----------------------------------------------------------------------------------------------------- rotary positions */
typedef struct {
    const float *x, *cosine, *sine;
    float *y;
    const long *x_strides, *y_strides;
    long heads, m, size;
} rotate_t;

static void rotate_part(void *data) {
    const rotate_t *j = data;
    const long from = first_row(j->m, 0), to = first_row(j->m, 1);
    rotate(j->x + from * j->x_strides[1], j->x_strides, j->cosine + from * j->size, j->sine + from * j->size,
           j->y + from * j->y_strides[1], j->y_strides, j->heads, to - from, j->size);
}

void rotate_rows(const float *x, const long *x_strides, const float *cosine, const float *sine, float *y,
                 const long *y_strides, long heads, long m, long size) {
    rotate_t job = {x, cosine, sine, y, x_strides, y_strides, heads, m, size};
    share(rotate_part, &job, m);
}
