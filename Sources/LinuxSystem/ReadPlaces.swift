// SPDX-License-Identifier: Apache-2.0

internal import CLinux
package import SystemPackage

/// Where bytes that follow each other in a file go to: up to 32 places in memory.
@safe
package struct ReadPlaces: ~Copyable {
  /// Places that there is room for.
  package static let capacity = 32

  // SAFETY: whoever adds a place vouches for it.
  private var places = unsafe InlineArray<32, iovec>(repeating: iovec())
  private var count = 0

  package init() {}

  /// Adds a place.
  ///
  /// SAFETY: the caller vouches for `length` bytes, as long as this is used.
  @unsafe package mutating func append(_ start: UnsafeMutableRawPointer, length: Int) {
    unsafe places[count] = iovec(iov_base: start, iov_len: length)
    count += 1
  }

  /// Reads into all of them, in their order (preadv(2)); returns the number of bytes, fewer where
  /// the file ends or a device fails.
  package mutating func read(
    from file: borrowing OwnedDescriptor, at offset: Int
  ) throws(Errno) -> Int {
    let (descriptor, count) = (file.rawValue, CInt(count))
    while true {
      let result = unsafe withUnsafePointer(to: &places) { places in
        unsafe places.withMemoryRebound(to: iovec.self, capacity: Self.capacity) {
          unsafe clinux_preadv(descriptor, $0, count, off_t(offset))
        }
      }
      if result != -Int(EINTR) { return try check(result) }
    }
  }
}
