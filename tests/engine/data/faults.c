/* SPDX-License-Identifier: Apache-2.0
 * SPDX-FileCopyrightText: The vllm-subspec authors
 *
 * A bad disk and a bad clock for a process that is started with this library in LD_PRELOAD. It
 * answers for weight stores only, and as the kernel would. FAULTS names a file of four 64-bit
 * integers that both sides map: what happens to reads, how many microseconds each read and write
 * takes longer, how many seconds the wall clock is ahead, and how many reads and writes there were.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, FAIL, SHORT, DIE };
struct faults {
    volatile int64_t reads, delay, ahead, calls;
};
static struct faults *faults;

__attribute__((constructor)) static void map_faults(void) {
    int fd = open(getenv("FAULTS"), O_RDWR | O_CLOEXEC);
    void *memory = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) abort();
    close(fd);
    faults = memory;
}

/* Whether fd is a weight store, or one that is being written; if so, it takes its time. */
static int is_store(int fd) {
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, ".store")) return 0;
    __sync_fetch_and_add(&faults->calls, 1);
    if (faults->delay) usleep(faults->delay);
    return 1;
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    static ssize_t (*next)(int, const struct iovec *, int, off64_t, int);
    if (!next) next = dlsym(RTLD_NEXT, "preadv64v2");
    if (!faults || !is_store(fd)) return next(fd, parts, count, offset, flags);
    struct iovec less = parts[0];
    switch (faults->reads) {
    case FAIL:
        errno = EIO;
        return -1;
    case SHORT: /* some sectors of what was asked for */
        if (less.iov_len > 8192) less.iov_len = less.iov_len / 2 / 512 * 512;
        return next(fd, &less, 1, offset, flags);
    case DIE: /* this thread, and nobody is told */
        syscall(SYS_exit, 0);
    }
    return next(fd, parts, count, offset, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    static ssize_t (*next)(int, const struct iovec *, int, off64_t, int);
    if (!next) next = dlsym(RTLD_NEXT, "pwritev64v2");
    if (faults) is_store(fd);
    return next(fd, parts, count, offset, flags);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = syscall(SYS_clock_gettime, clock, now);
    if (faults && clock == CLOCK_REALTIME) now->tv_sec += faults->ahead;
    return status;
}
