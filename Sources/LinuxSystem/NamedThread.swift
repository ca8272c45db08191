// SPDX-License-Identifier: Apache-2.0

internal import CLinux
public import SystemPackage

/// A thread with a name that `ps -L` and `perf` show, outside of Swift's
/// cooperative pool. All signals but the kick signal are blocked in it.
@safe
public struct NamedThread: ~Copyable, @unchecked Sendable {
  // SAFETY: `pthread_t` may be joined from any thread; `join` consumes the owner,
  // so it happens once.
  private let handle: pthread_t

  private final class Body {
    let run: @Sendable () -> Void
    init(_ run: @escaping @Sendable () -> Void) { self.run = run }
  }

  /// Starts the thread. Names are cut at 15 bytes.
  public init(name: String, _ run: @escaping @Sendable () -> Void) throws(Errno) {
    var start = unsafe clinux_thread_start()
    // SAFETY: the thread takes this reference over; when it cannot start it is
    // released below.
    let body = unsafe Unmanaged.passRetained(Body(run))
    unsafe start.context = body.toOpaque()
    unsafe start.body = { context in
      guard let context = unsafe context else { return }
      unsafe Unmanaged<Body>.fromOpaque(context).takeRetainedValue().run()
    }
    unsafe withUnsafeMutableBytes(of: &start.name) { bytes in
      unsafe bytes.copyBytes(from: name.utf8.prefix(15))
    }
    var handle = pthread_t()
    let result = unsafe clinux_thread_create(&handle, &start)
    if result < 0 { unsafe body.release() }
    _ = try check(result)
    self.handle = handle
  }

  deinit { pthread_detach(handle) }

  /// Waits until the thread has ended. Called by the thread itself, it lets the thread
  /// clean up after itself (pthread_detach(3)) and returns at once.
  public consuming func join() {
    let handle = self.handle
    discard self
    if pthread_join(handle, nil) == EDEADLK { pthread_detach(handle) }
  }

  /// Where in the kernel a thread of this process waits (/proc/self/task/TID/wchan, proc(5)); `nil`
  /// when it runs, or that cannot be read.
  public static func waitChannel(of thread: CInt) -> String? {
    let path = FilePath("/proc/self/task/\(thread)/wchan")
    guard let file = try? OwnedDescriptor(openingForReading: path) else { return nil }
    var bytes = [UInt8](repeating: 0, count: 64)
    let count = unsafe bytes.withUnsafeMutableBytes { room in
      unsafe clinux_read(file.rawValue, room.baseAddress, room.count)
    }
    guard count > 0 else { return nil }
    let name = String(decoding: bytes.prefix(count), as: UTF8.self)
    return name == "0" ? nil : name
  }

  /// The kernel's id of the calling thread (gettid(2)).
  public static var currentID: CInt { CInt(clinux_gettid()) }
}

/// The signal that gets a thread out of a blocking call.
public enum KickSignal {
  /// Installs the handler that makes the signal interrupt and nothing else. Safe to
  /// call again.
  public static func install() throws(Errno) {
    _ = try check(clinux_install_interrupting_handler(clinux_kick_signal()))
  }

  /// Sends it to one thread of this process. `noSuchProcess` when it has ended.
  public static func send(toThread thread: CInt) throws(Errno) {
    _ = try check(clinux_tgkill(getpid(), thread, clinux_kick_signal()))
  }
}
