package xts

import (
	"fmt"
	"testing"
)

func benchmark(b *testing.B, f func(c *Cipher, buf []byte)) {
	for _, impl := range available() {
		c := makeCipher(b, randomBytes(1, KeySize), impl)
		for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
			buf := make([]byte, size)
			b.Run(fmt.Sprintf("%s/%dK", impl, size>>10), func(b *testing.B) {
				b.SetBytes(int64(size))
				for b.Loop() {
					f(c, buf)
				}
			})
		}
	}
}

func BenchmarkEncryptUnits(b *testing.B) {
	benchmark(b, func(c *Cipher, buf []byte) { c.Encrypt(buf, buf, 1) })
}

func BenchmarkDecryptUnits(b *testing.B) {
	benchmark(b, func(c *Cipher, buf []byte) { c.Decrypt(buf, buf, 1) })
}
