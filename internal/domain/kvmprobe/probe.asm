# The guest of the KVM probe, in place of the firmware: the first bytes of a ROM
# of 64 KiB, to which the reset vector jumps (kvm.go adds that). It goes from real
# mode through protected mode into long mode with paging, does
# there what every operating system does (writes memory, asks CPUID, runs a loop
# of 2^26 steps) and leaves through QEMU's debug-exit port with the value 21.
# A processor does this in a fraction of a second; a "KVM" that interprets
# ordinary guests step by step does not finish.
#
# Assemble:  as -o probe.o probe.asm && ld -m elf_x86_64 -Ttext=0 -e 0 --oformat binary -o probe.bin probe.o

	.set	rom, 0xffff0000		# where the ROM's first byte is seen

	.code16
	.text
	.org	0
start:
	cli
	lgdtl	%cs:gdtr
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$8, $rom + protected

	.balign	8
gdt:	.quad	0
	.quad	0x00cf9b000000ffff	# 8: 32-bit code
	.quad	0x00cf93000000ffff	# 16: data
	.quad	0x00af9b000000ffff	# 24: 64-bit code
gdtr:	.word	. - gdt - 1
	.long	rom + gdt

# entries writes a page directory of 512 entries at %edi; there is no stack.
	.macro	entries
	movl	$512, %ecx
1:	movl	%eax, (%edi)
	addl	$0x200000, %eax
	addl	$8, %edi
	loop	1b
	.endm

	.code32
protected:
	movw	$16, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	# Page tables at 64 KiB: one PML4, one PDPT, and the first and the fourth GiB
	# mapped as they are in pages of 2 MiB.
	cld
	movl	$0x10000, %edi
	xorl	%eax, %eax
	movl	$0x1000, %ecx		# four pages
	rep stosl
	movl	$0x11003, 0x10000
	movl	$0x12003, 0x11000
	movl	$0x13003, 0x11018
	movl	$0x12000, %edi
	movl	$0x83, %eax
	entries
	movl	$0xc0000083, %eax
	entries
	movl	%cr4, %eax
	orl	$0x20, %eax		# PAE
	movl	%eax, %cr4
	movl	$0x10000, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	# EFER
	rdmsr
	orl	$0x100, %eax		# LME
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000000, %eax	# PG
	movl	%eax, %cr0
	ljmpl	$24, $rom + long

	.code64
long:
	movl	$0x100000, %edi		# a MiB of memory
	movl	$0x20000, %ecx
	movabsq	$0x0123456789abcdef, %rax
	rep stosq
	cmpq	%rax, 0x1ffff8
	jne	halt
	xorl	%eax, %eax
	cpuid
	movl	$0x4000000, %ecx
1:	decl	%ecx
	jnz	1b
	movb	$10, %al		# QEMU ends with 2*10+1
	outb	%al, $0xf4
halt:	hlt
	jmp	halt
