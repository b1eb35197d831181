/* Kills its process with SIGKILL at the N-th call that changes a file under one folder: open for writing, write, fsync,
   rename, unlink, rmdir, mkdir. N is set by arm(), so that one process can fork a child for every N. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long left = 0;

void arm(const char *where, long number) {
  strncpy(folder, where, sizeof folder - 1);
  left = number;
}

static void step(const char *path) {
  if (!folder[0] || !path || !strstr(path, folder)) return;
  if (left > 0 && --left == 0)
    for (kill(getpid(), SIGKILL);;) pause(); /* another thread may take the signal */
}
static void step_at(int handle, const char *name) {
  char link[64], path[PATH_MAX] = "";
  if (name && name[0] == '/') { step(name); return; }
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t size = handle >= 0 ? readlink(link, path, sizeof path - 1) : -1;
  if (size > 0) { path[size] = 0; step(path); }
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int open64(const char *path, int flags, ...) {
  va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest);
  if (flags & (O_WRONLY | O_RDWR | O_CREAT)) step(path);
  return REAL(open64)(path, flags, mode);
}
int open(const char *path, int flags, ...) {
  va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest);
  if (flags & (O_WRONLY | O_RDWR | O_CREAT)) step(path);
  return REAL(open)(path, flags, mode);
}
ssize_t write(int handle, const void *data, size_t size) {
  if (handle > 2 && left == 1 && folder[0]) { /* half of it is written before the process dies */
    char link[64], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, folder)) REAL(write)(handle, data, size / 2);
  }
  if (handle > 2) step_at(handle, NULL);
  return REAL(write)(handle, data, size);
}
int fsync(int handle) { step_at(handle, NULL); return REAL(fsync)(handle); }
int rename(const char *from, const char *to) { step(to); return REAL(rename)(from, to); }
int unlink(const char *path) { step(path); return REAL(unlink)(path); }
int rmdir(const char *path) { step(path); return REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { step(path); return REAL(mkdir)(path, mode); }
int unlinkat(int handle, const char *path, int flags) { step_at(handle, path); return REAL(unlinkat)(handle, path, flags); }
