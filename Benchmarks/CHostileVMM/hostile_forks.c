// SPDX-License-Identifier: Apache-2.0
//
// Guests that fork, that die, and that leave when nobody expects it.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CHILD_TOUCHES = 8, MOST_CHILDREN = 1024 };

/// fork(2) without what the C library does around it: locks of other threads are nothing to a child
/// that only touches memory.
static pid_t plain_fork(void) { return (pid_t)syscall(SYS_fork); }

/// What all processes of a guest count together.
static struct vmm *shared(struct vmm *v) {
  struct vmm *copy = mmap(NULL, sizeof *copy, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (copy == MAP_FAILED) return NULL;
  memcpy(copy, v, sizeof *copy);
  return copy;
}

static void take_counts(struct vmm *v, struct vmm *from) {
  v->touches = from->touches;
  v->wrong = from->wrong;
  v->errors = from->errors;
  v->zeros = from->zeros;
  v->rounds = from->rounds;
  v->stuck = from->stuck;
}

/// Waits for a child; after some time it is killed, and counts as stuck.
static void wait_for(struct vmm *v, pid_t child, unsigned milliseconds) {
  const uint64_t end = hostile_now() + milliseconds * UINT64_C(1000000);
  while (waitpid(child, NULL, WNOHANG) == 0) {
    if (hostile_now() > end) {
      atomic_fetch_add(&v->stuck, 1);
      kill(child, SIGKILL);
      waitpid(child, NULL, 0);
      return;
    }
    usleep(200);
  }
}

static void touch_as_child(struct vmm *v, uint64_t seed) {
  for (int i = 0; i < CHILD_TOUCHES; i++) {
    hostile_check(v, hostile_random(&seed) % hostile_blocks(v));
  }
}

/// Connections that say nothing, as many as are given: descriptors of the service.
static void hold_connections(struct vmm *v, unsigned count) {
  for (unsigned i = 0; v->socket_path && i < count; i++) {
    if (hostile_connect(v->socket_path) < 0) return;
  }
}

static int fork_again_and_again(struct vmm *v) {
  v->features = UFFD_FEATURE_EVENT_FORK;
  const int status = hostile_begin(v);
  if (status != 0) return status;
  struct vmm *s = shared(v);
  if (!s) return -1;
  if (v->other) hold_connections(s, 200);
  // Forks never return when nobody reads their events.
  alarm(s->milliseconds / 1000 + 10);
  for (uint64_t round = 1; !hostile_is_over(s); round++) {
    const pid_t child = plain_fork();
    if (child == 0) {
      touch_as_child(s, s->seed + round);
      _exit(0);
    }
    if (child < 0) {
      usleep(1000);
      continue;
    }
    atomic_fetch_add(&s->rounds, 1);
    wait_for(s, child, 2000);
    if (s->pause_us) hostile_pause(s->pause_us);
  }
  take_counts(v, s);
  return 0;
}

/// Forks, and each child touches pages that are not there: an error, or the image's content.
int hostile_forks(struct vmm *v) { return fork_again_and_again(v); }

/// The same with children that stay, each of them with a userfaultfd that the service has.
int hostile_children(struct vmm *v) {
  v->features = UFFD_FEATURE_EVENT_FORK;
  const int status = hostile_begin(v);
  if (status != 0) return status;
  struct vmm *s = shared(v);
  pid_t *children = calloc(MOST_CHILDREN, sizeof *children);
  if (!s || !children) return -1;
  const unsigned most = s->threads < MOST_CHILDREN ? s->threads : MOST_CHILDREN;
  unsigned count = 0;
  while (!hostile_is_over(s)) {
    if (count == most) {
      usleep(1000);
      continue;
    }
    const pid_t child = plain_fork();
    if (child == 0) {
      touch_as_child(s, s->seed + count);
      for (;;) pause();
    }
    if (child < 0) {
      usleep(1000);
      continue;
    }
    children[count++] = child;
    atomic_fetch_add(&s->rounds, 1);
  }
  for (unsigned i = 0; i < count; i++) kill(children[i], SIGKILL);
  for (unsigned i = 0; i < count; i++) waitpid(children[i], NULL, 0);
  take_counts(v, s);
  return 0;
}

// Ends.

static void *removing(void *argument) {
  struct vmm *v = argument;
  uint64_t state = hostile_now();
  while (!v->stops) {
    const size_t offset = hostile_random(&state) % (v->length / v->page_size) * v->page_size;
    (void)hostile_give_back(v, offset, v->page_size, MADV_DONTNEED);
  }
  return NULL;
}

/// A guest in a process of its own, which touches and gives back until it is killed.
static void live(struct vmm *v, int told) {
  if (hostile_begin(v) != 0) _exit(1);
  hostile_start_many(v->threads, hostile_toucher, v);
  hostile_start(removing, v);
  if (told >= 0) (void)!write(told, v->session, strlen(v->session) + 1);
  for (;;) pause();
}

/// Guests that are killed at any moment, one after the other.
int hostile_dying(struct vmm *v) {
  struct vmm *s = shared(v);
  if (!s) return -1;
  uint64_t state = s->seed;
  while (!hostile_is_over(s)) {
    const pid_t child = fork();
    if (child == 0) live(s, -1);
    if (child < 0) return -1;
    usleep((useconds_t)(hostile_random(&state) % 30000));
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    atomic_fetch_add(&s->rounds, 1);
  }
  take_counts(v, s);
  return 0;
}

static int request(const char *path, const char *method, const char *target) {
  char text[256];
  const int socket = hostile_connect(path);
  if (socket < 0) return -1;
  snprintf(text, sizeof text, "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", method, target);
  int result = hostile_send(socket, text, strlen(text), NULL, 0);
  // Not read to its end: the answer may be a while.
  if (result == 0 && recv(socket, text, 12, 0) <= 0) result = -1;
  close(socket);
  return result;
}

/// Guests of which an operator has the service let go, and which close, or die, at that moment.
int hostile_leaving(struct vmm *v) {
  struct vmm *s = shared(v);
  if (!s) return -1;
  uint64_t state = s->seed;
  while (!hostile_is_over(s)) {
    int told[2];
    char session[32] = "", target[64];
    if (pipe(told) != 0) return -1;
    const pid_t child = fork();
    if (child == 0) live(s, told[1]);
    close(told[1]);
    const ssize_t length = child > 0 ? read(told[0], session, sizeof session - 1) : 0;
    close(told[0]);
    if (child > 0 && length > 0 && s->control_path) {
      snprintf(target, sizeof target, "/v1/sessions/%s", session);
      (void)request(s->control_path, "DELETE", target);
    }
    usleep((useconds_t)(hostile_random(&state) % 3000));
    if (child > 0) {
      kill(child, SIGKILL);
      waitpid(child, NULL, 0);
    }
    atomic_fetch_add(&s->rounds, 1);
  }
  take_counts(v, s);
  return 0;
}
