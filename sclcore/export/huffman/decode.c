/* Canonical Huffman codewords → symbols, and products with the matrix that they are the values of.

   A code has a row for each length that occurs, the shortest first. `ends[row]` is where, among all
   words of `longest` bits, those end that begin with a codeword of that length or a shorter one;
   `words[row]` is the first that begins with one of that length, whose symbol is `first[row]`. */

#include <stdint.h>

typedef struct {
    const uint8_t *stream;
    int64_t bytes;
    const uint64_t *ends, *words;
    const int64_t *first, *lengths;
    int64_t longest;
} Code;

/* The next 64 bits from bit `at` on, of which at least 57 are true; zeros beyond the end. */
static inline uint64_t window(const Code *code, int64_t at) {
    int64_t from = at >> 3, left = code->bytes - from;
    uint64_t word = 0;
    if (left >= 8) {
        __builtin_memcpy(&word, code->stream + from, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        word = __builtin_bswap64(word);
#endif
    } else {
        for (int64_t i = 0; i < left; i++) word |= (uint64_t)code->stream[from + i] << (56 - 8 * i);
    }
    return word << (at & 7);
}

/* The symbol that begins at bit *at, which moves behind it. */
static inline int64_t next(const Code *code, int64_t *at) {
    uint64_t word = window(code, *at) >> (64 - code->longest);
    int64_t row = 0;
    while (word >= code->ends[row]) row++;
    *at += code->lengths[row];
    uint64_t beyond = (word - code->words[row]) >> (code->longest - code->lengths[row]);
    return code->first[row] + (int64_t)beyond;
}

/* `count` symbols from bit `at` on; the bit behind the last, or -1 where the stream ends before. */
int64_t scl_symbols(const Code *code, int64_t at, int64_t count, int64_t *symbols) {
    const int64_t end = 8 * code->bytes;
    for (int64_t i = 0; i < count; i++) {
        if (at >= end) return -1;
        symbols[i] = next(code, &at);
    }
    return at <= end ? at : -1;
}

static inline void add(float *product, float value, const float *inputs, int64_t batch) {
    for (int64_t b = 0; b < batch; b++) product[b] += value * inputs[b];
}

/* product [out, batch] += W [out, in] · inputs [in, batch], of a codeword for every element. */
int64_t scl_ham(const Code *code, const float *values, int64_t out, int64_t in, int64_t batch,
                const float *inputs, float *product) {
    const int64_t end = 8 * code->bytes;
    int64_t at = 0;
    for (int64_t o = 0; o < out; o++) {
        for (int64_t i = 0; i < in; i++) {
            if (at >= end) return -1;
            float value = values[next(code, &at)];
            if (value != 0.0f) add(product + o * batch, value, inputs + i * batch, batch);
        }
    }
    return at <= end ? at : -1;
}

/* The same of a codeword for each live element: `counts` of each row, then the column of each. */
#define SHAM(NAME, INDEX)                                                                          \
    int64_t NAME(const Code *code, const float *values, const int64_t *counts,                     \
                 const INDEX *columns, int64_t out, int64_t batch, const float *inputs,            \
                 float *product) {                                                                 \
        const int64_t end = 8 * code->bytes;                                                       \
        int64_t at = 0;                                                                            \
        for (int64_t o = 0; o < out; o++) {                                                        \
            for (int64_t n = 0; n < counts[o]; n++) {                                              \
                if (at >= end) return -1;                                                          \
                float value = values[next(code, &at)];                                             \
                add(product + o * batch, value, inputs + *columns++ * batch, batch);               \
            }                                                                                      \
        }                                                                                          \
        return at <= end ? at : -1;                                                                \
    }

SHAM(scl_sham_1, uint8_t)
SHAM(scl_sham_2, uint16_t)
SHAM(scl_sham_4, uint32_t)
