// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import SystemPackage

/// A kind of memory that can back a guest.
public enum MemoryKind: Hashable, Sendable, CustomStringConvertible {
  /// Private anonymous memory.
  case anonymous
  /// A memfd on tmpfs, mapped shared.
  case memfd
  /// A memfd on hugetlbfs, mapped shared.
  case hugetlb(PageSize)
  /// guest_memfd, mapped shared (Linux 6.18).
  case guestMemfd

  /// The name that users see and type.
  public var description: String {
    switch self {
    case .anonymous: "anonymous"
    case .memfd: "memfd"
    case .hugetlb(.size2MiB): "hugetlb-2M"
    case .hugetlb(.size1GiB): "hugetlb-1G"
    case .hugetlb(.size4KiB): "hugetlb-4K"
    case .guestMemfd: "guest_memfd"
    }
  }
}

/// What a kernel says when a range is registered in some modes.
public struct RegistrationOutcome: Sendable {
  /// The modes that were asked for together.
  public let modes: RegistrationModes
  /// The ioctls that are then offered, or why it was refused.
  public let result: Result<RangeOperations, Errno>
}

/// Finds out by trying which modes a kind of memory can be registered in.
///
/// No version of the kernel has a feature bit for everything (none for
/// guest_memfd), so the answer is what UFFDIO_REGISTER does.
public enum UserfaultProbe {
  /// The combinations of modes that handlers use.
  public static let combinations: [RegistrationModes] = [
    .missing, .minor, .writeProtect, [.missing, .minor], [.missing, .writeProtect],
    [.missing, .minor, .writeProtect], .readWriteProtect,
  ]

  /// Tries every combination on a range of this process; each is unregistered again.
  ///
  /// - Parameter features: negotiated for the probe where the kernel has them (WP on
  ///   shared memory asks for its feature bit).
  public static func outcomes(for range: HostRange) throws(UserfaultError)
    -> [RegistrationOutcome]
  {
    var outcomes: [RegistrationOutcome] = []
    for modes in combinations {
      let userfaultfd = try Userfaultfd(
        wanting: [.writeProtectFaults, .writeProtectShmemHugetlbfs, .readWriteProtect])
      do {
        let operations = try userfaultfd.register(range, modes: modes)
        outcomes.append(RegistrationOutcome(modes: modes, result: .success(operations)))
      } catch {
        outcomes.append(RegistrationOutcome(modes: modes, result: .failure(error)))
      }
    }
    return outcomes
  }

  /// Whether a guest_memfd range can at least be write-tracked: WP_ASYNC alone
  /// registers on stock kernels from 6.18.
  public static func registersWriteProtectAsync(_ range: HostRange) throws(UserfaultError) -> Bool {
    let supported = try Userfaultfd.supportedFeatures()
    guard supported.contains(.writeProtectAsync) else { return false }
    let userfaultfd = try Userfaultfd(requiring: .writeProtectAsync)
    return (try? userfaultfd.register(range, modes: .writeProtect)) != nil
  }

  /// Makes one page of the kind and probes it; memory that this machine cannot give
  /// is an `Errno` (`noMemory`: no free huge page).
  public static func outcomes(
    for kind: MemoryKind
  ) throws(UserfaultError) -> Result<[RegistrationOutcome], Errno> {
    let mapping: Mapping
    do {
      switch kind {
      case .anonymous:
        mapping = try Mapping(anonymous: PageSize.size4KiB.bytes)
      case .memfd:
        mapping = try sharedPage(.size4KiB)
      case .hugetlb(let size):
        mapping = try sharedPage(size)
      case .guestMemfd:
        return .failure(.notSupported)
      }
    } catch {
      return .failure(error)
    }
    return .success(try outcomes(for: mapping.range))
  }

  private static func sharedPage(_ size: PageSize) throws(Errno) -> Mapping {
    let file = try MemoryFile(name: "faultline-probe", length: size.bytes, pageSize: size)
    return try Mapping(of: file)
  }
}
