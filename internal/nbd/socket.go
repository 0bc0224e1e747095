package nbd

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// wire is a connection after the handshake: one goroutine reads, one writes.
type wire interface {
	// Read returns io.EOF when the client has closed its side or
	// stopReading was called.
	Read(p []byte) (int, error)
	// ReadFull fills p.
	ReadFull(p []byte) error
	// Writev sends all of list; it may change list.
	Writev(list [][]byte) error
	// StopReading makes present and coming reads end; writing goes on.
	StopReading()
	// Break makes everything end.
	Break()
	// Close frees the connection; nothing may use it any more.
	Close()
}

// newWire takes over c.
func newWire(c net.Conn) (wire, error) {
	switch c := c.(type) {
	case *net.UnixConn:
		return newUnixWire(c)
	case *tls.Conn:
		return newTLSWire(c), nil
	}
	return nil, fmt.Errorf("nbd: no way to serve a %T", c)
}

// unixWire does blocking system calls on the socket. Waiting in read(2) costs
// one system call and one wake-up where Go's poller costs two of each.
type unixWire struct {
	fd  int
	vec []unix.Iovec
	msg unix.Msghdr
}

func newUnixWire(c *net.UnixConn) (*unixWire, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	var dupErr error
	if err := raw.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return nil, err
	}
	if dupErr != nil {
		return nil, dupErr
	}
	if err := c.Close(); err != nil {
		_ = unix.Close(fd) // nothing was sent on it
		return nil, err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		_ = unix.Close(fd) // nothing was sent on it
		return nil, err
	}
	return &unixWire{fd: fd}, nil
}

func (w *unixWire) recv(p []byte, flags uintptr) (int, error) {
	for {
		n, _, e := unix.Syscall6(unix.SYS_RECVFROM, uintptr(w.fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
		switch {
		case e == unix.EINTR:
		case e != 0:
			return 0, e
		case n == 0:
			return 0, io.EOF
		default:
			return int(n), nil
		}
	}
}

func (w *unixWire) Read(p []byte) (int, error) { return w.recv(p, 0) }

func (w *unixWire) ReadFull(p []byte) error {
	for len(p) > 0 {
		n, err := w.recv(p, unix.MSG_WAITALL)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// maxVec is how many pieces the kernel takes at once (UIO_MAXIOV).
const maxVec = 1024

func (w *unixWire) Writev(list [][]byte) error {
	w.vec = w.vec[:0]
	for _, b := range list {
		if len(b) > 0 {
			w.vec = append(w.vec, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
		}
	}
	defer clear(w.vec) // keeps no buffer alive
	for vec := w.vec; len(vec) > 0; {
		w.msg.Iov = &vec[0]
		w.msg.Iovlen = uint64(min(len(vec), maxVec))
		n, _, e := unix.Syscall(unix.SYS_SENDMSG, uintptr(w.fd), uintptr(unsafe.Pointer(&w.msg)), unix.MSG_NOSIGNAL)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return e
		}
		for sent := uint64(n); sent > 0; {
			if sent < vec[0].Len {
				vec[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(vec[0].Base), sent))
				vec[0].Len -= sent
				break
			}
			sent -= vec[0].Len
			vec = vec[1:]
		}
	}
	return nil
}

func (w *unixWire) StopReading() { _ = unix.Shutdown(w.fd, unix.SHUT_RD) } // fails only if the client is gone
func (w *unixWire) Break()       { _ = unix.Shutdown(w.fd, unix.SHUT_RDWR) }
func (w *unixWire) Close()       { _ = unix.Close(w.fd) }
