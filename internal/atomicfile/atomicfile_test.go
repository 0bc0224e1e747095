package atomicfile

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWriteReplacesWholeAndKeepsMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.vmx")
	if err := Write(path, []byte("one"), 0o640); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(path); st.Mode().Perm() != 0o640 {
		t.Errorf("a new file has mode %v", st.Mode())
	}
	if err := os.Chmod(path, 0o604); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 {
		if err := os.Chown(path, 1234, 1235); err != nil {
			t.Fatal(err)
		}
	}
	held, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := Write(path, []byte("second"), 0o640); err != nil {
		t.Fatal(err)
	}
	if b, err := Read(path, 6); err != nil || string(b) != "second" {
		t.Errorf("read %q, %v", b, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o777 != 0o604 || os.Getuid() == 0 && (st.Uid != 1234 || st.Gid != 1235) {
		t.Errorf("mode %o, owner %d:%d not kept", st.Mode&0o777, st.Uid, st.Gid)
	}
	old := make([]byte, 9)
	if n, _ := held.Read(old); string(old[:n]) != "one" {
		t.Errorf("who had the file open reads %q", old[:n])
	}
	onlyFile(t, path)
}

// onlyFile checks that no temporary file is left beside path.
func onlyFile(t *testing.T, path string) {
	t.Helper()
	es, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(es) != 1 || es[0].Name() != filepath.Base(path) {
		t.Errorf("folder holds %v (%v)", es, err)
	}
}

// TestDiskFull replaces a file on a full file system: the old content stays.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("mounting a tmpfs needs root: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "vm.vmdk")
	if err := Write(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), path) {
		t.Errorf("on a full disk: %v", err)
	}
	if b, err := Read(path, 100); err != nil || string(b) != "old" {
		t.Errorf("the old content is %q (%v)", b, err)
	}
	onlyFile(t, path)
}

func TestConcurrentWritesLeaveOneWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 5 {
				if err := Write(path, bytes.Repeat([]byte{byte('a' + i)}, 10000+i), 0o600); err != nil {
					t.Error(err)
				}
				b, err := Read(path, 20000)
				if err != nil || len(b) != 10000+int(b[0]-'a') || len(bytes.Trim(b, string(b[:1]))) != 0 {
					t.Errorf("read %d bytes of mixed content (%v)", len(b), err)
				}
			}
		})
	}
	wg.Wait()
	onlyFile(t, path)
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "big"), make([]byte, 101), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(filepath.Join(dir, "big"), 100); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a file over the limit: %v", err)
	}
	for _, name := range []string{"fifo", ""} {
		if _, err := Read(filepath.Join(dir, name), 100); err == nil || !strings.Contains(err.Error(), "regular file") {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := Read("/dev/zero", 100); err == nil {
		t.Error("read a device")
	}
	if _, err := Read(filepath.Join(dir, "none"), 100); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an absent file: %v", err)
	}
}
