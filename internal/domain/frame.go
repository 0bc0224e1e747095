package domain

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
)

// Limits of a libvirt RPC packet, in bytes with its length word; libvirt's
// VIR_NET_MESSAGE_MAX is 32 MiB.
const (
	minPacket = 28
	maxPacket = 32<<20 + 64
)

// A checkedConn is a libvirt connection whose packet lengths are checked before
// the RPC library allocates by them, and which says when it ended.
type checkedConn struct {
	net.Conn
	left  int     // bytes of the packet that Read has yet to give
	head  [4]byte // the packet's length word
	given int     // bytes of head given; 4 between packets and in a body

	once sync.Once
	done chan struct{} // closed after the first error
}

func newCheckedConn(c net.Conn) *checkedConn {
	return &checkedConn{Conn: c, given: 4, done: make(chan struct{})}
}

func (c *checkedConn) end() { c.once.Do(func() { close(c.done) }) }

// Read implements net.Conn. Like the library, it is used by one goroutine.
func (c *checkedConn) Read(p []byte) (n int, err error) {
	defer func() {
		if err != nil {
			c.end()
		}
	}()
	if len(p) == 0 {
		return 0, nil
	}
	if c.given == 4 && c.left == 0 {
		if _, err := io.ReadFull(c.Conn, c.head[:]); err != nil {
			return 0, err
		}
		size := binary.BigEndian.Uint32(c.head[:])
		if size < minPacket || size > maxPacket {
			return 0, fmt.Errorf("a packet of %d bytes: this is no libvirt socket", size)
		}
		c.left, c.given = int(size)-4, 0
	}
	if c.given < 4 {
		n = copy(p, c.head[c.given:])
		c.given += n
		return n, nil
	}
	if len(p) > c.left {
		p = p[:c.left]
	}
	n, err = c.Conn.Read(p)
	c.left -= n
	return n, err
}

// Close implements net.Conn.
func (c *checkedConn) Close() error {
	c.end()
	return c.Conn.Close()
}
