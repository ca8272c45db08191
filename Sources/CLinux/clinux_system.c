// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE 1
#include "CLinux.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/uio.h>

enum {
  MAX_DESCRIPTORS = 16,
  /// SCM_MAX_FD of the kernel: more are in no message.
  MAX_RECEIVED = 253
};

long clinux_send_descriptors(int fd, const void *bytes, size_t length, const int *descriptors,
                             size_t count) {
  if (count > MAX_DESCRIPTORS) return -EINVAL;
  union {
    char bytes[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))];
    struct cmsghdr alignment;
  } control;
  memset(&control, 0, sizeof control);
  struct iovec vector = {.iov_base = (void *)bytes, .iov_len = length};
  struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
  if (count > 0) {
    message.msg_control = control.bytes;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(header), descriptors, count * sizeof(int));
  }
  return clinux_result(sendmsg(fd, &message, MSG_NOSIGNAL));
}

/// All descriptors that there is room for, and -EMSGSIZE when there were more.
static long receive_message(int fd, void *bytes, size_t length, int *descriptors, size_t *count,
                            int flags) {
  union {
    char bytes[CMSG_SPACE(MAX_RECEIVED * sizeof(int))];
    struct cmsghdr alignment;
  } control;
  struct iovec vector = {.iov_base = bytes, .iov_len = length};
  struct msghdr message = {.msg_iov = &vector,
                           .msg_iovlen = 1,
                           .msg_control = control.bytes,
                           .msg_controllen = sizeof control.bytes};
  size_t room = *count;
  *count = 0;
  long received = clinux_result(recvmsg(fd, &message, MSG_CMSG_CLOEXEC | flags));
  if (received < 0) return received;
  int overflow = (message.msg_flags & MSG_CTRUNC) != 0;
  for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    size_t carried = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < carried; i++) {
      int received_fd;
      memcpy(&received_fd, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      if (*count < room) {
        descriptors[(*count)++] = received_fd;
      } else {
        close(received_fd);
        overflow = 1;
      }
    }
  }
  return overflow ? -EMSGSIZE : received;
}

long clinux_receive_descriptors(int fd, void *bytes, size_t length, int *descriptors,
                                size_t *count) {
  long received = receive_message(fd, bytes, length, descriptors, count, 0);
  if (received != -EMSGSIZE) return received;
  while (*count > 0) close(descriptors[--*count]);
  return received;
}

long clinux_receive_all_nowait(int fd, void *bytes, size_t length, int *descriptors,
                               size_t *count) {
  return receive_message(fd, bytes, length, descriptors, count, MSG_DONTWAIT);
}

short clinux_poll_hangup(void) { return POLLRDHUP; }

uint32_t clinux_epoll_hangup(void) { return EPOLLRDHUP; }

long clinux_peer_credentials(int fd, int *process, uint32_t *user, uint32_t *group) {
  struct ucred credentials;
  socklen_t length = sizeof credentials;
  long result = clinux_result(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length));
  if (result < 0) return result;
  *process = credentials.pid;
  *user = credentials.uid;
  *group = credentials.gid;
  return 0;
}

long clinux_peer_pidfd(int fd) {
  int pidfd = -1;
  socklen_t length = sizeof pidfd;
  long result = clinux_result(getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &length));
  return result < 0 ? result : pidfd;
}

static void ignore_signal(int signal) { (void)signal; }

long clinux_install_interrupting_handler(int signal) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = ignore_signal;
  sigemptyset(&action.sa_mask);
  return clinux_result(sigaction(signal, &action, NULL));
}

long clinux_rwlock_init(pthread_rwlock_t *lock) {
  pthread_rwlockattr_t attributes;
  pthread_rwlockattr_init(&attributes);
  pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
  int failure = pthread_rwlock_init(lock, &attributes);
  pthread_rwlockattr_destroy(&attributes);
  return -failure;
}

static void *thread_main(void *argument) {
  struct clinux_thread_start start = *(struct clinux_thread_start *)argument;
  free(argument);
  pthread_setname_np(pthread_self(), start.name);
  start.body(start.context);
  return NULL;
}

long clinux_thread_create(pthread_t *out, const struct clinux_thread_start *start) {
  struct clinux_thread_start *copy = malloc(sizeof *copy);
  if (!copy) return -ENOMEM;
  *copy = *start;
  // Signals of the process (^C, SIGTERM) belong to its own threads, not to these.
  sigset_t blocked, previous;
  sigfillset(&blocked);
  sigdelset(&blocked, clinux_kick_signal());
  pthread_sigmask(SIG_SETMASK, &blocked, &previous);
  int failure = pthread_create(out, NULL, thread_main, copy);
  pthread_sigmask(SIG_SETMASK, &previous, NULL);
  if (failure) free(copy);
  return -failure;
}

long clinux_copy_own_memory(void *to, uintptr_t from, size_t length) {
  struct iovec local = {.iov_base = to, .iov_len = length};
  struct iovec remote = {.iov_base = (void *)from, .iov_len = length};
  return clinux_result(process_vm_readv(getpid(), &local, 1, &remote, 1, 0));
}

long clinux_copy_through_file(void *to, uintptr_t from, size_t length) {
  int file = memfd_create("faultline-copy", MFD_CLOEXEC);
  if (file < 0) return -errno;
  long result = clinux_result(pwrite(file, (const void *)from, length, 0));
  if (result > 0) result = clinux_result(pread(file, to, (size_t)result, 0));
  close(file);
  return result;
}

long clinux_copy_to_own_memory(uintptr_t to, const void *from, size_t length) {
  struct iovec local = {.iov_base = (void *)from, .iov_len = length};
  struct iovec remote = {.iov_base = (void *)to, .iov_len = length};
  return clinux_result(process_vm_writev(getpid(), &local, 1, &remote, 1, 0));
}

long clinux_copy_to_through_file(uintptr_t to, const void *from, size_t length) {
  int file = memfd_create("faultline-copy", MFD_CLOEXEC);
  if (file < 0) return -errno;
  long result = clinux_result(pwrite(file, from, length, 0));
  if (result > 0) result = clinux_result(pread(file, (void *)to, (size_t)result, 0));
  close(file);
  return result;
}

long clinux_try_lock(int fd) { return clinux_result(flock(fd, LOCK_EX | LOCK_NB)); }

long clinux_begin_writeback(int fd, off_t offset, off_t length) {
  return clinux_result(sync_file_range(fd, offset, length, SYNC_FILE_RANGE_WRITE));
}
