// Intercepts the calls that change files (LD_PRELOAD), from Python, Rust or C++.
//
// Only files below the watched directory count. faults_arm() says which call fails, and how; the others pass.
// All threads share one counter. Calls inside libc (the writes of fclose) are not seen.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kCount, kKill, kFail };
// A full disk refuses calls that take space but lets files be removed; a read-only one refuses everything.
enum { kTakesSpace = 1, kOther = 2 };

static char watched[PATH_MAX];
static int mode = kCount, kinds = kTakesSpace | kOther, error_number;
static long at;
static atomic_long count;
static char last[64];

void faults_arm(const char* directory, int new_mode, long new_at, int new_kinds, int new_errno) {
  snprintf(watched, sizeof watched, "%s/", directory);
  mode = new_mode, at = new_at, kinds = new_kinds, error_number = new_errno;
  atomic_store(&count, 0);
}

long faults_count(void) { return atomic_load(&count); }
const char* faults_last(void) { return last; }  // the last counted call

static int is_watched_path(int directory, const char* path) {
  char whole[2 * PATH_MAX] = "";
  if (watched[0] == 0 || path == NULL) return 0;
  if (path[0] != '/') {
    if (directory == AT_FDCWD) {
      if (getcwd(whole, PATH_MAX) == NULL) return 0;
    } else {
      char link[64];
      snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
      const ssize_t length = readlink(link, whole, PATH_MAX - 1);
      if (length < 0) return 0;
      whole[length] = 0;
    }
    strcat(whole, "/");
  }
  strncat(whole, path, PATH_MAX - 1);
  strcat(whole, "/");  // the watched directory itself, too
  return strncmp(whole, watched, strlen(watched)) == 0;
}

static int is_watched_file(int fd) { return is_watched_path(fd, "."); }

// Whether the call may continue; otherwise sets errno.
static int passes(int kind, const char* name) {
  if ((kinds & kind) == 0) return 1;
  const long number = atomic_fetch_add(&count, 1) + 1;
  snprintf(last, sizeof last, "%s", name);
  if (mode == kKill && number == at) kill(getpid(), SIGKILL);
  if (mode != kFail || number < at) return 1;  // a full disk stays full
  errno = error_number;
  return 0;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define FILE_CALL(result, name, kind, fd, parameters, arguments) \
  result name parameters {                                       \
    static __typeof__(&name) next;                               \
    if (next == NULL) next = NEXT(name);                         \
    if (is_watched_file(fd) && !passes(kind, #name)) return -1;  \
    return next arguments;                                       \
  }

#define PATH_CALL(result, name, kind, directory, path, parameters, arguments) \
  result name parameters {                                                    \
    static __typeof__(&name) next;                                            \
    if (next == NULL) next = NEXT(name);                                      \
    if (is_watched_path(directory, path) && !passes(kind, #name)) return -1;  \
    return next arguments;                                                    \
  }

FILE_CALL(ssize_t, write, kTakesSpace, fd, (int fd, const void* data, size_t size), (fd, data, size))
FILE_CALL(ssize_t, pwrite, kTakesSpace, fd, (int fd, const void* data, size_t size, off_t to), (fd, data, size, to))
FILE_CALL(ssize_t, pwrite64, kTakesSpace, fd, (int fd, const void* data, size_t size, off64_t to), (fd, data, size, to))
FILE_CALL(ssize_t, writev, kTakesSpace, fd, (int fd, const struct iovec* parts, int n), (fd, parts, n))
FILE_CALL(ssize_t, pwritev, kTakesSpace, fd, (int fd, const struct iovec* parts, int n, off_t to), (fd, parts, n, to))
FILE_CALL(int, ftruncate, kTakesSpace, fd, (int fd, off_t size), (fd, size))
FILE_CALL(int, ftruncate64, kTakesSpace, fd, (int fd, off64_t size), (fd, size))
FILE_CALL(int, fsync, kTakesSpace, fd, (int fd), (fd))
FILE_CALL(int, fdatasync, kTakesSpace, fd, (int fd), (fd))
FILE_CALL(int, fchmod, kOther, fd, (int fd, mode_t rights), (fd, rights))
FILE_CALL(ssize_t, sendfile, kTakesSpace, out, (int out, int in, off_t* from, size_t size), (out, in, from, size))
FILE_CALL(ssize_t, sendfile64, kTakesSpace, out, (int out, int in, off64_t* from, size_t size), (out, in, from, size))
FILE_CALL(ssize_t, copy_file_range, kTakesSpace, out,
          (int in, off64_t* from, int out, off64_t* to, size_t size, unsigned flags), (in, from, out, to, size, flags))

PATH_CALL(int, mkdir, kTakesSpace, AT_FDCWD, path, (const char* path, mode_t rights), (path, rights))
PATH_CALL(int, mkdirat, kTakesSpace, fd, path, (int fd, const char* path, mode_t rights), (fd, path, rights))
PATH_CALL(int, link, kTakesSpace, AT_FDCWD, to, (const char* from, const char* to), (from, to))
PATH_CALL(int, linkat, kTakesSpace, fd, to, (int from_fd, const char* from, int fd, const char* to, int flags),
          (from_fd, from, fd, to, flags))
PATH_CALL(int, symlink, kTakesSpace, AT_FDCWD, to, (const char* from, const char* to), (from, to))
PATH_CALL(int, symlinkat, kTakesSpace, fd, to, (const char* from, int fd, const char* to), (from, fd, to))
PATH_CALL(int, rename, kOther, AT_FDCWD, to, (const char* from, const char* to), (from, to))
PATH_CALL(int, renameat, kOther, fd, to, (int from_fd, const char* from, int fd, const char* to),
          (from_fd, from, fd, to))
PATH_CALL(int, renameat2, kOther, fd, to, (int from_fd, const char* from, int fd, const char* to, unsigned flags),
          (from_fd, from, fd, to, flags))
PATH_CALL(int, rmdir, kOther, AT_FDCWD, path, (const char* path), (path))
PATH_CALL(int, unlink, kOther, AT_FDCWD, path, (const char* path), (path))
PATH_CALL(int, unlinkat, kOther, fd, path, (int fd, const char* path, int flags), (fd, path, flags))
PATH_CALL(int, chmod, kOther, AT_FDCWD, path, (const char* path, mode_t rights), (path, rights))
PATH_CALL(int, fchmodat, kOther, fd, path, (int fd, const char* path, mode_t rights, int flags),
          (fd, path, rights, flags))
PATH_CALL(int, truncate, kTakesSpace, AT_FDCWD, path, (const char* path, off_t size), (path, size))
PATH_CALL(int, utimensat, kOther, fd, path, (int fd, const char* path, const struct timespec times[2], int flags),
          (fd, path, times, flags))

// Opening counts only if it creates or empties a file.
static int opening_passes(int directory, const char* path, int flags, const char* name) {
  if ((flags & (O_CREAT | O_TRUNC)) == 0 && (flags & O_TMPFILE) != O_TMPFILE) return 1;
  return !is_watched_path(directory, path) || passes(kTakesSpace, name);
}

static mode_t rights_of(int flags, va_list arguments) {
  return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(arguments, mode_t) : 0;
}

#define OPEN(name)                                                \
  int name(const char* path, int flags, ...) {                    \
    va_list arguments;                                            \
    va_start(arguments, flags);                                   \
    const mode_t rights = rights_of(flags, arguments);            \
    va_end(arguments);                                            \
    if (!opening_passes(AT_FDCWD, path, flags, #name)) return -1; \
    return NEXT(name)(path, flags, rights);                       \
  }
#define OPEN_AT(name)                                             \
  int name(int directory, const char* path, int flags, ...) {     \
    va_list arguments;                                            \
    va_start(arguments, flags);                                   \
    const mode_t rights = rights_of(flags, arguments);            \
    va_end(arguments);                                            \
    if (!opening_passes(directory, path, flags, #name)) return -1; \
    return NEXT(name)(directory, path, flags, rights);            \
  }
#define FOPEN(name)                                                                              \
  FILE* name(const char* path, const char* how) {                                                \
    const int flags = how[0] == 'r' ? 0 : O_CREAT;                                               \
    if (!opening_passes(AT_FDCWD, path, flags, #name)) return NULL;                              \
    return NEXT(name)(path, how);                                                                \
  }
OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)
FOPEN(fopen)
FOPEN(fopen64)
