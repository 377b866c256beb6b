/* A pass through the steps, by one thread or by several that share the channels of each. */
#include "internal.h"

/* Tensor number `i` in a workspace, of `images` interleaved ones. */
static float *place(const struct scl_model *m, const Workspace *w, size_t images, int i) {
#ifdef SCL_CHECK
    (void)images;
    (void)m;
    return w->apart[i];
#else
    return w->memory + m->tensors[i].offset * images;
#endif
}

/* Zeros around the pixels of channels begin … end. */
static void clear_edges(const Tensor *t, float *x, size_t images, int begin, int end) {
    size_t size = sizeof(float) * images;
    size_t stop = t->origin + (size_t)t->height * t->pitch;
    for (int c = begin; c < end; c++) {
        float *plane = x + (size_t)c * t->plane * images;
        memset(plane, 0, t->origin * size);
        for (int y = 0; y < t->height && t->pad; y++)
            memset(plane + (t->origin + (size_t)y * t->pitch + (size_t)t->width) * images, 0,
                   (size_t)t->pad * size);
        memset(plane + stop * images, 0, (t->plane - stop) * size);
    }
}

/* The first output of the `thread`-th of `threads` shares that have about the same work: a weight
 * counts 1, an output 4. `first` may be NULL: then outputs alone count. */
static int share(const uint32_t *first, int outputs, int thread, int threads) {
    if (thread <= 0) return 0;
    if (thread >= threads) return outputs;
    if (!first) return (int)((int64_t)outputs * thread / threads);
    uint64_t wanted = ((uint64_t)first[outputs] + 4 * (uint64_t)outputs) * (uint64_t)thread / (uint64_t)threads;
    int low = 0, high = outputs;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if ((uint64_t)first[middle] + 4 * (uint64_t)middle < wanted) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void run_tiles(const struct scl_model *m, const Step *s, const float *in, const float *residual,
                      float *out, size_t images, int begin, int end) {
    const Tensor *from = &m->tensors[s->in], *to = &m->tensors[s->out];
    const Kernels *k = m->kernels;
    size_t lanes = (size_t)k->lanes;
    size_t length = is_vector(to) ? 1 : (size_t)to->height * to->pitch;
    size_t vectors = (length * images + lanes - 1) / lanes;
    size_t most = s->dense ? (size_t)k->dense_vectors : MOST_VECTORS;
    size_t tiles = (vectors + most - 1) / most;
    Tile t = {
        .in = in + (s->kind == CONV ? from->origin * images : 0),
        .residual = residual ? residual + to->origin * images : NULL,
        .out = out + to->origin * images,
        .bias = s->bias,
        .entries = s->entries,
        .first = s->dense ? s->blocks : s->first,
        .offsets = s->offsets,
        .weights = s->weights,
        .plane = to->plane * images,
        .outputs = to->channels,
        .activation = s->activation,
        .low = s->low,
        .high = s->high,
    };
    while ((size_t)1 << t.shift < images) t.shift++;
    /* Each channel of a depthwise convolution has an input of its own: then its plane is read once;
     * else, of a tile, all inputs are for all outputs. */
    int together = s->kind == CONV && s->groups == to->channels && !s->dense ? 1 : end - begin;
    for (int o = begin; o < end; o += together)
        for (size_t tile = 0; tile < tiles; tile++) {
            size_t at = vectors * tile / tiles, stop = vectors * (tile + 1) / tiles;
            const TileKernel *kernels = s->dense ? k->dense : k->sparse;
            kernels[stop - at](&t, at * lanes, o, o + together < end ? o + together : end);
        }
}

/* Input channels as maps of their phases, with the zeros that the convolution pads with. */
static void run_arrange(const struct scl_model *m, const Step *s, const float *in, float *out,
                        size_t images, int begin, int end) {
    const Tensor *from = &m->tensors[s->in], *to = &m->tensors[s->out];
    int sx = s->stride[1], columns = (int)to->pitch;
    for (int c = begin; c < end; c++) {
        const int *phase = s->phase + 2 * (c % s->phases);
        const float *source = in + ((size_t)(c / s->phases) * from->plane + from->origin) * images;
        float *target = out + ((size_t)c * to->plane + to->origin) * images;
        /* Column x is the input's x · stride + shift. */
        int shift = phase[1] - s->before[1];
        int left = shift < 0 ? (-shift + sx - 1) / sx : 0;
        int right = from->width > shift ? (from->width - 1 - shift) / sx + 1 : 0;
        if (left > columns) left = columns;
        if (right > columns) right = columns;
        if (right < left) right = left;
        for (int y = 0; y < to->height + to->margin; y++, target += to->pitch * images) {
            int64_t row = (int64_t)y * s->stride[0] + phase[0] - s->before[0];
            if (row < 0 || row >= from->height) {
                memset(target, 0, (size_t)columns * images * sizeof(float));
                continue;
            }
            const float *line = source + (size_t)row * from->pitch * images;
            memset(target, 0, (size_t)left * images * sizeof(float));
            memset(target + (size_t)right * images, 0, (size_t)(columns - right) * images * sizeof(float));
            if (sx == 1)
                memcpy(target + (size_t)left * images, line + (ptrdiff_t)(left + shift) * (ptrdiff_t)images,
                       (size_t)(right - left) * images * sizeof(float));
            else if (images == 1)
                m->kernels->every(line + (ptrdiff_t)left * sx + shift, target + left, (size_t)(right - left),
                                  (size_t)sx);
            else
                for (int x = left; x < right; x++)
                    memcpy(target + (size_t)x * images, line + (size_t)(x * sx + shift) * images,
                           images * sizeof(float));
        }
    }
}

/* The part of a pool's window that starts at `start` which is inside 0 … size. */
static void inside(int start, int window, int size, int *begin, int *end) {
    *begin = start < 0 ? 0 : start;
    *end = start + window < size ? start + window : size;
}

/* One row of outputs from `row`, the largest of each column; it is changed. */
static void pool_row(const Kernels *k, const Step *s, const Tensor *from, float *row, float *target,
                     int width) {
    /* Outputs whose window is inside from left to right; those at the borders one by one. */
    int stride = s->stride[1], before = s->before[1], window = s->kernel[1];
    int first = (before + stride - 1) / stride;
    int behind = from->width + before >= window ? (from->width + before - window) / stride + 1 : 0;
    if (behind > width) behind = width;
    if (first > behind) first = behind;
    for (int x = 0; x < width; x++) {
        if (x == first && first < behind) x = behind;
        if (x >= width) break;
        int begin, end;
        inside(x * stride - before, window, from->width, &begin, &end);
        target[x] = row[begin];
        for (int i = begin + 1; i < end; i++) k->larger(row + i, target + x, 1);
    }
    if (first == behind) return;
    row += first * stride - before;
    k->slide(row, (size_t)(behind - 1 - first) * (size_t)stride + 1, window);
    k->every(row, target + first, (size_t)(behind - first), (size_t)stride);
}

static void run_maxpool(const struct scl_model *m, const Step *s, const float *in, float *out,
                        float *row, size_t images, int begin, int end) {
    const Tensor *from = &m->tensors[s->in], *to = &m->tensors[s->out];
    const Kernels *k = m->kernels;
    for (int c = begin; c < end; c++) {
        const float *source = in + ((size_t)c * from->plane + from->origin) * images;
        float *target = out + ((size_t)c * to->plane + to->origin) * images;
        for (int y = 0; y < to->height; y++, target += to->pitch * images) {
            int top, bottom;
            inside(y * s->stride[0] - s->before[0], s->kernel[0], from->height, &top, &bottom);
            if (images == 1) {
                memcpy(row, source + (size_t)top * from->pitch, (size_t)from->width * sizeof(float));
                for (int i = top + 1; i < bottom; i++)
                    k->larger(source + (size_t)i * from->pitch, row, (size_t)from->width);
                pool_row(k, s, from, row, target, to->width);
                continue;
            }
            for (int x = 0; x < to->width; x++) {
                int left, right;
                inside(x * s->stride[1] - s->before[1], s->kernel[1], from->width, &left, &right);
                float *most = target + (size_t)x * images;
                for (int i = top; i < bottom; i++)
                    for (int j = left; j < right; j++) {
                        const float *pixel = source + ((size_t)i * from->pitch + (size_t)j) * images;
                        if (i == top && j == left) memcpy(most, pixel, images * sizeof(float));
                        else k->larger(pixel, most, images);
                    }
            }
        }
    }
}

static void run_mean(const struct scl_model *m, const Step *s, const float *in, float *out,
                     size_t images, int begin, int end) {
    const Tensor *from = &m->tensors[s->in];
    float share_of_one = 1.0f / ((float)from->height * (float)from->width);
    for (int c = begin; c < end; c++) {
        const float *source = in + ((size_t)c * from->plane + from->origin) * images;
        float sums[MOST_IMAGES] = {0};
        for (int y = 0; y < from->height; y++, source += from->pitch * images)
            if (images == 1) sums[0] += m->kernels->sum(source, (size_t)from->width);
            else m->kernels->sum_images(source, sums, (size_t)from->width * images, images);
        for (size_t n = 0; n < images; n++) out[(size_t)c * images + n] = sums[n] * share_of_one;
    }
}

/* (x − mean) / √(variance + ε) of each image and group of channels. */
static void run_normalise(const struct scl_model *m, const Step *s, const float *in, float *out,
                          size_t images, int begin, int end) {
    const Tensor *t = &m->tensors[s->out];
    size_t width = (size_t)t->width * images, pitch = t->pitch * images;
    int size = t->channels / s->groups;
    float share_of_one = 1.0f / ((float)size * (float)t->height * (float)t->width);
    for (int group = begin; group < end; group++) {
        float means[MOST_IMAGES] = {0}, squares[MOST_IMAGES] = {0};
        for (int pass = 0; pass < 3; pass++) { /* means, variances, results */
            for (int row = 0; row < size * t->height; row++) {
                size_t at = ((size_t)(group * size + row / t->height) * t->plane + t->origin) * images +
                            (size_t)(row % t->height) * pitch;
                for (size_t i = 0; i < width; i++) {
                    size_t n = i % images;
                    float x = in[at + i];
                    if (pass == 0) means[n] += x;
                    else if (pass == 1) squares[n] += (x - means[n]) * (x - means[n]);
                    else out[at + i] = (x - means[n]) * squares[n];
                }
            }
            for (size_t n = 0; n < images && pass == 0; n++) means[n] *= share_of_one;
            for (size_t n = 0; n < images && pass == 1; n++)
                squares[n] = 1.0f / sqrtf(squares[n] * share_of_one + s->low);
        }
    }
}

/* The pixels of a map as tokens, behind those that are constants, and what is added to each. */
static void run_embed(const struct scl_model *m, const Step *s, const float *in, float *out, int begin,
                      int end) {
    const Tensor *from = &m->tensors[s->in], *to = &m->tensors[s->out];
    size_t width = (size_t)from->width, tokens = (size_t)to->width;
    for (int c = begin; c < end; c++) {
        const float *added = s->bias + (size_t)c * tokens;
        float *target = out + (size_t)c * to->plane + to->origin;
        memcpy(target, added, tokens * sizeof(float));
        target += s->before[1];
        for (int y = 0; y < from->height; y++, target += width) {
            const float *line = in + (size_t)c * from->plane + from->origin + (size_t)y * from->pitch;
            for (size_t x = 0; x < width; x++) target[x] += line[x];
        }
    }
}

/* Heads begin … end; the input has the queries of all heads, then their keys, then their values. */
static void run_attend(const struct scl_model *m, const Step *s, const float *in, float *out,
                       float *scores, int begin, int end) {
    const Tensor *to = &m->tensors[s->out];
    size_t depth = (size_t)(to->channels / s->groups), all = (size_t)to->channels * to->plane;
    for (int head = begin; head < end; head++) {
        size_t at = (size_t)head * depth * to->plane;
        Head h = {in + at, in + all + at, in + 2 * all + at, out + at, scores, to->plane,
                  to->width, (int)depth, s->low};
        m->kernels->attend(&h);
    }
}

/* Chunk `thread` of `threads`; `row` is for the one that runs it alone. */
static void run_step(const struct scl_model *m, const Workspace *w, const Step *s, size_t images,
                     float *row, int thread, int threads) {
    const Tensor *from = &m->tensors[s->in], *to = &m->tensors[s->out];
    const Kernels *k = m->kernels;
    const float *in = place(m, w, images, s->in);
    const float *second = s->in2 >= 0 ? place(m, w, images, s->in2) : NULL;
    float *out = place(m, w, images, s->out);
    bool blocks = s->dense && (s->kind == CONV || images > 1);
    int units = blocks ? (to->channels + DENSE_ROWS - 1) / DENSE_ROWS : to->channels;
    if (s->kind == NORMALISE || s->kind == ATTEND) units = s->groups;
    if (s->kind == LAYERNORM) units = (int)round_up((size_t)to->width, LINE) / LINE;
    int begin = share(blocks ? s->blocks : s->first, units, thread, threads);
    int end = share(blocks ? s->blocks : s->first, units, thread + 1, threads);
    if (blocks) {
        begin *= DENSE_ROWS;
        end = end * DENSE_ROWS < to->channels ? end * DENSE_ROWS : to->channels;
    }
    if (begin >= end) return;
    size_t start = (size_t)begin * to->plane * images;
    size_t count = (size_t)(end - begin) * to->plane * images;
    switch (s->kind) {
    case LINEAR:
    case CONV:
        /* Interleaved images are to a Linear layer what the pixels of a map are to a convolution. */
        if (s->kind == CONV || images > 1) {
            run_tiles(m, s, in, second, out, images, begin, end);
            break;
        }
        k->dot(s, in, out, begin, end, (size_t)from->channels);
        k->activate(out + begin, (size_t)(end - begin), s->activation, s->low, s->high);
        break;
    case ARRANGE: run_arrange(m, s, in, out, images, begin, end); return;
    case ADD:
        k->add(in + start, second + start, out + start, count);
        k->activate(out + start, count, s->activation, s->low, s->high);
        break;
    case SCALE:
        for (int c = begin; c < end; c++) {
            size_t at = (size_t)c * to->plane * images;
            k->scale(in + at, second + (size_t)c * images, out + at, to->plane * images, images);
        }
        k->activate(out + start, count, s->activation, s->low, s->high);
        break;
    case ACTIVATE:
        memcpy(out + start, in + start, count * sizeof(float));
        k->activate(out + start, count, s->activation, s->low, s->high);
        break;
    case MAXPOOL: run_maxpool(m, s, in, out, row, images, begin, end); break;
    case MEAN: run_mean(m, s, in, out, images, begin, end); break;
    case NORMALISE:
        run_normalise(m, s, in, out, images, begin, end);
        begin *= to->channels / s->groups;
        end *= to->channels / s->groups;
        break;
    case EMBED: run_embed(m, s, in, out, begin, end); return;
    case ATTEND: run_attend(m, s, in, out, row, begin, end); return;
    case LAYERNORM:
        k->layer_norm(in + begin * LINE, out + begin * LINE, to->plane, to->channels,
                      (size_t)(end - begin) * LINE, s->low);
        return;
    case SELECT:
        for (int c = begin; c < end; c++)
            out[c] = in[(size_t)c * from->plane + from->origin + (size_t)s->before[1]];
        return;
    }
    if (to->edges) clear_edges(to, out, images, begin, end);
}

/* `count` images from the caller's [count][channels][height][width]; those missing to a whole block
 * are zeros. */
static void read_images(const struct scl_model *m, const Workspace *w, const float *from, size_t count,
                        size_t images, int thread, int threads) {
    const Tensor *t = &m->tensors[m->input];
    float *to = place(m, w, images, m->input);
    int begin = share(NULL, t->channels, thread, threads), end = share(NULL, t->channels, thread + 1, threads);
    size_t width = (size_t)t->width, height = (size_t)t->height, area = width * height;
    for (int c = begin; c < end; c++)
        for (size_t y = 0; y < height; y++) {
            const float *line = from + (size_t)c * area + y * width;
            float *target = to + ((size_t)c * t->plane + t->origin + y * t->pitch) * images;
            if (images == 1) {
                memcpy(target, line, width * sizeof(float));
                continue;
            }
            for (size_t n = 0; n < images; n++)
                for (size_t x = 0; x < width; x++)
                    target[x * images + n] = n < count ? line[n * area * (size_t)t->channels + x] : 0;
        }
    if (t->edges) clear_edges(t, to, images, begin, end);
}

static void write_outputs(const struct scl_model *m, const Workspace *w, float *to, size_t count,
                          size_t images) {
    const Tensor *t = &m->tensors[m->output];
    const float *from = place(m, w, images, m->output);
    size_t width = (size_t)t->width, height = (size_t)t->height;
    for (size_t n = 0; n < count; n++)
        for (size_t c = 0; c < (size_t)t->channels; c++)
            for (size_t y = 0; y < height; y++)
                for (size_t x = 0; x < width; x++)
                    *to++ = from[(c * t->plane + t->origin + y * t->pitch + x) * images + n];
}
