package cli

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// diskFile makes a file of size bytes with data at some offsets.
func diskFile(t testing.TB, size int64, data map[int64][]byte) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for at, b := range data {
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// readBack puts a disk together from what a sparseReader yields, and checks that
// it yields in order, in whole blocks, and no zeros.
func readBack(t testing.TB, s *source) (disk []byte, sent int64) {
	t.Helper()
	disk = make([]byte, s.size)
	r := newSparseReader(s)
	last := int64(0)
	for {
		at, data, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if at < last || len(data) == 0 || len(data) > chunk || at+int64(len(data)) > s.size {
			t.Fatalf("%d bytes at %d, after %d, on a disk of %d", len(data), at, last, s.size)
		}
		if end := at + int64(len(data)); at%zeroBlock != 0 && !runBorder(s, at) || end%zeroBlock != 0 && !runBorder(s, end) {
			t.Fatalf("%d bytes at %d cut a block", len(data), at)
		}
		if bytes.Count(data, []byte{0}) == len(data) {
			t.Fatalf("%d zeros at %d were sent", len(data), at)
		}
		copy(disk[at:], data)
		last = at + int64(len(data))
		sent += int64(len(data))
	}
	total, err := s.dataBytes()
	if err != nil {
		t.Fatal(err)
	}
	if r.seen != total {
		t.Errorf("looked at %d bytes, and counted %d before", r.seen, total)
	}
	return disk, sent
}

// runBorder tells whether a run begins or ends at a place on the disk.
func runBorder(s *source, at int64) bool {
	for _, r := range s.runs {
		if at == r.at || at == r.at+r.length {
			return true
		}
	}
	return false
}

func TestSparseReader(t *testing.T) {
	x := bytes.Repeat([]byte("x"), 3*chunk)
	for name, c := range map[string]struct {
		size     int64
		data     map[int64][]byte
		sent     int64 // bytes
		withHole bool
	}{
		"nothing":             {size: 1 << 20, sent: 0},
		"one byte":            {size: 1 << 20, data: map[int64][]byte{70001: {1}}, sent: zeroBlock},
		"the last byte":       {size: 1<<20 + 512, data: map[int64][]byte{1<<20 + 511: {1}}, sent: 512},
		"written zeros":       {size: 1 << 20, data: map[int64][]byte{0: make([]byte, 1<<20)}, sent: 0},
		"zeros between data":  {size: 1 << 20, data: map[int64][]byte{0: append(append(append([]byte{}, x[:8192]...), make([]byte, 40960)...), 1)}, sent: 8192 + zeroBlock},
		"more than one chunk": {size: 5 << 20, data: map[int64][]byte{1000: x}, sent: 3*chunk + zeroBlock},
		"full":                {size: 3 * chunk, data: map[int64][]byte{0: x}, sent: 3 * chunk},
	} {
		t.Run(name, func(t *testing.T) {
			f := diskFile(t, c.size, c.data)
			s, err := rawSource("disk", "raw", f)
			if err != nil {
				t.Fatal(err)
			}
			disk, sent := readBack(t, s)
			want, _ := os.ReadFile(f.Name())
			if !bytes.Equal(disk, want) {
				t.Error("the content is not what it was")
			}
			if sent != c.sent {
				t.Errorf("%d bytes were sent, want %d", sent, c.sent)
			}
		})
	}
}

// TestSparseRuns reads a disk that is spread over runs at odd places of files.
func TestSparseRuns(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		s := &source{name: "disk"}
		var want []byte
		for range 1 + rng.IntN(4) {
			length := int64(512 * (1 + rng.IntN(5000)))
			offset := int64(512 * rng.IntN(100))
			content := make([]byte, length)
			for range rng.IntN(6) {
				at := rng.IntN(len(content))
				for i := at; i < min(len(content), at+rng.IntN(300_000)); i++ {
					content[i] = byte(i) | 1
				}
			}
			f := diskFile(t, offset+length+int64(rng.IntN(2000)), nil)
			for at := 0; at < len(content); at += 65536 { // holes stay holes
				if b := content[at:min(at+65536, len(content))]; bytes.Count(b, []byte{0}) < len(b) {
					if _, err := f.WriteAt(b, offset+int64(at)); err != nil {
						t.Fatal(err)
					}
				}
			}
			s.runs = append(s.runs, run{file: f, offset: offset, at: s.size, length: length})
			s.size += length
			want = append(want, content...)
		}
		if disk, _ := readBack(t, s); !bytes.Equal(disk, want) {
			t.Fatal("the content is not what it was")
		}
	}
}

// TestSparseShrinks: a file that becomes shorter under the reader is an error,
// not a disk of zeros.
func TestSparseShrinks(t *testing.T) {
	for name, left := range map[string]int64{"to nothing": 0, "by half": 1 << 20} {
		t.Run(name, func(t *testing.T) {
			f := diskFile(t, 2<<20, map[int64][]byte{0: bytes.Repeat([]byte("x"), 2<<20)})
			s, err := rawSource("disk", "raw", f)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Truncate(left); err != nil {
				t.Fatal(err)
			}
			r := newSparseReader(s)
			for err == nil {
				_, _, err = r.Next()
			}
			if err == io.EOF || !bytes.Contains([]byte(err.Error()), []byte("became shorter")) {
				t.Errorf("reading a file that shrank: %v", err)
			}
		})
	}
}

func TestRawSource(t *testing.T) {
	if _, err := rawSource("disk", "raw", diskFile(t, 0, nil)); err == nil {
		t.Error("an empty file is a disk")
	}
	s, err := rawSource("disk", "raw", diskFile(t, 1000, map[int64][]byte{999: {7}}))
	if err != nil || s.size != 1024 {
		t.Fatalf("size %d, %v", s.size, err)
	}
	if disk, _ := readBack(t, s); disk[999] != 7 || len(disk) != 1024 {
		t.Error("a size that is no multiple of a sector loses data")
	}
}

// TestUnlinkedFile: what is written to a temporary file is under no name.
func TestUnlinkedFile(t *testing.T) {
	dir := t.TempDir()
	f, err := unlinkedFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("plaintext"); err != nil {
		t.Fatal(err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 0 {
		t.Errorf("the folder holds %v, %v", list, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Nlink != 0 || st.Mode&0o077 != 0 {
		t.Errorf("it has %d names and mode %o, %v", st.Nlink, st.Mode, err)
	}
	if _, err := unlinkedFile(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("in a folder that is not there: %v", err)
	}
}

func FuzzPrefix(f *testing.F) {
	f.Add([]byte("\x00\x00x"), int64(4095))
	f.Add(append(make([]byte, 4096), 1), int64(0))
	f.Fuzz(func(t *testing.T, b []byte, at int64) {
		if at < 0 || at > 1<<50 {
			return
		}
		for zero, pos := true, 0; pos < len(b); zero = !zero {
			n := prefix(b[pos:], at+int64(pos), zero)
			if again := prefix(b[pos:], at+int64(pos), !zero); (n == 0) == (again == 0) {
				t.Fatalf("at %d: %d zero and %d other bytes", pos, n, again)
			}
			if zero && bytes.Count(b[pos:pos+n], []byte{0}) != n {
				t.Fatalf("data at %d was left out", pos)
			}
			pos += n
		}
	})
}
