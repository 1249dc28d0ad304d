/* A file system that fails on cue: a library for LD_PRELOAD that stands between a program and libc (Linux).

   Calls on paths below one folder are counted; from the n-th call of a chosen operation on, so many fail in a chosen
   way. All else passes. It is steered while the program runs by a file that both sides map into memory, named by the
   environment variable FAULTS_CONTROL: twelve 32-bit integers, then at byte 64 the folder as an absolute path.
   tests/faults.py writes it and documents each number.

   Only calls that go through libc's symbols are seen, as Python's, torch's and Rust's do; stdio's own are not. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum { ANY = 1, OPEN, WRITE, FSYNC, RENAME, UNLINK, MKDIR, READ, STAT, CLOSE, TRUNCATE, LIST, RMDIR };
enum { SHORT = -1, CORRUPT = -2, STALL = -3, UNANSWERED = -4 }; /* above zero: an errno */

struct control {
    volatile int operation, fault, at, times, milliseconds, spare_main;
    volatile int calls, hits, stalled, released, generation, last;
    char unused[16];
    char folder[4032];
};

static struct control *control;
static char watched[65536];

__attribute__((constructor)) static void start(void) {
    const char *name = getenv("FAULTS_CONTROL");
    int file = name ? (int)syscall(SYS_openat, AT_FDCWD, name, O_RDWR) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) control = found;
    syscall(SYS_close, file);
}

static int below(const char *path) {
    if (!control || !path || !control->folder[0]) return 0;
    char full[2 * PATH_MAX];
    if (path[0] != '/') {
        if (!getcwd(full, PATH_MAX)) return 0;
        strcat(full, "/");
        strncat(full, path, PATH_MAX - 2);
        path = full;
    }
    size_t length = strlen(control->folder);
    return !strncmp(path, control->folder, length) && (path[length] == '/' || !path[length]);
}

static int below_at(int folder, const char *path) {
    if (folder == AT_FDCWD || (path && path[0] == '/')) return below(path);
    return folder >= 0 && folder < (int)sizeof watched && watched[folder];
}

static int is_watched(int file) { return file >= 0 && file < (int)sizeof watched && watched[file]; }

static void watch(int file, int yes) {
    if (file >= 0 && file < (int)sizeof watched) watched[file] = yes;
}

static void stall(int hit) {
    int generation = control->generation;
    long left = control->milliseconds * 10L;
    __sync_fetch_and_add(&control->stalled, 1);
    while (control->generation == generation && control->released < hit && (!control->milliseconds || left-- > 0))
        usleep(100);
    __sync_fetch_and_sub(&control->stalled, 1);
}

/* The fault of this call, 0 if there is none. A stall happens here, after which the call is made. */
static int fault_of(int operation, int here) {
    if (!here || !control || !control->fault) return 0;
    if (control->operation != ANY && control->operation != operation) return 0;
    if (control->spare_main && syscall(SYS_gettid) == getpid()) return 0;
    int call = __sync_add_and_fetch(&control->calls, 1), fault = control->fault;
    if (call < control->at || (control->times >= 0 && call >= control->at + control->times)) return 0;
    if ((fault == SHORT || fault == CORRUPT) && operation != READ && operation != WRITE) return 0;
    control->last = operation;
    int hit = __sync_add_and_fetch(&control->hits, 1);
    if (fault != STALL) return fault;
    stall(hit);
    return 0;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(error) return errno = (error), -1

/* A call that returns 0 or -1. */
#define PLAIN(operation, here, call)              \
    int fault = fault_of(operation, here);        \
    if (fault > 0) FAIL(fault);                   \
    int result = (call);                          \
    if (fault == UNANSWERED) FAIL(EIO);           \
    return result

static int opened(int file, int here, int fault) {
    if (fault == UNANSWERED && file >= 0) {
        syscall(SYS_close, file);
        FAIL(EIO);
    }
    watch(file, here);
    return file;
}

#define OPENS(name)                                                   \
    int name(const char *path, int flags, ...) {                      \
        REAL(name);                                                   \
        va_list rest;                                                 \
        va_start(rest, flags);                                        \
        mode_t mode = va_arg(rest, int);                              \
        va_end(rest);                                                 \
        int here = below(path), fault = fault_of(OPEN, here);         \
        if (fault > 0) FAIL(fault);                                   \
        return opened(real(path, flags, mode), here, fault);          \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                                           \
    int name(int folder, const char *path, int flags, ...) {                     \
        REAL(name);                                                              \
        va_list rest;                                                            \
        va_start(rest, flags);                                                   \
        mode_t mode = va_arg(rest, int);                                         \
        va_end(rest);                                                            \
        int here = below_at(folder, path), fault = fault_of(OPEN, here);         \
        if (fault > 0) FAIL(fault);                                              \
        return opened(real(folder, path, flags, mode), here, fault);             \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

int close(int file) {
    REAL(close);
    int fault = fault_of(CLOSE, is_watched(file));
    watch(file, 0);
    int result = real(file); /* the file is closed, whatever is answered */
    if (fault > 0) FAIL(fault);
    if (fault == UNANSWERED) FAIL(EIO);
    return result;
}

ssize_t write(int file, const void *bytes, size_t count) {
    REAL(write);
    int fault = fault_of(WRITE, is_watched(file));
    if (fault > 0) FAIL(fault);
    if (fault == SHORT && count > 1) return real(file, bytes, count / 2);
    if (fault == CORRUPT && count) {
        char *changed = malloc(count);
        memcpy(changed, bytes, count);
        changed[count / 2] ^= 1;
        ssize_t result = real(file, changed, count);
        free(changed);
        return result;
    }
    ssize_t result = real(file, bytes, count);
    if (fault == UNANSWERED) FAIL(EIO);
    return result;
}

ssize_t read(int file, void *bytes, size_t count) {
    REAL(read);
    int fault = fault_of(READ, is_watched(file));
    if (fault > 0) FAIL(fault);
    ssize_t result = real(file, bytes, fault == SHORT && count > 1 ? count / 2 : count);
    if (fault == CORRUPT && result > 0) ((char *)bytes)[result / 2] ^= 1;
    if (fault == UNANSWERED) FAIL(EIO);
    return result;
}

/* Below the folder nothing is synced: only a machine that stops needs it, and many tests fit into one second. */
int fsync(int file) { REAL(fsync); PLAIN(FSYNC, is_watched(file), is_watched(file) ? 0 : real(file)); }
int fdatasync(int file) { REAL(fdatasync); PLAIN(FSYNC, is_watched(file), is_watched(file) ? 0 : real(file)); }
int rename(const char *old, const char *new) { REAL(rename); PLAIN(RENAME, below(old) || below(new), real(old, new)); }
int unlink(const char *path) { REAL(unlink); PLAIN(UNLINK, below(path), real(path)); }
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    PLAIN(flags & AT_REMOVEDIR ? RMDIR : UNLINK, below_at(folder, path), real(folder, path, flags));
}
int rmdir(const char *path) { REAL(rmdir); PLAIN(RMDIR, below(path), real(path)); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); PLAIN(MKDIR, below(path), real(path, mode)); }
int truncate(const char *path, off_t size) { REAL(truncate); PLAIN(TRUNCATE, below(path), real(path, size)); }
int truncate64(const char *path, off64_t size) { REAL(truncate64); PLAIN(TRUNCATE, below(path), real(path, size)); }
int ftruncate(int file, off_t size) { REAL(ftruncate); PLAIN(TRUNCATE, is_watched(file), real(file, size)); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); PLAIN(TRUNCATE, is_watched(file), real(file, size)); }
int stat(const char *path, struct stat *s) { REAL(stat); PLAIN(STAT, below(path), real(path, s)); }
int stat64(const char *path, struct stat64 *s) { REAL(stat64); PLAIN(STAT, below(path), real(path, s)); }
int lstat(const char *path, struct stat *s) { REAL(lstat); PLAIN(STAT, below(path), real(path, s)); }
int lstat64(const char *path, struct stat64 *s) { REAL(lstat64); PLAIN(STAT, below(path), real(path, s)); }
int fstat(int file, struct stat *s) { REAL(fstat); PLAIN(STAT, is_watched(file), real(file, s)); }
int fstat64(int file, struct stat64 *s) { REAL(fstat64); PLAIN(STAT, is_watched(file), real(file, s)); }
int fstatat(int d, const char *path, struct stat *s, int flags) {
    REAL(fstatat);
    PLAIN(STAT, below_at(d, path), real(d, path, s, flags));
}
int fstatat64(int d, const char *path, struct stat64 *s, int flags) {
    REAL(fstatat64);
    PLAIN(STAT, below_at(d, path), real(d, path, s, flags));
}
int statx(int d, const char *path, int flags, unsigned mask, struct statx *s) {
    REAL(statx);
    PLAIN(STAT, below_at(d, path), real(d, path, flags, mask, s));
}

DIR *opendir(const char *path) {
    REAL(opendir);
    int fault = fault_of(LIST, below(path));
    if (fault > 0 || fault == UNANSWERED) {
        errno = fault > 0 ? fault : EIO;
        return NULL;
    }
    return real(path);
}
