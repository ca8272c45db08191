// SPDX-License-Identifier: Apache-2.0

import Foundation
import HandoverProtocol
import MemoryImage
import SystemPackage
import TestSupport
import Testing

@Suite("An image that is overwritten while VMs have it")
struct ChangedImageTests {
  @Test("No working set goes into what has its name now, and new VMs get what is there")
  func overwritten() throws {
    try withTemporaryDirectory { directory in
      let path = directory + "/base.img"
      let service = try Service(in: directory, handover: "faultline")
      let first = try FakeFirecracker(regions: 2, pages: 512)
      let firstClient = try attach(service, first, options: .init(record: true, fillRate: 0))
      for page in 0..<20 {
        #expect(
          first.word(region: 0, page: page) == PatternSource.word(block: page, seed: 7))
      }
      // Zeros only, put into the same file.
      let writer = try ImageWriter(
        path: FilePath(directory + "/zeros.img"), regions: imageRegions([512, 512]))
      try writer.finish()
      let zeros = try Data(contentsOf: URL(fileURLWithPath: directory + "/zeros.img"))
      let file = try FileHandle(forUpdating: URL(fileURLWithPath: path))
      try file.truncate(atOffset: 0)
      try file.write(contentsOf: zeros)
      try file.close()

      let answer = try service.request("POST", "/v1/sessions/1/working-set")
      #expect(answer.hasPrefix("HTTP/1.1 409"), "\(answer)")
      #expect(answer.contains("does not have image"), "\(answer)")
      let stored = try faultline(
        "record", "1", "--store", "--control-socket", service.control)
      #expect(stored.status == 1 && stored.errors.contains("does not have image"), "\(stored)")
      #expect(try Data(contentsOf: URL(fileURLWithPath: path)) == zeros)

      let second = try FakeFirecracker(regions: 2, pages: 512)
      let secondClient = try attach(service, second)
      for region in 0..<2 {
        for page in 0..<512 { #expect(second.word(region: region, page: page) == 0) }
      }
      // The first gets what it was promised, or an error that says what happened.
      let found = try #require(pagesInMemory(first))
      #expect(found.right >= 20 && found.errors > 0)
      #expect(Delay.until { service.daemon.logged("the file was changed while it was open") })
      withExtendedLifetime((firstClient, secondClient)) {}
    }
  }
}
