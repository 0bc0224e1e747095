package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
)

// maxSocketPath is the longest path that fits into a sockaddr_un with its
// closing NUL, less the suffix of the temporary name.
const maxSocketPath = 107 - len(socketSuffix)

const socketSuffix = "~"

// Listen opens a unix socket at path for its owner only (mode 0600). A socket
// file that a dead server left behind is replaced; one that a server answers
// on, or a file of another kind, is an error and stays. Closing the listener
// removes the file.
//
// The socket gets its mode under a temporary name and appears at path ready
// for use, so that nobody can reach it in between.
func Listen(path string) (net.Listener, error) {
	if path == "" || path[0] == '@' {
		return nil, fmt.Errorf("nbd: %q is no path for a socket: give a file name", path)
	}
	if strings.IndexByte(path, 0) >= 0 || len(path) > maxSocketPath {
		return nil, fmt.Errorf("nbd: socket path %q has %d bytes, at most %d fit: choose a shorter folder", path, len(path), maxSocketPath)
	}
	if err := checkStale(path); err != nil {
		return nil, err
	}
	temp := path + socketSuffix
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("nbd: removing the remains of an earlier start: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("nbd: listening on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	own, err := place(temp, path)
	if err != nil {
		_ = l.Close() // the first error says more
		_ = os.Remove(temp)
		return nil, fmt.Errorf("nbd: listening on %s: %w", path, err)
	}
	return &listener{UnixListener: l, path: path, own: own}, nil
}

func place(temp, path string) (fs.FileInfo, error) {
	if err := os.Chmod(temp, 0o600); err != nil {
		return nil, err
	}
	if err := os.Rename(temp, path); err != nil {
		return nil, err
	}
	return os.Lstat(path)
}

// checkStale returns nil if path is free or holds a socket nobody serves.
func checkStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("nbd: looking at socket path: %w", err)
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("nbd: %s exists and is no socket: move it away or choose another path", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		_ = c.Close() // only asked whether somebody answers
		return fmt.Errorf("nbd: another process serves %s: stop it first: %w", path, syscall.EADDRINUSE)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("nbd: is %s still served? %w", path, err)
	}
	return nil
}

type listener struct {
	*net.UnixListener
	path string
	own  fs.FileInfo // the file this listener made
	once sync.Once
}

// Close stops listening and removes the socket file, unless a later server has
// put its own in the place.
func (l *listener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		if fi, statErr := os.Lstat(l.path); statErr == nil && os.SameFile(fi, l.own) {
			_ = os.Remove(l.path) // a stale file is replaced at the next start
		}
	})
	return err
}
