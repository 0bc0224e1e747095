package vdisk

import (
	"math/bits"
	"sync/atomic"
)

// An index says which link of a chain has a unit: one look-up, however long the
// chain is. It has two levels: a leaf for each region in which a snapshot link has
// a unit, with a byte for each unit; without a leaf all units are the base's. A
// byte is the number of a link, zero the base.
//
// Methods may be called concurrently.
type index struct {
	leaves []atomic.Pointer[leaf]
}

const (
	leafUnits   = regionUnits
	unitsInWord = 8
	everyByte   = 0x0101010101010101
)

type leaf [leafUnits / unitsInWord]atomic.Uint64

// maxLinks is the longest chain: a link's number has a byte.
const maxLinks = 255

func newIndex(size int64) *index {
	units := roundUp(size, UnitSize) / UnitSize
	return &index{leaves: make([]atomic.Pointer[leaf], roundUp(units, leafUnits)/leafUnits)}
}

// run returns the link that has unit u, and the end, at most max, of the units
// behind u that it has too.
func (x *index) run(u, max int64) (slot uint8, end int64) {
	if l := x.leaves[u/leafUnits].Load(); l != nil {
		slot = uint8(l[u%leafUnits/unitsInWord].Load() >> (u % unitsInWord * 8))
	}
	for end = u + 1; end < max; {
		l := x.leaves[end/leafUnits].Load()
		if l == nil {
			if slot != 0 {
				return slot, end
			}
			end = roundDown(end, leafUnits) + leafUnits
			continue
		}
		// The bytes that differ are not zero in diff; those before end are shifted out.
		in := end % unitsInWord
		diff := (l[end%leafUnits/unitsInWord].Load() ^ uint64(slot)*everyByte) >> (in * 8)
		if diff != 0 {
			end += int64(bits.TrailingZeros64(diff)) / 8
			return slot, min(end, max)
		}
		end += unitsInWord - in
	}
	return slot, min(end, max)
}

// set notes that a link has the units [from, to).
func (x *index) set(from, to int64, slot uint8) {
	for from < to {
		p := &x.leaves[from/leafUnits]
		l := p.Load()
		for l == nil {
			p.CompareAndSwap(nil, new(leaf))
			l = p.Load()
		}
		a := from % unitsInWord
		n := min(unitsInWord-a, to-from)
		mask := ^uint64(0) >> (64 - 8*n) << (8 * a)
		w := &l[from%leafUnits/unitsInWord]
		for {
			old := w.Load()
			if w.CompareAndSwap(old, old&^mask|uint64(slot)*everyByte&mask) {
				break
			}
		}
		from += n
	}
}

// move notes that one link has those units of [from, to) that another had.
func (x *index) move(from, to int64, old, now uint8) {
	for from < to {
		slot, end := x.run(from, to)
		if slot == old {
			x.swap(from, end, old, now)
		}
		from = end
	}
}

// swap changes the bytes that are old, unit by unit: a write may be claiming one of
// them for the top just now.
func (x *index) swap(from, to int64, old, now uint8) {
	for ; from < to; from++ {
		w := &x.leaves[from/leafUnits].Load()[from%leafUnits/unitsInWord]
		shift := from % unitsInWord * 8
		for {
			v := w.Load()
			if uint8(v>>shift) != old || w.CompareAndSwap(v, v&^(0xff<<shift)|uint64(now)<<shift) {
				break
			}
		}
	}
}
