// SPDX-License-Identifier: Apache-2.0
//
// Guests whose mappings change while they are served.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

/// Moves pieces away, looks at them, and moves them back (mremap(2)), again and again.
static void *mover(void *argument) {
  struct vmm *v = argument;
  const size_t pieces = v->length / v->piece;
  char *room = mmap(NULL, v->piece, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  uint64_t state = v->seed;
  while (!v->stops && room != MAP_FAILED) {
    const size_t piece = hostile_random(&state) % pieces;
    char *home = v->base + piece * v->piece;
    const size_t block = piece * v->piece / BLOCK + hostile_random(&state) % (v->piece / BLOCK);
    if (mremap(home, v->piece, v->piece, MREMAP_MAYMOVE | MREMAP_FIXED, room) == MAP_FAILED) break;
    uint64_t first = 0, last = 0;
    const char *moved = room + (block * BLOCK - piece * v->piece);
    const int failed = hostile_guarded_load(moved, &first, &last);
    atomic_fetch_add(&v->touches, 1);
    if (failed) {
      atomic_fetch_add(&v->errors, 1);
    } else if (first == 0 && last == 0 && (!v->socket_path || v->is_lax)) {
      atomic_fetch_add(&v->zeros, 1);
    } else if (first != hostile_word(block, 0) || last != hostile_word(block, 511)) {
      atomic_fetch_add(&v->wrong, 1);
    }
    if (mremap(room, v->piece, v->piece, MREMAP_MAYMOVE | MREMAP_FIXED, home) == MAP_FAILED) break;
    // What mremap(2) leaves behind is nobody's; keep it ours.
    room = mmap(room, v->piece, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    hostile_check(v, block);
    atomic_fetch_add(&v->rounds, 1);
    if (v->pause_us) hostile_pause(v->pause_us);
  }
  return NULL;
}

int hostile_moves(struct vmm *v) {
  if (v->other == NULL) {
    v->features = UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP;
  } else {
    // Without the event what moves is not registered any more, and becomes zero.
    v->is_lax = true;
  }
  const int status = hostile_begin(v);
  if (status != 0) return status;
  if (hostile_start(mover, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}

/// Unmaps pieces, maps something new there, and registers that.
static void *replacer(void *argument) {
  struct vmm *v = argument;
  const size_t pieces = v->length / v->piece;
  uint64_t state = v->seed;
  while (!v->stops) {
    char *piece = v->base + hostile_random(&state) % pieces * v->piece;
    munmap(piece, v->piece);
    // Another thread's memory may land there first; then that piece is not ours any more.
    if (mmap(piece, v->piece, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1,
             0) == MAP_FAILED) {
      continue;
    }
    if (v->socket_path) (void)hostile_register(v, piece, v->piece, UFFDIO_REGISTER_MODE_MISSING);
    atomic_fetch_add(&v->rounds, 1);
    if (v->pause_us) hostile_pause(v->pause_us);
  }
  return NULL;
}

/// Touches the pieces from this thread alone, between two changes.
int hostile_replacements(struct vmm *v) {
  v->is_lax = true;
  v->features = v->other ? 0 : UFFD_FEATURE_EVENT_UNMAP;
  const int status = hostile_begin(v);
  if (status != 0) return status;
  // All threads before anything is unmapped: their stacks are not to land in it.
  if (hostile_start(replacer, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}

/// Cuts the mapping into as many pieces as the kernel lets it, and joins them again (mprotect(2)).
static void *splitter(void *argument) {
  struct vmm *v = argument;
  while (!v->stops) {
    for (size_t offset = 0; offset < v->length && !v->stops; offset += 2 * v->page_size) {
      mprotect(v->base + offset, v->page_size, PROT_READ);
      atomic_fetch_add(&v->rounds, 1);
      if (v->pause_us) hostile_pause(v->pause_us);
    }
    mprotect(v->base, v->length, PROT_READ | PROT_WRITE);
  }
  return NULL;
}

/// Touches blocks in their order, so that the service fills ahead, over the cuts.
static void *orderly_toucher(void *argument) {
  struct vmm *v = argument;
  for (size_t block = 0; block < hostile_blocks(v) && !v->stops; block++) hostile_check(v, block);
  return hostile_toucher(v);
}

int hostile_splits(struct vmm *v) {
  const int status = hostile_begin(v);
  if (status != 0) return status;
  if (hostile_start(splitter, v) != 0) return -1;
  if (hostile_start_many(v->threads, v->other ? orderly_toucher : hostile_toucher, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}

// Ranges that nobody described.

struct range {
  struct vmm *vmm;
  char *start;
  size_t length, step;
};

static void *range_toucher(void *argument) {
  const struct range *range = argument;
  struct vmm *v = range->vmm;
  uint64_t state = (uint64_t)&range;
  while (!v->stops) {
    uint64_t first = 0, last = 0;
    const size_t page = hostile_random(&state) % (range->length / range->step);
    const int failed = hostile_guarded_load(range->start + page * range->step, &first, &last);
    atomic_fetch_add(&v->touches, 1);
    if (failed) {
      atomic_fetch_add(&v->errors, 1);
    } else if (first != 0 || last != 0) {
      // Nothing of the image, or of somebody else, may come to a place that was not described.
      atomic_fetch_add(&v->wrong, 1);
    } else {
      atomic_fetch_add(&v->zeros, 1);
    }
  }
  return NULL;
}

/// Registers memory that the hand-over did not describe, and touches it.
int hostile_undescribed(struct vmm *v) {
  const bool is_huge = v->other != NULL;
  int status = hostile_begin(v);
  if (status != 0) return status;
  static struct range range;
  range.vmm = v;
  range.length = is_huge ? (size_t)8 * HUGE_PAGE : (size_t)1 << 30;
  range.step = is_huge ? HUGE_PAGE : BLOCK;
  range.start = mmap(NULL, range.length, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
                         (is_huge ? MAP_HUGETLB | 21 << 26 : 0),
                     -1, 0);
  if (range.start == MAP_FAILED) return STATUS_CANNOT;
  if (!is_huge) madvise(range.start, range.length, MADV_NOHUGEPAGE);
  if (v->socket_path &&
      hostile_register(v, range.start, range.length, UFFDIO_REGISTER_MODE_MISSING) != 0) {
    return STATUS_CANNOT;
  }
  if (hostile_start_many(v->threads, range_toucher, &range) != 0) return -1;
  if (hostile_start(hostile_toucher, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}
