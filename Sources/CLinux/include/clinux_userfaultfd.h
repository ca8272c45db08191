// SPDX-License-Identifier: Apache-2.0
//
// userfaultfd(2), ioctl_userfaultfd(2). Debian 12's headers are those of Linux
// 6.1; what came later is back-ported here and proved equal by static_assert,
// which also holds against the headers of 7.3.
#ifndef FAULTLINE_CLINUX_USERFAULTFD_H
#define FAULTLINE_CLINUX_USERFAULTFD_H

#include "clinux_system.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

// Linux 6.4 .. 6.8: features without an ioctl of their own.
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

// Linux 6.6
#ifndef UFFDIO_POISON
#define UFFD_FEATURE_POISON (1 << 14)
#define _UFFDIO_POISON (0x08)
struct uffdio_poison {
  struct uffdio_range range;
#define UFFDIO_POISON_MODE_DONTWAKE ((__u64)1 << 0)
  __u64 mode;
  __s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)
#endif

// Linux 6.8
#ifndef UFFDIO_MOVE
#define UFFD_FEATURE_MOVE (1 << 16)
#define _UFFDIO_MOVE (0x05)
struct uffdio_move {
  __u64 dst;
  __u64 src;
  __u64 len;
#define UFFDIO_MOVE_MODE_DONTWAKE ((__u64)1 << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES ((__u64)1 << 1)
  __u64 mode;
  __s64 move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, _UFFDIO_MOVE, struct uffdio_move)
#endif

// Linux 7.3
#ifndef UFFDIO_RWPROTECT
#define UFFD_FEATURE_RWP (1 << 17)
#define UFFD_FEATURE_RWP_ASYNC (1 << 18)
#define UFFDIO_REGISTER_MODE_RWP ((__u64)1 << 3)
#define UFFD_PAGEFAULT_FLAG_RWP (1 << 3)
#define _UFFDIO_RWPROTECT (0x09)
#define _UFFDIO_SET_MODE (0x0A)
struct uffdio_rwprotect {
  struct uffdio_range range;
#define UFFDIO_RWPROTECT_MODE_RWP ((__u64)1 << 0)
#define UFFDIO_RWPROTECT_MODE_DONTWAKE ((__u64)1 << 1)
  __u64 mode;
};
struct uffdio_set_mode {
  __u64 enable;
  __u64 disable;
};
#define UFFDIO_RWPROTECT _IOWR(UFFDIO, _UFFDIO_RWPROTECT, struct uffdio_rwprotect)
#define UFFDIO_SET_MODE _IOW(UFFDIO, _UFFDIO_SET_MODE, struct uffdio_set_mode)
#endif

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
// Linux 6.1: /dev/userfaultfd
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

_Static_assert(UFFD_API == 0xAA, "UFFD_API");
_Static_assert(USERFAULTFD_IOC_NEW == 0xaa00, "USERFAULTFD_IOC_NEW");
_Static_assert(UFFDIO_API == 0xc018aa3f, "UFFDIO_API");
_Static_assert(UFFDIO_REGISTER == 0xc020aa00, "UFFDIO_REGISTER");
_Static_assert(UFFDIO_UNREGISTER == 0x8010aa01, "UFFDIO_UNREGISTER");
_Static_assert(UFFDIO_WAKE == 0x8010aa02, "UFFDIO_WAKE");
_Static_assert(UFFDIO_COPY == 0xc028aa03, "UFFDIO_COPY");
_Static_assert(UFFDIO_ZEROPAGE == 0xc020aa04, "UFFDIO_ZEROPAGE");
_Static_assert(UFFDIO_MOVE == 0xc028aa05, "UFFDIO_MOVE");
_Static_assert(UFFDIO_WRITEPROTECT == 0xc018aa06, "UFFDIO_WRITEPROTECT");
_Static_assert(UFFDIO_CONTINUE == 0xc020aa07, "UFFDIO_CONTINUE");
_Static_assert(UFFDIO_POISON == 0xc020aa08, "UFFDIO_POISON");
_Static_assert(UFFDIO_RWPROTECT == 0xc018aa09, "UFFDIO_RWPROTECT");
_Static_assert(UFFDIO_SET_MODE == 0x4010aa0a, "UFFDIO_SET_MODE");

_Static_assert(sizeof(struct uffd_msg) == 32, "uffd_msg");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.flags) == 8, "uffd_msg flags");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.address) == 16, "uffd_msg address");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.feat.ptid) == 24, "uffd_msg ptid");
_Static_assert(offsetof(struct uffd_msg, arg.remap.len) == 24, "uffd_msg remap");
_Static_assert(sizeof(struct uffdio_api) == 24, "uffdio_api");
_Static_assert(sizeof(struct uffdio_range) == 16, "uffdio_range");
_Static_assert(sizeof(struct uffdio_register) == 32, "uffdio_register");
_Static_assert(sizeof(struct uffdio_copy) == 40, "uffdio_copy");
_Static_assert(offsetof(struct uffdio_copy, copy) == 32, "uffdio_copy.copy");
_Static_assert(sizeof(struct uffdio_zeropage) == 32, "uffdio_zeropage");
_Static_assert(sizeof(struct uffdio_writeprotect) == 24, "uffdio_writeprotect");
_Static_assert(sizeof(struct uffdio_continue) == 32, "uffdio_continue");
_Static_assert(sizeof(struct uffdio_poison) == 32, "uffdio_poison");
_Static_assert(offsetof(struct uffdio_poison, updated) == 24, "uffdio_poison.updated");
_Static_assert(sizeof(struct uffdio_move) == 40, "uffdio_move");
_Static_assert(sizeof(struct uffdio_rwprotect) == 24, "uffdio_rwprotect");
_Static_assert(sizeof(struct uffdio_set_mode) == 16, "uffdio_set_mode");
_Static_assert(UFFD_FEATURE_WP_UNPOPULATED == 0x2000, "UFFD_FEATURE_WP_UNPOPULATED");
_Static_assert(UFFD_FEATURE_POISON == 0x4000, "UFFD_FEATURE_POISON");
_Static_assert(UFFD_FEATURE_WP_ASYNC == 0x8000, "UFFD_FEATURE_WP_ASYNC");
_Static_assert(UFFD_FEATURE_MOVE == 0x10000, "UFFD_FEATURE_MOVE");
_Static_assert(UFFD_FEATURE_RWP == 0x20000, "UFFD_FEATURE_RWP");
_Static_assert(UFFD_FEATURE_RWP_ASYNC == 0x40000, "UFFD_FEATURE_RWP_ASYNC");
_Static_assert(UFFD_PAGEFAULT_FLAG_RWP == 8, "UFFD_PAGEFAULT_FLAG_RWP");
_Static_assert(UFFDIO_REGISTER_MODE_RWP == 8, "UFFDIO_REGISTER_MODE_RWP");

static inline long clinux_userfaultfd(int flags) {
  return clinux_result(syscall(SYS_userfaultfd, flags));
}
static inline long clinux_userfaultfd_from_device(int device, int flags) {
  return clinux_result(ioctl(device, USERFAULTFD_IOC_NEW, flags));
}
static inline long clinux_uffd_api(int fd, struct uffdio_api *argument) {
  return clinux_result(ioctl(fd, UFFDIO_API, argument));
}
static inline long clinux_uffd_register(int fd, struct uffdio_register *argument) {
  return clinux_result(ioctl(fd, UFFDIO_REGISTER, argument));
}
static inline long clinux_uffd_unregister(int fd, struct uffdio_range *argument) {
  return clinux_result(ioctl(fd, UFFDIO_UNREGISTER, argument));
}
static inline long clinux_uffd_wake(int fd, struct uffdio_range *argument) {
  return clinux_result(ioctl(fd, UFFDIO_WAKE, argument));
}
static inline long clinux_uffd_copy(int fd, struct uffdio_copy *argument) {
  return clinux_result(ioctl(fd, UFFDIO_COPY, argument));
}
static inline long clinux_uffd_zeropage(int fd, struct uffdio_zeropage *argument) {
  return clinux_result(ioctl(fd, UFFDIO_ZEROPAGE, argument));
}
static inline long clinux_uffd_writeprotect(int fd, struct uffdio_writeprotect *argument) {
  return clinux_result(ioctl(fd, UFFDIO_WRITEPROTECT, argument));
}
static inline long clinux_uffd_continue(int fd, struct uffdio_continue *argument) {
  return clinux_result(ioctl(fd, UFFDIO_CONTINUE, argument));
}
static inline long clinux_uffd_poison(int fd, struct uffdio_poison *argument) {
  return clinux_result(ioctl(fd, UFFDIO_POISON, argument));
}
static inline long clinux_uffd_move(int fd, struct uffdio_move *argument) {
  return clinux_result(ioctl(fd, UFFDIO_MOVE, argument));
}
static inline long clinux_uffd_rwprotect(int fd, struct uffdio_rwprotect *argument) {
  return clinux_result(ioctl(fd, UFFDIO_RWPROTECT, argument));
}
static inline long clinux_uffd_set_mode(int fd, struct uffdio_set_mode *argument) {
  return clinux_result(ioctl(fd, UFFDIO_SET_MODE, argument));
}

#endif
