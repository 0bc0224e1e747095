package vdisk

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mortise/internal/keysafe"
)

// badFS is files of which a piece of the extent cannot be read.
type badFS struct {
	osFS
	bad Range
}

func (f badFS) Open(name string, flag int) (file, error) {
	h, err := f.osFS.Open(name, flag)
	if err != nil || !isFlat(name) {
		return h, err
	}
	return &badFile{h, f.bad}, nil
}

type badFile struct {
	file
	bad Range
}

func (f *badFile) ReadAt(p []byte, off int64) (int, error) {
	if off < f.bad.Off+f.bad.Len && f.bad.Off < off+int64(len(p)) {
		return 0, syscall.EIO
	}
	return f.file.ReadAt(p, off)
}

func TestCheck(t *testing.T) {
	w := newWorld(t)
	const size = 4 << 20
	path := diskPath(t)
	create(t, path, w.spec(size, kekA))
	d := open(t, path, w.options())
	model := make([]byte, size)
	scribble(t, d, model, rand.New(rand.NewPCG(1, 2)), 200)
	d.Close()
	before := snapshot(t, filepath.Dir(path))

	var done int64
	r, err := Check(t.Context(), path, CheckOptions{Options: w.options(), Read: true, Hash: true, Report: func(n, total int64) {
		if n < done || n > total || total != size {
			t.Errorf("%d of %d after %d", n, total, done)
		}
		done = n
	}})
	if err != nil || !r.Whole() || done != size {
		t.Fatalf("%+v, %v, %d", r, err, done)
	}
	if want := sha256.Sum256(model); !bytes.Equal(r.Hash, want[:]) {
		t.Error("the hash is not that of the content")
	}
	if r.Read == 0 || r.Read >= size {
		t.Errorf("%d bytes were read of a disk with holes", r.Read)
	}

	// Unreadable sectors are found, each one, and the others are read.
	data := int64(bytes.IndexFunc(model, func(c rune) bool { return c != 0 })) / SectorSize * SectorSize
	bad := Range{data, 2 * SectorSize}
	o := CheckOptions{Options: w.options(), Read: true, Hash: true}
	o.fs = badFS{bad: bad}
	if r, err = Check(t.Context(), path, o); err != nil || r.Whole() || r.Hash != nil {
		t.Fatalf("%+v, %v", r, err)
	}
	if len(r.Bad) != 1 || r.Bad[0] != bad {
		t.Errorf("bad %v, want %v", r.Bad, bad)
	}

	// Without a key it is said what is not proven.
	if r, err = Check(t.Context(), path, CheckOptions{Read: true}); err != nil || !r.Whole() || !r.Findings[len(r.Findings)-1].Open {
		t.Errorf("without a key: %+v, %v", r, err)
	}
	if snapshot(t, filepath.Dir(path)) != before {
		t.Error("a check changed files")
	}

	// A pair whose key is not there is not proven; an edit is wrong.
	d = open(t, path, w.options())
	both, err := func() (keysafe.Safe, error) {
		enc, _ := d.desc.Encryption()
		return enc.KeySafe.Rewrap(nil, binding(w.options().VM, d.desc.UUID()), w.keks, kekB)
	}()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.saveSafe(both); err != nil {
		t.Fatal(err)
	}
	d.Close()
	one := w.options()
	one.KEKs = keysafe.KEKSet{kekA: w.keks[kekA]}
	if r, err = Check(t.Context(), path, CheckOptions{Options: one}); err != nil || !r.Whole() {
		t.Fatalf("%+v, %v", r, err)
	}
	proven := map[bool]int{}
	for _, f := range r.Findings {
		if f.What == "key safe" {
			proven[!f.Open]++
		}
	}
	if proven[true] != 1 || proven[false] != 1 {
		t.Errorf("of two pairs, one key given: %+v", r.Findings)
	}
	text := string(readFile(t, path))
	i := strings.LastIndex(text, "AES-256-GCM,") + 20 // in the second pair
	if err := os.WriteFile(path, []byte(text[:i]+"AAAA"+text[i+4:]), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err = Check(t.Context(), path, CheckOptions{Options: w.options()})
	var tampered *keysafe.TamperedError
	if err != nil || r.Whole() || !errors.As(errors.Join(r.Findings[3].Err, r.Findings[2].Err), &tampered) {
		t.Errorf("an edited pair: %+v, %v", r, err)
	}
}

// A conversion whose kept copy cannot be marked does not begin.
func TestKeptIsMarkedFirst(t *testing.T) {
	w := newWorld(t)
	for _, target := range []Target{{Kind: Decrypting}, {Kind: Recrypting, Key: kekB}} {
		path := diskPath(t)
		create(t, path, w.spec(1<<20, kekA))
		o := w.options()
		full := false
		o.fs = faultFS{fault: func(op, name string) error {
			if full && op == "replace" && strings.HasSuffix(name, keptSuffix) {
				return syscall.ENOSPC
			}
			return nil
		}}
		d := open(t, path, o)
		full = true
		if err := d.Convert(t.Context(), target, nil); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("%v: %v", target.Kind, err)
		}
		if i := d.Info(); i.Conversion != NotConverting || !i.Encrypted {
			t.Errorf("%v: it began: %+v", target.Kind, i)
		}
		full = false
		if err := d.Convert(t.Context(), target, nil); err != nil {
			t.Fatal(err)
		}
		_, err := loadKept(osFS{}, path)
		if missing := errors.Is(err, os.ErrNotExist); missing != (target.Kind == Decrypting) {
			t.Errorf("%v: the copy afterwards: %v", target.Kind, err)
		}
	}
}
