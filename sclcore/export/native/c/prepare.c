/* From the steps as they are written to steps that run: where each number lies, which weights are
 * multiplied how, which memory is used again. */
#include "internal.h"

/* All maps of this height and width get at least so many columns and rows of zeros. */
static void demand(struct scl_model *m, int height, int width, int pad, int margin) {
    for (int i = 0; i < m->tensor_count; i++) {
        Tensor *t = &m->tensors[i];
        if (t->height != height || t->width != width || is_vector(t)) continue;
        if (t->pad < pad) t->pad = pad;
        if (t->margin < margin) t->margin = margin;
    }
}

static int larger_of(int a, int b) { return a > b ? a : b; }

/* How far beyond an output's own place the kernel's last tap is, in dimension d. */
static int span(const Step *s, int d) { return (s->kernel[d] - 1) * s->dilation[d]; }

/* Whether the convolution reads its input where it lies: one stream beside the other. */
static bool is_direct(const Step *s, const Tensor *in, const Tensor *out) {
    return s->stride[0] == 1 && s->stride[1] == 1 && in->height == out->height &&
           in->width == out->width && s->before[0] <= span(s, 0) && s->before[1] <= span(s, 1);
}

/* Puts a step before convolution `s` that lays its input out as if the stride were 1: a map for
 * each phase (y mod stride, x mod stride) of its pixels that a tap falls on. */
static bool arrange(struct scl_model *m, const Step *s, Step *before) {
    const Tensor *in = &m->tensors[s->in], *out = &m->tensors[s->out];
    *before = (Step){.kind = ARRANGE, .in = s->in, .in2 = -1, .out = m->tensor_count};
    memcpy(before->stride, s->stride, sizeof s->stride);
    memcpy(before->before, s->before, sizeof s->before);
    int taps = s->kernel[0] * s->kernel[1];
    before->phase = calloc((size_t)taps * 2, sizeof(int));
    if (!before->phase) return false;
    for (int tap = 0; tap < taps; tap++) {
        int row = tap / s->kernel[1] * s->dilation[0] % s->stride[0];
        int column = tap % s->kernel[1] * s->dilation[1] % s->stride[1], p = 0;
        while (p < before->phases && (before->phase[2 * p] != row || before->phase[2 * p + 1] != column))
            p++;
        if (p < before->phases) continue;
        before->phase[2 * p] = row;
        before->phase[2 * p + 1] = column;
        before->phases++;
    }
    Tensor *arranged = &m->tensors[m->tensor_count];
    *arranged = (Tensor){.height = out->height, .width = out->width};
    if (in->channels > (1 << 28) / before->phases) return false;
    arranged->channels = in->channels * before->phases;
    return true;
}

/* Adds the arranging steps and lays out every tensor. */
static bool lay_out(struct scl_model *m) {
    Step *all = calloc((size_t)m->step_count * 2 + 1, sizeof(Step));
    if (!all) return false;
    int count = 0;
    bool sound = true;
    for (int i = 0; i < m->step_count; i++) {
        Step s = m->steps[i];
        const Tensor *in = &m->tensors[s.in], *out = &m->tensors[s.out];
        if (s.kind == CONV && !is_direct(&s, in, out) && sound) {
            sound = arrange(m, &s, &all[count]);
            if (sound) s.in = m->tensor_count++;
            count++;
        }
        all[count++] = s;
    }
    free(m->steps);
    m->steps = all;
    m->step_count = count;
    for (int i = 0; i < count && sound; i++) {
        const Step *s = &all[i];
        if (s->kind != CONV) continue;
        Tensor *in = &m->tensors[s->in];
        const Tensor *out = &m->tensors[s->out];
        int after[2], before[2];
        for (int d = 0; d < 2; d++) {
            bool arranged = i && all[i - 1].kind == ARRANGE && all[i - 1].out == s->in;
            before[d] = arranged ? 0 : s->before[d];
            after[d] = arranged ? span(s, d) / s->stride[d] : span(s, d) - before[d];
        }
        demand(m, out->height, out->width, larger_of(before[1], after[1]),
               larger_of(before[0], after[0]));
        if (before[0] || before[1] || after[0] || after[1]) in->edges = true;
    }
    for (int i = 0; i < m->tensor_count && sound; i++) {
        Tensor *t = &m->tensors[i];
        t->pitch = (size_t)(t->width + t->pad);
        size_t above = (size_t)t->margin * t->pitch + (size_t)t->pad;
        t->origin = round_up(above, LINE);
        t->plane = is_vector(t) ? 1
                                : t->origin + round_up((size_t)t->height * t->pitch, LINE) +
                                      round_up(above, LINE);
        t->floats = round_up((size_t)t->channels * t->plane, LINE);
        /* Offsets are kept in 32 bits. */
        sound = t->floats < (size_t)1 << 31;
    }
    /* Tokens lie in rows without zeros around them: only 1×1 convolutions read them. */
    for (int i = 0; i < count && sound; i++) {
        const Tensor *in = &m->tensors[all[i].in], *out = &m->tensors[all[i].out];
        if (all[i].kind >= EMBED && all[i].kind != SELECT) sound = !out->pad && !out->margin;
        if (all[i].kind == ATTEND) sound = sound && !in->pad && !in->margin;
    }
    return sound;
}

/* Where the tap of weight `index` (row-major, as PyTorch has it) is in the input, from the place of
 * its output `*o`. */
static int32_t place_of(const struct scl_model *m, const Step *s, const Step *arranged,
                        uint32_t index, int *o) {
    const Tensor *in = &m->tensors[s->in], *out = &m->tensors[s->out];
    if (s->kind == LINEAR) {
        size_t area = (size_t)in->height * (size_t)in->width, columns = area * (size_t)in->channels;
        size_t column = index % columns, pixel = column % area;
        *o = (int)(index / columns);
        return (int32_t)(column / area * in->plane + in->origin +
                         pixel / (size_t)in->width * in->pitch + pixel % (size_t)in->width);
    }
    int channels = (arranged ? in->channels / arranged->phases : in->channels) / s->groups;
    int x = (int)(index % (uint32_t)s->kernel[1]) * s->dilation[1];
    index /= (uint32_t)s->kernel[1];
    int y = (int)(index % (uint32_t)s->kernel[0]) * s->dilation[0];
    index /= (uint32_t)s->kernel[0];
    *o = (int)(index / (uint32_t)channels);
    int channel = (int)(index % (uint32_t)channels) + *o / (out->channels / s->groups) * channels;
    if (arranged) {
        int p = 0;
        while (arranged->phase[2 * p] != y % s->stride[0] || arranged->phase[2 * p + 1] != x % s->stride[1])
            p++;
        channel = channel * arranged->phases + p;
        y /= s->stride[0];
        x /= s->stride[1];
    } else {
        y -= s->before[0];
        x -= s->before[1];
    }
    return (int32_t)((ptrdiff_t)channel * (ptrdiff_t)in->plane + y * (ptrdiff_t)in->pitch + x);
}

/* Vectors of positions that one weight is multiplied by, for `images` interleaved. */
static size_t vectors_of(const struct scl_model *m, const Step *s, size_t images) {
    const Tensor *out = &m->tensors[s->out];
    size_t length = is_vector(out) ? 1 : (size_t)out->height * out->pitch;
    return (length * images + (size_t)m->kernels->lanes - 1) / (size_t)m->kernels->lanes;
}

/* The taps of each block of outputs, merged; positions within an output rise with the index. */
static bool pack_blocks(const struct scl_model *m, Step *s, int outputs) {
    int blocks = (outputs + DENSE_ROWS - 1) / DENSE_ROWS;
    uint32_t *first = calloc((size_t)blocks + 1, sizeof *first), count = 0;
    int32_t *offsets = calloc((size_t)s->live + 1, sizeof *offsets);
    float *weights = calloc(((size_t)s->live + 1) * DENSE_ROWS, sizeof *weights);
    if (!first || !offsets || !weights) {
        free(first), free(offsets), free(weights);
        return false;
    }
    for (int block = 0; block < blocks; block++) {
        uint32_t at[DENSE_ROWS], end[DENSE_ROWS];
        for (int row = 0; row < DENSE_ROWS; row++) {
            int o = block * DENSE_ROWS + row;
            at[row] = o < outputs ? s->first[o] : 0;
            end[row] = o < outputs ? s->first[o + 1] : 0;
        }
        first[block] = count;
        for (;;) {
            int32_t next = INT32_MAX;
            for (int row = 0; row < DENSE_ROWS; row++)
                if (at[row] < end[row] && s->entries[at[row]].offset < next)
                    next = s->entries[at[row]].offset;
            if (next == INT32_MAX) break;
            offsets[count] = next;
            for (int row = 0; row < DENSE_ROWS; row++)
                if (at[row] < end[row] && s->entries[at[row]].offset == next)
                    weights[(size_t)count * DENSE_ROWS + (size_t)row] = s->entries[at[row]++].weight;
            count++;
        }
    }
    first[blocks] = count;
    /* Measured on Zen 4 (docs/runtime.md): a multiply-add of the sparse kernel takes 1.9 times one
     * of the dense kernel, which has one for each row of each tap, and a weight about 3 by itself. */
    double each = 1.9 + 3.0 / (double)vectors_of(m, s, 1);
    s->dense = each * s->live > (double)DENSE_ROWS * count;
    if (!s->dense) {
        free(first), free(offsets), free(weights);
        return true;
    }
    s->blocks = first;
    s->offsets = offsets;
    s->weights = weights;
    return true;
}

static bool pack_embedding(struct scl_model *m, Step *s) {
    const Tensor *out = &m->tensors[s->out];
    size_t count = (size_t)out->channels * (size_t)out->width;
    s->bias = calloc(count, sizeof *s->bias);
    if (s->bias) memcpy(s->bias, s->biases, count * sizeof *s->bias);
    return s->bias;
}

static int by_offset(const void *a, const void *b) {
    int32_t x = ((const Entry *)a)->offset, y = ((const Entry *)b)->offset;
    return (x > y) - (x < y);
}

/* The step's weights, from the file's bytes to where the kernels read them. */
static bool pack(struct scl_model *m, int number, Failure *failure) {
    Step *s = &m->steps[number];
    const Step *arranged = number && m->steps[number - 1].kind == ARRANGE &&
                           m->steps[number - 1].out == s->in ? &m->steps[number - 1] : NULL;
    int outputs = m->tensors[s->out].channels;
    uint32_t *found = calloc((size_t)s->live + 1, sizeof *found);
    float *weights = calloc((size_t)s->live + 1, sizeof *weights);
    s->entries = calloc((size_t)s->live + 1, sizeof *s->entries);
    s->first = calloc((size_t)outputs + 1, sizeof *s->first);
    s->bias = calloc((size_t)outputs, sizeof *s->bias);
    if (!found || !weights || !s->entries || !s->first || !s->bias) {
        free(found), free(weights);
        return fail(failure, "there is not enough memory for the weights");
    }
    if (!read_live(s, found, weights)) {
        free(found), free(weights);
        return fail(failure, "the file is damaged: the weights of step %d contradict it", number);
    }
    memcpy(s->bias, s->biases, (size_t)outputs * 4);
    for (uint32_t i = 0; i < s->live; i++) {
        int o;
        s->entries[i].offset = place_of(m, s, arranged, found[i], &o);
        s->entries[i].weight = weights[i];
        s->first[o + 1] = i + 1;
    }
    free(found), free(weights);
    for (int o = 0; o < outputs; o++) {
        if (s->first[o + 1] < s->first[o]) s->first[o + 1] = s->first[o];
        /* Of a strided convolution, taps are not in the order of their places. */
        if (arranged) qsort(s->entries + s->first[o], s->first[o + 1] - s->first[o], sizeof(Entry), by_offset);
    }
    bool may_be_dense = (double)s->live > 0.2 * s->size;
    /* On one image, gathered inputs take as long as rows of 1 in 14 live (docs/runtime.md). */
    if ((double)s->live > 0.07 * s->size && s->kind == LINEAR && is_vector(&m->tensors[s->in])) {
        size_t columns = (size_t)m->tensors[s->in].channels;
        s->rows = calloc((size_t)outputs * columns, sizeof(float));
        if (!s->rows) return fail(failure, "there is not enough memory for the weights");
        for (int o = 0; o < outputs; o++)
            for (uint32_t k = s->first[o]; k < s->first[o + 1]; k++)
                s->rows[(size_t)o * columns + (size_t)s->entries[k].offset] = s->entries[k].weight;
    }
    if (may_be_dense && !pack_blocks(m, s, outputs))
        return fail(failure, "there is not enough memory for the weights");
    return true;
}

/* What no kernel reads is not kept: the classifier of a large network is half of its weights. */
static void drop_unused(struct scl_model *m) {
    for (int i = 0; i < m->step_count; i++) {
        Step *s = &m->steps[i];
        bool single = s->kind == LINEAR && m->images == 1;
        if (s->rows ? single || s->dense : s->dense && s->kind == CONV) {
            free(s->entries), free(s->first);
            s->entries = NULL;
            s->first = NULL;
        }
        if (s->dense && single) {
            free(s->blocks), free(s->offsets), free(s->weights);
            s->blocks = NULL;
            s->offsets = NULL;
            s->weights = NULL;
            s->dense = false;
        }
    }
}

static void keep_alive(Tensor *t, int step) {
    if (t->last < step) t->last = step;
}

/* Gives each tensor a place in memory that no other has while both are needed. */
static void plan_memory(struct scl_model *m) {
    for (int i = 0; i < m->tensor_count; i++) m->tensors[i].born = -2;
    m->tensors[m->input].born = m->tensors[m->input].last = -1;
    for (int i = 0; i < m->step_count; i++) {
        const Step *s = &m->steps[i];
        m->tensors[s->out].born = m->tensors[s->out].last = i;
        keep_alive(&m->tensors[s->in], i);
        if (s->in2 >= 0) keep_alive(&m->tensors[s->in2], i);
    }
    m->tensors[m->output].last = m->step_count;
    m->floats = LINE;
    for (int i = 0; i < m->tensor_count; i++) { /* in the order of the file: nearly that of birth */
        Tensor *t = &m->tensors[i];
        if (t->born == -2) continue;
        t->offset = 0;
        for (bool moved = true; moved;) {
            moved = false;
            for (int j = 0; j < i; j++) {
                const Tensor *other = &m->tensors[j];
                if (other->born == -2 || other->born > t->last || t->born > other->last) continue;
                if (t->offset < other->offset + other->floats && other->offset < t->offset + t->floats) {
                    t->offset = other->offset + other->floats;
                    moved = true;
                }
            }
        }
        if (m->floats < t->offset + t->floats) m->floats = t->offset + t->floats;
    }
}

/* How many images lie side by side where there are enough. What counts is the work of the sparse
 * layers: small maps and vectors fill no vector by themselves. Maps that then leave the cache lose
 * more than this gains. */
static void choose_images(struct scl_model *m) {
    double best = 0, single = 0;
    m->images = 1;
    for (int i = 0; i < m->step_count; i++)
        if (m->steps[i].kind >= EMBED) return; /* their kernels are for one image */
    for (size_t images = 1; images <= MOST_IMAGES; images = images == 1 ? LINE : images * 2) {
        if (images > 1 && m->floats * images * sizeof(float) > (size_t)2 << 20) break;
        double cost = 0;
        for (int i = 0; i < m->step_count; i++) {
            const Step *s = &m->steps[i];
            if (s->kind != CONV && s->kind != LINEAR) continue;
            const Tensor *out = &m->tensors[s->out];
            /* A weight's own costs are those of about one vector; alone, Linear gathers. The zeros
             * around each row take as long as some vectors, however many images it has. */
            double each = s->kind == LINEAR && images == 1 ? 2 : 1 + (double)vectors_of(m, s, images);
            double rows = (double)out->channels * (10 + 6.0 * (out->edges ? out->height : 0));
            cost += (s->live * each + rows) / (double)images;
        }
        if (images == 1) single = cost;
        if (images == LINE) m->pays = single > 0 ? (size_t)(cost * LINE / single) + 1 : LINE;
        if (images == 1 || cost < 0.8 * best) {
            best = cost;
            m->images = images;
        }
    }
}

static bool describe(struct scl_model *m) {
    static const char *names[] = {"", "conv", "linear", "add", "scale", "maxpool", "mean", "activate", "normalise", "arrange",
                                  "embed", "attend", "layernorm", "select"};
    size_t room = (size_t)m->step_count * 160 + 1, used = 0;
    m->description = calloc(room, 1);
    if (!m->description) return false;
    for (int i = 0; i < m->step_count; i++) {
        const Step *s = &m->steps[i];
        const Tensor *in = &m->tensors[s->in], *out = &m->tensors[s->out];
        used += (size_t)snprintf(m->description + used, room - used,
                                 "%s %dx%dx%d %dx%dx%d %dx%d/%d %u/%u %s\n", names[s->kind], in->channels,
                                 in->height, in->width, out->channels, out->height, out->width,
                                 s->kernel[0], s->kernel[1], s->stride[0], s->live, s->size,
                                 s->dense ? "dense" : "sparse");
    }
    return true;
}

static bool prepare(struct scl_model *m, Failure *failure) {
    if (!lay_out(m)) return fail(failure, "the file describes a network too large for this runtime");
    for (int i = 0; i < m->step_count; i++)
        if ((m->steps[i].kind == CONV || m->steps[i].kind == LINEAR) && !pack(m, i, failure)) return false;
    for (int i = 0; i < m->step_count; i++)
        if (m->steps[i].kind == EMBED && !pack_embedding(m, &m->steps[i]))
            return fail(failure, "there is not enough memory for the weights");
    plan_memory(m);
    choose_images(m);
    drop_unused(m);
    for (int i = 0; i < m->tensor_count; i++)
        if (m->widest < m->tensors[i].pitch) m->widest = m->tensors[i].pitch;
    for (int i = 0; i < m->step_count; i++) {
        Step *s = &m->steps[i];
        size_t scores = (size_t)m->tensors[s->in].width * MOST_QUERIES;
        if (s->kind == ATTEND && m->widest < scores) m->widest = scores;
        s->positions = s->exponents = (Rice){0}; /* into bytes of the caller's */
        s->mantissas = s->biases = NULL;
    }
    if (!describe(m)) return fail(failure, "there is not enough memory");
    return true;
}
