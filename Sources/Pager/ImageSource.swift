// SPDX-License-Identifier: Apache-2.0

public import MemoryImage

/// A snapshot image as a source: every block is checked before it is handed out.
public struct ImageSource: PageSource {
  /// The image that is read.
  public let image: MemoryImage

  /// A source over an open image; the image's region numbers are the source's.
  public init(_ image: MemoryImage) {
    self.image = image
    readAhead = image.isCompressed ? image.chunkBytes : 0
  }

  /// A chunk, when it is compressed.
  public let readAhead: Int

  /// Reads and verifies; see `MemoryImage.read`. Damage throws and names the block.
  @unsafe public func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    let block = ImageLimits.blockSize
    do {
      let run = try unsafe image.read(
        region: region, firstBlock: offset / block, blockCount: length / block, into: buffer)
      return SourceRun(isZero: run.kind == .zero, length: run.blockCount * block)
    } catch {
      throw PageSourceError(error)
    }
  }

  /// The same with short runs of zeros; see `MemoryImage.read`.
  @unsafe public func read(
    region: Int, offset: Int, length: Int, zeros: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    let block = ImageLimits.blockSize
    do {
      // SAFETY: as the caller vouches.
      let run = try unsafe image.read(
        region: region, firstBlock: offset / block, blockCount: length / block,
        zeros: zeros / block, into: buffer)
      return SourceRun(isZero: run.kind == .zero, length: run.blockCount * block)
    } catch {
      throw PageSourceError(error)
    }
  }

  /// The same, of what is in the page cache; see `MemoryImage.readAtHand`.
  @unsafe public func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    let block = ImageLimits.blockSize
    do {
      // SAFETY: as the caller vouches.
      let run = try unsafe image.readAtHand(
        region: region, firstBlock: offset / block, blockCount: length / block, into: buffer)
      return run.map { SourceRun(isZero: $0.kind == .zero, length: $0.blockCount * block) }
    } catch {
      throw PageSourceError(error)
    }
  }
}

extension PageSourceError {
  /// What an image says. Storage that fails may work again; damage stays.
  init(_ error: ImageError) {
    self.init(error.description, mayRecover: error.code == .inputOutput)
  }
}
