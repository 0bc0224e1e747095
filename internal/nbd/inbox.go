package nbd

import (
	"bufio"
	"fmt"
	"io"
)

const (
	// What one read from the socket asks for, in bytes: many small requests,
	inboxSize = 128 << 10
	// or, when large writes come, little more than the next header, so that
	// their payload goes straight to where the device takes it from.
	inboxShort = 4 << 10
)

// inbox holds bytes that were read from the socket and not yet used. It
// belongs to the holder of the token.
type inbox struct {
	b     []byte
	r, w  int  // b[r:w] is unused
	short bool // the last request was a large write
}

// init takes over what the handshake has read too much.
func (in *inbox) init(left *bufio.Reader) error {
	in.b = make([]byte, inboxSize)
	in.w = left.Buffered()
	_, err := io.ReadFull(left, in.b[:in.w])
	return err
}

// next reads a request, and for a write its payload. Before it waits for the
// client it sends the replies that are ready.
func (c *conn) next() (*request, error) {
	in := &c.in
	for in.w-in.r < requestSize {
		if err := c.fill(); err != nil {
			if err == io.EOF && in.w > in.r {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	h, ok := parseHeader(in.b[in.r:])
	if !ok {
		return nil, fmt.Errorf("nbd: request with magic %#x", in.b[in.r:in.r+4])
	}
	in.r += requestSize
	if h.cmd == cmdDisconnect {
		return nil, io.EOF
	}
	if h.cmd == cmdWrite && h.n > maxPayload {
		return nil, fmt.Errorf("nbd: write of %d bytes, at most %d are taken", h.n, maxPayload)
	}
	return c.admit(h)
}

// fill reads more bytes behind those that are there.
func (c *conn) fill() error {
	in := &c.in
	if in.r > 0 {
		in.w = copy(in.b, in.b[in.r:in.w])
		in.r = 0
	}
	if err := c.beforeWait(); err != nil {
		return err
	}
	space := in.b[in.w:]
	if in.short && len(space) > inboxShort {
		space = space[:inboxShort]
	}
	n, err := c.w.Read(space)
	in.w += n
	return err
}

// payload reads len(p) bytes of a write into p.
func (c *conn) payload(p []byte) error {
	in := &c.in
	in.short = len(p) > inboxSize/2
	n := copy(p, in.b[in.r:in.w])
	in.r += n
	if n == len(p) {
		return nil
	}
	if err := c.beforeWait(); err != nil {
		return err
	}
	if err := c.w.ReadFull(p[n:]); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	return nil
}

// discard reads n bytes of a refused write and forgets them.
func (c *conn) discard(n int) error {
	in := &c.in
	for {
		k := min(n, in.w-in.r)
		in.r += k
		n -= k
		if n == 0 {
			return nil
		}
		if err := c.fill(); err != nil {
			return err
		}
	}
}

// beforeWait sends what the client may be waiting for.
func (c *conn) beforeWait() error {
	select {
	case <-c.stop:
		return errDrained
	default:
	}
	c.flush()
	return nil
}
