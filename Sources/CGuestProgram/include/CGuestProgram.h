// SPDX-License-Identifier: Apache-2.0
//
// The test guest's program: workload routines that run unchanged inside a KVM guest
// (a copy of the program placed in guest memory, entered at `cguest_program_entry`)
// and in threads of this process (called where they lie).
#ifndef FAULTLINE_CGUESTPROGRAM_H
#define FAULTLINE_CGUESTPROGRAM_H

#include "cguest_layout.h"
#include <stddef.h>
#include <stdint.h>

/// One workload of one vCPU: its arguments, its position and its results.
///
/// A routine does at most `batch` positions in one call, keeps its place here and can
/// be called again. Pages are numbered by guest-physical address / 4096.
struct cguest_workload {
  /// CGUEST_COMMAND_*; 0 is idle.
  uint64_t command;
  /// What the content of the pages is derived from.
  uint64_t seed;
  /// The first page of the share.
  uint64_t first;
  /// Pages of the share.
  uint64_t count;
  /// The next position; 0 at the start.
  uint64_t position;
  /// The position to end at; for CGUEST_COMMAND_DIRTY the last generation.
  uint64_t limit;
  /// The order is a permutation of the numbers 0...mask (2^n - 1, not below count - 1).
  uint64_t mask;
  /// About half of the bits of `mask`, at least 1.
  uint64_t shift;
  /// CGUEST_ORDER_*.
  uint64_t order;
  /// Positions in one call.
  uint64_t batch;
  /// DIRTY: the generation being written. VERIFY: the one that was.
  uint64_t generation;
  /// VERIFY: the first page that a DIRTY workload wrote to.
  uint64_t dirty_first;
  /// VERIFY: how many pages it wrote to; 0 is none.
  uint64_t dirty_count;
  /// VERIFY: pages of those before this one have `generation`, the rest one less.
  uint64_t split;
  /// TOUCH: where the ticks of each touch go (uint32_t each); 0 is nowhere.
  uint64_t samples;
  /// TOUCH: 0 reads, 1 writes back what is there.
  uint64_t write;
  /// COUNTER: the byte offset of the counter from the start of memory.
  uint64_t target;
  /// Pages dealt with so far.
  uint64_t visited;
  /// VERIFY: pages with other content than they should have.
  uint64_t wrong;
  /// VERIFY: the lowest of them; all ones when there is none.
  uint64_t first_wrong;
  /// COUNTER: its value.
  uint64_t value;
  /// The state of the random numbers of CGUEST_ORDER_ZIPF; not 0.
  uint64_t random;
  /// Positions left of the batch under way.
  uint64_t remaining;
  uint64_t reserved;
};

_Static_assert(sizeof(struct cguest_workload) == CGUEST_WORKLOAD_SIZE, "cguest_workload");
#define CGUEST_CHECK(field, offset)                                                    \
  _Static_assert(offsetof(struct cguest_workload, field) == offset, "cguest_workload." #field)
CGUEST_CHECK(command, W_COMMAND);
CGUEST_CHECK(seed, W_SEED);
CGUEST_CHECK(first, W_FIRST);
CGUEST_CHECK(count, W_COUNT);
CGUEST_CHECK(position, W_POSITION);
CGUEST_CHECK(limit, W_LIMIT);
CGUEST_CHECK(mask, W_MASK);
CGUEST_CHECK(shift, W_SHIFT);
CGUEST_CHECK(order, W_ORDER);
CGUEST_CHECK(batch, W_BATCH);
CGUEST_CHECK(generation, W_GENERATION);
CGUEST_CHECK(dirty_first, W_DIRTY_FIRST);
CGUEST_CHECK(dirty_count, W_DIRTY_COUNT);
CGUEST_CHECK(split, W_SPLIT);
CGUEST_CHECK(samples, W_SAMPLES);
CGUEST_CHECK(write, W_WRITE);
CGUEST_CHECK(target, W_TARGET);
CGUEST_CHECK(visited, W_VISITED);
CGUEST_CHECK(wrong, W_WRONG);
CGUEST_CHECK(first_wrong, W_FIRST_WRONG);
CGUEST_CHECK(value, W_VALUE);
CGUEST_CHECK(random, W_RANDOM);
CGUEST_CHECK(remaining, W_REMAINING);

/// The program: position-independent code between two labels.
extern const uint8_t cguest_program_start[];
extern const uint8_t cguest_program_end[];
/// Where a KVM guest begins; inside the program.
extern const uint8_t cguest_program_entry[];

/// Bytes of the program.
static inline size_t cguest_program_size(void) {
  return (size_t)(cguest_program_end - cguest_program_start);
}
/// The program's first byte.
static inline const void *cguest_program_bytes(void) { return cguest_program_start; }
/// Where a KVM guest begins, in bytes from the start of the program.
static inline size_t cguest_program_entry_offset(void) {
  return (size_t)(cguest_program_entry - cguest_program_start);
}

/// What became of an access to memory that may be unreadable.
struct cguest_fault {
  /// 1 when the access raised SIGBUS or SIGSEGV.
  int happened;
  /// The address that did (si_addr).
  uint64_t address;
};

/// Runs one batch on memory of this process. Returns 1 when the workload has more to
/// do, else 0; also 0 after a fault, which `*fault` then tells.
int cguest_run_batch(void *base, struct cguest_workload *workload, struct cguest_fault *fault);

/// Copies `length` bytes, either side of which may fault.
struct cguest_fault cguest_guarded_copy(void *to, const void *from, size_t length);

/// Reads 8 bytes, and with `write` writes the same 8 bytes back in one atomic step.
/// `address` is a multiple of 8.
struct cguest_fault cguest_guarded_touch(uint64_t address, int write, uint64_t *value);

/// Makes SIGBUS that KVM_RUN raises for a poisoned page end the call with EINTR instead
/// of the process. For the calling thread; it lasts as long as the thread.
void cguest_watch_vcpu_thread(void);
/// The fault that the calling vCPU thread got since the last call.
struct cguest_fault cguest_take_vcpu_fault(void);

#endif
