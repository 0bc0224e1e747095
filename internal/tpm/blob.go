package tpm

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// A blob is what Seal returns:
//
//	"mtpm" ‖ version 1 (1 byte) ‖ name of the SRK ‖ PCRs ‖ public ‖ private
//
// Name, public and private area (TPM2B_PUBLIC and TPM2B_PRIVATE without their
// sizes) come with a length of two bytes, big-endian. PCRs are a count (1 byte)
// and for each, in ascending order, its index (1 byte) and its SHA-256 value (32)
// when the blob was made. The TPM authenticates public and private areas; name
// and values serve the messages.
type blob struct {
	srk     []byte
	pcrs    []pcr
	public  []byte
	private []byte
}

const (
	blobMagic = "mtpm\x01"
	maxBlob   = 4096
)

func (b blob) bytes() []byte {
	out := []byte(blobMagic)
	out = appendField(out, b.srk)
	out = append(out, byte(len(b.pcrs)))
	for _, p := range b.pcrs {
		out = append(append(out, byte(p.index)), p.value[:]...)
	}
	return appendField(appendField(out, b.public), b.private)
}

func appendField(out, field []byte) []byte {
	return append(binary.BigEndian.AppendUint16(out, uint16(len(field))), field...)
}

// parse accepts exactly what bytes makes.
func parse(in []byte) (b blob, err error) {
	damaged := func(what string) (blob, error) { return blob{}, fmt.Errorf("%w: %s", ErrDamaged, what) }
	if len(in) > maxBlob {
		return damaged("too long")
	}
	rest, ok := bytes.CutPrefix(in, []byte(blobMagic))
	if !ok {
		return damaged("not a blob that this program knows")
	}
	field := func() (f []byte) {
		if !ok || len(rest) < 2 || len(rest)-2 < int(binary.BigEndian.Uint16(rest)) {
			ok = false
			return nil
		}
		n := int(binary.BigEndian.Uint16(rest))
		f, rest = rest[2:2+n], rest[2+n:]
		return f
	}
	b.srk = field()
	if !ok || len(rest) < 1 {
		return damaged("cut off")
	}
	count := int(rest[0])
	rest = rest[1:]
	for range count {
		if len(rest) < 1+len(pcr{}.value) {
			return damaged("cut off")
		}
		p := pcr{index: uint(rest[0])}
		rest = rest[1+copy(p.value[:], rest[1:]):]
		if p.index >= pcrCount || len(b.pcrs) > 0 && p.index <= b.pcrs[len(b.pcrs)-1].index {
			return damaged("its PCRs are out of order")
		}
		b.pcrs = append(b.pcrs, p)
	}
	b.public, b.private = field(), field()
	if !ok || len(rest) != 0 {
		return damaged("its lengths do not fit")
	}
	return b, nil
}
