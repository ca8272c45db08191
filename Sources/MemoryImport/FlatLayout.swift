// SPDX-License-Identifier: Apache-2.0

public import LinuxSystem
public import MemoryImage
public import SystemPackage

/// Where the bytes of a file without headers belong in guest memory.
public enum FlatLayout: Sendable, Hashable {
  /// All of it from one guest address on, as one region, "ram".
  case contiguous(at: GuestAddress = GuestAddress(0), pageSize: PageSize = .size4KiB)
  /// Firecracker's on x86-64: the regions one after the other without their gaps. Guest
  /// memory past the start of the gap below 4 GiB goes on at 4 GiB, and past 256 GiB at
  /// 512 GiB (Firecracker, `src/vmm/src/arch/x86_64/layout.rs`).
  case firecracker(gap: FirecrackerGap = .from3GiB, pageSize: PageSize = .size4KiB)
  /// The regions one after the other, in this order.
  case regions([ImageRegion])

  /// The regions of a file of `length` bytes, before they are checked.
  func regions(length: Int) -> [ImageRegion] {
    switch self {
    case .contiguous(let address, let pageSize):
      [ImageRegion(name: "ram", guestAddress: address, length: length, pageSize: pageSize)]
    case .firecracker(let gap, let pageSize):
      Self.split(length, gap.windows, pageSize)
    case .regions(let regions):
      regions
    }
  }

  /// The smallest pages of the memory.
  var smallestPage: PageSize {
    switch self {
    case .contiguous(_, let pageSize), .firecracker(_, let pageSize): pageSize
    case .regions(let regions):
      regions.map(\.pageSize).min { $0.bytes < $1.bytes } ?? .size4KiB
    }
  }

  private static func split(
    _ length: Int, _ windows: [(start: Int, end: Int)], _ pageSize: PageSize
  ) -> [ImageRegion] {
    var regions: [ImageRegion] = []
    var rest = length
    for window in windows where rest > 0 {
      let taken = min(rest, window.end - window.start)
      regions.append(
        ImageRegion(
          name: "ram\(regions.count)", guestAddress: GuestAddress(UInt64(window.start)),
          length: taken, pageSize: pageSize))
      rest -= taken
    }
    return regions
  }
}

/// Where Firecracker's gap below 4 GiB begins. The memory file does not say; its age does.
public enum FirecrackerGap: Sendable, Hashable, CaseIterable {
  /// 3 GiB, since May 2025 ("arch: define 64-bit capable MMIO memory regions"); memory past
  /// 256 GiB is at 512 GiB.
  case from3GiB
  /// 3.25 GiB, before.
  case from3328MiB

  /// Where memory may be.
  fileprivate var windows: [(start: Int, end: Int)] {
    switch self {
    case .from3GiB: [(0, 3 << 30), (4 << 30, 256 << 30), (512 << 30, .max)]
    case .from3328MiB: [(0, 3328 << 20), (4 << 30, .max)]
    }
  }
}

// MARK: - Inputs

extension MemoryInput {
  /// A file that is guest memory and nothing else.
  ///
  /// Its length must be a whole number of pages, at least one.
  ///
  /// - Throws: `notRegular`, `inputOutput`, `invalidLayout`, and `lengthMismatch` when
  ///   `layout` has regions that are not as long as the file.
  public static func raw(
    _ path: FilePath, layout: FlatLayout = .contiguous()
  ) throws(ImportError) -> MemoryInput {
    try flat([InputFile(path)], layout)
  }

  /// A memory file of Firecracker's and the diffs that were taken after it, oldest first.
  ///
  /// A diff is a file of the same length: its data replaces the base's, its holes leave the
  /// base as it is. So the filesystem must report holes, and keep pieces no larger than a page:
  /// on one with larger pieces (ZFS, tmpfs with huge pages) a diff says more than was written.
  /// This is checked where the diff is now; where it was written cannot be.
  ///
  /// - Throws: what `raw` throws; `lengthMismatch` for a diff of another length,
  ///   `holesUnknown` for one whose holes cannot be told, `limitExceeded` for too many.
  public static func firecracker(
    memory: FilePath, diffs: [FilePath] = [], layout: FlatLayout = .firecracker()
  ) throws(ImportError) -> MemoryInput {
    guard diffs.count <= ImportLimits.diffs else {
      throw ImportError(
        .limitExceeded, memory,
        "there are \(diffs.count) diffs over it; \(ImportLimits.diffs) are the limit")
    }
    let base = try InputFile(memory)
    var layers = [base]
    for path in diffs {
      let diff = try InputFile(path)
      guard diff.length == base.length else {
        throw ImportError(
          .lengthMismatch, path,
          "it has \(diff.length) bytes, and the memory file \(memory) has \(base.length)",
          remedy: "A diff is as long as the memory file; name one of the same machine.")
      }
      if let reason = try diff.holesAreUnknown(pageSize: layout.smallestPage) {
        throw ImportError(
          .holesUnknown, path, "\(reason), so it is not known what the diff changes")
      }
      layers.append(diff)
    }
    return try flat(layers, layout)
  }

  private static func flat(
    _ layers: [InputFile], _ layout: FlatLayout
  ) throws(ImportError) -> MemoryInput {
    let file = layers[0]
    guard file.length > 0, file.length % ImageLimits.blockSize == 0 else {
      throw ImportError(
        .invalidLayout, file.path,
        "its length of \(file.length) bytes is not a whole number of pages",
        remedy: "Guest memory has a multiple of 4096 bytes, at least one page.")
    }
    let regions = layout.regions(length: file.length)
    try regions.check(path: file.path)
    var pieces: [[InputPiece]] = []
    var offset = 0
    for region in regions {
      // No overflow: each is at most the limit, and there are few.
      pieces.append([InputPiece(offset: 0, length: region.length, fileOffset: offset)])
      offset += region.length
    }
    guard offset == file.length else {
      throw ImportError(
        .lengthMismatch, file.path,
        "it has \(file.length) bytes, and the regions named for it have \(offset)",
        remedy: "Name regions that have as many bytes as the file.")
    }
    return MemoryInput(regions: regions, layers: layers, pieces: pieces)
  }
}

extension [ImageRegion] {
  /// Checks lengths and addresses, and that no two overlap in guest memory.
  func check(path: FilePath) throws(ImportError) {
    for region in self {
      func invalid(_ reason: String) -> ImportError {
        ImportError(.invalidLayout, path, "region \"\(region.name)\": \(reason)")
      }
      guard region.length > 0, region.pageSize.divides(region.length) else {
        throw invalid(
          "its length of \(region.length) bytes is not a multiple of its page size, "
            + "\(region.pageSize)")
      }
      guard region.length <= ImportLimits.length else {
        throw invalid("its length of \(region.length) bytes is past the limit")
      }
      let address = region.guestAddress.rawValue
      guard address % UInt64(ImageLimits.blockSize) == 0 else {
        throw invalid("its guest address \(region.guestAddress) is not a multiple of 4096")
      }
      guard !address.addingReportingOverflow(UInt64(region.length) - 1).overflow else {
        throw invalid("it passes the end of the guest's address space")
      }
    }
    let ordered = sorted { $0.guestAddress < $1.guestAddress }
    for (left, right) in zip(ordered, ordered.dropFirst()) {
      let distance = right.guestAddress.rawValue - left.guestAddress.rawValue
      guard distance >= UInt64(left.length) else {
        throw ImportError(
          .overlap, path, "regions \"\(left.name)\" and \"\(right.name)\" overlap in guest memory",
          remedy: "Name regions that lie apart.")
      }
    }
  }
}
