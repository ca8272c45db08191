// SPDX-License-Identifier: Apache-2.0
//
// The peer of the benchmarks: the page-fault handler that people write first. One
// thread, poll, read one event, resolve one 4 KiB page, again. It checks nothing.
#ifndef FAULTLINE_MINIMAL_HANDLER_H
#define FAULTLINE_MINIMAL_HANDLER_H

#include <stdint.h>

struct minimal_handler;

/// Serves [base, base + length) from `source`, which holds the same bytes in this
/// process. With `alias`, a second mapping of the same memory, pages are filled through
/// it and mapped by UFFDIO_CONTINUE; with 0 they are copied by UFFDIO_COPY. The
/// userfaultfd is non-blocking and stays the caller's. Returns NULL and sets errno.
struct minimal_handler *minimal_handler_start(int userfaultfd, uint64_t base, uint64_t length,
                                              uint64_t source, uint64_t alias);

/// Ends the thread and frees the handler.
void minimal_handler_stop(struct minimal_handler *handler);

#endif
