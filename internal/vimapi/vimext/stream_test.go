package vimext

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

func TestRecords(t *testing.T) {
	var b bytes.Buffer
	big := bytes.Repeat([]byte{7}, MaxRecord)
	for _, err := range []error{WriteRecord(&b, 0, []byte("abc")), WriteRecord(&b, 1<<40, big), WriteEnd(&b)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r := NewRecords(bytes.NewReader(b.Bytes()))
	if at, data, err := r.Next(); err != nil || at != 0 || string(data) != "abc" {
		t.Fatalf("%d %q %v", at, data, err)
	}
	if at, data, err := r.Next(); err != nil || at != 1<<40 || !bytes.Equal(data, big) {
		t.Fatalf("%d %d bytes %v", at, len(data), err)
	}
	if _, _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Fatalf("at the end: %v", err)
	}
	for _, bad := range []struct {
		offset int64
		n      int
	}{{-1, 1}, {0, 0}, {0, MaxRecord + 1}} {
		if WriteRecord(io.Discard, bad.offset, make([]byte, bad.n)) == nil {
			t.Errorf("a record of %d bytes at %d is written", bad.n, bad.offset)
		}
	}
	for n := range b.Len() {
		r := NewRecords(bytes.NewReader(b.Bytes()[:n]))
		var err error
		for err == nil {
			_, _, err = r.Next()
		}
		if !errors.Is(err, ErrTruncated) {
			t.Fatalf("cut at %d: %v", n, err)
		}
		if n == 40 {
			break // the long record is not cut at each of its bytes
		}
	}
}

func FuzzRecords(f *testing.F) {
	var b bytes.Buffer
	WriteRecord(&b, 4096, []byte("data"))
	WriteEnd(&b)
	f.Add(b.Bytes())
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{0xff}, 40))
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := NewRecords(bytes.NewReader(stream))
		var again bytes.Buffer
		end := int64(0)
		for {
			at, data, err := r.Next()
			if errors.Is(err, io.EOF) {
				WriteEnd(&again)
				break
			}
			if err != nil {
				if !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrRecord) {
					t.Fatalf("an error that is neither: %v", err)
				}
				return
			}
			if at < end || len(data) == 0 || len(data) > MaxRecord {
				t.Fatalf("a record of %d bytes at %d after %d", len(data), at, end)
			}
			end = at + int64(len(data))
			if err := WriteRecord(&again, at, data); err != nil {
				t.Fatal(err)
			}
		}
		// The offset of the last record means nothing; all else is kept.
		n := again.Len() - recordHeader
		if !bytes.Equal(again.Bytes()[:n], stream[:n]) {
			t.Fatal("what was read is not what was sent")
		}
	})
}
