// SPDX-License-Identifier: Apache-2.0

internal import CLinux
internal import SystemPackage

/// What the CPUID instruction tells a guest.
public struct CPUIDTable: Hashable, Sendable {
  /// One leaf, or one sub-leaf.
  public struct Entry: Hashable, Sendable {
    /// EAX and ECX that select it.
    public var function, index: UInt32
    /// KVM_CPUID_FLAG_ bits, such as "the index matters".
    public var flags: UInt32
    /// What the instruction returns.
    public var eax, ebx, ecx, edx: UInt32
  }

  /// All of them, in KVM's order.
  public var entries: [Entry]

  /// A table of given entries.
  public init(entries: [Entry]) { self.entries = entries }

  private static let header = MemoryLayout<kvm_cpuid2>.size
  private static let stride = MemoryLayout<kvm_cpuid_entry2>.stride

  /// Asks with more and more room until KVM no longer says E2BIG.
  static func read(
    _ ask: (UnsafeMutablePointer<kvm_cpuid2>) throws(Errno) -> Int
  ) throws(Errno) -> CPUIDTable {
    var room = 128
    while true {
      let storage = RawStorage(byteCount: header + room * stride)
      let table = unsafe storage.bytes.bindMemory(to: kvm_cpuid2.self, capacity: 1)
      unsafe table.pointee.nent = UInt32(room)
      do {
        _ = try unsafe ask(table)
      } catch Errno(rawValue: E2BIG) where room < 65_536 {
        room *= 2
        continue
      }
      // SAFETY: KVM wrote `nent` entries, never more than there was room for.
      let count = unsafe min(Int(table.pointee.nent), room)
      return CPUIDTable(
        entries: (0..<count).map { index in
          let entry = unsafe storage.bytes.load(
            fromByteOffset: header + index * stride, as: kvm_cpuid_entry2.self)
          return Entry(
            function: entry.function, index: entry.index, flags: entry.flags, eax: entry.eax,
            ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx)
        })
    }
  }

  /// Hands the table to KVM in its own form.
  func withKernelTable(
    _ use: (UnsafeMutablePointer<kvm_cpuid2>) throws(Errno) -> Int
  ) throws(Errno) {
    let storage = RawStorage(byteCount: Self.header + entries.count * Self.stride)
    let table = unsafe storage.bytes.bindMemory(to: kvm_cpuid2.self, capacity: 1)
    unsafe table.pointee.nent = UInt32(entries.count)
    for (index, entry) in entries.enumerated() {
      let raw = kvm_cpuid_entry2(
        function: entry.function, index: entry.index, flags: entry.flags, eax: entry.eax,
        ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx, padding: (0, 0, 0))
      unsafe storage.bytes.storeBytes(
        of: raw, toByteOffset: Self.header + index * Self.stride, as: kvm_cpuid_entry2.self)
    }
    _ = try unsafe use(table)
  }
}

// MARK: - Bytes of a saved state

extension CPUIDTable {
  /// An array of struct kvm_cpuid_entry2.
  var bytes: [UInt8] {
    entries.flatMap { entry in
      [
        entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx, 0,
        0, 0,
      ].flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> ($0 * 8)) } }
    }
  }

  /// The same backwards; a rest that is no whole entry is left out.
  init(bytes: [UInt8]) {
    entries = Swift.stride(from: 0, to: bytes.count, by: Self.stride).compactMap { start in
      let words = (0..<7).compactMap { ByteCursor.number(in: bytes, at: start + $0 * 4, size: 4) }
      guard words.count == 7 else { return nil }
      let word = words.map { UInt32($0) }
      return Entry(
        function: word[0], index: word[1], flags: word[2], eax: word[3], ebx: word[4],
        ecx: word[5], edx: word[6])
    }
  }
}
