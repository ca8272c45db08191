// SPDX-License-Identifier: Apache-2.0
//
// Guests that misbehave, and one that does not, for tests and `faultline bench hostile`. Plain C and
// system calls: nothing of the libraries that they are to try is in their way.
#ifndef FAULTLINE_HOSTILE_VMM_H
#define FAULTLINE_HOSTILE_VMM_H

#include <stddef.h>
#include <stdint.h>

/// What is in the image: a word of a block of 4 KiB; never 0.
uint64_t hostile_word(size_t block, size_t index);

/// Runs a role in this process and returns its exit status: 0, or 1 where it could not be played, 2
/// where it found a wrong page, 3 where the service refused it, 77 where this machine cannot do it.
/// A line on standard output has what it counted, as `name=number` between blanks.
///
/// Words are `name=value`:
///   role        honest, soak, or what misbehaves: `roles` in hostile_main.c
///   socket      of the service; without it the same is done by a plain process that nobody serves
///   protocol    firecracker, missing, minor or clone
///   control     the operators' socket of the service
///   pages, page-size, milliseconds, threads, givers, pause-us, piece, advice, seed, operations, reuses, other
int hostile_main(int count, char *const *words);

/// A hugetlbfs of 2 MiB pages with a limit in bytes, mounted nowhere (fsmount(2)). Returns its root,
/// or a negated errno.
int hostile_open_pool(size_t bytes);

#endif
