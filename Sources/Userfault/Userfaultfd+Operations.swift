// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import LinuxSystem
public import SystemPackage

// Every ioctl of ioctl_userfaultfd(2). Ranges are whole pages of the memory they lie
// in. None of these allocates.
extension Userfaultfd {
  // MARK: - Registration

  /// Watches a range (UFFDIO_REGISTER) and returns what can be done with it.
  ///
  /// EINVAL: alignment, an unmapped hole, or a kind of memory without that mode;
  /// EPERM: a shared mapping that may not be written; EBUSY: another userfaultfd has
  /// it, or (7.3) WP would be dropped.
  @discardableResult
  public borrowing func register(_ range: HostRange, modes: RegistrationModes) throws(Errno)
    -> RangeOperations
  {
    var argument = uffdio_register(range: range.kernel, mode: modes.rawValue, ioctls: 0)
    _ = try check(unsafe clinux_uffd_register(descriptor.rawValue, &argument))
    return RangeOperations(rawValue: argument.ioctls)
  }

  /// Stops watching a range (UFFDIO_UNREGISTER), then wakes its waiters.
  ///
  /// The kernel wakes the waiters of a MISSING range by itself, those of a
  /// MINOR-only range it leaves asleep; so a wake always follows. Pages that were
  /// never filled read as zero from here on.
  public borrowing func unregister(_ range: HostRange) throws(Errno) {
    var argument = range.kernel
    _ = try check(unsafe clinux_uffd_unregister(descriptor.rawValue, &argument))
    try wake(range)
  }

  /// Wakes the waiters of a range (UFFDIO_WAKE); those whose page is still not
  /// there fault again and raise a new event.
  public borrowing func wake(_ range: HostRange) throws(Errno) {
    var argument = range.kernel
    _ = try check(unsafe clinux_uffd_wake(descriptor.rawValue, &argument))
  }

  // MARK: - Filling pages

  /// Fills absent pages from a buffer and maps them (UFFDIO_COPY).
  ///
  /// - Parameters:
  ///   - source: `length` readable bytes in this process; any alignment.
  ///   - writeProtected: the pages arrive write-protected; the range needs WP.
  ///   - wakes: `false` leaves the waiters asleep until `wake`.
  @unsafe
  public borrowing func copy(
    from source: UnsafeRawPointer, to destination: HostAddress, length: Int,
    writeProtected: Bool = false, wakes: Bool = true
  ) -> Resolution {
    let mode: UInt64 = (wakes ? 0 : 1) | (writeProtected ? 2 : 0)
    var argument = uffdio_copy(
      dst: destination.rawValue, src: UInt64(UInt(bitPattern: source)), len: UInt64(length),
      mode: mode, copy: 0)
    let result = unsafe clinux_uffd_copy(descriptor.rawValue, &argument)
    return Resolution(result: result, progress: argument.copy, length: length)
  }

  /// Maps zeros at absent pages (UFFDIO_ZEROPAGE). Not on hugetlbfs (EINVAL).
  public borrowing func zeropage(_ range: HostRange, wakes: Bool = true) -> Resolution {
    var argument = uffdio_zeropage(range: range.kernel, mode: wakes ? 0 : 1, zeropage: 0)
    let result = unsafe clinux_uffd_zeropage(descriptor.rawValue, &argument)
    return Resolution(result: result, progress: argument.zeropage, length: range.length)
  }

  /// Maps pages that are in the page cache (UFFDIO_CONTINUE); `.absent` when one is
  /// not.
  public borrowing func `continue`(_ range: HostRange, wakes: Bool = true) -> Resolution {
    var argument = uffdio_continue(range: range.kernel, mode: wakes ? 0 : 1, mapped: 0)
    let result = unsafe clinux_uffd_continue(descriptor.rawValue, &argument)
    return Resolution(result: result, progress: argument.mapped, length: range.length)
  }

  /// Makes absent pages raise SIGBUS (a memory fault in a vCPU) when they are touched
  /// (UFFDIO_POISON, Linux 6.6). `.alreadyPresent` when anything is mapped there.
  public borrowing func poison(_ range: HostRange, wakes: Bool = true) -> Resolution {
    var argument = uffdio_poison(range: range.kernel, mode: wakes ? 0 : 1, updated: 0)
    let result = unsafe clinux_uffd_poison(descriptor.rawValue, &argument)
    return Resolution(result: result, progress: argument.updated, length: range.length)
  }

  /// Moves pages of the same process without copying them (UFFDIO_MOVE, Linux 6.8).
  /// Anonymous memory only.
  ///
  /// - Parameter allowHoles: absent source pages are skipped; else `.notRegistered`
  ///   (ENOENT).
  public borrowing func move(
    from source: HostAddress, to destination: HostAddress, length: Int, allowHoles: Bool = false,
    wakes: Bool = true
  ) -> Resolution {
    let mode: UInt64 = (wakes ? 0 : 1) | (allowHoles ? 2 : 0)
    var argument = uffdio_move(
      dst: destination.rawValue, src: source.rawValue, len: UInt64(length), mode: mode, move: 0)
    let result = unsafe clinux_uffd_move(descriptor.rawValue, &argument)
    return Resolution(result: result, progress: argument.move, length: length)
  }

  // MARK: - Protection

  /// Write-protects pages, or lifts the protection and wakes the writers
  /// (UFFDIO_WRITEPROTECT). ENOENT: not registered for WP; EAGAIN: the mapping is
  /// changing.
  public borrowing func writeProtect(
    _ range: HostRange, enabled: Bool, wakes: Bool = true
  ) throws(Errno) {
    var argument = uffdio_writeprotect(
      range: range.kernel, mode: Self.protectionMode(enabled, wakes))
    _ = try check(unsafe clinux_uffd_writeprotect(descriptor.rawValue, &argument))
  }

  /// Protects present pages against any access, or lifts it (UFFDIO_RWPROTECT, Linux
  /// 7.3). Not together with WP.
  public borrowing func readWriteProtect(
    _ range: HostRange, enabled: Bool, wakes: Bool = true
  ) throws(Errno) {
    var argument = uffdio_rwprotect(
      range: range.kernel, mode: Self.protectionMode(enabled, wakes))
    _ = try check(unsafe clinux_uffd_rwprotect(descriptor.rawValue, &argument))
  }

  /// Switches asynchronous features on or off at run time (UFFDIO_SET_MODE, Linux
  /// 7.3; only `.readWriteProtectAsync`).
  public borrowing func setMode(
    enabling: UserfaultFeatures, disabling: UserfaultFeatures
  ) throws(Errno) {
    var argument = uffdio_set_mode(enable: enabling.rawValue, disable: disabling.rawValue)
    _ = try check(unsafe clinux_uffd_set_mode(descriptor.rawValue, &argument))
  }

  /// Protecting never wakes, and the kernel refuses a DONTWAKE that says so.
  private static func protectionMode(_ enabled: Bool, _ wakes: Bool) -> UInt64 {
    enabled ? 1 : (wakes ? 0 : 2)
  }
}

extension HostRange {
  var kernel: uffdio_range { uffdio_range(start: start.rawValue, len: UInt64(length)) }
}
