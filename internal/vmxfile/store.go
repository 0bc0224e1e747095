package vmxfile

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
)

// LockSuffix is what the lock file of a VMX has after its name. The file is
// empty and stays: removing it would let two processes lock two files.
const LockSuffix = ".lck"

// Load reads and parses the VMX at path.
func Load(path string) (*File, error) {
	b, err := atomicfile.Read(path, MaxSize)
	if errors.Is(err, atomicfile.ErrTooLarge) {
		return nil, &Error{File: path, Cause: ErrTooLarge, Why: fmt.Sprintf("a VMX has at most %d bytes", MaxSize)}
	}
	if err != nil {
		return nil, fmt.Errorf("reading a VMX: %w", err)
	}
	return Parse(path, b)
}

// Save replaces the file at path durably and in one step. Use it for a VMX that
// is being made; to change one that others may change too, use Update.
func (f *File) Save(path string) error {
	b := f.Bytes()
	if len(b) > MaxSize {
		return f.errorf(0, "", ErrTooLarge, "%d bytes, a VMX has at most %d", len(b), MaxSize)
	}
	return atomicfile.Write(path, b, 0o644)
}

// Update loads the VMX at path, lets edit change it, and saves it, while no
// other Update of the same path runs, in this process or another, on this host
// or another one that mounts the datastore (an OFD lock on the lock file, which
// NFSv4 carries). When edit fails, nothing is written and its error returned.
// Update blocks while another one runs; edit must be short.
func Update(path string, edit func(*File) error) error {
	unlock, err := lock(path + LockSuffix)
	if err != nil {
		return fmt.Errorf("locking %s: %w", path, err)
	}
	defer unlock()
	f, err := Load(path)
	if err != nil {
		return err
	}
	before := string(f.Bytes())
	if err := edit(f); err != nil {
		return err
	}
	if string(f.Bytes()) == before {
		return nil
	}
	return f.Save(path)
}

// lock takes an exclusive open-file-description lock: it belongs to the open
// file, so goroutines exclude each other too, and it dies with the process.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	whole := unix.Flock_t{Type: unix.F_WRLCK}
	for {
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &whole)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}
