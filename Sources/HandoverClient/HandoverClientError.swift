// SPDX-License-Identifier: Apache-2.0

public import SystemPackage

/// Why a service does not serve this VMM.
public struct HandoverClientError: Error, Sendable, CustomStringConvertible {
  /// The kind of failure. A struct, so that kinds can be added.
  public struct Code: Hashable, Sendable {
    fileprivate enum Kind { case unreachable, invalidRequest, refused, badAnswer, timedOut, closed }
    fileprivate let kind: Kind
    private init(_ kind: Kind) { self.kind = kind }

    /// Nobody listens at the path, or it may not be used.
    public static let unreachable = Self(.unreachable)
    /// The request cannot be sent: too long, or too many descriptors.
    public static let invalidRequest = Self(.invalidRequest)
    /// The service said no; `serviceCode` says why.
    public static let refused = Self(.refused)
    /// The answer is not one of docs/handover.md.
    public static let badAnswer = Self(.badAnswer)
    /// No answer in time.
    public static let timedOut = Self(.timedOut)
    /// The service closed the connection.
    public static let closed = Self(.closed)
  }

  /// The kind of failure.
  public let code: Code
  /// The service's code, such as "image_mismatch", for `.refused`.
  public let serviceCode: String?
  /// What is wrong, in words.
  public let reason: String
  /// What the kernel said, if it was asked.
  public let errno: Errno?

  init(_ code: Code, _ reason: String, serviceCode: String? = nil, errno: Errno? = nil) {
    self.code = code
    self.reason = reason
    self.serviceCode = serviceCode
    self.errno = errno
  }

  /// What failed, why, and what to do about it.
  public var description: String {
    var text = "hand-over: " + (serviceCode.map { "refused (\($0)): " } ?? "") + reason
    if let errno { text += ": \(errno)" }
    return "\(text). \(advice)"
  }

  private var advice: String {
    switch code.kind {
    case .unreachable: "Is the service running, and may this user use its socket?"
    case .invalidRequest: "docs/handover.md has the limits."
    case .refused: "docs/handover.md lists what the codes mean."
    case .badAnswer: "Something else listens there, or a service of another version."
    case .timedOut: "See what the service's log says."
    case .closed: "Stop the guest: pages that are not there do not come any more."
    }
  }
}
