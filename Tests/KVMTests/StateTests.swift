// SPDX-License-Identifier: Apache-2.0

import KVM
import LinuxSystem
import TestSupport
import Testing

@Suite(.enabled(if: Host.hasKVM, "no usable /dev/kvm"))
struct StateTests {
  private func savedState() throws -> VCPUState {
    let tiny = try TinyMachine(program: Programs.echo)
    _ = try tiny.vcpu.run()
    tiny.vcpu.answer(0x77)
    _ = try tiny.vcpu.completePendingExit()
    return try tiny.vcpu.saveState(msrs: tiny.stateMSRs)
  }

  @Test("Encoding and decoding gives the same state, and the same bytes")
  func roundTrip() throws {
    let state = try savedState()
    let bytes = state.encode()
    let decoded = try VCPUState(decoding: bytes)
    #expect(decoded == state)
    #expect(decoded.encode() == bytes)
    #expect(decoded.instructionPointer == 0x8001)
  }

  @Test("A restored vCPU goes on with the next instruction and its registers")
  func restore() throws {
    let state = try savedState()
    let other = try TinyMachine(program: Programs.echo)
    try other.vcpu.restoreState(state)
    #expect(
      try other.vcpu.run() == .portOutput(port: Programs.port, size: 4, count: 1, value: 0x77))
    #expect(try other.vcpu.registers().rbx == 0x77)
  }

  @Test("What is restored and saved again is the same")
  func restoreAndSave() throws {
    let state = try savedState()
    let other = try TinyMachine(program: Programs.echo)
    try other.vcpu.restoreState(state)
    let again = try other.vcpu.saveState(msrs: other.stateMSRs)
    // The time-stamp counter, among the MSRs, goes on.
    for component in VCPUComponent.allCases where component != .modelSpecific {
      #expect(again.bytes(of: component) == state.bytes(of: component), "\(component)")
    }
  }

  @Test("A truncated state is refused at every length")
  func truncation() throws {
    let bytes = try savedState().encode()
    for length in bytes.indices {
      #expect(throws: VCPUStateError.self) {
        _ = try VCPUState(decoding: Array(bytes.prefix(length)))
      }
    }
    #expect(throws: VCPUStateError.self) { _ = try VCPUState(decoding: bytes + [0]) }
  }

  @Test("Flipped bits are refused or give a state, but never a trap")
  func flips() throws {
    let bytes = try savedState().encode()
    var random = SystemRandomNumberGenerator()
    for _ in 0..<2000 {
      var damaged = bytes
      for _ in 0..<Int.random(in: 1...4, using: &random) {
        // Half of the flips go to the lengths and tags at the front.
        let limit = Bool.random(using: &random) ? 64 : bytes.count
        damaged[Int.random(in: 0..<limit, using: &random)] ^= 1 << UInt8.random(in: 0..<8)
      }
      if let state = try? VCPUState(decoding: damaged) {
        #expect(state.encode() == damaged || state.encode().count == damaged.count)
      }
    }
  }

  @Test("KVM refuses or takes flipped states, and the process lives on")
  func flippedRestore() throws {
    let bytes = try savedState().encode()
    for _ in 0..<40 {
      var damaged = bytes
      damaged[Int.random(in: 16..<bytes.count)] ^= 1 << UInt8.random(in: 0..<8)
      guard let state = try? VCPUState(decoding: damaged) else { continue }
      let tiny = try TinyMachine(program: Programs.echo)
      try? tiny.vcpu.restoreState(state)
    }
  }
}
