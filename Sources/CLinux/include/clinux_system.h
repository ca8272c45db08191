// SPDX-License-Identifier: Apache-2.0
//
// System calls that are not about userfaultfd or KVM. Every function returns
// what the call returned, or the negated errno: nothing can come between a call
// and its error.
#ifndef FAULTLINE_CLINUX_SYSTEM_H
#define FAULTLINE_CLINUX_SYSTEM_H

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/memfd.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

// Linux 6.5
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
_Static_assert(SO_PEERPIDFD == 77, "SO_PEERPIDFD");

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
_Static_assert(MADV_POPULATE_WRITE == 23, "MADV_POPULATE_WRITE");

static inline long clinux_result(long value) { return value < 0 ? -(long)errno : value; }

static inline long clinux_close(int fd) { return clinux_result(close(fd)); }
/// Writes out what is buffered for standard output; EIO when an earlier write failed.
static inline long clinux_flush_output(void) {
  if (fflush(stdout) != 0) return -(long)errno;
  return ferror(stdout) ? -(long)EIO : 0;
}
static inline long clinux_dup2(int fd, int target) { return clinux_result(dup2(fd, target)); }
static inline long clinux_dup(int fd) { return clinux_result(fcntl(fd, F_DUPFD_CLOEXEC, 0)); }
static inline long clinux_set_status_flags(int fd, int flags) {
  return clinux_result(fcntl(fd, F_SETFL, flags));
}
static inline long clinux_status_flags(int fd) { return clinux_result(fcntl(fd, F_GETFL)); }
static inline long clinux_openat(int dirfd, const char *path, int flags, unsigned mode) {
  return clinux_result(openat(dirfd, path, flags, mode));
}
static inline long clinux_read(int fd, void *buffer, size_t length) {
  return clinux_result(read(fd, buffer, length));
}
static inline long clinux_write(int fd, const void *buffer, size_t length) {
  return clinux_result(write(fd, buffer, length));
}
static inline long clinux_pread(int fd, void *buffer, size_t length, off_t offset) {
  return clinux_result(pread(fd, buffer, length, offset));
}
static inline long clinux_preadv(int fd, const struct iovec *places, int count, off_t offset) {
  return clinux_result(preadv(fd, places, count, offset));
}
/// As pread, but EAGAIN where it would have to wait for storage (preadv2, RWF_NOWAIT).
/// EOPNOTSUPP where the filesystem cannot say.
static inline long clinux_pread_nowait(int fd, void *buffer, size_t length, off_t offset) {
  struct iovec piece = {.iov_base = buffer, .iov_len = length};
  return clinux_result(syscall(SYS_preadv2, fd, &piece, 1L, (long)offset, 0L, RWF_NOWAIT));
}
/// As read, but EAGAIN where it would have to wait, whatever the descriptor's flags say.
/// EOPNOTSUPP where the file cannot say; a userfaultfd can since Linux 6.10.
static inline long clinux_read_nowait(int fd, void *buffer, size_t length) {
  struct iovec piece = {.iov_base = buffer, .iov_len = length};
  return clinux_result(syscall(SYS_preadv2, fd, &piece, 1L, -1L, -1L, RWF_NOWAIT));
}
/// Whether the file is in memory only: tmpfs, ramfs, hugetlbfs.
static inline long clinux_is_memory_file(int fd) {
  struct statfs status;
  const long result = clinux_result(fstatfs(fd, &status));
  if (result < 0) return result;
  return status.f_type == TMPFS_MAGIC || status.f_type == RAMFS_MAGIC ||
         status.f_type == HUGETLBFS_MAGIC;
}
/// Bytes of a page of the file's page cache, for tmpfs and hugetlbfs; 0 for any other file.
static inline long clinux_memory_page_size(int fd) {
  struct statfs status;
  const long result = clinux_result(fstatfs(fd, &status));
  if (result < 0) return result;
  if (status.f_type == HUGETLBFS_MAGIC) return status.f_bsize;
  return status.f_type == TMPFS_MAGIC ? 4096 : 0;
}
static inline long clinux_pwrite(int fd, const void *buffer, size_t length, off_t offset) {
  return clinux_result(pwrite(fd, buffer, length, offset));
}
static inline long clinux_lseek(int fd, off_t offset, int whence) {
  return clinux_result(lseek(fd, offset, whence));
}
static inline long clinux_ftruncate(int fd, off_t length) {
  return clinux_result(ftruncate(fd, length));
}
static inline long clinux_fchmod(int fd, unsigned int mode) {
  return clinux_result(fchmod(fd, (mode_t)mode));
}
static inline long clinux_fallocate(int fd, int mode, off_t offset, off_t length) {
  return clinux_result(syscall(SYS_fallocate, fd, mode, offset, length));
}
static inline long clinux_fsync(int fd) { return clinux_result(fsync(fd)); }
static inline long clinux_fstat(int fd, struct stat *out) { return clinux_result(fstat(fd, out)); }
static inline long clinux_link_open_file(int fd, int dirfd, const char *path) {
  char name[32];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  return clinux_result(linkat(AT_FDCWD, name, dirfd, path, AT_SYMLINK_FOLLOW));
}
/// The target of a symbolic link, without a terminating zero; returns its length, which is
/// `length` when it was cut.
static inline long clinux_readlink(const char *path, char *out, size_t length) {
  return clinux_result(readlink(path, out, length));
}
static inline long clinux_renameat(int olddir, const char *from, int newdir, const char *to) {
  return clinux_result(renameat(olddir, from, newdir, to));
}
static inline long clinux_unlinkat(int dirfd, const char *path) {
  return clinux_result(unlinkat(dirfd, path, 0));
}

/// F_ADD_SEALS, with those that the kernel knows (F_SEAL_FUTURE_WRITE is of Linux 5.1).
static inline long clinux_add_seals(int fd, int seals) {
  // F_ADD_SEALS, which <fcntl.h> has with _GNU_SOURCE only.
  return clinux_result(fcntl(fd, 1033, seals));
}
/// F_GET_SEALS.
static inline long clinux_get_seals(int fd) { return clinux_result(fcntl(fd, 1034)); }
static inline long clinux_memfd_create(const char *name, unsigned flags) {
  return clinux_result(syscall(SYS_memfd_create, name, flags));
}
/// The address as a signed number, or the negated errno (mappings never lie in
/// the last page of the address space).
static inline long clinux_mmap(void *hint, size_t length, int protection, int flags, int fd,
                               off_t offset) {
  void *address = mmap(hint, length, protection, flags, fd, offset);
  return address == MAP_FAILED ? -(long)errno : (long)address;
}
static inline long clinux_munmap(uintptr_t address, size_t length) {
  return clinux_result(munmap((void *)address, length));
}
static inline long clinux_mincore(uintptr_t address, size_t length, unsigned char *pages) {
  return clinux_result(mincore((void *)address, length, pages));
}

static inline long clinux_madvise(uintptr_t address, size_t length, int advice) {
  return clinux_result(madvise((void *)address, length, advice));
}

static inline long clinux_eventfd(unsigned initial, int flags) {
  return clinux_result(eventfd(initial, flags));
}
static inline void clinux_heap_trim(void) { malloc_trim(0); }
static inline long clinux_epoll_create(void) {
  return clinux_result(epoll_create1(EPOLL_CLOEXEC));
}
static inline long clinux_epoll_add(int epoll, int fd, uint32_t events, uint64_t tag) {
  struct epoll_event event = {.events = events, .data = {.u64 = tag}};
  return clinux_result(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
}
static inline long clinux_epoll_remove(int epoll, int fd) {
  return clinux_result(epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL));
}
static inline long clinux_epoll_wait(int epoll, struct epoll_event *events, int count,
                                     int timeout_ms) {
  return clinux_result(epoll_wait(epoll, events, count, timeout_ms));
}
/// A descriptor that becomes readable when the process ends (Linux 5.3).
static inline long clinux_pidfd_open(int process) {
  return clinux_result(syscall(SYS_pidfd_open, process, 0));
}
static inline long clinux_pidfd_send_signal(int pidfd, int signal) {
  return clinux_result(syscall(SYS_pidfd_send_signal, pidfd, signal, NULL, 0));
}
static inline long clinux_epoll_modify(int epoll, int fd, uint32_t events, uint64_t tag) {
  struct epoll_event event = {.events = events, .data = {.u64 = tag}};
  return clinux_result(epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event));
}
static inline long clinux_poll(struct pollfd *descriptors, nfds_t count, int timeout_ms) {
  return clinux_result(poll(descriptors, count, timeout_ms));
}

static inline long clinux_socket_stream(void) {
  return clinux_result(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
}
static inline long clinux_socketpair(int fds[2]) {
  return clinux_result(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
}
static inline long clinux_bind(int fd, const struct sockaddr_un *address, socklen_t length) {
  return clinux_result(bind(fd, (const struct sockaddr *)address, length));
}
static inline long clinux_connect(int fd, const struct sockaddr_un *address, socklen_t length) {
  return clinux_result(connect(fd, (const struct sockaddr *)address, length));
}
static inline long clinux_listen(int fd, int backlog) { return clinux_result(listen(fd, backlog)); }
static inline long clinux_accept(int fd) {
  return clinux_result(syscall(SYS_accept4, fd, NULL, NULL, SOCK_CLOEXEC));
}
/// Sends bytes and up to 16 descriptors in one message (SCM_RIGHTS).
long clinux_send_descriptors(int fd, const void *bytes, size_t length, const int *descriptors,
                             size_t count);
/// Receives bytes and up to `*count` descriptors; `*count` becomes how many came.
/// Descriptors beyond the room are closed and the call fails with EMSGSIZE.
long clinux_receive_descriptors(int fd, void *bytes, size_t length, int *descriptors,
                                size_t *count);
/// The same without waiting, and descriptors that came are the caller's also when it fails with
/// EMSGSIZE.
long clinux_receive_all_nowait(int fd, void *bytes, size_t length, int *descriptors,
                               size_t *count);
/// POLLRDHUP and EPOLLRDHUP, of which the first needs _GNU_SOURCE.
short clinux_poll_hangup(void);
uint32_t clinux_epoll_hangup(void);

/// Begins to write a part of a file out, without waiting (sync_file_range(2)).
long clinux_begin_writeback(int fd, off_t offset, off_t length);
/// flock(2) with LOCK_EX and LOCK_NB.
long clinux_try_lock(int fd);
/// Copies memory of this process by process_vm_readv(2); how many bytes it got.
long clinux_copy_own_memory(void *to, uintptr_t from, size_t length);
/// Copies to memory of this process by process_vm_writev(2); how many bytes it put there.
long clinux_copy_to_own_memory(uintptr_t to, const void *from, size_t length);
/// The same through a file in memory: read(2) writes as a store would, and does not raise SIGBUS.
long clinux_copy_to_through_file(uintptr_t to, const void *from, size_t length);
/// `clinux_copy_own_memory` through a file in memory: write(2) reads it as a load would, and does not raise SIGBUS.
long clinux_copy_through_file(void *to, uintptr_t from, size_t length);

/// Sends what fits without waiting.
static inline long clinux_send_nowait(int fd, const void *bytes, size_t length) {
  return clinux_result(send(fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT));
}
/// SO_PEERCRED.
long clinux_peer_credentials(int fd, int *process, uint32_t *user, uint32_t *group);
/// SO_PEERPIDFD: a pidfd of the peer; ENOPROTOOPT before Linux 6.5.
long clinux_peer_pidfd(int fd);

static inline uint64_t clinux_monotonic_nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
static inline long clinux_gettid(void) { return clinux_result(syscall(SYS_gettid)); }
static inline long clinux_tgkill(int process, int thread, int signal) {
  return clinux_result(syscall(SYS_tgkill, process, thread, signal));
}
static inline uint64_t clinux_rdtsc(void) { return __builtin_ia32_rdtsc(); }

/// Installs a handler that does nothing, without SA_RESTART: its only effect is
/// that a blocking call returns EINTR.
long clinux_install_interrupting_handler(int signal);
/// The signal that `clinux_install_interrupting_handler` and vCPU kicks use.
static inline int clinux_kick_signal(void) { return SIGRTMIN + 3; }

/// A lock for which waiting writers go before new readers: glibc's default would let
/// a stream of readers starve a writer.
long clinux_rwlock_init(pthread_rwlock_t *lock);

typedef void (*clinux_thread_body)(void *context);
struct clinux_thread_start {
  clinux_thread_body body;
  void *context;
  char name[16];
};
/// Starts a thread under a name (15 bytes), with all signals blocked except the
/// kick signal. `*start` is copied before the call returns.
long clinux_thread_create(pthread_t *out, const struct clinux_thread_start *start);

#endif
