# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Sourced by ./lab: finds the kernel's source, builds the kernel, and keeps it.

# What the series in kernel/patches was made for.
lab_series=7.3
# shellcheck disable=SC2034
lab_packages=(qemu-system-x86 busybox-static cpio)
lab_build_packages=(gcc make flex bison bc libelf-dev libssl-dev patch xz-utils)
lab_cache=${XDG_CACHE_HOME:-$HOME/.cache}/faultline/lab

# apt-get and apt-cache with lists of their own, so that the machine's stay as they are.
lab_apt() {
  local tool=$1 lists=$lab_cache/apt
  shift
  mkdir -p "$lists/partial"
  "$tool" -o "Dir::Etc::sourcelist=$lab_cache/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o APT::Sandbox::User=root -o "Dir::State::lists=$lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
}

# Points those lists at the suite that has the source, on the machine's own mirror.
lab_update_lists() {
  local uri
  # shellcheck disable=SC2016
  uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' |
    sort -u | grep -v security | head -n 1)
  [ -n "$uri" ] || faultline_fail "apt knows no Debian mirror here; give the source with --source."
  mkdir -p "$lab_cache/apt"
  printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s trixie-backports main\n' \
    "$uri" >"$lab_cache/sources.list"
  lab_apt apt-get update -qq >&2
}

lab_hash() { sha256sum | cut -c 1-32; }

# Prints what names the source: its package's checksum, or the tarball's.
lab_source_identity() {
  if [ -n "$1" ]; then
    sha256sum <"$1"
    return
  fi
  lab_apt apt-cache show --no-all-versions "linux-source-$lab_series" 2>/dev/null |
    sed -n 's/^SHA256: //p'
}

# Unpacks the source into a directory.
lab_unpack() {
  local tarball=$1 target=$2
  if [ -z "$tarball" ]; then
    printf 'lab: fetching linux-source-%s\n' "$lab_series" >&2
    (cd "$target" && lab_apt apt-get download -qq "linux-source-$lab_series" >&2) ||
      faultline_fail "the source could not be fetched."
    dpkg-deb -x "$target"/linux-source-*.deb "$target/package"
    tarball=$(echo "$target"/package/usr/src/linux-source-*.tar.xz)
  fi
  mkdir -p "$target/linux"
  tar -xf "$tarball" --strip-components=1 -C "$target/linux" ||
    faultline_fail "$tarball is not a kernel's source."
  rm -rf "$target/package" "$target"/*.deb
}

# Builds the source in a directory, with what has changed since the last time.
lab_build() {
  local source=$1/linux output=$2
  {
    timeout 3600 make -C "$source" -j"$(nproc)" bzImage
  } >"$1/build.log" 2>&1 || {
    tail -n 20 "$1/build.log" >&2
    faultline_fail "the kernel does not build."
  }
  cp "$source/arch/x86/boot/bzImage" "$output.part"
  mv "$output.part" "$output"
}

# Builds both kernels from one tree: first with the series, then with it taken away again,
# which takes only a minute more.
lab_build_both() {
  local tarball=$1 kernels=$2 work file
  faultline_setup "${lab_build_packages[@]}"
  work=$(mktemp -d "$lab_cache/build.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  lab_unpack "$tarball" "$work"
  for file in kernel/patches/*.patch; do
    patch -d "$work/linux" -p1 --batch --forward --quiet <"$file" >&2 || faultline_fail \
      "$(basename "$file") does not apply. The series is for Linux $lab_series (made with 7.3.4)."
  done
  printf 'lab: building two kernels, about 8 minutes on 2 cores\n' >&2
  make -C "$work/linux" tinyconfig >"$work/config.log" 2>&1
  "$work/linux/scripts/kconfig/merge_config.sh" -m -O "$work/linux" \
    "$work/linux/.config" kernel/config >>"$work/config.log" 2>&1
  make -C "$work/linux" olddefconfig >>"$work/config.log" 2>&1
  lab_build "$work" "$kernels.patched"
  printf '%s\n' kernel/patches/*.patch | sort -r | while IFS= read -r file; do
    patch -d "$work/linux" -p1 --batch --reverse --quiet <"$file" >&2
  done
  lab_build "$work" "$kernels.unpatched"
  rm -rf "$work"
}

# Prints the path of a kernel, patched or unpatched; builds them where the cache has none.
lab_kernel() {
  local kind=$1 tarball=$2 identity kernels
  mkdir -p "$lab_cache"
  if [ -z "$tarball" ]; then
    lab_update_lists || printf 'lab: the package lists could not be brought up to date\n' >&2
  fi
  identity=$(lab_source_identity "$tarball")
  [ -n "$identity" ] || faultline_fail "the registry has no linux-source-$lab_series (any more)." \
    "The series applies to Linux $lab_series: give its source with --source TARBALL."
  kernels=$lab_cache/$(
    { printf '%s\n' "$identity" && cat kernel/config kernel/patches/*.patch; } | lab_hash
  )
  [ -f "$kernels.$kind" ] || lab_build_both "$tarball" "$kernels"
  printf '%s\n' "$kernels.$kind"
}
