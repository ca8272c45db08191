// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem

/// What a source found at some pages.
public struct SourceRun: Sendable {
  /// All bytes are zero; nothing was written to the buffer.
  public let isZero: Bool
  /// Bytes from the offset that was asked for; a multiple of 4 KiB, at least one.
  public let length: Int

  /// A run of `length` bytes.
  @inlinable public init(isZero: Bool, length: Int) {
    self.isZero = isZero
    self.length = length
  }
}

/// Where the content of absent pages comes from.
///
/// Called from several threads at once. What it returns has been checked: a source that cannot
/// vouch for a page throws.
///
/// A fault thread asks `readAtHand`, which waits for nothing, so that a slow source holds up no
/// other page. What is not at hand is read by a thread of the session that may wait
/// (`SourceLane`).
public protocol PageSource: Sendable {
  /// Reads the longest run, at most `length` bytes, that is all zero or all data.
  ///
  /// - Parameters:
  ///   - region: the source's region number.
  ///   - offset: bytes into the region; a multiple of 4 KiB.
  ///   - length: bytes; a multiple of 4 KiB.
  ///   - buffer: room for `length` bytes; filled only for a run of data.
  @unsafe func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun

  /// As `read`, for whoever wants all of it: fewer than `zeros` bytes of zeros between data are
  /// data, and written as such.
  @unsafe func read(
    region: Int, offset: Int, length: Int, zeros: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun

  /// As `read`, but waits for no device, no network and no other thread: `nil` where it would
  /// have to.
  @unsafe func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun?

  /// Bytes that one read brings for the cost of a page, such as those of a compressed chunk.
  var readAhead: Int { get }
}

extension PageSource {
  /// None.
  public var readAhead: Int { 0 }

  /// Run by run.
  @unsafe public func read(
    region: Int, offset: Int, length: Int, zeros: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    var done = 0
    while done < length {
      let run: SourceRun
      do {
        // SAFETY: as the caller vouches: the rest of its room.
        run = try unsafe read(
          region: region, offset: offset + done, length: length - done, into: buffer + done)
      } catch {
        // For whoever begins there.
        guard done > 0 else { throw error }
        break
      }
      if run.isZero {
        guard run.length < zeros else {
          if done == 0 { return run }
          break
        }
        unsafe (buffer + done).initializeMemory(as: UInt8.self, repeating: 0, count: run.length)
      }
      done += run.length
    }
    return SourceRun(isZero: false, length: done)
  }

  /// Nothing is at hand: for sources that cannot tell.
  @unsafe public func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? { nil }
}

/// Why a source has no right content for a page.
public struct PageSourceError: Error, Sendable, CustomStringConvertible {
  /// What failed and where, in words for the person who runs it.
  public let description: String
  /// Whether the source is out of reach and may come back: it is asked again until
  /// `PagerOptions.sourceTimeout` has passed. `false` for damage.
  public let mayRecover: Bool

  /// An error with a text such as "block 7 of region ram is damaged".
  public init(_ description: String, mayRecover: Bool = false) {
    self.description = description
    self.mayRecover = mayRecover
  }
}

/// Memory of this process as a source: for benchmarks and tests. Nothing is checked.
@safe
public struct MappedMemorySource: PageSource {
  private let bytes: SharedMapping

  /// Keeps a mapping alive that several sources and threads read.
  public final class SharedMapping: Sendable {
    /// The bytes, which must not change while a session uses them.
    public let mapping: Mapping
    /// Takes the mapping over.
    public init(_ mapping: consuming Mapping) { self.mapping = mapping }
  }

  /// One region that is the whole mapping.
  public init(_ bytes: SharedMapping) { self.bytes = bytes }

  /// Copies the bytes; every run is data.
  @unsafe public func read(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun {
    guard region == 0, offset >= 0, length <= bytes.mapping.length - offset else {
      throw PageSourceError("offset \(offset) of region \(region) lies outside of the source")
    }
    // SAFETY: the range was checked, and the mapping lives as long as `bytes`.
    unsafe buffer.copyMemory(from: bytes.mapping.pointer + offset, byteCount: length)
    return SourceRun(isZero: false, length: length)
  }

  /// As `read`: it is memory.
  @unsafe public func readAtHand(
    region: Int, offset: Int, length: Int, into buffer: UnsafeMutableRawPointer
  ) throws(PageSourceError) -> SourceRun? {
    // SAFETY: as the caller vouches.
    try unsafe read(region: region, offset: offset, length: length, into: buffer)
  }
}
