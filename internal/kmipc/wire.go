package kmipc

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// Limits of a response. An answer that we ask for has a few hundred bytes.
const (
	maxMessage = 1 << 20 // bytes
	maxDepth   = 32      // structures in structures
	headerLen  = 8       // tag (3), type (1), length (4): KMIP 1.4 §9.1.1
)

// readMessage reads one response of at most limit bytes. The caller clears the buffer, in which a key
// may be.
func readMessage(r io.Reader, limit int) ([]byte, error) {
	var header [headerLen]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(header[4:])
	switch {
	case tagOf(header[:]) != kmip.TagResponseMessage || ttlv.Type(header[3]) != ttlv.TypeStructure:
		return nil, malformed("it begins with % x, not with a response message", header[:4])
	case int64(length) > int64(limit-headerLen):
		return nil, malformed("it announces %d bytes, more than %d", length, limit)
	}
	msg := make([]byte, headerLen+int(length))
	copy(msg, header[:])
	if _, err := io.ReadFull(r, msg[headerLen:]); err != nil {
		clear(msg)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return msg, nil
}

// decode checks a message and decodes it. The check makes the decoder safe; it
// recovers all the same, since the decoder is not ours.
func decode(msg []byte) (resp *kmip.ResponseMessage, err error) {
	if rest, err := check(msg, 0); err != nil {
		return nil, err
	} else if len(rest) != 0 {
		return nil, malformed("%d bytes after its end", len(rest))
	}
	defer func() {
		if r := recover(); r != nil {
			resp, err = nil, malformed("the decoder gave up on it")
		}
	}()
	resp = &kmip.ResponseMessage{}
	if err := ttlv.UnmarshalTTLV(msg, resp); err != nil {
		return nil, &protocolError{"it does not decode: " + err.Error()}
	}
	return resp, nil
}

// check walks one TTLV item at the start of b and returns what follows it:
// types are known, lengths are those of their types and stay inside what
// encloses them (KMIP 1.4 §9.1.1.3, .4).
func check(b []byte, depth int) (rest []byte, err error) {
	if depth > maxDepth {
		return nil, malformed("structures nested deeper than %d", maxDepth)
	}
	if len(b) < headerLen {
		return nil, malformed("%d bytes where an item's header should be", len(b))
	}
	typ, length := ttlv.Type(b[3]), uint64(binary.BigEndian.Uint32(b[4:]))
	padded := (length + 7) &^ 7
	if padded > uint64(len(b)-headerLen) {
		return nil, malformed("an item of %d bytes, where %d are left", length, len(b)-headerLen)
	}
	ok := true
	switch typ {
	case ttlv.TypeStructure:
		ok = length%8 == 0
	case ttlv.TypeInteger, ttlv.TypeEnumeration, ttlv.TypeInterval:
		ok = length == 4
	case ttlv.TypeLongInteger, ttlv.TypeBoolean, ttlv.TypeDateTime:
		ok = length == 8
	case ttlv.TypeBigInteger:
		ok = length > 0 && length%8 == 0
	case ttlv.TypeTextString, ttlv.TypeByteString:
	default:
		return nil, malformed("an item of unknown type %#x", b[3])
	}
	if !ok {
		return nil, malformed("an item of type %#x with %d bytes", b[3], length)
	}
	value, rest := b[headerLen:headerLen+padded], b[headerLen+padded:]
	if typ == ttlv.TypeStructure {
		for len(value) > 0 {
			if value, err = check(value, depth+1); err != nil {
				return nil, err
			}
		}
	}
	return rest, nil
}

func tagOf(header []byte) int {
	return int(header[0])<<16 | int(header[1])<<8 | int(header[2])
}

// protocolError is the cause of an [Error] of kind ErrProtocol.
type protocolError struct{ text string }

func (e *protocolError) Error() string { return e.text }

func malformed(format string, args ...any) error {
	return &protocolError{fmt.Sprintf(format, args...)}
}
