// SPDX-License-Identifier: Apache-2.0

public import SystemPackage

/// Why a userfaultfd could not be had.
public struct UserfaultError: Error, Sendable, CustomStringConvertible {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    private enum Kind {
      case unavailable, notPermitted, missingFeatures, notUserfaultfd, notNegotiated, failed
    }
    private let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// The kernel was built without CONFIG_USERFAULTFD, or has no /dev/userfaultfd.
    public static let unavailable = Self(.unavailable)
    /// The caller may not create one.
    public static let notPermitted = Self(.notPermitted)
    /// The kernel lacks a feature that was required.
    public static let missingFeatures = Self(.missingFeatures)
    /// A descriptor that was received is something else.
    public static let notUserfaultfd = Self(.notUserfaultfd)
    /// A userfaultfd that was received cannot be used yet: its owner never did UFFDIO_API.
    public static let notNegotiated = Self(.notNegotiated)
    /// Anything else; see `errno`.
    public static let failed = Self(.failed)
  }

  /// The kind of failure.
  public let code: Code
  /// What the kernel said, if it was asked.
  public let errno: Errno?
  /// The features that the kernel lacks, for `.missingFeatures`.
  public let missing: UserfaultFeatures
  /// What was tried.
  private let attempt: String

  init(_ code: Code, attempt: String, errno: Errno? = nil, missing: UserfaultFeatures = []) {
    self.code = code
    self.attempt = attempt
    self.errno = errno
    self.missing = missing
  }

  /// What failed, why, and what to do about it.
  public var description: String {
    let reason = errno.map { ": \($0)" } ?? ""
    switch code {
    case .unavailable:
      return "\(attempt) failed\(reason). This kernel has no userfaultfd there; "
        + "it needs CONFIG_USERFAULTFD=y (and Linux 6.1 for /dev/userfaultfd)."
    case .notPermitted:
      return "\(attempt) failed\(reason). Faults that come from the kernel (KVM, system calls) "
        + "need root, CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1, or read and write access "
        + "to /dev/userfaultfd."
    case .missingFeatures:
      return "This kernel's userfaultfd lacks \(missing)."
    case .notUserfaultfd:
      return "The descriptor is \(attempt), not a userfaultfd. Its sender must pass what "
        + "userfaultfd(2) gave it."
    case .notNegotiated:
      return "The userfaultfd was not initialised. Its sender must do UFFDIO_API and register "
        + "its memory first."
    default:
      return "\(attempt) failed\(reason)."
    }
  }
}
