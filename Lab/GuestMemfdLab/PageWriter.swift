// SPDX-License-Identifier: Apache-2.0

import LinuxSystem
import Synchronization
import SystemPackage

/// A thread that writes one page to a guest_memfd.
final class PageWriter: Sendable {
  /// How it ended.
  enum Outcome { case pending, written, refused }
  private let state = Mutex(Outcome.pending)

  init(_ memory: SharedGuestMemory, _ page: Int, _ word: UInt64) throws {
    let descriptor = try memory.file.duplicate()
    let box = DescriptorBox(descriptor)
    let thread = try NamedThread(name: "writer") { [self] in
      let bytes = Pages.of([word])
      let written = unsafe bytes.withUnsafeBytes { bytes in
        (try? unsafe box.descriptor.write(bytes, at: page * 4096)) == 4096
      }
      state.withLock { $0 = written ? .written : .refused }
    }
    _ = thread
  }

  func outcome() -> Outcome {
    for _ in 0..<10_000 {
      let outcome = state.withLock { $0 }
      if outcome != .pending { return outcome }
      LabClock.sleep(milliseconds: 1)
    }
    return .pending
  }

  private final class DescriptorBox: Sendable {
    let descriptor: OwnedDescriptor
    init(_ descriptor: consuming OwnedDescriptor) { self.descriptor = descriptor }
  }
}
