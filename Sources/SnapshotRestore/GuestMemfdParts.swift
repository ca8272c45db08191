// SPDX-License-Identifier: Apache-2.0

internal import GuestMemory
internal import KVM
internal import LinuxSystem
internal import MemoryImage
internal import Pager
internal import Snapshot
internal import Synchronization
internal import SystemPackage
internal import TestGuest

/// A guest_memfd, the machine that it belongs to, and what vCPUs ask through.
final class GuestMemfdParts: Sendable {
  let strategy: GuestMemfdStrategy
  let handle: GuestMachineHandle
  let file: GuestMemfdBinding.File
  let userfaults: UserfaultBitmap?

  /// Makes a guest_memfd for a guest.
  init(_ strategy: GuestMemfdStrategy, length: Int) throws(SnapshotError) {
    do {
      handle = try GuestMachineHandle()
      var flags: GuestMemfdFlags = [.mmap, .initShared]
      if strategy == .threeWay { flags.insert(.write) }
      file = GuestMemfdBinding.File(
        try handle.machine.makeGuestMemfd(length: length, flags: flags))
      userfaults =
        strategy == .threeWay ? try UserfaultBitmap(pageCount: length / 4096, allSet: true) : nil
      self.strategy = strategy
    } catch {
      throw SnapshotError(
        .memory,
        "\(length >> 20) MiB of guest_memfd for \(strategy.rawValue) cannot be had: \(error)")
    }
  }

  /// The guest's memory, with a descriptor of its own.
  func makeMemory(length: Int) throws(SnapshotError) -> GuestMemoryObject {
    do throws(Errno) {
      return try GuestMemoryObject(guestMemfd: try file.descriptor.duplicate(), length: length)
    } catch {
      throw SnapshotError(.memory, "\(length >> 20) MiB of guest_memfd cannot be mapped: \(error)")
    }
  }

  /// How the guest's slots use the memory; `nil` lets them use the mapping.
  func binding(
    _ session: PagerSession<ImageSource>, vcpus: Int
  ) throws(SnapshotError) -> GuestMemfdBinding? {
    switch strategy {
    case .twoWay: return nil
    case .aheadOfTime: return GuestMemfdBinding(file: file)
    case .threeWay: break
    }
    guard let userfaults else { return nil }
    do throws(Errno) {
      var resolvers: [StageTwoResolver<ImageSource>] = []
      for index in 0..<vcpus { resolvers.append(try session.makeStageTwoResolver(index)) }
      return GuestMemfdBinding(file: file, userfaults: userfaults) { [resolvers] vcpu, address in
        guard resolvers[vcpu].resolve(address) == .ready else { return false }
        userfaults.clear(Int(address.rawValue / 4096))
        return true
      }
    } catch {
      throw SnapshotError(.pager, "no memory for the stage-2 faults of \(vcpus) vCPUs: \(error)")
    }
  }
}

/// Fills memory that no userfaultfd watches, before its guest runs.
struct AheadOfTimeFill: Sendable {
  private static let piece = 1 << 20

  let image: MemoryImage
  let length: Int
  private let shared = Shared()

  private final class Shared: Sendable {
    let next = Atomic<Int>(0)
    let done = Atomic<Int>(0)
    let failure = Mutex<String?>(nil)
  }

  init(_ image: MemoryImage, length: Int) {
    self.image = image
    self.length = length
  }

  /// Copies every block that is not zero, with so many threads.
  ///
  /// Throws `.image` when a block has no right content: without userfaultfd a page cannot
  /// be poisoned, so the guest must not run.
  func run(
    into memory: HostRange, threads count: Int, progress: (@Sendable (Int, Int) -> Void)?
  ) throws(SnapshotError) {
    let body: @Sendable () -> Void = { copy(into: memory, progress) }
    do throws(Errno) {
      var helpers: [HelperThread] = []
      for index in 1..<max(2, count) {
        helpers.append(HelperThread(try NamedThread(name: "ahead\(index)", body)))
      }
      body()
      for helper in helpers { helper.join() }
    } catch {
      throw SnapshotError(.pager, "no thread for filling memory: \(error)")
    }
    if let failure = shared.failure.withLock({ $0 }) { throw SnapshotError(.image, failure) }
  }

  private func copy(into memory: HostRange, _ progress: (@Sendable (Int, Int) -> Void)?) {
    while shared.failure.withLock({ $0 }) == nil {
      let start = shared.next.wrappingAdd(Self.piece, ordering: .relaxed).oldValue
      guard start < length else { return }
      let end = min(start + Self.piece, length)
      var position = start
      while position < end {
        do throws(ImageError) {
          // SAFETY: the range lies in the mapping, which the caller keeps; no guest runs.
          let run = try unsafe image.read(
            region: 0, firstBlock: position / ImageLimits.blockSize,
            blockCount: (end - position) / ImageLimits.blockSize,
            into: UnsafeMutableRawPointer(
              bitPattern: UInt(memory.start.rawValue) + UInt(position)
            ).unsafelyUnwrapped)
          position += run.blockCount * ImageLimits.blockSize
        } catch {
          shared.failure.withLock { $0 = $0 ?? error.description }
          return
        }
      }
      progress?(
        shared.done.wrappingAdd(end - start, ordering: .relaxed).newValue, length)
    }
  }
}

/// A thread behind a shared reference.
private final class HelperThread: Sendable {
  private let thread: Mutex<NamedThread?>
  init(_ thread: consuming NamedThread) { self.thread = Mutex(thread) }
  func join() {
    let thread = thread.withLock { $0.take() }
    if let thread { thread.join() }
  }
}
