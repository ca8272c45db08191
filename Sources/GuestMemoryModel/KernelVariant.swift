// SPDX-License-Identifier: Apache-2.0

/// A kernel, or a proposal for one, as the rules in which it differs from others.
public struct KernelVariant: Hashable, Sendable {
  /// The name that scripts use.
  public var name: String
  /// One line that says what it is.
  public var summary: String
  /// The mainline release that it is, or is based on.
  public var release: Release
  /// userfaultfd on guest_memfd: which modes a registration may ask for.
  public var guestMemfdModes: ModelModes = []
  /// Whether UFFDIO_COPY and UFFDIO_ZEROPAGE work on guest_memfd.
  public var guestMemfdCopy = false
  /// Population of guest_memfd by write(2).
  public var guestMemfdWrite = GuestMemfdWrite.none
  /// Whether a slot can have a userfault bitmap.
  public var stageTwoBitmap = false
  /// Defect: UFFDIO_CONTINUE maps a folio that is not up to date as it is.
  public var continueExposesStale = false
  /// Defect: an access beyond the end raises a missing event before the size is looked
  /// at.
  public var eventBeyondEnd = false
  /// MINOR traps every fault on an empty page table entry, absent pages too.
  public var minorTrapsEveryFault = false

  /// Mainline releases whose answers differ.
  public enum Release: Hashable, Sendable {
    /// Linux 6.18.
    case linux6_18
    /// Linux 7.3.
    case linux7_3
  }

  /// What write(2) to a guest_memfd does.
  public enum GuestMemfdWrite: Hashable, Sendable {
    /// The file has no write(2).
    case none
    /// Absent pages only, whole pages; a failure leaves nothing behind.
    case absentPagesOnly
    /// v7 of November 2025: overwrites, and a failure leaves a zero page.
    case overwriting
  }

  init(_ name: String, _ summary: String, _ release: Release) {
    (self.name, self.summary, self.release) = (name, summary, release)
  }

  /// Linux 6.18.
  public static let linux6_18 = Self("6.18", "Linux 6.18", .linux6_18)

  /// Linux 7.3 as released: userfaultfd refuses guest_memfd.
  public static let linux7_3 = Self("7.3", "Linux 7.3, no userfaultfd on guest_memfd", .linux7_3)

  /// Linux 7.3 with this project's series.
  public static let faultline: Self = {
    var kernel = Self("faultline", "Linux 7.3 with the series in kernel/", .linux7_3)
    kernel.guestMemfdModes = [.missing, .minor, .writeProtect]
    kernel.guestMemfdCopy = true
    kernel.guestMemfdWrite = .absentPagesOnly
    kernel.stageTwoBitmap = true
    return kernel
  }()

  /// The version of March 2026, ported to 7.3, with write(2) v7 and KVM Userfault v1.
  public static let march2026: Self = {
    var kernel = faultline
    kernel.name = "march-2026"
    kernel.summary = "the v2 series of March 2026 on 7.3, with its two defects"
    kernel.guestMemfdWrite = .overwriting
    kernel.continueExposesStale = true
    kernel.eventBeyondEnd = true
    return kernel
  }()

  /// Proposed and withdrawn: MINOR traps every fault on an empty entry.
  public static let minorTrapsAll: Self = {
    var kernel = faultline
    kernel.name = "minor-traps-all"
    kernel.summary = "withdrawn: MINOR traps faults on absent pages too"
    kernel.minorTrapsEveryFault = true
    return kernel
  }()

  /// Discussed: MISSING events on guest_memfd, resolved with write(2), no UFFDIO_COPY.
  public static let missingWithoutCopy: Self = {
    var kernel = faultline
    kernel.name = "missing-without-copy"
    kernel.summary = "discussed: MISSING without UFFDIO_COPY, filled by write()"
    kernel.guestMemfdCopy = false
    return kernel
  }()

  /// All that have a name.
  public static let all = [
    linux6_18, linux7_3, faultline, march2026, minorTrapsAll, missingWithoutCopy,
  ]

  /// The variant with that name.
  public init?(name: String) {
    guard let match = Self.all.first(where: { $0.name == name }) else { return nil }
    self = match
  }
}
