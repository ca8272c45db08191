// SPDX-License-Identifier: Apache-2.0

import GuestMemoryModel
import KVM
import LinuxSystem
import ModelCheck
import SystemPackage

/// The model against this kernel's guest_memfd, with a vCPU.
enum ModelScenarios {
  static var all: [Scenario] {
    [
      .noting("model: guest_memfd does what the model says", on: [.patched]) {
        try compare(.guestMemfd, .faultline, operations: 100_000)
      },
      .noting("model: private guest_memfd does what the model says", on: [.patched]) {
        try compare(.guestMemfdPrivate, .faultline, operations: 20_000)
      },
      .noting("model: guest_memfd does what the model says", on: [.unpatched]) {
        try compare(.guestMemfd, .linux7_3, operations: 100_000)
      },
      .noting("model: private guest_memfd does what the model says", on: [.unpatched]) {
        try compare(.guestMemfdPrivate, .linux7_3, operations: 20_000)
      },
    ]
  }

  private static func compare(
    _ memory: ModelMemory, _ kernel: KernelVariant, operations: Int
  ) throws -> String {
    let setup = Setup(memory, kernel: kernel)
    let source = try SourcePages(pages: setup.mappingPages, pageBytes: 4096)
    let report = try Differential(setup) { setup in
      var flags: GuestMemfdFlags = .mmap
      if memory == .guestMemfd { flags.insert(.initShared) }
      if memory == .guestMemfd, kernel.guestMemfdWrite != .none { flags.insert(.write) }
      let bitmap =
        kernel.stageTwoBitmap
        ? try UserfaultBitmap(pageCount: setup.objectPages, allSet: false) : nil
      let machine = try BoundMachine(
        userfaults: bitmap, flags: flags, pageCount: setup.objectPages)
      return try KernelSubject(
        setup,
        object: try MemoryObject(
          adopting: try machine.memory.file.duplicate(), length: setup.objectPages * 4096),
        source: source, stageTwo: ModelVCPU(machine))
    }.run(operations: operations, seed: 1)
    if let disagreement = report.disagreement { throw Mismatch(description: "\(disagreement)") }
    return "\(report.operations) operations, \(report.waits) waited, 0 differences"
  }
}

/// A vCPU that takes the model's steps.
private final class ModelVCPU: StageTwo {
  private let machine: BoundMachine

  init(_ machine: BoundMachine) { self.machine = machine }

  func touch(page: Int, _ access: Access) -> Outcome {
    do {
      let exit =
        switch access {
        case .read: try machine.read(page)
        case .write(let value): try machine.write(page, value)
        }
      if let word = try machine.word(after: exit) { return .value(word) }
      if case .memoryFault(_, _, let flags) = exit {
        return .memoryFaultExit(userfault: flags == .userfault)
      }
      return .failed(.other)
    } catch {
      return .failed(.other)
    }
  }

  func setUserfaultBit(page: Int, _ value: Bool) -> Bool {
    guard let userfaults = machine.userfaults else { return false }
    if value { userfaults.set(page) } else { userfaults.clear(page) }
    return true
  }
}
