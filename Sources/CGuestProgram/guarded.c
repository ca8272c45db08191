// SPDX-License-Identifier: Apache-2.0
//
// Access to memory that may raise SIGBUS (a page that userfaultfd poisoned, a hole beyond
// the end of a memory object) or SIGSEGV (nothing is mapped there).
#define _GNU_SOURCE
#include "CGuestProgram.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>

int cguest_run_routine(void *base, struct cguest_workload *workload);

#ifndef BUS_MCEERR_AR
#define BUS_MCEERR_AR 4
#endif

static _Thread_local volatile sig_atomic_t guarded;
static _Thread_local sigjmp_buf guard_return;
static _Thread_local volatile uint64_t guard_address;
static _Thread_local int guard_ready;
static _Thread_local volatile sig_atomic_t vcpu_watched;
static _Thread_local volatile sig_atomic_t vcpu_faulted;

static struct sigaction previous_bus, previous_segv;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

static void on_fault(int signal, siginfo_t *info, void *context) {
  guard_address = (uint64_t)(uintptr_t)info->si_addr;
  if (guarded) {
    guarded = 0;
    siglongjmp(guard_return, 1);
  }
  // Sent by KVM_RUN for a poisoned page: no instruction of this thread is at fault, so
  // returning ends KVM_RUN with EINTR.
  if (vcpu_watched && signal == SIGBUS && info->si_code == BUS_MCEERR_AR) {
    vcpu_faulted = 1;
    return;
  }
  // Not ours: whoever was there before has the say. A default action is put back, and the
  // instruction runs into it again.
  const struct sigaction *previous = signal == SIGBUS ? &previous_bus : &previous_segv;
  if (previous->sa_flags & SA_SIGINFO) {
    previous->sa_sigaction(signal, info, context);
  } else if (previous->sa_handler == SIG_DFL || previous->sa_handler == SIG_IGN) {
    sigaction(signal, previous, NULL);
  } else {
    previous->sa_handler(signal);
  }
}

static void install(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  // NODEFER: a jump out of the handler leaves the signal mask as it was.
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &previous_bus);
  sigaction(SIGSEGV, &action, &previous_segv);
}

// A fault of a thread that blocks its signal would kill the process whatever the handler.
static void prepare_thread(void) {
  if (guard_ready) return;
  pthread_once(&installed, install);
  sigset_t faults;
  sigemptyset(&faults);
  sigaddset(&faults, SIGBUS);
  sigaddset(&faults, SIGSEGV);
  pthread_sigmask(SIG_UNBLOCK, &faults, NULL);
  guard_ready = 1;
}

int cguest_run_batch(void *base, struct cguest_workload *workload, struct cguest_fault *fault) {
  prepare_thread();
  if (sigsetjmp(guard_return, 0)) {
    fault->happened = 1;
    fault->address = guard_address;
    return 0;
  }
  guarded = 1;
  int more = cguest_run_routine(base, workload);
  guarded = 0;
  fault->happened = 0;
  return more;
}

struct cguest_fault cguest_guarded_copy(void *to, const void *from, size_t length) {
  prepare_thread();
  if (sigsetjmp(guard_return, 0))
    return (struct cguest_fault){.happened = 1, .address = guard_address};
  guarded = 1;
  // The compiler must not move the copy out of the guarded part.
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  memcpy(to, from, length);
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  guarded = 0;
  return (struct cguest_fault){.happened = 0};
}

struct cguest_fault cguest_guarded_touch(uint64_t address, int write, uint64_t *value) {
  prepare_thread();
  if (sigsetjmp(guard_return, 0))
    return (struct cguest_fault){.happened = 1, .address = guard_address};
  uint64_t *word = (uint64_t *)(uintptr_t)address;
  guarded = 1;
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  // Adding zero would do, but a compiler may turn that into a read.
  if (write) __asm__ volatile("lock addq $0, %0" : "+m"(*word) : : "memory", "cc");
  *value = __atomic_load_n(word, __ATOMIC_SEQ_CST);
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  guarded = 0;
  return (struct cguest_fault){.happened = 0};
}

void cguest_watch_vcpu_thread(void) {
  prepare_thread();
  vcpu_watched = 1;
}

struct cguest_fault cguest_take_vcpu_fault(void) {
  struct cguest_fault fault = {.happened = vcpu_faulted, .address = guard_address};
  vcpu_faulted = 0;
  return fault;
}
