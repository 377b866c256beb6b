/* The runtime of a sparse network: scl.h says how to call it, the Makefile how to compile it. */
#include "internal.h"

#include "load.c"
#include "kernels.c"
#include "prepare.c"
#include "run.c"
#include "threads.c"
