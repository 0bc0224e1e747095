package xts

func available() []implementation { return []implementation{generic} }

func (c *Cipher) expandAsm([]byte) error { panic("xts: no assembly for this platform") }

func cryptAsm(implementation, []byte, []byte, []byte, uint64, int, bool) {
	panic("xts: no assembly for this platform")
}
