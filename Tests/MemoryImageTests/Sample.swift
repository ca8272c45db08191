// SPDX-License-Identifier: Apache-2.0

import Glibc
import LinuxSystem
import MemoryImage
import SystemPackage
import TestSupport
import Testing

/// A machine's memory that can be written to an image and compared with one.
struct Sample: Sendable {
  static let zeroBlock = [UInt8](repeating: 0, count: 4096)

  var regions: [ImageRegion]
  var states: [DeviceState] = []
  var metadata: [String: String] = [:]
  /// For each region its blocks that are not zero.
  var data: [[Int: [UInt8]]]

  /// Regions one after the other; about half of the blocks are zero, in runs.
  init(seed: UInt64, blocks: [Int], pageSize: PageSize = .size4KiB) {
    var random = SeededRandom(seed: seed)
    var address: UInt64 = 0
    regions = []
    data = []
    for (number, count) in blocks.enumerated() {
      regions.append(
        ImageRegion(
          name: "ram\(number)", guestAddress: GuestAddress(address), length: count * 4096,
          pageSize: pageSize))
      address += UInt64(count * 4096) + 4096
      var content: [Int: [UInt8]] = [:]
      var block = 0
      while block < count {
        let run = Int.random(in: 1...24, using: &random)
        if Bool.random(using: &random) {
          for block in block..<min(block + run, count) {
            content[block] = Self.randomBlock(&random)
          }
        }
        block += run
      }
      data.append(content)
    }
  }

  /// The ways to hold blocks that round trips go through.
  static let encodings = [
    ImageOptions(encoding: .stored), ImageOptions(),
    ImageOptions(encoding: .zstd(level: 3), blocksPerChunk: 16),
    ImageOptions(encoding: .zstd(level: 1), blocksPerChunk: 1),
  ]

  /// A small machine with everything in it: two regions, device states, metadata.
  static let machine = machine(blocks: [2060, 8])

  /// The same with few blocks, for tests that read it thousands of times.
  static let smallMachine = machine(blocks: [12, 8])

  /// Their images.
  static let machineImage = Result { try machine.encoded() }
  static let smallMachineImage = Result { try smallMachine.encoded() }

  private static func machine(blocks: [Int]) -> Sample {
    var sample = Sample(seed: 7, blocks: blocks)
    var random = SeededRandom(seed: 8)
    // The tests that damage blocks need to know some.
    for block in [2, 3, blocks[0] - 2] { sample.data[0][block] = randomBlock(&random) }
    sample.data[1] = [1: randomBlock(&random)]
    sample.data[0][1] = nil
    sample.states = [
      DeviceState(type: 0x7570_6376, instance: 0, bytes: Array(0..<200)),
      DeviceState(type: 0x7570_6376, instance: 1, bytes: []),
      DeviceState(type: 1, instance: 0, bytes: [1, 2, 3]),
    ]
    sample.metadata = ["arch": "x86_64", "name": "größe 📀", "empty": ""]
    return sample
  }

  /// Also blocks that hardly differ from zero.
  static func randomBlock(_ random: inout SeededRandom) -> [UInt8] {
    var block = zeroBlock
    if Int.random(in: 0..<4, using: &random) == 0 {
      block[Int.random(in: 0..<4096, using: &random)] = 1
    } else {
      unsafe block.withUnsafeMutableBytes { bytes in
        for offset in stride(from: 0, to: 4096, by: 8) {
          unsafe bytes.storeBytes(of: random.next(), toByteOffset: offset, as: UInt64.self)
        }
      }
    }
    return block
  }

  func block(_ region: Int, _ block: Int) -> [UInt8] { data[region][block] ?? Self.zeroBlock }

  // MARK: - Writing

  func write(
    to path: FilePath, _ options: ImageOptions = ImageOptions(encoding: .stored)
  ) throws {
    var writer = try ImageWriter(path: path, regions: regions, options: options)
    for (region, blocks) in data.enumerated() {
      try writer.write(region: region, blocks: blocks)
    }
    for state in states { try writer.add(state: state) }
    for (key, value) in metadata { try writer.setMetadata(key: key, value: value) }
    try writer.finish()
  }

  /// The bytes of the image, whose blocks are stored as they are: so that tests know where.
  func encoded(_ options: ImageOptions = ImageOptions(encoding: .stored)) throws -> RawImage {
    try withTemporaryDirectory { directory in
      let path = FilePath(directory).appending("image")
      try write(to: path, options)
      return RawImage(bytes: try contents(of: path))
    }
  }

  // MARK: - Comparing

  /// What reading every block of an image gave.
  struct Comparison {
    var right = 0
    /// Blocks with content that is not theirs: never acceptable.
    var wrong = 0
    var errors: [ImageError] = []
  }

  /// Reads every block, up to `limit` at a time: run by run, and with short runs of zeros, which
  /// has to find the same.
  func compare(with image: MemoryImage, limit: Int = 64) -> Comparison {
    let comparison = compare(with: image, limit: limit, zeros: 0)
    for zeros in [1, 4, 64] {
      let other = compare(with: image, limit: limit, zeros: zeros)
      #expect(other.right == comparison.right && other.wrong == comparison.wrong, "\(zeros)")
      #expect(other.errors.map(\.description) == comparison.errors.map(\.description), "\(zeros)")
    }
    return comparison
  }

  private func compare(with image: MemoryImage, limit: Int, zeros: Int) -> Comparison {
    var comparison = Comparison()
    for (region, description) in image.regions.enumerated() {
      var block = 0
      while block < description.blockCount {
        let count = min(limit, description.blockCount - block)
        do {
          let (run, bytes) = try image.read(
            region: region, firstBlock: block, blockCount: count, zeros: zeros)
          for index in 0..<run.blockCount {
            let expected = region < data.count ? self.block(region, block + index) : []
            let found = run.kind == .zero ? Self.zeroBlock : bytes[index]
            if isSame(found, expected) { comparison.right += 1 } else { comparison.wrong += 1 }
          }
          block += run.blockCount
        } catch let error as ImageError {
          comparison.errors.append(error)
          block += 1
        } catch {
          Issue.record(error)
        }
      }
    }
    return comparison
  }
}

extension ImageWriter {
  /// Writes single blocks.
  func write(region: Int, blocks: [Int: [UInt8]]) throws {
    for (block, bytes) in blocks.sorted(by: { $0.key < $1.key }) {
      try write(region: region, firstBlock: block, bytes)
    }
  }

  func write(region: Int, firstBlock: Int, _ bytes: [UInt8]) throws {
    try unsafe bytes.withUnsafeBytes {
      try unsafe write(region: region, firstBlock: firstBlock, bytes: $0)
    }
  }
}

extension MemoryImage {
  /// The run and, if it is one of data, its blocks.
  ///
  /// - Parameter zeros: fewer zero blocks in a row are data.
  func read(
    region: Int, firstBlock: Int, blockCount: Int, zeros: Int = 0
  ) throws -> (run: ImageRun, blocks: [[UInt8]]) {
    var bytes = [UInt8](repeating: 0xEE, count: max(blockCount, 1) * 4096)
    let run = try unsafe bytes.withUnsafeMutableBytes { buffer in
      let start = unsafe buffer.baseAddress.unsafelyUnwrapped
      return zeros == 0
        ? try unsafe read(
          region: region, firstBlock: firstBlock, blockCount: blockCount, into: start)
        : try unsafe read(
          region: region, firstBlock: firstBlock, blockCount: blockCount, zeros: zeros,
          into: start)
    }
    guard run.kind == .data else {
      let untouched = [UInt8](repeating: 0xEE, count: bytes.count)
      #expect(
        isSame(bytes, untouched) || run.blockCount < zeros,
        "a run of zeros does not touch the buffer")
      return (run, [])
    }
    return (run, (0..<run.blockCount).map { Array(bytes[$0 * 4096..<($0 + 1) * 4096]) })
  }
}

/// Whether two arrays are equal; fast also without optimisation.
func isSame(_ left: [UInt8], _ right: [UInt8]) -> Bool {
  guard left.count == right.count else { return false }
  return unsafe left.withUnsafeBytes { left in
    unsafe right.withUnsafeBytes { right in
      guard let first = left.baseAddress, let second = right.baseAddress else { return true }
      return unsafe memcmp(first, second, left.count) == 0
    }
  }
}

/// The error that a body throws.
func imageError(_ body: () throws -> Void) -> ImageError? {
  do {
    try body()
    return nil
  } catch let error as ImageError {
    return error
  } catch {
    Issue.record(error)
    return nil
  }
}
