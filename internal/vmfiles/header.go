package vmfiles

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"mortise/internal/keysafe"
	"mortise/internal/xts"
)

const (
	blockSize   = 4096          // of a header
	dataOffset  = 2 * blockSize // where unit 0 is
	macOffset   = 64
	headerMagic = "mortise-file-v1\n"
	cipherField = "XTS-AES-256\x00\x00\x00\x00\x00"
)

type state uint32

const (
	settled     state = 1
	provisional state = 2
)

type header struct {
	state    state
	sequence uint64
	length   int64
}

// encode makes the block of h.
func (h header) encode(mac *keysafe.MAC) []byte {
	b := make([]byte, blockSize)
	copy(b, headerMagic)
	copy(b[16:], cipherField)
	binary.LittleEndian.PutUint32(b[32:], xts.UnitSize)
	binary.LittleEndian.PutUint32(b[36:], uint32(h.state))
	binary.LittleEndian.PutUint64(b[40:], h.sequence)
	binary.LittleEndian.PutUint64(b[48:], uint64(h.length))
	sum := mac.Sum(keysafe.Line{Name: "header", Value: string(b[:macOffset])})
	copy(b[macOffset:], sum[:])
	return b
}

// decodeHeader reads a block; ErrNotEncrypted when there is no header in it at
// all, another error when there is a wrong one.
func decodeHeader(b []byte, mac *keysafe.MAC) (h header, err error) {
	if len(b) != blockSize || string(b[:len(headerMagic)]) != headerMagic {
		return h, ErrNotEncrypted
	}
	if !mac.Verify(b[macOffset:macOffset+keysafe.MACSize], keysafe.Line{Name: "header", Value: string(b[:macOffset])}) {
		return h, fmt.Errorf("its header does not match the VM's key for it")
	}
	h = header{
		state:    state(binary.LittleEndian.Uint32(b[36:])),
		sequence: binary.LittleEndian.Uint64(b[40:]),
		length:   int64(binary.LittleEndian.Uint64(b[48:])),
	}
	if h.state != settled && h.state != provisional || h.sequence == 0 || h.length < 0 || h.length > MaxLength || !bytes.Equal(b, h.encode(mac)) {
		return h, fmt.Errorf("its header has fields that are unknown here: a newer Mortise wrote it")
	}
	return h, nil
}

// physical is how long a file with length bytes of content is.
func physical(length int64) int64 {
	return dataOffset + (length+xts.UnitSize-1)/xts.UnitSize*xts.UnitSize
}

// readHeader returns the header that counts and the block it is in.
func readHeader(f *os.File, mac *keysafe.MAC) (best header, block int, err error) {
	var why error
	foreign := 0
	for i := range 2 {
		b := make([]byte, blockSize)
		if _, err := f.ReadAt(b, int64(i)*blockSize); err != nil && err != io.EOF {
			return best, 0, fmt.Errorf("reading the header of %s: %w", f.Name(), err)
		}
		h, err := decodeHeader(b, mac)
		switch {
		case errors.Is(err, ErrNotEncrypted):
			foreign++
		case err != nil:
			why = err
		case h.sequence > best.sequence:
			best, block = h, i
		}
	}
	if best.sequence == 0 && foreign == 2 {
		return best, 0, fmt.Errorf("%s: %w", f.Name(), ErrNotEncrypted)
	}
	if best.sequence == 0 {
		return best, 0, &keysafe.TamperedError{What: f.Name(), Why: why.Error()}
	}
	st, err := f.Stat()
	if err != nil {
		return best, 0, err
	}
	if want := physical(best.length); best.state == settled && st.Size() < want {
		return best, 0, &keysafe.TamperedError{What: f.Name(), Why: fmt.Sprintf("it has %d bytes of %d: it was cut", st.Size(), want)}
	}
	return best, block, nil
}
