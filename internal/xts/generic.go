package xts

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"math/bits"
	"reflect"
	"unsafe"

	"mortise/internal/secret"
)

// The generic implementation drives crypto/aes one block at a time. Where
// crypto/aes knows no AES instructions it uses look-up tables, whose timing
// tells something of the key to whoever shares the CPU's caches. On amd64 that
// is a host without AES-NI; [Implementation] lets its owner see it.
//
// crypto/aes makes its key schedule on the Go heap. expandGeneric moves it from
// there into locked memory and clears the heap's copy, so that it lives outside
// only while New runs, and Wipe means what it says.

// expandGeneric makes c.dataKey and c.tweakKey of the 64 bytes of key.
func (c *Cipher) expandGeneric(key []byte) error {
	data, err := aes.NewCipher(key[:KeySize/2])
	if err != nil {
		return err
	}
	tweak, err := aes.NewCipher(key[KeySize/2:])
	if err != nil {
		return err
	}
	typ := reflect.TypeOf(data).Elem()
	if typ.Kind() != reflect.Struct || hasPointers(typ) {
		return errors.New("xts: crypto/aes of this platform keeps its keys where they cannot be locked into memory")
	}
	// A stride that keeps the second schedule as well aligned as the first.
	stride := (int(typ.Size()) + 63) &^ 63
	zeros := make([]byte, 2*stride)
	if c.keys, err = secret.Take(zeros); err != nil {
		return err
	}
	c.keys.Use(func(locked []byte) {
		c.dataKey = move(data, typ, locked[:stride])
		c.tweakKey = move(tweak, typ, locked[stride:])
	})
	return nil
}

// move copies the key schedule that b points to into to, clears it, and returns
// the same cipher on the copy. typ is b's type and has no pointers, so the copy
// needs nothing of the garbage collector.
func move(b cipher.Block, typ reflect.Type, to []byte) cipher.Block {
	from := unsafe.Slice((*byte)(reflect.ValueOf(b).UnsafePointer()), typ.Size())
	copy(to, from)
	clear(from)
	return reflect.NewAt(typ, unsafe.Pointer(&to[0])).Interface().(cipher.Block)
}

// hasPointers reports whether a value of type t may refer to other memory. It
// knows the kinds that a key schedule is made of and suspects every other.
func hasPointers(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Struct:
		for i := range t.NumField() {
			if hasPointers(t.Field(i).Type) {
				return true
			}
		}
		return false
	case reflect.Array:
		return hasPointers(t.Elem())
	}
	return t.Kind() < reflect.Bool || t.Kind() > reflect.Float64 || t.Kind() == reflect.Uintptr
}

// cryptGeneric processes the units that the run touches one after another.
func (c *Cipher) cryptGeneric(dst, src []byte, unit tweak, offset int, decrypt bool) {
	for len(src) > 0 {
		n := min(UnitSize-offset, len(src))
		c.cryptUnit(dst[:n], src[:n], unit, offset, decrypt)
		dst, src, unit, offset = dst[n:], src[n:], unit.add(1), 0
	}
}

// cryptUnit processes a run of blocks inside one unit: IEEE 1619 clauses 5.3
// and 5.4 without ciphertext stealing, which whole blocks never need.
func (c *Cipher) cryptUnit(dst, src []byte, unit tweak, offset int, decrypt bool) {
	le := binary.LittleEndian

	// The tweak is encrypted in dst, the only memory at hand that may escape
	// into an interface call without an allocation. src may be the same.
	first0, first1 := le.Uint64(src), le.Uint64(src[8:])
	le.PutUint64(dst, unit.lo)
	le.PutUint64(dst[8:], unit.hi)
	c.tweakKey.Encrypt(dst[:aes.BlockSize], dst[:aes.BlockSize])
	t := tweak{le.Uint64(dst), le.Uint64(dst[8:])}
	for range offset / aes.BlockSize {
		t = t.double()
	}

	for i := 0; i < len(src); i += aes.BlockSize {
		x0, x1 := first0, first1
		if i > 0 {
			x0, x1 = le.Uint64(src[i:]), le.Uint64(src[i+8:])
		}
		block := dst[i : i+aes.BlockSize]
		le.PutUint64(block, x0^t.lo)
		le.PutUint64(block[8:], x1^t.hi)
		if decrypt {
			c.dataKey.Decrypt(block, block)
		} else {
			c.dataKey.Encrypt(block, block)
		}
		le.PutUint64(block, le.Uint64(block)^t.lo)
		le.PutUint64(block[8:], le.Uint64(block[8:])^t.hi)
		t = t.double()
	}
}

// add is the number n after t.
func (t tweak) add(n uint64) tweak {
	lo, carry := bits.Add64(t.lo, n, 0)
	return tweak{lo, t.hi + carry}
}

// double multiplies t by x in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1. It does
// not branch on secret bits.
func (t tweak) double() tweak {
	out := -(t.hi >> 63)
	return tweak{t.lo<<1 ^ out&0x87, t.hi<<1 | t.lo>>63}
}
