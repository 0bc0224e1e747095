package audit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// An encoded entry is
//
//	version   1 byte, 1
//	sequence  uvarint
//	time      uvarint, microseconds since 1970
//	revision  uvarint
//	strings   in the order of fields(), each a uvarint length and its bytes
//
// and nothing after it. There is one encoding of an entry: Decode refuses any
// other.
const entryVersion = 1

// maxField is the longest string of an entry, in bytes: an identifier that a
// client made up can be longer, and is cut.
const maxField = 256

// maxEntry bounds an encoded entry.
const maxEntry = 1 + 3*binary.MaxVarintLen64 + fieldCount*(2+maxField)

const fieldCount = 13

func (e *Entry) fields() [fieldCount]*string {
	return [...]*string{&e.Member, &e.Instance, &e.Actor, &e.Client, &e.Fingerprint, &e.Role, &e.From,
		&e.Operation, &e.Object, &e.Made, &e.Result, &e.Detail, &e.Act}
}

// Append encodes the entry after b.
func (e *Entry) Append(b []byte) []byte {
	size := 1 + 3*binary.MaxVarintLen64
	for _, f := range e.fields() {
		size += 2 + min(len(*f), maxField)
	}
	b = append(slices.Grow(b, size), entryVersion)
	b = binary.AppendUvarint(b, e.Sequence)
	b = binary.AppendUvarint(b, uint64(max(0, e.Time.UnixMicro())))
	b = binary.AppendUvarint(b, uint64(max(0, e.Revision)))
	for _, f := range e.fields() {
		s := clean(*f)
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	return b
}

// clean returns s as an entry can hold it.
func clean(s string) string {
	if len(s) <= maxField && utf8.ValidString(s) {
		return s
	}
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > maxField {
		s = strings.ToValidUTF8(s[:maxField], "") // not half a character
	}
	return s
}

// Decode reads what Append wrote.
func Decode(b []byte) (e Entry, err error) {
	if len(b) == 0 || len(b) > maxEntry {
		return e, fmt.Errorf("an entry has 1 to %d bytes, not %d", maxEntry, len(b))
	}
	if b[0] != entryVersion {
		return e, fmt.Errorf("it is an entry of version %d; this program reads %d", b[0], entryVersion)
	}
	rest := b[1:]
	text := string(b) // all strings are parts of this one
	number := func() uint64 {
		v, n := binary.Uvarint(rest)
		if n <= 0 {
			rest, err = nil, errors.New("a number of it is cut off")
			return 0
		}
		rest = rest[n:]
		return v
	}
	var micro, revision uint64
	e.Sequence, micro, revision = number(), number(), number()
	for _, f := range e.fields() {
		n := number()
		if err == nil && n > uint64(len(rest)) {
			err = errors.New("a string of it is cut off")
		}
		if err != nil {
			return e, err
		}
		at := len(b) - len(rest)
		*f, rest = text[at:at+int(n)], rest[n:]
	}
	if micro > 1<<62 || revision > 1<<62 || len(rest) > 0 {
		return e, errors.New("its numbers or its length make no sense")
	}
	e.Time, e.Revision = time.UnixMicro(int64(micro)).UTC(), int64(revision)
	if !bytes.Equal(e.Append(nil), b) {
		return e, errors.New("it is not encoded as this program encodes")
	}
	return e, nil
}
