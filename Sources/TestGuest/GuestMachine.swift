// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import Synchronization
internal import SystemPackage

/// What runs the guest's program: KVM, or threads of this process.
protocol GuestMachine: AnyObject, Sendable {
  /// The body of a vCPU's thread; returns when the control says so.
  func runProcessor(_ index: Int, _ control: GuestControl) throws(GuestError)
  /// Makes a vCPU look for requests soon.
  func kick(_ index: Int)
  /// The registers of a parked vCPU.
  func saveRegisters(_ index: Int) throws(GuestError) -> [UInt8]
  /// How far a parked vCPU is with the item that it was handed.
  func progress(_ index: Int, of item: WorkloadItem) -> WorkloadItem
  /// Makes a buffer visible to the guest and returns where it sees it.
  func attachSamples(_ buffer: HostRange) throws(GuestError) -> UInt64
  /// Ends what runs beside the vCPUs, which have ended.
  func finish()
}

/// A thread that can be joined through a shared reference.
final class JoinableThread: Sendable {
  private let thread: Mutex<NamedThread?>

  init(name: String, _ body: @escaping @Sendable () -> Void) throws(GuestError) {
    let started = try host("Starting the thread \(name)") { () throws(Errno) in
      try NamedThread(name: name, body)
    }
    thread = Mutex(started)
  }

  /// Waits for its end. Later calls return at once.
  func join() {
    let taken = thread.withLock { $0.take() }
    if let taken { taken.join() }
  }
}
