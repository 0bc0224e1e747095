package vimext

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A disk's content travels as records: the offset (uint64), the length (uint32),
// both big-endian, and that many bytes; a record of length 0 is the end. Offsets
// rise; what no record covers reads as zeros.

// MaxRecord is the most bytes of one record.
const MaxRecord = 1 << 20

const recordHeader = 12

// WriteRecord writes one record; data has 1 to MaxRecord bytes.
func WriteRecord(w io.Writer, offset int64, data []byte) error {
	if len(data) == 0 || len(data) > MaxRecord || offset < 0 {
		return fmt.Errorf("vimext: a record of %d bytes at %d; it has 1 to %d", len(data), offset, MaxRecord)
	}
	if err := writeHeader(w, offset, len(data)); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

// WriteEnd writes the record that ends a stream.
func WriteEnd(w io.Writer) error { return writeHeader(w, 0, 0) }

func writeHeader(w io.Writer, offset int64, length int) error {
	var h [recordHeader]byte
	binary.BigEndian.PutUint64(h[:8], uint64(offset))
	binary.BigEndian.PutUint32(h[8:], uint32(length))
	_, err := w.Write(h[:])
	return err
}

// Records reads a stream of records.
type Records struct {
	r   io.Reader
	at  int64 // where the last record ended
	buf []byte
}

// NewRecords reads from r.
func NewRecords(r io.Reader) *Records { return &Records{r: r} }

// What a stream can get wrong.
var (
	ErrTruncated = errors.New("the stream ends in the middle: its last record is missing")
	ErrRecord    = errors.New("the stream is damaged")
)

// Next returns the next record; its data is valid until the next call. After
// the last one it returns io.EOF. A stream that breaks off is ErrTruncated.
func (s *Records) Next() (offset int64, data []byte, err error) {
	var h [recordHeader]byte
	if _, err := io.ReadFull(s.r, h[:]); err != nil {
		return 0, nil, broken(err)
	}
	at, n := binary.BigEndian.Uint64(h[:8]), binary.BigEndian.Uint32(h[8:])
	switch {
	case n == 0:
		return 0, nil, io.EOF
	case n > MaxRecord:
		return 0, nil, fmt.Errorf("%w: a record of %d bytes, more than %d", ErrRecord, n, MaxRecord)
	case at > 1<<62 || int64(at) < s.at:
		return 0, nil, fmt.Errorf("%w: a record at %d after %d", ErrRecord, at, s.at)
	}
	if s.buf == nil {
		s.buf = make([]byte, MaxRecord)
	}
	if _, err := io.ReadFull(s.r, s.buf[:n]); err != nil {
		return 0, nil, broken(err)
	}
	s.at = int64(at) + int64(n)
	return int64(at), s.buf[:n], nil
}

func broken(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrTruncated
	}
	return err
}
