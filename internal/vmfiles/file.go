package vmfiles

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/xts"
)

const (
	sector   = xts.SectorSize
	maxChunk = 1 << 20 // bytes encrypted at a time
)

// A File is one encrypted file, open, as the clear file that it holds. Its
// methods may be called concurrently. An exclusive lock keeps other processes
// from opening it; it dies with the process.
type File struct {
	path string

	mu        sync.RWMutex // write-held to change anything, read-held to read
	f         *os.File
	d         disk // f
	cipher    *xts.Cipher
	mac       *keysafe.MAC
	h         header
	current   int   // the block that holds h
	durable   int   // the block that a power cut leaves
	tailClean bool  // everything stored behind h.length is zero
	failed    error // after a failed sync
	readOnly  bool
}

// A disk is what a File reads and writes; tests cut its power.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Truncate(size int64) error
	Sync() error
}

// fileDisk syncs data, and of the metadata only what reading it needs.
type fileDisk struct{ *os.File }

func (d fileDisk) Sync() error { return unix.Fdatasync(int(d.Fd())) }

// Create makes an encrypted file, empty, and makes it durable. It fails with
// fs.ErrExist when path is there.
func Create(path string, dek *secret.Key) (*File, error) {
	f, err := open(path, dek, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, err
	}
	f.h, f.tailClean = header{settled, 1, 0}, true
	// Both blocks are written, so that a full disk never stops a header later.
	_, err = f.d.WriteAt(make([]byte, dataOffset), 0)
	if err == nil {
		err = f.writeHeader(0, f.h)
	}
	if err == nil {
		err = f.d.Sync()
	}
	if err == nil {
		err = atomicfile.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		f.Close()
		os.Remove(path)
		return nil, fmt.Errorf("creating %s: %w", path, err)
	}
	return f, nil
}

// Open opens an encrypted file, to read only when readOnly is set. Errors:
// ErrNotEncrypted when it is some other file, *keysafe.TamperedError when dek did
// not make its header or it was cut, ErrInUse.
func Open(path string, dek *secret.Key, readOnly bool) (*File, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := open(path, dek, flags)
	if err != nil {
		return nil, err
	}
	f.readOnly = readOnly
	if err := f.load(); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Verify checks that dek opens the encrypted file at path and that it is whole,
// also when another process has it open.
func Verify(path string, dek *secret.Key) error {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	mac, err := keysafe.NewMAC(dek, MACInfo)
	if err != nil {
		return err
	}
	defer mac.Wipe()
	_, _, err = readHeader(file, mac)
	return err
}

func open(path string, dek *secret.Key, flags int) (*File, error) {
	f := &File{path: path}
	err := f.openFile(dek, flags)
	if err != nil {
		f.release()
		return nil, err
	}
	return f, nil
}

// openFile makes what the key is needed for first: with a wrong key no file is
// made.
func (f *File) openFile(dek *secret.Key, flags int) (err error) {
	if f.cipher, err = xts.New(dek); err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	if f.mac, err = keysafe.NewMAC(dek, MACInfo); err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	if f.f, err = os.OpenFile(f.path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0o600); err != nil {
		return err
	}
	f.d = fileDisk{f.f}
	if st, err := f.f.Stat(); err != nil || !st.Mode().IsRegular() {
		return fmt.Errorf("%s: %w: it is no regular file (%v)", f.path, ErrNotEncrypted, err)
	}
	kind := int16(unix.F_WRLCK)
	if flags&os.O_RDWR == 0 {
		kind = unix.F_RDLCK
	}
	err = unix.FcntlFlock(f.f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		err = ErrInUse
	}
	if err != nil {
		return fmt.Errorf("locking %s: %w", f.path, err)
	}
	return nil
}

// load reads the header, and clears away what a crash left behind the end.
func (f *File) load() (err error) {
	if f.h, f.current, err = readHeader(f.f, f.mac); err != nil || f.readOnly {
		return err
	}
	// The header must be durable before the file is cut to what it says.
	if err := f.d.Sync(); err != nil {
		return fmt.Errorf("opening %s: %w", f.path, err)
	}
	f.durable = f.current
	if err := f.d.Truncate(physical(f.h.length)); err != nil {
		return fmt.Errorf("opening %s: %w", f.path, err)
	}
	return nil
}

// Size is the length of the clear file in bytes.
func (f *File) Size() int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.h.length
}

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.readAt(p, off)
}

func (f *File) readAt(p []byte, off int64) (n int, err error) {
	if err := f.usable(); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("%s: negative offset: %w", f.path, unix.EINVAL)
	}
	if off >= f.h.length {
		return 0, io.EOF
	}
	if rest := f.h.length - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	for n < len(p) {
		from := (off + int64(n)) &^ (sector - 1)
		skip := int(off + int64(n) - from)
		b := make([]byte, roundUp(min(skip+len(p)-n, maxChunk)))
		if rerr := f.readSectors(b, from); rerr != nil {
			return n, rerr
		}
		n += copy(p[n:], b[skip:])
		clear(b)
	}
	return n, err
}

// WriteAt implements io.WriterAt. It grows the file as needed.
func (f *File) WriteAt(p []byte, off int64) (n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.writable(); err != nil {
		return 0, err
	}
	end := off + int64(len(p))
	if off < 0 || end < off || end > MaxLength {
		return 0, fmt.Errorf("%s: a file has at most %d bytes: %w", f.path, int64(MaxLength), unix.EFBIG)
	}
	if len(p) == 0 {
		return 0, nil
	}
	grows := end > f.h.length
	if grows {
		if err := f.prepareToGrow(end); err != nil {
			return 0, err
		}
	}
	for n < len(p) {
		m, werr := f.writeChunk(p[n:], off+int64(n))
		if n += m; werr != nil {
			err = werr
			break
		}
	}
	if grows && off+int64(n) > f.h.length {
		if herr := f.setLength(off + int64(n)); herr != nil {
			return 0, herr
		}
	}
	if err != nil && grows {
		f.trim()
	}
	return n, err
}

// Truncate changes the length; what is added reads as zeros.
func (f *File) Truncate(length int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.writable(); err != nil {
		return err
	}
	switch {
	case length < 0 || length > MaxLength:
		return fmt.Errorf("%s: a file has at most %d bytes: %w", f.path, int64(MaxLength), unix.EFBIG)
	case length == f.h.length:
		return nil
	case length > f.h.length:
		if err := f.prepareToGrow(length); err != nil {
			return err
		}
		return f.setLength(length)
	}
	if err := f.setLength(length); err != nil {
		return err
	}
	if err := f.syncData(); err != nil {
		return err
	}
	f.durable, f.tailClean = f.current, false
	return f.cut()
}

// Sync makes everything written so far durable.
func (f *File) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sync()
}

func (f *File) sync() error {
	if f.readOnly {
		return nil
	}
	if err := f.usable(); err != nil {
		return err
	}
	if err := f.syncData(); err != nil || f.h.state == settled {
		return err
	}
	f.durable = f.current
	h, block := header{settled, f.h.sequence + 1, f.h.length}, 1-f.durable
	if err := f.writeHeader(block, h); err != nil {
		return err
	}
	f.h, f.current = h, block
	if err := f.syncData(); err != nil {
		return err
	}
	f.durable = block
	return nil
}

// syncData makes what is in the file durable; when it fails, the file has failed.
func (f *File) syncData() error {
	if err := f.d.Sync(); err != nil {
		f.failed = fmt.Errorf("%s: its content could not be made durable, and writes may be lost: %w", f.path, err)
		return f.failed
	}
	return nil
}

// Close syncs the file, releases it and wipes its keys.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var err error
	if f.f != nil && f.h.sequence != 0 {
		err = f.sync()
	}
	return errors.Join(err, f.release())
}

func (f *File) release() error {
	var err error
	if f.f != nil {
		err = f.f.Close()
	}
	f.cipher.Wipe()
	f.mac.Wipe()
	f.f, f.failed = nil, os.ErrClosed
	return err
}

func (f *File) usable() error {
	if f.failed != nil {
		return f.failed
	}
	if f.f == nil {
		return os.ErrClosed
	}
	return nil
}

func (f *File) writable() error {
	if f.readOnly {
		return fmt.Errorf("%s: opened to read only: %w", f.path, unix.EBADF)
	}
	return f.usable()
}

// prepareToGrow zeroes what is stored between the present end and its unit's end,
// and makes the file long enough for length.
func (f *File) prepareToGrow(length int64) error {
	if end := f.h.length; !f.tailClean && end%xts.UnitSize != 0 {
		at := end &^ (sector - 1)
		tail := make([]byte, physical(end)-dataOffset-at) // zeros: holes
		if end%sector != 0 {
			first := tail[:sector]
			if err := f.readSectors(first, at); err != nil {
				return err
			}
			clear(first[end-at:])
			f.encrypt(first, at)
		}
		if _, err := f.d.WriteAt(tail, dataOffset+at); err != nil {
			return fmt.Errorf("writing %s: %w", f.path, err)
		}
	}
	f.tailClean = true
	if physical(length) == physical(f.h.length) {
		return nil
	}
	if err := f.d.Truncate(physical(length)); err != nil {
		return fmt.Errorf("growing %s: %w", f.path, err)
	}
	return nil
}

// trim takes back a growth that failed.
func (f *File) trim() {
	f.tailClean = false
	_ = f.cut() // when it fails too, opening the file cuts it
}

func (f *File) cut() error {
	if err := f.d.Truncate(physical(f.h.length)); err != nil {
		f.failed = fmt.Errorf("cutting %s: %w", f.path, err)
		return f.failed
	}
	return nil
}

// setLength writes a provisional header, over the block that is not durable.
func (f *File) setLength(length int64) error {
	h := header{provisional, f.h.sequence + 1, length}
	block := 1 - f.durable
	if err := f.writeHeader(block, h); err != nil {
		return err
	}
	f.h, f.current = h, block
	return nil
}

func (f *File) writeHeader(block int, h header) error {
	if _, err := f.d.WriteAt(h.encode(f.mac), int64(block)*blockSize); err != nil {
		return fmt.Errorf("writing the header of %s: %w", f.path, err)
	}
	return nil
}

// writeChunk writes the first bytes of p, at most maxChunk, and says how many.
func (f *File) writeChunk(p []byte, off int64) (int, error) {
	from := off &^ (sector - 1)
	skip := int(off - from)
	p = p[:min(len(p), maxChunk-skip)]
	b := make([]byte, roundUp(skip+len(p)))
	last := len(b) - sector
	if skip > 0 {
		if err := f.readSectors(b[:sector], from); err != nil {
			return 0, err
		}
	}
	if (skip+len(p))%sector != 0 && (last > 0 || skip == 0) {
		if err := f.readSectors(b[last:], from+int64(last)); err != nil {
			return 0, err
		}
	}
	copy(b[skip:], p)
	f.encrypt(b, from)
	if _, err := f.d.WriteAt(b, dataOffset+from); err != nil {
		return 0, fmt.Errorf("writing %s: %w", f.path, err)
	}
	return len(p), nil
}

func (f *File) encrypt(b []byte, at int64) {
	f.cipher.EncryptAt(b, b, uint64(at/xts.UnitSize), int(at%xts.UnitSize))
}

// readSectors reads whole sectors in clear; sectors that were never written, or
// are behind the end of the file, are zeros.
func (f *File) readSectors(b []byte, at int64) error {
	n, err := f.d.ReadAt(b, dataOffset+at)
	if err != nil && err != io.EOF {
		return fmt.Errorf("reading %s: %w", f.path, err)
	}
	clear(b[n:])
	var zeros [sector]byte
	for i := 0; i < len(b); {
		if bytes.Equal(b[i:i+sector], zeros[:]) {
			i += sector
			continue
		}
		run := i + sector
		for run < len(b) && !bytes.Equal(b[run:run+sector], zeros[:]) {
			run += sector
		}
		pos := at + int64(i)
		f.cipher.DecryptAt(b[i:run], b[i:run], uint64(pos/xts.UnitSize), int(pos%xts.UnitSize))
		i = run
	}
	return nil
}

func roundUp(n int) int { return (n + sector - 1) &^ (sector - 1) }
