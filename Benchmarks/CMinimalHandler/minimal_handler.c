// SPDX-License-Identifier: Apache-2.0
#include "minimal_handler.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct minimal_handler {
  int userfaultfd;
  int stop;
  uint64_t base, length, source, alias;
  pthread_t thread;
};

static void resolve(const struct minimal_handler *h, uint64_t address) {
  uint64_t page = address & ~(uint64_t)(PAGE - 1);
  if (page < h->base || page >= h->base + h->length) return;
  const void *from = (const void *)(h->source + (page - h->base));
  if (h->alias) {
    memcpy((void *)(h->alias + (page - h->base)), from, PAGE);
    struct uffdio_continue request = {.range = {.start = page, .len = PAGE}};
    if (ioctl(h->userfaultfd, UFFDIO_CONTINUE, &request) == 0 || errno != EEXIST) return;
  } else {
    struct uffdio_copy request = {.dst = page, .src = (uint64_t)from, .len = PAGE};
    if (ioctl(h->userfaultfd, UFFDIO_COPY, &request) == 0 || errno != EEXIST) return;
  }
  struct uffdio_range range = {.start = page, .len = PAGE};
  ioctl(h->userfaultfd, UFFDIO_WAKE, &range);
}

static void *serve(void *argument) {
  const struct minimal_handler *h = argument;
  struct pollfd set[2] = {{.fd = h->userfaultfd, .events = POLLIN},
                          {.fd = h->stop, .events = POLLIN}};
  for (;;) {
    if (poll(set, 2, -1) < 0 && errno != EINTR) return NULL;
    if (set[1].revents) return NULL;
    struct uffd_msg message;
    if (read(h->userfaultfd, &message, sizeof message) != sizeof message) continue;
    if (message.event == UFFD_EVENT_PAGEFAULT) resolve(h, message.arg.pagefault.address);
  }
}

struct minimal_handler *minimal_handler_start(int userfaultfd, uint64_t base, uint64_t length,
                                              uint64_t source, uint64_t alias) {
  struct minimal_handler *h = calloc(1, sizeof *h);
  if (!h) return NULL;
  h->userfaultfd = userfaultfd;
  h->base = base;
  h->length = length;
  h->source = source;
  h->alias = alias;
  h->stop = eventfd(0, EFD_CLOEXEC);
  if (h->stop < 0) {
    free(h);
    return NULL;
  }
  int failure = pthread_create(&h->thread, NULL, serve, h);
  if (failure) {
    close(h->stop);
    free(h);
    errno = failure;
    return NULL;
  }
  return h;
}

void minimal_handler_stop(struct minimal_handler *h) {
  uint64_t one = 1;
  if (write(h->stop, &one, sizeof one) != sizeof one) abort();
  pthread_join(h->thread, NULL);
  close(h->stop);
  free(h);
}
