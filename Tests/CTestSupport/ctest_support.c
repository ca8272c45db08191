// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE 1
#include "CTestSupport.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

int ctest_fork_and_wait(void) {
  // Not fork(3): glibc holds malloc's locks across it, and whoever must read the fork
  // event before the call can return may want to allocate.
  pid_t child = (pid_t)syscall(SYS_fork);
  if (child == 0) _exit(0);
  if (child > 0) waitpid(child, NULL, 0);
  return child;
}

static _Thread_local sigjmp_buf *guard;
static _Thread_local volatile int guard_code;

static struct sigaction before;

static void on_sigbus(int signal, siginfo_t *info, void *context) {
  (void)context;
  if (!guard) {
    // Not ours: die of it as usual, with the address and a backtrace.
    char text[128];
    int length = snprintf(text, sizeof text, "SIGBUS at %p, code %d\n", info->si_addr, info->si_code);
    if (length > 0) (void)!write(STDERR_FILENO, text, (size_t)length);
    sigaction(signal, &before, NULL);
    return;
  }
  guard_code = info->si_code;
  siglongjmp(*guard, 1);
}

static void install(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_sigbus;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &action, &before);
}

int ctest_guarded_load(uintptr_t address, uint64_t *value) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, install);
  // Threads of the project block all signals; a blocked SIGBUS would kill the process.
  sigset_t bus;
  sigemptyset(&bus);
  sigaddset(&bus, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &bus, NULL);
  sigjmp_buf here;
  if (sigsetjmp(here, 1) != 0) {
    guard = NULL;
    return guard_code;
  }
  guard = &here;
  *value = *(volatile uint64_t *)address;
  guard = NULL;
  return 0;
}

uintptr_t ctest_move_mapping(uintptr_t address, uintptr_t length) {
  void *room = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return 0;
  // The old range stays mapped: its owner will unmap it, and until then nobody else's
  // mapping may land there.
  void *moved = mremap((void *)address, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, room);
  return moved == MAP_FAILED ? 0 : (uintptr_t)moved;
}

void ctest_unmap(uintptr_t address, uintptr_t length) { munmap((void *)address, length); }

int ctest_mount_private_tmpfs(const char *path, const char *options) {
  if (unshare(CLONE_NEWNS) != 0) return errno;
  // Or the mount would show outside as well.
  if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0) return errno;
  return mount("none", path, "tmpfs", 0, options) == 0 ? 0 : errno;
}

int ctest_mount_hugetlbfs(const char *size, const char *page_size) {
  int context = fsopen("hugetlbfs", FSOPEN_CLOEXEC);
  if (context < 0) return -errno;
  int mounted = -1;
  if (fsconfig(context, FSCONFIG_SET_STRING, "size", size, 0) == 0 &&
      fsconfig(context, FSCONFIG_SET_STRING, "pagesize", page_size, 0) == 0 &&
      fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0) {
    mounted = fsmount(context, FSMOUNT_CLOEXEC, 0);
  }
  if (mounted < 0) mounted = -errno;
  close(context);
  return mounted;
}

int ctest_forbid_userfaultfd(void) {
  // USERFAULTFD_IOC_NEW: ioctl(2) with _IO(0xAA, 0).
  struct sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 3, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0xAA00, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return errno;
  // For all threads.
  return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0
             ? 0
             : errno;
}

int ctest_make_file(int directory, const char *name) {
  int file = openat(directory, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  return file < 0 ? -errno : file;
}

long ctest_free_blocks(int file) {
  struct statfs status;
  return fstatfs(file, &status) == 0 ? (long)status.f_bfree : -errno;
}

enum { MAX_DESCRIPTORS = 253 };

long ctest_send_descriptor_copies(int socket, const void *bytes, size_t length, int descriptor,
                                  int count) {
  if (count < 1 || count > MAX_DESCRIPTORS) return -1;
  union {
    char bytes[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))];
    struct cmsghdr alignment;
  } control;
  memset(&control, 0, sizeof control);
  struct iovec vector = {.iov_base = (void *)bytes, .iov_len = length};
  struct msghdr message = {.msg_iov = &vector,
                           .msg_iovlen = 1,
                           .msg_control = control.bytes,
                           .msg_controllen = CMSG_SPACE((size_t)count * sizeof(int))};
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
  for (int i = 0; i < count; i++) {
    memcpy(CMSG_DATA(header) + (size_t)i * sizeof(int), &descriptor, sizeof(int));
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL);
}

int ctest_fork_and_load(uintptr_t address, uint64_t *value) {
  struct answer {
    int code;
    uint64_t value;
  } *answer = mmap(NULL, sizeof *answer, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (answer == MAP_FAILED) return -1;
  answer->code = -1;
  pid_t child = (pid_t)syscall(SYS_fork);
  if (child == 0) {
    answer->code = ctest_guarded_load(address, &answer->value);
    _exit(0);
  }
  if (child > 0) waitpid(child, NULL, 0);
  const int code = answer->code;
  *value = answer->value;
  munmap(answer, sizeof *answer);
  return code;
}
