package nbd

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
)

// contexts are the metadata contexts that a client chose: what block status tells
// it of a range. base:allocation has the id metaAllocationID, the bitmaps the ids
// behind it.
type contexts struct {
	allocation bool
	bitmaps    []*Bitmap
}

func (s contexts) count() int {
	n := len(s.bitmaps)
	if s.allocation {
		n++
	}
	return n
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT: export name,
// 32-bit count, queries. In a list "base:", "qemu:" and "qemu:dirty-bitmap:" ask
// for all of a name space, and no query asks for everything.
func (h *handshake) metaContext(opt option, data []byte) error {
	if opt == optSetMetaContext {
		h.metaExport, h.chosen = "", contexts{} // even a refused request ends the earlier choice
	}
	if !h.structured {
		return h.refuse(opt, repErrInvalid, "agree on structured replies first")
	}
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		return h.refuse(opt, repErrInvalid, "malformed request for metadata contexts")
	}
	count, rest := binary.BigEndian.Uint32(rest), rest[4:]
	all := opt == optListMetaContext && count == 0
	var queries []string
	for ; count > 0; count-- {
		var query string
		if query, rest, ok = cutString(rest); !ok {
			return h.refuse(opt, repErrInvalid, "malformed query for metadata contexts")
		}
		queries = append(queries, query)
	}
	if len(rest) != 0 {
		return h.refuse(opt, repErrInvalid, "data after the last query")
	}
	exp := h.srv.claim(name, h.conn)
	if exp == nil {
		return h.refuse(opt, repErrUnknown, fmt.Sprintf("no export %q", clip(name)))
	}
	asked := func(context string, spaces ...string) bool {
		return all || slices.ContainsFunc(queries, func(q string) bool {
			return q == context || opt == optListMetaContext && slices.Contains(spaces, q)
		})
	}
	var found contexts
	found.allocation = asked(metaAllocation, metaBase)
	for _, b := range exp.offered.all() {
		if asked(metaBitmap+b.name, metaQEMU, metaBitmap) && b.failed() == nil {
			found.bitmaps = append(found.bitmaps, b)
		}
	}
	if found.allocation {
		if err := h.showContext(opt, metaAllocationID, metaAllocation); err != nil {
			return err
		}
	}
	for i, b := range found.bitmaps {
		if err := h.showContext(opt, metaAllocationID+1+uint32(i), metaBitmap+b.name); err != nil {
			return err
		}
	}
	if opt == optSetMetaContext {
		h.metaExport, h.chosen = name, found
	}
	return h.reply(opt, repAck, nil)
}

// showContext tells a context, and when it was chosen its id.
func (h *handshake) showContext(opt option, id uint32, context string) error {
	if opt == optListMetaContext {
		id = 0
	}
	b := binary.BigEndian.AppendUint32(nil, id)
	return h.reply(opt, repMetaContext, append(b, context...))
}

// ValidBitmapName reports whether a bitmap may have that name: 1 to 64 letters,
// digits, '.', '_' and '-'. It is part of a file's name and of an NBD context's.
func ValidBitmapName(name string) bool {
	return name != "" && len(name) <= 64 && name[0] != '.' && strings.IndexFunc(name, func(c rune) bool {
		return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.ContainsRune("._-", c))
	}) < 0
}

// statusSize is the length of one context's chunk in an answer to BLOCK_STATUS,
// at most.
const statusSize = chunkHeaderSize + 4 + 8*maxExtents

// blockStatus describes a range in every context that the client chose. The
// answer is whole in r's buffer: a chunk a context, each with its header.
func (c *conn) blockStatus(r *request) error {
	s := &r.status
	*s = blockStatus{b: r.buf.b, n: uint64(r.n)}
	if r.flags&cmdFlagReqOne != 0 {
		s.limit = 1
	} else {
		s.limit = maxExtents
	}
	left := c.contexts.count()
	if c.contexts.allocation {
		left--
		s.begin()
		if err := c.exp.dev.BlockStatus(int64(r.off), int64(r.n), r.describe); err != nil {
			return err
		}
		s.finish(r.cookie, metaAllocationID, left == 0)
	}
	for i, b := range c.contexts.bitmaps {
		left--
		s.begin()
		b.status(int64(r.off), int64(r.n), r.describe)
		s.finish(r.cookie, metaAllocationID+1+uint32(i), left == 0)
	}
	return nil
}

// blockStatus is an answer to BLOCK_STATUS in the making.
type blockStatus struct {
	b       []byte
	n       uint64 // bytes that were asked about
	limit   int    // extents a context
	start   int    // of the context's chunk
	end     int    // of what is written
	extents int    // of the context
	covered uint64 // bytes that they describe
}

func (s *blockStatus) begin() {
	s.start = s.end
	s.end += chunkHeaderSize + 4
	s.extents, s.covered = 0, 0
}

// add appends an extent, or lengthens the last one. It returns false when no more
// is wanted.
func (s *blockStatus) add(n int64, st Status) bool {
	left := s.n - s.covered
	if n <= 0 || left == 0 {
		return false
	}
	part := uint32(min(uint64(n), left))
	if last := s.b[:s.end]; s.extents > 0 && Status(binary.BigEndian.Uint32(last[s.end-4:])) == st&(Hole|Zero) {
		length := last[s.end-8:]
		binary.BigEndian.PutUint32(length, binary.BigEndian.Uint32(length)+part)
	} else if s.extents == s.limit {
		return false
	} else {
		binary.BigEndian.PutUint32(s.b[s.end:], part)
		binary.BigEndian.PutUint32(s.b[s.end+4:], uint32(st&(Hole|Zero)))
		s.end += 8
		s.extents++
	}
	s.covered += uint64(part)
	return s.covered < s.n
}

// finish writes the chunk's header. A device that said nothing has allocated data.
func (s *blockStatus) finish(cookie uint64, id uint32, last bool) {
	if s.extents == 0 {
		s.add(int64(s.n), 0)
	}
	flags := uint16(0)
	if last {
		flags = chunkDone
	}
	h := binary.BigEndian.AppendUint32(s.b[s.start:s.start], magicStructured)
	h = binary.BigEndian.AppendUint16(h, flags)
	h = binary.BigEndian.AppendUint16(h, chunkBlockStatus)
	h = binary.BigEndian.AppendUint64(h, cookie)
	h = binary.BigEndian.AppendUint32(h, uint32(s.end-s.start-chunkHeaderSize))
	binary.BigEndian.AppendUint32(h, id)
}
