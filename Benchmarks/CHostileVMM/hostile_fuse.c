// SPDX-License-Identifier: Apache-2.0
//
// A guest whose mmap(2) never comes back: it maps a file of a FUSE that does not answer, and the kernel
// holds the lock of its address space meanwhile, for which UFFDIO_COPY of the service waits.
#define _GNU_SOURCE 1
#include "hostile.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FILE_NODE = 2 };

static void answer(int device, const struct fuse_in_header *in, int error, const void *body, size_t length) {
  char message[512];
  struct fuse_out_header out = {
      .len = (uint32_t)(sizeof out + length), .error = error, .unique = in->unique};
  memcpy(message, &out, sizeof out);
  if (length > 0) memcpy(message + sizeof out, body, length);
  (void)!write(device, message, out.len);
}

static struct fuse_attr attributes(uint64_t node) {
  return (struct fuse_attr){.ino = node,
                            .size = node == FILE_NODE ? 1 << 20 : 0,
                            .mode = node == FILE_NODE ? S_IFREG | 0600 : S_IFDIR | 0700,
                            .nlink = 1,
                            .blksize = BLOCK};
}

/// Knows one file, whose pages it never gives. The second time that it is opened it says that nothing
/// may be cached, so that mmap(2) waits for the pages that there are.
static _Noreturn void serve_file(int device) {
  static char buffer[FUSE_MIN_READ_BUFFER + (1 << 17)];
  unsigned opened = 0;
  for (;;) {
    const ssize_t length = read(device, buffer, sizeof buffer);
    if (length < 0 && (errno == EINTR || errno == ENOENT)) continue;
    if (length < (ssize_t)sizeof(struct fuse_in_header)) _exit(0);
    const struct fuse_in_header *in = (const void *)buffer;
    switch (in->opcode) {
    case FUSE_INIT: {
      const struct fuse_init_in *asked = (const void *)(buffer + sizeof *in);
      struct fuse_init_out out = {
          .major = FUSE_KERNEL_VERSION, .minor = asked->minor, .max_write = 1 << 17, .max_readahead = 0};
      if (out.minor > FUSE_KERNEL_MINOR_VERSION) out.minor = FUSE_KERNEL_MINOR_VERSION;
      answer(device, in, 0, &out, sizeof out);
      break;
    }
    case FUSE_LOOKUP: {
      struct fuse_entry_out out = {.nodeid = FILE_NODE, .attr = attributes(FILE_NODE)};
      answer(device, in, 0, &out, sizeof out);
      break;
    }
    case FUSE_GETATTR: {
      struct fuse_attr_out out = {.attr = attributes(in->nodeid)};
      answer(device, in, 0, &out, sizeof out);
      break;
    }
    case FUSE_OPEN: {
      struct fuse_open_out out = {.open_flags = opened++ == 0 ? FOPEN_KEEP_CACHE : FOPEN_DIRECT_IO};
      answer(device, in, 0, &out, sizeof out);
      break;
    }
    case FUSE_READ:
    case FUSE_INTERRUPT:
    case FUSE_FORGET:
      break;
    default:
      answer(device, in, -ENOSYS, NULL, 0);
    }
  }
}

/// Reads a page, which locks it for ever.
static void *page_reader(void *file) {
  char bytes[16];
  (void)!pread(*(int *)file, bytes, sizeof bytes, 0);
  return NULL;
}

static _Atomic bool begins;
static _Atomic size_t next_page;

static void *mapper(void *file) {
  while (!begins) usleep(50);
  // The others have faulted, and the service is at the first of them.
  hostile_pause(300);
  (void)!mmap(NULL, BLOCK, PROT_READ, MAP_PRIVATE, *(int *)file, 0);
  return NULL;
}

/// Touches a page that is a mapping of its own, where no page ever was: for such a one UFFDIO_COPY
/// wants the lock (mm/userfaultfd.c, uffd_lock_vma).
static void *touch_one(void *argument) {
  struct vmm *v = argument;
  const size_t block = 2 * atomic_fetch_add(&next_page, 1);
  while (!begins) usleep(50);
  hostile_check(v, block);
  return NULL;
}

static int split(struct vmm *v) {
  for (size_t block = 1; block < 2 * (size_t)v->threads; block += 2) {
    if (mprotect(v->base + block * BLOCK, BLOCK, PROT_READ) != 0) return -1;
  }
  return 0;
}

int hostile_fuse(struct vmm *v) {
  char directory[] = "/tmp/faultline-fuse-XXXXXX", options[128], path[64];
  static int files[2];
  const int device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
  if (device < 0 || !mkdtemp(directory)) return STATUS_CANNOT;
  snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=%u,group_id=%u", device, getuid(),
           getgid());
  // In a mount namespace of its own: nothing of it stays.
  const bool is_mounted = unshare(CLONE_NEWNS) == 0 &&
                          mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
                          mount("hostile", directory, "fuse", MS_NODEV | MS_NOSUID, options) == 0;
  if (!is_mounted) {
    rmdir(directory);
    return STATUS_CANNOT;
  }
  const pid_t server = (pid_t)syscall(SYS_fork);
  if (server == 0) {
    // With this process's main thread the file system ends, and with it whatever waits for it.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    serve_file(device);
  }
  close(device);
  snprintf(path, sizeof path, "%s/file", directory);
  files[0] = open(path, O_RDONLY | O_CLOEXEC);
  files[1] = open(path, O_RDONLY | O_CLOEXEC);
  int status = files[0] < 0 || files[1] < 0 ? STATUS_CANNOT : hostile_begin(v);
  if (status == 0) {
    // All threads are there before: who makes one wants that lock, too.
    status = split(v);
    if (status == 0) status = hostile_start_many(v->threads, touch_one, v);
    if (status == 0) status = hostile_start(mapper, &files[1]);
    if (status == 0) status = hostile_start(page_reader, &files[0]);
    usleep(50000);
    begins = true;
    hostile_sleep(v);
  }
  kill(server, SIGKILL);
  umount2(directory, MNT_DETACH);
  rmdir(directory);
  return status;
}
