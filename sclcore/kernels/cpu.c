/* The two passes of sclcore.update over plain pieces in float32, and the two of sclcore.scl.limit,
   each in one walk through memory.

   Every expression rounds as PyTorch's own kernels do on CPUs with fused multiply-add: a * x + y with
   a scalar a is one rounding there (FMA below), everything else one rounding per operation. Build
   with -ffp-contract=off, or the compiler fuses what PyTorch does not. Nothing depends on how the
   work is shared between threads. */

#include <stdint.h>
#include <string.h>

#define BLOCK 512 /* elements: all arrays of a block together fit the smallest L1 cache, 32 KiB */
#define LANES 16
#define FEW 16 /* elements of which, seldom, one needs what costs a branch */
#define FMA __builtin_fmaf
#define INLINE static inline __attribute__((always_inline))

enum { IDENTITY, LEAKY_RELU, SOFTPLUS, RELU, CLIPPED };
enum { LIVE, FLIPS, REVIVALS, COUNTS };

typedef struct {
    const float *grad;
    float *param, *weight, *mask, *momentum, *mask_momentum; /* momentum may be NULL */
    int64_t begin, length; /* elements: those of all pieces before this one, and its own */
    int64_t run, head;     /* elements in a run, and those of its first run that others hold */
    int64_t first_run, span, features; /* feature = run / span * features + run % features */
    int64_t offset;                    /* where its part of the vector over all pieces begins */
    float price;
} Piece;

typedef struct {
    float lr, momentum, weight_decay, mask_lr, mask_momentum, mask_restart, leaky_slope;
    int32_t nesterov, proxy, root;
} Settings;

INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

/* e^x to about 1 ulp for |x| < 87; beyond, what it is there (Cephes' polynomial). */
INLINE float exponential(float x) {
    x = x > 87.0f ? 87.0f : x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f), r = FMA(n, -0.693359375f, x);
    r = FMA(n, 2.12194440e-4f, r);
    float y = FMA(1.9875691500e-4f, r, 1.3981999507e-3f);
    y = FMA(y, r, 8.3334519073e-3f);
    y = FMA(y, r, 4.1665795894e-2f);
    y = FMA(y, r, 1.6666665459e-1f);
    y = FMA(y, r, 5.0000001201e-1f);
    y = FMA(y, r * r, r) + 1.0f;
    int32_t bits = ((int32_t)n + 127) * (1 << 23);
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return y * scale;
}

INLINE float slope(int proxy, float leaky_slope, float m) {
    switch (proxy) {
    case LEAKY_RELU: return m > 0.0f ? 1.0f : leaky_slope;
    case SOFTPLUS: return 1.0f / (1.0f + exponential(-m));
    case RELU: return m > 0.0f ? 1.0f : 0.0f;
    case CLIPPED: return m > 0.0f && m <= 1.0f ? 1.0f : 0.0f;
    default: return 1.0f;
    }
}

INLINE float square(int proxy, float leaky_slope, float g, float w, float m) {
    float x = g * w * slope(proxy, leaky_slope, m);
    return x * x;
}

/* What G is multiplied by for n ≤ BLOCK elements: w, or sign(w) √|w| in `buffer`. */
INLINE const float *factors(const float *w, int n, int root, float *buffer) {
    if (!root) return w;
    for (int i = 0; i < n; i++)
        buffer[i] = __builtin_copysignf(__builtin_sqrtf(__builtin_fabsf(w[i])), w[i]);
    return buffer;
}

/* Lanes in float32, blocks in float64: as exact as PyTorch's pairwise sums, and it vectorises. */
INLINE double squares(const float *g, const float *weights, const float *m, int64_t length,
                      int proxy, float leaky_slope, int root) {
    double total = 0.0;
    float buffer[BLOCK];
    for (int64_t at = 0; at < length; at += BLOCK, g += BLOCK, weights += BLOCK, m += BLOCK) {
        int n = (int)min(BLOCK, length - at), i = 0;
        const float *w = factors(weights, n, root, buffer);
        float lanes[LANES] = {0.0f};
        for (; i + LANES <= n; i += LANES)
            for (int l = 0; l < LANES; l++)
                lanes[l] += square(proxy, leaky_slope, g[i + l], w[i + l], m[i + l]);
        for (int l = 0; i + l < n; l++)
            lanes[l] += square(proxy, leaky_slope, g[i + l], w[i + l], m[i + l]);
        for (int half = LANES / 2; half; half /= 2)
            for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
        total += lanes[0];
    }
    return total;
}

INLINE void sums_of_runs(const Piece *p, int64_t from, int64_t to, int proxy, float leaky_slope,
                         int root, float *out) {
    for (int64_t run = from; run < to; run++) {
        int64_t start = run * p->run - p->head, end = min(start + p->run, p->length);
        start = max(start, 0);
        const float *g = p->grad + start, *w = p->weight + start, *m = p->mask + start;
        out[p->offset + run] = (float)squares(g, w, m, end - start, proxy, leaky_slope, root);
    }
}

/* The number of runs that begin before element `at` of a piece. */
INLINE int64_t runs_before(const Piece *p, int64_t at) {
    return at > 0 ? (at + p->head + p->run - 1) / p->run : 0;
}

/* Σ (∂L/∂m)² of each run that begins within elements from … to of all pieces, one after another. */
void scl_sums(const Piece *pieces, int64_t count, const Settings *s, int64_t from, int64_t to,
              float *out) {
    float leak = s->leaky_slope;
    int root = s->root;
    for (const Piece *p = pieces; p < pieces + count; p++) {
        int64_t first = runs_before(p, max(from - p->begin, 0));
        int64_t last = runs_before(p, min(to - p->begin, p->length));
        switch (s->proxy) { /* constants to the inlined: the compiler makes a loop of each */
        case LEAKY_RELU: sums_of_runs(p, first, last, LEAKY_RELU, leak, root, out); break;
        case SOFTPLUS: sums_of_runs(p, first, last, SOFTPLUS, leak, root, out); break;
        case RELU: sums_of_runs(p, first, last, RELU, leak, root, out); break;
        case CLIPPED: sums_of_runs(p, first, last, CLIPPED, leak, root, out); break;
        default: sums_of_runs(p, first, last, IDENTITY, leak, root, out);
        }
    }
}

/* What each of n elements from `at` on is divided by. */
INLINE void spread(float *restrict out, const Piece *p, const float *divisors, int64_t at, int n) {
    int64_t run = (at + p->head) / p->run, end = (run + 1) * p->run - p->head - at;
    for (int i = 0; i < n; run++, end += p->run) {
        int64_t number = run + p->first_run;
        float value = divisors[p->offset + number / p->span * p->features + number % p->features];
        for (int stop = (int)min(end, n); i < stop; i++) out[i] = value;
    }
}

/* ĝ + λ · c · φ'(m); u is what G is multiplied by */
INLINE void direction(float *restrict out, const float *g, const float *u, const float *m,
                      const float *restrict divisor, int n, int proxy, float leaky_slope,
                      float price) {
    for (int i = 0; i < n; i++) {
        float phi = slope(proxy, leaky_slope, m[i]);
        out[i] = FMA(phi, price, g[i] * u[i] * phi / divisor[i]);
    }
}

INLINE void step_weight(const float *restrict g, float *restrict w, const float *restrict m,
                        float *restrict v, int n, const Settings *s) {
    float lr = -s->lr, momentum = s->momentum, decay = s->weight_decay;
    if (v == NULL) {
        for (int i = 0; i < n; i++)
            w[i] = FMA(FMA(w[i], decay, m[i] > 0.0f ? g[i] : 0.0f), lr, w[i]);
        return;
    }
    if (!s->nesterov) {
        for (int i = 0; i < n; i++) {
            v[i] = v[i] * momentum + FMA(w[i], decay, m[i] > 0.0f ? g[i] : 0.0f);
            w[i] = FMA(v[i], lr, w[i]);
        }
        return;
    }
    for (int i = 0; i < n; i++) {
        float step = FMA(w[i], decay, m[i] > 0.0f ? g[i] : 0.0f);
        v[i] = v[i] * momentum + step;
        w[i] = FMA(FMA(v[i], momentum, step), lr, w[i]);
    }
}

INLINE void step_mask(const float *restrict step, float *restrict m, float *restrict v,
                      const float *restrict w, float *restrict p, int n, const Settings *s,
                      int64_t *counts) {
    float lr = -s->mask_lr, momentum = s->mask_momentum, restart = s->mask_restart;
    int32_t live = 0, flips = 0, revivals = 0;
    for (int i = 0; i < n; i++) {
        int32_t before = m[i] > 0.0f;
        float velocity = v[i] * momentum + step[i];
        float moved = FMA(velocity, lr, m[i]);
        int32_t after = moved > 0.0f;
        int32_t anew = after & ~before & (restart > 0.0f);
        v[i] = anew ? 0.0f : velocity;
        m[i] = anew ? restart : moved;
        p[i] = after ? w[i] : 0.0f;
        live += after;
        flips += after ^ before;
        revivals += after & ~before;
    }
    counts[LIVE] += live;
    counts[FLIPS] += flips;
    counts[REVIVALS] += revivals;
}

INLINE void write_only(const float *restrict m, const float *restrict w, float *restrict p, int n,
                       int64_t *counts) {
    int32_t live = 0;
    for (int i = 0; i < n; i++) {
        p[i] = m[i] > 0.0f ? w[i] : 0.0f;
        live += m[i] > 0.0f;
    }
    counts[LIVE] += live;
}

INLINE void update_block(const Piece *p, const Settings *s, const float *divisors, int64_t at,
                         int n, int64_t *counts) {
    const float *g = p->grad + at;
    float *w = p->weight + at, *m = p->mask + at, *param = p->param + at;
    float *v = p->momentum == NULL ? NULL : p->momentum + at;
    if (s->mask_lr == 0.0f) {
        step_weight(g, w, m, v, n, s);
        write_only(m, w, param, n, counts);
        return;
    }
    float divisor[BLOCK], step[BLOCK], buffer[BLOCK], leak = s->leaky_slope, price = p->price;
    const float *u = factors(w, n, s->root, buffer);
    spread(divisor, p, divisors, at, n);
    switch (s->proxy) {
    case LEAKY_RELU: direction(step, g, u, m, divisor, n, LEAKY_RELU, leak, price); break;
    case SOFTPLUS: direction(step, g, u, m, divisor, n, SOFTPLUS, leak, price); break;
    case RELU: direction(step, g, u, m, divisor, n, RELU, leak, price); break;
    case CLIPPED: direction(step, g, u, m, divisor, n, CLIPPED, leak, price); break;
    default: direction(step, g, u, m, divisor, n, IDENTITY, leak, price);
    }
    step_weight(g, w, m, v, n, s);
    step_mask(step, m, p->mask_momentum + at, w, param, n, s, counts);
}

/* Moves elements from … to of all pieces; adds to counts [pieces, COUNTS]. */
void scl_update(const Piece *pieces, int64_t count, const Settings *s, int64_t from, int64_t to,
                const float *divisors, int64_t *counts) {
    for (int64_t i = 0; i < count; i++) {
        const Piece *p = pieces + i;
        int64_t end = min(to - p->begin, p->length);
        for (int64_t at = max(from - p->begin, 0); at < end; at += BLOCK)
            update_block(p, s, divisors, at, (int)min(BLOCK, end - at), counts + i * COUNTS);
    }
}

/* The mask variables of elements from … to in (0, bound], their bits: those of a piece one after
   another from where its part begins in out [elements]; adds to found [pieces, 2] how many there
   are and how many lie above. */
void scl_low(const Piece *pieces, int64_t count, float bound, int64_t from, int64_t to,
             int32_t *out, int64_t *found) {
    for (int64_t i = 0; i < count; i++) {
        const Piece *p = pieces + i;
        int64_t begin = max(from - p->begin, 0), end = min(to - p->begin, p->length);
        int32_t *next = out + p->begin + begin;
        for (int64_t at = begin; at < end; at += FEW) {
            const float *m = p->mask + at;
            int n = (int)min(FEW, end - at);
            int32_t low = 0, above = 0;
            for (int j = 0; j < n; j++) {
                low += (m[j] > 0.0f) & (m[j] <= bound);
                above += m[j] > bound;
            }
            found[2 * i] += low;
            found[2 * i + 1] += above;
            for (int j = 0; low && j < n; j++) { /* most stretches hold none */
                if (!(m[j] > 0.0f && m[j] <= bound)) continue;
                memcpy(next++, m + j, sizeof *m);
            }
        }
    }
}

INLINE void lower_few(float *restrict m, float *restrict v, const float *restrict w,
                      float *restrict param, const uint8_t *restrict was, int n, float distance,
                      float restart, int64_t *counts) {
    int32_t live = 0, flips = 0, revivals = 0;
    for (int j = 0; j < n; j++) {
        m[j] -= distance;
        int32_t after = m[j] > 0.0f;
        param[j] = after ? w[j] : 0.0f;
        live += after;
        flips += after ^ was[j];
        revivals += after & ~was[j];
    }
    counts[LIVE] += live;
    counts[FLIPS] += flips;
    counts[REVIVALS] += revivals;
    for (int j = 0; revivals && restart > 0.0f && j < n; j++) {
        if (!(m[j] > 0.0f) || was[j]) continue;
        m[j] = restart;
        v[j] = 0.0f;
    }
}

/* m − distance for elements from … to, anew where it has come to life since `before` [elements];
   writes v and adds to counts [pieces, COUNTS]. */
void scl_lower(const Piece *pieces, int64_t count, float distance, float restart,
               const uint8_t *before, int64_t from, int64_t to, int64_t *counts) {
    for (int64_t i = 0; i < count; i++) {
        const Piece *p = pieces + i;
        int64_t end = min(to - p->begin, p->length);
        for (int64_t at = max(from - p->begin, 0); at < end; at += FEW)
            lower_few(p->mask + at, p->mask_momentum + at, p->weight + at, p->param + at,
                      before + p->begin + at, (int)min(FEW, end - at), distance, restart,
                      counts + i * COUNTS);
    }
}
