// SPDX-License-Identifier: Apache-2.0
//
// The guest that does nothing wrong: it touches each page once, in a random order, times that, and
// compares all of it; then it hands over new memory and begins again, unless it is told to go on with
// that (`other`).
#define _GNU_SOURCE 1
#include "hostile.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST_TIMES = 1 << 22 };

static struct {
  uint32_t *touches, *first;
  size_t touch_count, first_count;
  _Atomic bool is_done;
  int status;
} times;

static int compare(const void *left, const void *right) {
  const uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
  return a < b ? -1 : a > b;
}

/// The value that so many thousandths are not above, in microseconds.
static double quantile(const uint32_t *sorted, size_t count, size_t thousandths) {
  return count == 0 ? 0 : (double)sorted[(count - 1) * thousandths / 1000] / 10;
}

/// In units of 100 ns, for at most 7 minutes.
static uint32_t since(uint64_t start) {
  const uint64_t time = (hostile_now() - start) / 100;
  return time > UINT32_MAX ? UINT32_MAX : (uint32_t)time;
}

static void compare_block(struct vmm *v, size_t block) {
  const uint64_t *words = (const uint64_t *)(v->base + block * BLOCK);
  for (size_t index = 0; index < BLOCK / sizeof *words; index++) {
    if (words[index] == hostile_word(block, index)) continue;
    atomic_fetch_add(&v->wrong, 1);
    if (words[index] == 0) atomic_fetch_add(&v->zeros, 1);
    return;
  }
}

/// One hand-over, and all of its pages.
static int serve_once(struct vmm *v, size_t *order, uint64_t *state) {
  const uint64_t start = hostile_now();
  int status = hostile_make_memory(v);
  if (status == 0 && v->socket_path) status = hostile_hand_over(v);
  const size_t pages = v->pages, blocks_of_page = v->page_size / BLOCK;
  for (size_t i = 0; i < pages; i++) order[i] = i;
  for (size_t i = pages; i > 1; i--) {
    const size_t other = hostile_random(state) % i, kept = order[i - 1];
    order[i - 1] = order[other];
    order[other] = kept;
  }
  for (size_t i = 0; status == 0 && i < pages && !hostile_is_over(v); i++) {
    uint64_t first = 0, last = 0;
    const size_t block = order[i] * blocks_of_page;
    const uint64_t touch = hostile_now();
    const int failed = hostile_guarded_load(v->base + block * BLOCK, &first, &last);
    if (i == 0) {
      if (times.first_count < MOST_TIMES) times.first[times.first_count++] = since(start);
    } else if (times.touch_count < MOST_TIMES) {
      times.touches[times.touch_count++] = since(touch);
    }
    atomic_fetch_add(&v->touches, 1);
    if (failed) {
      atomic_fetch_add(&v->errors, 1);
    } else {
      for (size_t part = 0; part < blocks_of_page; part++) compare_block(v, block + part);
    }
    if (v->pause_us) hostile_pause(v->pause_us);
  }
  hostile_end(v);
  return status;
}

static void *live(void *argument) {
  struct vmm *v = argument;
  uint64_t state = v->seed;
  size_t *order = malloc(v->pages * sizeof *order);
  while (order && !hostile_is_over(v) && !(v->other && v->rounds > 0)) {
    const int status = serve_once(v, order, &state);
    if (status == 0) {
      atomic_fetch_add(&v->rounds, 1);
    } else {
      // Refused, or nobody is there: an honest guest should not have to see that.
      times.status = status;
      atomic_fetch_add(&v->stuck, 1);
      usleep(1000);
    }
  }
  times.is_done = true;
  return NULL;
}

int hostile_honest(struct vmm *v) {
  times.touches = calloc(MOST_TIMES, sizeof *times.touches);
  times.first = calloc(MOST_TIMES, sizeof *times.first);
  if (!times.touches || !times.first || hostile_start(live, v) != 0) return -1;
  // A page that does not come is waited for so long, and then reported.
  const uint64_t longest = hostile_now() + v->milliseconds * UINT64_C(1000000) + UINT64_C(30000000000);
  while (!times.is_done && hostile_now() < longest) usleep(1000);
  if (!times.is_done) atomic_fetch_add(&v->stuck, 1000000);
  qsort(times.touches, times.touch_count, sizeof *times.touches, compare);
  qsort(times.first, times.first_count, sizeof *times.first, compare);
  printf("p50-us=%.1f p99-us=%.1f max-us=%.1f handover-us=%.1f handover-max-us=%.1f\n",
         quantile(times.touches, times.touch_count, 500),
         quantile(times.touches, times.touch_count, 990),
         quantile(times.touches, times.touch_count, 1000),
         quantile(times.first, times.first_count, 500),
         quantile(times.first, times.first_count, 1000));
  return times.status;
}
