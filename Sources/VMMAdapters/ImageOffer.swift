// SPDX-License-Identifier: Apache-2.0

internal import HandoverProtocol
public import LinuxSystem
public import MemoryImage
public import Pager
public import SystemPackage

/// A VMM that wants to be a clone (docs/handover.md, "open and image"), checked.
public struct OpenRequest: Sendable, Hashable {
  /// The VMM's name for logs; no control characters.
  public let name: String?
  /// Which image; safe as the name of a file in a directory.
  public let image: String?
  /// The unit of its faults: 4 KiB or 2 MiB.
  public let pageSize: PageSize
  /// Who connected.
  public let peer: PeerCredentials

  init(_ message: OpenMessage, peer: PeerCredentials) throws(HandoverError) {
    if let name = message.name { try HandoverRequest.check(name: name) }
    if let image = message.image { try HandoverRequest.check(image: image) }
    switch message.pageSize {
    case nil, 4096: pageSize = .size4KiB
    case 2_097_152: pageSize = .size2MiB
    case .some(let size):
      throw HandoverError(
        .malformed, "\"page_size\" is \(size), and must be 4096 or 2097152")
    }
    name = message.name
    image = message.image
    self.peer = peer
  }
}

/// What a VMM gets that wants to be a clone: a cache of clean pages for each region of an image.
public struct ImageOffer: Sendable {
  /// The image's regions.
  public let regions: [ImageRegion]
  /// A cache for each of them, all with one page size.
  public let caches: [SharedPageCache]

  /// An offer; throws `.unsupported` for an image with too many regions, and `.imageMismatch` for
  /// one whose regions are no whole pages.
  public init(
    regions: [ImageRegion], pageSize: PageSize,
    makingCaches make: () throws(Errno) -> [SharedPageCache]
  ) throws(HandoverError) {
    guard regions.count <= HandoverFrame.descriptorLimit else {
      throw HandoverError(
        .unsupported,
        "the image has \(regions.count) regions, and clones can have "
          + "\(HandoverFrame.descriptorLimit)")
    }
    for (number, region) in regions.enumerated() where !pageSize.divides(region.length) {
      throw HandoverError(
        .imageMismatch,
        "region \(number) (\(region.name)) of the image has \(region.length) bytes, which are no "
          + "whole pages of \(pageSize)")
    }
    do throws(Errno) {
      caches = try make()
    } catch .noMemory {
      let bytes = regions.reduce(0) { $0 + $1.length }
      throw HandoverError(
        .noMemory,
        pageSize == .size4KiB
          ? "there is no memory for the image's pages"
          : "\(bytes / pageSize.bytes) huge pages for the image's pages are not free",
        errno: .noMemory)
    } catch {
      throw HandoverError(
        .inputOutput, "the files for the image's pages cannot be made", errno: error)
    }
    self.regions = regions
  }

  /// In the words of the protocol.
  var message: ImageMessage {
    var offset: UInt64 = 0
    return ImageMessage(
      pageSize: UInt64(caches.first?.pageSize.bytes ?? 4096),
      regions: regions.enumerated().map { number, region in
        defer { offset += UInt64(region.length) }
        return ImageMessage.Region(
          guestAddress: region.guestAddress.rawValue, offset: offset,
          length: UInt64(region.length), name: region.name, memory: number)
      })
  }

  /// A descriptor for each region that can only be read.
  func makeDescriptors() throws(HandoverError) -> DescriptorList {
    var descriptors = DescriptorList()
    for cache in caches {
      do throws(Errno) {
        descriptors.append(owning: [try cache.duplicateForReading().release()])
      } catch {
        throw HandoverError(
          .inputOutput, "no descriptor can be had of the image's pages", errno: error)
      }
    }
    return descriptors
  }

  /// Checks that a clone's region is one of these as a whole.
  func check(_ region: AttachMessage.Region, number: Int) throws(HandoverError) -> Int {
    func invalid(_ reason: String) -> HandoverError {
      HandoverError(.invalidRegions, reason, region: number)
    }
    guard let index = region.memory else {
      throw HandoverError(
        .malformed, "its mode is clone and it has no \"memory\"", region: number)
    }
    let message = message
    guard message.regions.indices.contains(index) else {
      throw HandoverError(
        .invalidDescriptor, "there is no region \(index) in \"image\"", region: number)
    }
    let offered = message.regions[index]
    guard region.pageSize ?? 4096 == message.pageSize else {
      throw invalid("its page size is not the \(message.pageSize) that \"open\" asked for")
    }
    guard region.length == offered.length, region.memoryOffset ?? 0 == 0 else {
      throw invalid("it is not the whole of region \(index) of \"image\", \(offered.length) bytes")
    }
    guard region.guestAddress ?? offered.guestAddress == offered.guestAddress,
      region.offset ?? offered.offset == offered.offset
    else { throw invalid("it is not where region \(index) of \"image\" is") }
    return index
  }
}
