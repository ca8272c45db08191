// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram
internal import LinuxSystem

/// The first MiB of guest memory: page tables, program, and a mailbox for each vCPU.
/// See cguest_layout.h for the addresses.
enum GuestLayout {
  static let largePage = 2 << 20
  static let gibibyte = 1 << 30
  static let maximumProcessors = 64
  static let maximumLength = 64 << 30

  /// Present, writable, user.
  private static let tableEntry: UInt64 = 0x7
  /// The same, and a 2 MiB page.
  private static let pageEntry: UInt64 = 0x87

  static func mailbox(of processor: Int) -> Int {
    Int(CGUEST_MAILBOX) + processor * Int(CGUEST_MAILBOX_SIZE)
  }

  static func validate(_ memory: HostRange, processors: Int) throws(GuestError) {
    guard memory.length >= largePage, memory.length <= maximumLength,
      memory.length % largePage == 0, memory.start.rawValue % 4096 == 0
    else {
      throw GuestError(
        .invalidArgument,
        "Guest memory must be 2 MiB to 64 GiB, a multiple of 2 MiB, not \(memory.length) bytes")
    }
    guard (1...maximumProcessors).contains(processors) else {
      throw GuestError(
        .invalidArgument, "A guest has 1 to \(maximumProcessors) vCPUs, not \(processors)")
    }
  }

  /// Writes what a new guest needs: an identity map in 2 MiB pages of its memory and of
  /// the sample slot, the program, and counters of zero.
  static func install(in memory: HostRange, processors: Int) {
    func store(_ value: UInt64, at offset: Int) {
      // SAFETY: the caller owns the mapped range; every offset lies in its first MiB.
      unsafe pointer(memory, offset).storeBytes(of: value, as: UInt64.self)
    }
    store(UInt64(CGUEST_PDPT) | tableEntry, at: Int(CGUEST_PML4))
    for table in 0..<(memory.length + gibibyte - 1) / gibibyte {
      let directory = Int(CGUEST_RAM_PD) + table * 4096
      store(UInt64(directory) | tableEntry, at: Int(CGUEST_PDPT) + table * 8)
      for entry in 0..<512 {
        let address = table * gibibyte + entry * largePage
        store(
          address < memory.length ? UInt64(address) | pageEntry : 0, at: directory + entry * 8)
      }
    }
    let sampleBase = Int(CGUEST_SAMPLE_BASE)
    store(
      UInt64(CGUEST_SAMPLE_PD) | tableEntry, at: Int(CGUEST_PDPT) + sampleBase / gibibyte * 8)
    for entry in 0..<512 {
      store(
        UInt64(sampleBase + entry * largePage) | pageEntry, at: Int(CGUEST_SAMPLE_PD) + entry * 8)
    }
    // SAFETY: the program is smaller than the room between it and the mailboxes, which
    // the tests check.
    unsafe pointer(memory, Int(CGUEST_PROGRAM)).copyMemory(
      from: cguest_program_bytes(), byteCount: cguest_program_size())
    for processor in 0..<processors {
      store(0, at: mailbox(of: processor) + Int(CGUEST_MAILBOX_COUNTER))
    }
  }

  /// The host's view of a guest address.
  @unsafe
  static func pointer(_ memory: HostRange, _ offset: Int) -> UnsafeMutableRawPointer {
    // SAFETY: a mapped range does not begin at address zero.
    unsafe UnsafeMutableRawPointer(bitPattern: UInt(memory.start.rawValue) + UInt(offset))
      .unsafelyUnwrapped
  }
}
