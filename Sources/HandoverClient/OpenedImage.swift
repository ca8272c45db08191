// SPDX-License-Identifier: Apache-2.0

public import HandoverProtocol
public import LinuxSystem
public import SystemPackage
public import Userfault

/// The clean pages of an image, for a clone of it (docs/handover.md, "open and image"): what the
/// clone writes is its own, the rest is the same memory in all clones.
///
/// Open the image, map each region, register the mappings MISSING|MINOR with a userfaultfd that
/// has REMOVE events, then `attach`, then run the guest. The service waits 5 s for all of that.
public struct OpenedImage: ~Copyable, Sendable {
  /// A region of the image, and its memory file.
  public final class Region: Sendable {
    /// Its number in the image.
    public let number: Int
    /// Where the guest had it.
    public let guestAddress: UInt64
    /// Where it begins among the image's regions, one after the other.
    public let offset: UInt64
    /// Bytes; a multiple of the page size.
    public let length: Int
    /// What the machine called it.
    public let name: String?
    /// The unit of its faults: 4 KiB or 2 MiB.
    public let pageSize: PageSize
    /// The memory file, which can only be read. It may be closed once it is mapped: let go of
    /// the region.
    public let descriptor: OwnedDescriptor

    init(
      _ region: ImageMessage.Region, number: Int, pageSize: PageSize,
      descriptor: consuming OwnedDescriptor
    ) {
      self.number = number
      guestAddress = region.guestAddress
      offset = region.offset
      length = Int(region.length)
      name = region.name
      self.pageSize = pageSize
      self.descriptor = descriptor
    }

    /// A private mapping of all of it.
    ///
    /// - Parameter reserved: huge pages are set aside for all that the guest may write, and
    ///   `noMemory` is thrown where the pool has too few. Without that a write is SIGBUS when the
    ///   pool is empty. For pages of 4 KiB it means nothing.
    public func makeMapping(reserved: Bool = true) throws(Errno) -> Mapping {
      try Mapping(
        of: descriptor, length: length, sharing: .private,
        reserved: reserved && pageSize != .size4KiB)
    }

    /// What `attach` says of it.
    ///
    /// - Parameter hostAddress: where this process has all of it mapped.
    public func attached(at hostAddress: HostAddress) -> AttachMessage.Region {
      AttachMessage.Region(
        hostAddress: hostAddress.rawValue, length: UInt64(length),
        pageSize: UInt64(pageSize.bytes), guestAddress: guestAddress, mode: .clone,
        memory: number)
    }
  }

  /// All of the image, in its order.
  public let regions: [Region]
  private var connection: ServiceConnection

  /// Connects to a service and opens an image; whoever lets go of it ends the connection.
  ///
  /// - Parameters:
  ///   - path: of the service's socket.
  ///   - image: which one, where the service has several.
  ///   - name: of this VMM, for the service's logs.
  ///   - pageSize: 4 KiB, or 2 MiB for hugetlbfs.
  ///   - timeoutMilliseconds: for the answer.
  public init(
    from path: FilePath, image: String? = nil, name: String? = nil,
    pageSize: PageSize = .size4KiB, timeoutMilliseconds: Int = 10_000
  ) throws(HandoverClientError) {
    let frame: [UInt8]
    do throws(ProtocolError) {
      frame = try OpenMessage(
        name: name, image: image, pageSize: UInt64(pageSize.bytes)
      ).frame()
    } catch {
      throw HandoverClientError(.invalidRequest, error.description)
    }
    var connection = try ServiceConnection(to: path)
    var descriptors = DescriptorList()
    switch try connection.request(
      frame, into: &descriptors, timeoutMilliseconds: timeoutMilliseconds)
    {
    case .image(let image):
      regions = try Self.regions(of: image, pageSize: pageSize, &descriptors)
    case .error(let code, let message, _):
      throw HandoverClientError(.refused, message, serviceCode: code)
    case .ok, .status:
      throw HandoverClientError(.badAnswer, "no image came")
    }
    self.connection = connection
  }

  private static func regions(
    of image: ImageMessage, pageSize: PageSize, _ descriptors: inout DescriptorList
  ) throws(HandoverClientError) -> [Region] {
    guard image.pageSize == UInt64(pageSize.bytes), image.regions.count == descriptors.count
    else {
      throw HandoverClientError(
        .badAnswer, "\(descriptors.count) descriptors came for \(image.regions.count) regions")
    }
    var regions: [Region] = []
    for (number, region) in image.regions.enumerated() {
      guard region.memory == number, let length = Int(exactly: region.length), length > 0,
        pageSize.divides(length)
      else {
        throw HandoverClientError(.badAnswer, "region \(number) of the image is none")
      }
      switch descriptors.takeFirst() {
      case .some(let descriptor):
        regions.append(
          Region(region, number: number, pageSize: pageSize, descriptor: descriptor))
      case .none:
        throw HandoverClientError(.badAnswer, "no descriptor came for region \(number)")
      }
    }
    return regions
  }

  /// Hands the clone's memory over; returns when it is served.
  ///
  /// - Parameters:
  ///   - regions: the memory: `Region.attached` for what is mapped of the image; there may be
  ///     others besides.
  ///   - userfaultfd: of this process, with REMOVE events; the caller may keep it open.
  ///   - memoryFiles: what regions of mode `.minor` mean by `memory`; they stay the caller's.
  ///   - timeoutMilliseconds: for the answer.
  public consuming func attach(
    _ regions: [AttachMessage.Region], userfaultfd: borrowing Userfaultfd,
    memoryFiles: [CInt] = [], options: AttachMessage.Options? = nil,
    timeoutMilliseconds: Int = 10_000
  ) throws(HandoverClientError) -> HandoverClient {
    let frame = try HandoverClient.frame(
      AttachMessage(regions: regions, memoryFiles: memoryFiles.count, options: options))
    return try HandoverClient(
      connection, frame, descriptors: [userfaultfd.descriptor.rawValue] + memoryFiles,
      timeoutMilliseconds: timeoutMilliseconds)
  }
}
