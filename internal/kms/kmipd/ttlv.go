package kmipd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"

	"github.com/ovh/kmip-go/ttlv"
)

// TTLV, KMIP 1.4 §9.1: an item is a tag (3 bytes), a type (1), a length (4,
// big-endian) and a value padded with zeros to a multiple of 8 bytes. The value
// of a structure is items. The codec trusts lengths in places, so that 16 bytes
// can crash it; nothing reaches it that has not passed check.

const (
	headerLen = 8
	maxDepth  = 32
)

// An item is one TTLV item inside a message that passed check.
type item struct {
	tag   int
	typ   ttlv.Type
	value []byte // without padding
	raw   []byte // the whole item
}

// check reports what is wrong with the structure of b, which must be items to
// its end.
func check(b []byte, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("structures nest deeper than %d", maxDepth)
	}
	for len(b) > 0 {
		if len(b) < headerLen {
			return fmt.Errorf("%d bytes are left where an item should begin", len(b))
		}
		typ, n := ttlv.Type(b[3]), uint64(binary.BigEndian.Uint32(b[4:]))
		size := headerLen + (n+7)&^7
		if size > uint64(len(b)) {
			return fmt.Errorf("an item of %d bytes stands where %d are left", size, len(b))
		}
		if err := checkValue(typ, b[headerLen:headerLen+n], depth); err != nil {
			return err
		}
		b = b[size:]
	}
	return nil
}

func checkValue(typ ttlv.Type, v []byte, depth int) error {
	ok := true
	switch typ {
	case ttlv.TypeStructure:
		return check(v, depth+1)
	case ttlv.TypeInteger, ttlv.TypeEnumeration, ttlv.TypeInterval:
		ok = len(v) == 4
	case ttlv.TypeLongInteger, ttlv.TypeBoolean, ttlv.TypeDateTime:
		ok = len(v) == 8
	case ttlv.TypeBigInteger:
		ok = len(v) > 0 && len(v)%8 == 0
	case ttlv.TypeTextString:
		if !utf8.Valid(v) {
			return errors.New("a text string is not UTF-8")
		}
	case ttlv.TypeByteString:
	default:
		return fmt.Errorf("an item has type %#x, which does not exist", uint8(typ))
	}
	if !ok {
		return fmt.Errorf("a value of type %s has %d bytes", typ, len(v))
	}
	return nil
}

// items takes apart the value of a structure that passed check.
func items(b []byte) []item {
	list := make([]item, 0, 4) // most have no more
	for len(b) > 0 {
		n := int(binary.BigEndian.Uint32(b[4:]))
		size := headerLen + (n+7)&^7
		list = append(list, item{
			tag:   int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
			typ:   ttlv.Type(b[3]),
			value: b[headerLen : headerLen+n],
			raw:   b[:size],
		})
		b = b[size:]
	}
	return list
}

// A field is an item that a structure may have, in its place.
type field struct {
	tag     int
	repeats bool
}

var (
	errUnknownField  = errors.New("a field stands where this version of KMIP has none such")
	errRepeatedField = errors.New("a field is there more than once")
)

// inOrder checks that list has known fields only, each in its place. The codec
// passes over others without a word, and a field that is passed over may be the
// one that says to wrap the key.
func inOrder(list []item, fields []field) error {
	at := 0
	for i, it := range list {
		if i > 0 && it.tag == list[i-1].tag {
			if !fields[at].repeats {
				return errRepeatedField
			}
			continue
		}
		if i > 0 {
			at++
		}
		for at < len(fields) && fields[at].tag != it.tag {
			at++
		}
		if at == len(fields) {
			return errUnknownField
		}
	}
	return nil
}
