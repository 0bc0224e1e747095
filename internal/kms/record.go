package kms

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// The record of an object, before it is sealed:
//
//	version   1 byte, recordVersion
//	length    uvarint, of the fields
//	fields    each: its number (uvarint), then its value; in ascending order of
//	          number, those that are zero left out
//	material  the rest, as it is
//
// A value is a signed varint (zigzag) for a number and for a date (seconds since
// 1970), or a length (uvarint) and as many bytes. A number that this program does
// not know was written by a newer one, and the record is refused: writing it back
// would drop the field. The material stays out of the fields so that no encoder
// keeps a copy of it.

// recordVersion is for changes that numbers of fields cannot express.
const recordVersion = 1

// fields names every field that is stored, once, for writing and for reading. A
// number is never given to another field. To add a field, add a line.
func (o *object) fields(f *fields) {
	number(f, 1, &o.Type)
	number(f, 2, &o.Subtype)
	number(f, 3, &o.Algorithm)
	number(f, 4, &o.Length)
	number(f, 5, &o.Usage)
	number(f, 6, &o.State)
	f.group(7, o.Reason != nil, func(f *fields) {
		if o.Reason == nil {
			o.Reason = &revocation{}
		}
		number(f, 1, &o.Reason.Code)
		f.text(2, &o.Reason.Message)
	})
	f.bytes(8, &o.Digest)
	f.date(9, &o.Initial)
	f.date(10, &o.Activation)
	f.date(11, &o.Deactivated)
	f.date(12, &o.Destroyed)
	f.date(13, &o.Compromised)
	f.date(14, &o.Occurred)
	f.date(15, &o.LastChange)
	f.date(16, &o.Original)
	f.date(17, &o.ProcessFrom)
	f.date(18, &o.ProtectTo)
	f.date(19, &o.Archived)
	number(f, 20, &o.Format)
	number(f, 21, &o.Flags)
	f.group(22, o.Limits != nil, func(f *fields) {
		if o.Limits == nil {
			o.Limits = &usageLimits{}
		}
		number(f, 1, &o.Limits.Total)
		number(f, 2, &o.Limits.Count)
		number(f, 3, &o.Limits.Unit)
	})
	f.bytes(23, &o.Wrapping)
	f.attributes(30, &o.Attributes)
}

// fields writes fields into b, or reads what b begins with.
type fields struct {
	b       []byte
	reading bool
	next    uint64 // when reading: the number of the field that comes next, 0 at the end
	err     error
}

var errFields = errors.New("a record's fields do not fit")

func (f *fields) fail(err error) {
	if f.err == nil {
		f.err = err
	}
	f.b, f.next = nil, 0
}

// begin writes a field's number if the field is there, or tells whether the
// field comes next.
func (f *fields) begin(n uint64, there bool) bool {
	if f.reading {
		return f.next == n
	}
	if there {
		f.b = binary.AppendUvarint(f.b, n)
	}
	return there
}

// end reads the number that follows a value.
func (f *fields) end() {
	if !f.reading || f.err != nil {
		return
	}
	before := f.next
	if f.next = 0; len(f.b) == 0 {
		return
	}
	f.next = f.uvarint()
	if f.err == nil && f.next <= before {
		f.fail(errFields)
	}
}

func (f *fields) uvarint() uint64 {
	v, n := binary.Uvarint(f.b)
	if n <= 0 {
		f.fail(errFields)
		return 0
	}
	f.b = f.b[n:]
	return v
}

func number[N ~int32 | ~uint32 | ~int64](f *fields, n uint64, v *N) {
	if !f.begin(n, *v != 0) {
		return
	}
	if f.reading {
		x, size := binary.Varint(f.b)
		if *v = N(x); size <= 0 || int64(*v) != x {
			f.fail(errFields)
			return
		}
		f.b = f.b[size:]
	} else {
		f.b = binary.AppendVarint(f.b, int64(*v))
	}
	f.end()
}

func (f *fields) date(n uint64, v *time.Time) {
	if !f.begin(n, !v.IsZero()) {
		return
	}
	if f.reading {
		s, size := binary.Varint(f.b)
		if size <= 0 {
			f.fail(errFields)
			return
		}
		f.b = f.b[size:]
		*v = time.Unix(s, 0).UTC()
		if y := v.Year(); y < 1 || y > 9999 || v.IsZero() {
			f.fail(errFields)
			return
		}
	} else {
		f.b = binary.AppendVarint(f.b, v.Unix())
	}
	f.end()
}

// bytes that are read are part of what is read.
func (f *fields) bytes(n uint64, v *[]byte) {
	if !f.begin(n, len(*v) > 0) {
		return
	}
	if f.reading {
		*v = f.take()
	} else {
		f.put(*v)
	}
	f.end()
}

func (f *fields) text(n uint64, v *string) {
	if !f.begin(n, *v != "") {
		return
	}
	if f.reading {
		*v = string(f.take())
	} else {
		f.b = append(binary.AppendUvarint(f.b, uint64(len(*v))), *v...)
	}
	f.end()
}

func (f *fields) take() []byte {
	size := f.uvarint()
	if size > uint64(len(f.b)) {
		f.fail(errFields)
		return nil
	}
	v := f.b[:size:size]
	f.b = f.b[size:]
	return v
}

func (f *fields) put(v []byte) { f.b = append(binary.AppendUvarint(f.b, uint64(len(v))), v...) }

// group is fields with numbers of their own.
func (f *fields) group(n uint64, there bool, inner func(*fields)) {
	if !f.begin(n, there) {
		return
	}
	if f.reading {
		if err := readFields(f.take(), inner); err != nil {
			f.fail(err)
		}
	} else {
		g := fields{}
		inner(&g)
		f.put(g.b)
	}
	f.end()
}

// attributes are a count and, for each, its index and its value; the name is in
// the value.
func (f *fields) attributes(n uint64, v *[]attribute) {
	if !f.begin(n, len(*v) > 0) {
		return
	}
	if f.reading {
		count := f.uvarint()
		if count > uint64(len(f.b)) {
			f.fail(errFields)
			return
		}
		*v = make([]attribute, 0, count)
		text := string(f.b) // the names are pieces of it
		for range count {
			index := f.uvarint()
			value := f.take()
			end := len(text) - len(f.b)
			size, ok := nameIn(value)
			if f.err == nil && (index > 1<<31-1 || !ok) {
				f.fail(errFields)
			}
			if f.err != nil {
				return
			}
			from := end - len(value) + nameAt
			*v = append(*v, attribute{Name: kmip.AttributeName(text[from : from+size]), Index: int32(index), Value: value})
		}
	} else {
		f.b = binary.AppendUvarint(f.b, uint64(len(*v)))
		for _, a := range *v {
			f.b = binary.AppendUvarint(f.b, uint64(a.Index))
			f.put(a.Value)
		}
	}
	f.end()
}

// nameAt is where the name is in the TTLV of an attribute: behind the 8 bytes that
// begin the structure and the 8 that begin the name, the first field of it.
const nameAt = 16

// nameIn tells how long the name is.
func nameIn(value []byte) (size int, ok bool) {
	const tag = uint32(kmip.TagAttributeName)<<8 | uint32(ttlv.TypeTextString)
	if len(value) < nameAt || binary.BigEndian.Uint32(value[8:]) != tag {
		return 0, false
	}
	n := binary.BigEndian.Uint32(value[12:])
	return int(n), uint64(n) <= uint64(len(value)-nameAt)
}

// readFields reads all of b.
func readFields(b []byte, walk func(*fields)) error {
	f := fields{b: b, reading: true}
	f.end()
	walk(&f)
	if f.err == nil && f.next != 0 {
		return fmt.Errorf("field %d is not known to this program: a newer one wrote it", f.next)
	}
	return f.err
}

// appendObject appends the record of o without its material.
func appendObject(b []byte, o *object) []byte {
	f := fields{b: make([]byte, 0, 256)}
	o.fields(&f)
	b = append(b, recordVersion)
	b = binary.AppendUvarint(b, uint64(len(f.b)))
	return append(b, f.b...)
}

// parseObject reads a record. The object refers to plain, but not to the material,
// which is at its end.
func parseObject(plain []byte) (*object, error) {
	meta, material, err := split(plain)
	if err != nil {
		return nil, err
	}
	var o object
	if err := readFields(meta, o.fields); err != nil {
		return nil, err
	}
	o.material = len(material)
	return &o, nil
}

// split cuts a record into its fields and the material.
func split(plain []byte) (meta, material []byte, err error) {
	if len(plain) == 0 {
		return nil, nil, errors.New("the record is empty")
	}
	if plain[0] != recordVersion {
		return nil, nil, fmt.Errorf("record version %d, this program reads %d", plain[0], recordVersion)
	}
	n, size := binary.Uvarint(plain[1:])
	rest := plain[1+max(size, 0):]
	if size <= 0 || n > uint64(len(rest)) || uint64(len(rest))-n > MaxMaterial {
		return nil, nil, errors.New("a record's lengths do not fit")
	}
	return rest[:n], rest[n:], nil
}
