/* What the parts of the runtime share. */
#ifndef SCL_INTERNAL_H
#define SCL_INTERNAL_H

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Floats of a cache line and of the widest vector: planes and blocks of images are multiples. */
#define LINE 16
#define MOST_VECTORS 8 /* accumulators of a tile */
#define DENSE_ROWS 4   /* outputs that the dense kernel computes together */
#define DENSE_VECTORS 6
#define MOST_IMAGES 64 /* interleaved in a block */
#define MOST_QUERIES 64 /* tokens whose attention is computed together */

typedef enum {
    CONV = 1, LINEAR, ADD, SCALE, MAXPOOL, MEAN, ACTIVATE, NORMALISE,
    ARRANGE, /* never in a file */
    EMBED, ATTEND, LAYERNORM, SELECT /* of tokens: maps with one row, a column for each */
} Kind;
typedef enum { CLIP = 0, SILU, SIGMOID, TANH, HARDSWISH, HARDSIGMOID, GELU, ACTIVATIONS } Activation;

/* A map of `channels` planes, or a vector where height and width are 1. Each plane has `margin`
 * rows of zeros above and below, and `pad` columns of zeros that end one row and begin the next:
 * so that a plane is one stream of numbers in which a shifted read never needs a branch. All maps
 * of one height and width are laid out alike, so that their streams run side by side. */
typedef struct {
    int channels, height, width;
    int pad, margin;
    bool edges;           /* a convolution reads the zeros around it */
    size_t pitch, plane;  /* floats from row to row, from channel to channel */
    size_t origin;        /* of the first pixel in its plane */
    size_t floats;        /* of one image */
    size_t offset;        /* in the memory of one image */
    int born, last;       /* the steps that write it first and read it last */
} Tensor;

typedef struct {
    int32_t offset; /* floats, from the output's position in the input's stream, one image */
    float weight;
} Entry;

/* Numbers of a file in Golomb-Rice code, and how far they are read. */
typedef struct {
    int k;
    uint32_t quotient_bytes, remainder_bytes;
    const uint8_t *quotients, *remainders;
    uint64_t bit, taken;
} Rice;

typedef struct {
    Kind kind;
    int in, in2, out; /* tensors; in2 is -1, a residual, or the second operand */
    Activation activation;
    float low, high; /* of CLIP; of NORMALISE and LAYERNORM, low is epsilon, of ATTEND the scale */
    int kernel[2], stride[2], dilation[2], before[2]; /* of rows, of columns */
    int groups; /* of ATTEND, heads */
    /* weights */
    uint32_t live, size;
    int top; /* largest exponent */
    Rice positions, exponents;
    const uint8_t *mantissas, *biases;
    float *bias; /* of EMBED, what is added to each token: [channels][tokens] */
    Entry *entries;    /* of output o: first[o] … first[o + 1] */
    uint32_t *first;
    uint32_t *blocks;  /* dense: as `first`, of DENSE_ROWS outputs each */
    int32_t *offsets;  /* dense: of the taps that any output of the block has */
    float *weights;    /* dense: DENSE_ROWS for each tap */
    float *rows;       /* of a dense LINEAR on a vector: the weights as they are, row by row */
    bool dense;
    /* ARRANGE: the phases that the convolution reads, (row, column) each */
    int phases, *phase;
} Step;

/* One tile of output positions, over some outputs. */
typedef struct {
    const float *in, *residual;
    float *out;
    const float *bias;
    const Entry *entries;
    const uint32_t *first;
    const int32_t *offsets;
    const float *weights;
    size_t plane; /* floats from output to output */
    int shift;    /* log2 of the images interleaved */
    int outputs;
    Activation activation;
    float low, high;
} Tile;

/* One head of an attention: `depth` channels each of queries, keys and values, `plane` floats apart. */
typedef struct {
    const float *queries, *keys, *values;
    float *out, *scores; /* [tokens][MOST_QUERIES] */
    size_t plane;
    int tokens, depth;
    float scale;
} Head;

typedef void (*TileKernel)(const Tile *tile, size_t at, int begin, int end);

typedef struct {
    const char *name;
    int lanes, dense_vectors;
    TileKernel sparse[MOST_VECTORS + 1], dense[DENSE_VECTORS + 1];
    void (*activate)(float *x, size_t count, Activation kind, float low, float high);
    void (*add)(const float *a, const float *b, float *out, size_t count);
    void (*scale)(const float *x, const float *factors, float *out, size_t count, size_t images);
    float (*sum)(const float *x, size_t count);
    void (*sum_images)(const float *x, float *sums, size_t count, size_t images);
    void (*larger)(const float *x, float *most, size_t count);
    void (*slide)(float *row, size_t count, int window);
    void (*every)(const float *x, float *out, size_t count, size_t stride);
    void (*attend)(const Head *head);
    void (*layer_norm)(const float *x, float *out, size_t plane, int channels, size_t count, float epsilon);
    void (*dot)(const Step *step, const float *in, float *out, int begin, int end, size_t columns);
} Kernels;

/* What one thread, or some together, compute in; made for `images` interleaved ones. */
typedef struct Workspace {
    struct Workspace *next;
    float *memory;
    float **apart; /* SCL_CHECK: each tensor by itself, for a sanitizer to see its ends */
    float **rows;  /* of each thread, one row of the widest map */
    size_t images; /* that there is room for */
    struct Team *team;
    int threads;
} Workspace;

struct scl_model {
    Tensor *tensors;
    Step *steps;
    int tensor_count, step_count;
    int input, output;
    const Kernels *kernels;
    size_t floats; /* of the memory of one image */
    size_t images; /* interleaved where there are enough of them; 1 where that does not pay */
    size_t pays;   /* from so many images on, a block of LINE is quicker than one by one */
    size_t widest;
    char *description;
    pthread_mutex_t lock;
    Workspace *idle;
};

typedef struct {
    char *text;
    size_t size;
} Failure;

/* Writes the sentence and returns false. */
__attribute__((format(printf, 2, 3))) static bool fail(Failure *failure, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(failure->text, failure->size, format, arguments);
    va_end(arguments);
    return false;
}

static inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static inline bool is_vector(const Tensor *t) { return t->height == 1 && t->width == 1; }

#endif
