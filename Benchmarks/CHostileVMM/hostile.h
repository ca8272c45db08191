// SPDX-License-Identifier: Apache-2.0
//
// What the parts of the hostile VMM share.
#ifndef FAULTLINE_HOSTILE_H
#define FAULTLINE_HOSTILE_H

#include "hostile_vmm.h"

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { BLOCK = 4096, HUGE_PAGE = 2 << 20 };
enum { STATUS_WRONG = 2, STATUS_REFUSED = 3, STATUS_CANNOT = 77 };

enum protocol { FIRECRACKER, MISSING, MINOR, CLONE };

/// What became of a block.
enum fate { HAS_CONTENT, MAY_BE_ZERO, IS_ZERO };

struct vmm {
  // What it was told.
  const char *role, *socket_path, *control_path, *other;
  enum protocol protocol;
  size_t pages, page_size, piece;
  unsigned milliseconds, threads, givers, pause_us;
  int advice;
  uint64_t seed, operations;
  // Its memory.
  uint64_t features;
  char *base;
  size_t length;
  int userfaultfd, memory_file, connection;
  char session[32];
  /// For each block an `enum fate`.
  _Atomic unsigned char *fates;
  /// It gave up what the image has (it maps something else there): zeros may be anywhere.
  bool is_lax;
  /// What it maps next is at the same addresses: it waits until the service has let go of them.
  bool reuses;
  // What it counted.
  _Atomic uint64_t touches, wrong, errors, zeros, rounds, stuck;
  _Atomic bool stops;
};

uint64_t hostile_now(void);
uint64_t hostile_random(uint64_t *state);
/// Waits, by spinning where the time is shorter than a sleep can be.
void hostile_pause(unsigned microseconds);

/// Reads the first and the last word of a block; 0, or -1 where that was a SIGBUS.
int hostile_guarded_load(const char *block, uint64_t *first, uint64_t *last);

/// Memory, a userfaultfd with features, and its registration. Where no service is given, memory alone.
int hostile_make_memory(struct vmm *v);
int hostile_register(struct vmm *v, void *start, size_t length, uint64_t mode);
uint64_t hostile_register_mode(const struct vmm *v);
/// Hands the memory over; returns 0, a status, or -1.
int hostile_hand_over(struct vmm *v);
/// All of that.
int hostile_begin(struct vmm *v);
/// The end of that; nothing is in its place afterwards, unless it `reuses` its addresses.
void hostile_end(struct vmm *v);
int hostile_connect(const char *path);
/// Sends all bytes, and a descriptor with the first.
int hostile_send(int socket, const void *bytes, size_t length, const int *descriptors, int count);

/// Touches a block and counts what it found.
void hostile_check(struct vmm *v, size_t block);
/// Gives bytes back by madvise(2); they are zero afterwards, or the call failed.
int hostile_give_back(struct vmm *v, size_t offset, size_t length, int advice);
/// Touches blocks in a random order until the end.
void *hostile_toucher(void *vmm);
/// Starts a thread that nobody joins.
int hostile_start(void *(*body)(void *), void *argument);
int hostile_start_many(unsigned count, void *(*body)(void *), void *argument);
/// Sleeps to the end of the time that there is.
void hostile_sleep(struct vmm *v);
bool hostile_is_over(struct vmm *v);
size_t hostile_blocks(const struct vmm *v);

/// Memory in huge pages of a pool of its own with a limit; who empties it; and its end.
int hostile_use_pool(struct vmm *v, size_t bytes);
void *hostile_thief(void *vmm);
void hostile_close_pool(void);

// Roles. Each begins with a `vmm` that has what it was told, and returns a status.
int hostile_honest(struct vmm *v);
int hostile_soak(struct vmm *v);
int hostile_storm(struct vmm *v);
int hostile_swarm(struct vmm *v);
int hostile_threads(struct vmm *v);
int hostile_write_protect(struct vmm *v);
int hostile_write_protect_silently(struct vmm *v);
int hostile_signals(struct vmm *v);
int hostile_blocking(struct vmm *v);
int hostile_messages(struct vmm *v);
int hostile_connections(struct vmm *v);
int hostile_handovers(struct vmm *v);
int hostile_forks(struct vmm *v);
int hostile_children(struct vmm *v);
int hostile_dying(struct vmm *v);
int hostile_leaving(struct vmm *v);
int hostile_moves(struct vmm *v);
int hostile_replacements(struct vmm *v);
int hostile_splits(struct vmm *v);
int hostile_undescribed(struct vmm *v);
int hostile_shortage(struct vmm *v);
int hostile_own_file(struct vmm *v);
int hostile_fuse(struct vmm *v);

#endif
