// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import MemoryImage
internal import Pager
internal import Synchronization

/// Brings an image's working set in the background.
final class WorkingSetReplay: Sendable {
  private let thread: Mutex<NamedThread?>

  /// Begins; `nil` when the image has no sound working set, or there is no thread for it: the
  /// guest's faults bring everything then.
  init?(of image: MemoryImage, _ session: PagerSession<ImageSource>) {
    var working = session.makeReplayPlan()
    guard (try? image.readWorkingSet({ working.add($0) })) == true else { return nil }
    let plan = working
    guard
      let thread = try? NamedThread(
        name: "replay",
        {
          // Damaged pages are in the session's failures; its end ends this.
          try? session.replay(plan)
        })
    else { return nil }
    self.thread = Mutex(thread)
  }

  /// Waits for the end.
  func wait() {
    let thread = thread.withLock { $0.take() }
    if let thread { thread.join() }
  }
}
