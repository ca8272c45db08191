// SPDX-License-Identifier: Apache-2.0
//
// Guests that say too much, too little, or nothing.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST_CONNECTIONS = 4096 };

/// A plain process says it to itself: to a socket of its own, whose other end is the second.
static int own_socket(int *peer) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return -1;
  *peer = pair[1];
  return pair[0];
}

static void *listener(void *argument) {
  const int *peer = argument;
  char sink[65536];
  while (read(*peer, sink, sizeof sink) > 0) {
  }
  return NULL;
}

static void *talker(void *argument) {
  struct vmm *v = argument;
  char *bytes = calloc(1, v->piece);
  int descriptors[16];
  const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  for (int i = 0; i < 16; i++) descriptors[i] = null;
  while (bytes && !v->stops) {
    // With descriptors, where they are asked for: each message is 16 of them.
    if (hostile_send(v->connection, bytes, v->piece, descriptors, v->other ? 16 : 0) != 0) {
      // The service has closed, which it may; it is connected again at the next hand-over only.
      usleep(1000);
    }
    atomic_fetch_add(&v->rounds, 1);
    if (v->pause_us) hostile_pause(v->pause_us);
  }
  return NULL;
}

/// Talks on its connection without end.
int hostile_messages(struct vmm *v) {
  const int status = hostile_begin(v);
  if (status != 0) return status;
  static int peer;
  if (!v->socket_path) {
    v->connection = own_socket(&peer);
    if (v->connection < 0 || hostile_start(listener, &peer) != 0) return -1;
  }
  if (hostile_start(talker, v) != 0) return -1;
  if (hostile_start(hostile_toucher, v) != 0) return -1;
  hostile_sleep(v);
  return 0;
}

/// Holds as many connections as are asked for, which say nothing, or the beginning of a hand-over
/// with descriptors (`other`). One that the service closes is replaced.
int hostile_connections(struct vmm *v) {
  struct rlimit limit = {.rlim_cur = MOST_CONNECTIONS + 64, .rlim_max = MOST_CONNECTIONS + 64};
  setrlimit(RLIMIT_NOFILE, &limit);
  const unsigned count = v->threads < MOST_CONNECTIONS ? v->threads : MOST_CONNECTIONS;
  int *sockets = malloc(count * sizeof *sockets), *peers = malloc(count * sizeof *peers);
  int descriptors[16];
  const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (!sockets || !peers || null < 0) return -1;
  for (int i = 0; i < 16; i++) descriptors[i] = null;
  for (unsigned i = 0; i < count; i++) sockets[i] = -1;
  while (!hostile_is_over(v)) {
    for (unsigned i = 0; i < count && !hostile_is_over(v); i++) {
      char byte;
      if (sockets[i] >= 0) {
        if (recv(sockets[i], &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN) continue;
        close(sockets[i]);
        if (!v->socket_path) close(peers[i]);
      }
      sockets[i] = v->socket_path ? hostile_connect(v->socket_path) : own_socket(&peers[i]);
      if (sockets[i] < 0) {
        usleep(100);
        continue;
      }
      if (v->other) {
        const char *begin = v->protocol == FIRECRACKER ? "[" : "FLHO";
        (void)hostile_send(sockets[i], begin, strlen(begin), descriptors, 16);
      }
      atomic_fetch_add(&v->rounds, 1);
    }
    hostile_pause(v->pause_us);
  }
  return 0;
}

/// Hand-overs that are refused, one after the other: long, damaged, with lines of a log in them.
int hostile_handovers(struct vmm *v) {
  char text[4096], key[1200];
  uint64_t state = v->seed;
  while (!hostile_is_over(v)) {
    int peer = -1;
    const int socket = v->socket_path ? hostile_connect(v->socket_path) : own_socket(&peer);
    if (socket < 0) {
      usleep(100);
      continue;
    }
    memset(key, 'x', sizeof key);
    const size_t length = hostile_random(&state) % 1000;
    key[length] = 0;
    // Escapes of JSON, which a reader that prints names as they are puts on a line of their own.
    const char *forged = "\\r\\n2026-01-01T00:00:00Z info forged line \\u001b[31m\\u0000";
    uint32_t size;
    switch (hostile_random(&state) % 4) {
    case 0:
      snprintf(text + 8, sizeof text - 8,
               "{\"type\":\"%s%s\",\"version\":1,\"%s\":[{\"%s\":-1}]}", forged, key, forged, key);
      break;
    case 1:
      snprintf(text + 8, sizeof text - 8,
               "{\"type\":\"attach\",\"version\":1,\"name\":\"%s%s\",\"image\":\"%s\","
               "\"descriptors\":[\"%s\"],\"regions\":[]}",
               key, forged, forged, forged);
      break;
    case 2:
      snprintf(text + 8, sizeof text - 8, "[{\"%s%s\":\"%s\"}]", forged, key, forged);
      break;
    default:
      snprintf(text + 8, sizeof text - 8, "\r\n2026-01-01T00:00:00Z info forged line %s", key);
      break;
    }
    size = (uint32_t)strlen(text + 8);
    memcpy(text, "FLHO", 4);
    memcpy(text + 4, &size, 4);
    const size_t start = v->protocol == FIRECRACKER ? 8 : 0;
    (void)hostile_send(socket, text + start, size + 8 - start, NULL, 0);
    shutdown(socket, SHUT_WR);
    char answer[512];
    if (v->socket_path) (void)!recv(socket, answer, sizeof answer, 0);
    close(socket);
    if (peer >= 0) close(peer);
    atomic_fetch_add(&v->rounds, 1);
    if (v->pause_us) hostile_pause(v->pause_us);
  }
  return 0;
}
