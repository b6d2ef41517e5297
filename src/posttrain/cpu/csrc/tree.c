/* Attention of a ragged batch on a CPU, forward and backward, in float32: softmax(scale q k^T) v, where a token sees its
 * own segment up to itself and all of the segments that it descends from.
 *
 * Tiles of queries go over panels of keys, a softmax that is corrected as its largest score grows (arXiv 2205.14135): no
 * matrix of scores is kept, and what nobody sees is not computed. A query's result depends on nothing but its own
 * chain of segments, to the last bit: panels begin where segments do, and sums go in one order.
 */
#include "kernels.h"

#define ROWS 6 /* queries (or keys) that are held in registers beside WIDE vectors */
#if REGISTERS == 32
#define WIDE 4
#else
#define WIDE 2
#endif
#define PANEL (WIDE * WIDTH) /* keys that lie turned round, a dimension's behind the other's */
#define TALL 48              /* queries of a tile */

typedef struct {
    const float *q, *k, *v, *out, *d_out;
    long q_head, q_row, k_head, k_row, v_head, v_row, d_head, d_row;
    const long *starts, *ends, *parents;
    long segments, heads, kv, size, total, window;
    float scale;
    float *result, *lse, *d_q, *d_k, *d_v; /* out as it is made; d_k and d_v have a part for each head of q */
    long *offsets, *panels, *roots;        /* of a segment: its first position, its first panel; first segments of trees */
    long trees, all_panels;
    long *tile_segment, *tile_start, tiles;
    float *keys, *values, *scratch; /* panels; what each thread works in */
    long each, next;
} tree_t;

#define INLINE static inline __attribute__((always_inline))

/* c (rows, PANEL) = a (rows, size) times a panel (size, PANEL) */
INLINE void against(const int rows, const float *a, long a_row, const float *panel, long size, float *c) {
    vec sum[ROWS][WIDE];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < WIDE; w++)
            sum[r][w] = (vec){0};
    for (long d = 0; d < size; d++, panel += PANEL)
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < WIDE; w++)
                sum[r][w] += a[r * a_row + d] * *(const vec *)(panel + w * WIDTH);
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < WIDE; w++)
            *(vec *)(c + r * PANEL + w * WIDTH) = sum[r][w];
}

static void scores(long rows, const float *a, long a_row, const float *panel, long size, float *c) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_row, c += ROWS * PANEL)
        against(ROWS, a, a_row, panel, size, c);
    switch (rows) {
    case 5: against(5, a, a_row, panel, size, c); break;
    case 4: against(4, a, a_row, panel, size, c); break;
    case 3: against(3, a, a_row, panel, size, c); break;
    case 2: against(2, a, a_row, panel, size, c); break;
    case 1: against(1, a, a_row, panel, size, c); break;
    }
}

/* c (rows, wide vectors) += a (rows, n) b (n, wide vectors); a with strides of its own */
INLINE void onto(const int rows, const int wide, const float *a, long a_row, long a_next, const float *b, long b_row,
                 long n, float *c, long c_row) {
    vec sum[ROWS][WIDE];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++)
            sum[r][w] = *(const vec *)(c + r * c_row + w * WIDTH);
    for (long i = 0; i < n; i++, a += a_next, b += b_row)
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < wide; w++)
                sum[r][w] += a[r * a_row] * *(const vec *)(b + w * WIDTH);
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++)
            *(vec *)(c + r * c_row + w * WIDTH) = sum[r][w];
}

INLINE void onto_rows(const int wide, long rows, const float *a, long a_row, long a_next, const float *b, long b_row,
                      long n, float *c, long c_row) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row)
        onto(ROWS, wide, a, a_row, a_next, b, b_row, n, c, c_row);
    switch (rows) {
    case 5: onto(5, wide, a, a_row, a_next, b, b_row, n, c, c_row); break;
    case 4: onto(4, wide, a, a_row, a_next, b, b_row, n, c, c_row); break;
    case 3: onto(3, wide, a, a_row, a_next, b, b_row, n, c, c_row); break;
    case 2: onto(2, wide, a, a_row, a_next, b, b_row, n, c, c_row); break;
    case 1: onto(1, wide, a, a_row, a_next, b, b_row, n, c, c_row); break;
    }
}

/* c (rows, size) += a (rows, n) b (n, size) */
static void add_product(long rows, const float *a, long a_row, long a_next, const float *b, long b_row, long n,
                        float *c, long c_row, long size) {
    long d = 0;
    for (; d + WIDE * WIDTH <= size; d += WIDE * WIDTH)
        onto_rows(WIDE, rows, a, a_row, a_next, b + d, b_row, n, c + d, c_row);
    for (; d < size; d += WIDTH)
        onto_rows(1, rows, a, a_row, a_next, b + d, b_row, n, c + d, c_row);
}

/* ------------------------------------------------------------------------------------------------------------ panels */
static void pack(const tree_t *j, const float *from, long head, long row, float *to) {
    for (long s = 0; s < j->segments; s++)
        for (long p = 0; p < j->panels[s + 1] - j->panels[s]; p++) {
            float *panel = to + (j->panels[s] + p) * PANEL * j->size;
            const long first = j->starts[s] + p * PANEL;
            const long n = j->ends[s] - first < PANEL ? j->ends[s] - first : PANEL;
            for (long c = 0; c < n; c++)
                for (long d = 0; d < j->size; d++)
                    panel[d * PANEL + c] = from[head + (first + c) * row + d];
            for (long d = 0; d < j->size; d++)
                for (long c = n; c < PANEL; c++)
                    panel[d * PANEL + c] = 0.0f;
        }
}

static long take(tree_t *j) { return __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED); }

static void pack_part(void *data) {
    tree_t *j = data;
    const long wide = j->all_panels * PANEL * j->size;
    for (long i = take(j); i < j->kv * (j->values ? 2 : 1); i = take(j)) {
        if (i < j->kv)
            pack(j, j->k, i * j->k_head, j->k_row, j->keys + i * wide);
        else
            pack(j, j->v, (i - j->kv) * j->v_head, j->v_row, j->values + (i - j->kv) * wide);
    }
}

/* ------------------------------------------------------------------------------------------------- a tile and a panel */
typedef struct {
    long row, rows, first;  /* of the tile: its first row of the batch, how many, their first position */
    long key, keys, offset; /* of the panel: its first row of the batch, how many, their first position */
    const float *panel;     /* of keys */
} part_t;

/* The keys low..high of the panel are those that query r sees. */
static inline void seen(const tree_t *j, const part_t *p, long r, long *low, long *high) {
    const long behind = p->first + r - p->offset; /* how far the query stands behind the panel's first key */
    *high = behind + 1 < p->keys ? (behind < 0 ? 0 : behind + 1) : p->keys;
    *low = j->window && behind >= j->window ? behind - j->window + 1 : 0;
    if (*low > *high)
        *low = *high;
}

/* Goes over the panels that a tile's queries see, from their own segment up to the root; work is told of each. */
INLINE void over_panels(tree_t *j, long h, long s, long start, long rows, float *mine,
                        void (*work)(tree_t *, long, const part_t *, float *)) {
    const long kv = h / (j->heads / j->kv), wide = j->all_panels * PANEL * j->size;
    part_t p = {start, rows, j->offsets[s] + start - j->starts[s], 0, 0, 0, NULL};
    for (long a = s; a >= 0; a = j->parents[a]) {
        const long end = a == s ? start + rows : j->ends[a];
        for (long i = 0; j->starts[a] + i * PANEL < end; i++) {
            p.key = j->starts[a] + i * PANEL;
            p.keys = end - p.key < PANEL ? end - p.key : PANEL;
            p.offset = j->offsets[a] + i * PANEL;
            if (j->window && p.first - j->window + 1 >= p.offset + p.keys)
                continue;
            p.panel = j->keys + kv * wide + (j->panels[a] + i) * PANEL * j->size;
            work(j, h, &p, mine);
        }
    }
}

/* ----------------------------------------------------------------------------------------------------------- forward */
/* mine: scores (TALL, PANEL), sums (TALL, size), the largest score and the total of each query */
static void forward_panel(tree_t *j, long h, const part_t *p, float *mine) {
    const long size = j->size;
    float *s = mine, *sums = s + TALL * PANEL, *top = sums + TALL * size, *total = top + TALL;
    scores(p->rows, j->q + h * j->q_head + p->row * j->q_row, j->q_row, p->panel, size, s);
    for (long r = 0; r < p->rows; r++) {
        float *row = s + r * PANEL;
        long low, high;
        seen(j, p, r, &low, &high);
        for (long c = 0; c < low; c++)
            row[c] = -__builtin_inff();
        for (long c = high; c < PANEL; c++)
            row[c] = -__builtin_inff();
        vec most = all(-__builtin_inff());
        for (int w = 0; w < WIDE; w++) {
            const vec x = *(vec *)(row + w * WIDTH) * j->scale;
            const vec_int more = x > most;
            most = (vec)(((vec_int)x & more) | ((vec_int)most & ~more));
            *(vec *)(row + w * WIDTH) = x;
        }
        float highest = top[r];
        for (int e = 0; e < WIDTH; e++)
            highest = most[e] > highest ? most[e] : highest;
        if (highest > top[r]) {
            const vec less = weight_of(all(top[r] - highest));
            for (long d = 0; d < size; d += WIDTH)
                *(vec *)(sums + r * size + d) *= less;
            total[r] *= less[0];
            top[r] = highest;
        }
        vec sum = {0};
        for (int w = 0; w < WIDE; w++)
            sum += *(vec *)(row + w * WIDTH) = weight_of(*(vec *)(row + w * WIDTH) - highest);
        total[r] += sum_of(sum);
    }
    const float *v = j->v + h / (j->heads / j->kv) * j->v_head + p->key * j->v_row;
    add_product(p->rows, s, PANEL, 1, v, j->v_row, p->keys, sums, size, size);
}

static void forward_part(void *data) {
    tree_t *j = data;
    float *mine = j->scratch + me() * j->each;
    float *sums = mine + TALL * PANEL, *top = sums + TALL * j->size, *total = top + TALL;
    for (long i = take(j); i < j->heads * j->tiles; i = take(j)) {
        const long h = i / j->tiles, s = j->tile_segment[i % j->tiles], start = j->tile_start[i % j->tiles];
        const long rows = j->ends[s] - start < TALL ? j->ends[s] - start : TALL;
        for (long e = 0; e < rows * j->size; e++)
            sums[e] = 0.0f;
        for (long r = 0; r < rows; r++)
            top[r] = NOTHING, total[r] = 0.0f;
        over_panels(j, h, s, start, rows, mine, forward_panel);
        for (long r = 0; r < rows; r++) {
            float *to = j->result + ((start + r) * j->heads + h) * j->size;
            for (long d = 0; d < j->size; d += WIDTH)
                *(vec *)(to + d) = *(vec *)(sums + r * j->size + d) / total[r];
            j->lse[h * j->total + start + r] = top[r] + __builtin_logf(total[r]);
        }
    }
}

/* ---------------------------------------------------------------------------------------------------------- backward */
/* mine: probabilities (TALL, PANEL), gradients of the scores (TALL, PANEL), sum of d_out times out of each query */
static void backward_panel(tree_t *j, long h, const part_t *p, float *mine) {
    const long size = j->size, kv = h / (j->heads / j->kv);
    float *probability = mine, *d_score = mine + TALL * PANEL, *delta = d_score + TALL * PANEL;
    const float *q = j->q + h * j->q_head + p->row * j->q_row, *k = j->k + kv * j->k_head + p->key * j->k_row;
    const float *d_out = j->d_out + h * j->d_head + p->row * j->d_row;
    scores(p->rows, q, j->q_row, p->panel, size, probability);
    scores(p->rows, d_out, j->d_row, j->values + (p->panel - j->keys), size, d_score);
    for (long r = 0; r < p->rows; r++) {
        float *row = probability + r * PANEL, *d_row = d_score + r * PANEL;
        const float lse = j->lse[h * j->total + p->row + r];
        long low, high;
        seen(j, p, r, &low, &high);
        for (int w = 0; w < WIDE; w++) {
            const vec x = weight_of(*(vec *)(row + w * WIDTH) * j->scale - lse);
            *(vec *)(row + w * WIDTH) = x;
            *(vec *)(d_row + w * WIDTH) = x * (*(vec *)(d_row + w * WIDTH) - delta[r]) * j->scale;
        }
        for (long c = 0; c < low; c++)
            row[c] = d_row[c] = 0.0f;
        for (long c = high; c < PANEL; c++)
            row[c] = d_row[c] = 0.0f;
    }
    float *d_q = j->d_q + (h * j->total + p->row) * size, *d_k = j->d_k + (h * j->total + p->key) * size;
    float *d_v = j->d_v + (h * j->total + p->key) * size;
    add_product(p->rows, d_score, PANEL, 1, k, j->k_row, p->keys, d_q, size, size);
    add_product(p->keys, d_score, 1, PANEL, q, j->q_row, p->rows, d_k, size, size);
    add_product(p->keys, probability, 1, PANEL, d_out, j->d_row, p->rows, d_v, size, size);
}

/* A tree and a head at a time: no two threads add to the same keys. */
static void backward_part(void *data) {
    tree_t *j = data;
    float *mine = j->scratch + me() * j->each, *delta = mine + 2 * TALL * PANEL;
    for (long i = take(j); i < j->heads * j->trees; i = take(j)) {
        const long h = i % j->heads, tree = i / j->heads;
        for (long s = j->roots[tree]; s < j->roots[tree + 1]; s++)
            for (long start = j->starts[s]; start < j->ends[s]; start += TALL) {
                const long rows = j->ends[s] - start < TALL ? j->ends[s] - start : TALL;
                for (long r = 0; r < rows; r++) {
                    const float *out = j->out + ((start + r) * j->heads + h) * j->size;
                    const float *d_out = j->d_out + h * j->d_head + (start + r) * j->d_row;
                    vec sum = {0};
                    for (long d = 0; d < j->size; d += WIDTH)
                        sum += *(const vec *)(out + d) * *(const vec *)(d_out + d);
                    delta[r] = sum_of(sum);
                }
                over_panels(j, h, s, start, rows, mine, backward_panel);
            }
    }
}

/* ------------------------------------------------------------------------------------------------------------- calls */
/* Tables and memory of a call. strides: of q, k, v and d_out, a head and a row each, the last 1; sizes: segments, heads,
 * kv heads, size, total, window (0: none). 0: done. */
static int prepare(tree_t *j, const long *strides, const long *sizes, int backward) {
    j->q_head = strides[0], j->q_row = strides[1], j->k_head = strides[2], j->k_row = strides[3];
    j->v_head = strides[4], j->v_row = strides[5], j->d_head = strides[6], j->d_row = strides[7];
    j->segments = sizes[0], j->heads = sizes[1], j->kv = sizes[2], j->size = sizes[3];
    j->total = sizes[4], j->window = sizes[5];
    long panels = 0, tiles = 0;
    for (long s = 0; s < j->segments; s++) {
        panels += (j->ends[s] - j->starts[s] + PANEL - 1) / PANEL;
        tiles += (j->ends[s] - j->starts[s] + TALL - 1) / TALL;
    }
    j->all_panels = panels;
    j->each = backward ? 2 * TALL * PANEL + TALL + PANEL : TALL * (PANEL + j->size + 2) + PANEL;
    j->each = (j->each + 15) / 16 * 16; /* a cache line: threads keep out of each other's */
    const long tables = 3 * j->segments + 2 + 2 * tiles, wide = j->kv * panels * PANEL * j->size;
    float *floats = room(0, 2 * tables + 16 + wide * (backward ? 2 : 1) + j->each * pool.threads);
    if (!floats)
        return 1;
    j->keys = floats;
    j->values = backward ? floats + wide : NULL;
    j->scratch = floats + wide * (backward ? 2 : 1);
    long *longs = (long *)(((size_t)(j->scratch + j->each * pool.threads) + 15) / 16 * 16);
    j->offsets = longs, j->panels = longs + j->segments, j->roots = j->panels + j->segments + 1;
    j->tile_segment = j->roots + j->segments + 1, j->tile_start = j->tile_segment + tiles;
    j->panels[0] = j->trees = j->tiles = 0;
    for (long s = 0; s < j->segments; s++) {
        const long parent = j->parents[s], length = j->ends[s] - j->starts[s];
        j->offsets[s] = parent < 0 ? 0 : j->offsets[parent] + j->ends[parent] - j->starts[parent];
        j->panels[s + 1] = j->panels[s] + (length + PANEL - 1) / PANEL;
        if (parent < 0)
            j->roots[j->trees++] = s;
        for (long start = j->starts[s]; start < j->ends[s]; start += TALL, j->tiles++)
            j->tile_segment[j->tiles] = s, j->tile_start[j->tiles] = start;
    }
    j->roots[j->trees] = j->segments;
    j->next = 0;
    run(pack_part, j);
    j->next = 0;
    return 0;
}

/* out (total, heads, size), lse (heads, total), both as they are to be for tokens of no segment. */
int tree_attention(const float *q, const float *k, const float *v, const long *strides, const long *starts,
                   const long *ends, const long *parents, const long *sizes, float scale, float *out, float *lse) {
    tree_t job = {.q = q, .k = k, .v = v, .starts = starts, .ends = ends, .parents = parents, .scale = scale,
                  .result = out, .lse = lse};
    if (prepare(&job, strides, sizes, 0))
        return 1;
    run(forward_part, &job);
    return 0;
}

/* d_q, d_k, d_v (heads, total, size), zeros; every head of q adds to keys and values of its own. */
int tree_attention_back(const float *q, const float *k, const float *v, const long *strides, const long *starts,
                        const long *ends, const long *parents, const long *sizes, float scale, const float *out,
                        const float *lse, const float *d_out, float *d_q, float *d_k, float *d_v) {
    tree_t job = {.q = q, .k = k, .v = v, .starts = starts, .ends = ends, .parents = parents, .scale = scale,
                  .out = out, .lse = (float *)lse, .d_out = d_out, .d_q = d_q, .d_k = d_k, .d_v = d_v};
    if (prepare(&job, strides, sizes, 1))
        return 1;
    run(backward_part, &job);
    return 0;
}
