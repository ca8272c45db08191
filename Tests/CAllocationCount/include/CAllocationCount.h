// SPDX-License-Identifier: Apache-2.0
//
// Linking this target replaces malloc and its relatives by versions that count.
#ifndef FAULTLINE_CALLOCATIONCOUNT_H
#define FAULTLINE_CALLOCATIONCOUNT_H

#include <stdint.h>

/// Allocations of all threads since the process began.
uint64_t callocation_count(void);

#endif
