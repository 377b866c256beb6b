/* Threads and memory of the calls that are under way, and the functions of scl.h. */
#include "internal.h"
#include "scl.h"

#include <sched.h>
#include <time.h>
#include <unistd.h>

#define SPINS 4000 /* before a waiting thread lets others run */

/* A call's work is stages, one after the other, and each is some chunks, which threads take as they
 * come: so none waits for one that the system has not let run. The ticket says what can be taken: the
 * call's number, the stage, and how many of its chunks are left. */
#define CHUNK_BITS 24
#define STAGE_BITS 20
#define MOST_CHUNKS ((uint64_t)1 << CHUNK_BITS)
#define NO_STAGE (((uint64_t)1 << STAGE_BITS) - 1)
#define ROUNDS (((uint64_t)1 << (64 - CHUNK_BITS - STAGE_BITS)) - 1)

/* Threads that help one call at a time. What is said of the call is read by those alone that have
 * taken a chunk of it: until that is done, the call is under way. */
typedef struct Team {
    int threads; /* the caller's own included */
    int started;
    pthread_t *helpers;
    pid_t process; /* a fork has none of the threads */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t round;
    bool end;
    struct scl_model *model;
    const float *images;
    float *outputs;
    size_t batch;
    Workspace *workspace; /* of all threads together, or NULL: each chunk is a block of images */
    uint64_t stages;
    _Atomic uint64_t ticket;
    atomic_size_t pending; /* chunks of the stage that are not done */
    atomic_bool failed;
} Team;

typedef struct {
    Team *team;
    int number;
} Helper;

static void relax(int spins) {
    if (spins > SPINS) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

static size_t input_floats(const struct scl_model *m) {
    const Tensor *t = &m->tensors[m->input];
    return (size_t)t->channels * (size_t)t->height * (size_t)t->width;
}

static size_t output_floats(const struct scl_model *m) {
    const Tensor *t = &m->tensors[m->output];
    return (size_t)t->channels * (size_t)t->height * (size_t)t->width;
}

/* Of `left` images, how many are next interleaved: 1, or a multiple of LINE. */
static size_t next_block(const struct scl_model *m, size_t left) {
    if (m->images == 1 || left < m->pays) return 1;
    size_t images = m->images;
    while (images > LINE && images / 2 >= left) images /= 2;
    return images;
}

/* Images that are interleaved, and how many of a batch those are. */
typedef struct {
    size_t at, count, together;
} Block;

/* Where block number `number` of a batch is; with count 0, how many blocks there are is in `at`. */
static Block block_of(const struct scl_model *m, size_t batch, size_t number) {
    size_t whole = batch >= m->pays || m->images == 1 ? batch / m->images : 0;
    if (number < whole) return (Block){number * m->images, m->images, m->images};
    for (size_t at = whole * m->images, block = whole;; block++) {
        size_t left = batch - at, together = next_block(m, left);
        size_t count = together < left ? together : left;
        if (!left) return (Block){block, 0, 0};
        if (block == number) return (Block){at, count, together};
        at += count;
    }
}

static void free_workspace(const struct scl_model *m, Workspace *w);
static Workspace *take_workspace(struct scl_model *m, size_t images, int threads);
static void give_back(struct scl_model *m, Workspace *w);

/* One block by one thread; false without memory. */
static bool run_alone(struct scl_model *m, const float *images, float *outputs, size_t batch, size_t number) {
    Block b = block_of(m, batch, number);
    Workspace *w = take_workspace(m, next_block(m, batch), 1);
    if (!w) return false;
    read_images(m, w, images + b.at * input_floats(m), b.count, b.together, 0, 1);
    for (int i = 0; i < m->step_count; i++) run_step(m, w, &m->steps[i], b.together, w->rows[0], 0, 1);
    write_outputs(m, w, outputs + b.at * output_floats(m), b.count, b.together);
    give_back(m, w);
    return true;
}

static void run_chunk(Team *t, uint64_t stage, int chunk, int thread) {
    struct scl_model *m = t->model;
    Workspace *w = t->workspace;
    if (!w) {
        if (!run_alone(m, t->images, t->outputs, t->batch, (size_t)chunk)) atomic_store(&t->failed, true);
        return;
    }
    uint64_t of_block = (uint64_t)m->step_count + 2, part = stage % of_block;
    Block b = block_of(m, t->batch, stage / of_block);
    if (part == 0)
        read_images(m, w, t->images + b.at * input_floats(m), b.count, b.together, chunk, t->threads);
    else if (part == of_block - 1)
        write_outputs(m, w, t->outputs + b.at * output_floats(m), b.count, b.together);
    else
        run_step(m, w, &m->steps[part - 1], b.together, w->rows[thread], chunk, t->threads);
}

static void begin_stage(Team *t, uint64_t round, uint64_t stage) {
    uint64_t chunks = 0;
    if (stage == t->stages) stage = NO_STAGE;
    else if (!t->workspace) chunks = block_of(t->model, t->batch, SIZE_MAX).at;
    else chunks = (stage + 1) % ((uint64_t)t->model->step_count + 2) ? (uint64_t)t->threads : 1;
    atomic_store_explicit(&t->pending, (size_t)chunks, memory_order_relaxed);
    uint64_t number = (round & ROUNDS) << (CHUNK_BITS + STAGE_BITS);
    atomic_store_explicit(&t->ticket, number | stage << CHUNK_BITS | chunks, memory_order_release);
}

/* Takes chunks of this round until all its stages are done. */
static void work(Team *t, uint64_t round, int thread) {
    for (int spins = 0;;) {
        uint64_t ticket = atomic_load_explicit(&t->ticket, memory_order_acquire);
        uint64_t stage = ticket >> CHUNK_BITS & NO_STAGE, left = ticket & (MOST_CHUNKS - 1);
        if (ticket >> (CHUNK_BITS + STAGE_BITS) != (round & ROUNDS) || stage == NO_STAGE) return;
        if (!left) {
            if (spins <= SPINS) spins++;
            relax(spins);
            continue;
        }
        if (!atomic_compare_exchange_weak(&t->ticket, &ticket, ticket - 1)) continue;
        spins = 0;
        run_chunk(t, stage, (int)left - 1, thread);
        if (atomic_fetch_sub(&t->pending, 1) == 1) begin_stage(t, round, stage + 1);
    }
}

static void *help(void *argument) {
    Helper helper = *(Helper *)argument;
    free(argument);
    Team *team = helper.team;
    for (uint64_t seen = 0;;) {
        pthread_mutex_lock(&team->lock);
        while (team->round == seen && !team->end) pthread_cond_wait(&team->changed, &team->lock);
        seen = team->round;
        bool end = team->end;
        pthread_mutex_unlock(&team->lock);
        if (end) return NULL;
        work(team, seen, helper.number);
    }
}

static void end_team(Team *team) {
    if (!team) return;
    if (team->process == getpid()) {
        pthread_mutex_lock(&team->lock);
        team->end = true;
        pthread_cond_broadcast(&team->changed);
        pthread_mutex_unlock(&team->lock);
        for (int i = 0; i < team->started; i++) pthread_join(team->helpers[i], NULL);
        pthread_mutex_destroy(&team->lock);
        pthread_cond_destroy(&team->changed);
    }
    free(team->helpers);
    free(team);
}

static Team *begin_team(int threads) {
    Team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->threads = threads;
    team->process = getpid();
    team->helpers = calloc((size_t)threads, sizeof *team->helpers);
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->changed, NULL);
    for (int number = 1; team->helpers && number < threads; number++) {
        Helper *helper = malloc(sizeof *helper);
        if (!helper) break;
        *helper = (Helper){team, number};
        if (pthread_create(&team->helpers[number - 1], NULL, help, helper)) {
            free(helper);
            break;
        }
        team->started++;
    }
    if (team->started + 1 == threads) return team;
    end_team(team);
    return NULL;
}

static void *aligned_zeros(size_t floats) {
    size_t bytes = round_up((floats ? floats : 1) * sizeof(float), LINE * sizeof(float));
    void *memory = aligned_alloc(LINE * sizeof(float), bytes);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

static void free_workspace(const struct scl_model *m, Workspace *w) {
    if (!w) return;
    end_team(w->team);
    for (int i = 0; w->apart && i < m->tensor_count; i++) free(w->apart[i]);
    for (int i = 0; w->rows && i < w->threads; i++) free(w->rows[i]);
    free(w->apart);
    free(w->rows);
    free(w->memory);
    free(w);
}

static bool fill_workspace(const struct scl_model *m, Workspace *w) {
    w->rows = calloc((size_t)w->threads, sizeof *w->rows);
    if (!w->rows) return false;
    for (int i = 0; i < w->threads; i++)
        if (!(w->rows[i] = aligned_zeros(m->widest))) return false;
#ifdef SCL_CHECK
    w->apart = calloc((size_t)m->tensor_count, sizeof *w->apart);
    if (!w->apart) return false;
    for (int i = 0; i < m->tensor_count; i++)
        if (!(w->apart[i] = aligned_zeros(m->tensors[i].floats * w->images))) return false;
#else
    if (!(w->memory = aligned_zeros(m->floats * w->images))) return false;
#endif
    return w->threads == 1 || (w->team = begin_team(w->threads));
}

/* An idle workspace for so many interleaved images and threads, or a new one; NULL without memory. */
static Workspace *take_workspace(struct scl_model *m, size_t images, int threads) {
    pthread_mutex_lock(&m->lock);
    Workspace **at = &m->idle;
    while (*at && ((*at)->images < images || (*at)->threads != threads ||
                   ((*at)->team && (*at)->team->process != getpid())))
        at = &(*at)->next;
    Workspace *w = *at;
    if (w) *at = w->next;
    pthread_mutex_unlock(&m->lock);
    if (w) return w;
    w = calloc(1, sizeof *w);
    if (!w) return NULL;
    w->images = images;
    w->threads = threads;
    if (fill_workspace(m, w)) return w;
    free_workspace(m, w);
    return NULL;
}

static void give_back(struct scl_model *m, Workspace *w) {
    pthread_mutex_lock(&m->lock);
    w->next = m->idle;
    m->idle = w;
    pthread_mutex_unlock(&m->lock);
}

/* By a team, which is the workspace's. */
static bool run_team(struct scl_model *m, Workspace *w, const float *images, size_t batch, float *outputs) {
    Team *t = w->team;
    size_t blocks = block_of(m, batch, SIZE_MAX).at;
    uint64_t stages = (uint64_t)blocks * ((uint64_t)m->step_count + 2);
    /* Whole blocks need no meeting; but the last ones would leave threads idle. */
    size_t threads = (size_t)t->threads;
    bool together = blocks < 4 * threads && blocks % threads && stages < NO_STAGE;
    t->model = m;
    t->images = images;
    t->outputs = outputs;
    t->batch = batch;
    t->workspace = together ? w : NULL;
    t->stages = together ? stages : 1;
    atomic_store(&t->failed, false);
    pthread_mutex_lock(&t->lock);
    uint64_t round = ++t->round;
    begin_stage(t, round, 0);
    pthread_cond_broadcast(&t->changed);
    pthread_mutex_unlock(&t->lock);
    work(t, round, 0);
    return !atomic_load(&t->failed);
}

int scl_run(scl_model *m, const float *images, size_t batch, float *outputs, int threads) {
    if (!batch) return 0;
    if (threads <= 1) {
        size_t blocks = block_of(m, batch, SIZE_MAX).at;
        for (size_t number = 0; number < blocks; number++)
            if (!run_alone(m, images, outputs, batch, number)) return -1;
        return 0;
    }
    Workspace *w = take_workspace(m, next_block(m, batch), threads);
    if (!w) return -1;
    bool sound = true;
    /* As many at a time as there can be chunks. */
    size_t most = (size_t)(MOST_CHUNKS - 1) / LINE * LINE;
    for (size_t at = 0; at < batch && sound; at += most)
        sound = run_team(m, w, images + at * input_floats(m), batch - at < most ? batch - at : most,
                         outputs + at * output_floats(m));
    give_back(m, w);
    return sound ? 0 : -1;
}

int scl_profile(scl_model *m, const float *images, size_t batch, float *outputs, double *nanoseconds,
                int steps) {
    size_t together = next_block(m, batch), count = together < batch ? together : batch;
    Workspace *w = take_workspace(m, together, 1);
    if (!w) return -1;
    read_images(m, w, images, count, together, 0, 1);
    for (int i = 0; i < m->step_count; i++) {
        struct timespec began, ended;
        clock_gettime(CLOCK_MONOTONIC, &began);
        run_step(m, w, &m->steps[i], together, w->rows[0], 0, 1);
        clock_gettime(CLOCK_MONOTONIC, &ended);
        if (i < steps)
            nanoseconds[i] = 1e9 * (double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec);
    }
    write_outputs(m, w, outputs, count, together);
    give_back(m, w);
    return m->step_count;
}

static void shape_of(const Tensor *t, int shape[3]) {
    shape[0] = t->channels;
    shape[1] = t->height;
    shape[2] = t->width;
}

void scl_input_shape(const scl_model *m, int shape[3]) { shape_of(&m->tensors[m->input], shape); }

void scl_output_shape(const scl_model *m, int shape[3]) { shape_of(&m->tensors[m->output], shape); }

const char *scl_kernels(const scl_model *m) { return m->kernels->name; }

const char *scl_describe(const scl_model *m) { return m->description; }

void scl_free(scl_model *m) {
    if (!m) return;
    while (m->idle) {
        Workspace *w = m->idle;
        m->idle = w->next;
        free_workspace(m, w);
    }
    for (int i = 0; m->steps && i < m->step_count; i++) {
        Step *s = &m->steps[i];
        free(s->bias), free(s->entries), free(s->first), free(s->blocks);
        free(s->offsets), free(s->weights), free(s->rows), free(s->phase);
    }
    free(m->steps);
    free(m->tensors);
    free(m->description);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

scl_model *scl_load_memory(const void *data, size_t bytes, char *error, size_t size) {
    Failure failure = {error, size};
    scl_model *m = calloc(1, sizeof *m);
    if (!m) {
        fail(&failure, "there is not enough memory");
        return NULL;
    }
    pthread_mutex_init(&m->lock, NULL);
    if (read_file(m, data, bytes, &failure) && (m->kernels = choose_kernels(&failure)) && prepare(m, &failure))
        return m;
    scl_free(m);
    return NULL;
}

scl_model *scl_load(const char *path, char *error, size_t size) {
    Failure failure = {error, size};
    FILE *file = fopen(path, "rb");
    uint8_t *data = NULL;
    size_t bytes = 0, room = 1 << 16;
    bool sound = file, more = file;
    while (more) {
        uint8_t *larger = realloc(data, room);
        if (!(sound = larger)) break;
        data = larger;
        size_t got = fread(data + bytes, 1, room - bytes, file);
        bytes += got;
        more = got;
        if (bytes == room) room *= 2;
    }
    sound = sound && !ferror(file);
    if (file) fclose(file);
    scl_model *m = NULL;
    if (sound) m = scl_load_memory(data, bytes, error, size);
    else fail(&failure, "%.200s cannot be read", path);
    free(data);
    return m;
}
