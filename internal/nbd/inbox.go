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

	rest  header // what is not yet taken of a request that is split; n is 0 if none is
	whole *whole
}

// init takes over what the handshake has read too much.
func (in *inbox) init(left *bufio.Reader) error {
	in.b = make([]byte, inboxSize)
	in.w = left.Buffered()
	_, err := io.ReadFull(left, in.b[:in.w])
	return err
}

// next returns the next request, and of a write its payload; a large one comes
// in pieces. Before it waits for the client it sends the replies that are ready.
func (c *conn) next() (*request, error) {
	in := &c.in
	if in.rest.n > 0 {
		return c.piece()
	}
	h, err := c.header()
	if err != nil {
		return nil, err
	}
	r := c.take(h)
	c.check(r)
	if r.errno == 0 && c.splits(h) {
		c.drop(r)
		in.rest, in.whole = h, c.srv.newWhole(int((h.off%pieceSize+uint64(h.n)+pieceSize-1)/pieceSize))
		return c.piece()
	}
	return r, c.admit(r)
}

// header reads the next request's header.
func (c *conn) header() (header, error) {
	in := &c.in
	for in.w-in.r < requestSize {
		if err := c.fill(); err != nil {
			if err == io.EOF && in.w > in.r {
				err = io.ErrUnexpectedEOF
			}
			return header{}, err
		}
	}
	h, ok := parseHeader(in.b[in.r:])
	if !ok {
		return h, fmt.Errorf("nbd: request with magic %#x", in.b[in.r:in.r+4])
	}
	in.r += requestSize
	if h.cmd == cmdDisconnect {
		return h, io.EOF
	}
	if h.cmd == cmdWrite && h.n > maxPayload {
		return h, fmt.Errorf("nbd: write of %d bytes, at most %d are taken", h.n, maxPayload)
	}
	return h, nil
}

// splits reports whether h is served in pieces: of a read they are chunks of a
// structured reply.
func (c *conn) splits(h header) bool {
	return h.n > pieceSize && (h.cmd == cmdWrite || h.cmd == cmdRead && c.structured && h.flags&cmdFlagDF == 0)
}

// piece takes the next piece of a request.
func (c *conn) piece() (*request, error) {
	rest := &c.in.rest
	h := *rest
	h.n = min(h.n, uint32(pieceSize-h.off%pieceSize))
	rest.off += uint64(h.n)
	rest.n -= h.n
	r := c.take(h)
	r.whole = c.in.whole
	return r, c.admit(r)
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
