package storage

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	trialPrefix = ".mortise-probe-"
	trialSize   = 1 << 20
	// trialLife is after what time a file that a killed probe left may be removed.
	trialLife = time.Hour
)

// try tries out in a file what disks will need.
func (r *Report) try() (err error) {
	removeRemains(r.Path)
	f, err := os.CreateTemp(r.Path, trialPrefix)
	if err != nil {
		return err
	}
	name := f.Name()
	defer func() { err = errors.Join(err, f.Close(), os.Remove(name)) }()
	content := make([]byte, trialSize)
	_, _ = rand.Read(content) // never fails
	if _, err := f.Write(content); err != nil {
		return fmt.Errorf("writing %d bytes: %w", trialSize, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("fsync of a file: %w", err)
	}
	for _, trial := range []func(*os.File, []byte) error{
		r.tryLocks, r.tryDirect, r.tryDSync, r.tryHoles, r.tryZero, r.tryReserve, r.tryLength, r.tryRename,
	} {
		if err := trial(f, content); err != nil {
			return err
		}
	}
	return nil
}

// removeRemains removes what a probe left that was killed. If it cannot, somebody
// else's probe runs or the folder is not ours, and the next steps tell.
func removeRemains(dir string) {
	old, _ := filepath.Glob(filepath.Join(dir, trialPrefix+"*")) // fails only for a bad pattern
	for _, name := range old {
		if st, err := os.Lstat(name); err == nil && st.Mode().IsRegular() && time.Since(st.ModTime()) > trialLife {
			_ = os.Remove(name)
		}
	}
}

// lock takes the lock of a whole open file, as vdisk does for extents (OFD locks,
// fcntl(2)).
func lock(f *os.File, kind int16) error {
	lk := unix.Flock_t{Type: kind, Whence: io.SeekStart}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
}

func (r *Report) tryLocks(f *os.File, _ []byte) error {
	const why, fix = "two VMs could write to one disk, and destroy it", "choose ext4, XFS or NFSv4"
	if err := lock(f, unix.F_WRLCK); err != nil {
		r.unsafe("it has no locks ("+err.Error()+")", why, fix)
		return nil
	}
	other, err := os.OpenFile(f.Name(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer other.Close()
	for _, kind := range []int16{unix.F_RDLCK, unix.F_WRLCK} {
		if err := lock(other, kind); err == nil {
			r.unsafe("its locks keep nobody out", why, fix)
			return nil
		}
	}
	if err := lock(f, unix.F_UNLCK); err != nil {
		return fmt.Errorf("releasing a lock: %w", err)
	}
	if err := lock(other, unix.F_WRLCK); err != nil {
		r.unsafe("a lock stays when it is released ("+err.Error()+")", "a disk could not be opened again", fix)
		return nil
	}
	r.Locks = true
	return nil
}

// tryDirect asks for the alignment of direct I/O, and tries where the kernel or the
// file system does not tell (Linux before 6.1, NFS).
func (r *Report) tryDirect(f *os.File, content []byte) error {
	d, err := os.OpenFile(f.Name(), os.O_RDWR|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	var st unix.Statx_t
	err = unix.Statx(int(d.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN|unix.STATX_WRITE_ATOMIC, &st)
	if err == nil && st.Mask&unix.STATX_WRITE_ATOMIC != 0 {
		r.Atomic = int64(st.Atomic_write_unit_max)
	}
	known := err == nil && st.Mask&unix.STATX_DIOALIGN != 0
	if known && st.Dio_offset_align == 0 {
		return nil // the file system says that it has none
	}
	candidates := []int64{512, 1024, 2048, 4096, 8192, 16384, 32768, 65536}
	if known {
		candidates = []int64{int64(max(st.Dio_mem_align, st.Dio_offset_align))}
	}
	for _, align := range candidates {
		if !directWorks(d, content, align) {
			continue
		}
		r.Direct = Direct{Memory: align, Offset: align}
		if known {
			r.Direct = Direct{Memory: int64(st.Dio_mem_align), Offset: int64(st.Dio_offset_align)}
		}
		return nil
	}
	return nil
}

// directWorks writes and reads one aligned piece at an aligned place.
func directWorks(d *os.File, content []byte, align int64) bool {
	raw := make([]byte, 2*65536+align)
	skip := -int64(uintptr(unsafe.Pointer(unsafe.SliceData(raw)))) & (65536 - 1)
	// Aligned to align and to nothing more.
	buf := raw[skip+align : skip+2*align : skip+2*align]
	copy(buf, content[align:])
	if _, err := d.WriteAt(buf, align); err != nil {
		return false
	}
	clear(buf)
	if _, err := d.ReadAt(buf, align); err != nil {
		return false
	}
	return bytes.Equal(buf, content[align:2*align])
}

func (r *Report) tryDSync(f *os.File, content []byte) error {
	n, err := unix.Pwritev2(int(f.Fd()), [][]byte{content[:4096]}, 0, unix.RWF_DSYNC)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil
	}
	if err != nil || n != 4096 {
		return fmt.Errorf("a durable write of 4096 bytes wrote %d: %w", n, err)
	}
	r.DSync = true
	return nil
}

// tryHoles makes a hole and looks for it.
func (r *Report) tryHoles(f *os.File, content []byte) error {
	const off, n = 256 << 10, 256 << 10
	fd := int(f.Fd())
	var before, after unix.Stat_t
	if err := unix.Fstat(fd, &before); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		r.warn("it cannot make holes", "space that a guest gives back stays in use", "choose ext4, XFS or NFS 4.2")
		return nil
	}
	if err != nil {
		return fmt.Errorf("making a hole: %w", err)
	}
	got := make([]byte, n+512)
	if _, err := f.ReadAt(got, off); err != nil {
		return fmt.Errorf("reading a hole: %w", err)
	}
	if !bytes.Equal(got[:n], make([]byte, n)) || !bytes.Equal(got[n:], content[off+n:off+n+512]) {
		r.unsafe("a hole does not read as zeros", "guests would see data that they have deleted", "choose ext4, XFS or NFS 4.2")
		return nil
	}
	if err := errors.Join(f.Sync(), unix.Fstat(fd, &after)); err != nil {
		return fmt.Errorf("fsync of a file with a hole: %w", err)
	}
	r.Punch = after.Blocks < before.Blocks || r.Network // a server's count may be late
	at, err := unix.Seek(fd, 0, unix.SEEK_HOLE)
	r.Sparse = err == nil && at == off
	return nil
}

func (r *Report) tryZero(f *os.File, _ []byte) error {
	const off, n = 640 << 10, 64 << 10
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n); err != nil {
		return nil // vdisk writes zeros
	}
	got := make([]byte, n)
	if _, err := f.ReadAt(got, off); err != nil {
		return fmt.Errorf("reading zeros: %w", err)
	}
	r.Zero = bytes.Equal(got, make([]byte, n))
	return nil
}

func (r *Report) tryReserve(f *os.File, _ []byte) error {
	err := unix.Fallocate(int(f.Fd()), 0, 0, 2*trialSize)
	r.Reserve = err == nil
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("reserving %d bytes: %w", 2*trialSize, err)
	}
	return nil
}

// tryLength finds how long a file, and so a disk, may be.
func (r *Report) tryLength(f *os.File, _ []byte) error {
	for _, n := range []int64{62 << 40, 16<<40 - 4096, 8 << 40, 2<<40 - 4096, 64 << 30, 4<<30 - 1, 2<<30 - 1} {
		if err := f.Truncate(n); err == nil {
			r.MaxFile = n
			break
		}
	}
	if err := f.Truncate(trialSize); err != nil {
		return fmt.Errorf("making a file shorter: %w", err)
	}
	return nil
}

// tryRename replaces a file by another and makes that durable, as descriptors are
// written.
func (r *Report) tryRename(f *os.File, content []byte) error {
	next := f.Name() + "~"
	if err := os.WriteFile(next, content[:512], 0o600); err != nil {
		return err
	}
	target := f.Name() + "+"
	defer func() {
		_ = os.Remove(next) // gone if all went well
		_ = os.Remove(target)
	}()
	if err := os.WriteFile(target, content[512:1024], 0o600); err != nil {
		return err
	}
	if err := os.Rename(next, target); err != nil {
		r.unsafe("a file cannot replace another ("+err.Error()+")", "a crash could leave a disk without its descriptor", "choose ext4, XFS or NFSv4")
		return nil
	}
	dir, err := os.Open(r.Path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		r.unsafe("a folder cannot be made durable ("+err.Error()+")", "a crash could leave a disk without its descriptor", "choose ext4, XFS or NFSv4")
		return nil
	}
	got, err := os.ReadFile(target)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, content[:512]) {
		return fmt.Errorf("after a rename %s has neither its old content nor its new", target)
	}
	return nil
}
