// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import LinuxSystem
public import SystemPackage

/// A userfaultfd (userfaultfd(2)): page faults of registered ranges arrive on it as
/// events and are resolved through it.
///
/// It watches the address space of the process that created it, also when the
/// descriptor was passed to another process. When its last copy is closed, pending
/// faults are released and missing pages become zeros: whoever serves a guest
/// keeps it open until the guest is gone.
public struct Userfaultfd: ~Copyable, Sendable {
  /// How to create one.
  public enum Origin: Sendable, CaseIterable {
    /// The system call, then the device when the call is not permitted.
    case automatic
    /// userfaultfd(2).
    case systemCall
    /// USERFAULTFD_IOC_NEW on /dev/userfaultfd: access is a file permission.
    case device
  }

  /// The descriptor: non-blocking, close-on-exec.
  public let descriptor: OwnedDescriptor
  /// What was negotiated; for an adopted descriptor what its owner said.
  public let features: UserfaultFeatures

  /// Creates a userfaultfd for this process and negotiates its features.
  ///
  /// - Parameters:
  ///   - required: refused with `.missingFeatures` when the kernel lacks one.
  ///   - wanted: used where the kernel has them.
  ///   - userModeOnly: only faults from user mode; then no privilege is needed, and
  ///     faults from KVM or a system call become EFAULT.
  public init(
    requiring required: UserfaultFeatures = [], wanting wanted: UserfaultFeatures = [],
    origin: Origin = .automatic, userModeOnly: Bool = false
  ) throws(UserfaultError) {
    let supported = try Self.supportedFeatures(origin: origin, userModeOnly: userModeOnly)
    let missing = required.subtracting(supported)
    guard missing.isEmpty else {
      throw UserfaultError(.missingFeatures, attempt: "UFFDIO_API", missing: missing)
    }
    let features = required.union(wanted.intersection(supported))
    let descriptor = try Self.open(origin, userModeOnly: userModeOnly)
    _ = try Self.negotiate(descriptor, features)
    self.descriptor = descriptor
    self.features = features
  }

  /// Takes over a userfaultfd that another process created and negotiated.
  ///
  /// - Parameter features: what its creator negotiated.
  public init(adopting descriptor: consuming OwnedDescriptor, features: UserfaultFeatures)
    throws(Errno)
  {
    try descriptor.setNonBlocking(true)
    self.descriptor = descriptor
    self.features = features
  }

  /// Everything this kernel's userfaultfd can do.
  public static func supportedFeatures(
    origin: Origin = .automatic, userModeOnly: Bool = false
  ) throws(UserfaultError) -> UserfaultFeatures {
    // UFFDIO_API works once for each descriptor, so asking takes one of its own.
    try negotiate(open(origin, userModeOnly: userModeOnly), [])
  }

  // MARK: - Creation

  private static func open(_ origin: Origin, userModeOnly: Bool) throws(UserfaultError)
    -> OwnedDescriptor
  {
    let flags = O_CLOEXEC | O_NONBLOCK | (userModeOnly ? UFFD_USER_MODE_ONLY : 0)
    switch origin {
    case .systemCall:
      return try owned(clinux_userfaultfd(flags), "userfaultfd(2)")
    case .device:
      let opened = unsafe clinux_openat(AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0)
      let device = try owned(opened, "Opening /dev/userfaultfd")
      let made = clinux_userfaultfd_from_device(device.rawValue, flags)
      return try owned(made, "USERFAULTFD_IOC_NEW on /dev/userfaultfd")
    case .automatic:
      do {
        return try open(.systemCall, userModeOnly: userModeOnly)
      } catch {
        guard error.code == .notPermitted else { throw error }
        // The file's permissions may allow what the system call refuses; when they
        // do not, the first answer is the one to report.
        guard let viaDevice = try? open(.device, userModeOnly: userModeOnly) else { throw error }
        return viaDevice
      }
    }
  }

  private static func owned(_ result: Int, _ attempt: String) throws(UserfaultError)
    -> OwnedDescriptor
  {
    guard result < 0 else { return OwnedDescriptor(owning: CInt(result)) }
    let errno = Errno(rawValue: CInt(-result))
    let code: UserfaultError.Code =
      switch errno {
      case .notPermitted, .permissionDenied: .notPermitted
      case .noFunction, .noSuchFileOrDirectory, .noSuchAddressOrDevice: .unavailable
      default: .failed
      }
    throw UserfaultError(code, attempt: attempt, errno: errno)
  }

  private static func negotiate(
    _ descriptor: borrowing OwnedDescriptor, _ features: UserfaultFeatures
  ) throws(UserfaultError) -> UserfaultFeatures {
    var argument = uffdio_api(api: 0xAA, features: features.rawValue, ioctls: 0)
    let result = unsafe clinux_uffd_api(descriptor.rawValue, &argument)
    guard result >= 0 else {
      let errno = Errno(rawValue: CInt(-result))
      throw UserfaultError(
        errno == .notPermitted ? .notPermitted : .failed,
        attempt: "UFFDIO_API with \(features)", errno: errno)
    }
    return UserfaultFeatures(rawValue: argument.features)
  }
}
