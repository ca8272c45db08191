// SPDX-License-Identifier: Apache-2.0
//
// Guests that make more events than anybody can handle, and faults that nobody resolves.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/// Gives back one piece after the other, at a pace.
static void *giver(void *argument) {
  struct vmm *v = argument;
  uint64_t state = hostile_now();
  const size_t piece = v->piece < v->length ? v->piece : v->length;
  const size_t pieces = v->length / piece;
  while (!v->stops) {
    const size_t offset = hostile_random(&state) % pieces * piece;
    // Refused (alignment of huge pages): it is a storm of errors then.
    (void)hostile_give_back(v, offset, piece, v->advice);
    atomic_fetch_add(&v->rounds, 1);
    if (v->pause_us) hostile_pause(v->pause_us);
  }
  return NULL;
}

/// madvise(2) again and again, while some threads touch what was given back.
int hostile_storm(struct vmm *v) {
  const int status = hostile_begin(v);
  if (status != 0) return status;
  if (hostile_start_many(v->givers, giver, v) != 0) return -1;
  if (hostile_start_many(v->threads, hostile_toucher, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}

/// As many threads as are asked for fault at once, and one gives back all the time.
int hostile_swarm(struct vmm *v) {
  v->pause_us = 0;
  return hostile_storm(v);
}

static void *short_life(void *argument) {
  struct vmm *v = argument;
  uint64_t state = hostile_now();
  for (int i = 0; i < 4; i++) hostile_check(v, hostile_random(&state) % hostile_blocks(v));
  atomic_fetch_sub(&v->stuck, 1);
  return NULL;
}

/// Threads that come, touch a few pages and go; many at a time.
int hostile_threads(struct vmm *v) {
  const int status = hostile_begin(v);
  if (status != 0) return status;
  while (!hostile_is_over(v)) {
    if (v->stuck < v->threads && hostile_start(short_life, v) == 0) {
      atomic_fetch_add(&v->stuck, 1);
      atomic_fetch_add(&v->rounds, 1);
    } else {
      usleep(100);
    }
    // What is there already does not fault again.
    if (v->rounds % 256 == 0) (void)hostile_give_back(v, 0, v->length, MADV_DONTNEED);
  }
  hostile_sleep(v);
  return 0;
}

// Write protection.

static int protect(struct vmm *v, bool enabled) {
  struct uffdio_writeprotect request = {.range = {.start = (uint64_t)v->base, .len = v->length},
                                        .mode = enabled ? UFFDIO_WRITEPROTECT_MODE_WP : 0};
  return ioctl(v->userfaultfd, UFFDIO_WRITEPROTECT, &request);
}

/// Writes what a block has already, so that its content stays.
static void *writer(void *argument) {
  struct vmm *v = argument;
  uint64_t state = hostile_now();
  while (!v->stops) {
    const size_t block = hostile_random(&state) % hostile_blocks(v);
    *(volatile uint64_t *)(v->base + block * BLOCK) = hostile_word(block, 0);
    atomic_fetch_add(&v->rounds, 1);
  }
  return NULL;
}

static int protect_and_write(struct vmm *v) {
  for (size_t block = 0; block < hostile_blocks(v); block++) hostile_check(v, block);
  if (v->socket_path && protect(v, true) != 0) return STATUS_CANNOT;
  if (hostile_start_many(v->threads, writer, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}

/// Registers for write protection, protects, and writes: faults that the service does not resolve.
int hostile_write_protect(struct vmm *v) {
  v->features = UFFD_FEATURE_PAGEFAULT_FLAG_WP;
  if (v->protocol == MINOR) v->features |= UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
  if (hostile_make_memory(v) != 0) return STATUS_CANNOT;
  if (v->socket_path) {
    if (hostile_register(v, v->base, v->length,
                         hostile_register_mode(v) | UFFDIO_REGISTER_MODE_WP) != 0) {
      return STATUS_CANNOT;
    }
    const int status = hostile_hand_over(v);
    if (status != 0) return status;
  }
  return protect_and_write(v);
}

/// The same, but registered when it is served already, and without the feature.
int hostile_write_protect_silently(struct vmm *v) {
  const int status = hostile_begin(v);
  if (status != 0) return status;
  if (v->socket_path && hostile_register(v, v->base, v->length,
                                         hostile_register_mode(v) | UFFDIO_REGISTER_MODE_WP) != 0) {
    return STATUS_CANNOT;
  }
  return protect_and_write(v);
}

/// UFFD_FEATURE_SIGBUS: a page that is not there is an error, and no fault.
int hostile_signals(struct vmm *v) {
  v->features = UFFD_FEATURE_SIGBUS;
  return hostile_storm(v);
}

// Flags.

/// Has reads of the userfaultfd sleep: the flag belongs to the open file, which the service shares.
static void *flag_clearer(void *argument) {
  struct vmm *v = argument;
  while (!v->stops) {
    if (v->userfaultfd >= 0) fcntl(v->userfaultfd, F_SETFL, 0);
    atomic_fetch_add(&v->rounds, 1);
    hostile_pause(v->pause_us);
  }
  return NULL;
}

static void *slow_toucher(void *argument) {
  struct vmm *v = argument;
  uint64_t state = v->seed;
  while (!v->stops) {
    hostile_check(v, hostile_random(&state) % hostile_blocks(v));
    // Time for the service to read again when there is nothing.
    hostile_pause(2000);
  }
  return NULL;
}

int hostile_blocking(struct vmm *v) {
  const int status = hostile_begin(v);
  if (status != 0) return status;
  if (hostile_start(flag_clearer, v) != 0) return -1;
  if (hostile_start_many(v->threads, slow_toucher, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}
