// SPDX-License-Identifier: Apache-2.0

import Userfault

/// For each thing missing: why, and how to get it.
enum DoctorAdvice {
  static func all(
    supported: UserfaultFeatures?, systemCall: String?, device: String?,
    kvm: DoctorReport.Machine, memory: [DoctorReport.Memory],
    hugePages: [DoctorReport.HugePages]
  ) -> [DoctorReport.Advice] {
    var advice: [DoctorReport.Advice] = []
    if supported == nil {
      advice.append(
        .init(
          missing: "userfaultfd", why: systemCall ?? device ?? "it cannot be created",
          how: "Run as root, or: sysctl vm.unprivileged_userfaultfd=1, or give your group access: "
            + "chgrp kvm /dev/userfaultfd; chmod g+rw /dev/userfaultfd (Linux 6.1)."))
    }
    for (feature, effect) in expected where supported?.contains(feature) == false {
      advice.append(
        .init(
          missing: "userfaultfd feature \(feature)", why: "this kernel is too old for it",
          how: effect))
    }
    if !kvm.available {
      advice.append(
        .init(
          missing: "KVM", why: "/dev/kvm: \(kvm.error ?? "unusable")",
          how: "Load kvm_intel or kvm_amd, or give your group access (usermod -aG kvm USER); in a "
            + "virtual machine its host must allow nesting. Without it the process guest runs."))
    }
    if kvm.available, kvm.isPVM {
      advice.append(
        .init(
          missing: "kicking a vCPU out of a fault",
          why: "on KVM_PVM a vCPU that waits in a userfault does not return for a signal",
          how: "Nothing to do: Faultline resolves or releases its faults before it stops a guest."))
    }
    for pool in hugePages where pool.pageSize == "2 MiB" && pool.free == 0 {
      advice.append(
        .init(
          missing: "free 2 MiB pages", why: "the pool has \(pool.total) pages, none is free",
          how: "echo N > /proc/sys/vm/nr_hugepages (each takes 2 MiB from other uses)."))
    }
    if let guestMemfd = memory.first(where: { $0.kind == "guest_memfd" }) {
      advice += self.guestMemfd(guestMemfd)
    }
    return advice
  }

  /// Features that make a difference, and what it is.
  private static let expected: [(UserfaultFeatures, String)] = [
    (.minorShmem, "Minor faults on memfd need Linux 5.14; use --faults missing."),
    (.minorHugetlbfs, "Minor faults on hugetlbfs need Linux 5.13; use --faults missing."),
    (
      .poison,
      "Linux 6.6 has it. Without it a guest that touches a damaged page waits instead of being told."
    ),
    (.writeProtectAsync, "Linux 6.7 has it; it makes tracking of dirty pages cheap."),
    (.move, "Linux 6.8 has it; nothing here depends on it."),
    (.readWriteProtect, "Linux 7.3 has it; nothing here depends on it yet."),
  ]

  private static func guestMemfd(_ memory: DoctorReport.Memory) -> [DoctorReport.Advice] {
    if let reason = memory.unavailable {
      return [
        .init(
          missing: "guest_memfd that can be mapped", why: reason,
          how: "It needs KVM and Linux 6.18 (GUEST_MEMFD_FLAG_MMAP and INIT_SHARED).")
      ]
    }
    let populates = memory.modes.contains { $0.modes.contains("MISSING") && $0.operations != nil }
    guard !populates else { return [] }
    return [
      .init(
        missing: "userfaultfd on guest_memfd",
        why: "the kernel refuses to register it for MISSING or MINOR",
        how: "No released kernel has it (Linux 7.3 included); kernel/ has patches that add it. Use "
          + "anonymous, memfd or hugetlb memory for a guest that is to be restored lazily.")
    ]
  }
}
