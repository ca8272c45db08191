// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import LinuxSystem
public import MemoryImage
internal import Synchronization
public import SystemPackage
public import TestGuest

/// Saves a test guest to an image.
public enum GuestSnapshot {
  /// The type of the device state that holds one vCPU: "vcpu" as a little-endian number.
  public static let vcpuStateType: UInt32 = 0x7570_6376
  /// The metadata key that says what ran the guest: "kvm" or "process".
  public static let kindKey = "guest.kind"

  /// Pauses a guest, writes it to a new image, and leaves it paused.
  ///
  /// - Parameters:
  ///   - memory: the guest's memory.
  ///   - skipsAbsentPages: `true` when absent pages are zeros; `false` when a pager fills
  ///     them on demand.
  ///   - options: how the image holds pages.
  ///   - metadata: strings to keep with the image.
  ///   - progress: bytes of guest memory dealt with, and in all; from several threads.
  public static func take(
    of guest: TestGuest, memory: borrowing GuestMemoryObject, to path: FilePath,
    skipsAbsentPages: Bool, metadata: [String: String] = [:],
    options: ImageOptions = ImageOptions(),
    progress: (@Sendable (_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(SnapshotError) {
    guest.pause()
    do {
      var writer = try ImageWriter(
        path: path,
        regions: [
          ImageRegion(
            name: "ram", guestAddress: GuestAddress(0), length: memory.range.length,
            pageSize: memory.backing.pageSize)
        ], options: options)
      for (key, value) in metadata { try writer.setMetadata(key: key, value: value) }
      try writer.setMetadata(key: kindKey, value: guest.kind == .kvm ? "kvm" : "process")
      for (index, state) in try guest.saveState().enumerated() {
        try writer.add(
          state: DeviceState(type: vcpuStateType, instance: UInt32(index), bytes: state))
      }
      let ranges = skipsAbsentPages ? try memory.populatedRanges() : [0..<memory.range.length]
      try copy(ranges, of: memory.range, into: writer.blocks, progress)
      try writer.finish()
    } catch let error as ImageError {
      throw SnapshotError(.image, error.description)
    } catch let error as GuestError {
      throw SnapshotError(.guest, error.description)
    } catch {
      throw SnapshotError(.memory, "The guest's memory cannot be read: \(error)")
    }
  }

  /// Writes ranges of memory with two threads, 4 MiB at a time.
  private static func copy(
    _ ranges: [Range<Int>], of memory: HostRange, into writer: ImageBlockWriter,
    _ progress: (@Sendable (Int, Int) -> Void)?
  ) throws(ImageError) {
    let pieces = ranges.flatMap { range in
      stride(from: range.lowerBound, to: range.upperBound, by: PieceWork.pieceLength).map {
        $0..<min($0 + PieceWork.pieceLength, range.upperBound)
      }
    }
    let total = ranges.reduce(0) { $0 + $1.count }
    let done = ByteCounter()
    try PieceWork(pieces: pieces.count, threads: 2).run(name: "snapshot") {
      (index) throws(ImageError) in
      let part = pieces[index]
      // SAFETY: the caller keeps the mapping while this runs, and the guest is paused.
      let bytes = unsafe UnsafeRawBufferPointer(
        start: UnsafeRawPointer(bitPattern: UInt(memory.start.rawValue) + UInt(part.lowerBound)),
        count: part.count)
      try unsafe writer.write(
        region: 0, firstBlock: part.lowerBound / ImageLimits.blockSize, bytes: bytes)
      progress?(done.add(part.count), total)
    }
  }
}

/// Bytes that several threads have done.
private final class ByteCounter: Sendable {
  private let done = Atomic<Int>(0)
  func add(_ bytes: Int) -> Int { done.wrappingAdd(bytes, ordering: .relaxed).newValue }
}
