// SPDX-License-Identifier: Apache-2.0

public import ArgumentParser
import DaemonConfiguration
public import GuestMemory
import LinuxSystem
public import Pager
public import SnapshotRestore
import TestGuest

/// A size such as 64M or 1G.
struct MemorySize: ExpressibleByArgument, Equatable {
  let bytes: Int

  init(bytes: Int) { self.bytes = bytes }

  init?(argument: String) {
    let units: [Character: Int] = ["K": 1 << 10, "M": 1 << 20, "G": 1 << 30]
    var digits = argument.uppercased()
    if digits.hasSuffix("IB") { digits.removeLast(2) }
    let unit = digits.last.flatMap { units[$0] }
    if unit != nil { digits.removeLast() }
    guard let number = Int(digits), number > 0 else { return nil }
    let (bytes, overflow) = number.multipliedReportingOverflow(by: unit ?? 1)
    guard !overflow else { return nil }
    self.bytes = bytes
  }

  var defaultValueDescription: String {
    bytes % (1 << 30) == 0 ? "\(bytes >> 30)G" : "\(bytes >> 20)M"
  }
}

/// Refuses what no test guest can have.
func validateGuest(memory: MemorySize, vcpus: Int) throws {
  guard memory.bytes >= 2 << 20, memory.bytes <= 64 << 30, memory.bytes % (2 << 20) == 0 else {
    throw ValidationError("--memory must be 2M to 64G and a multiple of 2M")
  }
  guard (1...64).contains(vcpus) else { throw ValidationError("--vcpus must be 1 to 64") }
}

extension DirtyTrackingMethod: ExpressibleByArgument {}
extension GuestMemfdStrategy: ExpressibleByArgument {}

extension MemoryBacking: ExpressibleByArgument {
  /// Takes the names that `allNamed` has.
  public init?(argument: String) { self.init(name: argument) }
  /// For help.
  public static var allValueStrings: [String] { allNamed.map(\.description) }
  /// For completion; only enumerations have it by default.
  public static var defaultCompletionKind: CompletionKind { .list(allValueStrings) }
  /// The name.
  public var defaultValueDescription: String { description }
}

extension DamagePolicy: ExpressibleByArgument {}
extension ResolutionMode: ExpressibleByArgument {}

/// How long a page may take, as `faultline serve` is told.
struct SourceTimeout: ExpressibleByArgument {
  let nanoseconds: UInt64
  init?(argument: String) {
    guard let milliseconds = SessionConfiguration.sourceTimeout(argument) else { return nil }
    nanoseconds = UInt64(milliseconds) * 1_000_000
  }
}
extension RestoreStrategy: ExpressibleByArgument {}

/// What runs the guest.
enum GuestKind: String, ExpressibleByArgument, CaseIterable {
  case automatic, kvm, process

  /// The kind to use here; says so when it is not KVM.
  func resolve() throws -> TestGuest.Kind {
    switch self {
    case .process: return .process
    case .kvm:
      guard TestGuest.kvmIsAvailable() else {
        throw CommandFailure(
          "/dev/kvm cannot be used here; `faultline doctor` says why. Use --guest process.")
      }
      return .kvm
    case .automatic:
      if TestGuest.kvmIsAvailable() { return .kvm }
      Terminal.note("/dev/kvm cannot be used here: the guest runs as threads of a plain process.")
      return .process
    }
  }
}

/// The guest's memory, for verbs that make some.
struct MemoryOptions: ParsableArguments {
  @Option(
    help: ArgumentHelp(
      "What the guest's memory is made of: anonymous, memfd, hugetlb-2M or hugetlb-1G.",
      valueName: "kind"))
  var backing: MemoryBacking = .anonymous
}
