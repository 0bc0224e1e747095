package domain

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// ringSize is how much of a console's past a new stream sees, in bytes.
const ringSize = 64 << 10

// A Console is a guest's serial line, which QEMU offers on a unix socket to one
// reader at a time. It keeps the last 64 KiB in memory, never in a file (I1), and
// gives them and what follows to any number of streams. It reads always, so that
// a guest never waits for someone to look.
type Console struct {
	path   string
	log    *slog.Logger
	cancel context.CancelFunc
	ended  chan struct{}

	mu     sync.Mutex    // protects what follows
	conn   net.Conn      // nil while QEMU is away
	ring   []byte        // the last bytes; byte n of the line is at n modulo its size
	total  uint64        // bytes the line has given
	closed bool          // no more will come
	more   chan struct{} // closed when total or closed changes

	writing sync.Mutex // keeps writes whole
}

// OpenConsole begins to read the console at a unix socket; it waits for QEMU to
// make it and connects again when it is lost, until Close.
func OpenConsole(path string, log *slog.Logger) *Console {
	ctx, cancel := context.WithCancel(context.Background())
	c := &Console{
		path: path, log: log, cancel: cancel, ended: make(chan struct{}),
		ring: make([]byte, ringSize), more: make(chan struct{}),
	}
	go c.read(ctx)
	return c
}

// Close ends the console and every stream; they first give what is left.
func (c *Console) Close() {
	c.cancel()
	<-c.ended
}

func (c *Console) read(ctx context.Context) {
	defer close(c.ended)
	defer c.change(func() { c.closed = true })
	for ctx.Err() == nil {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.path)
		if err == nil {
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			c.change(func() { c.conn = conn })
			err = c.copyFrom(conn)
			c.change(func() { c.conn = nil })
			stop()
			conn.Close()
		}
		c.log.Debug("console is away", "socket", c.path, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *Console) copyFrom(conn net.Conn) error {
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			c.change(func() {
				for p := buf[:n]; len(p) > 0; {
					k := copy(c.ring[c.total%ringSize:], p)
					c.total += uint64(k)
					p = p[k:]
				}
			})
		}
		if err != nil {
			return err
		}
	}
}

// change runs f under the lock and wakes the streams.
func (c *Console) change(f func()) {
	c.mu.Lock()
	f()
	close(c.more)
	c.more = make(chan struct{})
	c.mu.Unlock()
}

// Attach gives a new stream: it reads what the ring holds and then what comes,
// and writes to the guest. A reader that falls more than 64 KiB behind loses the
// oldest bytes and is told how many.
func (c *Console) Attach() (io.ReadWriteCloser, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, fmt.Errorf("console: %w", ErrClosed)
	}
	return &consoleStream{c: c, at: c.total - min(c.total, ringSize), gone: make(chan struct{})}, nil
}

type consoleStream struct {
	c    *Console
	at   uint64 // next byte of the line; used by the reader only
	note []byte // of what was lost, to be read first

	once sync.Once
	gone chan struct{}
}

// Read implements io.Reader; io.EOF after the console's end or Close.
func (s *consoleStream) Read(p []byte) (int, error) {
	for {
		select {
		case <-s.gone:
			return 0, io.EOF
		default:
		}
		if len(s.note) > 0 {
			n := copy(p, s.note)
			s.note = s.note[n:]
			return n, nil
		}
		s.c.mu.Lock()
		more, closed := s.c.more, s.c.closed
		oldest := s.c.total - min(s.c.total, ringSize)
		switch {
		case s.at < oldest:
			s.note = fmt.Appendf(nil, "\r\n[%d bytes of the console were lost]\r\n", oldest-s.at)
			s.at = oldest
			s.c.mu.Unlock()
			continue
		case s.at < s.c.total:
			from := s.at % ringSize
			n := copy(p, s.c.ring[from:min(ringSize, from+s.c.total-s.at)])
			s.at += uint64(n)
			s.c.mu.Unlock()
			return n, nil
		}
		s.c.mu.Unlock()
		if closed {
			return 0, io.EOF
		}
		select {
		case <-more:
		case <-s.gone:
		}
	}
}

// Write implements io.Writer.
func (s *consoleStream) Write(p []byte) (int, error) {
	select {
	case <-s.gone:
		return 0, fmt.Errorf("console: %w", ErrClosed)
	default:
	}
	s.c.writing.Lock()
	defer s.c.writing.Unlock()
	conn, err := s.connection(10 * time.Second)
	if err != nil {
		return 0, err
	}
	// A guest that reads nothing must not hold a writer for ever.
	if err := conn.SetWriteDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return 0, fmt.Errorf("console: %w", err)
	}
	n, err := conn.Write(p)
	if err != nil {
		err = fmt.Errorf("console: the guest takes no input: %w", err)
	}
	return n, err
}

// connection waits until the console is connected: one that was opened just now,
// or that QEMU makes just now, is soon.
func (s *consoleStream) connection(limit time.Duration) (net.Conn, error) {
	late := time.After(limit)
	for {
		s.c.mu.Lock()
		conn, more, closed := s.c.conn, s.c.more, s.c.closed
		s.c.mu.Unlock()
		if conn != nil {
			return conn, nil
		}
		if closed {
			return nil, fmt.Errorf("console: %w", ErrClosed)
		}
		select {
		case <-more:
		case <-s.gone:
			return nil, fmt.Errorf("console: %w", ErrClosed)
		case <-late:
			return nil, fmt.Errorf("console: %w", ErrNotRunning)
		}
	}
}

// Close implements io.Closer. It may be called while Read waits.
func (s *consoleStream) Close() error {
	s.once.Do(func() { close(s.gone) })
	return nil
}
