// SPDX-License-Identifier: Apache-2.0
//
// The memory of a guest, its hand-over, and what it finds in it.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

uint64_t hostile_random(uint64_t *state) {
  // splitmix64 (Steele, Lea, Flood 2014).
  uint64_t mixed = *state += 0x9E3779B97F4A7C15;
  mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9;
  mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB;
  return mixed ^ mixed >> 31;
}

uint64_t hostile_word(size_t block, size_t index) {
  uint64_t state = block;
  return (hostile_random(&state) << 10 | index << 1) | 1;
}

uint64_t hostile_now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

void hostile_pause(unsigned microseconds) {
  if (microseconds >= 500) {
    usleep(microseconds);
    return;
  }
  const uint64_t end = hostile_now() + microseconds * UINT64_C(1000);
  while (hostile_now() < end) {
  }
}

size_t hostile_blocks(const struct vmm *v) { return v->length / BLOCK; }

// Loads that may be SIGBUS.

static _Thread_local sigjmp_buf *guard;

static void on_sigbus(int signal) {
  (void)signal;
  if (!guard) _exit(1);
  siglongjmp(*guard, 1);
}

static void install(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_sigbus;
  action.sa_flags = SA_NODEFER;
  sigaction(SIGBUS, &action, NULL);
}

int hostile_guarded_load(const char *block, uint64_t *first, uint64_t *last) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, install);
  sigjmp_buf here;
  // Without the signal mask: the signal is never blocked here.
  if (sigsetjmp(here, 0) != 0) {
    guard = NULL;
    return -1;
  }
  guard = &here;
  *first = *(volatile const uint64_t *)block;
  *last = *(volatile const uint64_t *)(block + BLOCK - sizeof(uint64_t));
  guard = NULL;
  return 0;
}

void hostile_check(struct vmm *v, size_t block) {
  uint64_t first = 0, last = 0;
  const unsigned char before = atomic_load(&v->fates[block]);
  const int failed = hostile_guarded_load(v->base + block * BLOCK, &first, &last);
  const unsigned char after = atomic_load(&v->fates[block]);
  atomic_fetch_add(&v->touches, 1);
  if (failed) {
    atomic_fetch_add(&v->errors, 1);
  } else if (first == 0 || last == 0) {
    atomic_fetch_add(&v->zeros, 1);
    // The page may have been given back between the two loads, and does not come back.
    const bool is_right = first == 0 ? last == 0 || (v->is_lax && last == hostile_word(block, 511))
                                     : first == hostile_word(block, 0);
    const bool is_allowed = !v->socket_path || v->is_lax || after != HAS_CONTENT;
    if (!is_right || !is_allowed) atomic_fetch_add(&v->wrong, 1);
  } else if (first != hostile_word(block, 0) || last != hostile_word(block, 511) ||
             (before == IS_ZERO && !v->is_lax)) {
    atomic_fetch_add(&v->wrong, 1);
  }
}

int hostile_give_back(struct vmm *v, size_t offset, size_t length, int advice) {
  // MADV_DONTNEED keeps what the page cache of shared memory has.
  const bool keeps = v->protocol == MINOR && advice == MADV_DONTNEED;
  for (size_t block = offset / BLOCK; block < (offset + length) / BLOCK; block++) {
    if (v->fates[block] == HAS_CONTENT) v->fates[block] = MAY_BE_ZERO;
  }
  if (madvise(v->base + offset, length, advice) != 0) return -1;
  for (size_t block = offset / BLOCK; !keeps && block < (offset + length) / BLOCK; block++) {
    v->fates[block] = IS_ZERO;
  }
  return 0;
}

void *hostile_toucher(void *argument) {
  struct vmm *v = argument;
  uint64_t state = v->seed ^ (uint64_t)syscall(SYS_gettid) << 32;
  const size_t blocks = hostile_blocks(v);
  while (!v->stops) hostile_check(v, hostile_random(&state) % blocks);
  return NULL;
}

int hostile_start(void *(*body)(void *), void *argument) {
  pthread_attr_t attributes;
  pthread_t thread;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 64 << 10);
  const int failure = pthread_create(&thread, &attributes, body, argument);
  pthread_attr_destroy(&attributes);
  return failure ? -1 : 0;
}

int hostile_start_many(unsigned count, void *(*body)(void *), void *argument) {
  for (unsigned i = 0; i < count; i++) {
    if (hostile_start(body, argument) != 0) return i > 0 ? 0 : -1;
  }
  return 0;
}

static uint64_t end;

bool hostile_is_over(struct vmm *v) {
  if (end == 0) end = hostile_now() + v->milliseconds * UINT64_C(1000000);
  return hostile_now() >= end;
}

void hostile_sleep(struct vmm *v) {
  while (!hostile_is_over(v)) usleep(1000);
  v->stops = true;
  // Those that are not waiting for a page come to their end.
  usleep(10000);
}

// Memory.

int hostile_open_pool(size_t bytes) {
  char size[32];
  snprintf(size, sizeof size, "%zu", bytes);
  const int context = (int)syscall(SYS_fsopen, "hugetlbfs", FSOPEN_CLOEXEC);
  if (context < 0) return -errno;
  int root = -1;
  if (syscall(SYS_fsconfig, context, FSCONFIG_SET_STRING, "size", size, 0) == 0 &&
      syscall(SYS_fsconfig, context, FSCONFIG_SET_STRING, "pagesize", "2M", 0) == 0 &&
      syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0) {
    root = (int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC, 0);
  }
  const int failure = errno;
  close(context);
  return root < 0 ? -failure : root;
}

uint64_t hostile_register_mode(const struct vmm *v) {
  return UFFDIO_REGISTER_MODE_MISSING |
         (v->protocol == MINOR || v->protocol == CLONE ? UFFDIO_REGISTER_MODE_MINOR : 0);
}

int hostile_register(struct vmm *v, void *start, size_t length, uint64_t mode) {
  struct uffdio_register request = {.range = {.start = (uint64_t)start, .len = length}, .mode = mode};
  return ioctl(v->userfaultfd, UFFDIO_REGISTER, &request);
}

int hostile_make_memory(struct vmm *v) {
  const bool is_huge = v->page_size != BLOCK;
  if (!v->fates) v->fates = calloc(hostile_blocks(v), 1);
  if (!v->fates) return -1;
  if (v->protocol == MINOR && v->memory_file < 0) {
    v->memory_file = memfd_create("hostile", MFD_CLOEXEC | MFD_ALLOW_SEALING |
                                                 (is_huge ? MFD_HUGETLB | 21u << 26 : 0));
    if (v->memory_file < 0 || ftruncate(v->memory_file, (off_t)v->length) != 0) return -1;
    fcntl(v->memory_file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  }
  if (!v->base) {
    int flags = MAP_NORESERVE;
    if (v->protocol == MINOR) {
      flags |= MAP_SHARED;
    } else {
      flags |= MAP_PRIVATE;
      if (v->memory_file < 0) flags |= MAP_ANONYMOUS | (is_huge ? MAP_HUGETLB | 21 << 26 : 0);
    }
    v->base = mmap(NULL, v->length, PROT_READ | PROT_WRITE, flags, v->memory_file, 0);
    if (v->base == MAP_FAILED) return -1;
    if (!is_huge) madvise(v->base, v->length, MADV_NOHUGEPAGE);
  }
  if (!v->socket_path) return 0;
  v->userfaultfd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  if (v->userfaultfd < 0) return -1;
  struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE | v->features};
  if (is_huge) api.features |= UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
  if (v->protocol == MINOR || v->protocol == CLONE) {
    api.features |= UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM;
  }
  if (ioctl(v->userfaultfd, UFFDIO_API, &api) != 0) return -1;
  // A clone's comes with the image.
  if (v->protocol == CLONE) return 0;
  return hostile_register(v, v->base, v->length, hostile_register_mode(v));
}

int hostile_begin(struct vmm *v) {
  if (hostile_make_memory(v) != 0) {
    fprintf(stderr, "hostile: no memory: %s\n", strerror(errno));
    return STATUS_CANNOT;
  }
  const int status = v->socket_path ? hostile_hand_over(v) : 0;
  // The time begins when it is served.
  (void)hostile_is_over(v);
  return status;
}

void hostile_end(struct vmm *v) {
  if (v->connection >= 0 && v->reuses) {
    // The memory is the service's until it has closed, too (docs/handover.md).
    char rest[512];
    shutdown(v->connection, SHUT_WR);
    while (read(v->connection, rest, sizeof rest) > 0) {
    }
  }
  if (v->connection >= 0) close(v->connection);
  if (v->userfaultfd >= 0) close(v->userfaultfd);
  if (v->memory_file >= 0) close(v->memory_file);
  if (v->base && v->reuses) {
    munmap(v->base, v->length);
  } else if (v->base) {
    // A service that has not seen the end yet may still fill a page there: the kernel does not ask
    // whose userfaultfd memory is registered with (mm/userfaultfd.c, find_dst_vma).
    mmap(v->base, v->length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
  v->base = NULL;
  v->connection = v->userfaultfd = v->memory_file = -1;
}
