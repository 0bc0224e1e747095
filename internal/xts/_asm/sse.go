package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// sse emits the kernel for AES-NI, PCLMULQDQ and SSE4.1. The tweaks of a batch
// are on the stack: sixteen registers do not hold them beside the blocks.
func sse(decrypt bool) {
	r := start(direction(decrypt)+"AESNI", direction(decrypt)+"s eight blocks at a time.")
	r.batchesPerSector = 4
	x := []Register{X0, X1, X2, X3, X4, X5, X6, X7}
	key, t, first, poly := X8, X9, X10, X11
	stack := AllocLocal(batch * 16)
	tweak := func(i int) Mem { return stack.Offset(i * 16) }

	MOVOU(reduction, poly)

	r.encryptTweak = func() {
		MOVQ(r.lo, first)
		PINSRQ(Imm(1), r.hi, first)
		PXOR(at(r.keys, tweakKeys, 0, 16), first)
		for i := 1; i < rounds; i++ {
			AESENC(at(r.keys, tweakKeys, i, 16), first)
		}
		AESENCLAST(at(r.keys, tweakKeys, rounds, 16), first)
	}
	r.skipSector = func() { // 32 blocks are 4 bytes
		MOVO(first, t)
		PSLLDQ(Imm(4), first)
		PSRLDQ(Imm(12), t)
		PCLMULQDQ(Imm(0), poly, t)
		PXOR(t, first)
	}
	r.spread = func() {
		MOVOU(first, tweak(0))
		for i := 1; i < batch; i++ {
			Commentf("Tweak %d: the low %d bits that leave the upper half come back as their product with 0x87.", i, i)
			up, out, low := X0, X1, X2
			MOVO(first, up)
			MOVO(first, out)
			PSLLQ(Imm(uint64(i)), up)
			PSRLQ(Imm(uint64(64-i)), out)
			MOVO(out, low)
			PSLLDQ(Imm(8), low)
			PCLMULQDQ(Imm(1), poly, out)
			PXOR(low, up)
			PXOR(out, up)
			MOVOU(up, tweak(i))
		}
	}
	r.processBatch = func() {
		round, last := AESENC, AESENCLAST
		if decrypt {
			round, last = AESDEC, AESDECLAST
		}
		keys := dataKeys(decrypt)
		MOVOU(at(r.keys, keys, 0, 16), key)
		for i := range x {
			MOVOU(at(r.src, 0, i, 16), x[i])
			MOVOU(tweak(i), t)
			PXOR(key, x[i])
			PXOR(t, x[i])
		}
		for n := 1; n < rounds; n++ {
			MOVOU(at(r.keys, keys, n, 16), key)
			for i := range x {
				round(key, x[i])
			}
		}
		MOVOU(at(r.keys, keys, rounds, 16), key)
		for i := range x {
			last(key, x[i])
		}
		for i := range x {
			MOVOU(tweak(i), t)
			PXOR(t, x[i])
			MOVOU(x[i], at(r.dst, 0, i, 16))
			MOVO(t, x[i])
			PSLLDQ(Imm(1), t)
			PSRLDQ(Imm(15), x[i])
			PCLMULQDQ(Imm(0), poly, x[i])
			PXOR(x[i], t)
			MOVOU(t, tweak(i))
		}
	}
	r.clean = func() {
		clearSSE(11)
		for i := range x {
			MOVOU(X0, tweak(i))
		}
	}
	r.generate()
}

// clearSSE zeroes the first n vector registers.
func clearSSE(n int) {
	for _, x := range []Register{X0, X1, X2, X3, X4, X5, X6, X7, X8, X9, X10}[:n] {
		PXOR(x, x)
	}
}
