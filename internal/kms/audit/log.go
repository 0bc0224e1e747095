package audit

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mortise/internal/atomicfile"
)

// Options of a log.
type Options struct {
	// Dir holds the segments; it is made with mode 0700. One process at a time
	// has it open.
	Dir string
	// Member is the name that a new log bears.
	Member string
	// SegmentSize is where a segment ends, in bytes: at least 64 KiB, 0 is
	// 16 MiB. A quarter of one is kept for what must be logged when ordinary
	// entries have no room left.
	SegmentSize int64
	// Anchor is the newest head of this member's that is kept elsewhere, nil for
	// none. A log that is shorter has lost entries that were acknowledged.
	Anchor *Head
	Logger *slog.Logger     // nil: none
	Now    func() time.Time // cluster time; nil: time.Now
	// Synced is told of each sync: how many entries it made durable, and how
	// long write and sync took. nil: nobody.
	Synced func(entries int, took time.Duration)
	// Step is asked before each step on the disk in tests; its error is taken
	// for the step's. nil in production.
	Step func(name string) error
}

func (o *Options) defaults() error {
	switch {
	case o.Dir == "":
		return errors.New("audit: a folder for the log is needed")
	case o.Member == "" || len(o.Member) > maxMember:
		return fmt.Errorf("audit: a member's name has 1 to %d bytes", maxMember)
	case o.SegmentSize == 0:
		o.SegmentSize = 16 << 20
	case o.SegmentSize < 64<<10 || o.SegmentSize > 4<<30:
		return fmt.Errorf("audit: a segment has 64 KiB to 4 GiB, not %d bytes", o.SegmentSize)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Synced == nil {
		o.Synced = func(int, time.Duration) {}
	}
	if o.Step == nil {
		o.Step = func(string) error { return nil }
	}
	return nil
}

// endRoom is what the last block of a segment takes.
const endRoom = blockHeader + headBody

// A Log is one member's audit log, open for writing. Its methods may be called
// concurrently.
type Log struct {
	o    Options
	lock *os.File
	id   []byte

	mu      sync.Mutex
	next    uint64 // number of the next entry
	chain   hash   // after the entry before it
	pending *batch // what waits to be written
	room    int64  // bytes of the segment that no write has taken yet, without endRoom
	spare   *os.File
	lack    error              // why there is no spare, after it was tried
	tried   chan struct{}      // closed and replaced when it was tried again
	key     ed25519.PrivateKey // nil until SetKey
	durable position
	state   error // why nothing can be written: nil, ErrNoSpace, ErrFailed, ErrClosed
	signed  Head  // the newest
	asked   []chan<- signature

	work chan struct{} // tells the writer that there is some
	need chan struct{} // tells the other goroutine that there is no spare segment
	stop chan struct{}

	removing sync.Mutex // held by Remove
	done     sync.WaitGroup

	// The writer's own:
	segment *os.File
	tail    int64 // where the next block goes
	size    int64 // of the segment, filled with zeros from tail on
	free    []*batch
	scratch []byte // guarded by mu
}

// position is a place in the chain.
type position struct {
	sequence uint64
	hash     hash
}

// batch is what one write takes.
type batch struct {
	buf   []byte // a block of entries, its header to be filled in
	first uint64
	after position
	done  chan struct{}
	err   error // set before done is closed
}

func (b *batch) entries() int { return int(b.after.sequence - b.first + 1) }

type signature struct {
	head Head
	err  error
}

// A Ticket waits for entries to be durable. The zero Ticket waits for nothing.
type Ticket struct{ b *batch }

// Wait returns nil once the entry, and all that were appended before it, are on
// the disk.
func (t Ticket) Wait(ctx context.Context) error {
	if t.b == nil {
		return nil
	}
	select {
	case <-t.b.done:
		return t.b.err
	case <-ctx.Done():
		return fmt.Errorf("audit: waiting for the log's disk: %w", ctx.Err())
	}
}

// Append puts the entry at the end of the log and sets its Sequence. It is
// durable once the ticket says so. Ordinary entries are refused with ErrNoSpace
// when room gets scarce; reserved is for what has happened already, and for the
// acts that make room.
func (l *Log) Append(e *Entry, reserved bool) (Ticket, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		if l.state != nil {
			return Ticket{}, l.state
		}
		var wait <-chan struct{}
		if len(l.pending.buf) >= l.maxBlock() {
			wait = l.pending.done
		} else if !l.hasRoom(reserved) {
			if l.lack != nil {
				return Ticket{}, l.noSpace()
			}
			wait = l.tried // the next segment is being made
		}
		if wait == nil {
			break
		}
		l.mu.Unlock()
		<-wait
		l.mu.Lock()
	}
	e.Sequence = l.next
	l.scratch = e.Append(append(l.scratch[:0], l.chain[:]...))
	encoded := l.scratch[len(l.chain):]
	b := l.pending
	b.buf = binary.AppendUvarint(b.buf, uint64(len(encoded)))
	b.buf = append(b.buf, encoded...)
	l.chain, l.scratch = link(l.scratch, l.chain, encoded)
	l.next++
	select {
	case l.work <- struct{}{}:
	default:
	}
	return Ticket{b}, nil
}

// maxBlock is where a block of entries is full: a small part of a segment.
func (l *Log) maxBlock() int { return int(min(1<<20, l.o.SegmentSize/16)) }

func (l *Log) reserve() int64 { return l.o.SegmentSize / 4 }

// hasRoom tells whether an entry can be taken. The lock is held.
func (l *Log) hasRoom(reserved bool) bool {
	if l.spare != nil || l.key == nil { // without a key segments are not closed; they grow
		return true
	}
	left := l.room - int64(len(l.pending.buf)) - maxEntry - 64
	if !reserved {
		left -= l.reserve()
	}
	return left >= 0
}

func (l *Log) noSpace() error {
	return fmt.Errorf("%w in %s: free some, or remove old segments with: mortise kms audit remove: %w", ErrNoSpace, l.o.Dir, l.lack)
}

// Err tells why ordinary entries are refused now; nil if they are not.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == nil && l.lack != nil && !l.hasRoom(false) {
		return l.noSpace()
	}
	return l.state
}

// ID is the log's own, 16 random bytes.
func (l *Log) ID() Hex { return l.id }

// Durable is the number of the newest entry on the disk, 0 for none.
func (l *Log) Durable() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.durable.sequence
}

// SetKey gives the key that heads are signed with. Until then there are none,
// and segments are not closed.
func (l *Log) SetKey(key ed25519.PrivateKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.key = key
}

// Sign returns a signed head of what is durable, and writes it into the log;
// the same as the last time if the log has not grown.
func (l *Log) Sign(ctx context.Context) (Head, error) {
	answer := make(chan signature, 1)
	l.mu.Lock()
	switch {
	case l.state != nil && !errors.Is(l.state, ErrNoSpace):
		defer l.mu.Unlock()
		return Head{}, l.state
	case l.key == nil:
		defer l.mu.Unlock()
		return Head{}, errors.New("audit: the log has no key to sign with yet")
	case l.signed.Sequence == l.durable.sequence && l.signed.Signature != nil && string(l.signed.Key) == string(l.key.Public().(ed25519.PublicKey)):
		defer l.mu.Unlock()
		return l.signed, nil
	}
	l.asked = append(l.asked, answer)
	l.mu.Unlock()
	select {
	case l.work <- struct{}{}:
	default:
	}
	select {
	case s := <-answer:
		return s.head, s.err
	case <-ctx.Done():
		return Head{}, ctx.Err()
	}
}

// write is the one goroutine that writes to the segment.
func (l *Log) write() {
	for {
		stopping := false
		select {
		case <-l.work:
		case <-l.stop:
			stopping = true
		}
		for l.writeBatch() {
		}
		l.answerHeads()
		if stopping {
			return
		}
	}
}

// writeBatch makes what is pending durable; false if there is nothing.
func (l *Log) writeBatch() bool {
	l.mu.Lock()
	b := l.pending
	if l.next == b.first {
		l.mu.Unlock()
		return false
	}
	b.after = position{l.next - 1, l.chain}
	l.room -= int64(len(b.buf) + len(b.after.hash))
	l.pending = l.freshBatch(l.next)
	l.mu.Unlock()

	b.buf = append(b.buf, b.after.hash[:]...)
	sealBlock(b.buf, l.id, blockEntries, b.first)
	begun := time.Now()
	err := l.makeRoom(int64(len(b.buf)))
	if err == nil {
		err = l.put(b.buf)
	}
	l.mu.Lock()
	if err != nil {
		l.fail(b, err)
		l.mu.Unlock()
		return true
	}
	l.durable = b.after
	l.room = l.size - l.tail - endRoom
	scarce := l.spare == nil && l.room < l.o.SegmentSize/2
	l.mu.Unlock()
	if scarce {
		l.wantSpare()
	}
	l.o.Synced(b.entries(), time.Since(begun))
	close(b.done)
	b.buf = b.buf[:blockHeader]
	l.free = append(l.free, b)
	return true
}

// freshBatch returns an empty batch. The buffers of written ones are used again;
// the batches are not, for tickets refer to them. The lock is held, by the
// writer.
func (l *Log) freshBatch(first uint64) *batch {
	b := &batch{first: first, done: make(chan struct{})}
	if n := len(l.free); n > 0 {
		b.buf, l.free = l.free[n-1].buf, l.free[:n-1]
	} else {
		b.buf = make([]byte, blockHeader, 64<<10)
	}
	return b
}

// fail answers b and all that was built on it, and takes the chain back to what
// is durable. The lock is held.
func (l *Log) fail(b *batch, err error) {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		l.state = fmt.Errorf("%w: %w", ErrNoSpace, err)
	} else {
		l.state = fmt.Errorf("%w: %w; the server must be restarted", ErrFailed, err)
	}
	l.o.Logger.Error("audit: the log cannot be written: nothing is served", "dir", l.o.Dir, "error", err)
	next := l.pending
	l.next, l.chain = l.durable.sequence+1, l.durable.hash
	l.pending = l.freshBatch(l.next)
	for _, b := range []*batch{b, next} {
		b.err = l.state
		close(b.done)
	}
	l.wantSpare()
}

// put writes one block and syncs it.
func (l *Log) put(b []byte) error {
	if err := l.o.Step("write"); err != nil {
		return fmt.Errorf("writing the audit log: %w", err)
	}
	if _, err := l.segment.WriteAt(b, l.tail); err != nil {
		return fmt.Errorf("writing the audit log: %w", err)
	}
	if err := l.o.Step("sync"); err != nil {
		return fmt.Errorf("syncing the audit log: %w", err)
	}
	if err := unix.Fdatasync(int(l.segment.Fd())); err != nil {
		return fmt.Errorf("syncing the audit log: %w", err)
	}
	l.tail += int64(len(b))
	return nil
}

// makeRoom goes on to the next segment when the block does not fit into this
// one.
func (l *Log) makeRoom(block int64) error {
	if l.tail+block+endRoom <= l.size {
		return nil
	}
	l.mu.Lock()
	spare, key, end := l.spare, l.key, l.durable
	l.mu.Unlock()
	if key == nil {
		return nil // it grows
	}
	if spare == nil {
		return fmt.Errorf("the audit log's segment is full, and there is no other: %w", unix.ENOSPC)
	}
	head := l.headAt(end, key)
	if err := l.put(l.headBlock(blockEnd, head)); err != nil {
		return err
	}
	size, err := spare.Seek(0, 2)
	if err != nil {
		return err
	}
	h := header{id: l.id, first: end.sequence + 1, before: end.hash, made: l.o.Now(), member: l.o.Member}
	n, err := l.begin(spare, h)
	if err != nil {
		l.tail -= endRoom // what is written next takes its place
		return err
	}
	l.segment.Close() // all of it is synced
	l.segment, l.tail, l.size = spare, n, size
	l.mu.Lock()
	l.spare = nil
	l.mu.Unlock()
	l.wantSpare()
	l.o.Logger.Info("audit: segment closed", "dir", l.o.Dir, "last", end.sequence)
	return nil
}

// begin makes f, which is filled with zeros, a segment, and returns the length
// of its header.
func (l *Log) begin(f *os.File, h header) (int64, error) {
	b := h.append(nil)
	if err := l.o.Step("begin"); err != nil {
		return 0, fmt.Errorf("beginning a segment: %w", err)
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return 0, fmt.Errorf("beginning a segment: %w", err)
	}
	if err := f.Sync(); err != nil {
		return 0, fmt.Errorf("beginning a segment: %w", err)
	}
	// From here on it is not known which of the two names a crash leaves: an
	// error must not look like one that goes by.
	err := l.o.Step("rename")
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(l.o.Dir, segmentName(h.first)))
	}
	if err == nil {
		err = atomicfile.SyncDir(l.o.Dir)
	}
	if err != nil {
		return 0, fmt.Errorf("beginning a segment: %v", err)
	}
	return int64(len(b)), nil
}

// answerHeads signs what is durable for those who asked.
func (l *Log) answerHeads() {
	l.mu.Lock()
	asked, key, at, state := l.asked, l.key, l.durable, l.state
	l.asked = nil
	l.mu.Unlock()
	if len(asked) == 0 {
		return
	}
	s := signature{head: l.headAt(at, key)}
	if state == nil && l.tail+2*endRoom <= l.size { // otherwise the end of the segment says it
		if err := l.put(l.headBlock(blockHead, s.head)); err != nil {
			l.mu.Lock()
			l.fail(l.freshBatch(l.next), err)
			s.err = l.state
			l.mu.Unlock()
		}
	}
	l.mu.Lock()
	if s.err == nil {
		l.signed = s.head
	}
	l.room = l.size - l.tail - endRoom
	l.mu.Unlock()
	for _, a := range asked {
		a <- s
	}
}

func (l *Log) headAt(p position, key ed25519.PrivateKey) Head {
	h := Head{Member: l.o.Member, Log: l.id, Sequence: p.sequence, Hash: p.hash[:], Time: l.o.Now().UTC()}
	h.sign(key)
	return h
}

func (l *Log) headBlock(kind byte, h Head) []byte {
	b := appendHead(make([]byte, blockHeader, endRoom), h)
	sealBlock(b, l.id, kind, h.Sequence)
	return b
}

// Close writes what is pending, signs the log if it has a key, and releases the
// folder. Entries after it are refused.
func (l *Log) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	l.Sign(ctx) // what it lacks, the next start signs
	l.mu.Lock()
	if errors.Is(l.state, ErrClosed) {
		l.mu.Unlock()
		return nil
	}
	failed := l.state
	l.state = ErrClosed
	l.mu.Unlock()
	close(l.stop)
	l.done.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.asked {
		a <- signature{err: ErrClosed}
	}
	l.asked = nil
	close(l.tried)
	if l.spare != nil {
		os.Remove(l.spare.Name())
		l.spare.Close()
		l.spare = nil
	}
	return errors.Join(failed, l.segment.Close(), l.lock.Close())
}

// HasKey tells whether heads can be signed.
func (l *Log) HasKey() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.key != nil
}
