// SPDX-License-Identifier: Apache-2.0

internal import LinuxSystem
internal import SystemPackage

/// One entry of the region table as it stands in the file.
struct RegionEntry: Equatable {
  static let length = 128
  private static let fixedLength = 48

  var guestAddress: UInt64
  var length: UInt64
  var pageSize: UInt64
  var indexOffset: UInt64
  var name: String

  func append(to bytes: inout [UInt8]) {
    let start = bytes.count
    bytes.append(integer: guestAddress)
    bytes.append(integer: length)
    bytes.append(integer: pageSize)
    bytes.append(integer: indexOffset)
    bytes.append(integer: UInt64(0))
    bytes.append(integer: UInt32(name.utf8.count))
    bytes.append(integer: UInt32(0))
    bytes.append(contentsOf: name.utf8)
    bytes.append(zeros: start + Self.length - bytes.count)
  }

  /// Decodes an entry; only the name is checked.
  ///
  /// - Parameter reader: has at least 128 bytes left.
  init(_ reader: inout ByteReader, number: Int, path: FilePath) throws(ImageError) {
    guestAddress = reader.next()
    length = reader.next()
    pageSize = reader.next()
    indexOffset = reader.next()
    let unused: UInt64 = reader.next()
    let nameLength: UInt32 = reader.next()
    let reserved: UInt32 = reader.next()
    let field = reader.next(count: Self.length - Self.fixedLength)
    guard nameLength > 0, Int(nameLength) <= ImageLimits.regionNameBytes,
      let name = String(validating: field.prefix(Int(nameLength)), as: UTF8.self),
      unused == 0, reserved == 0, field.dropFirst(Int(nameLength)).allSatisfy({ $0 == 0 })
    else {
      throw ImageError(
        .invalidLayout, path, "the name or a reserved field of a region is malformed",
        region: number)
    }
    self.name = name
  }

  init(_ region: ImageRegion, indexOffset: Int) {
    guestAddress = region.guestAddress.rawValue
    length = UInt64(region.length)
    pageSize = UInt64(region.pageSize.bytes)
    self.indexOffset = UInt64(indexOffset)
    name = region.name
  }
}

/// One entry of the device-state table as it stands in the file.
struct StateEntry: Equatable {
  static let length = 32

  var type: UInt32
  var instance: UInt32
  var offset: UInt64
  var length: UInt64
  var checksum: UInt64

  func append(to bytes: inout [UInt8]) {
    bytes.append(integer: type)
    bytes.append(integer: instance)
    bytes.append(integer: offset)
    bytes.append(integer: length)
    bytes.append(integer: checksum)
  }

  /// Decodes an entry; nothing is checked.
  ///
  /// - Parameter reader: has at least 32 bytes left.
  init(_ reader: inout ByteReader) {
    type = reader.next()
    instance = reader.next()
    offset = reader.next()
    length = reader.next()
    checksum = reader.next()
  }

  init(_ state: DeviceState, offset: Int, checksum: UInt64) {
    type = state.type
    instance = state.instance
    self.offset = UInt64(offset)
    length = UInt64(state.bytes.count)
    self.checksum = checksum
  }
}

/// The metadata as it stands in the file.
enum MetadataTable {
  /// Entries in ascending order of the key's bytes.
  static func encode(_ metadata: [String: String]) -> [UInt8] {
    var bytes: [UInt8] = []
    let ordered = metadata.sorted { $0.key.utf8.lexicographicallyPrecedes($1.key.utf8) }
    for (key, value) in ordered {
      bytes.append(integer: UInt32(key.utf8.count))
      bytes.append(integer: UInt32(value.utf8.count))
      bytes.append(contentsOf: key.utf8)
      bytes.append(contentsOf: value.utf8)
    }
    return bytes
  }

  /// Bytes that an entry takes.
  static func length(key: String, value: String) -> Int { 8 + key.utf8.count + value.utf8.count }

  static func decode(
    _ bytes: [UInt8], count: Int, path: FilePath
  ) throws(ImageError) -> [String: String] {
    let malformed = ImageError(.invalidLayout, path, "the metadata is malformed")
    var reader = ByteReader(bytes)
    var metadata: [String: String] = [:]
    var previous: ArraySlice<UInt8> = []
    for _ in 0..<count {
      guard reader.remaining >= 8 else { throw malformed }
      let keyLength = Int(reader.next() as UInt32)
      let valueLength = Int(reader.next() as UInt32)
      guard keyLength > 0, keyLength <= ImageLimits.metadataKeyBytes,
        keyLength + valueLength <= reader.remaining
      else { throw malformed }
      let keyBytes = reader.next(count: keyLength)
      guard previous.lexicographicallyPrecedes(keyBytes),
        let key = String(validating: keyBytes, as: UTF8.self),
        let value = String(validating: reader.next(count: valueLength), as: UTF8.self),
        metadata.updateValue(value, forKey: key) == nil
      else { throw malformed }
      previous = keyBytes
    }
    guard reader.remaining == 0 else { throw malformed }
    return metadata
  }
}
