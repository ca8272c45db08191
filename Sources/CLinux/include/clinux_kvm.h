// SPDX-License-Identifier: Apache-2.0
//
// KVM (Documentation/virt/kvm/api.rst). guest_memfd and the memory-fault exit are
// younger than Debian 12's headers and back-ported here.
#ifndef FAULTLINE_CLINUX_KVM_H
#define FAULTLINE_CLINUX_KVM_H

#include "clinux_system.h"
#include <linux/kvm.h>
#include <stdbool.h>
#include <sys/ioctl.h>

// Linux 6.8
#ifndef KVM_SET_USER_MEMORY_REGION2
#define KVM_MEM_GUEST_MEMFD (1UL << 2)
struct kvm_userspace_memory_region2 {
  __u32 slot;
  __u32 flags;
  __u64 guest_phys_addr;
  __u64 memory_size;
  __u64 userspace_addr;
  __u64 guest_memfd_offset;
  __u32 guest_memfd;
  __u32 pad1;
  __u64 pad2[14];
};
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#define KVM_CAP_USER_MEMORY2 231
#endif
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#define KVM_MEMORY_EXIT_FLAG_PRIVATE (1ULL << 3)
#define KVM_CAP_MEMORY_FAULT_INFO 232
#endif
#ifndef KVM_CREATE_GUEST_MEMFD
struct kvm_create_guest_memfd {
  __u64 size;
  __u64 flags;
  __u64 reserved[6];
};
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#define KVM_CAP_GUEST_MEMFD 234
#endif
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif
#ifndef KVM_X86_SW_PROTECTED_VM
#define KVM_X86_SW_PROTECTED_VM 1
#endif
// Linux 6.18
#ifndef GUEST_MEMFD_FLAG_MMAP
#define GUEST_MEMFD_FLAG_MMAP (1ULL << 0)
#endif
#ifndef GUEST_MEMFD_FLAG_INIT_SHARED
#define GUEST_MEMFD_FLAG_INIT_SHARED (1ULL << 1)
#endif
#ifndef KVM_CAP_GUEST_MEMFD_FLAGS
#define KVM_CAP_GUEST_MEMFD_FLAGS 244
#endif

/// The `memory_fault` member of `struct kvm_run`, which older headers lack.
struct clinux_kvm_memory_fault {
  __u64 flags;
  __u64 gpa;
  __u64 size;
};

_Static_assert(KVM_GET_API_VERSION == 0xae00, "KVM_GET_API_VERSION");
_Static_assert(KVM_CREATE_VM == 0xae01, "KVM_CREATE_VM");
_Static_assert(KVM_GET_MSR_INDEX_LIST == 0xc004ae02, "KVM_GET_MSR_INDEX_LIST");
_Static_assert(KVM_CHECK_EXTENSION == 0xae03, "KVM_CHECK_EXTENSION");
_Static_assert(KVM_GET_VCPU_MMAP_SIZE == 0xae04, "KVM_GET_VCPU_MMAP_SIZE");
_Static_assert(KVM_GET_SUPPORTED_CPUID == 0xc008ae05, "KVM_GET_SUPPORTED_CPUID");
_Static_assert(KVM_CREATE_VCPU == 0xae41, "KVM_CREATE_VCPU");
_Static_assert(KVM_GET_DIRTY_LOG == 0x4010ae42, "KVM_GET_DIRTY_LOG");
_Static_assert(KVM_SET_USER_MEMORY_REGION == 0x4020ae46, "KVM_SET_USER_MEMORY_REGION");
_Static_assert(KVM_SET_USER_MEMORY_REGION2 == 0x40a0ae49, "KVM_SET_USER_MEMORY_REGION2");
_Static_assert(KVM_CREATE_IRQCHIP == 0xae60, "KVM_CREATE_IRQCHIP");
_Static_assert(KVM_RUN == 0xae80, "KVM_RUN");
_Static_assert(KVM_GET_REGS == 0x8090ae81, "KVM_GET_REGS");
_Static_assert(KVM_SET_REGS == 0x4090ae82, "KVM_SET_REGS");
_Static_assert(KVM_GET_SREGS == 0x8138ae83, "KVM_GET_SREGS");
_Static_assert(KVM_SET_SREGS == 0x4138ae84, "KVM_SET_SREGS");
_Static_assert(KVM_GET_MSRS == 0xc008ae88, "KVM_GET_MSRS");
_Static_assert(KVM_SET_MSRS == 0x4008ae89, "KVM_SET_MSRS");
_Static_assert(KVM_GET_FPU == 0x81a0ae8c, "KVM_GET_FPU");
_Static_assert(KVM_SET_FPU == 0x41a0ae8d, "KVM_SET_FPU");
_Static_assert(KVM_GET_LAPIC == 0x8400ae8e, "KVM_GET_LAPIC");
_Static_assert(KVM_SET_LAPIC == 0x4400ae8f, "KVM_SET_LAPIC");
_Static_assert(KVM_SET_CPUID2 == 0x4008ae90, "KVM_SET_CPUID2");
_Static_assert(KVM_GET_CPUID2 == 0xc008ae91, "KVM_GET_CPUID2");
_Static_assert(KVM_GET_MP_STATE == 0x8004ae98, "KVM_GET_MP_STATE");
_Static_assert(KVM_SET_MP_STATE == 0x4004ae99, "KVM_SET_MP_STATE");
_Static_assert(KVM_GET_VCPU_EVENTS == 0x8040ae9f, "KVM_GET_VCPU_EVENTS");
_Static_assert(KVM_SET_VCPU_EVENTS == 0x4040aea0, "KVM_SET_VCPU_EVENTS");
_Static_assert(KVM_GET_DEBUGREGS == 0x8080aea1, "KVM_GET_DEBUGREGS");
_Static_assert(KVM_SET_DEBUGREGS == 0x4080aea2, "KVM_SET_DEBUGREGS");
_Static_assert(KVM_SET_TSC_KHZ == 0xaea2, "KVM_SET_TSC_KHZ");
_Static_assert(KVM_GET_TSC_KHZ == 0xaea3, "KVM_GET_TSC_KHZ");
_Static_assert(KVM_ENABLE_CAP == 0x4068aea3, "KVM_ENABLE_CAP");
_Static_assert(KVM_GET_XSAVE == 0x9000aea4, "KVM_GET_XSAVE");
_Static_assert(KVM_SET_XSAVE == 0x5000aea5, "KVM_SET_XSAVE");
_Static_assert(KVM_GET_XSAVE2 == 0x9000aecf, "KVM_GET_XSAVE2");
_Static_assert(KVM_GET_XCRS == 0x8188aea6, "KVM_GET_XCRS");
_Static_assert(KVM_SET_XCRS == 0x4188aea7, "KVM_SET_XCRS");
_Static_assert(KVM_CLEAR_DIRTY_LOG == 0xc018aec0, "KVM_CLEAR_DIRTY_LOG");
_Static_assert(KVM_RESET_DIRTY_RINGS == 0xaec7, "KVM_RESET_DIRTY_RINGS");
_Static_assert(KVM_CREATE_GUEST_MEMFD == 0xc040aed4, "KVM_CREATE_GUEST_MEMFD");

_Static_assert(sizeof(struct kvm_regs) == 144, "kvm_regs");
_Static_assert(sizeof(struct kvm_sregs) == 312, "kvm_sregs");
_Static_assert(sizeof(struct kvm_fpu) == 416, "kvm_fpu");
_Static_assert(offsetof(struct kvm_xsave, region) == 0, "kvm_xsave");
_Static_assert(sizeof(((struct kvm_xsave *)0)->region) == 4096, "kvm_xsave.region");
_Static_assert(sizeof(struct kvm_xcrs) == 392, "kvm_xcrs");
_Static_assert(sizeof(struct kvm_debugregs) == 128, "kvm_debugregs");
_Static_assert(sizeof(struct kvm_vcpu_events) == 64, "kvm_vcpu_events");
_Static_assert(sizeof(struct kvm_mp_state) == 4, "kvm_mp_state");
_Static_assert(sizeof(struct kvm_lapic_state) == 1024, "kvm_lapic_state");
_Static_assert(sizeof(struct kvm_msr_entry) == 16, "kvm_msr_entry");
_Static_assert(sizeof(struct kvm_cpuid_entry2) == 40, "kvm_cpuid_entry2");
_Static_assert(sizeof(struct kvm_userspace_memory_region) == 32, "kvm_userspace_memory_region");
_Static_assert(sizeof(struct kvm_userspace_memory_region2) == 160, "kvm_userspace_memory_region2");
_Static_assert(sizeof(struct kvm_create_guest_memfd) == 64, "kvm_create_guest_memfd");
_Static_assert(sizeof(struct kvm_dirty_log) == 16, "kvm_dirty_log");
_Static_assert(sizeof(struct kvm_clear_dirty_log) == 24, "kvm_clear_dirty_log");
_Static_assert(sizeof(struct kvm_dirty_gfn) == 16, "kvm_dirty_gfn");
_Static_assert(sizeof(struct kvm_enable_cap) == 104, "kvm_enable_cap");
_Static_assert(offsetof(struct kvm_run, immediate_exit) == 1, "kvm_run.immediate_exit");
_Static_assert(offsetof(struct kvm_run, exit_reason) == 8, "kvm_run.exit_reason");
_Static_assert(offsetof(struct kvm_run, hw) == 32, "kvm_run exit union");
_Static_assert(sizeof(struct clinux_kvm_memory_fault) == 24, "memory_fault");
_Static_assert(KVM_DIRTY_LOG_PAGE_OFFSET == 64, "KVM_DIRTY_LOG_PAGE_OFFSET");

#define CLINUX_KVM_CALL(name, request, type)                    \
  static inline long clinux_kvm_##name(int fd, type argument) { \
    return clinux_result(ioctl(fd, request, argument));         \
  }

CLINUX_KVM_CALL(api_version, KVM_GET_API_VERSION, int)
CLINUX_KVM_CALL(check_extension, KVM_CHECK_EXTENSION, long)
CLINUX_KVM_CALL(create_vm, KVM_CREATE_VM, unsigned long)
CLINUX_KVM_CALL(vcpu_mmap_size, KVM_GET_VCPU_MMAP_SIZE, int)
CLINUX_KVM_CALL(supported_cpuid, KVM_GET_SUPPORTED_CPUID, struct kvm_cpuid2 *)
CLINUX_KVM_CALL(msr_index_list, KVM_GET_MSR_INDEX_LIST, struct kvm_msr_list *)
CLINUX_KVM_CALL(create_vcpu, KVM_CREATE_VCPU, unsigned long)
CLINUX_KVM_CALL(create_irqchip, KVM_CREATE_IRQCHIP, int)
CLINUX_KVM_CALL(enable_cap, KVM_ENABLE_CAP, struct kvm_enable_cap *)
CLINUX_KVM_CALL(set_memory, KVM_SET_USER_MEMORY_REGION, struct kvm_userspace_memory_region *)
CLINUX_KVM_CALL(set_memory2, KVM_SET_USER_MEMORY_REGION2, struct kvm_userspace_memory_region2 *)
CLINUX_KVM_CALL(create_guest_memfd, KVM_CREATE_GUEST_MEMFD, struct kvm_create_guest_memfd *)
CLINUX_KVM_CALL(get_dirty_log, KVM_GET_DIRTY_LOG, struct kvm_dirty_log *)
CLINUX_KVM_CALL(clear_dirty_log, KVM_CLEAR_DIRTY_LOG, struct kvm_clear_dirty_log *)
CLINUX_KVM_CALL(reset_dirty_rings, KVM_RESET_DIRTY_RINGS, int)
CLINUX_KVM_CALL(run, KVM_RUN, int)
CLINUX_KVM_CALL(set_cpuid, KVM_SET_CPUID2, struct kvm_cpuid2 *)
CLINUX_KVM_CALL(get_cpuid, KVM_GET_CPUID2, struct kvm_cpuid2 *)
CLINUX_KVM_CALL(get_regs, KVM_GET_REGS, struct kvm_regs *)
CLINUX_KVM_CALL(set_regs, KVM_SET_REGS, struct kvm_regs *)
CLINUX_KVM_CALL(get_sregs, KVM_GET_SREGS, struct kvm_sregs *)
CLINUX_KVM_CALL(set_sregs, KVM_SET_SREGS, struct kvm_sregs *)
CLINUX_KVM_CALL(get_fpu, KVM_GET_FPU, struct kvm_fpu *)
CLINUX_KVM_CALL(set_fpu, KVM_SET_FPU, struct kvm_fpu *)
CLINUX_KVM_CALL(get_xsave, KVM_GET_XSAVE, struct kvm_xsave *)
CLINUX_KVM_CALL(get_xsave2, KVM_GET_XSAVE2, struct kvm_xsave *)
CLINUX_KVM_CALL(set_xsave, KVM_SET_XSAVE, struct kvm_xsave *)
CLINUX_KVM_CALL(get_xcrs, KVM_GET_XCRS, struct kvm_xcrs *)
CLINUX_KVM_CALL(set_xcrs, KVM_SET_XCRS, struct kvm_xcrs *)
CLINUX_KVM_CALL(get_debugregs, KVM_GET_DEBUGREGS, struct kvm_debugregs *)
CLINUX_KVM_CALL(set_debugregs, KVM_SET_DEBUGREGS, struct kvm_debugregs *)
CLINUX_KVM_CALL(get_vcpu_events, KVM_GET_VCPU_EVENTS, struct kvm_vcpu_events *)
CLINUX_KVM_CALL(set_vcpu_events, KVM_SET_VCPU_EVENTS, struct kvm_vcpu_events *)
CLINUX_KVM_CALL(get_mp_state, KVM_GET_MP_STATE, struct kvm_mp_state *)
CLINUX_KVM_CALL(set_mp_state, KVM_SET_MP_STATE, struct kvm_mp_state *)
CLINUX_KVM_CALL(get_lapic, KVM_GET_LAPIC, struct kvm_lapic_state *)
CLINUX_KVM_CALL(set_lapic, KVM_SET_LAPIC, struct kvm_lapic_state *)
CLINUX_KVM_CALL(get_msrs, KVM_GET_MSRS, struct kvm_msrs *)
CLINUX_KVM_CALL(set_msrs, KVM_SET_MSRS, struct kvm_msrs *)
CLINUX_KVM_CALL(get_tsc_khz, KVM_GET_TSC_KHZ, int)
CLINUX_KVM_CALL(set_tsc_khz, KVM_SET_TSC_KHZ, unsigned long)

// The exit union of `struct kvm_run` has bit-fields and members that older headers lack,
// which Swift cannot reach.
static inline struct clinux_kvm_memory_fault clinux_kvm_memory_fault(const struct kvm_run *run) {
  struct clinux_kvm_memory_fault fault;
  __builtin_memcpy(&fault, &run->hw, sizeof fault);
  return fault;
}

/// `immediate_exit` is written by other threads than the vCPU's.
static inline void clinux_kvm_set_immediate_exit(struct kvm_run *run, uint8_t value) {
  __atomic_store_n(&run->immediate_exit, value, __ATOMIC_SEQ_CST);
}
/// Whether the kernel published the entry and user space has not taken it yet.
static inline bool clinux_kvm_dirty_gfn_is_dirty(const struct kvm_dirty_gfn *entry) {
  uint32_t flags = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
  return (flags & KVM_DIRTY_GFN_F_MASK) == KVM_DIRTY_GFN_F_DIRTY;
}
static inline void clinux_kvm_dirty_gfn_reset(struct kvm_dirty_gfn *entry) {
  __atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
}

#endif
