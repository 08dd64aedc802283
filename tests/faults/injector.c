/* A library for LD_PRELOAD that counts the calls of a process that change files below one folder, and makes one fail.

   A point is a call, the path below the folder, and the how many-th such call it is. Process ids, names of temporary
   files and times in a path become fixed words, so that a point has the same name in every run. `fault_arm` starts it.

   Calls inside the C library cannot be replaced. So the calls of stdio are points themselves: fwrite, fflush, fclose. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { RECORD, FULL, DENIED, TERM, KILL };
enum { HALF = -1 };              /* write the first half only */
enum { NAMESPACE = 1, SPACE = 2 }; /* needs permission of the folder; needs space on the disk */
#define MAX_POINTS 8192

static char watched[PATH_MAX], target_call[32], target_path[PATH_MAX], *points[MAX_POINTS];
static size_t watched_length;
static int armed, action, target_number, log_fd = -1, fired, counts[MAX_POINTS], num_points;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(const char *folder, const char *log, const char *call, const char *path, int number, int what) {
  snprintf(watched, sizeof watched, "%s/", folder);
  watched_length = strlen(watched);
  snprintf(target_call, sizeof target_call, "%s", call);
  snprintf(target_path, sizeof target_path, "%s", path);
  target_number = number;
  action = what;
  log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  armed = 1;
}

/* A name of Python's tempfile in a folder of ours, or of Rust's, which safetensors uses. */
static int is_random(const char *name, size_t length) {
  if (length == 10 && !strncmp(name, ".tmp", 4)) return 1;
  if (length != 9 || name[0] != '.') return 0;
  for (size_t i = 1; i < length; i++)
    if (!strchr("abcdefghijklmnopqrstuvwxyz0123456789_", name[i])) return 0;
  return 1;
}

/* Copy the path below the folder to `out`, with fixed words. */
static void name_of(const char *path, char *out) {
  char pid[16], *end = out;
  snprintf(pid, sizeof pid, ".%d.", (int)getpid());
  for (const char *part = path; *part;) {
    size_t length = strcspn(part, "/");
    if (is_random(part, length)) end = stpcpy(end, ".TMP");
    else if (!strncmp(part, "events.out.tfevents.", 20)) end = stpcpy(end, "tfevents");
    else {
      char name[NAME_MAX + 1];
      snprintf(name, sizeof name, "%.*s", (int)length, part);
      char *found = strstr(name, pid);
      if (found) {
        *found = 0;
        end = stpcpy(stpcpy(stpcpy(end, name), ".PID."), found + strlen(pid));
      } else end = stpcpy(end, name);
    }
    part += length;
    if (*part) *end++ = *part++;
  }
  *end = 0;
}

static int count_of(const char *point) {
  for (int i = 0; i < num_points; i++)
    if (!strcmp(points[i], point)) return ++counts[i];
  if (num_points < MAX_POINTS) points[num_points] = strdup(point), counts[num_points++] = 1;
  return 1;
}

/* Return 0 to make the call, an error number, or HALF. */
static int reach(const char *call, const char *path, int needs, size_t size) {
  char absolute[2 * PATH_MAX], name[PATH_MAX], point[PATH_MAX + 64];
  if (!armed || !path) return 0;
  if (path[0] != '/') {
    if (!getcwd(absolute, PATH_MAX)) return 0;
    snprintf(absolute + strlen(absolute), PATH_MAX, "/%s", path);
    path = absolute;
  }
  if (strncmp(path, watched, watched_length)) return 0;
  name_of(path + watched_length, name);
  snprintf(point, sizeof point, "%s %s", call, name);
  pthread_mutex_lock(&lock);
  int number = count_of(point), result = 0;
  dprintf(log_fd, "%s\t%s\t%d\t%d\n", call, name, number, needs);
  int hit = action != RECORD && number == target_number && !strcmp(call, target_call) && !strcmp(name, target_path);
  if (hit && action == TERM) kill(getpid(), SIGTERM);
  if (hit && action == KILL && size < 2) kill(getpid(), SIGKILL);
  if (hit && action == KILL) result = HALF;
  if (action == DENIED && (hit || fired) && needs & NAMESPACE) result = EACCES;
  if (action == FULL && ((hit && needs) || (fired && needs & SPACE))) result = hit && size > 1 ? HALF : ENOSPC;
  fired |= hit;
  pthread_mutex_unlock(&lock);
  return result;
}

static void die(void) {
  if (action == KILL) kill(getpid(), SIGKILL);
}

static const char *path_of(int fd, char *buffer) {
  char link[32];
  if (!armed || fd < 0) return NULL;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, buffer, PATH_MAX - 1);
  if (length <= 0 || buffer[0] != '/') return NULL;
  buffer[length] = 0;
  return buffer;
}

static const char *path_at(int folder, const char *path, char *buffer) {
  if (!armed || !path || path[0] == '/' || folder == AT_FDCWD) return path;
  if (!path_of(folder, buffer)) return NULL;
  size_t length = strlen(buffer);
  snprintf(buffer + length, PATH_MAX - length, "/%s", path);
  return buffer;
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }
#define FAIL(value) do { int fault_ = (value); if (fault_) { errno = fault_ < 0 ? ENOSPC : fault_; return -1; } } while (0)

static int opening(int folder, const char *path, int flags) {
  char buffer[PATH_MAX];
  if (!armed || !(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return 0;
  const char *whole = path_at(folder, path, buffer);
  struct stat state;
  int creates = whole && (flags & O_CREAT) && stat(whole, &state);
  if ((flags & O_TMPFILE) == O_TMPFILE) creates = 1;
  return reach("open", whole, NAMESPACE | (creates ? SPACE : 0), 0);
}

#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }
int open(const char *path, int flags, ...) { MODE(flags) FAIL(opening(AT_FDCWD, path, flags)); return REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) FAIL(opening(AT_FDCWD, path, flags)); return REAL(open64)(path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) FAIL(opening(folder, path, flags)); return REAL(openat)(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags) FAIL(opening(folder, path, flags)); return REAL(openat64)(folder, path, flags, mode); }
int creat(const char *path, mode_t mode) { FAIL(opening(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC)); return REAL(creat)(path, mode); }

#define OPEN_STREAM(name) FILE *name(const char *path, const char *mode) { \
  int code = strpbrk(mode, "wa+") ? opening(AT_FDCWD, path, O_WRONLY | O_CREAT) : 0; \
  if (code) { errno = code; return NULL; } return REAL(name)(path, mode); }
OPEN_STREAM(fopen)
OPEN_STREAM(fopen64)

/* Write `size` bytes with `CALL(size)`. At the point of a full disk or a kill, write half of them. */
#define WRITE(name, fd, size, CALL) do { char buffer_[PATH_MAX]; const char *path_ = path_of(fd, buffer_); \
  int code_ = path_ ? reach(name, path_, SPACE, size) : 0; \
  if (code_ == HALF) { ssize_t done_ = CALL((size) / 2); die(); return done_; } FAIL(code_); return CALL(size); } while (0)
ssize_t write(int fd, const void *data, size_t size) {
#define CALL(n) REAL(write)(fd, data, n)
  WRITE("write", fd, size, CALL);
#undef CALL
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
#define CALL(n) REAL(pwrite)(fd, data, n, offset)
  WRITE("write", fd, size, CALL);
#undef CALL
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
#define CALL(n) REAL(pwrite64)(fd, data, n, offset)
  WRITE("write", fd, size, CALL);
#undef CALL
}
static size_t total(const struct iovec *parts, int count) {
  size_t size = 0;
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  return size;
}
static ssize_t writev_up_to(int fd, const struct iovec *parts, int count, size_t size) {
  if (size == total(parts, count)) return REAL(writev)(fd, parts, count);
  size_t first = parts[0].iov_len < size ? parts[0].iov_len : size;
  return REAL(write)(fd, parts[0].iov_base, first);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
#define CALL(n) writev_up_to(fd, parts, count, n)
  WRITE("write", fd, total(parts, count), CALL);
#undef CALL
}
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
#define CALL(n) REAL(sendfile)(out, in, offset, n)
  WRITE("write", out, size, CALL);
#undef CALL
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) __attribute__((alias("sendfile")));
ssize_t copy_file_range(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t size, unsigned flags) {
#define CALL(n) REAL(copy_file_range)(in, in_offset, out, out_offset, n, flags)
  WRITE("write", out, size, CALL);
#undef CALL
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
  char buffer[PATH_MAX];
  const char *path = armed ? path_of(fileno(file), buffer) : NULL;
  int code = path ? reach("fwrite", path, SPACE, size * count) : 0;
  if (code == HALF) {
    REAL(fwrite)(data, size * count / 2, 1, file);
    die();
    errno = ENOSPC;
    return count / 2;
  }
  if (code) { errno = code; return 0; }
  return REAL(fwrite)(data, size, count, file);
}
/* A full disk loses the bytes in the stream's buffer, and only the result of these calls says so. */
int fflush(FILE *file) {
  char buffer[PATH_MAX];
  const char *path = armed && file && __fwritable(file) && __fpending(file) ? path_of(fileno(file), buffer) : NULL;
  int code = path ? reach("fflush", path, SPACE, 0) : 0;
  if (code) { __fpurge(file); errno = code; return EOF; }
  return REAL(fflush)(file);
}
int fclose(FILE *file) {
  char buffer[PATH_MAX];
  const char *path = armed && file && __fwritable(file) && __fpending(file) ? path_of(fileno(file), buffer) : NULL;
  int code = path ? reach("fclose", path, SPACE, 0) : 0;
  if (code) { __fpurge(file); REAL(fclose)(file); errno = code; return EOF; }
  return REAL(fclose)(file);
}

#define ON_FD(name, call, needs, parameters, arguments, fd) int name parameters { char buffer[PATH_MAX]; \
  const char *path = path_of(fd, buffer); if (path) FAIL(reach(call, path, needs, 0)); return REAL(name) arguments; }
ON_FD(fsync, "fsync", SPACE, (int fd), (fd), fd)
ON_FD(fdatasync, "fsync", SPACE, (int fd), (fd), fd)
ON_FD(ftruncate, "truncate", NAMESPACE, (int fd, off_t size), (fd, size), fd)
ON_FD(ftruncate64, "truncate", NAMESPACE, (int fd, off64_t size), (fd, size), fd)
ON_FD(fallocate, "allocate", SPACE, (int fd, int mode, off_t from, off_t size), (fd, mode, from, size), fd)
ON_FD(fallocate64, "allocate", SPACE, (int fd, int mode, off64_t from, off64_t size), (fd, mode, from, size), fd)

#define ON_PATH(name, call, needs, parameters, arguments, folder, path) int name parameters { char buffer[PATH_MAX]; \
  const char *whole = path_at(folder, path, buffer); if (whole) FAIL(reach(call, whole, needs, 0)); return REAL(name) arguments; }
ON_PATH(truncate, "truncate", NAMESPACE, (const char *path, off_t size), (path, size), AT_FDCWD, path)
/* A folder that exists needs neither permission nor space. */
static int for_folder(const char *path) {
  struct stat state;
  return stat(path, &state) ? NAMESPACE | SPACE : 0;
}
ON_PATH(mkdir, "mkdir", for_folder(whole), (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(mkdirat, "mkdir", for_folder(whole), (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path)
ON_PATH(unlink, "unlink", NAMESPACE, (const char *path), (path), AT_FDCWD, path)
ON_PATH(rmdir, "rmdir", NAMESPACE, (const char *path), (path), AT_FDCWD, path)
ON_PATH(unlinkat, "unlink", NAMESPACE, (int folder, const char *path, int flags), (folder, path, flags), folder, path)
ON_PATH(rename, "rename", NAMESPACE, (const char *from, const char *path), (from, path), AT_FDCWD, path)
ON_PATH(renameat, "rename", NAMESPACE, (int fd, const char *from, int folder, const char *path), (fd, from, folder, path), folder, path)
ON_PATH(renameat2, "exchange", NAMESPACE, (int fd, const char *from, int folder, const char *path, unsigned flags), (fd, from, folder, path, flags), folder, path)
ON_PATH(link, "link", NAMESPACE | SPACE, (const char *from, const char *path), (from, path), AT_FDCWD, path)
ON_PATH(linkat, "link", NAMESPACE | SPACE, (int fd, const char *from, int folder, const char *path, int flags), (fd, from, folder, path, flags), folder, path)
ON_PATH(symlink, "link", NAMESPACE | SPACE, (const char *from, const char *path), (from, path), AT_FDCWD, path)

#define MAP(name, type) void *name(void *at, size_t size, int protection, int flags, int fd, type offset) { \
  if (armed && fd >= 0 && flags & MAP_SHARED && protection & PROT_WRITE) { char buffer[PATH_MAX]; \
    int code = reach("mmap", path_of(fd, buffer), SPACE, 0); if (code) { errno = code; return MAP_FAILED; } } \
  return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset); }
MAP(mmap, off_t)
MAP(mmap64, off64_t)
