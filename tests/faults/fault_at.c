/* A library for LD_PRELOAD: counts a process's system calls on the files of one folder, by kind, and disturbs one.

   It wraps the libc functions that Python, HDF5, Arrow and torch call. It does not see calls inside libc, such as
   fclose calling close: test_every_system_call.py compares the counts with strace's.

   Forked children share the memory of the state, so that a parent can read what a killed child has done.
   Build: cc -shared -fPIC -O1 -o fault_at.so fault_at.c -ldl */

#undef _FORTIFY_SOURCE /* some compilers set it; then open and others are not plain functions */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* In the same order as CALLS in system_calls.py. */
enum kind { OPEN, WRITE, FSYNC, RENAME, UNLINK, TRUNCATE, ALLOCATE, MKDIR, CLOSE, KINDS };

/* In the same order as ACTIONS there: the call fails; it and all later calls of its kind fail, as on a full disk; a
   write writes half; the process is killed before the call; it is killed after the call, or after half of a write. */
enum action { NONE, FAIL, FAIL_ON, HALF, DIE, DIE_AFTER };

struct state {
    _Atomic int counts[KINDS];
    int armed, kind, number, action, error;
    char folder[PATH_MAX];
    char path[PATH_MAX]; /* of the call that was disturbed */
};

static struct state *state;

__attribute__((constructor)) static void share_state(void)
{
    void *shared = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared != MAP_FAILED)
        state = shared;
}

/* Start to count calls on `folder` (absolute, without links) and below; disturb call `number`, counted from 1. */
void fault_arm(const char *folder, int kind, int number, int action, int error)
{
    memset(state, 0, sizeof *state);
    snprintf(state->folder, sizeof state->folder, "%s", folder);
    state->kind = kind;
    state->number = number;
    state->action = action;
    state->error = error;
    state->armed = 1;
}

/* Stop counting; keep the counts. */
void fault_disarm(void) { state->armed = 0; }

int fault_count(int kind) { return state->counts[kind]; }

/* Return the path of the disturbed call; empty if there was none. */
const char *fault_path(void) { return state->path; }

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* Write to `path` the path of a descriptor, or of `relative`, which is relative to it. */
static void find_path(int descriptor, const char *relative, char *path)
{
    char link[64], base[PATH_MAX] = "";
    ssize_t length;
    if (relative && *relative == '/') {
        snprintf(path, PATH_MAX, "%s", relative);
        return;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(descriptor == AT_FDCWD ? "/proc/self/cwd" : link, base, sizeof base - 1);
    base[length < 0 ? 0 : length] = 0;
    if (snprintf(path, PATH_MAX, relative ? "%s/%s" : "%s", base, relative) >= PATH_MAX)
        *path = 0;
}

/* Count a call on a descriptor, or on a path relative to it; return the action to take. */
static enum action next(enum kind kind, int descriptor, const char *relative)
{
    char path[PATH_MAX];
    int number, error = errno;
    size_t length;
    if (!state || !state->armed)
        return NONE;
    find_path(descriptor, relative, path);
    errno = error;
    length = strlen(state->folder);
    if (strncmp(path, state->folder, length) || (path[length] && path[length] != '/'))
        return NONE;
    number = ++state->counts[kind];
    if ((int)kind != state->kind || number < state->number || (number > state->number && state->action != FAIL_ON))
        return NONE;
    if (number == state->number)
        memcpy(state->path, path, sizeof path);
    if (state->action == DIE)
        die();
    return state->action;
}

static int fails(enum action action)
{
    if (action != FAIL && action != FAIL_ON)
        return 0;
    errno = state->error;
    return 1;
}

#define REAL(name)                \
    static __typeof__(&name) real; \
    if (!real)                     \
    real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* The body of a wrapper; the call returns `failed` if it fails. */
#define DO(name, kind, failed, descriptor, path, call)       \
    {                                                        \
        REAL(name);                                          \
        enum action action = next(kind, descriptor, path);   \
        if (fails(action))                                   \
            return failed;                                   \
        __typeof__(call) result = call;                      \
        if (action == DIE_AFTER)                             \
            die();                                           \
        return result;                                       \
    }

#define OPEN_WITH_MODE(name, descriptor, ...)                                \
    {                                                                        \
        mode_t mode = 0;                                                     \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {           \
            va_list rest;                                                    \
            va_start(rest, flags);                                           \
            mode = va_arg(rest, mode_t);                                     \
            va_end(rest);                                                    \
        }                                                                    \
        DO(name, OPEN, -1, descriptor, path, real(__VA_ARGS__, flags, mode)) \
    }

int open(const char *path, int flags, ...) OPEN_WITH_MODE(open, AT_FDCWD, path)
int open64(const char *path, int flags, ...) OPEN_WITH_MODE(open64, AT_FDCWD, path)
int openat(int folder, const char *path, int flags, ...) OPEN_WITH_MODE(openat, folder, folder, path)
int openat64(int folder, const char *path, int flags, ...) OPEN_WITH_MODE(openat64, folder, folder, path)

/* Under _FORTIFY_SOURCE the compiler turns open without a mode into these. */
int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int folder, const char *path, int flags);
int __openat64_2(int folder, const char *path, int flags);
int __open_2(const char *path, int flags) DO(__open_2, OPEN, -1, AT_FDCWD, path, real(path, flags))
int __open64_2(const char *path, int flags) DO(__open64_2, OPEN, -1, AT_FDCWD, path, real(path, flags))
int __openat_2(int folder, const char *path, int flags) DO(__openat_2, OPEN, -1, folder, path, real(folder, path, flags))
int __openat64_2(int folder, const char *path, int flags)
    DO(__openat64_2, OPEN, -1, folder, path, real(folder, path, flags))

int creat(const char *path, mode_t mode) DO(creat, OPEN, -1, AT_FDCWD, path, real(path, mode))
int creat64(const char *path, mode_t mode) DO(creat64, OPEN, -1, AT_FDCWD, path, real(path, mode))
FILE *fopen(const char *path, const char *mode) DO(fopen, OPEN, NULL, AT_FDCWD, path, real(path, mode))
FILE *fopen64(const char *path, const char *mode) DO(fopen64, OPEN, NULL, AT_FDCWD, path, real(path, mode))

/* Half of the bytes, or of the pieces; at least one, because callers would repeat an empty write forever. */
#define PART(size) (action == HALF || action == DIE_AFTER ? ((size) + 1) / 2 : (size))

ssize_t write(int descriptor, const void *data, size_t size)
    DO(write, WRITE, -1, descriptor, NULL, real(descriptor, data, PART(size)))
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset)
    DO(pwrite, WRITE, -1, descriptor, NULL, real(descriptor, data, PART(size), offset))
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset)
    DO(pwrite64, WRITE, -1, descriptor, NULL, real(descriptor, data, PART(size), offset))
ssize_t writev(int descriptor, const struct iovec *pieces, int size)
    DO(writev, WRITE, -1, descriptor, NULL, real(descriptor, pieces, PART(size)))
ssize_t pwritev(int descriptor, const struct iovec *pieces, int size, off_t offset)
    DO(pwritev, WRITE, -1, descriptor, NULL, real(descriptor, pieces, PART(size), offset))
ssize_t pwritev64(int descriptor, const struct iovec *pieces, int size, off64_t offset)
    DO(pwritev64, WRITE, -1, descriptor, NULL, real(descriptor, pieces, PART(size), offset))

int fsync(int descriptor) DO(fsync, FSYNC, -1, descriptor, NULL, real(descriptor))
int fdatasync(int descriptor) DO(fdatasync, FSYNC, -1, descriptor, NULL, real(descriptor))

int rename(const char *old, const char *new) DO(rename, RENAME, -1, AT_FDCWD, new, real(old, new))
int renameat(int from, const char *old, int to, const char *new)
    DO(renameat, RENAME, -1, to, new, real(from, old, to, new))
int link(const char *old, const char *new) DO(link, RENAME, -1, AT_FDCWD, new, real(old, new))
int linkat(int from, const char *old, int to, const char *new, int flags)
    DO(linkat, RENAME, -1, to, new, real(from, old, to, new, flags))
int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
    DO(renameat2, RENAME, -1, to, new, real(from, old, to, new, flags))

int unlink(const char *path) DO(unlink, UNLINK, -1, AT_FDCWD, path, real(path))
int rmdir(const char *path) DO(rmdir, UNLINK, -1, AT_FDCWD, path, real(path))
int unlinkat(int folder, const char *path, int flags) DO(unlinkat, UNLINK, -1, folder, path, real(folder, path, flags))

int truncate(const char *path, off_t size) DO(truncate, TRUNCATE, -1, AT_FDCWD, path, real(path, size))
int ftruncate(int descriptor, off_t size) DO(ftruncate, TRUNCATE, -1, descriptor, NULL, real(descriptor, size))
int ftruncate64(int descriptor, off64_t size) DO(ftruncate64, TRUNCATE, -1, descriptor, NULL, real(descriptor, size))

/* These return the error. */
int posix_fallocate(int descriptor, off_t offset, off_t size)
    DO(posix_fallocate, ALLOCATE, errno, descriptor, NULL, real(descriptor, offset, size))
int posix_fallocate64(int descriptor, off64_t offset, off64_t size)
    DO(posix_fallocate64, ALLOCATE, errno, descriptor, NULL, real(descriptor, offset, size))

int mkdir(const char *path, mode_t mode) DO(mkdir, MKDIR, -1, AT_FDCWD, path, real(path, mode))
int mkdirat(int folder, const char *path, mode_t mode) DO(mkdirat, MKDIR, -1, folder, path, real(folder, path, mode))

/* Linux closes a file even if it returns an error. */
int close(int descriptor)
{
    REAL(close);
    enum action action = next(CLOSE, descriptor, NULL);
    int result = real(descriptor);
    if (action == DIE_AFTER)
        die();
    return fails(action) ? -1 : result;
}
