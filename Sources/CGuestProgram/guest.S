// SPDX-License-Identifier: Apache-2.0
//
// The test guest's program. Position independent, no data, no globals.
//
// A routine follows the SysV ABI: it gets the start of guest memory in %rdi and its
// struct cguest_workload in %rsi, does one batch, and returns 1 in %eax when there is
// more to do, else 0. It uses only the call-clobbered registers and no stack, so that
// a fault handler may leave it anywhere.
//
// Throughout: %r8 the page's number, then its address; %r9 the content's mask; %r10
// the content's state; %rax, %rcx, %rdx, %r11 scratch.

#include "include/cguest_layout.h"

// 2^64 / golden ratio, and the multipliers of splitmix64.
#define GOLDEN $0x9e3779b97f4a7c15
#define MIX1 $0xbf58476d1ce4e5b9
#define MIX2 $0x94d049bb133111eb

        .section .text
        .balign 4096
        .globl cguest_program_start
cguest_program_start:

// MARK: Building blocks

// Takes the next position of the batch into \reg. To \out when the batch or the
// workload is over.
.macro TAKE_POSITION reg, out
        movq W_POSITION(%rsi), \reg
        cmpq W_LIMIT(%rsi), \reg
        jae \out
        subq $1, W_REMAINING(%rsi)
        jc \out
        incq W_POSITION(%rsi)
.endm

// From the position in %rax to the page's number in %r8. Clobbers rax, rcx, rdx.
.macro CHOOSE_PAGE
        cmpq $CGUEST_ORDER_PERMUTATION, W_ORDER(%rsi)
        jb 3f
        je 2f
        // Zipf with exponent 1, without a table: a random power of two 2^k up to the
        // count, then a random rank in 2^k-1 ... 2^(k+1)-2.
        XORSHIFT_MEMORY
        movl %edx, %eax
        shrq $32, %rdx
        bsrq W_COUNT(%rsi), %rcx
        incq %rcx
        imulq %rdx, %rcx
        shrq $32, %rcx
        movl $1, %edx
        shlq %cl, %rdx
        decq %rdx
        andq %rdx, %rax
        addq %rdx, %rax
        cmpq W_COUNT(%rsi), %rax
        jb 2f
        shrq $1, %rax
2:      // A permutation of 0...mask from invertible steps, repeated until the value
        // lies below the count (cycle walking): every page once.
        movq W_SHIFT(%rsi), %rcx
        addq W_SEED(%rsi), %rax
        andq W_MASK(%rsi), %rax
        movq %rax, %r8
        shrq %cl, %r8
        xorq %r8, %rax
        movabsq MIX1, %rdx
        imulq %rdx, %rax
        andq W_MASK(%rsi), %rax
        movq %rax, %r8
        shrq %cl, %r8
        xorq %r8, %rax
        movabsq MIX2, %rdx
        imulq %rdx, %rax
        andq W_MASK(%rsi), %rax
        movq %rax, %r8
        shrq %cl, %r8
        xorq %r8, %rax
        cmpq W_COUNT(%rsi), %rax
        jae 2b
3:      movq W_FIRST(%rsi), %r8
        addq %rax, %r8
.endm

// The next random number of the workload in %rdx. Clobbers rcx.
.macro XORSHIFT_MEMORY
        movq W_RANDOM(%rsi), %rdx
        XORSHIFT %rdx
        movq %rdx, W_RANDOM(%rsi)
.endm

// xorshift64 on \reg. Clobbers rcx.
.macro XORSHIFT reg
        movq \reg, %rcx
        shlq $13, %rcx
        xorq %rcx, \reg
        movq \reg, %rcx
        shrq $7, %rcx
        xorq %rcx, \reg
        movq \reg, %rcx
        shlq $17, %rcx
        xorq %rcx, \reg
.endm

// splitmix64 of seed and page number %r8 in %rax. Clobbers rcx, rdx.
.macro HASH_PAGE
        movabsq GOLDEN, %rdx
        movq %r8, %rax
        imulq %rdx, %rax
        addq W_SEED(%rsi), %rax
        movq %rax, %rcx
        shrq $30, %rcx
        xorq %rcx, %rax
        movabsq MIX1, %rdx
        imulq %rdx, %rax
        movq %rax, %rcx
        shrq $27, %rcx
        xorq %rcx, %rax
        movabsq MIX2, %rdx
        imulq %rdx, %rax
        movq %rax, %rcx
        shrq $31, %rcx
        xorq %rcx, %rax
.endm

// From the hash in %rax to the content: state in %r10, mask in %r9. Of eight pages one
// is zero, one is one of 16 contents that many pages share, two have only one byte in
// eight set, four are random. Clobbers rax, rcx, rdx.
.macro CHOOSE_CONTENT
        movq %rax, %r10
        orq $1, %r10
        movq $-1, %r9
        movl %eax, %ecx
        andl $7, %ecx
        cmpl $4, %ecx
        jae 9f
        cmpl $1, %ecx
        ja 7f
        je 8f
        xorl %r9d, %r9d
        jmp 9f
7:      movl $0xff, %r9d
        jmp 9f
8:      shrq $3, %rax
        andl $15, %eax
        incl %eax
        movabsq GOLDEN, %r10
        imulq %rax, %r10
9:
.endm

// The page's next 8 bytes in \reg. Clobbers rcx.
.macro NEXT_WORD reg
        XORSHIFT %r10
        movq %r10, \reg
        andq %r9, \reg
.endm

// From the page's number to its address, both %r8.
.macro PAGE_ADDRESS
        shlq $12, %r8
        addq %rdi, %r8
.endm

// Begins a batch.
.macro BEGIN_BATCH
        movq W_BATCH(%rsi), %rax
        movq %rax, W_REMAINING(%rsi)
.endm

// Returns whether positions are left.
.macro RETURN_MORE
        xorl %eax, %eax
        movq W_POSITION(%rsi), %rcx
        cmpq W_LIMIT(%rsi), %rcx
        setb %al
        ret
.endm

// MARK: fill: gives every page of the share its content

fill:
        BEGIN_BATCH
10:     TAKE_POSITION %rax, 12f
        CHOOSE_PAGE
        HASH_PAGE
        CHOOSE_CONTENT
        PAGE_ADDRESS
        leaq 4096(%r8), %rdx
11:     NEXT_WORD %rax
        movq %rax, (%r8)
        addq $8, %r8
        cmpq %rdx, %r8
        jb 11b
        incq W_VISITED(%rsi)
        jmp 10b
12:     RETURN_MORE

// MARK: verify: compares every page with what it should hold

verify:
        BEGIN_BATCH
20:     TAKE_POSITION %rax, 29f
        CHOOSE_PAGE
        HASH_PAGE
        // %r11: the stamp that a dirty workload left in the first 8 bytes, or 0.
        xorl %r11d, %r11d
        movq %r8, %rdx
        subq W_DIRTY_FIRST(%rsi), %rdx
        cmpq W_DIRTY_COUNT(%rsi), %rdx
        jae 21f
        movq W_GENERATION(%rsi), %rcx
        cmpq W_SPLIT(%rsi), %rdx
        cmc
        sbbq $0, %rcx
        jz 21f
        movabsq GOLDEN, %r11
        imulq %rcx, %r11
        addq %rax, %r11
        orq $1, %r11
21:     CHOOSE_CONTENT
        PAGE_ADDRESS
        leaq 4096(%r8), %rdx
        NEXT_WORD %rax
        testq %r11, %r11
        cmovnzq %r11, %rax
        cmpq %rax, (%r8)
        jne 24f
22:     addq $8, %r8
        cmpq %rdx, %r8
        jae 25f
        NEXT_WORD %rax
        cmpq %rax, (%r8)
        je 22b
24:     incq W_WRONG(%rsi)
        subq %rdi, %r8
        shrq $12, %r8
        cmpq W_FIRST_WRONG(%rsi), %r8
        jae 25f
        movq %r8, W_FIRST_WRONG(%rsi)
25:     incq W_VISITED(%rsi)
        jmp 20b
29:     RETURN_MORE

// MARK: touch: reads 8 bytes of a page or writes them back, and may time it

touch:
        BEGIN_BATCH
30:     TAKE_POSITION %rax, 39f
        CHOOSE_PAGE
        PAGE_ADDRESS
        cmpq $0, W_SAMPLES(%rsi)
        je 32f
        lfence
        rdtsc
        lfence
        shlq $32, %rdx
        leaq (%rdx,%rax), %r9
32:     cmpq $0, W_WRITE(%rsi)
        jne 33f
        movq (%r8), %rax
        jmp 34f
33:     lock addq $0, (%r8)
34:     movq W_SAMPLES(%rsi), %r10
        testq %r10, %r10
        jz 36f
        lfence
        rdtsc
        shlq $32, %rdx
        orq %rdx, %rax
        subq %r9, %rax
        movl $-1, %ecx
        cmpq %rcx, %rax
        cmovaq %rcx, %rax
        movq W_VISITED(%rsi), %rcx
        movl %eax, (%r10,%rcx,4)
36:     incq W_VISITED(%rsi)
        jmp 30b
39:     RETURN_MORE

// MARK: dirty: stamps the pages of the share in order, generation after generation

dirty:
        BEGIN_BATCH
40:     movq W_POSITION(%rsi), %r8
        cmpq W_COUNT(%rsi), %r8
        jb 42f
        movq W_GENERATION(%rsi), %rax
        cmpq W_LIMIT(%rsi), %rax
        jae 43f
        incq W_GENERATION(%rsi)
        movq $0, W_POSITION(%rsi)
        jmp 40b
42:     subq $1, W_REMAINING(%rsi)
        jc 44f
        addq W_FIRST(%rsi), %r8
        HASH_PAGE
        movabsq GOLDEN, %rdx
        imulq W_GENERATION(%rsi), %rdx
        addq %rdx, %rax
        orq $1, %rax
        PAGE_ADDRESS
        movq %rax, (%r8)
        incq W_POSITION(%rsi)
        incq W_VISITED(%rsi)
        jmp 40b
43:     xorl %eax, %eax
        ret
44:     movl $1, %eax
        ret

// MARK: counter: counts in guest memory

counter:
        BEGIN_BATCH
        movq W_TARGET(%rsi), %r8
        addq %rdi, %r8
50:     TAKE_POSITION %rax, 51f
        incq (%r8)
        jmp 50b
51:     movq (%r8), %rax
        movq %rax, W_VALUE(%rsi)
        RETURN_MORE

// MARK: The KVM guest

// On entry: %r15 the vCPU's mailbox, %rsp its end. The guest runs at privilege level 3
// with IOPL 3 and identity-mapped memory, and needs nothing else.
        .globl cguest_program_entry
cguest_program_entry:
        cld
60:     leaq CGUEST_MAILBOX_WORKLOAD(%r15), %rdi
        movl $(CGUEST_WORKLOAD_SIZE / 4), %ecx
        movl $CGUEST_PORT_WORKLOAD, %edx
        rep insl
        cmpq $CGUEST_COMMAND_IDLE, CGUEST_MAILBOX_WORKLOAD + W_COMMAND(%r15)
        je 60b
61:     xorl %edi, %edi
        leaq CGUEST_MAILBOX_WORKLOAD(%r15), %rsi
        call run
        testl %eax, %eax
        jz 62f
        movl $CGUEST_PORT_CONTINUE, %edx
        inl %dx, %eax
        testl %eax, %eax
        jnz 61b
62:     leaq CGUEST_MAILBOX_WORKLOAD(%r15), %rsi
        movq W_FIRST(%rsi), %rbx
        movq W_COUNT(%rsi), %rcx
        movq W_POSITION(%rsi), %rbp
        movq W_GENERATION(%rsi), %r8
        movq W_VISITED(%rsi), %r9
        movq W_WRONG(%rsi), %r10
        movq W_FIRST_WRONG(%rsi), %r11
        movq W_VALUE(%rsi), %r12
        movl W_COMMAND(%rsi), %eax
        movl $CGUEST_PORT_RESULTS, %edx
        outl %eax, %dx
        jmp 60b

// MARK: Dispatch

// Runs the routine that the workload's command names.
        .globl cguest_run_routine
cguest_run_routine:
run:
        movl W_COMMAND(%rsi), %eax
        cmpl $CGUEST_COMMAND_FILL, %eax
        je fill
        cmpl $CGUEST_COMMAND_VERIFY, %eax
        je verify
        cmpl $CGUEST_COMMAND_TOUCH, %eax
        je touch
        cmpl $CGUEST_COMMAND_DIRTY, %eax
        je dirty
        cmpl $CGUEST_COMMAND_COUNTER, %eax
        je counter
        xorl %eax, %eax
        ret

        .globl cguest_program_end
cguest_program_end:

        .section .note.GNU-stack, "", @progbits
