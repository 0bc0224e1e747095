package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"mortise/internal/atomicfile"
)

// ErrNothing: no closed segment is old enough to be removed.
var ErrNothing = errors.New("no closed segment of the audit log ends before that")

// Remove deletes the closed segments that hold nothing newer than entry last,
// and leaves a signed tombstone in their place. by is the administrator, reason
// the administrator's words, both at most 256 bytes. The segment that is being
// written stays.
func (l *Log) Remove(ctx context.Context, last uint64, by, reason string) (Tombstone, error) {
	var t Tombstone
	l.mu.Lock()
	key, state := l.key, l.state
	l.mu.Unlock()
	switch {
	case errors.Is(state, ErrClosed):
		return t, state
	case key == nil:
		return t, errors.New("audit: the log has no key to sign a tombstone with; unlock the server first")
	}
	l.removing.Lock()
	defer l.removing.Unlock()
	segments, err := list(l.o.Dir, segmentSuffix)
	if err != nil {
		return t, err
	}
	// A segment's last entry is the one before the next segment's first.
	n := 0
	for n+1 < len(segments) && segments[n+1]-1 <= last {
		n++
	}
	if n == 0 {
		return t, fmt.Errorf("audit: %w (entry %d)", ErrNothing, last)
	}
	old, err := l.headerOf(segments[0])
	if err != nil {
		return t, err
	}
	kept, err := l.headerOf(segments[n])
	if err != nil {
		return t, err
	}
	t = Tombstone{Member: l.o.Member, Log: l.id, First: old.first, Last: kept.first - 1, Before: old.before[:], After: kept.before[:],
		Time: l.o.Now().UTC(), By: clean(by), Reason: clean(reason)}
	t.sign(key)
	text, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return t, err
	}
	if err := l.o.Step("tombstone"); err != nil {
		return t, err
	}
	if err := atomicfile.Write(filepath.Join(l.o.Dir, tombstoneName(t.First)), append(text, '\n'), 0o600); err != nil {
		return t, fmt.Errorf("audit: writing the tombstone: %w", err)
	}
	// A crash from here on is finished by the next start.
	for _, first := range segments[:n] {
		if err := l.o.Step("remove"); err != nil {
			return t, err
		}
		if err := os.Remove(filepath.Join(l.o.Dir, segmentName(first))); err != nil {
			return t, fmt.Errorf("audit: removing a segment: %w", err)
		}
	}
	l.wantSpare() // perhaps there is space now
	return t, atomicfile.SyncDir(l.o.Dir)
}

func (l *Log) headerOf(first uint64) (header, error) {
	f, err := os.Open(filepath.Join(l.o.Dir, segmentName(first)))
	if err != nil {
		return header{}, err
	}
	defer f.Close()
	h, _, err := readHeader(f)
	if err == nil && (h.first != first || string(h.id) != string(l.id)) {
		err = fmt.Errorf("%w: %s is of another place", ErrDamaged, segmentName(first))
	}
	return h, err
}

// Stats are figures of an open log.
type Stats struct {
	Durable  uint64 // entries on the disk, ever
	Segments int
	Bytes    int64 // of all segments
}

// Stats counts what the folder holds.
func (l *Log) Stats() (s Stats, err error) {
	segments, err := list(l.o.Dir, segmentSuffix)
	if err != nil {
		return s, err
	}
	for _, first := range segments {
		if st, err := os.Stat(filepath.Join(l.o.Dir, segmentName(first))); err == nil {
			s.Segments++
			s.Bytes += st.Size()
		}
	}
	s.Durable = l.Durable()
	return s, nil
}

// LastBefore is the number of the last entry in the closed segments that were
// all written before t; 0 if there is none.
func (l *Log) LastBefore(t time.Time) (last uint64, err error) {
	segments, err := list(l.o.Dir, segmentSuffix)
	if err != nil {
		return 0, err
	}
	for _, first := range segments {
		h, err := l.headerOf(first)
		if err != nil {
			return 0, err
		}
		// A segment is made when the one before it is closed.
		if h.made.Before(t) {
			last = h.first - 1
		}
	}
	return last, nil
}
