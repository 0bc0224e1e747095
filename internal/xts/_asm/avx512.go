package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// avx512 emits the kernel for VAES and VPCLMULQDQ on 64-byte registers, four
// blocks each. All round keys and tweaks are in registers.
func avx512(decrypt bool) {
	r := start(direction(decrypt)+"AVX512", direction(decrypt)+"s thirty-two blocks at a time.")
	r.batchesPerSector = 1
	x := []Register{Z0, Z1, Z2, Z3, Z4, Z5, Z6, Z7}
	tweak := []Register{Z8, Z9, Z10, Z11, Z12, Z13, Z14, Z15}
	key := []Register{Z16, Z17, Z18, Z19, Z20, Z21, Z22, Z23, Z24, Z25, Z26, Z27, Z28, Z29, Z30}
	first, firstX := Z31, X31

	for i := range key {
		VBROADCASTI32X4(at(r.keys, dataKeys(decrypt), i, 16), key[i])
	}

	r.encryptTweak = func() {
		encryptTweak(r, X0)
		VMOVDQA64(X0, firstX)
	}
	r.skipSector = func() {
		VPSRLDQ(Imm(12), firstX, X0)
		VPSLLDQ(Imm(4), firstX, firstX)
		VPCLMULQDQ(Imm(0), reduction, X0, X0)
		VPXORQ(X0, firstX, firstX)
	}
	r.spread = func() {
		all := Z7
		VSHUFI64X2(Imm(0), first, first, all)
		for i := range x {
			up, out, low := tweak[i], Z0, Z1
			VPSLLVQ(shiftsUp.Offset(i*64), all, up)
			VPSRLVQ(shiftsDown.Offset(i*64), all, out)
			VPSLLDQ(Imm(8), out, low)
			VPCLMULQDQ(Imm(1), reduction, out, out)
			VPTERNLOGQ(Imm(0x96), low, out, up) // up ^= low ^ out
		}
	}
	r.processBatch = func() {
		round, last := VAESENC, VAESENCLAST
		if decrypt {
			round, last = VAESDEC, VAESDECLAST
		}
		for i := range x {
			VMOVDQA64(tweak[i], x[i])
			VPTERNLOGQ(Imm(0x96), at(r.src, 0, i, 64), key[0], x[i])
		}
		for n := 1; n < rounds; n++ {
			for i := range x {
				round(key[n], x[i], x[i])
			}
		}
		for i := range x {
			last(key[rounds], x[i], x[i])
		}
		for i := range x {
			VPXORQ(tweak[i], x[i], x[i])
			VMOVDQU64(x[i], at(r.dst, 0, i, 64))
			VPSRLDQ(Imm(12), tweak[i], x[i])
			VPSLLDQ(Imm(4), tweak[i], tweak[i])
			VPCLMULQDQ(Imm(0), reduction, x[i], x[i])
			VPXORQ(x[i], tweak[i], tweak[i])
		}
	}
	r.clean = func() {
		VZEROALL()
		for _, x := range []Register{X16, X17, X18, X19, X20, X21, X22, X23, X24, X25, X26, X27, X28, X29, X30, X31} {
			VPXORQ(x, x, x)
		}
	}
	r.generate()
}
