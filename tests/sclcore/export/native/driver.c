/* What a sanitizer watches: for each line "model images outputs batch threads" of standard input,
 * runs the model and writes its outputs, or "refused: …" for one that cannot be loaded. */
#include <stdio.h>
#include <stdlib.h>

#include "scl.h"

static float *read_floats(const char *path, size_t count) {
    /* As long as said and not longer, for what is read beyond it to be seen. */
    float *data = malloc(count * sizeof(float));
    FILE *file = fopen(path, "rb");
    if (!file) exit(3);
    if (data && fread(data, sizeof(float), count, file) != count) {
        free(data);
        data = NULL;
    }
    fclose(file);
    return data;
}

int main(void) {
    char model_path[1000], images_path[1000], outputs_path[1000], error[400];
    unsigned batch;
    int threads;
    while (scanf("%999s %999s %999s %u %d", model_path, images_path, outputs_path, &batch, &threads) == 5) {
        scl_model *model = scl_load(model_path, error, sizeof error);
        if (!model) {
            printf("refused: %s\n", error);
            fflush(stdout);
            continue;
        }
        int in[3], out[3];
        scl_input_shape(model, in);
        scl_output_shape(model, out);
        size_t inputs = (size_t)batch * (size_t)in[0] * (size_t)in[1] * (size_t)in[2];
        size_t count = (size_t)batch * (size_t)out[0] * (size_t)out[1] * (size_t)out[2];
        float *images = read_floats(images_path, inputs), *outputs = malloc(count * sizeof(float));
        if (!images || !outputs || scl_run(model, images, batch, outputs, threads)) {
            printf("refused: other images, or too little memory\n");
            fflush(stdout);
            free(images);
            free(outputs);
            scl_free(model);
            continue;
        }
        FILE *file = fopen(outputs_path, "wb");
        if (!file || fwrite(outputs, sizeof(float), count, file) != count || fclose(file)) exit(5);
        free(images);
        free(outputs);
        scl_free(model);
        printf("ran\n");
        fflush(stdout);
    }
    return 0;
}
