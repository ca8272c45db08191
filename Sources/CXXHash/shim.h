// SPDX-License-Identifier: Apache-2.0
//
// libxxhash: inline, so that the hash of something short is compiled into its caller, and what
// is long by the widest instructions of this processor (AVX2, AVX-512), where the library was
// built with them: three to four times as fast for a page of 4 KiB.
#define XXH_INLINE_ALL
#include <stddef.h>
#include <xxhash.h>

#if defined(__x86_64__)
extern XXH64_hash_t XXH3_64bits_withSeed_dispatch(const void *bytes, size_t length,
                                                  XXH64_hash_t seed)
    __attribute__((weak));
extern XXH128_hash_t XXH3_128bits_withSeed_dispatch(const void *bytes, size_t length,
                                                    XXH64_hash_t seed)
    __attribute__((weak));
// What pays for a call.
#define CXXHASH_DISPATCHES(length, function) ((length) > 512 && (function) != NULL)
#endif

/// XXH3 of 64 bits, the same with any instructions.
static inline XXH64_hash_t cxxhash_64(const void *bytes, size_t length, XXH64_hash_t seed) {
#if defined(__x86_64__)
  if (CXXHASH_DISPATCHES(length, XXH3_64bits_withSeed_dispatch))
    return XXH3_64bits_withSeed_dispatch(bytes, length, seed);
#endif
  return XXH3_64bits_withSeed(bytes, length, seed);
}

/// XXH3 of 128 bits, the same with any instructions.
static inline XXH128_hash_t cxxhash_128(const void *bytes, size_t length, XXH64_hash_t seed) {
#if defined(__x86_64__)
  if (CXXHASH_DISPATCHES(length, XXH3_128bits_withSeed_dispatch))
    return XXH3_128bits_withSeed_dispatch(bytes, length, seed);
#endif
  return XXH3_128bits_withSeed(bytes, length, seed);
}

/// A hash of something that comes in parts; NULL without memory. Not by the library's dispatcher:
/// what a state looks like is for this header and its code to know.
static inline XXH3_state_t *cxxhash_stream(XXH64_hash_t seed) {
  XXH3_state_t *state = XXH3_createState();
  if (state != NULL) XXH3_64bits_reset_withSeed(state, seed);
  return state;
}

static inline void cxxhash_add(XXH3_state_t *state, const void *bytes, size_t length) {
  XXH3_64bits_update(state, bytes, length);
}

static inline XXH64_hash_t cxxhash_value(const XXH3_state_t *state) {
  return XXH3_64bits_digest(state);
}

static inline void cxxhash_free(XXH3_state_t *state) { XXH3_freeState(state); }
