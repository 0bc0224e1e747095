package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"

	"mortise/internal/atomicfile"
)

// A Record is an entry as it stands in a log: a line of an export.
type Record struct {
	Entry
	Log  Hex `json:"log"`
	Hash Hex `json:"hash"` // of the chain after it
}

// Records yields what is durable, from the entry from on, oldest first. It is
// meant for a log that is open; a closed folder can be read with [ReadFolder].
func (l *Log) Records(from uint64) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		upTo := l.Durable()
		if upTo == 0 || from > upTo {
			return
		}
		for r, err := range readFolder(l.o.Dir, from, upTo) {
			if !yield(r, err) || err != nil {
				return
			}
		}
	}
}

// ReadFolder yields the entries of a log in a folder. Nothing is verified.
func ReadFolder(dir string) iter.Seq2[Record, error] { return readFolder(dir, 0, 0) }

// readFolder ends at entry upTo, 0 for none.
func readFolder(dir string, from, upTo uint64) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		segments, err := list(dir, segmentSuffix)
		if err != nil {
			yield(Record{}, fmt.Errorf("audit: reading the log in %s: %w", dir, err))
			return
		}
		for i, first := range segments {
			if upTo > 0 && first > upTo || i+1 < len(segments) && segments[i+1] <= from {
				continue
			}
			if !readSegment(filepath.Join(dir, segmentName(first)), from, upTo, yield) {
				return
			}
		}
	}
}

func readSegment(path string, from, upTo uint64, yield func(Record, error) bool) bool {
	fail := func(err error) bool {
		yield(Record{}, fmt.Errorf("audit: reading %s: %w", path, err))
		return false
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) { // removed meanwhile
		return true
	}
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	h, n, err := readHeader(f)
	if err != nil {
		return fail(err)
	}
	chain, scratch := h.before, []byte(nil)
	for b, err := range blocks(f, h.id, int64(n)) {
		if err != nil {
			return fail(fmt.Errorf("at offset %d: %w", b.offset, err))
		}
		if b.kind != blockEntries {
			continue
		}
		list, _, err := entries(b.body)
		if err != nil {
			return fail(err)
		}
		for _, encoded := range list {
			chain, scratch = link(scratch, chain, encoded)
			e, err := Decode(encoded)
			if err != nil {
				return fail(fmt.Errorf("at offset %d: %w", b.offset, err))
			}
			if e.Sequence >= from {
				at := chain
				if !yield(Record{Entry: e, Log: h.id, Hash: at[:]}, nil) {
					return false
				}
			}
			if upTo > 0 && e.Sequence >= upTo {
				return true
			}
		}
	}
	return true
}

// Verify checks the log that is open, as far as it is durable.
func (l *Log) Verify(o VerifyOptions) (Report, error) {
	l.removing.Lock()
	defer l.removing.Unlock()
	if o.UpTo = l.Durable(); o.UpTo == 0 {
		return Report{Member: l.o.Member, Log: l.id}, nil
	}
	return Verify(l.o.Dir, o)
}

// A File is a piece of an exported log: Copy writes its Size bytes.
type File struct {
	Name string
	Size int64
	Copy func(io.Writer) error
}

// Files lists what an export of the whole log consists of: segments and
// tombstones, up to what is durable now. Anchors and keys are the caller's to
// add.
func (l *Log) Files() ([]File, error) {
	upTo := l.Durable()
	segments, err := list(l.o.Dir, segmentSuffix)
	if err != nil {
		return nil, err
	}
	stones, err := list(l.o.Dir, tombstoneSuffix)
	if err != nil {
		return nil, err
	}
	var all []File
	for _, first := range stones {
		b, err := atomicfile.Read(filepath.Join(l.o.Dir, tombstoneName(first)), 64<<10)
		if err != nil {
			return nil, err
		}
		all = append(all, File{tombstoneName(first), int64(len(b)), func(w io.Writer) error { _, err := w.Write(b); return err }})
	}
	for _, first := range segments {
		path := filepath.Join(l.o.Dir, segmentName(first))
		size, err := goodLength(path, upTo)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, File{segmentName(first), size, func(w io.Writer) error {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = io.CopyN(w, f, size)
			return err
		}})
	}
	return all, nil
}

// goodLength is how much of a segment is written and synced: its blocks up to
// entry upTo, and the heads behind them.
func goodLength(path string, upTo uint64) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	h, n, err := readHeader(f)
	if err != nil {
		return 0, fmt.Errorf("audit: reading %s: %w", path, err)
	}
	end := int64(n)
	for b, err := range blocks(f, h.id, end) {
		if errors.Is(err, errTorn) || err == nil && (b.sequence > upTo) {
			break
		}
		if err != nil {
			return 0, err
		}
		end = b.offset + b.length
	}
	return end, nil
}

// WriteJSON writes the record as one line.
func (r *Record) WriteJSON(w io.Writer) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}
