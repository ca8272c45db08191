// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE 1
#include "hostile.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

static const struct {
  const char *name;
  int (*run)(struct vmm *);
} roles[] = {
    {"honest", hostile_honest},
    {"soak", hostile_soak},
    {"storm", hostile_storm},
    {"swarm", hostile_swarm},
    {"threads", hostile_threads},
    {"write-protect", hostile_write_protect},
    {"write-protect-silently", hostile_write_protect_silently},
    {"signals", hostile_signals},
    {"blocking", hostile_blocking},
    {"messages", hostile_messages},
    {"connections", hostile_connections},
    {"handovers", hostile_handovers},
    {"forks", hostile_forks},
    {"children", hostile_children},
    {"dying", hostile_dying},
    {"leaving", hostile_leaving},
    {"moves", hostile_moves},
    {"replacements", hostile_replacements},
    {"splits", hostile_splits},
    {"undescribed", hostile_undescribed},
    {"shortage", hostile_shortage},
    {"own-file", hostile_own_file},
    {"fuse", hostile_fuse},
};

static const char *value(int count, char *const *words, const char *name) {
  const size_t length = strlen(name);
  for (int i = 0; i < count; i++) {
    if (strncmp(words[i], name, length) == 0 && words[i][length] == '=') return words[i] + length + 1;
  }
  return NULL;
}

static uint64_t number(int count, char *const *words, const char *name, uint64_t usual) {
  const char *text = value(count, words, name);
  return text ? strtoull(text, NULL, 10) : usual;
}

int hostile_main(int count, char *const *words) {
  // Whoever started it may be killed; nothing of it is to run on alone.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  signal(SIGPIPE, SIG_IGN);
  static struct vmm vmm;
  struct vmm *v = &vmm;
  v->role = value(count, words, "role");
  v->socket_path = value(count, words, "socket");
  v->control_path = value(count, words, "control");
  v->other = value(count, words, "other");
  v->pages = number(count, words, "pages", 4096);
  v->page_size = number(count, words, "page-size", BLOCK);
  v->milliseconds = (unsigned)number(count, words, "milliseconds", 1000);
  v->threads = (unsigned)number(count, words, "threads", 2);
  v->givers = (unsigned)number(count, words, "givers", 1);
  v->pause_us = (unsigned)number(count, words, "pause-us", 20);
  v->piece = number(count, words, "piece", 64 << 10);
  v->seed = number(count, words, "seed", 1);
  v->operations = number(count, words, "operations", 1000);
  v->reuses = number(count, words, "reuses", 0) != 0;
  v->userfaultfd = v->memory_file = v->connection = -1;
  const char *advice = value(count, words, "advice");
  v->advice = advice && strcmp(advice, "remove") == 0 ? MADV_REMOVE : MADV_DONTNEED;
  const char *protocol = value(count, words, "protocol");
  if (!protocol || strcmp(protocol, "missing") == 0) {
    v->protocol = MISSING;
  } else if (strcmp(protocol, "minor") == 0) {
    v->protocol = MINOR;
  } else if (strcmp(protocol, "clone") == 0) {
    v->protocol = CLONE;
  } else {
    v->protocol = FIRECRACKER;
  }
  v->length = v->pages * v->page_size;
  for (size_t i = 0; v->role && i < sizeof roles / sizeof *roles; i++) {
    if (strcmp(v->role, roles[i].name) != 0) continue;
    int status = roles[i].run(v);
    printf("touches=%llu wrong=%llu errors=%llu zeros=%llu rounds=%llu stuck=%llu\n",
           (unsigned long long)v->touches, (unsigned long long)v->wrong,
           (unsigned long long)v->errors, (unsigned long long)v->zeros,
           (unsigned long long)v->rounds, (unsigned long long)v->stuck);
    fflush(stdout);
    // Threads of it may be waiting for ever: exit(3) and its handlers are not for them.
    _exit(status == 0 && v->wrong > 0 ? STATUS_WRONG : status < 0 ? 1 : status);
  }
  fprintf(stderr, "hostile: there is no such role\n");
  return 1;
}
