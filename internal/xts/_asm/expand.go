package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	. "github.com/mmcloughlin/avo/reg"
)

// expandKeys emits the AES-256 key expansion (FIPS 197, section 5.2) of both
// halves, and the round keys of the equivalent inverse cipher (section 5.3.5)
// of the first. The AES instructions take the same time whatever the key.
func expandKeys() {
	TEXT("expandAESNI", NOSPLIT, "func(key, keys *byte)")
	Doc("expandAESNI writes the schedules of the 64-byte key to keys, which has",
		"scheduleSize bytes and is aligned to 16.")
	Pragma("noescape")
	key, keys := Load(Param("key"), GP64()), Load(Param("keys"), GP64())

	expand(key, 0, keys, encryptKeys)
	Comment("The inverse cipher takes the round keys backwards, the inner ones through InvMixColumns.")
	for i := range rounds + 1 {
		MOVOU(at(keys, encryptKeys, rounds-i, 16), X0)
		if i > 0 && i < rounds {
			AESIMC(X0, X0)
		}
		MOVOU(X0, at(keys, decryptKeys, i, 16))
	}
	expand(key, 32, keys, tweakKeys)
	for _, x := range []Register{X0, X1, X2, X3} {
		PXOR(x, x)
	}
	RET()
}

// expand writes the 15 round keys of the 32 bytes at key + from to keys + to.
func expand(key Register, from int, keys Register, to int) {
	even, odd, t, sum := X0, X1, X2, X3
	MOVOU(at(key, from, 0, 16), even)
	MOVOU(at(key, from, 1, 16), odd)
	MOVOU(even, at(keys, to, 0, 16))
	MOVOU(odd, at(keys, to, 1, 16))
	rcon := uint8(1)
	for i := 2; i <= rounds; i++ {
		// w is the round key two back, prev the last one. The wanted word of
		// AESKEYGENASSIST is the rotated one with the round constant for even
		// round keys, the plain substituted one for odd ones.
		w, prev, word := even, odd, Imm(0xff)
		if i%2 == 0 {
			AESKEYGENASSIST(Imm(uint64(rcon)), prev, t)
			rcon <<= 1
		} else {
			w, prev, word = odd, even, Imm(0xaa)
			AESKEYGENASSIST(Imm(0), prev, t)
		}
		PSHUFD(word, t, t)
		Comment("Each word of the new round key is the sum of all words up to its place.")
		MOVO(w, sum)
		for range 3 {
			PSLLDQ(Imm(4), sum)
			PXOR(sum, w)
		}
		PXOR(t, w)
		MOVOU(w, at(keys, to, i, 16))
	}
}
