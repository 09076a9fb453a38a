// Preloaded into a process, fails chosen file-system calls below one folder.
//
// shim_arm(folder, first, count, error, log) starts counting the calls whose path lies in `folder`, from 0, and fails
// the calls `first` to `first + count - 1` with errno `error`. If `log` is a descriptor (not -1), it receives one line per
// call: number, name and path. shim_count() returns the number of calls so far.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t folder_length;
static atomic_long calls;
static long first_failure = -1, num_failures;
static int failure, log_descriptor = -1;

void shim_arm(const char* below, long first, long count, int error, int log) {
  strncpy(folder, below, sizeof folder - 1);
  folder_length = strlen(folder);
  atomic_store(&calls, 0);
  first_failure = first;
  num_failures = count;
  failure = error;
  log_descriptor = log;
}

long shim_count(void) { return atomic_load(&calls); }

// Returns 1, with errno set, if this call must fail. Raw system calls, because the functions of libc are replaced below.
static int must_fail(const char* name, const char* path) {
  if (!folder_length || !path || strncmp(path, folder, folder_length)) return 0;
  long number = atomic_fetch_add(&calls, 1);
  if (log_descriptor >= 0) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, name, path);
    if (length > 0) syscall(SYS_write, log_descriptor, line, (size_t)length);
  }
  if (first_failure < 0 || number < first_failure || number >= first_failure + num_failures) return 0;
  errno = failure;
  return 1;
}

static const char* path_at(int directory, const char* path, char* joined) {
  if (!path) return NULL;
  if (path[0] == '/') return path;
  char link[64];
  if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  ssize_t length = syscall(SYS_readlink, link, joined, (size_t)(PATH_MAX - 1));
  if (length < 0) return NULL;
  snprintf(joined + length, PATH_MAX - (size_t)length, path[0] ? "/%s" : "%s", path);
  return joined;
}

static int fails(const char* name, int directory, const char* path) {
  if (!folder_length) return 0;
  char joined[2 * PATH_MAX];
  return must_fail(name, path_at(directory, path, joined));
}

static int descriptor_fails(const char* name, int descriptor) { return folder_length ? fails(name, descriptor, "") : 0; }

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);

#define OPEN(name) \
  int name(const char* path, int flags, ...) { \
    REAL(int, name, const char*, int, ...) \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    return fails(flags & O_CREAT ? "create" : "open", AT_FDCWD, path) ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int directory, const char* path, int flags, ...) { \
    REAL(int, name, int, const char*, int, ...) \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    return fails(flags & O_CREAT ? "create" : "open", directory, path) ? -1 : real(directory, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
  FILE* name(const char* path, const char* mode) { \
    REAL(FILE*, name, const char*, const char*) \
    return fails(mode[0] == 'r' ? "open" : "create", AT_FDCWD, path) ? NULL : real(path, mode); \
  }
FOPEN(fopen)
FOPEN(fopen64)

#define ON_DESCRIPTOR(type, call, name, arguments, values) \
  type name arguments { \
    REAL(type, name, PARAMETERS arguments) \
    return descriptor_fails(call, descriptor) ? -1 : real values; \
  }
#define PARAMETERS(...) __VA_ARGS__
ON_DESCRIPTOR(ssize_t, "read", read, (int descriptor, void* to, size_t length), (descriptor, to, length))
ON_DESCRIPTOR(ssize_t, "read", pread, (int descriptor, void* to, size_t length, off_t at), (descriptor, to, length, at))
ON_DESCRIPTOR(ssize_t, "read", pread64, (int descriptor, void* to, size_t length, off64_t at), (descriptor, to, length, at))
ON_DESCRIPTOR(ssize_t, "read", readv, (int descriptor, const struct iovec* to, int n), (descriptor, to, n))
ON_DESCRIPTOR(ssize_t, "write", write, (int descriptor, const void* from, size_t length), (descriptor, from, length))
ON_DESCRIPTOR(ssize_t, "write", writev, (int descriptor, const struct iovec* from, int n), (descriptor, from, n))
ON_DESCRIPTOR(ssize_t, "write", pwrite, (int descriptor, const void* from, size_t length, off_t at), (descriptor, from, length, at))
ON_DESCRIPTOR(ssize_t, "write", pwrite64, (int descriptor, const void* from, size_t length, off64_t at), (descriptor, from, length, at))
ON_DESCRIPTOR(int, "fsync", fsync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, "fsync", fdatasync, (int descriptor), (descriptor))
ON_DESCRIPTOR(int, "truncate", ftruncate, (int descriptor, off_t length), (descriptor, length))
ON_DESCRIPTOR(int, "truncate", ftruncate64, (int descriptor, off64_t length), (descriptor, length))
ON_DESCRIPTOR(int, "flock", flock, (int descriptor, int operation), (descriptor, operation))
ON_DESCRIPTOR(int, "stat", fstat, (int descriptor, struct stat* to), (descriptor, to))
ON_DESCRIPTOR(int, "stat", fstat64, (int descriptor, struct stat64* to), (descriptor, to))
ON_DESCRIPTOR(int, "statvfs", fstatvfs, (int descriptor, struct statvfs* to), (descriptor, to))

#define ON_PATH(type, failed, call, name, arguments, values) \
  type name arguments { \
    REAL(type, name, PARAMETERS arguments) \
    return fails(call, AT_FDCWD, path) ? failed : real values; \
  }
ON_PATH(int, -1, "stat", stat, (const char* path, struct stat* to), (path, to))
ON_PATH(int, -1, "stat", stat64, (const char* path, struct stat64* to), (path, to))
ON_PATH(int, -1, "stat", lstat, (const char* path, struct stat* to), (path, to))
ON_PATH(int, -1, "stat", lstat64, (const char* path, struct stat64* to), (path, to))
ON_PATH(int, -1, "stat", access, (const char* path, int mode), (path, mode))
ON_PATH(int, -1, "statvfs", statvfs, (const char* path, struct statvfs* to), (path, to))
ON_PATH(int, -1, "statvfs", statvfs64, (const char* path, struct statvfs64* to), (path, to))
ON_PATH(int, -1, "mkdir", mkdir, (const char* path, mode_t mode), (path, mode))
ON_PATH(int, -1, "remove", rmdir, (const char* path), (path))
ON_PATH(int, -1, "remove", unlink, (const char* path), (path))
ON_PATH(int, -1, "truncate", truncate, (const char* path, off_t length), (path, length))
ON_PATH(int, -1, "chmod", chmod, (const char* path, mode_t mode), (path, mode))
ON_PATH(ssize_t, -1, "stat", readlink, (const char* path, char* to, size_t length), (path, to, length))
ON_PATH(DIR*, NULL, "list", opendir, (const char* path), (path))

#define AT(type, call, name, arguments, values) \
  type name arguments { \
    REAL(type, name, PARAMETERS arguments) \
    return fails(call, directory, path) ? -1 : real values; \
  }
AT(int, "stat", fstatat, (int directory, const char* path, struct stat* to, int flags), (directory, path, to, flags))
AT(int, "stat", fstatat64, (int directory, const char* path, struct stat64* to, int flags), (directory, path, to, flags))
AT(int, "stat", statx, (int directory, const char* path, int flags, unsigned mask, struct statx* to), (directory, path, flags, mask, to))
AT(int, "remove", unlinkat, (int directory, const char* path, int flags), (directory, path, flags))
AT(int, "mkdir", mkdirat, (int directory, const char* path, mode_t mode), (directory, path, mode))

int symlink(const char* target, const char* path) {
  REAL(int, symlink, const char*, const char*)
  return fails("link", AT_FDCWD, path) ? -1 : real(target, path);
}
int link(const char* from, const char* path) {
  REAL(int, link, const char*, const char*)
  return fails("link", AT_FDCWD, path) ? -1 : real(from, path);
}
int rename(const char* from, const char* to) {
  REAL(int, rename, const char*, const char*)
  return fails("rename", AT_FDCWD, to) ? -1 : real(from, to);
}
int renameat(int from_directory, const char* from, int directory, const char* to) {
  REAL(int, renameat, int, const char*, int, const char*)
  return fails("rename", directory, to) ? -1 : real(from_directory, from, directory, to);
}
