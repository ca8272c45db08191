#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes the seeds of the fuzzer of images anew: Tests/MemoryImageTests/Corpus. Needed when
# the format changes; `swift build` first. The path of the parent stands in the child.
set -euo pipefail
cd "$(dirname "$0")/.."
faultline=.build/debug/faultline
corpus=Tests/MemoryImageTests/Corpus
work=/tmp/faultline-corpus
rm -rf "$work"
mkdir -p "$work" "$corpus"

# 24 pages, of which some are left as holes; the third argument names the generation.
pages() {
  local out=$1 first=$2 tag=$3 page
  truncate -s $((24 * 4096)) "$out"
  for page in $(seq "$first" 3 23) $((first + 1)); do
    { yes "page $page of $tag" || true; } 2>/dev/null | head -c 4096 |
      dd of="$out" bs=4096 seek="$page" conv=notrunc status=none
  done
}

pages "$work/raw" 1 one
"$faultline" image create --from-raw "$work/raw" -o "$work/stored.img" --level 0
# A page that does not compress, and two that are equal.
head -c 4096 /dev/urandom | dd of="$work/raw" bs=4096 seek=9 conv=notrunc status=none
dd if="$work/raw" of="$work/raw" bs=4096 skip=4 seek=20 count=1 conv=notrunc status=none
"$faultline" image create --from-raw "$work/raw" -o "$work/parent.img" --chunk 4
pages "$work/raw" 2 two
"$faultline" image create --from-raw "$work/raw" -o "$work/child.img" --chunk 16 \
  --parent "$work/parent.img"
printf '0 4 3\n0 20 1\n0 0 2\n' | "$faultline" image working-set "$work/child.img" --set -
install -m 644 "$work"/*.img "$corpus"
rm -rf "$work"
ls -l "$corpus"
