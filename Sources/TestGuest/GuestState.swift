// SPDX-License-Identifier: Apache-2.0

internal import CGuestProgram
internal import KVM
internal import LinuxSystem

/// The saved state of one vCPU of a test guest: what it was doing, and with KVM its
/// registers. The layout is in docs/vcpu-state.md.
struct GuestState: Sendable {
  private static let magic = Array("FLTGUEST".utf8)
  private static let version: UInt64 = 1
  /// More than any workload makes; keeps a wrong number from asking for memory.
  private static let mostItems: UInt64 = 65_536

  var kind: TestGuest.Kind
  var processor: Int
  var processorCount: Int
  var memoryLength: Int
  var batches: UInt64 = 0
  var running: WorkloadItem?
  var queue: [WorkloadItem] = []
  var results: [WorkloadResult] = []
  /// An encoded `VCPUState`; empty for a process guest.
  var registers: [UInt8] = []

  init(kind: TestGuest.Kind, processor: Int, processorCount: Int, memoryLength: Int) {
    self.kind = kind
    self.processor = processor
    self.processorCount = processorCount
    self.memoryLength = memoryLength
  }

  func encode() -> [UInt8] {
    var bytes = Self.magic
    func append(_ value: UInt64) {
      for shift in stride(from: 0, to: 64, by: 8) {
        bytes.append(UInt8(truncatingIfNeeded: value >> UInt64(shift)))
      }
    }
    for number in [
      Self.version, kind == .kvm ? 0 : 1, UInt64(processor), UInt64(processorCount),
      UInt64(memoryLength), batches, running == nil ? 0 : 1, UInt64(queue.count),
      UInt64(results.count), UInt64(registers.count),
    ] { append(number) }
    if let running { bytes += running.bytes }
    for item in queue { bytes += item.bytes }
    for result in results { result.words.forEach(append) }
    return bytes + registers
  }

  init(decoding bytes: [UInt8]) throws(GuestError) {
    var cursor = ByteCursor(bytes)
    guard cursor.take(Self.magic.count) == Self.magic else {
      throw Self.damaged("it does not begin with FLTGUEST")
    }
    var header: [UInt64] = []
    for _ in 0..<10 {
      guard let number = cursor.takeNumber(size: 8) else {
        throw Self.damaged("it ends within its header")
      }
      header.append(number)
    }
    guard header[0] == Self.version else { throw Self.damaged("its version is \(header[0])") }
    guard header[1] <= 1, let index = Int(exactly: header[2]), let count = Int(exactly: header[3]),
      let length = Int(exactly: header[4]), header[6] <= 1, header[7] <= Self.mostItems,
      header[8] <= Self.mostItems, let registerCount = Int(exactly: header[9])
    else { throw Self.damaged("its header has impossible numbers") }
    self.init(
      kind: header[1] == 0 ? .kvm : .process, processor: index, processorCount: count,
      memoryLength: length)
    batches = header[5]
    if header[6] == 1 { running = try Self.item(&cursor) }
    for _ in 0..<header[7] { queue.append(try Self.item(&cursor)) }
    for _ in 0..<header[8] {
      var words: [UInt64] = []
      for _ in 0..<WorkloadResult.wordCount {
        guard let word = cursor.takeNumber(size: 8) else {
          throw Self.damaged("it ends within its results")
        }
        words.append(word)
      }
      results.append(WorkloadResult(words: words))
    }
    guard let registers = cursor.take(registerCount), cursor.isAtEnd else {
      throw Self.damaged("its registers have another length than it says")
    }
    self.registers = registers
  }

  private static func item(_ cursor: inout ByteCursor) throws(GuestError) -> WorkloadItem {
    guard let bytes = cursor.take(WorkloadItem.byteCount),
      let item = WorkloadItem(bytes: bytes[...])
    else { throw damaged("it ends within its workload") }
    return item
  }

  private static func damaged(_ reason: String) -> GuestError {
    GuestError(
      .damagedState, "The saved state cannot be used: \(reason). It is damaged or not a guest's")
  }

  // MARK: - Use

  /// Whether a guest with that memory can go on from here. A process guest's workload is
  /// checked to stay within its memory.
  func validate(
    for memory: HostRange, _ kind: TestGuest.Kind, processor index: Int, of count: Int
  ) throws(GuestError) {
    guard self.kind == kind, memoryLength == memory.length, processor == index,
      processorCount == count
    else {
      throw GuestError(
        .damagedState,
        "The saved state is of vCPU \(processor) of \(processorCount) of a \(self.kind) guest "
          + "with \(memoryLength) bytes; this is vCPU \(index) of \(count) of a \(kind) guest "
          + "with \(memory.length) bytes")
    }
    for item in queue + (running.map { [$0] } ?? []) {
      guard item.isSafe(guestPages: UInt64(memory.length / 4096), processor: index) else {
        throw Self.damaged("its workload leaves the guest's memory")
      }
    }
  }

  func vcpuState() throws(GuestError) -> VCPUState {
    do {
      return try VCPUState(decoding: registers)
    } catch {
      throw GuestError(.damagedState, error.description)
    }
  }

  /// What the control has to know. A KVM vCPU is within its item by itself; a thread gets
  /// it again, at the position it had.
  func processor(_ kind: TestGuest.Kind) -> GuestControl.Processor {
    var processor = GuestControl.Processor()
    processor.queue = queue
    processor.results = results
    processor.batches = batches
    switch kind {
    case .kvm: processor.running = running
    case .process:
      if let running { processor.queue.insert(running, at: 0) }
      // Samples do not survive: their buffer is not part of the guest.
      for index in processor.queue.indices { processor.queue[index].raw.samples = 0 }
    }
    return processor
  }
}

extension WorkloadItem {
  /// Whether a routine that gets this stays within the memory of its guest, and ends.
  func isSafe(guestPages: UInt64, processor: Int) -> Bool {
    let first = UInt64(CGUEST_SYSTEM_AREA) / 4096
    guard (1...Self.largestBatch).contains(raw.batch) else { return false }
    switch CInt(truncatingIfNeeded: raw.command) {
    case CGUEST_COMMAND_COUNTER:
      return raw.target
        == UInt64(GuestLayout.mailbox(of: processor) + Int(CGUEST_MAILBOX_COUNTER))
    case CGUEST_COMMAND_FILL, CGUEST_COMMAND_VERIFY, CGUEST_COMMAND_TOUCH, CGUEST_COMMAND_DIRTY:
      guard raw.first >= first, raw.first <= guestPages, raw.count <= guestPages - raw.first else {
        return false
      }
      var expected = self
      expected.setOrder(.random)
      guard raw.mask == expected.raw.mask, raw.shift == expected.raw.shift else { return false }
      // A dirty workload's limit is a generation, and without pages it would count those
      // for ever; zipf's is a number of touches.
      let isFree = raw.command == UInt64(CGUEST_COMMAND_DIRTY) && raw.count > 0
      let isZipf = raw.order == UInt64(CGUEST_ORDER_ZIPF)
      guard isFree || (isZipf && raw.count > 0) || raw.limit <= raw.count else { return false }
      return raw.order <= UInt64(CGUEST_ORDER_ZIPF) && (!isZipf || raw.random != 0)
    default: return false
    }
  }
}
