// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

// An image is known by its id, not by its path: a file may be overwritten while it is open, and
// another one may take its name.
extension ChunkStore {
  /// What has happened to a file since it was opened.
  enum Change: Hashable {
    /// It is shorter than the image.
    case cut(length: Int)
    /// It holds another image, or none.
    case overwritten
    /// Somebody wrote to it: a working set, which is all right, or something else.
    case written

    var words: String {
      switch self {
      case .cut(let length): "it has \(length) bytes now"
      case .overwritten: "it holds something else now"
      case .written: "its time of modification is another one now"
      }
    }
  }

  /// What has happened to the file, as far as can be told without waiting for storage.
  var change: Change? {
    guard let status = try? file.status else { return nil }
    if status.length < fileLength { return .cut(length: status.length) }
    if let found = idAtHand(), found != id { return .overwritten }
    return status.modified == opened.modified ? nil : .written
  }

  /// The id in the header as it is now; all zero for something else, and `nil` when it is not in
  /// the page cache.
  private func idAtHand() -> ImageID? {
    var bytes = [UInt8](repeating: 0, count: ImageHeader.length)
    let isRead = unsafe bytes.withUnsafeMutableBytes { buffer in
      // SAFETY: the buffer is valid for the closure.
      (try? unsafe file.readAll(into: buffer, at: 0, waits: mayWait(false))) != nil
    }
    guard isRead else { return nil }
    return (try? ImageHeader(decoding: bytes, path: path))?.id ?? ImageID(low: 0, high: 0)
  }

  /// What is wrong with something of the file, and whether the file was changed.
  func explained(_ reason: String) -> String {
    guard let change else { return reason }
    return "\(reason); the file was changed while it was open: \(change.words)"
  }

  /// A failed read, or something that does not match its checksum.
  func failure(
    _ outcome: ReadOutcome, _ mismatch: String, region: Int, regionName: String, block: Int,
    fileOffset: Int
  ) -> ImageError {
    var (code, reason, errno) = (ImageError.Code.damaged, mismatch, nil as Errno?)
    if case .failed(let failed) = outcome {
      let error = ImageError.reading(failed, path, fileOffset: fileOffset)
      (code, reason, errno) = (error.code, error.reason, error.errno)
    }
    return ImageError(
      code, path, code == .inputOutput ? reason : explained(reason), region: region,
      regionName: regionName, block: block, fileOffset: fileOffset, errno: errno)
  }
}
