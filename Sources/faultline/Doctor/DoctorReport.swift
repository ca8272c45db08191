// SPDX-License-Identifier: Apache-2.0

import Foundation
import GuestMemory
import KVM
import LinuxSystem
import Snapshot
import SnapshotRestore
import SystemPackage
import Userfault

/// What this machine can do for Faultline; all of it found out by trying.
struct DoctorReport: Encodable {
  struct Memory: Encodable {
    struct Mode: Encodable {
      let modes: [String]
      let operations: [String]?
      let error: String?
    }
    let kind: String
    /// Why no memory of this kind can be had.
    let unavailable: String?
    let modes: [Mode]
  }

  struct Machine: Encodable {
    let available: Bool
    let error: String?
    let isPVM: Bool
    let guestMemfd: Bool
    let guestMemfdFlags: String?
    let dirtyRingEntries: Int
    let manualDirtyLogProtect: Bool
    let memoryFaultInfo: Bool
    let maximumVCPUs: Int
  }

  struct HugePages: Encodable {
    let pageSize: String
    let total: Int
    let free: Int
  }

  /// How guests on guest_memfd get their pages here.
  struct GuestMemfd: Encodable {
    /// `nil` when there is none.
    let strategy: String?
    let reason: String
  }

  /// Something that is missing: what, why, and how to get it.
  struct Advice: Encodable {
    let missing: String
    let why: String
    let how: String
  }

  let kernel: String
  let userID: UInt32
  let unprivilegedUserfaultfd: Bool
  let systemCall: String?
  let device: String?
  let features: [String]
  let memory: [Memory]
  let kvm: Machine
  let hugePages: [HugePages]
  let guestMemfd: GuestMemfd
  let canRestoreLazily: Bool
  let advice: [Advice]

  init() {
    kernel = Self.text("/proc/sys/kernel/osrelease") ?? "unknown"
    userID = getuid()
    unprivilegedUserfaultfd = Self.text("/proc/sys/vm/unprivileged_userfaultfd") == "1"
    systemCall = Self.failure(of: .systemCall)
    device = Self.failure(of: .device)
    let supported = try? Userfaultfd.supportedFeatures()
    features = supported?.kernelNames ?? []
    canRestoreLazily = supported != nil
    kvm = Self.machine()
    hugePages = Self.pools()
    memory = supported == nil ? [] : Self.kinds()
    guestMemfd = Self.guestMemfdStrategy()
    advice = DoctorAdvice.all(
      supported: supported, systemCall: systemCall, device: device, kvm: kvm, memory: memory,
      hugePages: hugePages)
  }

  // MARK: - Trying

  private static func failure(of origin: Userfaultfd.Origin) -> String? {
    do throws(UserfaultError) {
      _ = try Userfaultfd(origin: origin)
      return nil
    } catch {
      return error.description
    }
  }

  private static func kinds() -> [Memory] {
    let kinds: [MemoryKind] = [
      .anonymous, .memfd, .hugetlb(.size2MiB), .hugetlb(.size1GiB), .guestMemfd,
    ]
    return kinds.map { kind in
      let result: Result<[RegistrationOutcome], Errno>
      do throws(UserfaultError) {
        result =
          kind == .guestMemfd ? try guestMemfdOutcomes() : try UserfaultProbe.outcomes(for: kind)
      } catch {
        return Memory(kind: "\(kind)", unavailable: error.description, modes: [])
      }
      switch result {
      case .failure(let errno):
        return Memory(kind: "\(kind)", unavailable: "\(errno)", modes: [])
      case .success(let outcomes):
        return Memory(kind: "\(kind)", unavailable: nil, modes: outcomes.map(describe))
      }
    }
  }

  private static func describe(_ outcome: RegistrationOutcome) -> Memory.Mode {
    switch outcome.result {
    case .success(let operations):
      Memory.Mode(modes: outcome.modes.names, operations: operations.names, error: nil)
    case .failure(let errno):
      Memory.Mode(modes: outcome.modes.names, operations: nil, error: "\(errno)")
    }
  }

  /// guest_memfd belongs to a virtual machine, so probing it takes KVM.
  private static func guestMemfdOutcomes() throws(UserfaultError) -> Result<
    [RegistrationOutcome], Errno
  > {
    let mapping: Mapping
    do throws(Errno) {
      let system = try KVMSystem()
      let machine = try VirtualMachine(system)
      let length = PageSize.size2MiB.bytes
      let memory = try machine.makeGuestMemfd(length: length, flags: [.mmap, .initShared])
      mapping = try Mapping(of: memory, length: length, sharing: .shared)
    } catch {
      return .failure(error)
    }
    return .success(try UserfaultProbe.outcomes(for: mapping.range))
  }

  private static func guestMemfdStrategy() -> GuestMemfd {
    do throws(SnapshotError) {
      let (strategy, reason) = try GuestMemfdStrategy.probe()
      return GuestMemfd(strategy: strategy.rawValue, reason: reason)
    } catch {
      return GuestMemfd(strategy: nil, reason: error.description)
    }
  }

  private static func machine() -> Machine {
    let isPVM = unsafe access("/sys/module/kvm_pvm", F_OK) == 0
    do throws(Errno) {
      let capabilities = try KVMSystem().capabilities()
      return Machine(
        available: true, error: nil, isPVM: isPVM, guestMemfd: capabilities.guestMemfd,
        guestMemfdFlags: capabilities.guestMemfdFlags.description,
        dirtyRingEntries: capabilities.dirtyRingEntries,
        manualDirtyLogProtect: !capabilities.manualDirtyLogProtect.isEmpty,
        memoryFaultInfo: capabilities.memoryFaultInfo, maximumVCPUs: capabilities.maximumVCPUs)
    } catch {
      return Machine(
        available: false, error: "\(error)", isPVM: isPVM, guestMemfd: false,
        guestMemfdFlags: nil, dirtyRingEntries: 0, manualDirtyLogProtect: false,
        memoryFaultInfo: false, maximumVCPUs: 0)
    }
  }

  private static func pools() -> [HugePages] {
    [PageSize.size2MiB, .size1GiB].map { size in
      HugePages(
        pageSize: "\(size)", total: hugePages("nr_hugepages", size), free: freeHugePages(size))
    }
  }

  /// Huge pages of the pool that nobody has.
  static func freeHugePages(_ size: PageSize) -> Int { hugePages("free_hugepages", size) }

  private static func hugePages(_ name: String, _ size: PageSize) -> Int {
    let pool = "/sys/kernel/mm/hugepages/hugepages-\(size.bytes >> 10)kB"
    return Int(text("\(pool)/\(name)") ?? "") ?? 0
  }

  private static func text(_ path: String) -> String? {
    guard let data = FileManager.default.contents(atPath: path) else { return nil }
    return String(decoding: data, as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines)
  }
}
