/* A disk that misbehaves on demand. Preloaded into a process, this library intercepts the calls that write to regular files
 * under one directory. LARPIXDAQ_DISK_DIRECTORY names the directory, LARPIXDAQ_DISK_CONTROL a file with the structure
 * below, which disk.py writes. Calls for other files, sockets and pipes are passed on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t hang;       /* 1: every operation waits until this is 0 */
    int64_t error;      /* errno for the operations that fail */
    int64_t failures;   /* number of operations that fail; -1: all, until heal() */
    int64_t rate;       /* maximum bytes/s written; 0: no limit */
    int64_t room;       /* bytes by which files can still grow; -1: no limit */
    int64_t operations; /* number so far */
    int64_t affected;   /* number of these that were delayed or failed */
    int64_t locks;      /* errno of flock(); 0: locks work */
};

static volatile struct control *control;
static char directory[4096];

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("LARPIXDAQ_DISK_CONTROL"), *under = getenv("LARPIXDAQ_DISK_DIRECTORY");
    if (!path || !under || !realpath(under, directory)) return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) control = map;
}

static int beneath(const char *path) {
    size_t n = strlen(directory);
    return strncmp(path, directory, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int ours(int fd, struct stat *status) {
    char link[64], path[4096];
    if (!control || fstat(fd, status) || !S_ISREG(status->st_mode)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return beneath(path);
}

static void pause_for(double seconds) {
    struct timespec time = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&time, NULL);
}

/* Delays an operation, or lets it fail: -1 with errno. */
static int affect(void) {
    __atomic_add_fetch(&control->operations, 1, __ATOMIC_RELAXED);
    if (control->hang) {
        __atomic_add_fetch(&control->affected, 1, __ATOMIC_RELAXED);
        while (control->hang) pause_for(0.001);
    }
    int64_t left = control->failures;
    if (left > 0) left = __atomic_fetch_sub(&control->failures, 1, __ATOMIC_RELAXED);
    if (left == 0) return 0;
    __atomic_add_fetch(&control->affected, 1, __ATOMIC_RELAXED);
    errno = (int)control->error;
    return -1;
}

static void slow_down(int64_t size) {
    static double free_at; /* one thread writes */
    int64_t rate = control->rate;
    if (rate <= 0) return;
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    double now = (double)time.tv_sec + (double)time.tv_nsec / 1e9;
    if (free_at < now) free_at = now;
    free_at += (double)size / (double)rate;
    __atomic_add_fetch(&control->affected, 1, __ATOMIC_RELAXED);
    pause_for(free_at - now);
}

/* Number of bytes that a write of `size` bytes at `offset` may write; -1 with errno for none. */
static int64_t admit(const struct stat *status, int64_t offset, int64_t size) {
    if (affect()) return -1;
    slow_down(size);
    int64_t room = control->room;
    int64_t growth = offset + size - (int64_t)status->st_size;
    if (room < 0 || growth <= 0) return size;
    if (growth > room) {
        __atomic_add_fetch(&control->affected, 1, __ATOMIC_RELAXED);
        size -= growth - room;
        growth = room;
    }
    __atomic_sub_fetch(&control->room, growth, __ATOMIC_RELAXED);
    if (size > 0) return size;
    errno = ENOSPC;
    return -1;
}

static int64_t total(const struct iovec *parts, int n) {
    int64_t size = 0;
    for (int i = 0; i < n; i++) size += (int64_t)parts[i].iov_len;
    return size;
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    struct stat status;
    if (!ours(fd, &status)) return real(fd, data, size);
    int64_t at = fcntl(fd, F_GETFL) & O_APPEND ? (int64_t)status.st_size : (int64_t)lseek(fd, 0, SEEK_CUR);
    int64_t allowed = admit(&status, at, (int64_t)size);
    return allowed < 0 ? -1 : real(fd, data, (size_t)allowed);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    struct stat status;
    if (!ours(fd, &status)) return real(fd, data, size, offset);
    int64_t allowed = admit(&status, offset, (int64_t)size);
    return allowed < 0 ? -1 : real(fd, data, (size_t)allowed, offset);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    struct stat status;
    if (!ours(fd, &status)) return real(fd, parts, n);
    int64_t size = total(parts, n);
    int64_t allowed = admit(&status, (int64_t)status.st_size, size);
    if (allowed < size && allowed >= 0) return write(fd, parts[0].iov_base, parts[0].iov_len);
    return allowed < 0 ? -1 : real(fd, parts, n);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int n, off64_t offset) {
    REAL(ssize_t, "pwritev64", int, const struct iovec *, int, off64_t);
    struct stat status;
    if (!ours(fd, &status)) return real(fd, parts, n, offset);
    int64_t size = total(parts, n);
    int64_t allowed = admit(&status, offset, size);
    if (allowed < size && allowed >= 0) return pwrite64(fd, parts[0].iov_base, parts[0].iov_len, offset);
    return allowed < 0 ? -1 : real(fd, parts, n, offset);
}

ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t offset) { return pwritev64(fd, parts, n, offset); }

int fsync(int fd) {
    REAL(int, "fsync", int);
    struct stat status;
    return ours(fd, &status) && affect() ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    struct stat status;
    return ours(fd, &status) && affect() ? -1 : real(fd);
}

/* A file system without locks. */
int flock(int fd, int operation) {
    REAL(int, "flock", int, int);
    struct stat status;
    if (!control || !control->locks || !ours(fd, &status)) return real(fd, operation);
    errno = (int)control->locks;
    return -1;
}

int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    struct stat status;
    return ours(fd, &status) && affect() ? -1 : real(fd, size);
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

/* A full disk also reports that it is full. */
int statvfs64(const char *path, struct statvfs64 *found) {
    REAL(int, "statvfs64", const char *, struct statvfs64 *);
    char whole[4096];
    int done = real(path, found);
    if (done == 0 && control && control->room >= 0 && realpath(path, whole) && beneath(whole)) {
        found->f_bavail = found->f_bfree = (fsblkcnt64_t)control->room / found->f_frsize;
    }
    return done;
}

int statvfs(const char *path, struct statvfs *found) { return statvfs64(path, (struct statvfs64 *)found); }
