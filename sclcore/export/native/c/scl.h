/* Runs a network whose weights are mostly zero, on the CPU: the live weights alone are stored and
 * multiplied. Needs a C compiler with vector extensions (GCC, Clang), POSIX threads and libm. */
#ifndef SCL_H
#define SCL_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct scl_model scl_model;

/* The model of a file, or NULL: then `error` (of `size` bytes) holds a sentence that says why.
 * A damaged file is refused; nothing behind its end is read. */
scl_model *scl_load(const char *path, char *error, size_t size);

/* The same of a file's bytes, which are not needed any more when it returns. */
scl_model *scl_load_memory(const void *data, size_t bytes, char *error, size_t size);

/* Ends the model; no other call on it may be under way. NULL is allowed. */
void scl_free(scl_model *model);

/* channels, height, width of an image, and of what comes out (height and width 1 for a vector). */
void scl_input_shape(const scl_model *model, int shape[3]);
void scl_output_shape(const scl_model *model, int shape[3]);

/* images: float [batch][channels][height][width], normalised as in training; outputs: float
 * [batch] of the output's shape. Any number of threads may call it on one model at the same time;
 * each call computes with `threads` of its own (1 or more). 0, or -1 where memory is lacking. */
int scl_run(scl_model *model, const float *images, size_t batch, float *outputs, int threads);

/* Which instructions the kernels use here: "avx512", "avx2" or "baseline" (SSE2, NEON, or what the
 * compiler makes of it). The environment's SCL_KERNELS may name another one that the CPU has. */
const char *scl_kernels(const scl_model *model);

/* A description of each step, a line each, as a string that lives as long as the model. */
const char *scl_describe(const scl_model *model);

/* Nanoseconds of each step of one pass over `images`, as `batch` of them take, on one thread;
 * `steps` is how many numbers there is room for. Returns how many steps the model has, or -1. */
int scl_profile(scl_model *model, const float *images, size_t batch, float *outputs,
                double *nanoseconds, int steps);

#ifdef __cplusplus
}
#endif
#endif
