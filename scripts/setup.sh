# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Sourced by ./demo, ./test and .ci/run: makes sure that what the build needs is there,
# and says what it installs.

faultline_fail() {
  printf 'faultline: %s\n' "$*" >&2
  exit 1
}

# Installs Debian packages: what every Swift build needs, and those that are named.
faultline_setup() {
  command -v swift >/dev/null ||
    faultline_fail "there is no 'swift' on PATH; install a Swift 6.3 toolchain and add its usr/bin."
  local package missing=()
  for package in libc6-dev libstdc++-12-dev binutils git "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
      missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null ||
      faultline_fail "these Debian packages are missing and this is not root: ${missing[*]}"
    sudo=(sudo)
  fi
  printf 'faultline: installing Debian packages: %s\n' "${missing[*]}" >&2
  "${sudo[@]}" apt-get update -qq >&2 || true
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends \
    "${missing[@]}" >&2 || faultline_fail "apt-get could not install: ${missing[*]}"
}

# Reserves 2 MiB pages for the tests where that is possible, and gives them back at the
# end. Tests that find none say so.
faultline_reserve_huge_pages() {
  local pool=/proc/sys/vm/nr_hugepages before
  [ -w "$pool" ] || return 0
  before=$(cat "$pool")
  [ "$before" -ge "$1" ] && return 0
  # shellcheck disable=SC2064
  trap "echo $before >$pool" EXIT
  echo "$1" >"$pool" || true
  if [ "$(cat "$pool")" -lt "$1" ]; then
    # Memory in pieces, as after a build.
    echo 1 >/proc/sys/vm/compact_memory 2>/dev/null || true
    echo "$1" >"$pool" || true
  fi
  if [ "$(cat "$pool")" -lt "$1" ]; then
    # Tests that run side by side would take the last ones from each other, which is SIGBUS.
    printf 'faultline: only %s of %s huge pages to be had: tests go without\n' \
      "$(cat "$pool")" "$1" >&2
    echo "$before" >"$pool"
  fi
}
