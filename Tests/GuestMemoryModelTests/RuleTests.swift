// SPDX-License-Identifier: Apache-2.0

import GuestMemoryModel
import Testing

/// The scenarios that the guest_memfd discussion turned on.
struct RuleTests {
  private func model(
    _ kernel: KernelVariant = .faultline, _ memory: ModelMemory = .guestMemfd
  ) -> Model { Model(Setup(memory, kernel: kernel, objectPages: 4)) }

  private func event(_ page: Int, _ flags: ModelFaultFlags) -> Outcome {
    .waits(FaultEvent(mapping: 0, page: page, flags: flags))
  }

  private let all = Span(0, 0, 4)

  @Test func minorOnAPresentPageRaisesAMinorEventThatContinueResolves() {
    var model = model()
    #expect(model.apply(.write(first: 0, count: 1, tag: 7, readable: 1)).outcome == .done(1))
    _ = model.apply(.register(all, .minor))
    #expect(model.apply(.touch(mapping: 0, page: 0, .read)).outcome == event(0, .minor))
    #expect(model.apply(.copy(Span(0, 0), tag: 9)).outcome == .failed(.EEXIST))
    let step = model.apply(.continue(Span(0, 0)))
    #expect(step == StepResult(.done(1), resumed: [.value(7)]))
    #expect(model.apply(.continue(Span(0, 0))).outcome == .failed(.EEXIST))
  }

  @Test func minorAloneOnAnAbsentPageIsASilentZeroPage() {
    var model = model()
    _ = model.apply(.register(all, .minor))
    #expect(model.apply(.touch(mapping: 0, page: 1, .read)).outcome == .value(0))
    #expect(model.cache[1] == .uptodate(0))
    var trapping = self.model(.minorTrapsAll)
    _ = trapping.apply(.register(all, .minor))
    #expect(trapping.apply(.touch(mapping: 0, page: 1, .read)).outcome == event(1, .minor))
  }

  @Test func missingAndMinorGiveASecondEventAfterWriteAndWake() {
    var model = model()
    _ = model.apply(.register(all, [.missing, .minor]))
    #expect(model.apply(.touch(mapping: 0, page: 2, .read)).outcome == event(2, []))
    _ = model.apply(.write(first: 2, count: 1, tag: 5, readable: 1))
    #expect(model.apply(.wake(Span(0, 2))).resumed == [event(2, .minor)])
    #expect(model.apply(.continue(Span(0, 2))).resumed == [.value(5)])
  }

  @Test func missingAloneIsResolvedByWriteAndWake() {
    var model = model()
    _ = model.apply(.register(all, .missing))
    _ = model.apply(.touch(mapping: 0, page: 2, .read))
    _ = model.apply(.write(first: 2, count: 1, tag: 5, readable: 1))
    #expect(model.apply(.wake(Span(0, 2))).resumed == [.value(5)])
  }

  @Test func stageTwoBypassesUserfaultfdUnlessTheBitIsSet() {
    var model = model()
    _ = model.apply(.register(all, [.missing, .minor]))
    #expect(model.apply(.vcpuTouch(page: 0, .read)).outcome == .value(0))
    #expect(model.apply(.touch(mapping: 0, page: 0, .read)).outcome == event(0, .minor))
    _ = model.apply(.setUserfaultBit(page: 1, true))
    #expect(model.apply(.vcpuTouch(page: 1, .read)).outcome == .memoryFaultExit(userfault: true))
    #expect(model.cache[1] == .absent)
    _ = model.apply(.write(first: 1, count: 1, tag: 3, readable: 1))
    _ = model.apply(.setUserfaultBit(page: 1, false))
    #expect(model.apply(.vcpuTouch(page: 1, .read)).outcome == .value(3))
    #expect(model.mappings[0].table[1] == .none)
  }

  @Test func continueOfAFallocatedPageShowsZerosExceptInMarch2026() {
    for (kernel, expected) in [(KernelVariant.faultline, 0), (.march2026, staleContent)] {
      var model = model(kernel)
      _ = model.apply(.register(all, .minor))
      _ = model.apply(.allocate(first: 0, count: 1))
      #expect(model.apply(.touch(mapping: 0, page: 0, .read)).outcome == event(0, .minor))
      #expect(model.apply(.continue(Span(0, 0))).resumed == [.value(expected)])
    }
  }

  @Test func anAccessPastTheEndIsABusErrorBeforeAnyEventExceptInMarch2026() {
    var model = model()
    _ = model.apply(.register(Span(0, 0, 5), .missing))
    #expect(model.apply(.touch(mapping: 0, page: 4, .read)).outcome == .busError)
    var stuck = self.model(.march2026)
    _ = stuck.apply(.register(Span(0, 0, 5), .missing))
    #expect(stuck.apply(.touch(mapping: 0, page: 4, .read)).outcome == event(4, []))
    #expect(stuck.apply(.copy(Span(0, 4), tag: 1)).outcome == .failed(.ENOMEM))
    #expect(stuck.apply(.continue(Span(0, 4))).outcome == .failed(.EFAULT))
    #expect(stuck.apply(.poison(Span(0, 4))).outcome == .failed(.EFAULT))
  }

  @Test func missingWithoutCopyOffersNoCopyAndIsFilledByWrite() {
    var model = model(.missingWithoutCopy)
    #expect(model.apply(.register(all, [.missing, .minor])).outcome == .done(0x1a4))
    _ = model.apply(.touch(mapping: 0, page: 0, .read))
    #expect(model.apply(.copy(Span(0, 0), tag: 1)).outcome == .failed(.EINVAL))
    _ = model.apply(.write(first: 0, count: 1, tag: 4, readable: 1))
    #expect(model.apply(.continue(Span(0, 0))).resumed == [.value(4)])
  }

  @Test func aWriteTakesAbsentPagesOnlyAndLeavesNothingBehindWhenItFails() {
    var model = model()
    _ = model.apply(.write(first: 2, count: 1, tag: 1, readable: 1))
    #expect(
      model.apply(.write(first: 2, count: 2, tag: 9, readable: 2)).outcome == .failed(.EEXIST))
    #expect(model.apply(.write(first: 0, count: 4, tag: 9, readable: 4)).outcome == .done(2))
    #expect(
      model.apply(.write(first: 3, count: 1, tag: 9, readable: 0)).outcome == .failed(.EFAULT))
    #expect(model.cache == [.uptodate(9), .uptodate(10), .uptodate(1), .absent])
    var leaky = self.model(.march2026)
    _ = leaky.apply(.write(first: 3, count: 1, tag: 9, readable: 0))
    #expect(leaky.cache[3] == .uptodate(0))
  }

  @Test func registrationIsRefusedOnReleasedKernelsAndWithoutInitShared() {
    for kernel in [KernelVariant.linux6_18, .linux7_3] {
      var model = model(kernel)
      #expect(model.apply(.register(all, .minor)).outcome == .failed(.EINVAL))
      #expect(
        model.apply(.write(first: 0, count: 1, tag: 1, readable: 1)).outcome == .failed(.ESPIPE))
    }
    var model = model(.faultline, .guestMemfdPrivate)
    #expect(model.apply(.register(all, .minor)).outcome == .failed(.EINVAL))
    #expect(model.apply(.touch(mapping: 0, page: 0, .read)).outcome == .busError)
    #expect(model.apply(.vcpuTouch(page: 0, .read)).outcome == .value(0))
  }

  @Test func ofTwoMappingsOnlyTheArmedOneTraps() {
    var model = model()
    _ = model.apply(.register(all, [.missing, .minor]))
    #expect(model.apply(.touch(mapping: 1, page: 0, .write(6))).outcome == .value(6))
    #expect(model.apply(.touch(mapping: 0, page: 0, .read)).outcome == event(0, .minor))
  }

  @Test func unregisterWakesMissingRangesAndNoOthers() {
    var model = model()
    _ = model.apply(.write(first: 0, count: 1, tag: 1, readable: 1))
    _ = model.apply(.register(all, .minor))
    _ = model.apply(.touch(mapping: 0, page: 0, .read))
    #expect(model.apply(.unregister(all)).resumed == [])
    #expect(model.apply(.wake(all)).resumed == [.value(1)])
    _ = model.apply(.register(all, .missing))
    _ = model.apply(.touch(mapping: 0, page: 3, .read))
    #expect(model.apply(.unregister(all)).resumed == [.value(0)])
  }

  @Test func aRegistrationThatDropsWPLeavesHugePagesThatCannotBeWrittenBefore7_3() {
    var model = model(.linux6_18, .hugetlb)
    _ = model.apply(.register(all, [.missing, .writeProtect]))
    _ = model.apply(.copy(Span(0, 0), tag: 5, writeProtected: true))
    #expect(model.apply(.register(all, .minor)).outcome == .done(0x18c))
    #expect(model.apply(.touch(mapping: 0, page: 0, .read)).outcome == .value(5))
    #expect(model.apply(.touch(mapping: 0, page: 0, .write(6))).outcome == .neverEnds)
    var refusing = self.model(.linux7_3, .hugetlb)
    _ = refusing.apply(.register(all, [.missing, .writeProtect]))
    #expect(refusing.apply(.register(all, .minor)).outcome == .failed(.EBUSY))
  }

  @Test func registrationMasksAreTheKernels() {
    let masks: [(ModelMemory, ModelModes, UInt64)] = [
      (.anonymous, .missing, 0x13c), (.anonymous, .writeProtect, 0x17c),
      (.tmpfsShared, .minor, 0x1bc), (.tmpfsPrivate, [.missing, .minor, .writeProtect], 0x1fc),
      (.hugetlb, .missing, 0x10c), (.hugetlb, .minor, 0x18c), (.guestMemfd, .minor, 0x1bc),
    ]
    for (memory, modes, mask) in masks {
      var model = model(.faultline, memory)
      #expect(model.apply(.register(all, modes)).outcome == .done(mask))
    }
  }
}
