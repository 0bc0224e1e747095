package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"time"
)

// A segment is a header and blocks, then zeros. Numbers are big-endian.
//
//	header  8   "MORTAUD" and the format's version, 1
//	        16  id of the log, random
//	        8   number of the first entry of this segment
//	        32  hash of the chain before that entry
//	        8   when the segment was made, nanoseconds since 1970
//	        1   length of the member's name
//	        n   the member's name
//	        4   CRC-32C of all that
//
//	block   4   "MBLK"
//	        1   kind: 1 entries, 2 head, 3 end of the segment
//	        4   length of the body
//	        8   entries: number of the first; head, end: number of the last before it
//	        4   CRC-32C of the log's id, the 17 bytes before this, and the body
//	        n   body
//
// The body of entries is one or more of them, each a uvarint length and the
// entry (entry.go), and then the hash of the chain after the last. The body of a
// head or end is that hash (32), the time (8, nanoseconds since 1970), the public
// key (32) and the signature (64) of a [Head].
//
// The chain begins with SHA-256("mortise audit log\0" ‖ id of the log).
//
// A block is one write, and is synced before the next is written. So a block
// that does not check is torn, was never acknowledged and is cut off when the log
// is opened, if no block follows it; otherwise the log is damaged. The id of the
// log, which no client knows, is in the CRC so that nobody can have a block
// written inside an entry.
const (
	magic       = "MORTAUD\x01"
	idLen       = 16
	headerMin   = 8 + idLen + 8 + 32 + 8 + 1 + 4
	blockMagic  = "MBLK"
	blockHeader = 4 + 1 + 4 + 8 + 4
	headBody    = sha256.Size + 8 + ed25519.PublicKeySize + ed25519.SignatureSize
	// maxBody bounds a block's body.
	maxBody = 4 << 20
	// maxMember is the longest name of a member, in bytes.
	maxMember = 128
)

const (
	blockEntries = 1
	blockHead    = 2
	blockEnd     = 3
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type hash = [sha256.Size]byte

func chainStart(id []byte) hash {
	return sha256.Sum256(append([]byte("mortise audit log\x00"), id...))
}

type header struct {
	id     []byte
	first  uint64
	before hash
	made   time.Time
	member string
}

func (h *header) append(b []byte) []byte {
	start := len(b)
	b = append(b, magic...)
	b = append(b, h.id...)
	b = binary.BigEndian.AppendUint64(b, h.first)
	b = append(b, h.before[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(h.made.UnixNano()))
	b = append(b, byte(len(h.member)))
	b = append(b, h.member...)
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

var errTorn = errors.New("it is cut off or altered")

// readHeader reads a segment's header and returns its length.
func readHeader(r io.Reader) (h header, n int, err error) {
	b := make([]byte, headerMin, headerMin+maxMember)
	if _, err := io.ReadFull(r, b); err != nil {
		return h, 0, fmt.Errorf("its header: %w", errTorn)
	}
	if string(b[:7]) != magic[:7] {
		return h, 0, errors.New("it is no segment of an audit log")
	}
	if b[7] != magic[7] {
		return h, 0, fmt.Errorf("it has format %d; this program reads %d", b[7], magic[7])
	}
	name := int(b[8+idLen+8+32+8])
	if name > maxMember {
		return h, 0, fmt.Errorf("its header: %w", errTorn)
	}
	b = b[:headerMin+name]
	if _, err := io.ReadFull(r, b[headerMin:]); err != nil {
		return h, 0, fmt.Errorf("its header: %w", errTorn)
	}
	end := len(b) - 4
	if crc32.Checksum(b[:end], castagnoli) != binary.BigEndian.Uint32(b[end:]) {
		return h, 0, fmt.Errorf("its header: %w", errTorn)
	}
	h.id = bytes.Clone(b[8 : 8+idLen])
	h.first = binary.BigEndian.Uint64(b[8+idLen:])
	h.before = hash(b[8+idLen+8:])
	h.made = time.Unix(0, int64(binary.BigEndian.Uint64(b[8+idLen+8+32:]))).UTC()
	h.member = string(b[end-name : end])
	return h, len(b), nil
}

// sealBlock fills in the header of a block whose body follows the room for it.
func sealBlock(b, id []byte, kind byte, sequence uint64) {
	copy(b, blockMagic)
	b[4] = kind
	binary.BigEndian.PutUint32(b[5:], uint32(len(b)-blockHeader))
	binary.BigEndian.PutUint64(b[9:], sequence)
	binary.BigEndian.PutUint32(b[17:], blockSum(id, b[:17], b[blockHeader:]))
}

func blockSum(id, head, body []byte) uint32 {
	sum := crc32.Update(crc32.Checksum(id, castagnoli), castagnoli, head)
	return crc32.Update(sum, castagnoli, body)
}

// A block as it was read.
type block struct {
	offset   int64
	length   int64 // with its header
	kind     byte
	sequence uint64
	body     []byte // good until the next is read
}

// parseBlock reads the block that b begins with.
func parseBlock(b, id []byte) (block, error) {
	if len(b) < blockHeader || string(b[:4]) != blockMagic {
		return block{}, errTorn
	}
	n := binary.BigEndian.Uint32(b[5:])
	if n > maxBody || len(b)-blockHeader < int(n) {
		return block{}, errTorn
	}
	body := b[blockHeader : blockHeader+int(n)]
	if blockSum(id, b[:17], body) != binary.BigEndian.Uint32(b[17:]) {
		return block{}, errTorn
	}
	return block{length: int64(blockHeader + n), kind: b[4], sequence: binary.BigEndian.Uint64(b[9:]), body: body}, nil
}

// blocks yields the blocks of r from offset on, and ends at zeros or the end of
// r. An error, errTorn for one, ends it; offset is then where it is.
func blocks(r io.ReaderAt, id []byte, offset int64) iter.Seq2[block, error] {
	return func(yield func(block, error) bool) {
		buf := make([]byte, 256<<10)
		var have []byte // bytes at offset, in buf
		at := offset    // where the bytes after have are read
		fill := func(want int) error {
			if len(have) >= want {
				return nil
			}
			if want > len(buf) {
				grown := make([]byte, want)
				copy(grown, have)
				buf, have = grown, grown[:len(have)]
			} else {
				copy(buf, have)
				have = buf[:len(have)]
			}
			n, err := r.ReadAt(buf[len(have):], at)
			have, at = buf[:len(have)+n], at+int64(n)
			if err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("reading at offset %d: %w", at, err)
			}
			return nil
		}
		for {
			if err := fill(blockHeader); err != nil {
				yield(block{offset: offset}, err)
				return
			}
			if len(have) == 0 || allZero(have[:min(len(have), blockHeader)]) {
				return
			}
			if len(have) >= blockHeader && string(have[:4]) == blockMagic {
				if n := binary.BigEndian.Uint32(have[5:]); n <= maxBody {
					if err := fill(blockHeader + int(n)); err != nil {
						yield(block{offset: offset}, err)
						return
					}
				}
			}
			b, err := parseBlock(have, id)
			b.offset = offset
			if !yield(b, err) || err != nil {
				return
			}
			have, offset = have[b.length:], offset+b.length
		}
	}
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// entries splits the body of a block of entries: the encoded entries, and the
// hash of the chain after them.
func entries(body []byte) (list [][]byte, after hash, err error) {
	if len(body) < sha256.Size {
		return nil, after, errTorn
	}
	rest := body[:len(body)-sha256.Size]
	after = hash(body[len(rest):])
	for len(rest) > 0 {
		n, k := binary.Uvarint(rest)
		if k <= 0 || n > uint64(len(rest)-k) || n > maxEntry {
			return nil, after, errTorn
		}
		list, rest = append(list, rest[k:k+int(n)]), rest[k+int(n):]
	}
	return list, after, nil
}

// link is one step of the chain. scratch is room to be used again.
func link(scratch []byte, before hash, entry []byte) (hash, []byte) {
	scratch = append(append(scratch[:0], before[:]...), entry...)
	return sha256.Sum256(scratch), scratch
}

// appendHead encodes a head's or end's body.
func appendHead(b []byte, h Head) []byte {
	b = append(b, h.Hash...)
	b = binary.BigEndian.AppendUint64(b, uint64(h.Time.UnixNano()))
	b = append(b, h.Key...)
	return append(b, h.Signature...)
}

func headOf(b block, in header) (h Head, err error) {
	if len(b.body) != headBody {
		return h, errTorn
	}
	return Head{
		Version: headVersion, Member: in.member, Log: in.id, Sequence: b.sequence,
		Hash:      bytes.Clone(b.body[:32]),
		Time:      time.Unix(0, int64(binary.BigEndian.Uint64(b.body[32:]))).UTC(),
		Key:       bytes.Clone(b.body[40:72]),
		Signature: bytes.Clone(b.body[72:]),
	}, nil
}
