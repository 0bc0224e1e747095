package kms

import (
	"encoding/binary"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
)

func fullObject() *object {
	at := func(s int64) time.Time { return time.Unix(s, 0).UTC() }
	o := &object{
		Type: kmip.ObjectTypeSecretData, Subtype: 1, Algorithm: kmip.CryptographicAlgorithmAES, Length: 256, Usage: 12,
		State: kmip.StateCompromised, Reason: &revocation{Code: kmip.RevocationReasonCodeKeyCompromise, Message: "lost"},
		Digest: []byte("digest"), Initial: at(0), Activation: at(1), Deactivated: at(1 << 34), Destroyed: at(-1), Compromised: at(4),
		Occurred: at(5), LastChange: at(1763700000), Original: at(6), ProcessFrom: at(7), ProtectTo: at(8), Archived: at(9),
		Format: kmip.KeyFormatTypeRaw, Flags: flagServed | flagNeverExtractable, Limits: &usageLimits{1 << 40, -3, 1}, Wrapping: []byte{1, 2},
	}
	for i, a := range []kmip.Attribute{named("a key"), custom("x-Vendor", "VMware, Inc."), custom("x-Vendor", "other")} {
		o.Attributes = append(o.Attributes, attribute{Name: a.AttributeName, Index: int32(i), Value: encodeAttribute(a)})
	}
	return o
}

// TestRecord: every field of an object comes back, the empty ones too. That
// fullObject sets every field is looked at as well, so that a new one cannot be
// forgotten.
func TestRecord(t *testing.T) {
	full := fullObject()
	v := reflect.ValueOf(*full)
	for i := range v.NumField() {
		if f := v.Type().Field(i); f.IsExported() && v.Field(i).IsZero() {
			t.Errorf("the test sets no %s", f.Name)
		}
	}
	for _, o := range []*object{full, {}, {Reason: &revocation{}, Limits: &usageLimits{}}} {
		got, err := parseObject(append(appendObject(nil, o), "material"...))
		if err != nil {
			t.Fatal(err)
		}
		if got.material != len("material") {
			t.Errorf("%d bytes of material", got.material)
		}
		got.material = 0
		if !reflect.DeepEqual(got, o) {
			t.Errorf("written\n%+v\nread\n%+v", o, got)
		}
	}
	t.Logf("an object with every field: %d bytes; an empty one: %d", len(appendObject(nil, full)), len(appendObject(nil, &object{})))
}

func TestRecordRefused(t *testing.T) {
	good := appendObject(nil, fullObject())
	meta := func(b ...byte) []byte { return append([]byte{recordVersion, byte(len(b))}, b...) }
	for what, c := range map[string]struct {
		record []byte
		says   string
	}{
		"empty":             {nil, "empty"},
		"newer version":     {append([]byte{recordVersion + 1}, good[1:]...), "version 2"},
		"JSON of old":       {[]byte("\x00\x00\x00\x02{}"), "version 0"},
		"newer field":       {meta(99, 2), "field 99 is not known"},
		"fields unordered":  {meta(2, 2, 1, 2), "do not fit"},
		"field twice":       {meta(1, 2, 1, 2), "do not fit"},
		"number too large":  {meta(append([]byte{1}, binary.AppendVarint(nil, 1<<40)...)...), "do not fit"},
		"cut in a number":   {meta(1), "do not fit"},
		"cut in a length":   {meta(8, 5, 1), "do not fit"},
		"date out of range": {meta(append([]byte{9}, binary.AppendVarint(nil, 1<<60)...)...), "do not fit"},
		"many attributes":   {meta(30, 200, 1), "do not fit"},
		"nameless":          {meta(30, 1, 0, 2, 1, 1), "do not fit"},
		"length too large":  {[]byte{recordVersion, 10, 1}, "do not fit"},
		"too much material": {append(meta(), make([]byte, MaxMaterial+1)...), "do not fit"},
		"newer in a group":  {meta(7, 2, 9, 2), "field 9 is not known"},
	} {
		if o, err := parseObject(c.record); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %+v, %v; want an error with %q", what, o, err, c.says)
		}
	}
	for n := range len(good) {
		if _, err := parseObject(good[:n]); err == nil {
			t.Errorf("a record cut at %d of %d bytes was read", n, len(good))
		}
	}
}

func FuzzObject(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{recordVersion, 0})
	f.Add([]byte{recordVersion, 2, 1, 2})
	f.Add([]byte{recordVersion, 255, 255, 255, 255, 15})
	f.Add(append(appendObject(nil, fullObject()), "key"...))
	f.Add(append(appendObject(nil, &object{Type: kmip.ObjectTypeSymmetricKey, Reason: &revocation{}}), "key"...))
	f.Fuzz(func(t *testing.T, plain []byte) {
		o, err := parseObject(plain)
		if err != nil {
			return
		}
		if o.material > MaxMaterial {
			t.Fatalf("%d bytes of material", o.material)
		}
		again, err := parseObject(append(appendObject(nil, o), make([]byte, o.material)...))
		if err != nil {
			t.Fatalf("what was read does not read again: %v", err)
		}
		if a, b := appendObject(nil, o), appendObject(nil, again); string(a) != string(b) {
			t.Fatalf("%x was read, and written as %x", a, b)
		}
		indexObject(o, func(string, []byte) {})
		o.settle(time.Now())
		if _, err := o.list("id"); err != nil {
			return
		}
		filter{equal: []attribute{{Name: "State"}}}.match("id", o)
	})
}

func BenchmarkObject(b *testing.B) {
	o := fullObject()
	record := append(appendObject(nil, o), make([]byte, 32)...)
	b.Run("write", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			appendObject(nil, o)
		}
	})
	b.Run("read", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := parseObject(record); err != nil {
				b.Fatal(err)
			}
		}
	})
}
