// SPDX-License-Identifier: Apache-2.0
//
// What tests need of C: fork without exec, touching memory that may be poisoned,
// and messages with more descriptors than the library sends.
#ifndef FAULTLINE_CTESTSUPPORT_H
#define FAULTLINE_CTESTSUPPORT_H

#include <stddef.h>
#include <stdint.h>

/// Forks; the child exits at once with 0. Returns the child's id after having waited
/// for it, or -1.
int ctest_fork_and_wait(void);

/// Forks, and reads 8 bytes at an address in the child. Returns 0, the si_code of the SIGBUS
/// that the access raised there, or -1.
int ctest_fork_and_load(uintptr_t address, uint64_t *value);

/// Reads 8 bytes at an address. Returns 0, or the si_code of the SIGBUS that the access
/// raised. Safe in several threads at once.
int ctest_guarded_load(uintptr_t address, uint64_t *value);

/// mremap(2) to another place; returns the new address or 0.
uintptr_t ctest_move_mapping(uintptr_t address, uintptr_t length);

/// munmap(2).
void ctest_unmap(uintptr_t address, uintptr_t length);

/// Puts an empty tmpfs on a directory, for the calling thread and those that it starts
/// (unshare(2), CLONE_NEWNS); it is gone with the last of them. Returns 0 or the errno.
int ctest_mount_private_tmpfs(const char *path, const char *options);

/// Makes a hugetlbfs that is mounted nowhere (fsmount(2)): it is gone with the last descriptor and
/// mapping of its files. Returns a descriptor of its root, or the negated errno.
int ctest_mount_hugetlbfs(const char *size, const char *page_size);

/// Forbids this process, for good, to make a userfaultfd by userfaultfd(2) and by /dev/userfaultfd
/// (EPERM; seccomp(2)). Returns 0 or the errno.
int ctest_forbid_userfaultfd(void);

/// Makes an empty file in a directory; its descriptor, or the negated errno.
int ctest_make_file(int directory, const char *name);

/// Free blocks of the filesystem of a file (fstatfs(2)), or the negated errno.
long ctest_free_blocks(int file);

/// Sends bytes with one descriptor many times over, up to 253 (SCM_RIGHTS). Returns the
/// bytes that were sent, or -1.
long ctest_send_descriptor_copies(int socket, const void *bytes, size_t length, int descriptor,
                                  int count);

/// Forks a child that waits until `*go` is not 0 and then reads the first word of each page, but
/// of every eighth, which is zero in the tests' content. It exits with how many were zero, 100 at
/// most. With a depth it forks one that does so in its place. Returns its process id.
int ctest_fork_reader(uintptr_t address, size_t pages, volatile int *go, int depth);

/// A word that forked children share; 0.
volatile int *ctest_shared_word(void);

/// Waits for a child; how it exited, or -1.
int ctest_wait(int process);

#endif
