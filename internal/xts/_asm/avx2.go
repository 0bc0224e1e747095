package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// avx2 emits the kernel for VAES and VPCLMULQDQ on 32-byte registers, two blocks
// each. Half of the tweaks of a batch are in registers, the rest on the stack.
func avx2(decrypt bool) {
	r := start(direction(decrypt)+"AVX2", direction(decrypt)+"s sixteen blocks at a time.")
	r.batchesPerSector = 2
	x := []Register{Y0, Y1, Y2, Y3, Y4, Y5, Y6, Y7}
	key, t, poly := Y8, Y9, Y11
	first, firstX, polyX := Y10, X10, X11
	held := []Register{Y12, Y13, Y14, Y15}
	stack := AllocLocal((batch - len(held)) * 32)
	tweak := func(i int) Op {
		if i < len(held) {
			return held[i]
		}
		return stack.Offset((i - len(held)) * 32)
	}

	VMOVDQU(reduction, poly)

	r.encryptTweak = func() { encryptTweakVEX(r, firstX) }
	r.skipSector = func() {
		VPSRLDQ(Imm(12), firstX, X0)
		VPSLLDQ(Imm(4), firstX, firstX)
		VPCLMULQDQ(Imm(0), polyX, X0, X0)
		VPXOR(X0, firstX, firstX)
	}
	r.spread = func() {
		VINSERTI128(Imm(1), firstX, first, t)
		for i := range x {
			up, out, low := Y0, Y1, Y2
			if i < len(held) {
				up = held[i].(VecPhysical)
			}
			VPSLLVQ(shiftsUp.Offset(i*32), t, up)
			VPSRLVQ(shiftsDown.Offset(i*32), t, out)
			VPSLLDQ(Imm(8), out, low)
			VPCLMULQDQ(Imm(1), poly, out, out)
			VPXOR(low, up, up)
			VPXOR(out, up, up)
			if i >= len(held) {
				VMOVDQU(up, tweak(i))
			}
		}
	}
	r.processBatch = func() {
		round, last := VAESENC, VAESENCLAST
		if decrypt {
			round, last = VAESDEC, VAESDECLAST
		}
		keys := dataKeys(decrypt)
		VBROADCASTI128(at(r.keys, keys, 0, 16), key)
		for i := range x {
			VPXOR(at(r.src, 0, i, 32), key, x[i])
			VPXOR(tweak(i), x[i], x[i])
		}
		for n := 1; n < rounds; n++ {
			VBROADCASTI128(at(r.keys, keys, n, 16), key)
			for i := range x {
				round(key, x[i], x[i])
			}
		}
		VBROADCASTI128(at(r.keys, keys, rounds, 16), key)
		for i := range x {
			last(key, x[i], x[i])
		}
		for i := range x {
			VPXOR(tweak(i), x[i], x[i])
			VMOVDQU(x[i], at(r.dst, 0, i, 32))
			now := t
			if i < len(held) {
				now = held[i].(VecPhysical)
			} else {
				VMOVDQU(tweak(i), now)
			}
			VPSRLDQ(Imm(14), now, x[i])
			VPSLLDQ(Imm(2), now, now)
			VPCLMULQDQ(Imm(0), poly, x[i], x[i])
			VPXOR(x[i], now, now)
			if i >= len(held) {
				VMOVDQU(now, tweak(i))
			}
		}
	}
	r.clean = func() {
		VPXOR(Y0, Y0, Y0)
		for i := len(held); i < batch; i++ {
			VMOVDQU(Y0, tweak(i))
		}
		VZEROALL()
	}
	r.generate()
}

// encryptTweakVEX encrypts the number of the unit into x.
func encryptTweakVEX(r *run, x Register) {
	VMOVQ(r.lo, x)
	VPINSRQ(Imm(1), r.hi, x, x)
	VPXOR(at(r.keys, tweakKeys, 0, 16), x, x)
	for i := 1; i < rounds; i++ {
		VAESENC(at(r.keys, tweakKeys, i, 16), x, x)
	}
	VAESENCLAST(at(r.keys, tweakKeys, rounds, 16), x, x)
}
