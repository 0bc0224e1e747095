package vdisk

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
)

// A file is what the package needs of an open file. There are three
// implementations: osFile, directFile, and in the tests a model of a disk that loses power.
// Offsets and lengths are bytes. Methods may be called concurrently.
type file interface {
	io.ReaderAt
	io.WriterAt

	// WriteDurably is WriteAt and makes what it wrote, and nothing else, durable.
	// After an error it may be or not.
	WriteDurably(p []byte, off int64) error
	// Sync makes everything written, punched and resized before it durable.
	Sync() error
	Truncate(size int64) error
	// Allocate reserves space for the first size bytes and makes the file at
	// least that long. What was not written reads as zeros and is no data. Where
	// storage cannot reserve, it changes nothing and its error wraps
	// errors.ErrUnsupported; after another error the file may be longer.
	Allocate(size int64) error
	// Punch makes a range read as zeros and gives its space back; Zero makes it
	// read as zeros and keeps the space. The file's size stays.
	Punch(off, n int64) error
	Zero(off, n int64) error
	// NextData and NextHole return the first offset at or after off that is,
	// or is not, data; the file's size if there is none.
	NextData(off int64) (int64, error)
	NextHole(off int64) (int64, error)
	Stat() (fileStat, error)
	// Lock takes the advisory lock of the whole file, exclusive or shared,
	// without waiting; errLocked means that another open file has it. A lock that
	// it has becomes the other kind. Close releases it.
	Lock(exclusive bool) error
	// Forget tells the page cache that a range is not needed soon, Prefetch that it
	// is, without waiting for it.
	Forget(off, n int64)
	Prefetch(off, n int64)
	Close() error
}

type fileStat struct {
	size      int64
	allocated int64  // bytes of storage in use
	dev, ino  uint64 // identity
}

// A fsys is what the package needs of a file system.
type fsys interface {
	Open(name string, flag int) (file, error)
	Stat(name string) (fileStat, error)
	// ReadFile returns the content of a file of at most limit bytes.
	ReadFile(name string, limit int) ([]byte, error)
	// ReplaceFile makes content that of name, durably. After a crash name has
	// its old content or its new one, whole.
	ReplaceFile(name string, content []byte) error
	Remove(name string) error
	// SyncDir makes creations and removals in a folder durable.
	SyncDir(dir string) error
	// Free is how many bytes this user can still take in a folder.
	Free(dir string) (int64, error)
	// List returns the names in a folder. Mkdir makes a folder, for the owner only,
	// if it is not there.
	List(dir string) ([]string, error)
	Mkdir(dir string) error
}

var errLocked = errors.New("locked by another open file")

// osFS is the operating system's files.
type osFS struct{}

func (osFS) Open(name string, flag int) (file, error) {
	// A FIFO where a file should be must not hang us, nor a link lead us out of
	// the VM's folder.
	f, err := os.OpenFile(name, flag|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_NOFOLLOW, 0o600)
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link: the files of a disk are in its own folder; move the file there", name)
	}
	if isNotDirect(flag, err) {
		return nil, noDirect(name, "its file system has none", err)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("open %s: not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	if flag&unix.O_DIRECT == 0 {
		return &osFile{File: f, raw: raw}, nil
	}
	d, err := newDirectFile(&osFile{File: f, raw: raw})
	if err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

func (osFS) Stat(name string) (fileStat, error) {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return fileStat{}, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	return statOf(&st), nil
}

func (osFS) ReadFile(name string, limit int) ([]byte, error) { return atomicfile.Read(name, limit) }
func (osFS) ReplaceFile(name string, b []byte) error         { return atomicfile.Write(name, b, 0o600) }
func (osFS) Remove(name string) error                        { return os.Remove(name) }
func (osFS) SyncDir(dir string) error                        { return atomicfile.SyncDir(dir) }

func (osFS) Free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(min(st.Bavail, math.MaxInt64/uint64(st.Bsize))) * st.Bsize, nil
}

func (osFS) List(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// Mkdir makes a folder that only this user can put files in, or sees that it is one:
// what others could take out of it, or plant there, would lose writes.
func (osFS) Mkdir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is not a folder of its own: remove it, or name another", dir)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to another user (id %d): remove it, or name another", dir, st.Uid)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("others may write in %s: take that from them (chmod 700), or name another", dir)
	}
	return nil
}

func statOf(st *unix.Stat_t) fileStat {
	return fileStat{size: st.Size, allocated: st.Blocks * 512, dev: st.Dev, ino: st.Ino}
}

type osFile struct {
	*os.File
	raw syscall.RawConn // of File; keeps it open during a call
}

// call runs a system call on the descriptor, again when a signal interrupts it.
func (f *osFile) call(name string, sys func(fd int) error) error {
	var err error
	cerr := f.raw.Control(func(fd uintptr) {
		for {
			if err = sys(int(fd)); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	if err = cmp.Or(cerr, err); err != nil {
		return &os.PathError{Op: name, Path: f.Name(), Err: err}
	}
	return nil
}

func (f *osFile) Sync() error { return f.call("fdatasync", unix.Fdatasync) }

// WriteDurably uses RWF_DSYNC: unlike an fdatasync it does not wait for whatever
// else is being written to the file.
func (f *osFile) WriteDurably(p []byte, off int64) error {
	for len(p) > 0 {
		var n int
		err := f.call("pwritev2", func(fd int) (err error) {
			n, err = unix.Pwritev2(fd, [][]byte{p}, off, unix.RWF_DSYNC)
			return err
		})
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
			if _, err := f.WriteAt(p, off); err != nil {
				return err
			}
			return f.Sync()
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (f *osFile) fallocate(mode uint32, off, n int64) error {
	return f.call("fallocate", func(fd int) error { return unix.Fallocate(fd, mode, off, n) })
}

func (f *osFile) Allocate(size int64) error { return f.fallocate(0, 0, size) }

func (f *osFile) Punch(off, n int64) error {
	return f.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *osFile) Zero(off, n int64) error {
	return f.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *osFile) NextData(off int64) (int64, error) { return f.seek(off, unix.SEEK_DATA) }
func (f *osFile) NextHole(off int64) (int64, error) { return f.seek(off, unix.SEEK_HOLE) }

// seek moves the file's position, which nothing uses.
func (f *osFile) seek(off int64, whence int) (at int64, err error) {
	err = f.call("lseek", func(fd int) (err error) {
		at, err = unix.Seek(fd, off, whence)
		return err
	})
	switch {
	case errors.Is(err, unix.EINVAL) && whence == unix.SEEK_DATA: // a file system that does not know: all is data
		return off, nil
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.EINVAL): // no data behind off
		st, err := f.Stat()
		return max(off, st.size), err
	}
	return at, err
}

func (f *osFile) Stat() (fileStat, error) {
	var st unix.Stat_t
	err := f.call("fstat", func(fd int) error { return unix.Fstat(fd, &st) })
	return statOf(&st), err
}

func (f *osFile) Lock(exclusive bool) error {
	lk := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart} // length 0: the whole file
	if exclusive {
		lk.Type = unix.F_WRLCK
	}
	err := f.call("locking", func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk) })
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return errLocked
	}
	return err
}

// Close releases the lock by name: a child that was forked meanwhile and has not
// yet come to its exec shares the open file, and would keep it locked.
func (f *osFile) Close() error {
	lk := unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart}
	_ = f.call("unlocking", func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk) })
	return f.File.Close()
}

func (f *osFile) Forget(off, n int64) {
	// Advice: there is nothing to do when it is not taken.
	_ = f.call("fadvise", func(fd int) error { return unix.Fadvise(fd, off, n, unix.FADV_DONTNEED) })
}

func (f *osFile) Prefetch(off, n int64) {
	_ = f.call("fadvise", func(fd int) error { return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED) })
}
