// Tells ThreadSanitizer how OpenMP orders memory accesses at the start and the end of a parallel region.
//
// libgomp is not instrumented: it wakes threads and waits for them by futexes that ThreadSanitizer does not see, so
// every value that the caller wrote before a region, or a thread wrote inside it, would look like a race. This library
// is loaded before torch and intercepts GOMP_parallel, which ATen's parallel_for calls. It declares only the order of a
// region: the caller's earlier accesses happen before those of the region, which happen before the caller's later ones.
// Two threads of one region are not ordered.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <sanitizer/tsan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Body)(void*);
typedef void (*Parallel)(Body, void*, unsigned, unsigned);

struct Region {
  Body body;
  void* data;
  char begin, end;  // their addresses identify the two synchronisation points
};

static void run_body(void* argument) {
  struct Region* region = argument;
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

// torch loads its libgomp privately: RTLD_NEXT does not see it.
static int find_parallel(struct dl_phdr_info* info, size_t size, void* found) {
  (void)size;
  if (strstr(info->dlpi_name, "libgomp") == NULL) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  *(void**)found = library == NULL ? NULL : dlsym(library, "GOMP_parallel");
  return *(void**)found != NULL;
}

void GOMP_parallel(Body body, void* data, unsigned num_threads, unsigned flags) {
  static Parallel parallel;
  if (parallel == NULL) dl_iterate_phdr(find_parallel, &parallel);
  if (parallel == NULL) {
    fputs("tests/sanitize/openmp.c: no loaded libgomp has GOMP_parallel\n", stderr);
    abort();
  }
  struct Region region = {body, data, 0, 0};
  __tsan_release(&region.begin);
  parallel(run_body, &region, num_threads, flags);
  __tsan_acquire(&region.end);
}
