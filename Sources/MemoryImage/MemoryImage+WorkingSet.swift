// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
public import SystemPackage

extension MemoryImage {
  /// The image's working set; `nil` when it has none.
  ///
  /// It is read and checked at each call, and not when the image is opened. In memory it takes
  /// 24 bytes for each run, and for the time of the call a bit for each block that is in it.
  ///
  /// Throws `damaged` for one that is incomplete or does not match its checksums, and
  /// `invalidLayout` for one that names blocks which the image does not have, or one twice. The
  /// image itself is as good as before: go on without, or remove it by `setWorkingSet`.
  public func workingSet() throws(ImageError) -> WorkingSet? {
    var set = WorkingSet()
    return try readWorkingSet { set.append($0) } ? set : nil
  }

  /// Reads the working set without having all of it in memory; whether there is one.
  ///
  /// Throws what `workingSet` throws, also at the end, when its checksum is known: then what came
  /// before is worth nothing.
  ///
  /// - Parameter body: is called for each run; the image has its blocks, and each once.
  public func readWorkingSet(_ body: (WorkingSetRun) -> Void) throws(ImageError) -> Bool {
    let length: Int
    do throws(Errno) {
      length = try own.file.status.length
    } catch {
      throw ImageError(.inputOutput, path, "its length cannot be read", errno: error)
    }
    guard length > fileLength else { return false }
    func damaged(_ reason: String) -> ImageError {
      ImageError(
        .damaged, path, own.explained("its working set \(reason)"), fileOffset: fileLength)
    }
    let header = WorkingSetSection.decodeHeader(
      try workingSetBytes(
        at: fileLength, length: min(length - fileLength, WorkingSetSection.headerLength)), id: id)
    guard let header else { throw damaged("is incomplete, or what follows the image is none") }
    // A run has a block at least: so what is read is bounded by the image.
    guard header.runs <= regions.reduce(0, { $0 + $1.blockCount }) else {
      throw damaged("has more runs than the image has blocks")
    }
    let entries = header.runs * WorkingSetSection.entryLength
    guard fileLength + WorkingSetSection.headerLength + entries == length else {
      throw damaged("has another length than it says")
    }
    guard var sum = Checksum.Stream(seed: Checksum.key(id, .workingSet)) else {
      throw ImageError(.inputOutput, path, "no memory for a checksum", errno: .noMemory)
    }
    var check = WorkingSetCheck(regions)
    var isValid = true
    var done = 0
    while done < entries {
      let bytes = try workingSetBytes(
        at: length - entries + done, length: min(entries - done, WorkingSetSection.pieceLength))
      sum.add(bytes)
      done += bytes.count
      isValid =
        isValid
        && WorkingSetSection.decode(bytes) { run in
          guard check.accepts(run) else { return false }
          body(run)
          return true
        }
    }
    guard sum.value == header.checksum else { throw damaged("does not match its checksum") }
    guard isValid else {
      throw ImageError(
        .invalidLayout, path, "its working set names blocks that it does not have, or one twice",
        fileOffset: fileLength)
    }
    return true
  }

  private func workingSetBytes(at offset: Int, length: Int) throws(ImageError) -> [UInt8] {
    var bytes = [UInt8](repeating: 0, count: length)
    let outcome = unsafe bytes.withUnsafeMutableBytes { buffer in
      Result { () throws(Errno) in
        // SAFETY: the buffer is valid for the closure.
        try unsafe own.file.readAll(into: buffer, at: offset)
      }
    }
    do throws(Errno) {
      try outcome.get()
    } catch {
      throw ImageError(
        .inputOutput, path, "its working set cannot be read", fileOffset: offset, errno: error)
    }
    return bytes
  }

  /// Puts a working set behind an image, in place of the one that it has, without rewriting the
  /// image; `nil` removes it. On stable storage when this returns.
  ///
  /// Whoever is killed in the middle leaves an image without a working set: `workingSet` says
  /// that it is damaged. Readers that have the image open see the new one at their next call.
  ///
  /// Throws what opening throws, and what `storeWorkingSet` throws.
  public static func setWorkingSet(
    _ runs: [WorkingSetRun]?, of path: FilePath
  ) throws(ImageError) {
    try MemoryImage(path: path).storeWorkingSet(runs)
  }

  /// The same for an image that is open: for the file that has this image, and no other.
  ///
  /// Throws `changed` when its path has another file, or the file another image; `incomplete`
  /// while somebody else is doing the same; `invalidArgument` for blocks that the image does not
  /// have; `limitExceeded` for more than 2^24 runs; `inputOutput`.
  public func storeWorkingSet(_ runs: [WorkingSetRun]?) throws(ImageError) {
    var section: [UInt8] = []
    if let runs, !runs.isEmpty {
      guard let set = WorkingSet(runs, of: regions) else {
        throw ImageError(
          .invalidArgument, path,
          "a working set may only name blocks that the image has, and each once")
      }
      guard set.runs.count <= WorkingSetSection.mostRuns else {
        throw ImageError(.limitExceeded, path, "a working set has at most 2^24 runs")
      }
      section = WorkingSetSection.encode(set, id: id)
    }
    var isSame = false
    do throws(Errno) {
      let file = try OwnedDescriptor(openingForUpdate: path)
      guard try file.lockExclusively() else {
        throw Errno.wouldBlock
      }
      isSame = try has(file)
      guard isSame else { throw Errno.noSuchFileOrDirectory }
      // The old one goes first: half of the new one over half of the old one would be worse
      // than none, and a working set can be recorded again.
      try file.setLength(fileLength)
      guard !section.isEmpty else { return try file.synchronize() }
      try file.writeAll(section, at: fileLength)
      try file.synchronize()
    } catch .wouldBlock {
      throw ImageError(.incomplete, path, "another process is writing its working set")
    } catch .noSuchFileOrDirectory where !isSame {
      throw ImageError(
        .changed, path, "its path does not have image \(id) any more, which was opened there")
    } catch {
      throw ImageError(
        .inputOutput, path, "its working set cannot be written", errno: error)
    }
  }

  /// Whether a file is this image's, and has this image still. Its length and times say nothing: a
  /// working set may have been stored before.
  private func has(_ file: borrowing OwnedDescriptor) throws(Errno) -> Bool {
    guard try file.status.identity == own.opened.identity,
      let catalog = try? ImageCatalog(reading: file, path: path)
    else { return false }
    return catalog.id == id && catalog.fileLength == fileLength && catalog.contentID == contentID
  }
}
