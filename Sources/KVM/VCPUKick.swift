// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// Gets a vCPU out of KVM_RUN from another thread, and loses no request.
///
/// A signal alone has a race: it may come after the thread last looked for requests and
/// before it enters KVM_RUN. So `immediate_exit` is set first: the coming KVM_RUN
/// returns at once, a KVM_RUN under way is ended by the signal. The order of the vCPU's
/// thread is: `run()`, then `acknowledge()`, then look for requests, then `run()` again.
///
/// On hosts with KVM_PVM a vCPU that waits for a page (userfaultfd) does not leave
/// KVM_RUN until the page is there: resolve or release faults before you wait for it.
public final class VCPUKick: Sendable {
  private let page: RunPage
  private let thread = Mutex<CInt?>(nil)

  init(_ page: RunPage) { self.page = page }

  /// The calling thread is the one that runs the vCPU, until `detach()`.
  ///
  /// The signal's handler must be in place (`KickSignal.install()`) and the signal not
  /// blocked, as in every `NamedThread`.
  public func attach() { thread.withLock { $0 = NamedThread.currentID } }

  /// No thread runs the vCPU any more. Before the attached thread ends.
  public func detach() { thread.withLock { $0 = nil } }

  /// From any thread: KVM_RUN returns, the current one or else the next.
  public func send() {
    page.setImmediateExit(true)
    // The lock closes the race with detach(): a number is never used after its thread
    // ended and the kernel gave it to another one.
    thread.withLock { thread in
      if let thread { try? KickSignal.send(toThread: thread) }
    }
  }

  /// By the vCPU's thread after KVM_RUN: the next one runs again. Look for requests
  /// after this call, not before.
  public func acknowledge() { page.setImmediateExit(false) }
}
