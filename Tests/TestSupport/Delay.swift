// SPDX-License-Identifier: Apache-2.0

import Glibc

/// Short waits in tests.
package enum Delay {
  package static func microseconds(_ count: UInt32) { usleep(count) }

  /// Waits until a condition holds; `false` when it does not within the time.
  package static func until(seconds: Double = 60, _ condition: () -> Bool) -> Bool {
    // By the clock: the condition may be a command that takes its time.
    let end = ContinuousClock.now + .seconds(seconds)
    while ContinuousClock.now < end {
      if condition() { return true }
      usleep(1000)
    }
    return condition()
  }
}
