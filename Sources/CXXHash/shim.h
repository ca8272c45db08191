// SPDX-License-Identifier: Apache-2.0
//
// libxxhash as inline functions: nothing to link, and the hash of a page is
// compiled into the loop that uses it.
#define XXH_INLINE_ALL
#include <xxhash.h>
