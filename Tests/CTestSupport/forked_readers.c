// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE 1
#include "CTestSupport.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int zeros(uintptr_t address, size_t pages) {
  int count = 0;
  for (size_t page = 0; page < pages; page++) {
    uint64_t value = 1;
    if (page % 8 == 7) continue;
    if (ctest_guarded_load(address + page * 4096, &value) == 0 && value == 0) count++;
  }
  return count < 100 ? count : 100;
}

int ctest_fork_reader(uintptr_t address, size_t pages, volatile int *go, int depth) {
  // Not fork(3): see ctest_fork_and_wait.
  pid_t child = (pid_t)syscall(SYS_fork);
  if (child != 0) return child;
  if (depth > 0) _exit(ctest_wait(ctest_fork_reader(address, pages, go, depth - 1)));
  while (*go == 0) usleep(1000);
  _exit(zeros(address, pages));
}

volatile int *ctest_shared_word(void) {
  void *word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return word == MAP_FAILED ? NULL : word;
}

int ctest_wait(int process) {
  int status = -1;
  if (process <= 0 || waitpid(process, &status, 0) != process) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
