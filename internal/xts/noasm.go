//go:build !amd64

package xts

func available() []implementation { return []implementation{generic} }

func (c *Cipher) expandAsm([]byte) error { panic("xts: no assembly for this platform") }

func cryptAsm(implementation, []byte, []byte, []byte, tweak, int, bool) {
	panic("xts: no assembly for this platform")
}
