// SPDX-License-Identifier: Apache-2.0
//
// PAGEMAP_SCAN on /proc/PID/pagemap (Linux 6.7, admin-guide/mm/pagemap.rst).
#ifndef FAULTLINE_CLINUX_PAGEMAP_H
#define FAULTLINE_CLINUX_PAGEMAP_H

#include "clinux_system.h"
#include <linux/fs.h>
#include <sys/ioctl.h>

#ifndef PAGEMAP_SCAN
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)
#define PAGE_IS_HUGE (1 << 6)
#define PAGE_IS_SOFT_DIRTY (1 << 7)
struct page_region {
  __u64 start;
  __u64 end;
  __u64 categories;
};
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
struct pm_scan_arg {
  __u64 size;
  __u64 flags;
  __u64 start;
  __u64 end;
  __u64 walk_end;
  __u64 vec;
  __u64 vec_len;
  __u64 max_pages;
  __u64 category_inverted;
  __u64 category_mask;
  __u64 category_anyof_mask;
  __u64 return_mask;
};
#endif

_Static_assert(sizeof(struct page_region) == 24, "page_region");
_Static_assert(sizeof(struct pm_scan_arg) == 96, "pm_scan_arg");
_Static_assert(PAGEMAP_SCAN == 0xc0606610, "PAGEMAP_SCAN");
_Static_assert(PAGE_IS_WRITTEN == 2, "PAGE_IS_WRITTEN");

static inline long clinux_pagemap_scan(int fd, struct pm_scan_arg *argument) {
  return clinux_result(ioctl(fd, PAGEMAP_SCAN, argument));
}

#endif
