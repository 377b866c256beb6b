/* Threads and memory of the calls that are under way, and the functions of scl.h. */
#include "internal.h"
#include "scl.h"

#include <sched.h>
#include <time.h>
#include <unistd.h>

#define SPINS 4000 /* before a waiting thread lets others run */

typedef struct {
    struct scl_model *model;
    const float *images;
    float *outputs;
    size_t batch;
    Workspace *workspace; /* of all threads together, or NULL: each takes one of its own */
    atomic_size_t next;   /* image that no thread has begun */
    atomic_bool failed;
} Call;

/* Threads that help one call at a time. */
typedef struct Team {
    int threads; /* the caller's own included */
    int started;
    pthread_t *helpers;
    pid_t process; /* a fork has none of the threads */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned round;
    bool end;
    Call *call;
    atomic_uint arrived, passed;
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

/* Returns when all threads of the team are here. */
static void meet(Team *team) {
    if (!team || team->threads == 1) return;
    unsigned passed = atomic_load_explicit(&team->passed, memory_order_acquire);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == (unsigned)team->threads) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->passed, passed + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->passed, memory_order_acquire) == passed;) {
        if (spins <= SPINS) spins++;
        relax(spins);
    }
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

static void run_block(const struct scl_model *m, const Workspace *w, const float *images,
                      float *outputs, size_t count, size_t together, Team *team, int thread) {
    int threads = team ? team->threads : 1;
    read_images(m, w, images, count, together, thread, threads);
    meet(team);
    for (int i = 0; i < m->step_count; i++) {
        run_step(m, w, &m->steps[i], together, thread, threads);
        meet(team);
    }
    if (thread == 0) write_outputs(m, w, outputs, count, together);
    meet(team);
}

static void free_workspace(const struct scl_model *m, Workspace *w);
static Workspace *take_workspace(struct scl_model *m, size_t images, int threads);
static void give_back(struct scl_model *m, Workspace *w);

/* Blocks one after the other, all threads at each. */
static void work_together(Call *call, Team *team, int thread) {
    struct scl_model *m = call->model;
    for (size_t at = 0; at < call->batch;) {
        size_t left = call->batch - at, together = next_block(m, left);
        size_t count = together < left ? together : left;
        run_block(m, call->workspace, call->images + at * input_floats(m),
                  call->outputs + at * output_floats(m), count, together, team, thread);
        at += count;
    }
}

/* Blocks as they come, each by one thread. */
static void work_apart(Call *call) {
    struct scl_model *m = call->model;
    Workspace *w = take_workspace(m, next_block(m, call->batch), 1);
    if (!w) {
        atomic_store(&call->failed, true);
        return;
    }
    for (;;) {
        size_t at = atomic_load(&call->next), count, together;
        do {
            if (at >= call->batch) {
                give_back(m, w);
                return;
            }
            size_t left = call->batch - at;
            together = next_block(m, left);
            count = together < left ? together : left;
        } while (!atomic_compare_exchange_weak(&call->next, &at, at + count));
        run_block(m, w, call->images + at * input_floats(m), call->outputs + at * output_floats(m), count,
                  together, NULL, 0);
    }
}

static void work(Call *call, Team *team, int thread) {
    if (call->workspace) work_together(call, team, thread);
    else work_apart(call);
}

static void *help(void *argument) {
    Helper helper = *(Helper *)argument;
    free(argument);
    Team *team = helper.team;
    for (unsigned seen = 0;;) {
        pthread_mutex_lock(&team->lock);
        while (team->round == seen && !team->end) pthread_cond_wait(&team->changed, &team->lock);
        seen = team->round;
        Call *call = team->call;
        bool end = team->end;
        pthread_mutex_unlock(&team->lock);
        if (end) return NULL;
        work(call, team, helper.number);
        meet(team);
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

int scl_run(scl_model *m, const float *images, size_t batch, float *outputs, int threads) {
    if (!batch) return 0;
    size_t together = next_block(m, batch);
    Call call = {.model = m, .images = images, .outputs = outputs, .batch = batch};
    if (threads <= 1) {
        work_apart(&call);
        return atomic_load(&call.failed) ? -1 : 0;
    }
    size_t blocks = (batch + together - 1) / together;
    Workspace *w = take_workspace(m, together, threads);
    if (!w) return -1;
    /* Whole blocks need no meeting; but the last ones would leave threads idle. */
    if (blocks < 4 * (size_t)threads && blocks % (size_t)threads) call.workspace = w;
    Team *team = w->team;
    pthread_mutex_lock(&team->lock);
    team->call = &call;
    team->round++;
    pthread_cond_broadcast(&team->changed);
    pthread_mutex_unlock(&team->lock);
    work(&call, team, 0);
    meet(team);
    give_back(m, w);
    return atomic_load(&call.failed) ? -1 : 0;
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
        run_step(m, w, &m->steps[i], together, 0, 1);
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
