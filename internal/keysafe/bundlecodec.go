package keysafe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"unicode/utf8"

	"github.com/google/uuid"

	"mortise/internal/secret"
)

// The plaintext of encryption.data: bundleMagic, then records in ascending order
// of kind and name, each
//
//	kind 1 byte, length of name 2 bytes, name, length of value 2 bytes, value
//
// with big-endian numbers. A file's value is its XTS key; a disk's name is its
// UUID, its value 1 byte of flags and 8 bytes of epoch; a secret's value is the
// secret.
const (
	bundleMagic = "mortise-bundle\x01"

	kindFile   = 1
	kindDisk   = 2
	kindSecret = 3

	flagEncrypted = 1
)

var errBundleFormat = errors.New("keysafe: the bundle has an unknown format: a newer Mortise wrote it")

// encode returns the plaintext in a slice of exactly its size, which the caller
// clears; it never grew, so no copy is left behind.
func (b *Bundle) encode() ([]byte, error) {
	size := len(bundleMagic)
	for _, m := range []map[string]*secret.Key{b.Files, b.Secrets} {
		for name, k := range m {
			if name == "" || len(name) > maxName || !utf8.ValidString(name) {
				return nil, fmt.Errorf("keysafe: %.64q is no name in a bundle: 1 to %d bytes of UTF-8", name, maxName)
			}
			if k.Len() == 0 {
				return nil, fmt.Errorf("keysafe: the key %q was wiped before the bundle was sealed", name)
			}
			size += 5 + len(name) + k.Len()
		}
	}
	for name, k := range b.Files {
		if k.Len() != DEKSize(CipherXTS) {
			return nil, fmt.Errorf("keysafe: the key of file %q has %d bytes, an XTS key has %d", name, k.Len(), DEKSize(CipherXTS))
		}
	}
	size += len(b.Disks) * (5 + len(uuid.UUID{}) + 9)

	out := append(make([]byte, 0, size), bundleMagic...)
	record := func(kind byte, name string, valueLen int) {
		out = append(out, kind)
		out = binary.BigEndian.AppendUint16(out, uint16(len(name)))
		out = append(out, name...)
		out = binary.BigEndian.AppendUint16(out, uint16(valueLen))
	}
	keys := func(kind byte, m map[string]*secret.Key) {
		for _, name := range slices.Sorted(maps.Keys(m)) {
			record(kind, name, m[name].Len())
			m[name].Use(func(k []byte) { out = append(out, k...) })
		}
	}
	keys(kindFile, b.Files)
	for _, id := range slices.SortedFunc(maps.Keys(b.Disks), func(x, y uuid.UUID) int { return slices.Compare(x[:], y[:]) }) {
		record(kindDisk, string(id[:]), 9)
		var flags byte
		if b.Disks[id].Encrypted {
			flags |= flagEncrypted
		}
		out = append(out, flags)
		out = binary.BigEndian.AppendUint64(out, b.Disks[id].Epoch)
	}
	keys(kindSecret, b.Secrets)
	return out, nil
}

// decode fills the maps from what encode wrote. Keys go from plain, which the
// caller clears, straight into locked memory; after an error the caller wipes b.
func (b *Bundle) decode(plain []byte) error {
	b.Files, b.Disks, b.Secrets = map[string]*secret.Key{}, map[uuid.UUID]DiskRecord{}, map[string]*secret.Key{}
	if len(plain) < len(bundleMagic) || string(plain[:len(bundleMagic)]) != bundleMagic {
		return errBundleFormat
	}
	rest := plain[len(bundleMagic):]
	field := func() ([]byte, bool) {
		if len(rest) < 2 {
			return nil, false
		}
		n := int(binary.BigEndian.Uint16(rest))
		if len(rest) < 2+n {
			return nil, false
		}
		f := rest[2 : 2+n]
		rest = rest[2+n:]
		return f, true
	}
	lastKind, lastName := byte(0), ""
	for len(rest) > 0 {
		kind := rest[0]
		rest = rest[1:]
		nameBytes, ok1 := field()
		value, ok2 := field()
		name := string(nameBytes)
		if !ok1 || !ok2 || kind < lastKind || kind == lastKind && name <= lastName {
			return errBundleFormat
		}
		lastKind, lastName = kind, name
		switch kind {
		case kindFile, kindSecret:
			if name == "" || len(name) > maxName || !utf8.ValidString(name) || len(value) == 0 || kind == kindFile && len(value) != DEKSize(CipherXTS) {
				return errBundleFormat
			}
			k, err := secret.Copy(value)
			if err != nil {
				return err
			}
			if kind == kindFile {
				b.Files[name] = k
			} else {
				b.Secrets[name] = k
			}
		case kindDisk:
			if len(name) != len(uuid.UUID{}) || len(value) != 9 || value[0]&^flagEncrypted != 0 {
				return errBundleFormat
			}
			b.Disks[uuid.UUID(nameBytes)] = DiskRecord{value[0]&flagEncrypted != 0, binary.BigEndian.Uint64(value[1:])}
		default:
			return errBundleFormat
		}
	}
	return nil
}
