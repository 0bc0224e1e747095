package main

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// encode makes TTLV bytes (KMIP 1.4 §9.1) of a node whose values are bytes.
func encode(n *node) []byte {
	value := n.value
	if n.typ == ttlv.TypeStructure {
		value = nil
		for _, k := range n.kids {
			value = append(value, encode(k)...)
		}
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(n.tag)<<8|uint32(n.typ))
	b = binary.BigEndian.AppendUint32(b, uint32(len(value)))
	b = append(b, value...)
	return append(b, make([]byte, -len(value)&7)...)
}

// decode reads one item, which must be all of b.
func decode(b []byte) (*node, error) {
	list, err := decodeAll(b)
	if err == nil && len(list) != 1 {
		err = fmt.Errorf("%d items stand where one should", len(list))
	}
	if err != nil {
		return nil, err
	}
	return list[0], nil
}

func decodeAll(b []byte) (list []*node, err error) {
	for len(b) > 0 {
		if len(b) < 8 {
			return nil, errors.New("an item is cut short")
		}
		n := &node{tag: int(b[0])<<16 | int(b[1])<<8 | int(b[2]), typ: ttlv.Type(b[3])}
		length := uint64(binary.BigEndian.Uint32(b[4:]))
		padded := (length + 7) &^ 7
		if padded > uint64(len(b)-8) {
			return nil, fmt.Errorf("%s is longer than what holds it", ttlv.TagString(n.tag))
		}
		n.value = b[8 : 8+length]
		for _, p := range b[8+length : 8+padded] {
			if p != 0 {
				return nil, fmt.Errorf("%s is not padded with zeros", ttlv.TagString(n.tag))
			}
		}
		if n.typ == ttlv.TypeStructure {
			if n.kids, err = decodeAll(n.value); err != nil {
				return nil, err
			}
		}
		list = append(list, n)
		b = b[8+padded:]
	}
	return list, nil
}

// valueOf makes the bytes that the text of a case stands for; enum is the tag
// whose names an enumeration or a mask uses.
func valueOf(typ ttlv.Type, enum int, text string) ([]byte, error) {
	u32 := func(n int64, err error) ([]byte, error) { return binary.BigEndian.AppendUint32(nil, uint32(n)), err }
	u64 := func(n int64, err error) ([]byte, error) { return binary.BigEndian.AppendUint64(nil, uint64(n)), err }
	switch typ {
	case ttlv.TypeInteger:
		var sum int64
		for _, part := range strings.Fields(strings.ReplaceAll(text, "|", " ")) {
			n, err := strconv.ParseInt(part, 0, 64)
			if err != nil {
				bit, err := ttlv.BitmaskByStr(enum, part)
				if err != nil {
					return nil, err
				}
				n = int64(bit)
			}
			sum |= n
		}
		return u32(sum, nil)
	case ttlv.TypeLongInteger:
		return u64(strconv.ParseInt(text, 0, 64))
	case ttlv.TypeEnumeration:
		if n, err := strconv.ParseUint(text, 0, 32); err == nil {
			return u32(int64(n), nil)
		}
		if n := slices.Index(derivationMethods, text); enum == kmip.TagDerivationMethod && n >= 0 {
			return u32(int64(n+1), nil)
		}
		n, err := ttlv.EnumByName(enum, text)
		return u32(int64(n), err)
	case ttlv.TypeBoolean:
		yes, err := strconv.ParseBool(text)
		if yes {
			return u64(1, err)
		}
		return u64(0, err)
	case ttlv.TypeTextString:
		return []byte(text), nil
	case ttlv.TypeByteString, ttlv.TypeBigInteger:
		return hex.DecodeString(text)
	case ttlv.TypeDateTime:
		t, err := time.Parse(time.RFC3339, text)
		return u64(t.Unix(), err)
	case ttlv.TypeInterval:
		return u32(strconv.ParseInt(text, 0, 64))
	}
	return nil, fmt.Errorf("a value cannot have type %v", typ)
}

// derivationMethods are in the order of KMIP 1.4 §9.1.3.2.21; the codec has no
// names for them.
var derivationMethods = []string{"PBKDF2", "HASH", "HMAC", "ENCRYPT", "NIST800_108_C", "NIST800_108_F", "NIST800_108_DPI", "AsymmetricKey"}

// textOf shows a value from the wire as a case would write it.
func textOf(n *node, enum int) string {
	switch {
	case n.typ == ttlv.TypeStructure:
		var parts []string
		for _, k := range n.kids {
			parts = append(parts, ttlv.TagString(k.tag)+"="+textOf(k, enumTag(n, k)))
		}
		return "{" + strings.Join(parts, " ") + "}"
	case n.typ == ttlv.TypeTextString:
		return strconv.Quote(string(n.value))
	case len(n.value) == 4 && n.typ == ttlv.TypeEnumeration:
		v := binary.BigEndian.Uint32(n.value)
		if name := ttlv.EnumName(enum, v); name != "" {
			return name
		}
		return fmt.Sprintf("0x%08x", v)
	case len(n.value) == 4:
		return strconv.Itoa(int(int32(binary.BigEndian.Uint32(n.value))))
	case len(n.value) == 8 && n.typ == ttlv.TypeDateTime:
		return time.Unix(int64(binary.BigEndian.Uint64(n.value)), 0).UTC().Format(time.RFC3339)
	case len(n.value) == 8 && n.typ == ttlv.TypeBoolean:
		return strconv.FormatBool(n.value[7] != 0)
	case len(n.value) == 8 && n.typ == ttlv.TypeLongInteger:
		return strconv.FormatInt(int64(binary.BigEndian.Uint64(n.value)), 10)
	}
	return hex.EncodeToString(n.value)
}

// enumTag is the tag whose names the value of k uses: an attribute's value has
// the names of the attribute.
func enumTag(parent, k *node) int {
	if k.tag != kmip.TagAttributeValue {
		return k.tag
	}
	name := attributeName(parent)
	return tagByName[strings.ReplaceAll(name, " ", "")]
}

// attributeName is that of an Attribute structure, from a case or the wire.
func attributeName(attribute *node) string {
	n := attribute.kid(kmip.TagAttributeName)
	switch {
	case n == nil:
		return ""
	case n.value != nil:
		return string(n.value)
	}
	return n.text
}
