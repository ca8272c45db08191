// SPDX-License-Identifier: Apache-2.0

internal import Glibc

/// A value behind a lock, and a way to wait until it changes (pthread_cond_wait(3)).
@safe
public final class Monitor<State>: @unchecked Sendable {
  // SAFETY: `state` is only reached under the lock; lock and condition live at a stable
  // address from init to deinit.
  private var state: State
  private let lock: UnsafeMutablePointer<pthread_mutex_t>
  private let changed: UnsafeMutablePointer<pthread_cond_t>

  /// A value, and nobody who waits.
  public init(_ state: sending State) {
    self.state = state
    unsafe lock = .allocate(capacity: 1)
    unsafe changed = .allocate(capacity: 1)
    unsafe pthread_mutex_init(lock, nil)
    var attributes = pthread_condattr_t()
    unsafe pthread_condattr_init(&attributes)
    unsafe pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
    unsafe pthread_cond_init(changed, &attributes)
    unsafe pthread_condattr_destroy(&attributes)
  }

  deinit {
    unsafe pthread_cond_destroy(changed)
    unsafe pthread_mutex_destroy(lock)
    unsafe changed.deallocate()
    unsafe lock.deallocate()
  }

  /// Looks at the state or changes it; waiters look again afterwards.
  public func withLock<Value, Failure: Error>(
    _ body: (inout State) throws(Failure) -> Value
  ) throws(Failure) -> Value {
    unsafe pthread_mutex_lock(lock)
    defer {
      unsafe pthread_cond_broadcast(changed)
      unsafe pthread_mutex_unlock(lock)
    }
    return try body(&state)
  }

  /// Waits until `body` returns a value.
  ///
  /// - Parameter deadline: CLOCK_MONOTONIC nanoseconds after which `nil` comes back.
  public func wait<Value>(until deadline: UInt64, _ body: (inout State) -> Value?) -> Value? {
    unsafe pthread_mutex_lock(lock)
    defer {
      unsafe pthread_cond_broadcast(changed)
      unsafe pthread_mutex_unlock(lock)
    }
    var time = timespec(
      tv_sec: Int(deadline / 1_000_000_000), tv_nsec: Int(deadline % 1_000_000_000))
    while true {
      if let value = body(&state) { return value }
      if unsafe pthread_cond_timedwait(changed, lock, &time) == ETIMEDOUT { return body(&state) }
    }
  }

  /// Waits until `body` returns a value.
  public func wait<Value>(_ body: (inout State) -> Value?) -> Value {
    unsafe pthread_mutex_lock(lock)
    defer {
      unsafe pthread_cond_broadcast(changed)
      unsafe pthread_mutex_unlock(lock)
    }
    while true {
      if let value = body(&state) { return value }
      unsafe pthread_cond_wait(changed, lock)
    }
  }
}
