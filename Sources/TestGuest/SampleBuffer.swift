// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// Where timed touches leave their ticks: memory of its own, outside of the guest's RAM
/// and so of its snapshots.
final class SampleBuffer: Sendable {
  let mapping: Mapping

  init(_ bytes: Int) throws(GuestError) {
    let length = (bytes + GuestLayout.largePage - 1) & ~(GuestLayout.largePage - 1)
    mapping = try host("Mapping \(length) bytes for samples") { () throws(Errno) in
      try Mapping(anonymous: length)
    }
  }

  /// The samples of idle vCPUs one after the other, as far as each of them came.
  func take(_ visited: [Int], _ parts: [Range<Int>]) -> [UInt32] {
    var found: [UInt32] = []
    for (part, count) in zip(parts, visited) {
      guard part.lowerBound >= 0, part.upperBound <= mapping.length else { continue }
      for index in 0..<min(count, part.count / 4) {
        // SAFETY: the part lies within the mapping, and no vCPU writes to it any more.
        found.append(
          unsafe mapping.pointer.load(
            fromByteOffset: part.lowerBound + index * 4, as: UInt32.self))
      }
    }
    return found
  }
}
