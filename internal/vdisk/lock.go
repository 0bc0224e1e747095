package vdisk

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// openLocked opens an extent and takes its lock: exclusive to write or convert,
// shared to read. The lock belongs to the open file (fcntl(2), OFD locks), so it
// excludes other opens in this process too and ends with it. An extent is never
// renamed or replaced while it has a lock.
func openLocked(fsys fsys, name string, write bool, flags int) (file, error) {
	if write {
		flags |= os.O_RDWR
	}
	return openAndLock(fsys, name, flags, write)
}

// openParent opens the extent of a link that another one stands on: its lock is
// shared, and becomes exclusive while the link is consolidated or converted, which
// needs a file that is open for writing.
func openParent(fsys fsys, name string, exclusive bool, flags int) (file, error) {
	f, err := openAndLock(fsys, name, flags|os.O_RDWR, exclusive)
	if !exclusive && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)) {
		return openLocked(fsys, name, false, flags)
	}
	return f, err
}

func openAndLock(fsys fsys, name string, flag int, write bool) (file, error) {
	f, err := fsys.Open(name, flag)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, missingExtent(name)
	}
	if err != nil {
		return nil, fmt.Errorf("opening an extent: %w", err)
	}
	if err := lock(fsys, name, f, write); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func missingExtent(name string) error {
	return &Error{Kind: ErrMissing, File: name, Why: "the descriptor names this extent and it is not there", Fix: "mount the storage that has it, or restore it from a backup"}
}

func lock(fsys fsys, name string, f file, exclusive bool) error {
	err := f.Lock(exclusive)
	st, serr := f.Stat()
	if errors.Is(err, errLocked) {
		e := &Error{Kind: ErrInUse, File: name, Why: "somebody else has its lock", Fix: "power off the VM that uses it, or wait until its conversion, clone or backup ends"}
		if who := holder(st); who != "" {
			e.Why = "locked by " + who
		}
		return e
	}
	if err != nil {
		return fmt.Errorf("locking an extent: %w", err)
	}
	now, err := fsys.Stat(name)
	if err = errors.Join(serr, err); err != nil {
		return fmt.Errorf("locking an extent: %w", err)
	}
	if st.dev != now.dev || st.ino != now.ino {
		return &Error{Kind: ErrInUse, File: name, Why: "it was replaced by another file while it was opened", Fix: "try again"}
	}
	return nil
}

// holder names a process of this machine that has an OFD lock on a file, as far
// as this process may see: fcntl does not tell.
func holder(st fileStat) string {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		var at unix.Stat_t
		if unix.Stat(fd, &at) != nil || at.Dev != st.dev || at.Ino != st.ino {
			continue
		}
		part := strings.Split(fd, "/") // "", proc, pid, fd, number
		info, err := os.ReadFile("/proc/" + part[2] + "/fdinfo/" + part[4])
		if err != nil || !bytes.Contains(info, []byte("OFDLCK")) {
			continue
		}
		if part[2] == strconv.Itoa(os.Getpid()) {
			return "this process"
		}
		comm, _ := os.ReadFile("/proc/" + part[2] + "/comm")
		return fmt.Sprintf("process %s (%s) of this host", part[2], bytes.TrimSpace(comm))
	}
	return ""
}
