package kmipd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
)

// conn is one client connection; requests on it are answered one by one.
type conn struct {
	s    *server
	raw  net.Conn
	from string
	// instance is whose client this is; "" until the handshake has told.
	instance string

	mu     sync.Mutex
	busy   bool // a request is being read or answered
	ending bool // no further request is begun
}

// serve lives as long as the connection. Whatever happens in it stays in it.
func (c *conn) serve() {
	defer c.raw.Close()
	defer func() {
		if p := recover(); p != nil {
			c.s.log.Error("kmip: connection caused a panic", "from", c.from, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
	}()
	// A member that should not serve does not begin to: the client goes to another
	// at once.
	if err := c.s.kms.Ready(); err != nil {
		c.s.log.Debug("kmip: connection refused", "from", c.from, "error", err)
		return
	}
	stream := tls.Server(&handshaking{c.raw, c}, c.s.tls)
	c.mu.Lock()
	if !c.ending {
		c.raw.SetDeadline(time.Now().Add(c.s.HandshakeTimeout)) // a context would take a goroutine
	}
	c.mu.Unlock()
	if err := stream.Handshake(); err != nil {
		c.s.Watcher.HandshakeFailed()
		log := c.s.log.Info
		if errors.Is(err, io.EOF) { // vCenter's health poll connects and says nothing
			log = c.s.log.Debug
		}
		log("kmip: handshake failed", "from", c.from, "error", err)
		return
	}
	defer stream.Close()
	cert := stream.ConnectionState().PeerCertificates[0]
	open := func(ctx context.Context) (*kms.Session, error) {
		return c.s.kms.Presume(ctx, c.instance, cert, c.from)
	}
	for c.next(stream, open) {
	}
}

// next answers one request; false ends the connection.
func (c *conn) next(stream net.Conn, open sessionOpener) bool {
	msg, err := c.read(stream)
	defer clear(msg) // a Register's key is in it
	var tooLong *lengthError
	switch {
	case errors.As(err, &tooLong):
		c.s.log.Warn("kmip: message refused", "from", c.from, "error", err)
		r := &reply{s: c.s, from: c.from, version: kmip.V1_0}
		r.fail(kms.Refuse(kmip.ResultReasonInvalidMessage, "%v", err))
		c.write(stream, r.encode())
		return false
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.s.log.Info("kmip: connection closed: the client was silent or slow", "from", c.from)
		return false
	case err != nil:
		if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
			c.s.log.Info("kmip: connection ended", "from", c.from, "error", err)
		}
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.s.RequestTimeout)
	defer cancel()
	response, keep := c.s.answer(ctx, c.from, open, msg)
	if response == nil {
		return false
	}
	// Cut off in the middle, or with a clock that is not fit, a failure says
	// nothing of whether the operation has happened: then silence is the answer
	// that clients take for what it is.
	if err := c.s.kms.Ready(); err != nil {
		c.s.log.Info("kmip: connection ended", "from", c.from, "error", err)
		c.s.release(response)
		return false
	}
	return c.write(stream, response) && keep && c.idle()
}

// lengthError is a first header that cannot begin a request worth reading.
type lengthError struct{ text string }

func (e *lengthError) Error() string { return e.text }

// read returns one request. A client may be silent for the idle time, but once
// it has begun, the whole request must come within the read time.
func (c *conn) read(stream net.Conn) ([]byte, error) {
	c.mu.Lock()
	if c.ending {
		c.mu.Unlock()
		return nil, io.EOF
	}
	stream.SetReadDeadline(time.Now().Add(c.s.IdleTimeout))
	c.mu.Unlock()
	buf := make([]byte, headerLen, 512)
	n, err := stream.Read(buf)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.busy = true
	stream.SetReadDeadline(time.Now().Add(c.s.ReadTimeout))
	c.mu.Unlock()
	if _, err := io.ReadFull(stream, buf[n:]); err != nil {
		return buf, err
	}
	length := uint64(binary.BigEndian.Uint32(buf[4:]))
	switch tag := int(buf[0])<<16 | int(buf[1])<<8 | int(buf[2]); {
	case tag != kmip.TagRequestMessage || ttlv.Type(buf[3]) != ttlv.TypeStructure:
		return buf, &lengthError{"the stream does not begin a KMIP request"}
	case length > uint64(c.s.MaxMessage):
		return buf, &lengthError{fmt.Sprintf("the request has %d bytes, the limit is %d", length, c.s.MaxMessage)}
	}
	// Memory follows what has come, not what was announced.
	for want := headerLen + int(length+7)&^7; len(buf) < want; {
		have := len(buf)
		grown := min(want, max(2*have, 512))
		if grown > cap(buf) {
			old := buf
			buf = append(make([]byte, 0, grown), old...)
			clear(old)
		}
		buf = buf[:min(grown, cap(buf))]
		if _, err := io.ReadFull(stream, buf[have:]); err != nil {
			return buf, err
		}
	}
	return buf, nil
}

// write sends a response and gives it back.
func (c *conn) write(stream net.Conn, response *encoder) bool {
	defer c.s.release(response)
	stream.SetWriteDeadline(time.Now().Add(c.s.WriteTimeout))
	if _, err := stream.Write(response.Bytes()); err != nil {
		c.s.log.Info("kmip: response could not be sent", "from", c.from, "error", err)
		return false
	}
	return true
}

// idle ends a request; false when the connection is to end with it.
func (c *conn) idle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.busy = false
	return !c.ending
}

// finish ends the connection, after the request under way if there is one.
func (c *conn) finish() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending = true
	if !c.busy {
		c.raw.SetReadDeadline(time.Now())
	}
}
