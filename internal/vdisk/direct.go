package vdisk

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A directFile is an extent whose data goes round the page cache (O_DIRECT, open(2)):
// all of it, of conversions too, so that nothing can be older in the cache than on
// storage. Durable is still only what was synced: storage has a cache of its own.
//
// Storage wants offsets, lengths and addresses to be multiples of something. Offsets
// and lengths are whole sectors, and storage that wants more is refused. Addresses are
// whatever the caller has; where they do not suit, the data is copied.
type directFile struct {
	*osFile
	memory uintptr // what addresses must be multiples of, bytes, a power of two
}

// bounceAlign suits every storage, in bytes.
const bounceAlign = 4096

// A bounce is a buffer of chunk bytes on a page.
type bounce struct{ b []byte }

var bounces = sync.Pool{New: func() any { return &bounce{alignedBuffer(chunk)} }}

func alignedBuffer(n int) []byte {
	raw := make([]byte, n+bounceAlign)
	skip := int(-addressOf(raw) & (bounceAlign - 1))
	return raw[skip : skip+n : skip+n]
}

func addressOf(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }

// newDirectFile finds out what storage wants of requests to f, which was opened with
// O_DIRECT.
func newDirectFile(f *osFile) (*directFile, error) {
	var st unix.Statx_t
	err := f.call("statx", func(fd int) error {
		return unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
	})
	if err == nil && st.Mask&unix.STATX_DIOALIGN != 0 {
		switch {
		case st.Dio_offset_align == 0:
			return nil, noDirect(f.Name(), "its file system has none here", nil)
		case st.Dio_offset_align > SectorSize || st.Dio_mem_align > bounceAlign:
			return nil, noDirect(f.Name(), fmt.Sprintf("its storage wants requests of whole blocks of %d bytes, and a guest's are sectors of %d", st.Dio_offset_align, SectorSize), nil)
		}
		return &directFile{f, uintptr(max(st.Dio_mem_align, 1))}, nil
	}
	// Linux before 6.1, and file systems that do not tell, such as NFS: a read tells.
	if _, err := f.ReadAt(alignedBuffer(SectorSize), 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, noDirect(f.Name(), fmt.Sprintf("its storage cannot read a sector of %d bytes so", SectorSize), err)
	}
	return &directFile{f, bounceAlign}, nil
}

func noDirect(name, why string, cause error) error {
	return &Error{Kind: ErrUnsupported, File: name, Why: "no direct I/O: " + why, Cause: cause, Fix: "open it without direct I/O, or move the disk to storage with sectors of 512 bytes"}
}

func (f *directFile) suits(p []byte) bool { return addressOf(p)&(f.memory-1) == 0 }

func (f *directFile) ReadAt(p []byte, off int64) (int, error) {
	if f.suits(p) {
		return f.osFile.ReadAt(p, off)
	}
	return f.copied(p, func(q, b []byte, done int64) (int, error) {
		n, err := f.osFile.ReadAt(b, off+done)
		return copy(q, b[:n]), err
	})
}

func (f *directFile) WriteAt(p []byte, off int64) (int, error) {
	if f.suits(p) {
		return f.osFile.WriteAt(p, off)
	}
	return f.copied(p, func(q, b []byte, done int64) (int, error) {
		copy(b, q)
		return f.osFile.WriteAt(b, off+done)
	})
}

func (f *directFile) WriteDurably(p []byte, off int64) error {
	if f.suits(p) {
		return f.osFile.WriteDurably(p, off)
	}
	_, err := f.copied(p, func(q, b []byte, done int64) (int, error) {
		copy(b, q)
		return len(b), f.osFile.WriteDurably(b, off+done)
	})
	return err
}

// copied does a request in pieces q of p, with a buffer b of q's length that suits.
func (f *directFile) copied(p []byte, do func(q, b []byte, done int64) (int, error)) (done int, err error) {
	bounce := bounces.Get().(*bounce)
	defer bounces.Put(bounce)
	for done < len(p) && err == nil {
		q := p[done:min(len(p), done+chunk)]
		var n int
		n, err = do(q, bounce.b[:len(q)], int64(done))
		done += n
	}
	return done, err
}

// Forget and Prefetch have no cache to speak of.
func (f *directFile) Forget(int64, int64)   {}
func (f *directFile) Prefetch(int64, int64) {}

// isNotDirect says whether opening failed because there is no direct I/O.
func isNotDirect(flag int, err error) bool {
	return flag&unix.O_DIRECT != 0 && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP))
}

// openFlags are for opening extents, beside how they are accessed.
func (o *Options) openFlags() int {
	if o.Direct {
		return unix.O_DIRECT
	}
	return 0
}
