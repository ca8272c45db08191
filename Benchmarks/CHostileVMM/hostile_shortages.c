// SPDX-License-Identifier: Apache-2.0
//
// Guests for whose pages there is no memory, and those that hold a lock of the kernel while they wait
// for a page.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int ballast = -1;

/// Takes all huge pages of the pool that are free, and gives them back, at a pace.
void *hostile_thief(void *argument) {
  struct vmm *v = argument;
  uint64_t state = v->seed;
  while (!v->stops) {
    for (size_t page = 0; page < v->pages; page++) {
      if (fallocate(ballast, 0, (off_t)(page * HUGE_PAGE), HUGE_PAGE) != 0) break;
    }
    usleep((useconds_t)(hostile_random(&state) % v->pause_us + 1));
    fallocate(ballast, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)(v->pages * HUGE_PAGE));
    usleep((useconds_t)(hostile_random(&state) % v->pause_us + 1));
  }
  return NULL;
}

/// Memory in huge pages of a pool of its own, which has so many bytes; as Firecracker maps it
/// (MAP_PRIVATE|MAP_NORESERVE).
int hostile_use_pool(struct vmm *v, size_t bytes) {
  const int root = hostile_open_pool(bytes);
  if (root < 0) return -1;
  v->page_size = HUGE_PAGE;
  v->length = v->pages * HUGE_PAGE;
  v->memory_file = openat(root, "memory", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  ballast = openat(root, "ballast", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  close(root);
  if (v->memory_file < 0 || ballast < 0) return -1;
  // Empty it may not be: what is mapped beyond a file's end is SIGBUS.
  if (ftruncate(v->memory_file, (off_t)v->length) != 0) return -1;
  return ftruncate(ballast, (off_t)v->length);
}

void hostile_close_pool(void) {
  close(ballast);
  ballast = -1;
}

static int enter(const char *group) {
  char path[512], text[32];
  snprintf(path, sizeof path, "%s/cgroup.procs", group);
  const int file = open(path, O_WRONLY | O_CLOEXEC);
  const int length = snprintf(text, sizeof text, "%d", getpid());
  if (file < 0) return -1;
  const ssize_t written = write(file, text, (size_t)length);
  close(file);
  return written == length ? 0 : -1;
}

/// Less memory than the guest has: a pool with half of its huge pages, which come and go, or a memory
/// cgroup (`other`) with a limit.
int hostile_shortage(struct vmm *v) {
  if (v->other ? enter(v->other) != 0 : hostile_use_pool(v, v->length / 2) != 0) return STATUS_CANNOT;
  const int status = hostile_begin(v);
  if (status != 0) return status;
  if (!v->other && hostile_start(hostile_thief, v) != 0) return -1;
  if (hostile_start_many(v->threads, hostile_toucher, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}

/// Writes to its memory file from pages that are not there: the kernel holds the file's lock while it
/// waits for the service, whose write to the same file waits for that lock.
static void *file_writer(void *argument) {
  struct vmm *v = argument;
  uint64_t state = hostile_now();
  const size_t blocks = hostile_blocks(v);
  while (!v->stops) {
    const size_t from = hostile_random(&state) % blocks, to = hostile_random(&state) % blocks;
    // Whatever is there afterwards is the guest's own doing.
    (void)!pwrite(v->memory_file, v->base + from * BLOCK, BLOCK, (off_t)(to * BLOCK));
    atomic_fetch_add(&v->rounds, 1);
  }
  return NULL;
}

static void *unchecked_toucher(void *argument) {
  struct vmm *v = argument;
  uint64_t state = hostile_now(), first, last;
  while (!v->stops) {
    const size_t block = hostile_random(&state) % hostile_blocks(v);
    if (hostile_guarded_load(v->base + block * BLOCK, &first, &last) != 0) {
      atomic_fetch_add(&v->errors, 1);
    }
    atomic_fetch_add(&v->touches, 1);
  }
  return NULL;
}

int hostile_own_file(struct vmm *v) {
  v->protocol = MINOR;
  const int status = hostile_begin(v);
  if (status != 0) return status;
  if (hostile_start_many(v->threads, file_writer, v) != 0) return -1;
  if (hostile_start_many(v->threads, unchecked_toucher, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}
