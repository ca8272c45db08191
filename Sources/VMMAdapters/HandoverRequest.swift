// SPDX-License-Identifier: Apache-2.0

public import GuestMemory
internal import HandoverProtocol
public import LinuxSystem
internal import SystemPackage
public import Userfault

/// What a VMM handed over by docs/handover.md, checked.
@frozen
public struct HandoverRequest: ~Copyable, Sendable {
  /// The VMM's name for logs; no control characters.
  public let name: String?
  /// Which image; safe as the name of a file in a directory.
  public let image: String?
  /// The memory, in the order of the message; all with an offset, or all with a guest
  /// address.
  public let regions: [HandedRegion]
  /// Whether to record which pages are touched first; `nil`: as configured.
  public let record: Bool?
  /// Bytes per second to fill in the background, 0 for none; `nil`: as configured.
  public let fillRate: Int?
  /// Watches the VMM's memory; the ranges are registered already.
  public let userfaultfd: Userfaultfd
  /// The memory files that regions name by their number; `nil` where none with the mode `.minor`
  /// does.
  public let memoryFiles: [HandedMemoryFile?]
  /// Who connected.
  public let peer: PeerCredentials
  /// A pidfd of the process that connected.
  public let process: OwnedDescriptor

  /// Checks a message and the descriptors that came with it.
  ///
  /// - Parameter opened: what it asked for before, and was offered.
  init(
    _ message: AttachMessage, _ received: consuming DescriptorList, limits: HandoverLimits,
    peer: PeerCredentials, process: consuming OwnedDescriptor,
    opened: (request: OpenRequest, offer: ImageOffer)?
  ) throws(HandoverError) {
    var descriptors = received
    if let name = message.name { try Self.check(name: name) }
    if let image = message.image { try Self.check(image: image) }
    if let request = opened?.request {
      guard message.name ?? request.name == request.name,
        message.image ?? request.image == request.image
      else {
        throw HandoverError(.malformed, "its \"name\" or \"image\" is not that of \"open\"")
      }
    }
    guard message.descriptors.count == descriptors.count else {
      throw HandoverError(
        .invalidDescriptor,
        "\"descriptors\" has \(message.descriptors.count) and \(descriptors.count) came")
    }
    guard message.descriptors.first == .userfaultfd,
      message.descriptors.dropFirst().allSatisfy({ $0 == .memory })
    else {
      throw HandoverError(
        .invalidDescriptor, "\"descriptors\" is not one userfaultfd, then memory files")
    }
    let regions = try HandedRegion.check(
      try Self.claims(
        message.regions, memoryFiles: descriptors.count - 1, offer: opened?.offer),
      limit: limits.regions)
    let fillRate = message.options?.fillRate
    guard (fillRate ?? 0) <= HandoverLimits.contentEnd else {
      throw HandoverError(.malformed, "\"fill_rate\" is too large")
    }
    let userfaultfd = try receivedUserfaultfd(&descriptors)
    try Self.check(regions, against: userfaultfd)
    try HandedRegion.check(regions, against: userfaultfd)
    memoryFiles = try HandedMemory.files(descriptors, of: regions)
    name = message.name ?? opened?.request.name
    image = message.image ?? opened?.request.image
    self.regions = regions
    self.record = message.options?.record
    self.fillRate = fillRate.map(Int.init)
    self.userfaultfd = userfaultfd
    self.peer = peer
    self.process = process
  }

  // MARK: - Rules

  static func check(name: String) throws(HandoverError) {
    guard (1...255).contains(name.utf8.count),
      name.unicodeScalars.allSatisfy({ $0.properties.generalCategory != .control })
    else {
      throw HandoverError(.malformed, "\"name\" has not 1 to 255 bytes without control characters")
    }
  }

  static func check(image: String) throws(HandoverError) {
    let allowed = image.utf8.allSatisfy { byte in
      switch byte {
      case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
        UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "."), UInt8(ascii: "_"),
        UInt8(ascii: "-"):
        true
      default: false
      }
    }
    guard (1...255).contains(image.utf8.count), allowed, !image.hasPrefix(".") else {
      throw HandoverError(
        .malformed, "\"image\" has not 1 to 255 of A-Z a-z 0-9 . _ -, or begins with a dot")
    }
  }

  private static func claims(
    _ regions: [AttachMessage.Region], memoryFiles: Int, offer: ImageOffer?
  ) throws(HandoverError) -> [ClaimedRegion] {
    var claims: [ClaimedRegion] = []
    for (number, region) in regions.enumerated() {
      let position: (UInt64, ClaimedRegion.Scale)
      switch (region.guestAddress, region.offset) {
      case (.some(let address), nil): position = (address, .guestAddress)
      case (nil, .some(let offset)): position = (offset, .offset)
      default:
        throw HandoverError(
          .malformed, "it has not one of \"guest_address\" and \"offset\"", region: number)
      }
      let mode = try mode(of: region, number: number, memoryFiles: memoryFiles, offer: offer)
      let memory = if case .clone = mode { nil as Int? } else { region.memory }
      claims.append(
        ClaimedRegion(
          host: region.hostAddress, length: region.length, position: position.0,
          scale: position.1, pageSize: region.pageSize ?? 4096, mode: mode,
          memory: memory.map { ($0, region.memoryOffset ?? 0) }))
    }
    return claims
  }

  private static func mode(
    of region: AttachMessage.Region, number: Int, memoryFiles: Int, offer: ImageOffer?
  ) throws(HandoverError) -> HandedRegion.Mode {
    if region.mode == .clone {
      guard let offer else {
        throw HandoverError(
          .malformed, "its mode is clone, and there was no \"open\" before", region: number)
      }
      return .clone(try offer.check(region, number: number))
    }
    guard region.mode != .minor || region.memory != nil else {
      throw HandoverError(
        .malformed, "its mode is minor and it has no \"memory\"", region: number)
    }
    if let file = region.memory, !(0..<memoryFiles).contains(file) {
      throw HandoverError(
        .invalidDescriptor, "there is no memory file \(file)", region: number)
    }
    return region.mode == .minor ? .minor : .missing
  }

  /// What a clone gives back has to be told from what the kernel unmaps by itself.
  private static func check(
    _ regions: [HandedRegion], against userfaultfd: borrowing Userfaultfd
  ) throws(HandoverError) {
    let clone = regions.firstIndex { region in
      if case .clone = region.mode { true } else { false }
    }
    guard let clone, !userfaultfd.features.contains(.removeEvents) else { return }
    throw HandoverError(
      .invalidDescriptor, "it is a clone's, and the userfaultfd has no EVENT_REMOVE",
      region: clone)
  }
}
