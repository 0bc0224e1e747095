package xts

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
)

// A vector is one record of a response file of NIST's.
type vector struct {
	name        string
	decrypt     bool
	key, i      []byte
	plain, ciph []byte
}

// readVectors reads a .rsp file: sections [ENCRYPT] and [DECRYPT] of records
// that begin with COUNT.
func readVectors(t *testing.T, path string) (all []vector) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	decrypt := false
	for at, line := range strings.Split(string(text), "\n") {
		name, value, ok := strings.Cut(strings.TrimSpace(line), " = ")
		if !ok {
			decrypt = decrypt && name != "[ENCRYPT]" || name == "[DECRYPT]"
			continue
		}
		if name == "COUNT" {
			all = append(all, vector{name: fmt.Sprintf("COUNT=%s,decrypt=%v", value, decrypt), decrypt: decrypt})
			continue
		}
		v := &all[len(all)-1]
		if name == "DataUnitLen" {
			if n, err := strconv.Atoi(value); err != nil || n%128 != 0 {
				t.Fatalf("%s:%d: a data unit of %s bits", path, at+1, value)
			}
			continue
		}
		b, err := hex.DecodeString(value)
		if err != nil {
			t.Fatalf("%s:%d: %v", path, at+1, err)
		}
		switch name {
		case "Key":
			v.key = b
		case "i":
			v.i = b
		case "PT":
			v.plain = b
		case "CT":
			v.ciph = b
		default:
			t.Fatalf("%s:%d: unknown field %q", path, at+1, name)
		}
	}
	return all
}

// TestVectors runs published vectors through every implementation. A data unit
// shorter than a sector is the beginning of one: XTS encrypts a whole block
// whatever follows it.
func TestVectors(t *testing.T) {
	for path, n := range map[string]int{"testdata/XTSGenAES256.rsp": 200, "testdata/IEEE1619.rsp": 5} {
		vectors := readVectors(t, path)
		if len(vectors) != n {
			t.Fatalf("%s: %d vectors, want %d", path, len(vectors), n)
		}
		everywhere(t, func(t *testing.T, impl implementation) {
			for _, v := range vectors {
				c := makeCipher(t, v.key, impl)
				unit := tweak{binary.LittleEndian.Uint64(v.i), binary.LittleEndian.Uint64(v.i[8:])}
				for _, decrypt := range []bool{false, true} {
					in, want := v.plain, v.ciph
					if decrypt {
						in, want = want, in
					}
					buf := make([]byte, SectorSize)
					copy(buf, in)
					c.crypt(buf, buf, unit, 0, decrypt)
					if !bytes.Equal(buf[:len(want)], want) {
						t.Errorf("%s %s: decrypt=%v: got %x, want %x", path, v.name, decrypt, buf[:len(want)], want)
					}
				}
			}
		})
	}
}

// compare checks one run of sectors of impl against the generic implementation:
// both directions, in place and out of place, and nothing written beside dst.
func compare(t *testing.T, impl implementation, key, src []byte, unit tweak, offset int) {
	t.Helper()
	ref, c := makeCipher(t, key, generic), makeCipher(t, key, impl)
	for _, decrypt := range []bool{false, true} {
		want := make([]byte, len(src))
		ref.crypt(want, src, unit, offset, decrypt)

		const guard = 64
		got := bytes.Repeat([]byte{0xa5}, len(src)+2*guard)
		c.crypt(got[guard:guard+len(src)], src, unit, offset, decrypt)
		if !bytes.Equal(got[guard:guard+len(src)], want) {
			t.Fatalf("%s: %d bytes at unit %x offset %d, decrypt=%v: differs from generic", impl, len(src), unit, offset, decrypt)
		}
		for i := range guard {
			if got[i] != 0xa5 || got[len(got)-1-i] != 0xa5 {
				t.Fatalf("%s: wrote outside of dst", impl)
			}
		}

		in := bytes.Clone(src)
		c.crypt(in, in, unit, offset, decrypt)
		if !bytes.Equal(in, want) {
			t.Fatalf("%s: %d bytes at unit %x offset %d, decrypt=%v: in place differs", impl, len(src), unit, offset, decrypt)
		}
		c.crypt(in, in, unit, offset, !decrypt)
		if !bytes.Equal(in, src) {
			t.Fatalf("%s: the inverse of decrypt=%v does not give the input back", impl, decrypt)
		}
	}
}

// TestAgainstGeneric takes every run of up to three units at every offset, from
// memory of every alignment.
func TestAgainstGeneric(t *testing.T) {
	everywhere(t, func(t *testing.T, impl implementation) {
		r := rand.New(rand.NewPCG(1, 2))
		key := randomBytes(10, KeySize)
		for sectors := 1; sectors <= 24; sectors++ {
			for skip := range 8 {
				shift := r.IntN(64)
				src := randomBytes(r.Uint64(), sectors*SectorSize+shift)[shift:]
				compare(t, impl, key, src, tweak{lo: r.Uint64()}, skip*SectorSize)
			}
		}
		// A run that cryptAsm cuts, from within a unit and from its beginning.
		for _, offset := range []int{0, 5 * SectorSize} {
			compare(t, impl, key, randomBytes(12, 1<<20+UnitSize), tweak{lo: r.Uint64()}, offset)
		}
		// The number of a unit carries into its upper half.
		compare(t, impl, key, randomBytes(11, 3*UnitSize), tweak{lo: 1<<64 - 2, hi: 7}, 0)
	})
}

func FuzzAgainstGeneric(f *testing.F) {
	f.Add(uint64(1), uint64(0), uint64(0), uint8(0), uint8(8))
	f.Add(uint64(2), uint64(1)<<63, uint64(0), uint8(7), uint8(2))
	f.Add(uint64(3), ^uint64(0), uint64(5), uint8(3), uint8(70))
	f.Fuzz(func(t *testing.T, seed, lo, hi uint64, skip, sectors uint8) {
		if sectors == 0 {
			return
		}
		key, src := randomBytes(seed, KeySize), randomBytes(seed+1, int(sectors)*SectorSize)
		for _, impl := range available() {
			compare(t, impl, key, src, tweak{lo, hi}, int(skip%8)*SectorSize)
		}
	})
}

// TestGF checks the doubling against its definition, bit by bit.
func TestGF(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 1000 {
		in := tweak{r.Uint64(), r.Uint64()}
		bit := func(x tweak, i int) uint64 {
			if i < 0 {
				return 0
			}
			if i < 64 {
				return x.lo >> i & 1
			}
			return x.hi >> (i - 64) & 1
		}
		got := in.double()
		for i := range 128 {
			want := bit(in, i-1)
			if i == 0 || i == 1 || i == 2 || i == 7 {
				want ^= bit(in, 127)
			}
			if bit(got, i) != want {
				t.Fatalf("double of %x is %x: bit %d is wrong", in, got, i)
			}
		}
	}
}
