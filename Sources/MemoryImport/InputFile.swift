// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// A regular file that is read by position, by any number of threads.
final class InputFile: Sendable {
  let path: FilePath
  /// Bytes when it was opened; another length later is an error.
  let length: Int
  /// Whether lseek(2) knows SEEK_DATA here. Without, all of the file counts as data.
  let reportsHoles: Bool
  /// Which file it is, whatever its name.
  let identity: FileIdentity
  private let descriptor: OwnedDescriptor

  /// Opens for reading; anything but a regular file is refused.
  init(_ path: FilePath) throws(ImportError) {
    do {
      let descriptor = try OwnedDescriptor(openingForReading: path)
      let status = try descriptor.status
      guard status.isRegular else {
        let kind = status.isDirectory ? "a directory" : "a FIFO, a socket or a device"
        throw ImportError(.notRegular, path, "it is \(kind), not a regular file")
      }
      var reportsHoles = true
      do throws(Errno) {
        _ = try descriptor.nextData(from: 0)
      } catch {
        // Every filesystem in the kernel knows SEEK_DATA; those of FUSE need not.
        reportsHoles = false
      }
      self.path = path
      self.length = status.length
      identity = status.identity
      self.reportsHoles = reportsHoles
      self.descriptor = descriptor
    } catch let error as ImportError {
      throw error
    } catch {
      throw ImportError(.inputOutput, path, "it cannot be opened", errno: error as? Errno)
    }
    guard length <= ImportLimits.length else {
      throw ImportError(
        .limitExceeded, path, "it has \(length) bytes; \(ImportLimits.length) are the limit")
    }
  }

  /// Why a file's holes cannot be told page by page; `nil` if they can.
  ///
  /// Some filesystems keep larger pieces than pages (st_blksize: ZFS, tmpfs with huge pages),
  /// some do not tell holes at all: then a file that lacks blocks claims to have none.
  func holesAreUnknown(pageSize: PageSize) throws(ImportError) -> String? {
    guard reportsHoles else { return "its filesystem does not report holes" }
    return try seeking(from: 0) { descriptor throws(Errno) in
      let status = try descriptor.status
      if status.blockLength > pageSize.bytes {
        return "its filesystem keeps pieces of \(status.blockLength) bytes, not pages"
      }
      if try descriptor.nextHole(from: 0) == length, status.allocatedBytes < length {
        return "its filesystem does not report the holes that it has"
      }
      return nil
    }
  }

  // MARK: - Holes

  /// The first range of data in a range; `nil` where all of it is hole.
  func nextData(in range: Range<Int>) throws(ImportError) -> Range<Int>? {
    guard !range.isEmpty, reportsHoles else { return range.isEmpty ? nil : range }
    // The file position moves, but nobody uses it: each call says from where.
    let found: Range<Int>?? = try seeking(from: range.lowerBound) { descriptor throws(Errno) in
      guard let data = try descriptor.nextData(from: range.lowerBound) else {
        // A hole up to the end, or past the end of a file that was cut.
        return try descriptor.status.length == length ? .some(nil) : nil
      }
      guard data < range.upperBound else { return .some(nil) }
      // A hole can come to be between the two calls; then there is no data to speak of.
      guard let hole = try descriptor.nextHole(from: data), hole > data else { return nil }
      return data..<min(hole, range.upperBound)
    }
    guard let found else { throw changed(at: range.lowerBound) }
    return found
  }

  private func seeking<Value>(
    from offset: Int, _ body: (borrowing OwnedDescriptor) throws(Errno) -> Value
  ) throws(ImportError) -> Value {
    do throws(Errno) {
      return try body(descriptor)
    } catch {
      throw ImportError(
        .inputOutput, path, "it cannot be searched for holes", fileOffset: offset, errno: error)
    }
  }

  private func changed(at offset: Int) -> ImportError {
    ImportError(.changed, path, "it changed while it was read", fileOffset: offset)
  }

  // MARK: - Reading

  /// Reads exactly as many bytes as there is room for.
  @unsafe func read(
    into buffer: UnsafeMutableRawBufferPointer, at offset: Int
  ) throws(ImportError) {
    do throws(Errno) {
      // SAFETY: the caller vouches for the buffer.
      try unsafe descriptor.readAll(into: buffer, at: offset)
    } catch {
      if error == .noData { throw changed(at: offset) }
      throw ImportError(
        .inputOutput, path, "\(buffer.count) bytes cannot be read", fileOffset: offset,
        errno: error)
    }
  }

  /// Bytes of a range that lies in the file.
  func bytes(at offset: Int, count: Int) throws(ImportError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: count)
    try unsafe bytes.withUnsafeMutableBufferPointer { (buffer) throws(ImportError) in
      // SAFETY: the buffer is valid for the closure.
      try unsafe read(into: UnsafeMutableRawBufferPointer(buffer), at: offset)
    }
    return bytes
  }

  /// Whether a range lies in the file; never overflows.
  func contains(offset: UInt64, length: UInt64) -> Bool {
    let end = UInt64(self.length)
    return offset <= end && length <= end - offset
  }
}
