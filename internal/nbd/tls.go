package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// ServeTLS is [Server.Serve] over a network. Every client must begin with
// NBD_OPT_STARTTLS and show a certificate that config accepts (FORCEDTLS of
// proto.md); before that it learns nothing and may choose nothing. Versions below
// 1.3 are refused whatever config says, and a config that does not check client
// certificates is an error.
func (s *Server) ServeTLS(ctx context.Context, l net.Listener, config *tls.Config) error {
	checked := config != nil && (config.ClientAuth == tls.RequireAndVerifyClientCert ||
		config.ClientAuth == tls.RequireAnyClientCert && (config.VerifyConnection != nil || config.VerifyPeerCertificate != nil))
	if !checked {
		_ = l.Close() // never used
		return errors.New("nbd: TLS without checking the client's certificate would serve the disk to anybody: set ClientAuth")
	}
	config = config.Clone()
	config.MinVersion = tls.VersionTLS13
	config.SessionTicketsDisabled = true      // each connection shows its certificate
	config.DynamicRecordSizingDisabled = true // bulk data, not a page that should render early
	return s.serve(ctx, l, config)
}

// startTLS answers STARTTLS. Nothing that the client said before counts after it,
// and nothing may have been said already for after it.
func (h *handshake) startTLS(data []byte) error {
	switch {
	case h.conn.tls == nil:
		return h.refuse(optStartTLS, repErrPolicy, "this socket is not served with TLS")
	case h.stream != h.conn.nc:
		return h.refuse(optStartTLS, repErrInvalid, "TLS has begun already")
	case len(data) != 0:
		return h.refuse(optStartTLS, repErrInvalid, "this option has no data")
	}
	if h.r.Buffered() > 0 {
		return errors.New("nbd: client sent more behind STARTTLS in clear") // or somebody in between did
	}
	if err := h.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	c := tls.Server(h.conn.nc, h.conn.tls)
	if err := c.Handshake(); err != nil { // within the deadline of the negotiation
		return fmt.Errorf("nbd: TLS: %w", err)
	}
	if !h.srv.admit(h.conn) {
		_ = c.Close() // the client has shown who it is; it may hear that it is not wanted
		return fmt.Errorf("nbd: connection refused, %d are open", h.srv.opt.MaxConns)
	}
	noticeDeath(h.conn.nc)
	h.stream, h.r = c, bufio.NewReader(c)
	h.peer = c.ConnectionState().PeerCertificates[0].Subject.String()
	h.structured, h.metaExport, h.chosen = false, "", contexts{}
	return nil
}

// peerTimeout is how long a client of another machine may be silent to the
// network itself before its connection ends.
const peerTimeout = time.Minute

func noticeDeath(c net.Conn) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	// What the kernel does not take leaves its defaults: two hours.
	_ = t.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: peerTimeout / 4, Interval: peerTimeout / 4, Count: 3})
	if raw, err := t.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerTimeout.Milliseconds()))
		})
	}
}

// tlsWire serves a connection in TLS.
type tlsWire struct {
	*tls.Conn
	scratch []byte // what Writev sends at once
}

// tlsBatch is how much goes to TLS in one call, in bytes: headers and payloads in
// common, full records.
const tlsBatch = 64 << 10

func newTLSWire(c *tls.Conn) *tlsWire { return &tlsWire{Conn: c, scratch: make([]byte, 0, tlsBatch)} }

func (w *tlsWire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	return n, ended(err)
}

func (w *tlsWire) ReadFull(p []byte) error {
	_, err := io.ReadFull(w.Conn, p)
	return ended(err)
}

// ended turns the deadline that StopReading sets into what it stands for.
func ended(err error) error {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return io.EOF
	}
	return err
}

func (w *tlsWire) Writev(list [][]byte) error {
	for _, b := range list {
		for len(b) > 0 {
			n := min(len(b), tlsBatch-len(w.scratch))
			w.scratch = append(w.scratch, b[:n]...)
			b = b[n:]
			if len(w.scratch) == tlsBatch {
				if err := w.flush(); err != nil {
					return err
				}
			}
		}
	}
	return w.flush()
}

func (w *tlsWire) flush() error {
	_, err := w.Conn.Write(w.scratch)
	w.scratch = w.scratch[:0]
	return err
}

func (w *tlsWire) StopReading() { _ = w.SetReadDeadline(time.Unix(1, 0)) } // fails only if the client is gone

// Break does not say goodbye, for which it would wait on a client that reads
// nothing.
func (w *tlsWire) Break() { _ = w.NetConn().Close() }
func (w *tlsWire) Close() { _ = w.Conn.Close() }
