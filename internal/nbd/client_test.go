package nbd

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// client speaks NBD as proto.md has it, message by message, so that a test can
// also say what no proper client would.
type client struct {
	t testing.TB
	c net.Conn

	structured bool
	size       uint64
	flags      uint16

	partial map[uint64][]chunk // content of replies that are not complete, by cookie
}

type chunk struct {
	off  uint64
	data []byte
	hole bool
	err  errno
}

// serve starts a server with one export, "disk", and returns its socket.
func serve(t testing.TB, dev Device, opt Options, readOnly bool) (*Server, *Export, string) {
	t.Helper()
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	}
	s := New(opt)
	exp, err := s.Add("disk", dev, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	return s, exp, listenAndServe(t, s)
}

func listenAndServe(t testing.TB, s *Server) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return path
}

// testWriter logs through the test, which may have ended.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

// dial connects and says hello; options come next.
func dial(t testing.TB, path string) *client {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	cl := &client{t: t, c: c}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	hello := cl.read(18)
	if binary.BigEndian.Uint64(hello) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption || binary.BigEndian.Uint16(hello[16:]) != 3 {
		t.Fatalf("server said hello with %x", hello)
	}
	cl.write(be32(3))
	return cl
}

// connect is a client in the transmission phase.
func connect(t testing.TB, path string, structured bool) *client {
	t.Helper()
	c := dial(t, path)
	if structured {
		c.structuredReplies()
		if r := c.option(optSetMetaContext, metaQuery("disk", metaAllocation)); r.kind != repAck || len(r.infos) != 1 {
			t.Fatalf("SET_META_CONTEXT: %+v", r)
		}
	}
	c.transmit("disk")
	return c
}

func (c *client) structuredReplies() {
	c.t.Helper()
	if r := c.option(optStructuredReply, nil); r.kind != repAck {
		c.t.Fatalf("STRUCTURED_REPLY: %+v", r)
	}
	c.structured = true
}

func (c *client) transmit(name string) {
	c.t.Helper()
	r := c.option(optGo, infoRequest(name))
	if r.kind != repAck || len(r.infos) != 2 {
		c.t.Fatalf("GO: %+v", r)
	}
	c.size = binary.BigEndian.Uint64(r.infos[0][2:])
	c.flags = binary.BigEndian.Uint16(r.infos[0][10:])
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func wireString(s string) []byte { return append(be32(uint32(len(s))), s...) }

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func infoRequest(name string, wanted ...uint16) []byte {
	b := append(wireString(name), be16(uint16(len(wanted)))...)
	for _, w := range wanted {
		b = append(b, be16(w)...)
	}
	return b
}

func metaQuery(name string, queries ...string) []byte {
	b := append(wireString(name), be32(uint32(len(queries)))...)
	for _, q := range queries {
		b = append(b, wireString(q)...)
	}
	return b
}

func (c *client) write(b []byte) {
	c.t.Helper()
	if _, err := c.c.Write(b); err != nil {
		c.t.Fatalf("writing to the server: %v", err)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.c, b); err != nil {
		c.t.Fatalf("reading from the server: %v", err)
	}
	return b
}

// closed checks that the server ends the connection without another word.
func (c *client) closed() {
	c.t.Helper()
	if n, err := c.c.Read(make([]byte, 1)); n != 0 || err == nil || timedOut(err) {
		c.t.Fatalf("the connection is still open: %d, %v", n, err)
	}
}

type optReply struct {
	infos [][]byte // data of the replies before the last
	kind  uint32   // of the last
	data  []byte
}

func optionBytes(opt option, data []byte) []byte {
	return join(be64(magicOption), be32(uint32(opt)), be32(uint32(len(data))), data)
}

func (c *client) option(opt option, data []byte) (r optReply) {
	c.t.Helper()
	c.write(optionBytes(opt, data))
	for {
		h := c.read(20)
		if binary.BigEndian.Uint64(h) != magicOptReply || option(binary.BigEndian.Uint32(h[8:])) != opt {
			c.t.Fatalf("reply %x to option %d", h, opt)
		}
		r.kind, r.data = binary.BigEndian.Uint32(h[12:]), c.read(int(binary.BigEndian.Uint32(h[16:])))
		if r.kind == repAck || r.kind&(1<<31) != 0 {
			return r
		}
		r.infos = append(r.infos, r.data)
	}
}

func (h header) bytes() []byte {
	return join(be32(magicRequest), be16(h.flags), be16(uint16(h.cmd)), be64(h.cookie), be64(h.off), be32(h.n))
}

// send sends a request; cookie is its number.
func (c *client) send(cookie uint64, cmd command, flags uint16, off uint64, n uint32, payload []byte) {
	c.t.Helper()
	c.write(append(header{flags: flags, cmd: cmd, cookie: cookie, off: off, n: n}.bytes(), payload...))
}

type reply struct {
	cookie  uint64
	err     errno
	text    string
	simple  bool
	chunk   uint16 // of a structured reply
	data    []byte // what was read, or the descriptors of block status
	hole    bool
	chunks  int // of content or with an offset
	extents []extent
	changed []extent // of bitmaps
}

type extent struct {
	n uint32
	s Status
}

// receive takes the next reply; n is the length of the read it answers, if it
// is one.
func (c *client) receive(n int) (r reply) {
	c.t.Helper()
	switch magic := binary.BigEndian.Uint32(c.read(4)); magic {
	case magicSimple:
		r.simple = true
		r.err = errno(binary.BigEndian.Uint32(c.read(4)))
		r.cookie = binary.BigEndian.Uint64(c.read(8))
		if r.err == 0 && n > 0 {
			r.data = c.read(n)
		}
		return r
	case magicStructured:
		if !c.structured {
			c.t.Fatal("structured reply that was not agreed on")
		}
	default:
		c.t.Fatalf("reply with magic %#x", magic)
	}
	flags := binary.BigEndian.Uint16(c.read(2))
	r.chunk = binary.BigEndian.Uint16(c.read(2))
	r.cookie = binary.BigEndian.Uint64(c.read(8))
	b := c.read(int(binary.BigEndian.Uint32(c.read(4))))
	var part chunk
	switch r.chunk {
	case chunkNone:
		if len(b) != 0 {
			c.t.Fatalf("NONE chunk with %d bytes", len(b))
		}
	case chunkOffsetData:
		part = chunk{off: binary.BigEndian.Uint64(b), data: b[8:]}
	case chunkOffsetHole:
		part = chunk{off: binary.BigEndian.Uint64(b), data: make([]byte, binary.BigEndian.Uint32(b[8:])), hole: true}
	case chunkBlockStatus:
		id := binary.BigEndian.Uint32(b)
		for b = b[4:]; len(b) > 0; b = b[8:] {
			e := extent{binary.BigEndian.Uint32(b), Status(binary.BigEndian.Uint32(b[4:]))}
			if id == metaAllocationID {
				r.extents = append(r.extents, e)
			} else {
				r.changed = append(r.changed, e)
			}
		}
		if flags&chunkDone == 0 { // of one context, and more come
			next := c.receive(n)
			r.extents, r.changed = append(r.extents, next.extents...), append(r.changed, next.changed...)
			return r
		}
	case chunkError:
		r.err = errno(binary.BigEndian.Uint32(b))
		r.text = string(b[6:])
		if int(binary.BigEndian.Uint16(b[4:])) != len(r.text) || r.err == 0 {
			c.t.Fatalf("error chunk %x", b)
		}
	case chunkErrorOffset:
		part = chunk{off: binary.BigEndian.Uint64(b[6:]), err: errno(binary.BigEndian.Uint32(b))}
	default:
		c.t.Fatalf("chunk of type %d", r.chunk)
	}
	if c.partial == nil {
		c.partial = map[uint64][]chunk{}
	}
	parts := c.partial[r.cookie]
	if part.data != nil || part.err != 0 {
		parts = append(parts, part)
	}
	if flags&chunkDone == 0 {
		if flags != 0 || part.data == nil && part.err == 0 {
			c.t.Fatalf("chunk of type %d with flags %#x", r.chunk, flags)
		}
		c.partial[r.cookie] = parts
		return c.receive(n)
	}
	delete(c.partial, r.cookie)
	// Pieces come in any order, but make one range without gaps.
	slices.SortFunc(parts, func(a, b chunk) int { return cmp.Compare(a.off, b.off) })
	r.hole = len(parts) > 0
	for i, p := range parts {
		if p.err != 0 {
			r.err = p.err
			continue
		}
		if i > 0 && r.err == 0 && p.off != parts[0].off+uint64(len(r.data)) {
			c.t.Fatalf("chunk at %d behind %d bytes from %d", p.off, len(r.data), parts[0].off)
		}
		r.data = append(r.data, p.data...)
		r.hole = r.hole && p.hole
	}
	r.chunks = len(parts)
	return r
}

// do sends a request and takes its reply.
func (c *client) do(cmd command, flags uint16, off uint64, n uint32, payload []byte) reply {
	c.t.Helper()
	c.send(off^0xabcd, cmd, flags, off, n, payload)
	want := 0
	if cmd == cmdRead {
		want = int(n)
	}
	r := c.receive(want)
	if r.cookie != off^0xabcd {
		c.t.Fatalf("%v: reply with cookie %x", cmd, r.cookie)
	}
	return r
}

func (c *client) mustRead(off uint64, n int) []byte {
	c.t.Helper()
	r := c.do(cmdRead, 0, off, uint32(n), nil)
	if r.err != 0 || len(r.data) != n {
		c.t.Fatalf("read of %d at %d: error %d, %d bytes", n, off, r.err, len(r.data))
	}
	return r.data
}

func (c *client) mustWrite(off uint64, p []byte) {
	c.t.Helper()
	if r := c.do(cmdWrite, 0, off, uint32(len(p)), p); r.err != 0 {
		c.t.Fatalf("write of %d at %d: error %d", len(p), off, r.err)
	}
}

// together runs f n times at once.
func together(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			f(i)
		}()
	}
	wg.Wait()
}

// skipReply takes a structured or empty simple reply without allocating.
func (c *client) skipReply(b []byte) {
	c.t.Helper()
	read := func(n int) {
		if _, err := io.ReadFull(c.c, b[:n]); err != nil {
			c.t.Fatal(err)
		}
	}
	read(simpleSize)
	if binary.BigEndian.Uint32(b) == magicStructured {
		done := b[5]&chunkDone != 0
		read(chunkHeaderSize - simpleSize)
		read(int(binary.BigEndian.Uint32(b)))
		if !done {
			c.skipReply(b)
		}
	}
}
