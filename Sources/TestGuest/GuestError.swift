// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// Why the test guest could not do what it was asked, or what became of it.
public struct GuestError: Error, Sendable, CustomStringConvertible {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    private enum Kind {
      case invalidArgument, unavailable, hostFailure, memoryFault, crashed, wrongState
      case damagedState
    }
    private let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// Memory, vCPU count or workload are not what the guest can use.
    public static let invalidArgument = Self(.invalidArgument)
    /// There is no KVM that this process may use.
    public static let unavailable = Self(.unavailable)
    /// The host refused something; see `errno`.
    public static let hostFailure = Self(.hostFailure)
    /// The guest touched a page that is poisoned or cannot be had; see `guestAddress`.
    public static let memoryFault = Self(.memoryFault)
    /// The guest crashed or did what its program never does.
    public static let crashed = Self(.crashed)
    /// Not now: a workload is running, or none is, or the guest is not paused.
    public static let wrongState = Self(.wrongState)
    /// A saved state is not one.
    public static let damagedState = Self(.damagedState)
  }

  /// The kind of failure.
  public let code: Code
  /// What failed, why, and what to do about it.
  public let description: String
  /// What the kernel said, if it was asked.
  public let errno: Errno?
  /// The page that the guest touched, for `.memoryFault`; `nil` when KVM does not tell.
  public let guestAddress: GuestAddress?

  init(
    _ code: Code, _ description: String, errno: Errno? = nil, guestAddress: GuestAddress? = nil
  ) {
    self.code = code
    self.errno = errno
    self.guestAddress = guestAddress
    self.description = errno.map { "\(description): \($0)" } ?? description
  }

  static func memoryFault(_ processor: Int, _ address: GuestAddress?) -> Self {
    let place = address.map { "the page at guest address \($0)" } ?? "a page"
    return Self(
      .memoryFault,
      "vCPU \(processor) touched \(place), which is poisoned or cannot be had. "
        + "See what its pager reported for that page.",
      guestAddress: address)
  }
}

/// Runs calls into the kernel and puts what they were for into the error.
func host<Value: ~Copyable>(
  _ attempt: @autoclosure () -> String, _ body: () throws(Errno) -> Value
) throws(GuestError) -> Value {
  do {
    return try body()
  } catch {
    let code: GuestError.Code =
      switch error {
      case .noSuchFileOrDirectory, .permissionDenied, .noSuchAddressOrDevice:
        .unavailable
      default: .hostFailure
      }
    let advice =
      code == .unavailable ? " (it needs read and write access to /dev/kvm)" : ""
    throw GuestError(code, "\(attempt()) failed\(advice)", errno: error)
  }
}
