package vmfiles

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"mortise/internal/secret"
)

// marker is plaintext that must never be on the datastore.
const marker = "KNOWN-PLAINTEXT-MARKER"

// A fixture is a VM's folder, its keys and where its view is mounted.
type fixture struct {
	t      *testing.T
	folder string
	at     string // mount point
	log    bytes.Buffer
	logMu  sync.Mutex
	keys   map[string]*secret.Key // what is persisted
	v      *View
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Getuid() != 0 {
		t.Skip("mounting FUSE needs root and /dev/fuse")
	}
	dir := t.TempDir()
	x := &fixture{t: t, folder: filepath.Join(dir, "vm"), at: filepath.Join(dir, "run", "files"), keys: map[string]*secret.Key{}}
	if err := os.Mkdir(x.folder, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if x.v != nil {
			x.v.Close()
		}
		for unix.Unmount(x.at, unix.MNT_DETACH) == nil {
		}
		for _, k := range x.keys {
			k.Wipe()
		}
	})
	return x
}

func (x *fixture) Write(p []byte) (int, error) {
	x.logMu.Lock()
	defer x.logMu.Unlock()
	return x.log.Write(p)
}

func (x *fixture) options() Options {
	return Options{Folder: x.folder, Mount: x.at, Keys: x.keys, NewKey: func(name string) (*secret.Key, error) {
		// No byte of the file may be there before its key is safe.
		if _, err := os.Lstat(filepath.Join(x.folder, name)); !errors.Is(err, os.ErrNotExist) && x.keys[name] == nil {
			x.t.Errorf("%s was there before its key (%v)", name, err)
		}
		k, err := secret.Random(nil, 64)
		if err != nil {
			return nil, err
		}
		x.keys[name] = k
		return k.Clone()
	}, Log: slog.New(slog.NewTextHandler(x, nil))}
}

func (x *fixture) mount() {
	x.t.Helper()
	v, err := Mount(x.options())
	if err != nil {
		x.t.Fatal(err)
	}
	x.v = v
}

func (x *fixture) close() {
	x.t.Helper()
	if err := x.v.Close(); err != nil {
		x.t.Fatal(err)
	}
	x.v = nil
}

func (x *fixture) in(name string) string { return filepath.Join(x.at, name) }

// noPlaintext reads everything in the VM's folder.
func (x *fixture) noPlaintext(needles ...string) {
	x.t.Helper()
	err := filepath.WalkDir(x.folder, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		for _, n := range append(needles, marker) {
			if bytes.Contains(raw, []byte(n)) {
				x.t.Errorf("%q is in clear in %s", n, path)
			}
		}
		return err
	})
	if err != nil {
		x.t.Error(err)
	}
}

func (x *fixture) run(name string, args ...string) string {
	x.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		x.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestViewAgainstModel does random I/O through the kernel, mounting again between.
func TestViewAgainstModel(t *testing.T) {
	x, m, r := newFixture(t), &model{}, rand.New(rand.NewSource(1))
	x.mount()
	f, err := os.OpenFile(x.in("vm.nvram"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { f.Close() }()
	for i := range 600 {
		switch r.Intn(10) {
		case 0:
			n := r.Intn(300000)
			if err := f.Truncate(int64(n)); err != nil {
				t.Fatal(err)
			}
			m.truncate(n)
		case 1:
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		case 2, 3, 4:
			b := make([]byte, r.Intn(200000))
			off := r.Intn(len(m.data) + 100)
			n, err := f.ReadAt(b, int64(off))
			want := m.data[min(off, len(m.data)):min(off+len(b), len(m.data))]
			if err != nil && err != io.EOF || !bytes.Equal(b[:n], want) {
				t.Fatalf("step %d: %d bytes at %d differ from the model (%v)", i, len(b), off, err)
			}
		default:
			p, off := bytes.Repeat([]byte(marker), 1+r.Intn(6000)), r.Intn(200000)
			if r.Intn(2) == 0 {
				p = p[:1+r.Intn(600)]
			}
			if n, err := f.WriteAt(p, int64(off)); err != nil || n != len(p) {
				t.Fatal(n, err)
			}
			m.write(p, off)
		}
		if st, err := f.Stat(); err != nil || st.Size() != int64(len(m.data)) {
			t.Fatalf("step %d: size %d, want %d (%v)", i, st.Size(), len(m.data), err)
		}
		if i%200 == 199 {
			f.Close()
			x.close()
			x.noPlaintext()
			x.mount()
			if f, err = os.OpenFile(x.in("vm.nvram"), os.O_RDWR, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got, err := os.ReadFile(x.in("vm.nvram")); err != nil || !bytes.Equal(got, m.data) {
		t.Errorf("the content differs from the model (%v)", err)
	}
	if x.log.Len() > 0 {
		t.Errorf("logged: %s", x.log.String())
	}
}

// TestProgramsUseTheView lets dd, cp, qemu-img and qemu-io at it.
func TestProgramsUseTheView(t *testing.T) {
	x := newFixture(t)
	x.mount()
	src := filepath.Join(t.TempDir(), "src")
	data := bytes.Repeat([]byte(marker+"\n"), 30000)
	if err := os.WriteFile(src, data, 0o600); err != nil {
		t.Fatal(err)
	}
	x.run("cp", src, x.in("vm.nvram"))
	x.run("cmp", src, x.in("vm.nvram"))
	x.run("dd", "if="+src, "of="+x.in("vm.vmss"), "bs=3000", "conv=fsync")
	x.run("dd", "if="+src, "of="+x.in("vm.vmss"), "bs=1000", "seek=7", "skip=7", "count=5", "conv=notrunc")
	x.run("dd", "if="+src, "of="+x.in("vm.vmss"), "bs=4096", "oflag=direct", "count=8", "conv=notrunc")
	x.run("cmp", src, x.in("vm.vmss"))
	x.run("sh", "-c", `head -c 100000 "$1" > "$2" && tail -c +100001 "$1" >> "$2"`, "sh", src, x.in("vm.vmsn"))
	x.run("cmp", src, x.in("vm.vmsn"))
	x.run("qemu-img", "create", "-q", "-f", "qcow2", x.in("vm.vmem"), "8M")
	x.run("qemu-io", "-c", "write -P 0x5a 64k 1M", "-c", "write -P 0xa5 4M 512k", "-c", "flush", x.in("vm.vmem"))
	x.run("qemu-io", "-t", "none", "-c", "read -P 0x5a 64k 1M", "-c", "read -P 0xa5 4M 512k", "-c", "read -P 0 6M 64k", x.in("vm.vmem"))
	x.run("qemu-img", "check", x.in("vm.vmem"))
	x.run("qemu-img", "convert", "-O", "raw", x.in("vm.vmem"), src+".raw")
	if st, err := os.Stat(src + ".raw"); err != nil || st.Size() != 8<<20 {
		t.Errorf("converted to %v (%v)", st, err)
	}
	if out := strings.Fields(x.run("ls", x.at)); !slices.Equal(out, []string{"vm.nvram", "vm.vmem", "vm.vmsn", "vm.vmss"}) {
		t.Errorf("the view holds %v", out)
	}
	x.close()
	x.noPlaintext(strings.Repeat("\x5a", 64), "QFI\xfb")
	x.mount()
	x.run("cmp", src, x.in("vm.nvram"))
	x.run("qemu-io", "-r", "-c", "read -P 0x5a 64k 1M", x.in("vm.vmem"))
}

// TestReplaceAsLibvirt replaces a file as libvirt's virFileRewrite does: a new
// file beside it, fsync, rename.
func TestReplaceAsLibvirt(t *testing.T) {
	x := newFixture(t)
	x.mount()
	for i := range 3 {
		want := []byte(fmt.Sprint(marker, i))
		f, err := os.OpenFile(x.in("vm.nvram.new"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write(want)
		if err = errors.Join(err, f.Chmod(0o600), f.Chown(0, 0), f.Sync(), os.Rename(f.Name(), x.in("vm.nvram"))); err != nil {
			t.Fatal(err)
		}
		// The program goes on with the file that it renamed.
		if _, err := f.WriteAt([]byte("!"), int64(len(want))); err != nil {
			t.Error(err)
		}
		f.Close()
		if got, err := os.ReadFile(x.in("vm.nvram")); err != nil || string(got) != string(want)+"!" {
			t.Errorf("round %d: %q (%v)", i, got, err)
		}
		if _, err := os.Stat(x.in("vm.nvram.new")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the old name is still there: %v", err)
		}
		x.close()
		x.noPlaintext()
		if err := Verify(filepath.Join(x.folder, "vm.nvram"), x.keys["vm.nvram"]); err != nil {
			t.Errorf("the file is not under its own name's key: %v", err)
		}
		x.mount()
	}
	// A copy that a crash left is cleared away.
	if err := os.WriteFile(filepath.Join(x.folder, renamePrefix+"vm.nvram"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	x.close()
	x.mount()
	if es, _ := os.ReadDir(x.folder); len(es) != 1 {
		t.Errorf("the folder holds %v", es)
	}
}

func TestNamespace(t *testing.T) {
	x := newFixture(t)
	x.mount()
	write := func(name, s string) {
		t.Helper()
		if err := os.WriteFile(x.in(name), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(x.in(name))
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	write("a.vmem", "A")
	write("b.vmem", "B")
	open, err := os.OpenFile(x.in("b.vmem"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := unix.Renameat2(unix.AT_FDCWD, x.in("a.vmem"), unix.AT_FDCWD, x.in("b.vmem"), unix.RENAME_NOREPLACE); !errors.Is(err, unix.EEXIST) {
		t.Errorf("RENAME_NOREPLACE: %v", err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, x.in("a.vmem"), unix.AT_FDCWD, x.in("b.vmem"), unix.RENAME_EXCHANGE); !errors.Is(err, unix.EINVAL) {
		t.Errorf("RENAME_EXCHANGE: %v", err)
	}
	if err := os.Rename(x.in("a.vmem"), x.in("b.vmem")); err != nil || read("b.vmem") != "A" {
		t.Errorf("rename over a file: %q, %v", read("b.vmem"), err)
	}
	b := make([]byte, 1)
	if _, err := open.ReadAt(b, 0); err != nil || b[0] != 'B' {
		t.Errorf("the replaced file reads %q to who has it open (%v)", b, err)
	}
	if err := os.Remove(x.in("b.vmem")); err != nil {
		t.Error(err)
	}
	if got := read("b.vmem"); !strings.Contains(got, "no such file") {
		t.Errorf("a removed file reads %q", got)
	}
	write("b.vmem", "again")
	if read("b.vmem") != "again" {
		t.Errorf("a file made again reads %q", read("b.vmem"))
	}
	// Only names that are encrypted exist.
	for _, name := range []string{"vm.vmx", "vm.vmdk", "vmware.log", renamePrefix + "a.vmem"} {
		if err := os.WriteFile(filepath.Join(x.folder, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := read(name); !strings.Contains(got, "no such file") {
			t.Errorf("%s reads %q", name, got)
		}
		if err := os.Remove(x.in(name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("removing %s: %v", name, err)
		}
	}
	for _, name := range []string{"swap", "vm.log", "x.vmdk"} {
		if err := os.WriteFile(x.in(name), []byte("x"), 0o600); !errors.Is(err, unix.EPERM) {
			t.Errorf("making %s: %v", name, err)
		}
		if err := os.Rename(x.in("b.vmem"), x.in(name)); !errors.Is(err, unix.EPERM) {
			t.Errorf("renaming to %s: %v", name, err)
		}
	}
	for what, err := range map[string]error{
		"mkdir": os.Mkdir(x.in("d.vmem"), 0o700), "symlink": os.Symlink("b.vmem", x.in("l.vmem")), "link": os.Link(x.in("b.vmem"), x.in("l.vmem")),
		"chmod": os.Chmod(x.in("b.vmem"), 0o644), "chown": os.Chown(x.in("b.vmem"), 1, 1), "mkfifo": unix.Mkfifo(x.in("f.vmem"), 0o600), "rmdir": unix.Rmdir(x.in("b.vmem")),
	} {
		if err == nil {
			t.Errorf("%s succeeded", what)
		}
	}
	if st, err := os.Stat(x.in("b.vmem")); err != nil || st.Mode() != 0o600 {
		t.Errorf("mode %v (%v)", st.Mode(), err)
	}
	f, err := os.OpenFile(x.in("b.vmem"), os.O_RDWR|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 10, 90); err != nil {
		t.Errorf("fallocate: %v", err)
	}
	f.Close()
	if got := read("b.vmem"); got != strings.Repeat("\x00", 100) {
		t.Errorf("truncated and allocated it reads %q", got)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(x.at, &st); err != nil || st.Blocks == 0 {
		t.Errorf("statfs: %v", err)
	}
}

// TestFilesPutThere: what is not the VM's own encrypted file is an error and not
// data (rule E8), and the log says why.
func TestFilesPutThere(t *testing.T) {
	x := newFixture(t)
	x.mount()
	if err := os.WriteFile(x.in("vm.nvram"), bytes.Repeat([]byte(marker), 500), 0o600); err != nil {
		t.Fatal(err)
	}
	x.close()
	path := filepath.Join(x.folder, "vm.nvram")
	good, _ := os.ReadFile(path)
	for name, c := range map[string]struct {
		raw []byte
		say string
	}{
		"a clear file":  {bytes.Repeat([]byte("evil"), 3000), "not an encrypted file"},
		"a cut file":    {good[:len(good)-4096], "was cut"},
		"edited header": {edit(edit(good, 50), 4096+50), "does not match"},
	} {
		if err := os.WriteFile(path, c.raw, 0o600); err != nil {
			t.Fatal(err)
		}
		x.log.Reset()
		x.mount()
		if b, err := os.ReadFile(x.in("vm.nvram")); !errors.Is(err, unix.EIO) {
			t.Errorf("%s reads %q (%v)", name, b, err)
		}
		if err := os.WriteFile(x.in("vm.nvram"), []byte("x"), 0o600); !errors.Is(err, unix.EIO) {
			t.Errorf("%s is written: %v", name, err)
		}
		x.close()
		if !strings.Contains(x.log.String(), c.say) || !strings.Contains(x.log.String(), path) {
			t.Errorf("%s: log %s", name, x.log.String())
		}
	}
	// A file without a key of its own.
	if err := os.WriteFile(filepath.Join(x.folder, "other.nvram"), good, 0o600); err != nil {
		t.Fatal(err)
	}
	x.mount()
	if _, err := os.ReadFile(x.in("other.nvram")); !errors.Is(err, unix.EIO) {
		t.Errorf("a file without a key: %v", err)
	}
	x.close()
	// A key that cannot be persisted.
	o := x.options()
	o.NewKey = func(string) (*secret.Key, error) { return nil, unix.ENOSPC }
	v, err := Mount(o)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := os.WriteFile(x.in("new.vmem"), []byte("x"), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a file whose key cannot be saved: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(x.folder, "new.vmem")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is there: %v", err)
	}
}

// TestDiskFullInView: the program sees ENOSPC and the file keeps what it had.
func TestDiskFullInView(t *testing.T) {
	x := newFixture(t)
	if err := unix.Mount("tmpfs", x.folder, "tmpfs", 0, "size=512k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(x.folder, unix.MNT_DETACH)
	x.mount()
	old := bytes.Repeat([]byte("old "), 25000)
	if err := os.WriteFile(x.in("vm.nvram"), old, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(x.in("vm.vmem"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("1 MiB on 512 KiB: %v", err)
	}
	if got, err := os.ReadFile(x.in("vm.nvram")); err != nil || !bytes.Equal(got, old) {
		t.Errorf("the other file is damaged: %v", err)
	}
	x.close()
}

// TestAnotherUser: the view belongs to one user and nobody else gets in.
func TestAnotherUser(t *testing.T) {
	x := newFixture(t)
	as := func(uid uint32, args ...string) error {
		c := exec.Command(args[0], args[1:]...)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		return c.Run()
	}
	if err := os.MkdirAll(x.at, 0o755); err != nil {
		t.Fatal(err)
	}
	// The test's own folders, and not that of all tests above them.
	for p := x.at; p != filepath.Clean(os.TempDir()) && p != "/"; p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		uid     int
		mayUser bool
	}{{0, false}, {4711, true}} {
		o := x.options()
		o.UID, o.GID = c.uid, c.uid
		v, err := Mount(o)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(x.in("vm.nvram"), []byte(marker), 0o600); err != nil {
			t.Errorf("root may not write: %v", err)
		}
		if err := as(4711, "grep", "-q", marker, x.in("vm.nvram")); (err == nil) != c.mayUser {
			t.Errorf("a view of user %d, read by user 4711: %v", c.uid, err)
		}
		if err := as(4712, "cat", x.in("vm.nvram")); err == nil {
			t.Errorf("a view of user %d is read by user 4712", c.uid)
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestMountPoint: a live view is not mounted over, an unmounted one is gone, and a
// program with a file open does not stop Close.
func TestMountPoint(t *testing.T) {
	x := newFixture(t)
	x.mount()
	if _, err := Mount(x.options()); !errors.Is(err, ErrInUse) {
		t.Errorf("mounting over a live view: %v, want ErrInUse", err)
	}
	f, err := os.Create(x.in("vm.nvram"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(marker); err != nil {
		t.Fatal(err)
	}
	x.close()
	if !strings.Contains(x.log.String(), "has them open") {
		t.Errorf("log %s", x.log.String())
	}
	if _, err := f.WriteString("x"); err == nil {
		t.Error("a write after Close succeeded")
	}
	f.Close()
	if es, err := os.ReadDir(x.at); err != nil || len(es) != 0 {
		t.Errorf("the mount point holds %v (%v)", es, err)
	}
	x.mount()
	if b, err := os.ReadFile(x.in("vm.nvram")); string(b) != marker {
		t.Errorf("read %q (%v)", b, err)
	}
	o := x.options()
	o.Folder = filepath.Join(x.folder, "none")
	if _, err := Mount(o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an absent folder: %v", err)
	}
}
