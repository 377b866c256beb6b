/* The kernels for each set of instructions, and which of them this processor runs. */
#include "internal.h"

#define SCL_STRING_(x) #x
#define SCL_STRING(x) SCL_STRING_(x)

#define SCL_LANES 4
#define SCL_SUFFIX baseline
#define SCL_TARGET
#if defined(__aarch64__)
#define SCL_DENSE 6 /* NEON has 32 registers */
#else
#define SCL_DENSE 3
#endif
#include "kernels.inc"

#if defined(__x86_64__)
#define SCL_LANES 8
#define SCL_SUFFIX avx2
#define SCL_TARGET __attribute__((target("avx2,fma")))
#define SCL_DENSE 3
#include "kernels.inc"

#define SCL_LANES 16
#define SCL_SUFFIX avx512
#define SCL_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define SCL_DENSE 6
#include "kernels.inc"
#endif

static bool runs_here(const Kernels *kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (kernels == &kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (kernels == &kernels_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return kernels == &kernels_baseline;
}

/* The widest that the processor has, or those that SCL_KERNELS names. */
static const Kernels *choose_kernels(Failure *failure) {
    const Kernels *all[] = {
#if defined(__x86_64__)
        &kernels_avx512, &kernels_avx2,
#endif
        &kernels_baseline,
    };
    const char *named = getenv("SCL_KERNELS");
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (runs_here(all[i]) && (!named || !*named || !strcmp(named, all[i]->name))) return all[i];
    fail(failure, "SCL_KERNELS=%.40s: this processor or this build has no such kernels", named);
    return NULL;
}
