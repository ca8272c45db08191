// SPDX-License-Identifier: Apache-2.0

internal import CLinux

/// A readers-writer lock in which a waiting writer goes before new readers
/// (pthread_rwlock_init(3)). Not recursive.
@safe
public struct ReadWriteLock: ~Copyable, @unchecked Sendable {
  // SAFETY: the lock lives at a stable address from init to deinit, and pthread's
  // operations on it are safe from any thread.
  private let lock: UnsafeMutablePointer<pthread_rwlock_t>

  /// An open lock.
  public init() {
    unsafe lock = .allocate(capacity: 1)
    // Fails only for attributes that the C shim does not use.
    _ = unsafe clinux_rwlock_init(lock)
  }

  deinit {
    unsafe pthread_rwlock_destroy(lock)
    unsafe lock.deallocate()
  }

  /// Runs `body` together with other readers, but no writer.
  @inline(__always)
  public borrowing func read<Value, Failure: Error>(
    _ body: () throws(Failure) -> Value
  ) throws(Failure) -> Value {
    unsafe pthread_rwlock_rdlock(lock)
    defer { unsafe pthread_rwlock_unlock(lock) }
    return try body()
  }

  /// Runs `body` alone.
  @inline(__always)
  public borrowing func write<Value, Failure: Error>(
    _ body: () throws(Failure) -> Value
  ) throws(Failure) -> Value {
    unsafe pthread_rwlock_wrlock(lock)
    defer { unsafe pthread_rwlock_unlock(lock) }
    return try body()
  }

  /// Runs `body` together with other readers, or, when a thread has held the lock for too long,
  /// without it: `body` is told whether it is held. For what has to come to an end also where a
  /// thread is stuck in the kernel with the lock.
  ///
  /// - Parameter patience: nanoseconds.
  public borrowing func read<Value, Failure: Error>(
    patience: UInt64, _ body: (_ isHeld: Bool) throws(Failure) -> Value
  ) throws(Failure) -> Value {
    let deadline = MonotonicClock.nanoseconds &+ patience
    var isHeld = unsafe pthread_rwlock_tryrdlock(lock) == 0
    while !isHeld, MonotonicClock.nanoseconds < deadline {
      usleep(200)
      isHeld = unsafe pthread_rwlock_tryrdlock(lock) == 0
    }
    defer { if isHeld { unsafe pthread_rwlock_unlock(lock) } }
    return try body(isHeld)
  }

  /// Waits until every reader and writer that had the lock when it was called is done, but not for
  /// longer than that.
  ///
  /// - Parameter patience: nanoseconds.
  public borrowing func passThrough(patience: UInt64) {
    let deadline = MonotonicClock.nanoseconds &+ patience
    while unsafe pthread_rwlock_trywrlock(lock) != 0 {
      guard MonotonicClock.nanoseconds < deadline else { return }
      usleep(100)
    }
    unsafe pthread_rwlock_unlock(lock)
  }

  /// Runs `body` alone, if that can be had in time; `nil` where it cannot.
  ///
  /// - Parameter patience: nanoseconds.
  public borrowing func write<Value, Failure: Error>(
    patience: UInt64, _ body: () throws(Failure) -> Value
  ) throws(Failure) -> Value? {
    let deadline = MonotonicClock.nanoseconds &+ patience
    while unsafe pthread_rwlock_trywrlock(lock) != 0 {
      guard MonotonicClock.nanoseconds < deadline else { return nil }
      sched_yield()
    }
    defer { unsafe pthread_rwlock_unlock(lock) }
    return try body()
  }

  /// Runs `body` alone, if that can be had at once; `nil` where it cannot.
  public borrowing func tryWrite<Value, Failure: Error>(
    _ body: () throws(Failure) -> Value
  ) throws(Failure) -> Value? {
    guard unsafe pthread_rwlock_trywrlock(lock) == 0 else { return nil }
    defer { unsafe pthread_rwlock_unlock(lock) }
    return try body()
  }
}
