// SPDX-License-Identifier: Apache-2.0

import FaultlineDaemon
import Foundation
import HandoverClient
import HandoverProtocol
import LinuxSystem
import MemoryImage
import Synchronization
import SystemPackage
import TestSupport
import Testing
import Userfault

/// Hands over the memory of a VMM that has it in a file.
private func attach(
  _ service: Service, _ vmm: SharedMemoryVMM, file: CInt? = nil, offset: Int = 0,
  pageSize: PageSize = .size4KiB
) throws -> HandoverClient {
  let region = AttachMessage.Region(
    hostAddress: vmm.range.start.rawValue, length: UInt64(vmm.range.length),
    pageSize: UInt64(pageSize.bytes), guestAddress: 0, mode: .minor, memory: 0,
    memoryOffset: UInt64(offset))
  return try HandoverClient(
    attachingTo: FilePath(service.socket), regions: [region], userfaultfd: vmm.userfaultfd,
    memoryFiles: [file ?? vmm.file.descriptor.rawValue], timeoutMilliseconds: 60_000)
}

private func word(_ block: Int) -> GuardedValue {
  .value(PatternSource.word(block: block, seed: 7))
}

@Suite("The daemon fills memory files of other processes", .serialized)
struct MinorTests {
  @Test("All content is right, at its place in the file, and what is given back is zero")
  func memfd() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", regions: [1024])
      let vmm = try SharedMemoryVMM(pages: 1024, offset: 256)
      try vmm.file.seal(futureWrites: false)
      let client = try attach(service, vmm, offset: 256 * 4096)
      #expect(guardedLoad(vmm.range, offset: 40 * 4096) == word(40))
      // One that was touched, and some that were not.
      try vmm.remove(offset: 40 * 4096, length: 4096)
      try vmm.remove(offset: 900 * 4096, length: 8 * 4096)
      let removed = Set([40] + Array(900..<908))
      for block in (0..<1024).reversed() {
        let expected = removed.contains(block) ? .value(0) : word(block)
        #expect(guardedLoad(vmm.range, offset: block * 4096) == expected, "block \(block)")
      }
      #expect(try vmm.file.descriptor.nextData(from: 0) == 256 * 4096)
      // The VMM's memory cgroup pays for what UFFDIO_COPY brings, the service's for what it writes.
      #expect(try service.request("GET", "/v1/sessions/1").contains("\"continued_pages\":0,"))
      withExtendedLifetime(client) {}
    }
  }

  /// How the pages of a file that has old content everywhere are brought.
  enum Bringing: CaseIterable { case touched, filled, letGo }

  @Test(
    "What the file had before is nowhere to be seen, where the image has zeros too",
    arguments: Bringing.allCases)
  func oldContent(bringing: Bringing) throws { try oldContent(.size4KiB, bringing) }

  @Test(
    "Nor is it in huge pages", .enabled(if: Host.hasHugePages(8), "needs 8 free pages of 2 MiB"),
    arguments: Bringing.allCases)
  func oldContentInHugePages(bringing: Bringing) throws { try oldContent(.size2MiB, bringing) }

  private func oldContent(_ pageSize: PageSize, _ bringing: Bringing) throws {
    try withTemporaryDirectory { directory in
      // The second huge page is zero in the image as a whole.
      let image = try sparseImage(directory + "/base.img", blocks: 3 * 512, zeros: 512..<1024)
      let service = try Service(in: directory, handover: "faultline", image: image)
      let vmm = try SharedMemoryVMM(
        pages: 3 * PageSize.size2MiB.bytes / pageSize.bytes, pageSize: pageSize)
      try vmm.file.seal(futureWrites: false)
      // Through a mapping that is not registered, as an earlier guest would have left it.
      let before = try Mapping(of: vmm.file)
      for block in 0..<3 * 512 { store(0xDEAD, before.range, offset: block * 4096) }
      let client = try attach(service, vmm, pageSize: pageSize)
      switch bringing {
      case .touched: break
      case .filled:
        _ = try service.request("POST", "/v1/sessions/1/fill")
        #expect(Delay.until { (try? service.sessions().first?.fill.phase) == "done" })
      case .letGo:
        _ = try service.request("DELETE", "/v1/sessions/1")
        #expect(Delay.until { (try? service.sessions().isEmpty) == true })
      }
      for block in 0..<3 * 512 {
        let right: GuardedValue = (512..<1024).contains(block) ? .value(0) : word(block)
        #expect(guardedLoad(vmm.range, offset: block * 4096) == right, "block \(block)")
      }
      withExtendedLifetime(client) {}
    }
  }

  /// A pattern image in which some blocks are zero beside those that are anyway.
  private func sparseImage(_ path: String, blocks: Int, zeros: Range<Int>) throws -> String {
    let writer = try ImageWriter(path: FilePath(path), regions: imageRegions([blocks]))
    for block in 0..<blocks where !zeros.contains(block) {
      let words = [UInt64](repeating: PatternSource.word(block: block, seed: 7), count: 512)
      try unsafe words.withUnsafeBytes { bytes in
        try unsafe writer.blocks.write(region: 0, firstBlock: block, bytes: bytes)
      }
    }
    try writer.finish()
    return path
  }

  @Test(
    "The same in huge pages", .enabled(if: Host.hasHugePages(8), "needs 8 free pages of 2 MiB"))
  func hugePages() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", regions: [4 * 512])
      let vmm = try SharedMemoryVMM(pages: 4, pageSize: .size2MiB, offset: 1)
      try vmm.file.seal(futureWrites: false)
      let client = try attach(service, vmm, offset: 2 << 20, pageSize: .size2MiB)
      #expect(guardedLoad(vmm.range, offset: 0) == word(0))
      try vmm.remove(offset: 0, length: 2 << 20)
      try vmm.remove(offset: 4 << 20, length: 2 << 20)
      for block in 0..<4 * 512 {
        let expected = [0, 2].contains(block / 512) ? .value(0) : word(block)
        #expect(guardedLoad(vmm.range, offset: block * 4096) == expected, "block \(block)")
      }
      withExtendedLifetime(client) {}
    }
  }

  @Test("A VMM that closes and goes on never reads zeros for what was not there")
  func leavesEarly() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", regions: [1024])
      let vmm = try SharedMemoryVMM(pages: 1024)
      try vmm.file.seal(futureWrites: false)
      do {
        let client = try attach(service, vmm)
        #expect(guardedLoad(vmm.range, offset: 3 * 4096) == word(3))
        try vmm.remove(offset: 5 * 4096, length: 4096)
        #expect(Delay.until { service.removeEvents == 1 })
        withExtendedLifetime(client) {}
      }
      #expect(Delay.until { service.daemon.logged("has ended") })
      #expect(guardedLoad(vmm.range, offset: 3 * 4096) == word(3))
      #expect(guardedLoad(vmm.range, offset: 5 * 4096) == .value(0))
      #expect(guardedLoad(vmm.range, offset: 900 * 4096) == .busError)
    }
  }

  @Test("It is filled in the background, too, and one that is let go of has all of it")
  func background() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", regions: [1024])
      let vmm = try SharedMemoryVMM(pages: 1024)
      try vmm.file.seal(futureWrites: false)
      let client = try attach(service, vmm)
      let stopped = try faultline("stop", "1", "--control-socket", service.control)
      #expect(stopped.output == "session 1 is let go of\n", "\(stopped)")
      let status = try #require(try client.nextStatus(waitingMilliseconds: 60_000))
      // "filled", which may come before it, is only for those who wanted it filled.
      #expect(["filled", "detached"].contains(status.event))
      service.daemon.send(SIGTERM)
      #expect(service.daemon.wait() == 0)
      for block in 0..<1024 { #expect(guardedLoad(vmm.range, offset: block * 4096) == word(block)) }
    }
  }

  @Test("A file that could harm the daemon is refused, and the answer says what to do")
  func refusals() throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", regions: [1024])
      func refusal(
        _ vmm: SharedMemoryVMM, _ file: CInt? = nil, offset: Int = 0
      ) -> (code: String?, text: String) {
        let error = #expect(throws: HandoverClientError.self) {
          _ = try attach(service, vmm, file: file, offset: offset)
        }
        return (error?.serviceCode, error?.description ?? "")
      }
      let unsealed = try SharedMemoryVMM(pages: 1024)
      var answer = refusal(unsealed)
      #expect(answer.code == "invalid_descriptor" && answer.text.contains("F_SEAL_SHRINK"))

      let sealed = try SharedMemoryVMM(pages: 1024)
      try sealed.file.seal(futureWrites: false)
      let reading = try OwnedDescriptor(
        openingForReading: FilePath("/proc/self/fd/\(sealed.file.descriptor.rawValue)"))
      answer = refusal(sealed, reading.rawValue)
      #expect(answer.code == "invalid_descriptor" && answer.text.contains("reading and writing"))
      let number = sealed.file.descriptor.rawValue
      #expect(fcntl(number, F_SETFL, fcntl(number, F_GETFL) | O_APPEND) == 0)
      answer = refusal(sealed)
      #expect(answer.code == "invalid_descriptor" && answer.text.contains("O_APPEND"))
      #expect(fcntl(number, F_SETFL, fcntl(number, F_GETFL) & ~O_APPEND) == 0)
      answer = refusal(sealed, offset: 4096)
      #expect(answer.code == "invalid_regions" && answer.text.contains("passes the end"))

      let unwritable = try SharedMemoryVMM(pages: 1024)
      try unwritable.file.seal(futureWrites: true)
      answer = refusal(unwritable)
      #expect(answer.code == "invalid_descriptor" && answer.text.contains("F_SEAL_FUTURE_WRITE"))

      // Neither can be sealed.
      for path in [directory, "/dev/shm"] {
        let name = path + "/faultline-\(UUID().uuidString)"
        defer { try? FileManager.default.removeItem(atPath: name) }
        _ = FileManager.default.createFile(
          atPath: name, contents: Data(repeating: 0, count: 1024 * 4096))
        let file = try FileHandle(forUpdating: URL(fileURLWithPath: name))
        answer = refusal(sealed, file.fileDescriptor)
        #expect(answer.code == "invalid_descriptor" && answer.text.contains("memfd"), "\(answer)")
      }
      answer = refusal(sealed, sealed.userfaultfd.descriptor.rawValue)
      #expect(answer.code == "invalid_descriptor", "\(answer)")

      // Aligned for huge pages, on small ones.
      let large = try SharedMemoryVMM(pages: 2048)
      try large.file.seal(futureWrites: false)
      let start = large.range.start.rawValue
      let aligned = (start + (2 << 20) - 1) & ~((2 << 20) - 1)
      let region = AttachMessage.Region(
        hostAddress: aligned, length: 2 << 20, pageSize: 2 << 20, guestAddress: 0, mode: .minor,
        memory: 0)
      let mismatch = #expect(throws: HandoverClientError.self) {
        _ = try HandoverClient(
          attachingTo: FilePath(service.socket), regions: [region],
          userfaultfd: large.userfaultfd, memoryFiles: [large.file.descriptor.rawValue])
      }
      #expect(mismatch?.serviceCode == "invalid_regions")
      #expect(mismatch?.description.contains("page size is 2 MiB") == true)
      #expect(service.daemon.isRunning)
    }
  }

  private enum Mischief: String, CaseIterable {
    /// The file is not what is mapped.
    case anotherFile
    /// Writes go to its end from then on (O_APPEND).
    case append
    /// Pages are taken out of it all the time, without an event.
    case punches
  }

  @Test("A VMM that plays tricks with its file harms itself only")
  func hostile() throws { try hostile(.size4KiB) }

  @Test(
    "Nor does one with huge pages",
    .enabled(if: Host.hasHugePages(8), "needs 8 free pages of 2 MiB"))
  func hostileWithHugePages() throws { try hostile(.size2MiB) }

  private func hostile(_ pageSize: PageSize) throws {
    try withTemporaryDirectory { directory in
      let service = try Service(in: directory, handover: "faultline", regions: [4 * 512])
      let pages = (8 << 20) / pageSize.bytes
      for mischief in Mischief.allCases {
        let vmm = try SharedMemoryVMM(pages: pages, pageSize: pageSize)
        try vmm.file.seal(futureWrites: false)
        let other = try MemoryFile(name: "other", length: 8 << 20, pageSize: pageSize)
        try other.seal(futureWrites: false)
        let client = try attach(
          service, vmm, file: mischief == .anotherFile ? other.descriptor.rawValue : nil,
          pageSize: pageSize)
        if mischief == .append {
          let flags = fcntl(vmm.file.descriptor.rawValue, F_GETFL)
          #expect(fcntl(vmm.file.descriptor.rawValue, F_SETFL, flags | O_APPEND) == 0)
        }
        let touching = Atomic<Int>(2)
        try inThreads(3) { thread in
          guard thread < 2 else {
            while mischief == .punches, touching.load(ordering: .acquiring) > 0 {
              for page in 0..<pages {
                try? vmm.file.punchHole(offset: page * pageSize.bytes, length: pageSize.bytes)
              }
            }
            return
          }
          for page in stride(from: thread, to: pages, by: 2) {
            let found = guardedLoad(vmm.range, offset: page * pageSize.bytes)
            let right = word(page * pageSize.bytes / 4096)
            switch mischief {
            // What is mapped is filled, and not what came.
            case .anotherFile: #expect(found == right)
            case .append, .punches: #expect([right, .value(0), .busError].contains(found))
            }
          }
          touching.wrappingSubtract(1, ordering: .releasing)
        }
        withExtendedLifetime(client) {}
      }
      #expect(service.daemon.isRunning, "\(service.daemon.messages)")
      // Whoever comes after them is served.
      let vmm = try SharedMemoryVMM(pages: pages, pageSize: pageSize)
      try vmm.file.seal(futureWrites: false)
      let client = try attach(service, vmm, pageSize: pageSize)
      for block in stride(from: 0, to: 2048, by: 64) {
        #expect(guardedLoad(vmm.range, offset: block * 4096) == word(block))
      }
      withExtendedLifetime(client) {}
    }
  }
}
