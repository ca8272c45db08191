// SPDX-License-Identifier: Apache-2.0
//
// Both hand-overs, as docs/firecracker.md and docs/handover.md have them.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MOST_DESCRIPTORS = 16 };

int hostile_connect(const char *path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(path) >= sizeof address.sun_path) return -1;
  strcpy(address.sun_path, path);
  const int socket_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (socket_ < 0) return -1;
  if (connect(socket_, (struct sockaddr *)&address, sizeof address) == 0) return socket_;
  close(socket_);
  return -1;
}

int hostile_send(int socket, const void *bytes, size_t length, const int *descriptors, int count) {
  union {
    char bytes[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
    struct cmsghdr alignment;
  } control;
  memset(&control, 0, sizeof control);
  for (size_t sent = 0; sent < length;) {
    struct iovec vector = {.iov_base = (char *)bytes + sent, .iov_len = length - sent};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
    if (sent == 0 && count > 0) {
      message.msg_control = control.bytes;
      message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
      struct cmsghdr *header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
      memcpy(CMSG_DATA(header), descriptors, (size_t)count * sizeof(int));
    }
    const ssize_t part = sendmsg(socket, &message, MSG_NOSIGNAL);
    if (part < 0 && errno == EINTR) continue;
    if (part < 0) return -1;
    sent += (size_t)part;
  }
  return 0;
}

static int send_frame(int socket, const char *json, const int *descriptors, int count) {
  char frame[1024];
  const uint32_t length = (uint32_t)strlen(json);
  if (length + 8 > sizeof frame) return -1;
  memcpy(frame, "FLHO", 4);
  memcpy(frame + 4, &length, 4);
  memcpy(frame + 8, json, length);
  return hostile_send(socket, frame, length + 8, descriptors, count);
}

/// Receives one frame, and a descriptor if one comes; returns 0 or -1.
static int receive_frame(int socket, char *json, size_t room, int *descriptor) {
  char frame[4096];
  size_t have = 0;
  uint32_t length = 0;
  while (have < 8 || have < length + 8) {
    union {
      char bytes[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
      struct cmsghdr alignment;
    } control;
    struct iovec vector = {.iov_base = frame + have, .iov_len = sizeof frame - have};
    struct msghdr message = {.msg_iov = &vector,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    const ssize_t part = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    if (part < 0 && errno == EINTR) continue;
    if (part <= 0) return -1;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_type == SCM_RIGHTS) {
      memcpy(descriptor, CMSG_DATA(header), sizeof(int));
    }
    have += (size_t)part;
    if (have >= 8) memcpy(&length, frame + 4, 4);
    if (length + 8 > sizeof frame || length >= room) return -1;
  }
  memcpy(json, frame + 8, length);
  json[length] = 0;
  return 0;
}

/// The text of a field.
static void field(const char *json, const char *name, char *text, size_t room) {
  char key[64];
  snprintf(key, sizeof key, "\"%s\":\"", name);
  const char *start = strstr(json, key);
  size_t length = 0;
  if (start) {
    start += strlen(key);
    length = strcspn(start, "\"");
    if (length >= room) length = room - 1;
    memcpy(text, start, length);
  }
  text[length] = 0;
}

/// What came in place of an answer; a status.
static int refused(const char *json) {
  char code[64], message[512];
  field(json, "code", code, sizeof code);
  field(json, "message", message, sizeof message);
  fprintf(stderr, "hostile: refused, %s: %s\n", code, message);
  return STATUS_REFUSED;
}

static int hand_over_as_firecracker(struct vmm *v) {
  char json[512];
  snprintf(json, sizeof json,
           "[{\"base_host_virt_addr\":%llu,\"size\":%zu,\"offset\":0,\"page_size\":%zu,"
           "\"page_size_kib\":%zu}]",
           (unsigned long long)v->base, v->length, v->page_size, v->page_size);
  return hostile_send(v->connection, json, strlen(json), &v->userfaultfd, 1);
}

/// The image's clean pages, mapped in place of the memory that there was.
static int open_image(struct vmm *v) {
  char json[2048];
  int file = -1;
  snprintf(json, sizeof json, "{\"type\":\"open\",\"version\":1,\"page_size\":%zu}", v->page_size);
  if (send_frame(v->connection, json, NULL, 0) != 0 ||
      receive_frame(v->connection, json, sizeof json, &file) != 0) {
    return -1;
  }
  if (file < 0) return refused(json);
  void *mapped = mmap(v->base, v->length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0);
  close(file);
  if (mapped == MAP_FAILED) return -1;
  return hostile_register(v, v->base, v->length, hostile_register_mode(v));
}

int hostile_hand_over(struct vmm *v) {
  v->connection = hostile_connect(v->socket_path);
  if (v->connection < 0) {
    fprintf(stderr, "hostile: cannot connect: %s\n", strerror(errno));
    return -1;
  }
  if (v->protocol == FIRECRACKER) return hand_over_as_firecracker(v);
  if (v->protocol == CLONE) {
    const int status = open_image(v);
    if (status != 0) return status;
  }
  char json[2048], mode[96] = "";
  if (v->protocol != MISSING) {
    snprintf(mode, sizeof mode, ",\"mode\":\"%s\",\"memory\":0",
             v->protocol == MINOR ? "minor" : "clone");
  }
  snprintf(json, sizeof json,
           "{\"type\":\"attach\",\"version\":1,\"descriptors\":[\"userfaultfd\"%s],\"regions\":["
           "{\"host_address\":%llu,\"length\":%zu,\"page_size\":%zu,\"offset\":0%s}]}",
           v->protocol == MINOR ? ",\"memory\"" : "", (unsigned long long)v->base, v->length,
           v->page_size, mode);
  const int descriptors[2] = {v->userfaultfd, v->memory_file};
  int unwanted = -1;
  if (send_frame(v->connection, json, descriptors, v->protocol == MINOR ? 2 : 1) != 0 ||
      receive_frame(v->connection, json, sizeof json, &unwanted) != 0) {
    fprintf(stderr, "hostile: no answer\n");
    return -1;
  }
  if (!strstr(json, "\"type\":\"ok\"")) return refused(json);
  field(json, "session", v->session, sizeof v->session);
  return 0;
}
