// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage
internal import Userfault

/// A child that the guest's process forked: it has the memory too, and waits in its own
/// userfaultfd where a page is absent.
///
/// What is to be in such a page cannot be told for certain: whether the child shares the memory
/// is known only to it. So it is told: a touch is a memory error, and where the kernel has no
/// UFFDIO_POISON it waits. Closing the descriptor would turn its absent pages into zeros. A
/// child that only goes on to execve(2), as VMMs' helpers do, touches none.
final class ForkedChild: Sendable {
  private let userfaultfd: Userfaultfd
  private let stopSign: EventDescriptor
  private let isDone = Atomic<Bool>(false)
  private let thread = Mutex<ThreadBox?>(nil)

  init(_ descriptor: consuming OwnedDescriptor, features: UserfaultFeatures) throws(Errno) {
    userfaultfd = try Userfaultfd(adopting: descriptor, features: features)
    stopSign = try EventDescriptor()
  }

  /// Begins to answer its faults, until its memory is gone or `stop`.
  func start() throws(Errno) {
    let thread = try NamedThread(name: "forkedchild") { [self] in answer() }
    let box = ThreadBox(thread)
    self.thread.withLock { $0 = box }
  }

  func stop() {
    stopSign.signal()
    thread.withLock { $0 }?.join()
  }

  /// Whether its memory is gone, and with it the thread.
  var hasEnded: Bool { isDone.load(ordering: .acquiring) }

  private func answer() {
    defer { isDone.store(true, ordering: .releasing) }
    let set = PollSet(userfaultfd.descriptor.rawValue, stopSign.descriptor.rawValue)
    var events = EventBuffer()
    do throws(Errno) {
      while true {
        guard let ready = try set.wait(milliseconds: 500) else {
          // Nothing tells of its end but a call that needs its memory.
          if userfaultfd.hasAddressSpace { continue }
          return
        }
        guard ready.tag == 0, ready.isReadable else { return }
        _ = try events.read(from: userfaultfd)
        while let event = events.pop() { handle(event) }
      }
    } catch {
      // Not a userfaultfd that can be read: whoever waits in it goes on waiting.
    }
  }

  private func handle(_ event: consuming UserfaultEvent) {
    switch consume event {
    case .pageFault(let fault):
      guard userfaultfd.features.contains(.poison) else { return }
      for size in [PageSize.size4KiB, .size2MiB, .size1GiB] {
        let start = fault.address.rawValue & ~UInt64(size.bytes - 1)
        let page = HostRange(start: HostAddress(start), length: size.bytes)
        let resolution = userfaultfd.poison(page)
        // A smaller unit than that of the memory is refused.
        if case .failed(.invalidArgument) = resolution.obstacle { continue }
        // Faults anew where an event stands before it.
        if resolution.obstacle != nil { try? userfaultfd.wake(page) }
        return
      }
    default: break
    }
  }
}
