package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// vex emits the kernel for sixteen vector registers of 16 bytes (AES, PCLMULQDQ
// and AVX) or of 32 bytes (VAES, VPCLMULQDQ and AVX2). Sixteen registers do not
// hold eight tweaks beside the blocks: half of the tweaks are on the stack.
func vex(name string, decrypt bool, size int) {
	lanes := size / 16
	r := start(direction(decrypt)+name, direction(decrypt)+"s "+map[int]string{1: "eight", 2: "sixteen"}[lanes]+" blocks at a time.")
	r.batchesPerSector = 512 / (batch * size)

	sized := func(v VecPhysical) Register { return v.AsX() }
	loadKey := VMOVDQU
	if size == 32 {
		sized = func(v VecPhysical) Register { return v.AsY() }
		loadKey = VBROADCASTI128
	}
	x := []Register{sized(X0), sized(X1), sized(X2), sized(X3), sized(X4), sized(X5), sized(X6), sized(X7)}
	key, t, first, poly := sized(X8), sized(X9), X10, sized(X11)
	held := []Register{sized(X12), sized(X13), sized(X14), sized(X15)}
	stack := AllocLocal((batch - len(held)) * size)
	spilled := func(i int) Mem { return stack.Offset((i - len(held)) * size) }
	tweak := func(i int) Op {
		if i < len(held) {
			return held[i]
		}
		return spilled(i)
	}
	VMOVDQU(reduction, poly)

	r.encryptTweak = func() { encryptTweak(r, first) }
	r.skipSector = func() { // 32 blocks are 4 bytes
		VPSRLDQ(Imm(12), first, X0)
		VPSLLDQ(Imm(4), first, first)
		VPCLMULQDQ(Imm(0), X11, X0, X0)
		VPXOR(X0, first, first)
	}
	r.spread = func() {
		if size == 32 {
			VINSERTI128(Imm(1), first, Y10, t)
		} else {
			VMOVDQA(first, t)
		}
		for i := range x {
			up, out, low := x[0], x[1], x[2]
			if i < len(held) {
				up = held[i]
			}
			if size == 32 {
				VPSLLVQ(shiftsUp.Offset(i*size), t, up)
				VPSRLVQ(shiftsDown.Offset(i*size), t, out)
			} else {
				VPSLLQ(Imm(uint64(i)), t, up)
				VPSRLQ(Imm(uint64(64-i)), t, out)
			}
			VPSLLDQ(Imm(8), out, low)
			VPCLMULQDQ(Imm(1), poly, out, out)
			VPXOR(low, up, up)
			VPXOR(out, up, up)
			if i >= len(held) {
				VMOVDQU(up, spilled(i))
			}
		}
	}
	r.processBatch = func() {
		round, last := VAESENC, VAESENCLAST
		if decrypt {
			round, last = VAESDEC, VAESDECLAST
		}
		keys := dataKeys(decrypt)
		loadKey(at(r.keys, keys, 0, 16), key)
		for i := range x {
			VPXOR(at(r.src, 0, i, size), key, x[i])
			VPXOR(tweak(i), x[i], x[i])
		}
		for n := 1; n < rounds; n++ {
			loadKey(at(r.keys, keys, n, 16), key)
			for i := range x {
				round(key, x[i], x[i])
			}
		}
		loadKey(at(r.keys, keys, rounds, 16), key)
		for i := range x {
			last(key, x[i], x[i])
		}
		for i := range x {
			now := t
			if i < len(held) {
				now = held[i]
			} else {
				VMOVDQU(spilled(i), now)
			}
			VPXOR(now, x[i], x[i])
			VMOVDQU(x[i], at(r.dst, 0, i, size))
			VPSRLDQ(Imm(uint64(16-lanes)), now, x[i])
			VPSLLDQ(Imm(uint64(lanes)), now, now)
			VPCLMULQDQ(Imm(0), poly, x[i], x[i])
			VPXOR(x[i], now, now)
			if i >= len(held) {
				VMOVDQU(now, spilled(i))
			}
		}
	}
	r.clean = func() {
		VPXOR(x[0], x[0], x[0])
		for i := len(held); i < batch; i++ {
			VMOVDQU(x[0], spilled(i))
		}
		VZEROALL()
	}
	r.generate()
}

// encryptTweak encrypts the number of the unit into x.
func encryptTweak(r *run, x Register) {
	VMOVQ(r.lo, x)
	VPINSRQ(Imm(1), r.hi, x, x)
	VPXOR(at(r.keys, tweakKeys, 0, 16), x, x)
	for i := 1; i < rounds; i++ {
		VAESENC(at(r.keys, tweakKeys, i, 16), x, x)
	}
	VAESENCLAST(at(r.keys, tweakKeys, rounds, 16), x, x)
}
