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
	impls := []implementation{generic}
	if cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ && cpu.X86.HasSSE41 {
		impls = append(impls, aesni)
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

// cryptAsm runs the kernel of impl over len(src)/SectorSize > 0 sectors.
func cryptAsm(impl implementation, keys, dst, src []byte, unit tweak, offset int, decrypt bool) {
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
	default:
		panic("xts: no assembly for " + impl.String())
	}
}
