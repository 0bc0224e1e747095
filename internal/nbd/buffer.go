package nbd

import (
	"math/bits"
	"sync"
	"unsafe"
)

// Buffers come in powers of two from one page to maxPayload, each on a page
// boundary so that a device may use O_DIRECT.
const (
	bufferAlign  = 4096
	minBufferLog = 12
	maxBufferLog = 25
)

type buffer struct {
	b     []byte
	class int
}

// buffers is the pool that the connections of a server share. The collector
// empties what stays unused.
type buffers [maxBufferLog - minBufferLog + 1]sync.Pool

// get returns a buffer with at least n bytes, at most maxPayload. Its content
// is left from an earlier request.
func (p *buffers) get(n int) *buffer {
	class := max(bits.Len(uint(n-1)), minBufferLog) - minBufferLog
	if b, ok := p[class].Get().(*buffer); ok {
		return b
	}
	size := 1 << (class + minBufferLog)
	raw := make([]byte, size+bufferAlign)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(raw)))) & (bufferAlign - 1)
	return &buffer{b: raw[skip : skip+size : skip+size], class: class}
}

func (p *buffers) put(b *buffer) { p[b.class].Put(b) }
