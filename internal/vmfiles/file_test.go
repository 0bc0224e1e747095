package vmfiles

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/xts"
)

func newKey(t testing.TB) *secret.Key {
	t.Helper()
	k, err := secret.Random(nil, xts.KeySize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func create(t testing.TB, path string, k *secret.Key) *File {
	t.Helper()
	f, err := Create(path, k)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// kill ends f as the death of the process does: nothing is written or synced.
func kill(f *File) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.release()
}

func content0(t *testing.T, f *File) []byte {
	t.Helper()
	b := make([]byte, f.Size())
	if n, err := f.ReadAt(b, 0); n != len(b) || err != nil && err != io.EOF {
		t.Fatalf("read %d of %d bytes: %v", n, len(b), err)
	}
	return b
}

// A model is what a file must contain.
type model struct{ data []byte }

func (m *model) write(p []byte, off int) {
	m.truncate(max(len(m.data), off+len(p)))
	copy(m.data[off:], p)
}

func (m *model) truncate(n int) {
	if n <= len(m.data) {
		m.data = m.data[:n:n]
		return
	}
	m.data = append(m.data, make([]byte, n-len(m.data))...)
}

// step does one random change to f and m, and says what it touched.
func step(t *testing.T, r *rand.Rand, f *File, m *model) (from, to int) {
	t.Helper()
	return stepOn(t, r, f, m)
}

// stepOn is step, on m alone when f is nil.
func stepOn(t *testing.T, r *rand.Rand, f *File, m *model) (from, to int) {
	size := len(m.data)
	if r.Intn(6) == 0 {
		n := r.Intn(60000)
		if r.Intn(2) == 0 {
			n = max(0, size+r.Intn(2000)-1000)
		}
		if f != nil {
			if err := f.Truncate(int64(n)); err != nil {
				t.Fatal(err)
			}
		}
		m.truncate(n)
		return min(n, size), max(n, size)
	}
	p, off := make([]byte, 1+r.Intn(r.Intn(12000)+1)), r.Intn(50000)
	switch r.Intn(4) {
	case 0: // as QEMU writes flash: whole sectors
		p, off = make([]byte, sector*(1+r.Intn(3))), r.Intn(80)*sector
	case 1:
		off = size
	}
	r.Read(p)
	if f != nil {
		if n, err := f.WriteAt(p, int64(off)); n != len(p) || err != nil {
			t.Fatalf("wrote %d of %d: %v", n, len(p), err)
		}
	}
	m.write(p, off)
	return min(off, size), max(size, off+len(p))
}

// ramDisk is a folder in memory, where syncs cost nothing: for tests that cut the
// power themselves.
func ramDisk(t *testing.T) string {
	t.Helper()
	if unix.Access("/dev/shm", unix.W_OK) != nil {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "vmfiles-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestAgainstModel does random changes; killing and reopening between them loses
// nothing.
func TestAgainstModel(t *testing.T) {
	for seed := range int64(6) {
		r := rand.New(rand.NewSource(seed))
		path, k := filepath.Join(t.TempDir(), "vm.nvram"), newKey(t)
		f, m := create(t, path, k), &model{}
		for i := range 400 {
			step(t, r, f, m)
			switch r.Intn(12) {
			case 0:
				if err := f.Sync(); err != nil {
					t.Fatal(err)
				}
			case 1, 2:
				if r.Intn(2) == 0 {
					kill(f)
				} else if err := f.Close(); err != nil {
					t.Fatal(err)
				}
				var err error
				if f, err = Open(path, k, false); err != nil {
					t.Fatal(err)
				}
			case 3:
				off := r.Intn(len(m.data) + 1)
				b := make([]byte, r.Intn(5000))
				n, err := f.ReadAt(b, int64(off))
				if want := m.data[off:min(len(m.data), off+len(b))]; !bytes.Equal(b[:n], want) || (n < len(b)) != (err == io.EOF) && off < len(m.data) {
					t.Fatalf("seed %d step %d: %d bytes at %d differ, %v", seed, i, len(b), off, err)
				}
			}
			if i%20 == 0 && !bytes.Equal(content0(t, f), m.data) {
				t.Fatalf("seed %d step %d: the content differs from the model", seed, i)
			}
		}
		f.Close()
	}
}

// TestOnDisk reads the format with the cipher alone, as doc/disk-format.md
// describes it.
func TestOnDisk(t *testing.T) {
	path, k := filepath.Join(t.TempDir(), "vm.nvram"), newKey(t)
	f := create(t, path, k)
	data := bytes.Repeat([]byte("known plaintext "), 1000) // 16,000 bytes: 4 units, the last not full
	if _, err := f.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(raw) != 8192+4*4096 || bytes.Contains(raw, []byte("plaintext")) {
		t.Errorf("%d bytes on disk, or plaintext among them", len(raw))
	}
	c, err := xts.New(k)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Wipe()
	// The last sectors of the last unit were never written: holes.
	last := 8192 + 3*4096 + (16000-3*4096+511)&^511
	if !bytes.Equal(raw[last:], make([]byte, len(raw)-last)) {
		t.Error("sectors behind the end are no holes")
	}
	got := bytes.Clone(raw[8192:last])
	c.Decrypt(got[:3*4096], got[:3*4096], 0)
	c.DecryptAt(got[3*4096:], got[3*4096:], 3, 0)
	if !bytes.Equal(got[:16000], data) {
		t.Error("the units do not decrypt as specified")
	}
}

func TestFaults(t *testing.T) {
	dir, k := t.TempDir(), newKey(t)
	path := filepath.Join(dir, "vm.nvram")
	f := create(t, path, k)
	if _, err := f.WriteAt(make([]byte, 20000), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, k, false); !errors.Is(err, ErrInUse) {
		t.Errorf("a second open: %v, want ErrInUse", err)
	}
	if _, err := Open(path, k, true); !errors.Is(err, ErrInUse) {
		t.Errorf("a second open to read: %v, want ErrInUse", err)
	}
	if err := Verify(path, k); err != nil {
		t.Errorf("Verify of an open file: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a write after Close: %v", err)
	}
	if _, err := Create(path, k); !errors.Is(err, os.ErrExist) {
		t.Errorf("creating over a file: %v", err)
	}
	good, _ := os.ReadFile(path)
	var tampered *keysafe.TamperedError
	for name, c := range map[string]struct {
		raw []byte
		key *secret.Key
		as  any // target of errors.As, or nil for ErrNotEncrypted
	}{
		"another VM's key":  {good, newKey(t), &tampered},
		"cut by a unit":     {good[:len(good)-4096], k, &tampered},
		"cut by a byte":     {good[:len(good)-1], k, &tampered},
		"cut to headers":    {good[:8192], k, &tampered},
		"headers edited":    {edit(edit(good, 48), 4096+48), k, &tampered},
		"no header":         {append(make([]byte, 8192), good[8192:]...), k, nil},
		"empty":             {nil, k, nil},
		"a file in clear":   {bytes.Repeat([]byte("clear"), 5000), k, nil},
		"cut into a header": {good[:2000], k, &tampered},
	} {
		if err := os.WriteFile(path, c.raw, 0o600); err != nil {
			t.Fatal(err)
		}
		for what, err := range map[string]error{"Open": second(Open(path, c.key, false)), "Verify": Verify(path, c.key)} {
			if c.as == nil && !errors.Is(err, ErrNotEncrypted) || c.as != nil && !errors.As(err, c.as) || !strings.Contains(fmt.Sprint(err), path) {
				t.Errorf("%s: %s: %v", name, what, err)
			}
		}
		if now, _ := os.ReadFile(path); !bytes.Equal(now, c.raw) {
			t.Errorf("%s: the file was changed", name)
		}
	}
	// One bad header block leaves the other.
	for _, at := range []int{48, 4096 + 48} {
		if err := os.WriteFile(path, edit(good, at), 0o600); err != nil {
			t.Fatal(err)
		}
		if f, err := Open(path, k, false); err == nil {
			f.Close()
		} else if !errors.As(err, &tampered) {
			t.Errorf("one header edited: %v", err)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	ro, err := Open(path, k, true)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if _, err := ro.WriteAt([]byte("x"), 0); err == nil {
		t.Error("wrote to a file opened to read")
	}
	if err := ro.Truncate(0); err == nil {
		t.Error("cut a file opened to read")
	}
	if err := os.Symlink(path, filepath.Join(dir, "link.nvram")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "link.nvram"), k, true); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a symbolic link: %v", err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo.nvram"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "fifo.nvram"), k, false); !errors.Is(err, ErrNotEncrypted) {
		t.Errorf("a FIFO: %v", err)
	}
	if _, err := Create(filepath.Join(dir, "x"), ro32(t)); err == nil {
		t.Error("a key of 32 bytes was used")
	}
}

func edit(b []byte, at int) []byte { c := bytes.Clone(b); c[at] ^= 1; return c }

func second(f *File, err error) error {
	if f != nil {
		f.Close()
	}
	return err
}

func ro32(t *testing.T) *secret.Key {
	k, err := secret.Random(nil, 32)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func TestLimits(t *testing.T) {
	f := create(t, filepath.Join(t.TempDir(), "f"), newKey(t))
	for _, off := range []int64{-1, MaxLength, 1<<63 - 1} {
		if _, err := f.WriteAt([]byte("x"), off); !errors.Is(err, unix.EFBIG) {
			t.Errorf("a write at %d: %v", off, err)
		}
	}
	for _, n := range []int64{-1, MaxLength + 1} {
		if err := f.Truncate(n); !errors.Is(err, unix.EFBIG) {
			t.Errorf("length %d: %v", n, err)
		}
	}
	if _, err := f.ReadAt(make([]byte, 1), -1); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a read at -1: %v", err)
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); err != io.EOF {
		t.Errorf("a read of an empty file: %v", err)
	}
	// A huge sparse file costs nothing and reads as zeros.
	if err := f.Truncate(1 << 40); err != nil {
		t.Fatal(err)
	}
	b := bytes.Repeat([]byte{1}, 3<<20)
	if n, err := f.ReadAt(b, 1<<39); n != len(b) || err != nil || !bytes.Equal(b, make([]byte, len(b))) {
		t.Errorf("a hole reads otherwise: %v", err)
	}
}

// TestDiskFull: a write that does not fit fails, and what was there stays.
func TestDiskFull(t *testing.T) {
	dir := smallDisk(t, "256k")
	k := newKey(t)
	f := create(t, filepath.Join(dir, "vm.nvram"), k)
	old := bytes.Repeat([]byte("old "), 25000)
	if _, err := f.WriteAt(old, 0); err != nil {
		t.Fatal(err)
	}
	n, err := f.WriteAt(make([]byte, 3<<20), int64(len(old)))
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("3 MiB on 256 KiB: %v", err)
	}
	if f.Size() != int64(len(old)+n) {
		t.Errorf("length %d after a write of %d that failed", f.Size(), n)
	}
	if err := f.Truncate(int64(len(old))); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil || !bytes.Equal(content0(t, f), old) {
		t.Errorf("the content is damaged (%v)", err)
	}
	src := filepath.Join(t.TempDir(), "src")
	if err := os.WriteFile(src, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Convert(filepath.Join(dir, "new"), k, src, nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("converting 1 MiB onto 256 KiB: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed conversion left a file: %v", err)
	}
}

func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("mounting a tmpfs needs root: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestConvert(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	a, b := newKey(t), newKey(t)
	data := make([]byte, 3<<20+12345)
	rand.New(rand.NewSource(1)).Read(data)
	if err := os.WriteFile(at("clear"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		dst      string
		to       *secret.Key
		src      string
		from     *secret.Key
		contains bool
	}{{"a", a, "clear", nil, false}, {"b", b, "a", a, false}, {"b", b, "a", a, false}, {"clear2", nil, "b", b, true}} {
		if err := Convert(at(c.dst), c.to, at(c.src), c.from); err != nil {
			t.Fatalf("%s to %s: %v", c.src, c.dst, err)
		}
		raw, _ := os.ReadFile(at(c.dst))
		if bytes.Contains(raw, data[4096:4096+32]) != c.contains {
			t.Errorf("%s holds plaintext, or not, wrongly", c.dst)
		}
	}
	if got, _ := os.ReadFile(at("clear2")); !bytes.Equal(got, data) {
		t.Error("the content changed on its way")
	}
	if err := Convert(at("c"), b, at("a"), b); err == nil {
		t.Error("converted with the wrong key")
	}
	if err := Convert(at("c"), b, at("clear"), a); !errors.Is(err, ErrNotEncrypted) {
		t.Errorf("a clear file as an encrypted one: %v", err)
	}
	if err := Convert(at("c"), nil, at("none"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an absent file: %v", err)
	}
	if _, err := os.Stat(at("c")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed conversion left a file: %v", err)
	}
}

func FuzzHeader(f *testing.F) {
	k, err := secret.Take(bytes.Repeat([]byte{7}, 64))
	if err != nil {
		f.Fatal(err)
	}
	mac, err := keysafe.NewMAC(k, MACInfo)
	if err != nil {
		f.Fatal(err)
	}
	for _, h := range []header{{settled, 1, 0}, {provisional, 1 << 60, MaxLength}, {3, 1, 1}, {settled, 0, 1}, {settled, 1, -1}} {
		f.Add(h.encode(mac)[:macOffset])
	}
	f.Add([]byte(headerMagic))
	f.Fuzz(func(t *testing.T, fields []byte) {
		// The MAC is right for any fields: what it covers must be checked too.
		b := make([]byte, blockSize)
		copy(b[:macOffset], fields)
		sum := mac.Sum(keysafe.Line{Name: "header", Value: string(b[:macOffset])})
		copy(b[macOffset:], sum[:])
		h, err := decodeHeader(b, mac)
		if err == nil && !bytes.Equal(h.encode(mac), b) {
			t.Fatalf("%x decodes to %+v and encodes otherwise", fields, h)
		}
	})
}
