package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
)

// The first batch of a unit takes all its tweaks from the unit's first one: block
// i's is that times x^i. shiftsUp says by how many bits each half moves up, i, for
// i below 32. shiftsDown has 64-i, which leaves the bits that the other shift
// loses. reduction is x^7 + x^2 + x + 1, by which they return, for each lane.
var shiftsUp, shiftsDown, reduction Mem

func tables() {
	shiftsUp = pairs("shiftsUp", 32, func(i int) (lo, hi int) { return i, i })
	shiftsDown = pairs("shiftsDown", 32, func(i int) (lo, hi int) { return 64 - i, 64 - i })
	reduction = pairs("reduction", 4, func(int) (lo, hi int) { return 0x87, 0 })
}

// pairs emits a table of n entries of 16 bytes.
func pairs(name string, n int, entry func(i int) (lo, hi int)) Mem {
	table := GLOBL(name, RODATA|NOPTR)
	for i := range n {
		lo, hi := entry(i)
		DATA(16*i, U64(lo))
		DATA(16*i+8, U64(hi))
	}
	return table
}
