package vimapi

import (
	"encoding/binary"
	"hash/maphash"
	"math"
	"reflect"
	"time"
)

// fingerprint is a 64-bit hash of a property's value. A filter remembers these
// instead of the values: ten watchers of ten thousand VMs cost megabytes, not
// gigabytes. The seed is random, so that nobody can make two values look alike.
func fingerprint(seed maphash.Seed, v any) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	hashValue(&h, reflect.ValueOf(v))
	return h.Sum64()
}

func hashValue(h *maphash.Hash, v reflect.Value) {
	if !v.IsValid() {
		h.WriteByte(0)
		return
	}
	h.WriteByte(byte(v.Kind()))
	switch v.Kind() {
	case reflect.Pointer:
		hashValue(h, v.Elem())
	case reflect.Interface:
		if e := v.Elem(); e.IsValid() {
			h.WriteString(pointee(e).Type().String())
			hashValue(h, e)
		}
	case reflect.Struct:
		if t, ok := v.Interface().(time.Time); ok {
			hashInt(h, t.UnixNano())
			return
		}
		for i := range v.NumField() {
			hashValue(h, v.Field(i))
		}
	case reflect.Slice, reflect.Array:
		hashInt(h, int64(v.Len()))
		for i := range v.Len() {
			hashValue(h, v.Index(i))
		}
	case reflect.String:
		hashInt(h, int64(v.Len()))
		h.WriteString(v.String())
	case reflect.Bool:
		if v.Bool() {
			h.WriteByte(1)
		} else {
			h.WriteByte(2)
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		hashInt(h, v.Int())
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		hashInt(h, int64(v.Uint()))
	case reflect.Float32, reflect.Float64:
		hashInt(h, int64(math.Float64bits(v.Float())))
	}
}

func hashInt(h *maphash.Hash, n int64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(n))
	h.Write(b[:])
}
