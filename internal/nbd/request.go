package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// request is one command on its way through the server. Requests are used
// again and again: serving one allocates nothing.
type request struct {
	header
	whole  *whole // what r is a piece of, or nil
	errno  errno
	reason string // what was wrong with the request, for the client
	silent bool   // not answered: it never reached the device, or a later piece answers

	buf  *buffer // payload of a write, result of a read or of block status
	cost int     // bytes of buf that count against the connection's limit

	head     [96]byte // the reply's headers
	headLen  int
	tail     []byte // what follows them
	status   blockStatus
	describe func(n int64, s Status) bool
}

func newRequest() *request {
	r := &request{}
	r.describe = r.status.add
	return r
}

func (r *request) reset(h header) {
	r.header, r.whole = h, nil
	r.errno, r.reason, r.silent = 0, "", false
	r.cost, r.headLen, r.tail = 0, 0, nil
}

// pieceSize is the length of the pieces that large reads and writes are served
// in, and a multiple of which they end at, in bytes. A piece goes through the
// CPU's cache on its way between device and client, one buffer serves all, and
// a client can use the first while the last is read.
const pieceSize = 128 << 10

// whole is a request that is served in pieces.
type whole struct {
	mu   sync.Mutex
	left int   // pieces that are not finished
	err  error // of the first piece that failed
}

func (s *Server) newWhole(pieces int) *whole {
	w, _ := s.wholes.Get().(*whole)
	if w == nil {
		w = &whole{}
	}
	w.left, w.err = pieces, nil
	return w
}

// finish counts a piece and reports whether it was the last.
func (w *whole) finish(err error) (last bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.left--
	return w.left == 0
}

func (r *request) refuse(e errno, reason string) { r.errno, r.reason = e, reason }

// check finds what is wrong with a request before anything is done for it.
func (c *conn) check(r *request) {
	h := &r.header
	allowed := uint16(cmdFlagFUA)
	changes, ranged := false, true
	switch h.cmd {
	case cmdRead:
		if c.structured {
			allowed |= cmdFlagDF
		}
	case cmdWrite, cmdTrim:
		changes = true
	case cmdWriteZeroes:
		changes = true
		allowed |= cmdFlagNoHole | cmdFlagFastZero
	case cmdFlush:
		ranged = false
	case cmdBlockStatus:
		allowed |= cmdFlagReqOne
		if c.contexts.count() == 0 {
			r.refuse(eINVAL, "no metadata context was chosen")
			return
		}
	default:
		r.refuse(eINVAL, "unknown command")
		return
	}
	size := uint64(c.exp.dev.Size())
	switch {
	case h.flags&^allowed != 0:
		r.refuse(eINVAL, "flag not meant for this command")
	case changes && c.exp.readOnly:
		r.refuse(ePERM, "the export is read-only")
	case !ranged && (h.off != 0 || h.n != 0):
		r.refuse(eINVAL, "a flush has no range")
	case !ranged:
	case h.off%SectorSize != 0 || h.n%SectorSize != 0:
		r.refuse(eINVAL, "not whole sectors of 512 bytes")
	case h.off > size || uint64(h.n) > size-h.off:
		e := eINVAL
		if h.cmd == cmdWrite || h.cmd == cmdWriteZeroes {
			e = eNOSPC
		}
		r.refuse(e, "beyond the end of the disk")
	case h.cmd == cmdRead && h.n > maxPayload:
		r.refuse(eOVERFLOW, "more than 32 MiB")
	case h.cmd == cmdBlockStatus && h.n == 0:
		r.refuse(eINVAL, "empty range")
	}
}

// serve does what r asks for and makes its reply.
func (c *conn) serve(r *request) {
	if r.errno == 0 {
		if !c.exp.gate.enter(c.stop) {
			r.silent = true
			return
		}
		began := time.Now()
		err := c.do(r)
		c.exp.gate.leave()
		c.took(r, time.Since(began))
		if err != nil {
			r.errno = errnoOf(err)
			if r.errno != eNOTSUP || r.flags&cmdFlagFastZero == 0 {
				c.exp.fault(r, err)
			}
		}
	}
	if !r.silent {
		r.reply(c.structured)
	}
}

func (c *conn) do(r *request) error {
	dev, off, n := c.exp.dev, int64(r.off), int64(r.n)
	if n == 0 && r.cmd != cmdFlush {
		return nil
	}
	switch r.cmd {
	case cmdRead:
		return dev.ReadAt(r.buf.b[:n], off)
	case cmdBlockStatus:
		return c.blockStatus(r)
	case cmdFlush:
		return c.sync()
	}
	err := c.change(r, off, n)
	if w := r.whole; w != nil {
		if !w.finish(err) {
			r.silent = true
			return nil
		}
		err = w.err
		c.srv.wholes.Put(w)
	}
	if err == nil && r.flags&cmdFlagFUA != 0 {
		err = c.sync()
	}
	return err
}

// change does what changes the disk, and notes it in the bitmaps before.
func (c *conn) change(r *request, off, n int64) error {
	if err := c.exp.mark(off, n); err != nil {
		return err
	}
	dev := c.exp.dev
	switch r.cmd {
	case cmdWrite:
		return dev.WriteAt(r.buf.b[:n], off)
	case cmdTrim:
		return dev.Trim(off, n)
	}
	err := dev.WriteZeroes(off, n, r.flags&cmdFlagNoHole == 0)
	if errors.Is(err, errors.ErrUnsupported) && r.flags&cmdFlagFastZero == 0 {
		err = c.writeZeroes(off, n)
	}
	return err
}

// sync makes durable what any connection was told is written: dirtiness belongs
// to the disk. That is what flagCanMultiConn promises.
func (c *conn) sync() error {
	if deaf := c.srv.opt.deafTo; deaf != nil && deaf(c.number) {
		return nil
	}
	return c.exp.dev.Flush(c.ctx)
}

// zeroPiece is how much the server writes at once for a device that cannot
// zero by itself, in bytes.
const zeroPiece = 256 << 10

func (c *conn) writeZeroes(off, n int64) error {
	buf := c.srv.pool.get(zeroPiece)
	defer c.srv.pool.put(buf)
	for n > 0 {
		p := buf.b[:min(n, zeroPiece)]
		clear(p) // WriteAt may have changed it
		if err := c.exp.dev.WriteAt(p, off); err != nil {
			return err
		}
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}

// reply encodes the answer.
func (r *request) reply(structured bool) {
	payload := r.cmd == cmdRead || r.cmd == cmdBlockStatus
	switch {
	case r.errno != 0 && r.cmd == cmdRead && r.whole != nil:
		b := r.chunk(chunkErrorOffset, 14)
		b = binary.BigEndian.AppendUint32(b, uint32(r.errno))
		b = binary.BigEndian.AppendUint16(b, 0)
		r.headLen = len(binary.BigEndian.AppendUint64(b, r.off))
	case r.errno != 0 && structured:
		b := r.chunk(chunkError, 6+len(r.reason))
		b = binary.BigEndian.AppendUint32(b, uint32(r.errno))
		b = binary.BigEndian.AppendUint16(b, uint16(len(r.reason)))
		r.headLen = len(append(b, r.reason...))
	case r.errno != 0 || !structured || !payload:
		b := binary.BigEndian.AppendUint32(r.head[:0], magicSimple)
		b = binary.BigEndian.AppendUint32(b, uint32(r.errno))
		r.headLen = len(binary.BigEndian.AppendUint64(b, r.cookie))
		if r.cmd == cmdRead && r.errno == 0 && r.n > 0 {
			r.tail = r.buf.b[:r.n]
		}
	case r.cmd == cmdBlockStatus:
		r.tail = r.buf.b[:r.status.end] // chunks with their headers
	case r.n == 0:
		r.headLen = len(r.chunk(chunkNone, 0))
	case isZero(r.buf.b[:r.n]):
		b := binary.BigEndian.AppendUint64(r.chunk(chunkOffsetHole, 12), r.off)
		r.headLen = len(binary.BigEndian.AppendUint32(b, r.n))
	default:
		r.tail = r.buf.b[:r.n]
		b := r.chunk(chunkOffsetData, 8+len(r.tail))
		r.headLen = len(binary.BigEndian.AppendUint64(b, r.off))
	}
}

// chunk begins a chunk of a structured reply: the only one, unless r is a piece.
func (r *request) chunk(kind uint16, n int) []byte {
	flags := uint16(chunkDone)
	if r.whole != nil && r.cmd == cmdRead {
		flags = 0
	}
	b := binary.BigEndian.AppendUint32(r.head[:0], magicStructured)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	return binary.BigEndian.AppendUint32(b, uint32(n))
}

// isZero reports whether p, of whole sectors, holds only zeros. Data mostly
// shows in the first bytes.
func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if p[0] != 0 || !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

var zeros [4096]byte // never written

// throttle lets one message a second through and counts the others.
type throttle struct {
	next    atomic.Int64 // Unix time in nanoseconds
	skipped atomic.Int64
}

// pass says whether a message may be logged now, and how many before it were not.
func (t *throttle) pass(now time.Time) (skipped int64, ok bool) {
	next := t.next.Load()
	if now.UnixNano() < next || !t.next.CompareAndSwap(next, now.Add(time.Second).UnixNano()) {
		t.skipped.Add(1)
		return 0, false
	}
	return t.skipped.Swap(0), true
}

// fault logs what a device could not do.
func (e *Export) fault(r *request, err error) {
	if similar, ok := e.faults.pass(time.Now()); ok {
		e.srv.opt.Logger.Error("nbd: device failed", "export", e.name, "command", r.cmd.String(),
			"offset", r.off, "length", r.n, "error", err, "similar", similar)
	}
}
