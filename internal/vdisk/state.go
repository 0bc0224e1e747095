package vdisk

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/cespare/xxhash/v2"
	"github.com/google/uuid"

	"mortise/internal/keysafe"
)

// The state file stands beside the extent of an encrypted disk, or of one that
// is being encrypted or decrypted. It has two slots that are written in turn,
// so that a torn write leaves the one before. doc/disk-format.md has the bytes.
const (
	stateSuffix  = ".state"
	stateMagic   = "MORTSTAT"
	stateVersion = 1

	headerSize   = 256
	headerStride = 4096             // slot n's header is at n × headerStride
	sumsOffset   = 2 * headerStride // slot n's sums are at sumsOffset + n × sumsStride
	sumsStride   = maxZone / SectorSize * sumSize
	sumSize      = 8
	stateMax     = sumsOffset + 2*sumsStride // length of the file while converting

	macInfo = "mortise vdisk state v1"
)

// maxZone bounds the hot zone of a conversion, in bytes: what a state file must
// have room for and what a guest's request may have to wait for.
const maxZone = 16 << 20

// Conversion is what is being done to an extent.
type Conversion uint8

const (
	NotConverting Conversion = iota
	Encrypting               // clear → key
	Decrypting               // key → clear
	Recrypting               // key → other key (deep recrypt)
)

func (c Conversion) String() string {
	switch c {
	case NotConverting:
		return ""
	case Encrypting:
		return "encrypt"
	case Decrypting:
		return "decrypt"
	case Recrypting:
		return "deep recrypt"
	}
	return fmt.Sprintf("conversion %d", uint8(c))
}

// state is the content of one slot.
type state struct {
	seq   uint64
	disk  uuid.UUID
	size  int64  // of the virtual disk, bytes
	opens uint64 // how often the disk was opened for writing
	delta bool   // the file has a presence bitmap; it never changes

	// The key in force, and while converting the one that is coming. An epoch
	// counts a disk's DEKs; 0 with a zero check value means in clear.
	epoch, targetEpoch uint64
	check, targetCheck keyCheck

	// Below boundary the extent has the target's form, above the source's. The
	// sectors of [hot, hot+hotLen) have either, and sums has a checksum of each
	// one's new form: the target's, or the source's when the conversion runs
	// back. hotLen 0: no hot zone.
	kind        Conversion
	back        bool // cancelled: the boundary goes down
	boundary    int64
	hot, hotLen int64
	sums        []uint64

	mac, targetMAC [keysafe.MACSize]byte
}

// keyCheck identifies a DEK without telling anything about it.
type keyCheck [16]byte

// header offsets; every number is little-endian.
const (
	offMagic       = 0   // 8 bytes
	offVersion     = 8   // uint16
	offFlags       = 10  // uint16, flagBack and flagDelta; any other is refused
	offKind        = 12  // uint8
	offSeq         = 16  // uint64
	offDisk        = 24  // 16 bytes
	offSize        = 40  // uint64
	offOpens       = 48  // uint64
	offEpoch       = 56  // uint64
	offTargetEpoch = 64  // uint64
	offCheck       = 72  // 16 bytes
	offTargetCheck = 88  // 16 bytes
	offBoundary    = 104 // uint64
	offHot         = 112 // uint64
	offHotLen      = 120 // uint64
	offSums        = 128 // SHA-256 of the sums in use
	offMACs        = 160 // what is before is authenticated
	offMAC         = 160 // 32 bytes
	offTargetMAC   = 192 // 32 bytes
	offChecksum    = 248 // xxHash64 of the bytes before
)

// flagBack: the conversion runs back. flagDelta: the extent is a snapshot link's,
// and this file has its presence bitmap.
const (
	flagBack  = 1 << 0
	flagDelta = 1 << 1
)

// header encodes s but for MACs and checksum.
func (s *state) header(sums []byte) []byte {
	le := binary.LittleEndian
	h := make([]byte, headerSize)
	copy(h[offMagic:], stateMagic)
	le.PutUint16(h[offVersion:], stateVersion)
	var flags uint16
	if s.back {
		flags |= flagBack
	}
	if s.delta {
		flags |= flagDelta
	}
	le.PutUint16(h[offFlags:], flags)
	h[offKind] = byte(s.kind)
	le.PutUint64(h[offSeq:], s.seq)
	copy(h[offDisk:], s.disk[:])
	le.PutUint64(h[offSize:], uint64(s.size))
	le.PutUint64(h[offOpens:], s.opens)
	le.PutUint64(h[offEpoch:], s.epoch)
	le.PutUint64(h[offTargetEpoch:], s.targetEpoch)
	copy(h[offCheck:], s.check[:])
	copy(h[offTargetCheck:], s.targetCheck[:])
	le.PutUint64(h[offBoundary:], uint64(s.boundary))
	le.PutUint64(h[offHot:], uint64(s.hot))
	le.PutUint64(h[offHotLen:], uint64(s.hotLen))
	d := sha256.Sum256(sums)
	copy(h[offSums:], d[:])
	return h
}

func (s *state) encodeSums() []byte {
	b := make([]byte, 0, len(s.sums)*sumSize)
	for _, v := range s.sums {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// encode returns header and sums, with a MAC under the key in force (nil when in
// clear) and the one that is coming (nil when there is none).
func (s *state) encode(mac, target *keysafe.MAC) (header, sums []byte) {
	sums = s.encodeSums()
	h := s.header(sums)
	if mac != nil {
		s.mac = mac.Sum(keysafe.Line{Value: string(h[:offMACs])})
		copy(h[offMAC:], s.mac[:])
	}
	if target != nil {
		s.targetMAC = target.Sum(keysafe.Line{Value: string(h[:offMACs])})
		copy(h[offTargetMAC:], s.targetMAC[:])
	}
	putChecksum(h)
	return h, sums
}

func putChecksum(h []byte) {
	binary.LittleEndian.PutUint64(h[offChecksum:], xxhash.Sum64(h[:offChecksum]))
}

// verify says whether the key of mac wrote s: its MAC is sum.
func (s *state) verify(mac *keysafe.MAC, sum [keysafe.MACSize]byte) bool {
	return mac.Verify(sum[:], keysafe.Line{Value: string(s.header(s.encodeSums())[:offMACs])})
}

var (
	errTorn    = errors.New("not a whole slot")
	errVersion = errors.New("written by a newer version")
)

// decodeSlot reads slot n. errTorn means that nothing says what was meant;
// errVersion that this version must keep its hands off.
func decodeSlot(r io.ReaderAt, n int64) (*state, error) {
	le := binary.LittleEndian
	h := make([]byte, headerSize)
	if _, err := r.ReadAt(h, n*headerStride); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, errTorn
		}
		return nil, err
	}
	if string(h[offMagic:offMagic+8]) != stateMagic || le.Uint64(h[offChecksum:]) != xxhash.Sum64(h[:offChecksum]) {
		return nil, errTorn
	}
	if v := le.Uint16(h[offVersion:]); v != stateVersion {
		return nil, fmt.Errorf("%w: format version %d, this one reads %d", errVersion, v, stateVersion)
	}
	flags := le.Uint16(h[offFlags:])
	if flags&^(flagBack|flagDelta) != 0 {
		return nil, fmt.Errorf("%w: flags %#04x are unknown", errVersion, flags)
	}
	s := &state{
		seq: le.Uint64(h[offSeq:]), disk: uuid.UUID(h[offDisk : offDisk+16]),
		size: int64(le.Uint64(h[offSize:])), opens: le.Uint64(h[offOpens:]),
		epoch: le.Uint64(h[offEpoch:]), targetEpoch: le.Uint64(h[offTargetEpoch:]),
		check: keyCheck(h[offCheck : offCheck+16]), targetCheck: keyCheck(h[offTargetCheck : offTargetCheck+16]),
		kind: Conversion(h[offKind]), back: flags&flagBack != 0, delta: flags&flagDelta != 0,
		boundary: int64(le.Uint64(h[offBoundary:])), hot: int64(le.Uint64(h[offHot:])), hotLen: int64(le.Uint64(h[offHotLen:])),
		mac: [keysafe.MACSize]byte(h[offMAC : offMAC+32]), targetMAC: [keysafe.MACSize]byte(h[offTargetMAC : offTargetMAC+32]),
	}
	if err := s.validate(); err != nil {
		return nil, err
	}
	sums := make([]byte, s.hotLen/SectorSize*sumSize)
	if len(sums) > 0 {
		if _, err := r.ReadAt(sums, sumsOffset+n*sumsStride); err != nil {
			if errors.Is(err, io.EOF) {
				return nil, errTorn
			}
			return nil, err
		}
	}
	if d := sha256.Sum256(sums); !bytes.Equal(d[:], h[offSums:offSums+32]) {
		return nil, errTorn
	}
	for i := 0; i < len(sums); i += sumSize {
		s.sums = append(s.sums, le.Uint64(sums[i:]))
	}
	if !bytes.Equal(s.header(sums)[:offMACs], h[:offMACs]) {
		return nil, fmt.Errorf("%w: something stands where this one has zeros", errVersion)
	}
	return s, nil
}

// validate refuses what no version of this program writes, so that the rest of the
// package can calculate with the numbers.
func (s *state) validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", errVersion, fmt.Sprintf(format, args...))
	}
	switch end := roundUp(s.size, UnitSize); {
	case s.kind > Recrypting:
		return bad("conversion kind %d is unknown", s.kind)
	case s.size <= 0 || s.size > MaxSize || s.size%SectorSize != 0:
		return bad("a disk of %d bytes", s.size)
	case s.boundary < 0 || s.boundary > end || s.boundary%UnitSize != 0:
		return bad("boundary %d on a disk of %d bytes", s.boundary, s.size)
	case s.hotLen < 0 || s.hotLen > maxZone || s.hotLen%UnitSize != 0:
		return bad("a hot zone of %d bytes", s.hotLen)
	case s.hotLen == 0 && s.hot != 0, s.hotLen > 0 && (s.hot != s.boundary || s.hotLen > end-s.hot):
		return bad("a hot zone of %d bytes at %d with the boundary at %d", s.hotLen, s.hot, s.boundary)
	case s.kind == NotConverting && (s.back || s.boundary != 0 || s.hotLen != 0 || s.targetEpoch != 0 || s.targetCheck != keyCheck{}):
		return bad("a conversion's boundary without a conversion")
	}
	return nil
}

// grown says whether s is of a disk that was about to grow: the state file learns
// its new length before the descriptor, which has the last word.
func (s *state) grown(size int64) bool {
	return s.kind == NotConverting && !s.delta && s.size > size
}

// A stateFile is an open state file and what its newest slot says.
type stateFile struct {
	name string
	f    file
	at   func(point string)
	cur  atomic.Pointer[state] // what the newest slot says; never changed
}

// createState makes the state file of s, whose sequence is 1, and makes it
// durable, the folder's entry included. One that is there already is replaced:
// the caller has decided that it means nothing.
func createState(fs fsys, at func(string), name string, s *state, mac, target *keysafe.MAC) (*stateFile, error) {
	f, err := fs.Open(name, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, err
	}
	sf := &stateFile{name: name, f: f, at: at}
	sf.cur.Store(&state{})
	err = func() error {
		if err := f.Truncate(0); err != nil {
			return err
		}
		if err := f.Truncate(sumsOffset); err != nil {
			return err
		}
		return sf.write(s, mac, target)
	}()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	at("state.created")
	return sf, nil
}

// openState reads the newer of the two slots. A missing file is an
// fs.ErrNotExist.
func openState(fs fsys, at func(string), name string, write bool) (*stateFile, error) {
	flag := os.O_RDONLY
	if write {
		flag = os.O_RDWR
	}
	f, err := fs.Open(name, flag)
	if err != nil {
		return nil, err
	}
	s, err := newestSlot(f)
	if err == nil && write {
		// What a killed predecessor wrote last may not be durable. It must be
		// before the other slot, which is all there is otherwise, is written.
		err = f.Sync()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	sf := &stateFile{name: name, f: f, at: at}
	sf.cur.Store(s)
	return sf, nil
}

func newestSlot(r io.ReaderAt) (*state, error) {
	var newest *state
	for n := range int64(2) {
		s, err := decodeSlot(r, n)
		switch {
		case errors.Is(err, errTorn):
			continue
		case err != nil:
			return nil, err
		case s.seq%2 != uint64(n):
			return nil, fmt.Errorf("%w: slot %d has sequence %d", errVersion, n, s.seq)
		case newest == nil || s.seq > newest.seq:
			newest = s
		}
	}
	if newest == nil {
		return nil, errTorn
	}
	return newest, nil
}

// reserve makes room for the sums of a hot zone, so that a full disk shows
// before a conversion and not in it.
func (sf *stateFile) reserve() error {
	err := sf.f.Allocate(stateMax)
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	st, err := sf.f.Stat() // where storage cannot reserve, the length at least
	if err != nil || st.size >= stateMax {
		return err
	}
	return sf.f.Truncate(stateMax)
}

// shrink gives that room back; if it cannot, the file is longer than needed.
func (sf *stateFile) shrink() {
	if sf.cur.Load().delta {
		_ = sf.f.Punch(sumsOffset, stateMax-sumsOffset)
	} else {
		_ = sf.f.Truncate(sumsOffset)
	}
}

// write makes s durable as the newest state, in the slot that does not hold the
// present one.
func (sf *stateFile) write(s *state, mac, target *keysafe.MAC) error {
	next := *s
	next.seq = sf.cur.Load().seq + 1
	next.delta = s.delta || sf.cur.Load().delta
	header, sums := next.encode(mac, target)
	slot := int64(next.seq % 2)
	if len(sums) > 0 {
		if _, err := sf.f.WriteAt(sums, sumsOffset+slot*sumsStride); err != nil {
			return err
		}
	}
	if _, err := sf.f.WriteAt(header, slot*headerStride); err != nil {
		return err
	}
	sf.at("state.written")
	if err := sf.f.Sync(); err != nil {
		return &syncError{err}
	}
	sf.cur.Store(&next)
	sf.at("state.durable")
	return nil
}

// syncError marks an fsync that failed: what is on disk is unknown and asking
// again would not tell.
type syncError struct{ err error }

func (e *syncError) Error() string { return e.err.Error() }
func (e *syncError) Unwrap() error { return e.err }

func roundUp(n, to int64) int64   { return (n + to - 1) / to * to }
func roundDown(n, to int64) int64 { return n / to * to }
