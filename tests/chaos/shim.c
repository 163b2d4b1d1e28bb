/* Fail the n-th system call of a kind below a folder, and log such calls; for LD_PRELOAD.
 *
 * Only calls through libc are seen: those of Python, of FFmpeg in PyAV, of SQLite and of torch.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, MKDIR, LOCK, CLOSE, READ, UNLINK, TRUNCATE, KINDS };
static const char *NAMES[] = {"open", "write", "fsync", "rename", "mkdir",
                              "lock", "close", "read", "unlink", "truncate"};

static char folder[4096];
static size_t folder_length;
static atomic_int is_armed, fail_kind, fail_errno, log_number = -1;
static atomic_long fail_at, counts[KINDS];

void chaos_arm(const char *top, int kind, long at, int error, int log) {
    is_armed = 0;
    strncpy(folder, top, sizeof folder - 1);
    folder_length = strlen(folder);
    fail_kind = kind;
    fail_at = at;
    fail_errno = error;
    log_number = log;
    for (int i = 0; i < KINDS; i++) counts[i] = 0;
    is_armed = 1;
}
void chaos_disarm(void) { is_armed = 0; }
long chaos_count(int kind) { return counts[kind]; }

static int is_below(const char *path) {
    char whole[4096];
    if (!is_armed || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(whole, sizeof whole)) return 0;
        path = whole;
    }
    return strncmp(path, folder, folder_length) == 0;
}

/* Write the path of a descriptor, if it is below the folder. */
static int find_path(int number, char *path, size_t size) {
    char link[64];
    if (!is_armed || number == log_number) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", number);
    ssize_t length = readlink(link, path, size - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return strncmp(path, folder, folder_length) == 0;
}

/* Count a call; return 1, with errno set, if it is the one that fails. */
static int fails(int kind) {
    if (++counts[kind] != fail_at || kind != fail_kind) return 0;
    errno = fail_errno;
    return 1;
}

/* Log a call that has succeeded. */
static void log_call(int kind, const char *path, const char *other) {
    if (log_number >= 0) {
        int error = errno;
        char line[9000];
        int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", NAMES[kind], path, other);
        static ssize_t (*real)(int, const void *, size_t);
        if (!real) real = dlsym(RTLD_NEXT, "write");
        if (length > 0) real(log_number, line, (size_t)length);
        errno = error;
    }
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        int is_counted = is_below(path); \
        if (is_counted && fails(OPEN)) return -1; \
        int result = real(path, flags, mode); \
        if (is_counted && result >= 0) log_call(OPEN, path, flags & (O_WRONLY | O_RDWR) ? "w" : "r"); \
        return result; \
    }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        int is_counted = is_below(path); \
        if (is_counted && fails(OPEN)) return -1; \
        int result = real(at, path, flags, mode); \
        if (is_counted && result >= 0) log_call(OPEN, path, flags & (O_WRONLY | O_RDWR) ? "w" : "r"); \
        return result; \
    }
OPENER_AT(openat)
OPENER_AT(openat64)

#define FILE_OPENER(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, name, const char *, const char *); \
        int is_counted = is_below(path); \
        if (is_counted && fails(OPEN)) return NULL; \
        FILE *result = real(path, mode); \
        if (is_counted && result) log_call(OPEN, path, strpbrk(mode, "wa+") ? "w" : "r"); \
        return result; \
    }
FILE_OPENER(fopen)
FILE_OPENER(fopen64)

#define ON_DESCRIPTOR(type, name, kind, parameters, types, arguments) \
    type name parameters { \
        REAL(type, name, types); \
        char path[4096]; \
        int is_counted = find_path(number, path, sizeof path); \
        if (is_counted && fails(kind)) return -1; \
        type result = real arguments; \
        if (is_counted && result >= 0) log_call(kind, path, ""); \
        return result; \
    }
#define TYPES(...) __VA_ARGS__
ON_DESCRIPTOR(ssize_t, write, WRITE, (int number, const void *data, size_t size), TYPES(int, const void *, size_t), (number, data, size))
ON_DESCRIPTOR(ssize_t, pwrite, WRITE, (int number, const void *data, size_t size, off_t at), TYPES(int, const void *, size_t, off_t), (number, data, size, at))
ON_DESCRIPTOR(ssize_t, pwrite64, WRITE, (int number, const void *data, size_t size, off64_t at), TYPES(int, const void *, size_t, off64_t), (number, data, size, at))
ON_DESCRIPTOR(ssize_t, writev, WRITE, (int number, const struct iovec *data, int count), TYPES(int, const struct iovec *, int), (number, data, count))
ON_DESCRIPTOR(ssize_t, read, READ, (int number, void *data, size_t size), TYPES(int, void *, size_t), (number, data, size))
ON_DESCRIPTOR(ssize_t, pread64, READ, (int number, void *data, size_t size, off64_t at), TYPES(int, void *, size_t, off64_t), (number, data, size, at))
ON_DESCRIPTOR(int, fsync, FSYNC, (int number), TYPES(int), (number))
ON_DESCRIPTOR(int, fdatasync, FSYNC, (int number), TYPES(int), (number))
ON_DESCRIPTOR(int, flock, LOCK, (int number, int operation), TYPES(int, int), (number, operation))
ON_DESCRIPTOR(int, ftruncate, TRUNCATE, (int number, off_t size), TYPES(int, off_t), (number, size))
ON_DESCRIPTOR(int, ftruncate64, TRUNCATE, (int number, off64_t size), TYPES(int, off64_t), (number, size))

int close(int number) {
    REAL(int, close, int);
    char path[4096];
    int is_failing = find_path(number, path, sizeof path) && fails(CLOSE);
    int error = errno, result = real(number); /* the descriptor is gone in any case */
    if (is_failing) errno = error;
    return is_failing ? -1 : result;
}

#define ON_PATH(name, kind, parameters, types, arguments, other) \
    int name parameters { \
        REAL(int, name, types); \
        int is_counted = is_below(path); \
        if (is_counted && fails(kind)) return -1; \
        int result = real arguments; \
        if (is_counted && result == 0) log_call(kind, path, other); \
        return result; \
    }
ON_PATH(rename, RENAME, (const char *path, const char *target), TYPES(const char *, const char *), (path, target), target)
ON_PATH(renameat, RENAME, (int at, const char *path, int to, const char *target), TYPES(int, const char *, int, const char *), (at, path, to, target), target)
ON_PATH(mkdir, MKDIR, (const char *path, mode_t mode), TYPES(const char *, mode_t), (path, mode), "")
ON_PATH(mkdirat, MKDIR, (int at, const char *path, mode_t mode), TYPES(int, const char *, mode_t), (at, path, mode), "")
ON_PATH(unlink, UNLINK, (const char *path), TYPES(const char *), (path), "")
ON_PATH(unlinkat, UNLINK, (int at, const char *path, int flags), TYPES(int, const char *, int), (at, path, flags), "")
ON_PATH(rmdir, UNLINK, (const char *path), TYPES(const char *), (path), "")
