package pkcs11

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The helper's protocol: on its standard input it gets requests, on its
// standard output it gives one answer to each, in order. Both are frames:
//
//	length (4 bytes, big-endian, of what follows) ‖ code (1) ‖ count of fields (1)
//	and for each field: length (2, big-endian) ‖ bytes
//
// A request's code is its operation, an answer's its status. The first request
// is hello, whose field is protocolVersion; the second login.
const protocolVersion = "mortise-pkcs11 1"

const (
	maxFrame  = 16 << 10
	maxFields = 255
)

// Operations, with the fields of request and answer.
const (
	opHello   = 1 // version → version, name of the token
	opLogin   = 2 // PIN →
	opCreate  = 3 // id →
	opImport  = 4 // id, key →
	opEncrypt = 5 // id, plaintext, additional → nonce ‖ ciphertext ‖ tag
	opDecrypt = 6 // id, nonce ‖ ciphertext ‖ tag, additional → plaintext
	opDestroy = 7 // id →
	opList    = 8 // → ids
)

// Statuses; but for the first, the field is a text.
const (
	statusOK      = 0
	statusUnknown = 1 // no key of that id
	statusBlob    = 2 // the token does not decrypt it
	statusPIN     = 3 // the token refuses to log in
	statusToken   = 4 // anything else that the token says
	statusRequest = 5 // the request makes no sense
	statusExists  = 6 // a key of that id is there
)

type message struct {
	code   byte
	fields [][]byte
}

var errMessage = errors.New("not a message of the PKCS#11 helper's protocol")

func (m message) encode() ([]byte, error) {
	size := 2
	for _, f := range m.fields {
		size += 2 + len(f)
		if len(f) > 0xffff {
			return nil, fmt.Errorf("%w: a field of %d bytes", errMessage, len(f))
		}
	}
	if size > maxFrame || len(m.fields) > maxFields {
		return nil, fmt.Errorf("%w: %d bytes in %d fields are too much", errMessage, size, len(m.fields))
	}
	b := make([]byte, 4, 4+size) // never grows: fields may be keys
	binary.BigEndian.PutUint32(b, uint32(size))
	b = append(b, m.code, byte(len(m.fields)))
	for _, f := range m.fields {
		b = binary.BigEndian.AppendUint16(b, uint16(len(f)))
		b = append(b, f...)
	}
	return b, nil
}

// decode takes a frame's content apart; the fields share its memory.
func decode(b []byte) (m message, err error) {
	if len(b) < 2 {
		return m, fmt.Errorf("%w: %d bytes", errMessage, len(b))
	}
	m.code = b[0]
	count, rest := int(b[1]), b[2:]
	for range count {
		if len(rest) < 2 || len(rest)-2 < int(binary.BigEndian.Uint16(rest)) {
			return message{}, fmt.Errorf("%w: cut off", errMessage)
		}
		n := int(binary.BigEndian.Uint16(rest))
		m.fields = append(m.fields, rest[2:2+n:2+n])
		rest = rest[2+n:]
	}
	if len(rest) > 0 {
		return message{}, fmt.Errorf("%w: %d bytes after its end", errMessage, len(rest))
	}
	return m, nil
}

// readMessage reads one frame; io.EOF means that there is none. wipe zeroes it.
func readMessage(r io.Reader) (m message, wipe func(), err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return m, nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrame {
		return m, nil, fmt.Errorf("%w: a frame of %d bytes, at most %d are read", errMessage, n, maxFrame)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		clear(b)
		return m, nil, fmt.Errorf("%w: cut off: %w", errMessage, io.ErrUnexpectedEOF)
	}
	if m, err = decode(b); err != nil {
		clear(b)
		return m, nil, err
	}
	return m, func() { clear(b) }, nil
}

func writeMessage(w io.Writer, m message) error {
	b, err := m.encode()
	if err != nil {
		return err
	}
	defer clear(b)
	_, err = w.Write(b)
	return err
}
