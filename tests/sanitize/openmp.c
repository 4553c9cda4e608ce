// Tells ThreadSanitizer which memory OpenMP hands over at the begin and the end of a parallel region.
//
// libgomp is not instrumented: it wakes threads and waits for them by futexes that ThreadSanitizer does not see, and
// every value that the caller wrote before a region, or a thread inside of it, would look like a race. This library is
// loaded before torch and stands in front of GOMP_parallel, through which ATen's parallel_for starts its regions. It
// says what a region orders, and nothing more: all that the caller did happens before all that the region does, and that
// happens before all that the caller does next. Two threads of one region are not ordered.
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
  char begin, end;  // their addresses name what is handed over
};

static void run_body(void* argument) {
  struct Region* region = argument;
  __tsan_acquire(&region->begin);
  region->body(region->data);
  __tsan_release(&region->end);
}

// torch loads its libgomp for itself alone: RTLD_NEXT does not see it.
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
    fputs("tests/sanitize/openmp.c: no libgomp is loaded whose GOMP_parallel could be called\n", stderr);
    abort();
  }
  struct Region region = {body, data, 0, 0};
  __tsan_release(&region.begin);
  parallel(run_body, &region, num_threads, flags);
  __tsan_acquire(&region.end);
}
