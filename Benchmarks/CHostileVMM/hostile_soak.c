// SPDX-License-Identifier: Apache-2.0
//
// A guest of which it is known for each block of 4 KiB what has to be in it: it reads, writes, and
// gives back pieces that need not be whole pages, at random.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <errno.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST_OPERATIONS_OF_ROUND = 1500, WORDS = BLOCK / 8 };

/// What has to be in a block. Numbers from `WRITTEN` on are generations of what the guest wrote.
enum { CONTENT, ZERO, CONTENT_OR_ZERO, FAILED, WRITTEN };

/// What was done to which blocks in this round.
static struct {
  char what;
  uint32_t first, length;
} history[MOST_OPERATIONS_OF_ROUND];
static size_t history_length;

static void remember(char what, size_t first, size_t length) {
  if (history_length == MOST_OPERATIONS_OF_ROUND) return;
  history[history_length].what = what;
  history[history_length].first = (uint32_t)first;
  history[history_length++].length = (uint32_t)length;
}

/// All that concerned a page, in words for a person.
static void tell_history(size_t page, size_t blocks_of_page) {
  fprintf(stderr, "soak: of this page (blocks of it; r read, w written, d DONTNEED, m REMOVE):");
  for (size_t i = 0; i < history_length; i++) {
    const size_t first = history[i].first, end = first + history[i].length;
    const size_t start = page * blocks_of_page;
    if (end <= start || first >= start + blocks_of_page) continue;
    fprintf(stderr, " %c%ld+%zu", history[i].what, (long)first - (long)start, end - first);
  }
  fprintf(stderr, "\n");
}

static uint32_t *blocks;
static uint32_t generation = WRITTEN;
static _Atomic bool stops_readers;

static uint64_t written_word(size_t block, uint32_t value, size_t index) {
  return hostile_word(block + ((size_t)value << 24), index);
}

static uint64_t expected(size_t block, uint32_t value, size_t index) {
  if (value == ZERO) return 0;
  return value == CONTENT ? hostile_word(block, index) : written_word(block, value, index);
}

static void tell(const struct vmm *v, size_t block, uint32_t value, uint64_t found, size_t index) {
  if (v->wrong > 20) return;
  if (v->wrong == 1) tell_history(block / (v->page_size / BLOCK), v->page_size / BLOCK);
  const char *kind = found == 0                           ? "zero"
                     : found == hostile_word(block, index) ? "the image's content"
                                                           : "something else";
  fprintf(stderr, "soak: block %zu of page %zu: %s in place of %s\n", block % (v->page_size / BLOCK),
          block / (v->page_size / BLOCK), kind,
          value == CONTENT ? "content"
          : value == ZERO  ? "zero"
          : value == CONTENT_OR_ZERO ? "content or zero"
                           : "what was written");
}

static void read_block(struct vmm *v, size_t block, size_t index) {
  uint64_t first = 0, last = 0;
  const char *start = v->base + block * BLOCK;
  uint32_t value = blocks[block];
  atomic_fetch_add(&v->touches, 1);
  if (hostile_guarded_load(start, &first, &last) != 0) {
    if (value != FAILED) atomic_fetch_add(&v->errors, 1);
    // The error is of the whole page; what is in it is gone.
    const size_t all = v->page_size / BLOCK, page = block / all * all;
    for (size_t i = page; i < page + all; i++) blocks[i] = FAILED;
    return;
  }
  if (value == FAILED) {
    // It came after all: then it is right or zero.
    value = CONTENT_OR_ZERO;
  }
  if (value == CONTENT_OR_ZERO) value = blocks[block] = first == 0 ? ZERO : CONTENT;
  const uint64_t middle = *(const volatile uint64_t *)(start + index * 8);
  const uint64_t found[3] = {first, middle, last};
  const size_t places[3] = {0, index, WORDS - 1};
  for (int i = 0; i < 3; i++) {
    if (found[i] == expected(block, value, places[i])) continue;
    atomic_fetch_add(&v->wrong, 1);
    tell(v, block, value, found[i], places[i]);
    // Counted once.
    blocks[block] = CONTENT_OR_ZERO;
    return;
  }
}

static void write_block(struct vmm *v, size_t block) {
  // Brings it, or finds that it cannot be had.
  read_block(v, block, 1);
  if (blocks[block] == FAILED) return;
  // A generation has its own words up to 2^24 blocks.
  const uint32_t value = ++generation;
  volatile uint64_t *words = (volatile uint64_t *)(v->base + block * BLOCK);
  for (size_t index = 0; index < WORDS; index++) words[index] = written_word(block, value, index);
  blocks[block] = value;
}

/// What madvise(2) drops of a range: on huge pages MADV_DONTNEED takes whole ones, and refuses a start
/// that is not one's (mm/madvise.c, madvise_dontneed_free_valid_vma).
static void give_back(struct vmm *v, size_t offset, size_t length, int advice) {
  remember(advice == MADV_REMOVE ? 'm' : 'd', offset / BLOCK, length / BLOCK);
  const int result = madvise(v->base + offset, length, advice);
  const bool is_shared = v->protocol == MINOR;
  if (advice == MADV_REMOVE ? !is_shared : offset % v->page_size != 0) {
    if (result == 0) atomic_fetch_add(&v->stuck, 1);
    return;
  }
  if (result != 0) {
    fprintf(stderr, "soak: madvise: %s\n", strerror(errno));
    atomic_fetch_add(&v->stuck, 1);
    return;
  }
  if (advice == MADV_DONTNEED) length -= length % v->page_size;
  for (size_t block = offset / BLOCK; block < (offset + length) / BLOCK; block++) {
    if (advice == MADV_REMOVE || !is_shared) {
      blocks[block] = ZERO;
    } else if (blocks[block] == CONTENT) {
      // The page cache of shared memory keeps what it has; what it had not yet may be zero.
      blocks[block] = CONTENT_OR_ZERO;
    }
  }
}

static void give_something_back(struct vmm *v, uint64_t *state) {
  const size_t count = hostile_blocks(v), whole = v->page_size / BLOCK;
  size_t first = hostile_random(state) % count, length = 1;
  switch (hostile_random(state) % 4) {
  case 0:  // one block
    break;
  case 1:  // some blocks, of one page or two
    length = 1 + hostile_random(state) % (whole > 1 ? whole : 16);
    break;
  case 2:  // pages
    first -= first % whole;
    length = whole * (1 + hostile_random(state) % 2);
    break;
  default:  // from the beginning of a page, not to an end
    first -= first % whole;
    length = 1 + hostile_random(state) % (2 * whole);
    break;
  }
  if (length > count - first) length = count - first;
  const bool removes = hostile_random(state) % 8 != 0;
  give_back(v, first * BLOCK, length * BLOCK,
            (v->protocol == MINOR) == removes ? MADV_REMOVE : MADV_DONTNEED);
}

/// Touches what the guest gives back and writes meanwhile, so that there is a fault at that moment.
static void *reader(void *argument) {
  struct vmm *v = argument;
  uint64_t state = (uint64_t)&state, first, last;
  while (!stops_readers) {
    usleep((useconds_t)(hostile_random(&state) % (v->page_size == BLOCK ? 400 : 10000)));
    (void)hostile_guarded_load(v->base + hostile_random(&state) % hostile_blocks(v) * BLOCK, &first,
                               &last);
  }
  atomic_fetch_sub(&v->rounds, 1);
  return NULL;
}

/// New memory, an exclusive hand-over, and so many operations.
static int soak_once(struct vmm *v, uint64_t operations, uint64_t *state) {
  if (v->other && hostile_use_pool(v, v->length) != 0) return STATUS_CANNOT;
  if (hostile_make_memory(v) != 0) return STATUS_CANNOT;
  const int status = hostile_hand_over(v);
  if (status != 0) return status;
  const size_t count = hostile_blocks(v);
  memset(blocks, 0, count * sizeof *blocks);
  history_length = 0;
  v->stops = stops_readers = false;
  pthread_t thief;
  if (v->other && pthread_create(&thief, NULL, hostile_thief, v) != 0) return -1;
  v->rounds = v->threads;
  if (hostile_start_many(v->threads, reader, v) != 0) return -1;
  for (uint64_t i = 0; i < operations; i++) {
    const size_t block = hostile_random(state) % count;
    // At first most pages are not there yet: that is when giving back is hard.
    switch (hostile_random(state) % (i < operations / 2 ? 2 : 8)) {
    case 0:
      give_something_back(v, state);
      break;
    case 1:
    case 2:
      remember('w', block, 1);
      write_block(v, block);
      break;
    default:
      remember('r', block, 1);
      read_block(v, block, hostile_random(state) % WORDS);
      break;
    }
  }
  // Those that wait for a page go on while they are served.
  stops_readers = true;
  for (int i = 0; i < 30000 && v->rounds > 0; i++) usleep(1000);
  if (v->rounds > 0) atomic_fetch_add(&v->stuck, v->rounds);
  for (size_t block = 0; block < count; block++) read_block(v, block, block % WORDS);
  v->stops = true;
  if (v->other) {
    pthread_join(thief, NULL);
    hostile_close_pool();
  }
  hostile_end(v);
  return 0;
}

int hostile_soak(struct vmm *v) {
  blocks = calloc(hostile_blocks(v), sizeof *blocks);
  if (!blocks) return -1;
  uint64_t state = v->seed, done = 0, rounds = 0;
  // A round ends when most pages are there.
  const uint64_t most = 6 * v->pages < MOST_OPERATIONS_OF_ROUND ? 6 * v->pages
                                                                : MOST_OPERATIONS_OF_ROUND;
  while (done < v->operations) {
    const uint64_t part = v->operations - done < most ? v->operations - done : most;
    const int status = soak_once(v, part, &state);
    if (status != 0) return status;
    done += part;
    rounds++;
  }
  v->rounds = rounds;
  return 0;
}
