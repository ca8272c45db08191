// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import Synchronization
import SystemPackage
import TestSupport
import Testing

@Suite(.enabled(if: Host.hasKVM, "no usable /dev/kvm"))
struct RunTests {
  @Test("Port input gets the answer, port output shows the value")
  func ports() throws {
    let tiny = try TinyMachine(program: Programs.echo)
    for value: UInt64 in [1, 0xFFFF_FFFF, 0x8000_0001] {
      #expect(try tiny.vcpu.run() == .portInput(port: Programs.port, size: 4, count: 1))
      tiny.vcpu.answer(value)
      #expect(
        try tiny.vcpu.run()
          == .portOutput(port: Programs.port, size: 4, count: 1, value: UInt32(value)))
    }
  }

  @Test("An exit is completed without running on")
  func completion() throws {
    let tiny = try TinyMachine(program: Programs.echo)
    _ = try tiny.vcpu.run()
    tiny.vcpu.answer(0x55)
    #expect(try tiny.vcpu.completePendingExit() == .interrupted)
    let registers = try tiny.vcpu.registers()
    #expect(registers.rip == 0x8001)
    #expect(registers.rax == 0x55)
    #expect(registers.rbx == 0)
  }

  @Test("A write where no slot is, is an MMIO exit with its value")
  func mmio() throws {
    let tiny = try TinyMachine(program: Programs.write)
    try tiny.machine.removeMemory(slot: 1)
    let exit = try tiny.write(pages: 3..<4)
    #expect(
      exit
        == .mmioWrite(
          address: TinyMachine.dataAddress.advanced(by: 3 * 4096), size: 8, value: 0x1234_5678))
  }

  @Test("An exception without a handler is a shutdown")
  func tripleFault() throws {
    let tiny = try TinyMachine(program: Programs.undefined)
    #expect(try tiny.vcpu.run() == .shutdown)
  }

  @Test(
    "No kick is lost, whether the vCPU is in the guest or between two runs",
    .timeLimit(.minutes(10)), arguments: [Programs.spin, Programs.output])
  func kicks(_ program: [UInt8]) throws {
    try KickSignal.install()
    let tiny = try TinyMachine(program: program)
    // How many kicks were sent, and how many the vCPU's thread has answered.
    let sent = Mutex(0)
    let seen = Mutex(0)
    let last = 1000
    try withThread(
      named: "kicked",
      {
        tiny.vcpu.kick.attach()
        while seen.withLock({ $0 }) < last {
          guard let exit = try? tiny.vcpu.run() else { break }
          guard exit == .interrupted else { continue }
          tiny.vcpu.kick.acknowledge()
          seen.withLock { $0 = sent.withLock { $0 } }
        }
        tiny.vcpu.kick.detach()
      }
    ) {
      for number in 1...last {
        sent.withLock { $0 = number }
        tiny.vcpu.kick.send()
        #expect(Delay.until { seen.withLock { $0 } >= number })
      }
    }
  }
}

/// Runs `inside` in a thread of its own while `body` runs here, and waits for it.
func withThread(
  named name: String, _ inside: @escaping @Sendable () -> Void, _ body: () throws -> Void
) throws {
  let thread = try NamedThread(name: name, inside)
  let result = Result { try body() }
  thread.join()
  try result.get()
}
