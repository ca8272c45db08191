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
/// Called from several fault threads at once. What it returns has been checked: a
/// source that cannot vouch for a page throws.
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

  /// Bytes that one read brings for the cost of a page, such as those of a compressed chunk.
  var readAhead: Int { get }
}

extension PageSource {
  /// None.
  public var readAhead: Int { 0 }
}

/// Why a source has no right content for a page.
public struct PageSourceError: Error, Sendable, CustomStringConvertible {
  /// What failed and where, in words for the person who runs it.
  public let description: String

  /// An error with a text such as "block 7 of region ram is damaged".
  public init(_ description: String) { self.description = description }
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
}
