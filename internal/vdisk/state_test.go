package vdisk

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/secret"
)

func testKey(t testing.TB, seed uint64) *dataKey {
	dek, err := secret.Take(randomBytes(seed, 64))
	if err != nil {
		t.Fatal(err)
	}
	k, err := expand(dek)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// states has one of each kind.
func states() []*state {
	disk := uuid.MustParse("6000c29a-0102-0304-0506-0708090a0b0c")
	return []*state{
		{seq: 1, disk: disk, size: 1 << 20, epoch: 1, opens: 7, check: keyCheck{1}},
		{seq: 2, disk: disk, size: 512, kind: Encrypting, targetEpoch: 3, targetCheck: keyCheck{2}},
		{seq: 3, disk: disk, size: MaxSize, kind: Decrypting, epoch: 1, check: keyCheck{1}, boundary: MaxSize},
		{seq: 4, disk: disk, size: 1<<20 - 512, kind: Recrypting, epoch: 1, check: keyCheck{1}, targetEpoch: 2, targetCheck: keyCheck{2}, boundary: 8192, hot: 8192, hotLen: 8192, sums: make([]uint64, 16)},
	}
}

// image is a state file with s in its slot.
func image(s *state, k *dataKey) []byte {
	h, sums := s.encode(k.mac(), k.mac())
	slot := int64(s.seq % 2)
	b := make([]byte, sumsOffset+slot*sumsStride+int64(len(sums)))
	copy(b[slot*headerStride:], h)
	copy(b[sumsOffset+slot*sumsStride:], sums)
	return b
}

func TestStateCodec(t *testing.T) {
	k, other := testKey(t, 1), testKey(t, 2)
	for _, s := range states() {
		b := image(s, k)
		got, err := newestSlot(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, s) {
			t.Fatalf("decoded %+v, want %+v", got, s)
		}
		if !got.verify(k.state, got.mac) || !got.verify(k.state, got.targetMAC) || got.verify(other.state, got.mac) {
			t.Fatal("a MAC verifies wrongly")
		}
		// A header with any bit flipped is torn; with the right checksum it is
		// refused, or its MAC is wrong.
		for bit := range headerSize * 8 {
			c := bytes.Clone(b)
			h := c[int64(s.seq%2)*headerStride:][:headerSize]
			h[bit/8] ^= 1 << (bit % 8)
			if _, err := newestSlot(bytes.NewReader(c)); !errors.Is(err, errTorn) && bit/8 < offChecksum {
				t.Fatalf("bit %d flipped: %v", bit, err)
			}
			putChecksum(h)
			g, err := newestSlot(bytes.NewReader(c))
			if bit/8 >= offMACs { // the MACs themselves, unused bytes, the checksum
				continue
			}
			if err == nil && g.verify(k.state, g.mac) {
				t.Fatalf("bit %d flipped and the MAC verifies", bit)
			}
		}
	}
}

// Of two slots the newer one counts; a torn one gives way to the one before.
func TestStateSlots(t *testing.T) {
	k := testKey(t, 1)
	older, newer := states()[2], states()[3]
	b := image(newer, k)
	h, _ := older.encode(k.mac(), nil)
	copy(b[headerStride:], h)
	if s, err := newestSlot(bytes.NewReader(b)); err != nil || s.seq != newer.seq {
		t.Fatalf("%+v, %v", s, err)
	}
	for name, tear := range map[string]func(b []byte) []byte{
		"header": func(b []byte) []byte { clear(b[:100]); return b },
		"sums":   func(b []byte) []byte { b[sumsOffset+5] ^= 1; return b },
		"cut":    func(b []byte) []byte { return b[:sumsOffset] },
	} {
		if s, err := newestSlot(bytes.NewReader(tear(bytes.Clone(b)))); err != nil || s.seq != older.seq {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
}

func FuzzState(f *testing.F) {
	k := testKey(f, 1)
	for _, s := range states() {
		f.Add(image(s, k), true)
	}
	f.Add([]byte{}, false)
	f.Add([]byte(stateMagic), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		for n := range 2 { // a fuzzer does not find a checksum
			if at := n * headerStride; fix && len(b) >= at+headerSize {
				putChecksum(b[at:][:headerSize])
			}
		}
		s, err := newestSlot(bytes.NewReader(b))
		if err != nil {
			return
		}
		// What is accepted is what the encoder writes.
		h := s.header(s.encodeSums())
		if got := b[int64(s.seq%2)*headerStride:]; !bytes.Equal(h[:offMACs], got[:offMACs]) {
			t.Fatalf("accepted %x, would write %x", got[:offMACs], h[:offMACs])
		}
	})
}
