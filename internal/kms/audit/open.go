package audit

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
)

const (
	segmentSuffix   = ".audit"
	tombstoneSuffix = ".removed"
	spareName       = "spare"
)

func segmentName(first uint64) string   { return fmt.Sprintf("%020d%s", first, segmentSuffix) }
func tombstoneName(first uint64) string { return fmt.Sprintf("%020d%s", first, tombstoneSuffix) }

// list returns the numbers in the names of dir's files that end in suffix, in
// order.
func list(dir, suffix string) ([]uint64, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []uint64
	for _, f := range files {
		digits, ok := strings.CutSuffix(f.Name(), suffix)
		n, err := strconv.ParseUint(digits, 10, 64)
		if ok && err == nil && len(digits) == 20 {
			all = append(all, n)
		}
	}
	slices.Sort(all)
	return all, nil
}

// Open opens the log in o.Dir, or begins one. A torn block at its end is cut
// off, and an entry says so; a log that lacks what was acknowledged is refused
// with ErrDamaged.
func Open(o Options) (_ *Log, err error) {
	if err := o.defaults(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("audit: making the log's folder: %w", err)
	}
	l := &Log{o: o, work: make(chan struct{}, 1), need: make(chan struct{}, 1), tried: make(chan struct{}), stop: make(chan struct{})}
	if l.lock, err = lockFolder(o.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			if l.segment != nil {
				l.segment.Close()
			}
			l.lock.Close()
			err = fmt.Errorf("audit: opening the log in %s: %w", o.Dir, err)
		}
	}()
	if err := l.finishRemoval(); err != nil {
		return nil, err
	}
	if err := os.Remove(filepath.Join(o.Dir, spareName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	segments, err := list(o.Dir, segmentSuffix)
	if err != nil {
		return nil, err
	}
	var notes []Entry
	if len(segments) == 0 {
		notes, err = l.create()
	} else {
		notes, err = l.resume(segments[len(segments)-1])
	}
	if err != nil {
		return nil, err
	}
	l.room = l.size - l.tail - endRoom
	l.pending = l.freshBatch(l.next)
	if l.room < o.SegmentSize/2 {
		l.wantSpare()
	}
	l.done.Go(l.write)
	l.done.Go(l.keepSpare)
	for _, e := range notes {
		e.Time, e.Member, e.Actor, e.Result = o.Now(), o.Member, "server", Success
		if _, err := l.Append(&e, true); err != nil {
			l.Close()
			return nil, err
		}
	}
	return l, nil
}

func lockFolder(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "LOCK"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("audit: locking the log's folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("audit: another process has the log in %s open: %w", dir, err)
	}
	return f, nil
}

// create begins a log in an empty folder.
func (l *Log) create() ([]Entry, error) {
	tombstones, err := list(l.o.Dir, tombstoneSuffix)
	if err != nil {
		return nil, err
	}
	if len(tombstones) > 0 {
		return nil, fmt.Errorf("%w: it has tombstones and no segment; move the folder away to begin a new log", ErrDamaged)
	}
	l.id = make([]byte, idLen)
	if _, err := rand.Read(l.id); err != nil {
		return nil, err
	}
	l.next, l.chain = 1, chainStart(l.id)
	l.durable = position{0, l.chain}
	f, err := l.fill()
	if err != nil {
		return nil, err
	}
	h := header{id: l.id, first: 1, before: l.chain, made: l.o.Now(), member: l.o.Member}
	n, err := l.begin(f, h)
	if err != nil {
		f.Close()
		return nil, err
	}
	l.segment, l.tail, l.size = f, n, l.o.SegmentSize
	detail := ""
	if a := l.o.Anchor; a != nil {
		detail = fmt.Sprintf("log %s, which has at least %d entries, is not here", a.Log, a.Sequence)
		l.o.Logger.Error("audit: the log that the anchor names is gone; a new one is begun", "dir", l.o.Dir, "log", a.Log.String(), "entries", a.Sequence)
	}
	return []Entry{{Operation: "Begin Audit Log", Object: fmt.Sprintf("%x", l.id), Detail: detail}}, nil
}

// resume goes on at the end of the log's last segment.
func (l *Log) resume(first uint64) (notes []Entry, err error) {
	path := filepath.Join(l.o.Dir, segmentName(first))
	if l.segment, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	st, err := l.segment.Stat()
	if err != nil {
		return nil, err
	}
	damaged := func(at int64, err error) error {
		return fmt.Errorf("%w: %s at offset %d: %w; see what is wrong with: mortise kms audit verify --folder %s; then move the folder away, as evidence, and a new log is begun",
			ErrDamaged, path, at, err, l.o.Dir)
	}
	h, n, err := readHeader(l.segment)
	switch {
	case err != nil:
		return nil, damaged(0, err)
	case h.first != first:
		return nil, damaged(0, fmt.Errorf("it begins at entry %d, and its name says %d", h.first, first))
	case h.member != l.o.Member:
		return nil, fmt.Errorf("it is the log of member %q, not %q: use that member's name, or another folder", h.member, l.o.Member)
	}
	l.id, l.next, l.chain = h.id, h.first, h.before
	anchor := l.o.Anchor
	if anchor != nil && string(anchor.Log) != string(l.id) {
		return nil, fmt.Errorf("%w: the anchor is of log %s and this is %s: put that log back, or move this one away", ErrDamaged, anchor.Log, Hex(l.id))
	}
	w := walker{id: h.id, next: h.first, chain: h.before}
	w.anchors(anchor)
	end := int64(n)
	ended := false
	for b, err := range blocks(l.segment, l.id, end) {
		if errors.Is(err, errTorn) {
			break
		}
		if err != nil {
			return nil, err
		}
		if problems := w.block(b, h); len(problems) > 0 {
			return nil, damaged(b.offset, errors.New(problems[0].Text))
		}
		end, ended = b.offset+b.length, b.kind == blockEnd
	}
	l.next, l.chain = w.next, w.chain
	l.durable = position{w.next - 1, w.chain}
	rest, err := inspectTail(l.segment, l.id, end, st.Size())
	if err != nil {
		return nil, err
	}
	switch {
	case rest.block:
		return nil, damaged(end, errors.New("an entry is broken that others follow"))
	case anchor != nil && anchor.Sequence > l.durable.sequence:
		return nil, damaged(end, fmt.Errorf("it ends with entry %d, and the anchor of %s has %d: the newest entries are gone",
			l.durable.sequence, anchor.Time.Format(time.RFC3339), anchor.Sequence))
	case rest.bytes > 0:
		// It was being written when the machine or the server went down.
		l.o.Logger.Warn("audit: a torn write was cut off the log's end; nobody was told that it had been made", "dir", l.o.Dir, "bytes", rest.bytes)
		notes = append(notes, Entry{Operation: "Cut Torn Tail", Object: path, Detail: fmt.Sprintf("%d bytes, SHA-256 %x", rest.bytes, rest.sum)})
	}
	l.tail, l.size = end, max(st.Size(), l.o.SegmentSize)
	if rest.bytes > 0 || st.Size() < l.o.SegmentSize {
		// Zeroed, so that it cannot come back as the tail of a later block.
		if err := l.zero(l.segment, l.tail, l.size); err != nil {
			return nil, err
		}
	}
	if ended { // it crashed between closing this one and beginning the next
		f, err := l.fill()
		if err != nil {
			return nil, err
		}
		nh := header{id: l.id, first: l.next, before: l.chain, made: l.o.Now(), member: l.o.Member}
		hn, err := l.begin(f, nh)
		if err != nil {
			f.Close()
			return nil, err
		}
		l.segment.Close()
		l.segment, l.tail, l.size = f, hn, l.o.SegmentSize
	}
	return notes, nil
}

// tail is what lies behind the last good block.
type tail struct {
	bytes int64 // up to the last that is not zero
	sum   [sha256.Size]byte
	block bool // a good block is among them
}

func inspectTail(r io.ReaderAt, id []byte, from, size int64) (t tail, err error) {
	b := make([]byte, max(0, size-from))
	if _, err := r.ReadAt(b, from); err != nil && !errors.Is(err, io.EOF) {
		return t, err
	}
	n := len(b)
	for n > 0 && b[n-1] == 0 {
		n--
	}
	t.bytes, t.sum = int64(n), sha256.Sum256(b[:n])
	for at := 1; at < n; at++ { // at 0 it would have been read
		if b[at] == blockMagic[0] {
			if _, err := parseBlock(b[at:], id); err == nil {
				t.block = true
				break
			}
		}
	}
	return t, nil
}

// fill makes the spare file, full of zeros: writing zeros now is what makes a
// later write neither need space nor metadata.
func (l *Log) fill() (*os.File, error) {
	if err := l.o.Step("spare"); err != nil {
		return nil, fmt.Errorf("making a segment: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(l.o.Dir, spareName), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making a segment: %w", err)
	}
	if err := l.zero(f, 0, l.o.SegmentSize); err != nil {
		f.Close()
		os.Remove(f.Name()) // what it holds may be needed
		return nil, fmt.Errorf("making a segment: %w", err)
	}
	return f, nil
}

// zero overwrites part of f, durably.
func (l *Log) zero(f *os.File, from, to int64) error {
	zeros := make([]byte, min(256<<10, max(0, to-from)))
	for at := from; at < to; at += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), to-at)], at); err != nil {
			return err
		}
	}
	return f.Sync()
}

func (l *Log) wantSpare() {
	select {
	case l.need <- struct{}{}:
	default:
	}
}

// retrySpare is how long the log waits before it tries to get space again.
const retrySpare = time.Second

// keepSpare makes the next segment before it is needed, and gets the log out of
// ErrNoSpace once there is space.
func (l *Log) keepSpare() {
	var again <-chan time.Time
	warned := false
	for {
		select {
		case <-l.stop:
			return
		case <-l.need:
		case <-again:
		}
		again = nil
		err := l.getSpace()
		l.mu.Lock()
		close(l.tried)
		l.tried = make(chan struct{})
		l.mu.Unlock()
		if err != nil {
			again = time.After(retrySpare)
			if !warned {
				l.o.Logger.Error("audit: the log gets no more space", "dir", l.o.Dir, "error", err)
			}
		} else if warned {
			l.o.Logger.Info("audit: the log has space again", "dir", l.o.Dir)
		}
		warned = err != nil
	}
}

func (l *Log) getSpace() error {
	l.mu.Lock()
	state, spare := l.state, l.spare
	l.mu.Unlock()
	if state != nil && !errors.Is(state, ErrNoSpace) {
		return nil
	}
	if spare == nil {
		f, err := l.fill()
		l.mu.Lock()
		l.spare, l.lack = f, err
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if state == nil {
		return nil
	}
	// A write found no space where space had been made (the file system copies
	// on write, say). The writer is idle while the log is in this state.
	if err := l.o.Step("repair"); err != nil {
		return err
	}
	if err := l.zero(l.segment, l.tail, l.size); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if errors.Is(l.state, ErrNoSpace) {
		l.state = nil
	}
	return nil
}

// finishRemoval removes segments whose tombstone is there: the removal was
// interrupted.
func (l *Log) finishRemoval() error {
	firsts, err := list(l.o.Dir, tombstoneSuffix)
	if err != nil || len(firsts) == 0 {
		return err
	}
	segments, err := list(l.o.Dir, segmentSuffix)
	if err != nil {
		return err
	}
	for _, first := range firsts {
		text, err := atomicfile.Read(filepath.Join(l.o.Dir, tombstoneName(first)), 64<<10)
		if err != nil {
			return err
		}
		t, err := parseTombstone(text)
		if err != nil {
			return fmt.Errorf("%w: %s: %w", ErrDamaged, tombstoneName(first), err)
		}
		for _, s := range segments {
			if s >= t.First && s <= t.Last {
				if err := os.Remove(filepath.Join(l.o.Dir, segmentName(s))); err != nil {
					return err
				}
			}
		}
	}
	return atomicfile.SyncDir(l.o.Dir)
}
