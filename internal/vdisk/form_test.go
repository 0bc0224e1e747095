package vdisk

import (
	"bytes"
	"crypto/aes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/xts"

	"mortise/internal/keysafe"
	"mortise/internal/vmdk"
)

// dmCrypt decrypts an extent as the kernel does with aes-xts-plain64,
// sector_size:4096 and iv_large_sectors, by an independent implementation. The
// sectors of holes come out as noise there; they are cleared.
func dmCrypt(t *testing.T, path string, w world) []byte {
	t.Helper()
	desc, err := vmdk.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	enc, _ := desc.Encryption()
	dek, _, err := enc.KeySafe.Unwrap(keysafe.Binding{VM: w.vm, Disk: desc.UUID(), Role: keysafe.RoleDisk, Cipher: "XTS-AES-256", UnitSize: 4096}, w.keks)
	if err != nil {
		t.Fatal(err)
	}
	defer dek.Wipe()
	b, err := os.ReadFile(filepath.Join(filepath.Dir(path), desc.Extents()[0].File))
	if err != nil {
		t.Fatal(err)
	}
	out := make([]byte, len(b))
	dek.Use(func(key []byte) {
		c, err := xts.NewCipher(aes.NewCipher, key)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(b); i += 4096 {
			c.Decrypt(out[i:i+4096], b[i:i+4096], uint64(i/4096))
		}
	})
	for i := 0; i < len(b); i += SectorSize {
		if isZero(b[i : i+SectorSize]) {
			clear(out[i : i+SectorSize])
		}
	}
	return out
}

// The stored form is that of dm-crypt after every way to it: written encrypted,
// encrypted in place, and recrypted.
func TestDMCrypt(t *testing.T) {
	w := newWorld(t)
	for _, size := range []int64{2 << 20, 1<<20 + 3*SectorSize} {
		path := diskPath(t)
		create(t, path, w.spec(size, kekA))
		o := w.options()
		o.zone = 32 * UnitSize
		d := open(t, path, o)
		model := make([]byte, size)
		scribble(t, d, model, rand.New(rand.NewPCG(10, 11)), 100)
		check := func(when string) {
			t.Helper()
			if got := dmCrypt(t, path, w); int64(len(got)) != roundUp(size, 4096) || !bytes.Equal(got[:size], model) {
				t.Errorf("%s: dm-crypt reads something else", when)
			}
		}
		check("written")
		for _, c := range []Target{{Kind: Recrypting, Key: kekB}, {Kind: Decrypting}, {Kind: Encrypting, Key: kekA}} {
			if err := d.Convert(t.Context(), c, nil); err != nil {
				t.Fatal(err)
			}
			if c.Kind != Decrypting {
				check(c.Kind.String())
			}
		}
	}
}

// Only holes of the file stay holes: zeros that were written become ciphertext,
// so that nobody can tell them from other data.
func TestEncryptKeepsOnlyHoles(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, keysafe.KeyID{}))
	d := open(t, path, w.options())
	if err := d.WriteAt(make([]byte, 64<<10), 128<<10); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := d.Info().Allocated
	if err := d.Convert(t.Context(), Target{Kind: Encrypting, Key: kekA}, nil); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(d.ext.name)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(b); i += SectorSize {
		if written := i >= 128<<10 && i < 192<<10; isZero(b[i:i+SectorSize]) == written {
			t.Fatalf("sector at %d: zero %v, written %v", i, !written, written)
		}
	}
	if after := d.Info().Allocated; after != before {
		t.Errorf("allocated %d bytes, before the encryption %d", after, before)
	}
	compare(t, d, make([]byte, 1<<20))
}

// An encrypted disk is not readable with qemu-img, and a decrypted one is again.
func TestQemuImg(t *testing.T) {
	img, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("no qemu-img: install qemu-utils")
	}
	w := newWorld(t)
	for _, size := range []int64{2 << 20, 1<<20 + 3*SectorSize} {
		path := diskPath(t)
		dir := filepath.Dir(path)
		content := randomBytes(7, size)
		clear(content[100<<10 : 300<<10])
		if err := os.WriteFile(filepath.Join(dir, "in.raw"), content, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(img, "convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", filepath.Join(dir, "in.raw"), path).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		read := func() ([]byte, error) {
			raw := filepath.Join(dir, "out.raw")
			if out, err := exec.Command(img, "convert", "-O", "raw", path, raw).CombinedOutput(); err != nil {
				t.Logf("qemu-img: %s", out)
				return nil, err
			}
			return os.ReadFile(raw)
		}
		d := open(t, path, w.options())
		compare(t, d, content)
		if err := d.Convert(t.Context(), Target{Kind: Encrypting, Key: kekA}, nil); err != nil {
			t.Fatal(err)
		}
		compare(t, d, content)
		d.Close()
		if b, err := read(); err == nil {
			t.Fatalf("qemu-img reads %d bytes of an encrypted disk", len(b))
		}
		flat, err := os.ReadFile(d.ext.name)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(content); i += SectorSize {
			if s := content[i : i+SectorSize]; !isZero(s) && bytes.Contains(flat, s) {
				t.Fatalf("sector %d is in clear in the extent", i/SectorSize)
			}
		}
		d = open(t, path, w.options())
		if err := d.Convert(t.Context(), Target{Kind: Decrypting}, nil); err != nil {
			t.Fatal(err)
		}
		d.Close()
		if b, err := read(); err != nil || !bytes.Equal(b, content) {
			t.Fatalf("qemu-img after the decryption: %d bytes, %v", len(b), err)
		}
		left, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range left {
			if strings.Contains(f.Name(), "state") || strings.Contains(f.Name(), "tmp") {
				t.Errorf("%s is left", f.Name())
			}
		}
		if text, _ := os.ReadFile(path); bytes.Contains(text, []byte("encryption.")) {
			t.Error("the descriptor still speaks of encryption")
		}
		if st, err := os.Stat(d.ext.name); err != nil || st.Size() != size {
			t.Errorf("the extent has %d bytes, %v", st.Size(), err)
		}
	}
}

func TestBlockStatus(t *testing.T) { testBlockStatus(t, newWorld(t)) }

func testBlockStatus(t *testing.T, w world) {
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	d := open(t, path, w.options())
	if err := d.WriteAt(randomBytes(1, 8192), 64<<10); err != nil {
		t.Fatal(err)
	}
	type piece struct {
		n int64
		s Status
	}
	list := func(off, n int64) (ps []piece) {
		if err := d.BlockStatus(off, n, func(n int64, s Status) bool { ps = append(ps, piece{n, s}); return len(ps) < 10 }); err != nil {
			t.Fatal(err)
		}
		return ps
	}
	for _, c := range []struct {
		off, n int64
		want   []piece
	}{
		{0, 1 << 20, []piece{{64 << 10, Hole | Zero}, {8192, 0}, {1<<20 - 72<<10, Hole | Zero}}},
		{64<<10 + 512, 1024, []piece{{1024, 0}}},
		{512, 512, []piece{{512, Hole | Zero}}},
		{1 << 20, 0, nil},
	} {
		got := list(c.off, c.n)
		if len(got) != len(c.want) {
			t.Fatalf("%d+%d: %v, want %v", c.off, c.n, got, c.want)
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("%d+%d: %v, want %v", c.off, c.n, got, c.want)
			}
		}
	}
	if err := d.Trim(64<<10, 8192); err != nil {
		t.Fatal(err)
	}
	if got := list(0, 1<<20); len(got) != 1 {
		t.Errorf("after the trim: %v", got)
	}
}

// Wrong targets are refused before anything is written.
func TestConvertRefuses(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		name string
		key  keysafe.KeyID
		t    Target
		ok   bool
	}{
		{"encrypt an encrypted disk", kekA, Target{Kind: Encrypting, Key: kekB}, false},
		{"recrypt a disk in clear", keysafe.KeyID{}, Target{Kind: Recrypting, Key: kekB}, false},
		{"no conversion", kekA, Target{}, false},
		{"unknown key", keysafe.KeyID{}, Target{Kind: Encrypting, Key: keysafe.KeyID{Provider: "kms", Key: "gone"}}, false},
		{"unknown key, recrypt", kekA, Target{Kind: Recrypting, Key: keysafe.KeyID{Provider: "kms", Key: "gone"}}, false},
		{"epoch from the past", kekA, Target{Kind: Recrypting, Key: kekB, Epoch: 7}, false},
		{"decrypt a disk in clear", keysafe.KeyID{}, Target{Kind: Decrypting}, true},
		{"encrypted so already", kekA, Target{Kind: Encrypting, Key: kekA, Epoch: 1}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := diskPath(t)
			create(t, path, w.spec(1<<20, c.key))
			d := open(t, path, w.options())
			before := snapshot(t, filepath.Dir(path))
			if err := d.Convert(t.Context(), c.t, nil); (err == nil) != c.ok {
				t.Fatal(err)
			}
			if after := snapshot(t, filepath.Dir(path)); after != before {
				t.Error("files have changed")
			}
		})
	}
}

// The tweak of a unit is its number as a little-endian number of 128 bits.
func TestUnitNumber(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	const at = int64(5) << 40 // beyond 32 bits of units
	create(t, path, w.spec(6<<40, kekA))
	d := open(t, path, w.options())
	want := randomBytes(3, UnitSize)
	if err := d.WriteAt(bytes.Clone(want), at); err != nil {
		t.Fatal(err)
	}
	stored := make([]byte, UnitSize)
	if err := readFull(d.ext.f, stored, at); err != nil {
		t.Fatal(err)
	}
	var tweak [16]byte
	binary.LittleEndian.PutUint64(tweak[:], uint64(at/UnitSize))
	d.key.dek.Use(func(key []byte) {
		data, _ := aes.NewCipher(key[:32])
		tw, _ := aes.NewCipher(key[32:])
		tw.Encrypt(tweak[:], tweak[:])
		var block [16]byte
		for i := range block {
			block[i] = stored[i] ^ tweak[i]
		}
		data.Decrypt(block[:], block[:])
		for i := range block {
			block[i] ^= tweak[i]
		}
		if !bytes.Equal(block[:], want[:16]) {
			t.Error("the first block does not decrypt by hand")
		}
	})
}
