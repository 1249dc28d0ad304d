/* A folder that behaves like Google Drive on Colab, for LD_PRELOAD: below DRIVE there are no links and no locks, modes
   cannot be changed, and the sync of a folder is refused. All else is the disk's. In this it is stricter than what is
   known of Drive, which lets a change of a mode pass without effect. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int below(const char *path) {
    const char *drive = getenv("DRIVE");
    size_t length = drive ? strlen(drive) : 0;
    return length && path && !strncmp(path, drive, length) && (path[length] == '/' || !path[length]);
}

static int is_below(int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

static int refuse(int why) {
    errno = why;
    return -1;
}

#define REAL(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

int link(const char *from, const char *to) {
    return below(to) ? refuse(EOPNOTSUPP) : REAL(int, "link", const char *, const char *)(from, to);
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
    if (below(to) || (b >= 0 && is_below(b))) return refuse(EOPNOTSUPP);
    return REAL(int, "linkat", int, const char *, int, const char *, int)(a, from, b, to, flags);
}

int symlink(const char *from, const char *to) {
    return below(to) ? refuse(EOPNOTSUPP) : REAL(int, "symlink", const char *, const char *)(from, to);
}

int symlinkat(const char *from, int folder, const char *to) {
    if (below(to) || (folder >= 0 && is_below(folder))) return refuse(EOPNOTSUPP);
    return REAL(int, "symlinkat", const char *, int, const char *)(from, folder, to);
}

int chmod(const char *path, mode_t mode) {
    return below(path) ? refuse(EPERM) : REAL(int, "chmod", const char *, mode_t)(path, mode);
}

int fchmod(int file, mode_t mode) { return is_below(file) ? refuse(EPERM) : REAL(int, "fchmod", int, mode_t)(file, mode); }

int flock(int file, int operation) {
    return is_below(file) ? refuse(ENOSYS) : REAL(int, "flock", int, int)(file, operation);
}

int fsync(int file) {
    struct stat facts;
    if (is_below(file) && !fstat(file, &facts) && S_ISDIR(facts.st_mode)) return refuse(EINVAL);
    return REAL(int, "fsync", int)(file);
}
