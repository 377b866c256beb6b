/* A file's bytes → tensors and steps, each number checked before it is used. */
#include "internal.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the file's numbers are little-endian, as those of this processor have to be"
#endif

#define VERSION 1
#define START 14 /* 8 bytes of magic, u16 version, u32 bytes of the header */
#define MOST_ELEMENTS ((size_t)1 << 28)
#define MOST_STEPS 65536
#define MOST_SPAN 4096 /* pixels that a kernel covers, or a border has */

static uint32_t crc32_of(const uint8_t *data, size_t bytes) {
    uint32_t table[256], crc = 0xFFFFFFFFu;
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value & 1 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
        table[i] = value;
    }
    for (size_t i = 0; i < bytes; i++) crc = table[(crc ^ data[i]) & 255] ^ (crc >> 8);
    return ~crc;
}

typedef struct {
    const uint8_t *at, *end;
    bool short_of; /* more was asked for than there is */
} Reader;

static const uint8_t *take(Reader *r, size_t bytes) {
    if (bytes > (size_t)(r->end - r->at)) {
        r->short_of = true;
        return NULL;
    }
    r->at += bytes;
    return r->at - bytes;
}

/* A number in groups of 7 bits, lowest first, the high bit set where more follow; the lowest bit of
 * the whole is its sign: 0, -1, 1, -2, … are 0, 1, 2, 3, … */
static int32_t take_int(Reader *r) {
    uint32_t value = 0;
    for (int shift = 0;; shift += 7) {
        const uint8_t *at = take(r, 1);
        if (!at || shift > 28 || (shift == 28 && *at > 15)) {
            r->short_of = true;
            return 0;
        }
        value |= (uint32_t)(*at & 127) << shift;
        if (*at < 128) return (int32_t)(value >> 1) ^ -(int32_t)(value & 1);
    }
}

static float take_float(Reader *r) {
    float value = 0;
    const uint8_t *at = take(r, 4);
    if (at) memcpy(&value, at, 4);
    return value;
}

static size_t pixels(const Tensor *t) { return (size_t)t->height * (size_t)t->width; }

static size_t elements(const Tensor *t) { return (size_t)t->channels * pixels(t); }

static bool same_shape(const Tensor *a, const Tensor *b) {
    return a->channels == b->channels && a->height == b->height && a->width == b->width;
}

static bool is_tokens(const Tensor *t) { return t->height == 1 && t->width > 1; }

static bool within(int value, int least, int most) { return value >= least && value <= most; }

static bool check_windows(const Step *s, const Tensor *in, const Tensor *out) {
    int size[2] = {in->height, in->width}, count[2] = {out->height, out->width};
    for (int d = 0; d < 2; d++) {
        if (!within(s->kernel[d], 1, MOST_SPAN) || !within(s->stride[d], 1, MOST_SPAN) ||
            !within(s->dilation[d], 1, MOST_SPAN) || !within(s->before[d], 0, MOST_SPAN))
            return false;
        if ((int64_t)(s->kernel[d] - 1) * s->dilation[d] > MOST_SPAN) return false;
        int64_t last = (int64_t)(count[d] - 1) * s->stride[d] - s->before[d];
        /* A pool's window has a pixel of the map in it, or its largest would be none. */
        if (s->kind == MAXPOOL && (s->before[d] >= s->kernel[d] || last >= size[d])) return false;
        if (last > size[d] + MOST_SPAN) return false;
    }
    return true;
}

/* Whether the step's shapes fit each other; sets its number of weights. */
static bool check_step(const struct scl_model *m, Step *s) {
    const Tensor *in = &m->tensors[s->in], *out = &m->tensors[s->out];
    const Tensor *second = s->in2 >= 0 ? &m->tensors[s->in2] : NULL;
    if (!within((int)s->activation, 0, ACTIVATIONS - 1)) return false;
    switch (s->kind) {
    case CONV:
        if (!within(s->groups, 1, in->channels) || in->channels % s->groups ||
            out->channels % s->groups || is_vector(out) || !check_windows(s, in, out) ||
            (second && !same_shape(second, out)))
            return false;
        s->size = 0;
        size_t taps = (size_t)s->kernel[0] * (size_t)s->kernel[1];
        size_t fan_in = (size_t)(in->channels / s->groups);
        if (taps > MOST_ELEMENTS || taps * fan_in > MOST_ELEMENTS / (size_t)out->channels) return false;
        s->size = (uint32_t)(taps * fan_in * (size_t)out->channels);
        return true;
    case LINEAR:
        if (!is_vector(out) || second || elements(in) > MOST_ELEMENTS / (size_t)out->channels)
            return false;
        s->size = (uint32_t)(elements(in) * (size_t)out->channels);
        return true;
    case ADD: return second && same_shape(in, out) && same_shape(second, out);
    case SCALE:
        return second && same_shape(in, out) && is_vector(second) &&
               second->channels == out->channels;
    case MAXPOOL: return !second && in->channels == out->channels && check_windows(s, in, out);
    case MEAN: return !second && in->channels == out->channels && is_vector(out);
    case ACTIVATE: return !second && same_shape(in, out);
    case NORMALISE:
        return !second && same_shape(in, out) && within(s->groups, 1, in->channels) &&
               in->channels % s->groups == 0;
    case EMBED:
        return !second && is_tokens(out) && in->channels == out->channels &&
               within(s->before[1], 0, out->width) &&
               pixels(in) + (size_t)s->before[1] == (size_t)out->width;
    case ATTEND:
        return !second && is_tokens(in) && is_tokens(out) && in->width == out->width &&
               in->channels % 3 == 0 && in->channels / 3 == out->channels &&
               within(s->groups, 1, out->channels) && out->channels % s->groups == 0;
    case LAYERNORM: return !second && is_tokens(in) && same_shape(in, out);
    case SELECT:
        return !second && is_tokens(in) && is_vector(out) && in->channels == out->channels &&
               within(s->before[1], 0, in->width - 1);
    default: return false;
    }
}

static bool read_tensors(struct scl_model *m, Reader *r) {
    m->tensor_count = take_int(r);
    m->step_count = take_int(r);
    m->input = take_int(r);
    m->output = take_int(r);
    if (r->short_of || !within(m->tensor_count, 1, MOST_STEPS) ||
        !within(m->step_count, 0, MOST_STEPS) || !within(m->input, 0, m->tensor_count - 1) ||
        !within(m->output, 0, m->tensor_count - 1))
        return false;
    /* Room for the arranged input that a convolution may get. */
    m->tensors = calloc((size_t)(m->tensor_count + m->step_count), sizeof(Tensor));
    m->steps = calloc((size_t)m->step_count * 2 + 1, sizeof(Step));
    if (!m->tensors || !m->steps) return false;
    for (int i = 0; i < m->tensor_count; i++) {
        Tensor *t = &m->tensors[i];
        t->channels = take_int(r);
        t->height = take_int(r);
        t->width = take_int(r);
        int most = (int)MOST_ELEMENTS;
        if (r->short_of || !within(t->channels, 1, most) || !within(t->height, 1, most) ||
            !within(t->width, 1, most) || pixels(t) > MOST_ELEMENTS / (size_t)t->channels)
            return false;
    }
    return true;
}

static void take_code(Reader *r, Rice *code) {
    code->k = take_int(r);
    code->quotient_bytes = (uint32_t)take_int(r);
    code->remainder_bytes = (uint32_t)take_int(r);
}

static bool read_step(struct scl_model *m, Reader *r, Step *s, const bool *written) {
    int32_t kind = take_int(r);
    s->in = take_int(r);
    s->in2 = take_int(r);
    s->out = take_int(r);
    int32_t activation = take_int(r);
    s->low = take_float(r);
    s->high = take_float(r);
    int *numbers[] = {s->kernel, s->stride, s->dilation, s->before};
    for (int i = 0; i < 8; i++) numbers[i / 2][i % 2] = take_int(r);
    s->groups = take_int(r);
    if (kind == CONV || kind == LINEAR) {
        s->live = (uint32_t)take_int(r);
        s->top = take_int(r);
        take_code(r, &s->positions);
        take_code(r, &s->exponents);
    }
    int last = m->tensor_count - 1;
    if (r->short_of || !within(kind, CONV, SELECT) || !within(activation, 0, ACTIVATIONS - 1) ||
        !within(s->in, 0, last) || !within(s->in2, -1, last) || !within(s->out, 0, last))
        return false;
    s->kind = (Kind)kind;
    s->activation = (Activation)activation;
    /* Each tensor is written once, and before it is read. */
    if (!written[s->in] || (s->in2 >= 0 && !written[s->in2]) || written[s->out]) return false;
    return check_step(m, s) && s->live <= s->size;
}

static bool read_weights(struct scl_model *m, Reader *r, Step *s) {
    if (s->kind == EMBED) s->biases = take(r, elements(&m->tensors[s->out]) * 4);
    if (s->kind != CONV && s->kind != LINEAR) return !r->short_of;
    for (int i = 0; i < 2; i++) {
        Rice *code = i ? &s->exponents : &s->positions;
        code->quotients = take(r, code->quotient_bytes);
        code->remainders = take(r, code->remainder_bytes);
    }
    s->mantissas = take(r, (size_t)s->live * 3);
    s->biases = take(r, (size_t)m->tensors[s->out].channels * 4);
    return !r->short_of;
}

static bool read_program(struct scl_model *m, Reader *r) {
    if (!read_tensors(m, r)) return false;
    bool *written = calloc((size_t)m->tensor_count, sizeof(bool));
    if (!written) return false;
    bool sound = true;
    written[m->input] = true;
    for (int i = 0; i < m->step_count && sound; i++) {
        sound = read_step(m, r, &m->steps[i], written);
        if (sound) written[m->steps[i].out] = true;
    }
    for (int i = 0; i < m->step_count && sound; i++) sound = read_weights(m, r, &m->steps[i]);
    sound = sound && written[m->output] && r->at == r->end;
    free(written);
    return sound;
}

/* The next of the numbers in Golomb-Rice code (sclcore/export/positions.py); false behind the end. */
static bool next_number(Rice *code, uint64_t *number) {
    uint64_t bits = (uint64_t)code->quotient_bytes * 8, quotient = 0, remainder = 0;
    while (code->bit < bits && !(code->quotients[code->bit / 8] >> (7 - code->bit % 8) & 1)) {
        code->bit++;
        quotient++;
    }
    if (code->bit++ >= bits) return false;
    for (int i = 0; i < code->k; i++, code->taken++)
        remainder |= (uint64_t)(code->remainders[code->taken / 8] >> (7 - code->taken % 8) & 1) << i;
    *number = (quotient << code->k) + remainder;
    return true;
}

static bool is_sound(const Rice *code, uint32_t count) {
    return within(code->k, 0, 31) && code->remainder_bytes == ((uint64_t)count * (uint64_t)code->k + 7) / 8;
}

/* Where a step's live weights are, in row-major order, and what they are; there is room for `live`. */
static bool read_live(Step *s, uint32_t *found, float *weights) {
    bool every = s->positions.k == -1;
    if (every ? s->live != s->size : !is_sound(&s->positions, s->live)) return false;
    if (!is_sound(&s->exponents, s->live) || !within(s->top, 0, 254)) return false;
    uint64_t at = 0, number = 0;
    for (uint32_t i = 0; i < s->live; i++) {
        if (!every && !next_number(&s->positions, &number)) return false;
        at += number + (i > 0);
        if (at >= s->size) return false;
        found[i] = (uint32_t)at;
        uint64_t below;
        if (!next_number(&s->exponents, &below) || below > (uint64_t)s->top) return false;
        const uint8_t *three = s->mantissas + (size_t)i * 3;
        uint32_t low = three[0] | (uint32_t)three[1] << 8 | (uint32_t)three[2] << 16;
        uint32_t bits = (low & 0x7FFFFF) | ((uint32_t)s->top - (uint32_t)below) << 23 | (low >> 23) << 31;
        memcpy(&weights[i], &bits, 4);
    }
    return true;
}

static bool read_file(struct scl_model *m, const uint8_t *data, size_t bytes, Failure *failure) {
    uint16_t version;
    uint32_t header, checksum;
    if (bytes < START + 4 || memcmp(data, "SCLNATIV", 8))
        return fail(failure, "this is no file of scl export --format native");
    memcpy(&version, data + 8, 2);
    memcpy(&header, data + 10, 4);
    memcpy(&checksum, data + bytes - 4, 4);
    if (version != VERSION)
        return fail(failure, "the file has version %d; this program reads %d", version, VERSION);
    if (crc32_of(data, bytes - 4) != checksum)
        return fail(failure, "the file is damaged: its checksum does not match");
    if (header > bytes - START - 4)
        return fail(failure, "the file is damaged: its header is longer than it is");
    Reader reader = {data + START + header, data + bytes - 4, false};
    if (!read_program(m, &reader))
        return fail(failure, "the file is damaged: it describes no network that can be run");
    return true;
}
