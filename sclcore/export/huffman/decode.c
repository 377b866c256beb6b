/* Canonical Huffman codewords → symbols, and products with the matrix that they are the values of.

   A code has a row for each length that occurs, the shortest first. `ends[row]` is where, among all
   words of `longest` bits, those end that begin with a codeword of that length or a shorter one;
   `words[row]` is the first that begins with one of that length, whose symbol is `first[row]`. */

#include <stdint.h>

#define TABLE_BITS 10
#define SURE 57 /* bits of a window that are those of the stream */

typedef struct {
    const uint8_t *stream;
    int64_t bytes;
    const uint64_t *ends, *words;
    const int64_t *first, *lengths;
    int64_t longest;
} Code;

/* The next 64 bits from bit `at` on, of which SURE at least are its own; zeros beyond the end. */
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

/* The row of the codeword that `word`, of `longest` bits, begins with. */
static inline int64_t row_of(const Code *code, uint64_t word) {
    int64_t row = 0;
    while (word >= code->ends[row]) row++;
    return row;
}

static inline int64_t symbol_of(const Code *code, uint64_t word, int64_t row) {
    uint64_t beyond = (word - code->words[row]) >> (code->longest - code->lengths[row]);
    return code->first[row] + (int64_t)beyond;
}

/* What any `bits` bits begin with; length 0 where that codeword is longer. */
typedef struct {
    int64_t bits;
    struct {
        int32_t symbol, length;
    } entries[1 << TABLE_BITS];
} Table;

static void fill(Table *table, const Code *code) {
    table->bits = code->longest < TABLE_BITS ? code->longest : TABLE_BITS;
    for (uint64_t begin = 0; begin >> table->bits == 0; begin++) {
        uint64_t word = begin << (code->longest - table->bits);
        int64_t row = row_of(code, word), length = code->lengths[row];
        table->entries[begin].length = length <= table->bits ? (int32_t)length : 0;
        table->entries[begin].symbol = (int32_t)symbol_of(code, word, row);
    }
}

/* The symbol that begins at bit *at, which moves behind it. */
static inline int64_t next(const Code *code, const Table *table, int64_t *at) {
    uint64_t bits = window(code, *at), begin = bits >> (64 - table->bits);
    if (table->entries[begin].length) {
        *at += table->entries[begin].length;
        return table->entries[begin].symbol;
    }
    uint64_t word = bits >> (64 - code->longest);
    int64_t row = row_of(code, word);
    *at += code->lengths[row];
    return symbol_of(code, word, row);
}

/* `count` symbols from bit `at` on; the bit behind the last, or -1 where the stream ends before. */
int64_t scl_symbols(const Code *code, int64_t at, int64_t count, int64_t *symbols) {
    const int64_t end = 8 * code->bytes;
    Table table;
    fill(&table, code);
    for (int64_t i = 0; i < count; i++) {
        if (at >= end) return -1;
        symbols[i] = next(code, &table, &at);
    }
    return at <= end ? at : -1;
}

static inline void add(float *product, float value, const float *inputs, int64_t batch) {
    for (int64_t b = 0; b < batch; b++) product[b] += value * inputs[b];
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* product [out, batch] += W [out, in] · inputs [in, batch], of a codeword for every element. Where
   that of 0 is the bit 0, as it is where most are, a run of them is passed over at once. */
int64_t scl_ham(const Code *code, const float *values, int64_t out, int64_t in, int64_t batch,
                const float *inputs, float *product) {
    const int64_t end = 8 * code->bytes, size = out * in;
    const int bit_is_zero = code->lengths[0] == 1 && values[0] == 0.0f;
    int64_t at = 0, o = 0, n = 0;
    Table table;
    fill(&table, code);
    while (n < size) {
        if (at >= end) return -1;
        if (bit_is_zero) {
            uint64_t bits = window(code, at);
            int64_t zeros = bits ? least(__builtin_clzll(bits), SURE) : SURE;
            zeros = least(least(zeros, end - at), size - n);
            at += zeros, n += zeros;
            if (zeros) continue;
        }
        float value = values[next(code, &table, &at)];
        while (n >= (o + 1) * in) o++;
        add(product + o * batch, value, inputs + (n - o * in) * batch, batch);
        n++;
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
        Table table;                                                                               \
        fill(&table, code);                                                                        \
        for (int64_t o = 0; o < out; o++) {                                                        \
            for (int64_t n = 0; n < counts[o]; n++) {                                              \
                if (at >= end) return -1;                                                          \
                float value = values[next(code, &table, &at)];                                             \
                add(product + o * batch, value, inputs + *columns++ * batch, batch);               \
            }                                                                                      \
        }                                                                                          \
        return at <= end ? at : -1;                                                                \
    }

SHAM(scl_sham_1, uint8_t)
SHAM(scl_sham_2, uint16_t)
SHAM(scl_sham_4, uint32_t)
