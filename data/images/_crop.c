/* Crops of JPEG images by libjpeg-turbo, which decodes no more than the crop needs.

Built where there are a C compiler and libjpeg-turbo's headers; data/jpeg.py says what happens
where there are none. Entropy-coded data has no short cut, so the rows above a crop are read, but
only the blocks under the crop are transformed, and nothing is read after its last row. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

/* Chroma of half the width is interpolated with the sample beside it, two columns away. */
#define CONTEXT_COLUMNS 2
#define ROWS_AT_ONCE 16

typedef struct {
    JDIMENSION top, left, height, width;
} Box;

typedef struct {
    struct jpeg_error_mgr manager;
    jmp_buf out;
} Complaints;

static void complain(j_common_ptr common) { longjmp(((Complaints *)common->err)->out, 1); }

/* A warning (below 0) means damaged data: the caller then asks other decoders. */
static void complain_of_damage(j_common_ptr common, int level) {
    if (level < 0) complain(common);
}

/* Whether the data that were not decoded end as an image does: a torn file shall be found out even
where the crop lies above the tear. */
static int has_end(j_decompress_ptr jpeg) {
    if (jpeg_input_complete(jpeg) || jpeg->unread_marker == JPEG_EOI) return 1;
    const unsigned char *at = jpeg->src->next_input_byte, *end = at + jpeg->src->bytes_in_buffer;
    while ((at = memchr(at, 0xFF, end - at)) && ++at < end) {
        int is_data = *at == 0 || *at == 0xFF || (*at >= JPEG_RST0 && *at < JPEG_RST0 + 8);
        if (!is_data) return *at == JPEG_EOI;
    }
    return 0;
}

/* Copies pixels from right to left. Of three bytes, four are moved at a time, since that is one
instruction: the next pixel mends what the fourth has spoilt, and the last has only three. */
static void mirror(const unsigned char *from, unsigned char *to, size_t pixels, size_t bytes) {
    size_t i = 0;
    if (bytes == 3)
        for (; i + 1 < pixels; i++) memcpy(to + i * 3, from + (pixels - 1 - i) * 3, 4);
    for (; i < pixels; i++) memcpy(to + i * bytes, from + (pixels - 1 - i) * bytes, bytes);
}

/* Decodes the columns under the box, from its top to its bottom, and copies the box to `pixels`. */
static void read_box(j_decompress_ptr jpeg, Box box, int is_mirrored, unsigned char *pixels) {
    size_t depth = jpeg->output_components;
    JDIMENSION right = box.left + box.width, beyond = jpeg->output_width - right;
    JDIMENSION first = box.left > CONTEXT_COLUMNS ? box.left - CONTEXT_COLUMNS : 0;
    JDIMENSION columns = right + (beyond > CONTEXT_COLUMNS ? CONTEXT_COLUMNS : beyond) - first;
    jpeg_crop_scanline(jpeg, &first, &columns);
    JSAMPARRAY rows = jpeg->mem->alloc_sarray((j_common_ptr)jpeg, JPOOL_IMAGE, columns * depth + 2,
                                              ROWS_AT_ONCE);
    /* To aligned rows the library writes past the cache, and they are read again at once here. */
    for (int i = 0; i < ROWS_AT_ONCE; i++) rows[i]++;
    if (box.top) jpeg_skip_scanlines(jpeg, box.top);
    for (JDIMENSION left = box.height; left;) {
        JDIMENSION made = jpeg_read_scanlines(jpeg, rows, left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE);
        for (JDIMENSION i = 0; i < made; i++, pixels += box.width * depth) {
            const unsigned char *row = rows[i] + (box.left - first) * depth;
            if (is_mirrored)
                mirror(row, pixels, box.width, depth);
            else
                memcpy(pixels, row, box.width * depth);
        }
        left -= made;
    }
}

/* Returns whether `pixels` now holds the box, and nothing about the data is wrong. */
static int decode(const unsigned char *content, unsigned long size, int eighths, int is_grey,
                  int is_mirrored, Box box, unsigned char *pixels, size_t room) {
    struct jpeg_decompress_struct jpeg;
    Complaints complaints;
    jpeg.err = jpeg_std_error(&complaints.manager);
    complaints.manager.error_exit = complain;
    complaints.manager.emit_message = complain_of_damage;
    /* jpeg_destroy must find what jpeg_create has not come to set. */
    jpeg.mem = NULL;
    if (setjmp(complaints.out)) {
        jpeg_destroy_decompress(&jpeg);
        return 0;
    }
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, content, size);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = is_grey ? JCS_GRAYSCALE : JCS_RGB;
    jpeg.scale_num = eighths;
    jpeg.scale_denom = 8;
    jpeg_start_decompress(&jpeg);

    size_t width = jpeg.output_width, height = jpeg.output_height;
    int is_sound = box.height && box.width && (size_t)box.left + box.width <= width &&
                   (size_t)box.top + box.height <= height &&
                   (size_t)box.height * box.width * jpeg.output_components <= room;
    if (is_sound) {
        read_box(&jpeg, box, is_mirrored, pixels);
        if (jpeg.output_scanline < jpeg.output_height)
            is_sound = has_end(&jpeg);
        else
            jpeg_finish_decompress(&jpeg); /* Complains of data that are left over. */
    }
    jpeg_destroy_decompress(&jpeg);
    return is_sound;
}

PyDoc_STRVAR(crop_doc, "crop(content, top, left, height, width, eighths, grey, mirrored, room)\n--\n\n"
"Decode a box of a JPEG, which is scaled to so many eighths of its size, to RGB or grey.\n\n"
"The box is in pixels of the scaled image; it comes to lie in `room`, uint8 [height, width, 3 or\n"
"1], its columns reversed if `mirrored`. False if the data are damaged, cannot be turned into such\n"
"colours, or the box does not fit.");

static PyObject *crop(PyObject *module, PyObject *args) {
    Py_buffer content, room;
    Box box;
    int eighths, is_grey, is_mirrored, is_decoded;
    if (!PyArg_ParseTuple(args, "y*IIIIippw*", &content, &box.top, &box.left, &box.height, &box.width,
                          &eighths, &is_grey, &is_mirrored, &room))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    is_decoded = decode(content.buf, content.len, eighths, is_grey, is_mirrored, box, room.buf,
                        room.len);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&content);
    PyBuffer_Release(&room);
    return PyBool_FromLong(is_decoded);
}

static PyMethodDef methods[] = {{"crop", crop, METH_VARARGS, crop_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "data._crop", .m_methods = methods};

PyMODINIT_FUNC PyInit__crop(void) { return PyModule_Create(&module); }
