package xts

import (
	"golang.org/x/sys/cpu"

	"mortise/internal/secret"
)

// scheduleSize is the room for the round keys of the assembly, whatever the
// implementation: 15 of 16 bytes at 0 for encrypting data, at 256 for
// decrypting data, at 512 for encrypting tweaks.
const scheduleSize = 3 * 256

// available lists what this CPU can run, the fastest last.
func available() []implementation {
	x := &cpu.X86
	impls := []implementation{generic}
	if !x.HasAES || !x.HasPCLMULQDQ || !x.HasAVX {
		return impls
	}
	impls = append(impls, aesni)
	if x.HasAVX2 {
		// The cpu package tells of these two only on CPUs with AVX-512.
		const vaes, vpclmulqdq = 1 << 9, 1 << 10
		if cpuid7()&(vaes|vpclmulqdq) == vaes|vpclmulqdq {
			impls = append(impls, avx2)
		}
	}
	if x.HasAVX512F && x.HasAVX512VL && x.HasAVX512BW && x.HasAVX512VAES && x.HasAVX512VPCLMULQDQ {
		impls = append(impls, avx512)
	}
	return impls
}

// expandAsm makes the key schedules straight from the key into locked memory.
func (c *Cipher) expandAsm(key []byte) (err error) {
	if c.keys, err = secret.Take(make([]byte, scheduleSize)); err != nil {
		return err
	}
	c.keys.Use(func(keys []byte) { expandAESNI(&key[0], &keys[0]) })
	return nil
}

// maxRun bounds the time of one call of a kernel, which the Go scheduler cannot
// interrupt, to about 200 microseconds. It is a multiple of UnitSize.
const maxRun = 1 << 20

// cryptAsm runs the kernel of impl over len(src)/SectorSize > 0 sectors.
func cryptAsm(impl implementation, keys, dst, src []byte, unit tweak, offset int, decrypt bool) {
	for len(src) > maxRun-offset {
		n := maxRun - offset // to the end of a unit
		runKernel(impl, keys, dst[:n], src[:n], unit, offset, decrypt)
		dst, src, offset = dst[n:], src[n:], 0
		unit = unit.add(maxRun / UnitSize)
	}
	runKernel(impl, keys, dst, src, unit, offset, decrypt)
}

// runKernel calls the kernel that impl has for the direction. Every kernel takes
// the expanded keys, output, input, the number of sectors (at least 1), the two
// halves of the first unit's number, and how many sectors of that unit come
// before the first (0 to 7). It wraps into the next unit by itself.
func runKernel(impl implementation, keys, dst, src []byte, unit tweak, offset int, decrypt bool) {
	var (
		k, d, s = &keys[0], &dst[0], &src[0]
		n       = uint64(len(src) / SectorSize)
		skip    = uint64(offset / SectorSize)
	)
	switch {
	case impl == aesni && !decrypt:
		encryptAESNI(k, d, s, n, unit.lo, unit.hi, skip)
	case impl == aesni:
		decryptAESNI(k, d, s, n, unit.lo, unit.hi, skip)
	case impl == avx2 && !decrypt:
		encryptAVX2(k, d, s, n, unit.lo, unit.hi, skip)
	case impl == avx2:
		decryptAVX2(k, d, s, n, unit.lo, unit.hi, skip)
	case impl == avx512 && !decrypt:
		encryptAVX512(k, d, s, n, unit.lo, unit.hi, skip)
	case impl == avx512:
		decryptAVX512(k, d, s, n, unit.lo, unit.hi, skip)
	default:
		panic("xts: no assembly for " + impl.String())
	}
}
