package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
)

// The file of a bitmap: a header, then records of one sector each, which storage
// writes whole or not at all. doc/disk-format.md specifies it. A record that is
// not whole stands for changes everywhere in it, a header for nothing.
const (
	bitmapSuffix  = ".dirty"
	bitmapMagic   = "MORTDIRT"
	bitmapVersion = 1

	recordSize        = 512
	granulesPerRegion = 256
	regionsPerRecord  = 15
	granulesPerRecord = regionsPerRecord * granulesPerRegion
	wordsPerRecord    = granulesPerRecord / 64
	firstRecord       = 4096 // offset of record 0

	// offsets in a record; numbers are little-endian
	offIntents = granulesPerRecord / 8 // uint16
	offIndex   = 496                   // uint64
	offRecCRC  = 508                   // CRC-32C of the bytes before

	// offsets in the header
	offHeadVersion = 8  // uint16
	offHeadFlags   = 10 // uint16, none defined
	offHeadShift   = 12 // uint8
	offHeadSize    = 16 // uint64
	offHeadName    = 24 // uint8 and that many bytes, to 128
	offHeadSeal    = 128
	maxSeal        = 64
	maxRecords     = 1 << 17 // 64 MiB of file
)

// bitmapHeader is the header of a bitmap's file, version 1.
type bitmapHeader struct {
	name  string
	size  int64
	shift uint
	seal  string
}

// newBitmapHeader checks what is asked for.
func newBitmapHeader(spec BitmapSpec, seal string) (bitmapHeader, error) {
	g := spec.Granularity
	if g == 0 {
		for g = 64 << 10; spec.Size/g > 2<<40/(64<<10); {
			g *= 2
		}
	}
	h := bitmapHeader{name: spec.Name, size: spec.Size, seal: seal}
	for h.shift = 0; int64(1)<<h.shift < g && h.shift < 62; {
		h.shift++
	}
	if g != 1<<h.shift {
		return h, fmt.Errorf("a granularity of %d bytes is no power of two", g)
	}
	return h, h.check()
}

// check says what would be no header.
func (h bitmapHeader) check() error {
	switch {
	case !ValidBitmapName(h.name):
		return fmt.Errorf("%q is no name of a bitmap: 1 to 64 letters, digits, '.', '_', '-'", clip(h.name))
	case h.shift < 12 || h.shift > 26:
		return fmt.Errorf("a granularity of 2^%d bytes: choose 4 KiB to 64 MiB", h.shift)
	case h.size <= 0 || h.size%SectorSize != 0 || h.records() > maxRecords:
		return fmt.Errorf("a disk of %d bytes at a granularity of %d: choose a coarser one", h.size, int64(1)<<h.shift)
	case len(h.seal) > maxSeal:
		return fmt.Errorf("a seal of %d bytes, at most %d fit", len(h.seal), maxSeal)
	}
	return nil
}

func (h bitmapHeader) records() int64 {
	granules := (h.size-1)>>h.shift + 1
	return (granules + granulesPerRecord - 1) / granulesPerRecord
}

func (h bitmapHeader) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, recordSize)
	copy(b, bitmapMagic)
	le.PutUint16(b[offHeadVersion:], bitmapVersion)
	b[offHeadShift] = byte(h.shift)
	le.PutUint64(b[offHeadSize:], uint64(h.size))
	b[offHeadName] = byte(len(h.name))
	copy(b[offHeadName+1:], h.name)
	b[offHeadSeal] = byte(len(h.seal))
	copy(b[offHeadSeal+1:], h.seal)
	return putCRC(b)
}

func decodeBitmapHeader(b []byte) (h bitmapHeader, err error) {
	le := binary.LittleEndian
	if len(b) != recordSize || string(b[:8]) != bitmapMagic || !goodCRC(b) {
		return h, ErrBitmapDamaged
	}
	if v, f := le.Uint16(b[offHeadVersion:]), le.Uint16(b[offHeadFlags:]); v != bitmapVersion || f != 0 {
		return h, fmt.Errorf("it has version %d and flags %#x, which this version of Mortise does not know", v, f)
	}
	nameLen, sealLen := int(b[offHeadName]), int(b[offHeadSeal])
	if nameLen > offHeadSeal-offHeadName-1 || sealLen > maxSeal {
		return h, ErrBitmapDamaged
	}
	h = bitmapHeader{
		name: string(b[offHeadName+1:][:nameLen]), size: int64(le.Uint64(b[offHeadSize:])),
		shift: uint(b[offHeadShift]), seal: string(b[offHeadSeal+1:][:sealLen]),
	}
	if err := h.check(); err != nil {
		return h, fmt.Errorf("%w: %w", ErrBitmapDamaged, err)
	}
	if !bytes.Equal(h.encode(), b) {
		return h, fmt.Errorf("%w: something stands where this version has zeros", ErrBitmapDamaged)
	}
	return h, nil
}

func readBitmapHeader(f io.ReaderAt) (bitmapHeader, error) {
	b := make([]byte, recordSize)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return bitmapHeader{}, err
	}
	return decodeBitmapHeader(b)
}

func recordOffset(i int64) int64 { return firstRecord + i*recordSize }

// encodeRecord is record i as it is now; the caller holds its lock.
func (b *Bitmap) encodeRecord(i int64) []byte {
	le := binary.LittleEndian
	p := make([]byte, recordSize)
	for w := range int64(wordsPerRecord) {
		le.PutUint64(p[8*w:], b.words[i*wordsPerRecord+w].Load())
	}
	le.PutUint16(p[offIntents:], b.records[i].intents)
	le.PutUint64(p[offIndex:], uint64(i))
	return putCRC(p)
}

// readRecords takes over what the file says, and for what it does not say that all
// is changed. Intents stay until the record is written without them.
func (b *Bitmap) readRecords() error {
	const allRegions = 1<<regionsPerRecord - 1
	le := binary.LittleEndian
	p := make([]byte, recordSize)
	for i := range b.records {
		n, err := b.file.ReadAt(p, recordOffset(int64(i)))
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		intents := le.Uint16(p[offIntents:])
		if n < recordSize || !goodCRC(p) || le.Uint64(p[offIndex:]) != uint64(i) || intents > allRegions {
			intents = allRegions
			clear(p)
		}
		b.records[i].intents = intents
		for w := range wordsPerRecord {
			v := le.Uint64(p[8*w:])
			if intents>>(w*64/granulesPerRegion)&1 != 0 {
				v = ^uint64(0)
			}
			b.words[i*wordsPerRecord+w].Store(v)
		}
	}
	b.trimEnd()
	return nil
}

// trimEnd clears the bits behind the disk's end.
func (b *Bitmap) trimEnd() {
	from, to := (b.size-1)>>b.shift+1, int64(len(b.words))*64
	for at := from; at < to; {
		mask, next := wordMask(at, to)
		b.words[at/64].And(^mask)
		at = next
	}
}

func castagnoli(p []byte) uint32 { return crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)) }

func putCRC(p []byte) []byte {
	binary.LittleEndian.PutUint32(p[offRecCRC:], castagnoli(p[:offRecCRC]))
	return p
}

func goodCRC(p []byte) bool {
	return binary.LittleEndian.Uint32(p[offRecCRC:]) == castagnoli(p[:offRecCRC])
}

// bitmapFile is what a bitmap needs of its file. There are two implementations:
// the operating system's, and in the tests a model of a disk that loses power.
type bitmapFile interface {
	io.ReaderAt
	io.WriterAt
	WriteDurably(p []byte, off int64) error // and nothing else
	Sync() error
	Remove() error // durably
	Close() error
}

// createBitmapFile makes the file of an empty bitmap, with its space, durably.
func createBitmapFile(path string, h bitmapHeader) error {
	text := make([]byte, recordOffset(h.records()))
	copy(text, h.encode())
	p := make([]byte, recordSize)
	for i := range h.records() {
		clear(p)
		binary.LittleEndian.PutUint64(p[offIndex:], uint64(i))
		copy(text[recordOffset(i):], putCRC(p))
	}
	return atomicfile.Write(path, text, 0o600)
}

func openBitmapFile(path string) (bitmapFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%w: no regular file", ErrBitmapDamaged), err, f.Close())
	}
	return osBitmapFile{f}, nil
}

type osBitmapFile struct{ *os.File }

func (f osBitmapFile) Sync() error { return unix.Fdatasync(int(f.Fd())) }

func (f osBitmapFile) WriteDurably(p []byte, off int64) error {
	n, err := unix.Pwritev2(int(f.Fd()), [][]byte{p}, off, unix.RWF_DSYNC)
	if err == nil && n == len(p) {
		return nil
	}
	if _, err := f.WriteAt(p, off); err != nil {
		return err
	}
	return f.Sync()
}

func (f osBitmapFile) Remove() error {
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(f.Name()))
}

// cutBitmapName takes the bitmap's name out of its file's.
func cutBitmapName(file, extent string) (name string, ok bool) {
	name, ok = strings.CutPrefix(file, extent+".")
	if !ok {
		return "", false
	}
	return strings.CutSuffix(name, bitmapSuffix)
}
