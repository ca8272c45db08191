// SPDX-License-Identifier: Apache-2.0
//
// Numbers shared by the guest's assembly, C and Swift. Only macros: the assembler
// reads this file too.
#ifndef FAULTLINE_CGUEST_LAYOUT_H
#define FAULTLINE_CGUEST_LAYOUT_H

// struct cguest_workload, in bytes.
#define W_COMMAND 0
#define W_SEED 8
#define W_FIRST 16
#define W_COUNT 24
#define W_POSITION 32
#define W_LIMIT 40
#define W_MASK 48
#define W_SHIFT 56
#define W_ORDER 64
#define W_BATCH 72
#define W_GENERATION 80
#define W_DIRTY_FIRST 88
#define W_DIRTY_COUNT 96
#define W_SPLIT 104
#define W_SAMPLES 112
#define W_WRITE 120
#define W_TARGET 128
#define W_VISITED 136
#define W_WRONG 144
#define W_FIRST_WRONG 152
#define W_VALUE 160
#define W_RANDOM 168
#define W_REMAINING 176
#define CGUEST_WORKLOAD_SIZE 192

#define CGUEST_COMMAND_IDLE 0
#define CGUEST_COMMAND_FILL 1
#define CGUEST_COMMAND_VERIFY 2
#define CGUEST_COMMAND_TOUCH 3
#define CGUEST_COMMAND_DIRTY 4
#define CGUEST_COMMAND_COUNTER 5

#define CGUEST_ORDER_SEQUENTIAL 0
#define CGUEST_ORDER_PERMUTATION 1
#define CGUEST_ORDER_ZIPF 2

// Ports of the KVM guest.
// in: the next workload, CGUEST_WORKLOAD_SIZE bytes in one string input.
#define CGUEST_PORT_WORKLOAD 0x10
// in: after each batch; 0 stops the workload.
#define CGUEST_PORT_CONTINUE 0x14
// out: a workload has ended; its results are in the registers.
#define CGUEST_PORT_RESULTS 0x18

// Guest-physical addresses of the system area. The guest runs identity-mapped.
#define CGUEST_PML4 0x1000
#define CGUEST_PDPT 0x2000
#define CGUEST_SAMPLE_PD 0x3000
#define CGUEST_RAM_PD 0x4000
#define CGUEST_PROGRAM 0x50000
#define CGUEST_MAILBOX 0x60000
#define CGUEST_MAILBOX_SIZE 0x1000
// In a mailbox: the counter, the workload; the stack grows down from the end.
#define CGUEST_MAILBOX_COUNTER 0
#define CGUEST_MAILBOX_WORKLOAD 64
// The first workload page.
#define CGUEST_SYSTEM_AREA 0x100000
// The samples' memory slot: above all RAM, at most 1 GiB.
#define CGUEST_SAMPLE_BASE 0x1000000000

#endif
