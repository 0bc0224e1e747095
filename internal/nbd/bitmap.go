package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// A Bitmap remembers which granules of a disk have been changed since it was
// made, for incremental backup: a client sees it as the metadata context
// qemu:dirty-bitmap:NAME. Bits are only ever set. A backup that is to be the base
// of the next one makes a new bitmap at the instant that it copies, while the
// disk is paused, and drops the old one when it has succeeded.
//
// Nothing ever takes dirtiness away, a power cut neither: before the first change
// in a region of 256 granules since it was last written, an intent for the region
// is made durable in the bitmap's file; a bitmap whose process died takes such
// regions for changed altogether. So a crash costs a larger backup, never a wrong
// one, and a guest pays one small durable write for a region, in minutes, not for
// a request. A file that cannot be written is removed: the next backup is whole.
//
// The file belongs to who has the disk's lock. All methods may be called
// concurrently.
type Bitmap struct {
	name  string
	size  int64 // of the disk when it was made, bytes; what is behind is dirty
	shift uint  // granularity, as a power of two
	path  string
	log   *slog.Logger
	file  bitmapFile

	words   []atomic.Uint64 // a bit a granule; record n has wordsPerRecord from n times that
	records []record

	broken atomic.Pointer[error] // why nothing is recorded any more
	stop   chan struct{}
	ended  sync.WaitGroup

	head bitmapHeader
}

// record is what is written at once.
type record struct {
	mu sync.Mutex
	// intents has a bit for every region whose granules may be set in words and
	// not in the file: there the region's intent is durable.
	intents uint16
}

// checkpointEvery is how often regions that have settled are written, after which
// a crash costs no more than what has changed.
const checkpointEvery = 30 * time.Second

// BitmapSpec says what a new bitmap is for.
type BitmapSpec struct {
	Name        string // see ValidBitmapName
	Size        int64  // of the disk, bytes
	Granularity int64  // bytes that a bit stands for, a power of two from 4 KiB to 64 MiB; 0: 64 KiB, or more for a disk above 2 TiB
}

var (
	// ErrBitmapStale means that the disk was changed while nobody kept its bitmap.
	ErrBitmapStale = errors.New("the disk was changed without it")
	// ErrBitmapDamaged means that a file is no bitmap, or not whole.
	ErrBitmapDamaged = errors.New("it is damaged")
)

// CreateBitmap makes an empty bitmap in a new file and opens it; see OpenBitmap for
// during.
func CreateBitmap(path string, spec BitmapSpec, during string, log *slog.Logger) (*Bitmap, error) {
	h, err := newBitmapHeader(spec, during)
	if err != nil {
		return nil, fmt.Errorf("nbd: making bitmap %s: %w", path, err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("nbd: making bitmap %s: %w", path, errors.Join(fs.ErrExist, err))
	}
	if err := createBitmapFile(path, h); err != nil {
		return nil, fmt.Errorf("nbd: making bitmap %s: %w", path, err)
	}
	f, err := openBitmapFile(path)
	if err != nil {
		return nil, fmt.Errorf("nbd: opening bitmap %s: %w", path, err)
	}
	b := newBitmap(f, path, h, log)
	b.ended.Go(b.checkpoints)
	return b, nil
}

// OpenBitmap opens the bitmap of a disk of that size, which is open and locked.
//
// A disk may be changed while nobody keeps its bitmap. So the bitmap holds a seal,
// anything by which the caller knows the disk's last opening again, up to 64
// bytes, such as a count of openings or a time of modification. found is what the
// disk shows now; if the bitmap holds something else, it is of no use any more
// (ErrBitmapStale). during is what the disk will show if this process dies, ""
// if nobody knows: then a crash makes the bitmap stale. Close is told what the disk
// shows after it.
func OpenBitmap(path string, size int64, found, during string, log *slog.Logger) (*Bitmap, error) {
	f, err := openBitmapFile(path)
	if err != nil {
		return nil, fmt.Errorf("nbd: opening bitmap %s: %w", path, err)
	}
	b, err := loadBitmap(f, path, size, found, during, log)
	if err != nil {
		return nil, fmt.Errorf("nbd: opening bitmap %s: %w: delete it, and make a full backup", path, errors.Join(err, f.Close()))
	}
	return b, nil
}

func loadBitmap(f bitmapFile, path string, size int64, found, during string, log *slog.Logger) (*Bitmap, error) {
	h, err := readBitmapHeader(f)
	if err != nil {
		return nil, err
	}
	if h.seal != found || found == "" {
		return nil, fmt.Errorf("%w (it has seal %q, the disk %q)", ErrBitmapStale, h.seal, found)
	}
	if size < h.size {
		return nil, fmt.Errorf("%w: it is of a disk of %d bytes, this one has %d", ErrBitmapStale, h.size, size)
	}
	h.seal = during
	if err := h.check(); err != nil {
		return nil, err
	}
	b := newBitmap(f, path, h, log)
	if err := b.readRecords(); err != nil {
		return nil, err
	}
	if err := f.WriteDurably(h.encode(), 0); err != nil {
		return nil, err
	}
	b.ended.Go(b.checkpoints)
	return b, nil
}

func newBitmap(f bitmapFile, path string, h bitmapHeader, log *slog.Logger) *Bitmap {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	b := &Bitmap{name: h.name, size: h.size, shift: h.shift, path: path, log: log, file: f, head: h, stop: make(chan struct{})}
	n := h.records()
	b.words, b.records = make([]atomic.Uint64, n*wordsPerRecord), make([]record, n)
	return b
}

// Name is the bitmap's name.
func (b *Bitmap) Name() string { return b.name }

// Granularity is how many bytes a bit stands for.
func (b *Bitmap) Granularity() int64 { return 1 << b.shift }

// Dirty is how much of the disk is marked, in bytes.
func (b *Bitmap) Dirty() int64 {
	if b.failed() != nil {
		return b.size
	}
	n := 0
	for i := range b.words {
		n += bits.OnesCount64(b.words[i].Load())
	}
	return min(int64(n)<<b.shift, b.size)
}

// failed says why the bitmap is of no use any more.
func (b *Bitmap) failed() error {
	if err := b.broken.Load(); err != nil {
		return *err
	}
	return nil
}

// batch is how many records of a large change are locked and written at once.
const batch = 64

// mark notes that n bytes at off are about to be changed. When it returns nil
// they are marked for good, or the bitmap is gone for good. It is called before the
// change: what is marked too much does no harm.
func (b *Bitmap) mark(off, n int64) error {
	first, last := off>>b.shift, (off+n-1)>>b.shift
	last = min(last, (b.size-1)>>b.shift)
	for at := first; at <= last; {
		end := min(last+1, (at/granulesPerRecord+batch)*granulesPerRecord)
		if !b.allSet(at, end) {
			if err := b.markSlowly(at, end); err != nil {
				return b.giveUp(err)
			}
		}
		at = end
	}
	return nil
}

// allSet looks at the granules [from, to).
func (b *Bitmap) allSet(from, to int64) bool {
	for at := from; at < to; {
		mask, next := wordMask(at, to)
		if b.words[at/64].Load()&mask != mask {
			return false
		}
		at = next
	}
	return true
}

// wordMask has the bits of the granules [from, to) in from's word; next is the
// first granule behind that.
func wordMask(from, to int64) (mask uint64, next int64) {
	next = min(to, (from/64+1)*64)
	return (^uint64(0) >> (64 - uint(next-from))) << uint(from%64), next
}

// markSlowly marks the granules [from, to), which lie in at most batch records.
func (b *Bitmap) markSlowly(from, to int64) error {
	if b.failed() != nil {
		return nil
	}
	lowest, highest := from/granulesPerRecord, (to-1)/granulesPerRecord
	for i := lowest; i <= highest; i++ {
		b.records[i].mu.Lock()
		defer b.records[i].mu.Unlock()
	}
	var changed []intent
	for i := lowest; i <= highest; i++ {
		r := &b.records[i]
		intents := r.intents
		lo, hi := max(from, i*granulesPerRecord), min(to, (i+1)*granulesPerRecord)
		for at := lo; at < hi; {
			region := at / granulesPerRegion
			next := min(hi, (region+1)*granulesPerRegion)
			if !b.allSet(at, next) {
				intents |= 1 << uint(region%regionsPerRecord)
			}
			at = next
		}
		if intents != r.intents {
			changed = append(changed, intent{i, r.intents})
			r.intents = intents
		}
	}
	if err := b.intend(changed); err != nil {
		for _, c := range changed {
			b.records[c.record].intents = c.before
		}
		return err
	}
	for at := from; at < to; {
		mask, next := wordMask(at, to)
		b.words[at/64].Or(mask)
		at = next
	}
	return nil
}

// intent is a record with new intents, and those that it had.
type intent struct {
	record int64
	before uint16
}

// intend makes records durable with their new intents. The caller holds their locks.
func (b *Bitmap) intend(changed []intent) error {
	if len(changed) == 1 {
		i := changed[0].record
		return b.file.WriteDurably(b.encodeRecord(i), recordOffset(i))
	}
	for _, c := range changed {
		if _, err := b.file.WriteAt(b.encodeRecord(c.record), recordOffset(c.record)); err != nil {
			return err
		}
	}
	if len(changed) == 0 {
		return nil
	}
	return b.file.Sync()
}

// giveUp ends a bitmap whose file cannot be written, by removing the file durably:
// the guest goes on and the next backup is whole. If that fails too the change of
// the disk must not happen.
func (b *Bitmap) giveUp(cause error) error {
	if b.failed() != nil {
		return nil
	}
	if err := b.file.Remove(); err != nil {
		return fmt.Errorf("nbd: bitmap %q can neither be written nor removed: %w", b.name, errors.Join(cause, err))
	}
	err := fmt.Errorf("nbd: bitmap %q was dropped: %w", b.name, cause)
	if b.broken.CompareAndSwap(nil, &err) {
		b.log.Error("nbd: a bitmap cannot be written and was dropped: the next backup must be a full one", "bitmap", b.name, "file", b.path, "error", cause)
	}
	return nil
}

// checkpoints writes what has settled, now and then.
func (b *Bitmap) checkpoints() {
	tick := time.NewTicker(checkpointEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			b.checkpoint()
		case <-b.stop:
			return
		}
	}
}

// checkpoint writes the records that have intents, without them. That need not be
// durable: until it is, the file has the intents.
func (b *Bitmap) checkpoint() {
	for i := range b.records {
		if b.failed() != nil {
			return
		}
		if err := b.settle(int64(i)); err != nil {
			b.log.Warn("nbd: writing a bitmap failed", "bitmap", b.name, "error", err)
			return
		}
	}
}

func (b *Bitmap) settle(i int64) error {
	r := &b.records[i]
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.intents == 0 {
		return nil
	}
	intents := r.intents
	r.intents = 0
	_, err := b.file.WriteAt(b.encodeRecord(i), recordOffset(i))
	if err != nil {
		r.intents = intents
	}
	return err
}

func (b *Bitmap) end() {
	close(b.stop)
	b.ended.Wait()
}

// Close writes the bitmap as it is and seals it; after is what the disk shows from
// now on. Nothing may be tracked any more.
func (b *Bitmap) Close(after string) error {
	b.end()
	if b.failed() != nil {
		return b.file.Close()
	}
	err := func() error {
		for i := range b.records {
			if err := b.settle(int64(i)); err != nil {
				return err
			}
		}
		if err := b.file.Sync(); err != nil {
			return err
		}
		h := b.head
		h.seal = after
		if err := h.check(); err != nil {
			return err
		}
		return b.file.WriteDurably(h.encode(), 0)
	}()
	if err = errors.Join(err, b.file.Close()); err != nil {
		return fmt.Errorf("nbd: closing bitmap %s: %w", b.path, err)
	}
	return nil
}

// Delete closes the bitmap and removes its file.
func (b *Bitmap) Delete() error {
	b.end()
	err := b.file.Remove()
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err = errors.Join(err, b.file.Close()); err != nil {
		return fmt.Errorf("nbd: deleting bitmap %s: %w", b.path, err)
	}
	return nil
}

// dirtyStatus is the one flag of qemu:dirty-bitmap.
const dirtyStatus Status = 1

// status describes [off, off+n): changed or not.
func (b *Bitmap) status(off, n int64, emit func(n int64, s Status) bool) {
	end := off + n
	for at := off; at < end; {
		dirty := b.dirtyAt(at)
		next := at
		for next < end && b.dirtyAt(next) == dirty {
			next = b.next(next, dirty)
		}
		var s Status
		if dirty {
			s = dirtyStatus
		}
		if !emit(min(next, end)-at, s) {
			return
		}
		at = next
	}
}

func (b *Bitmap) dirtyAt(off int64) bool {
	if off >= b.size || b.failed() != nil {
		return true
	}
	g := off >> b.shift
	return b.words[g/64].Load()>>(uint(g)%64)&1 != 0
}

// next is the first offset behind off, in its granule or word, that may differ.
func (b *Bitmap) next(off int64, dirty bool) int64 {
	g := off >> b.shift
	if off >= b.size || b.failed() != nil {
		return 1<<63 - 1
	}
	w := b.words[g/64].Load()
	if !dirty {
		w = ^w
	}
	same := bits.TrailingZeros64(^(w >> (uint(g) % 64))) // granules alike
	return min(max(g+1, min(g+int64(same), (g/64+1)*64))<<b.shift, b.size)
}

// bitmapList is a list of bitmaps that changes as a whole.
type bitmapList struct{ p atomic.Pointer[[]*Bitmap] }

func (l *bitmapList) all() []*Bitmap {
	if p := l.p.Load(); p != nil {
		return *p
	}
	return nil
}

// maxBitmaps is how many bitmaps an export may have.
const maxBitmaps = 15

// Offer shows a bitmap to clients that connect from now on.
func (e *Export) Offer(b *Bitmap) error {
	e.srv.mu.Lock()
	defer e.srv.mu.Unlock()
	list := e.offered.all()
	if len(list) == maxBitmaps {
		return fmt.Errorf("nbd: export %q has %d bitmaps already: delete one", e.name, maxBitmaps)
	}
	for _, other := range list {
		if other.name == b.name {
			return fmt.Errorf("nbd: export %q has a bitmap %q already", e.name, b.name)
		}
	}
	e.offered.set(append(list[:len(list):len(list)], b))
	return nil
}

// Track notes every change from now on in b, and offers it. Pause the export first
// if what has been read from the disk must be from the same instant.
func (e *Export) Track(b *Bitmap) error {
	if err := e.Offer(b); err != nil {
		return err
	}
	e.srv.mu.Lock()
	defer e.srv.mu.Unlock()
	list := e.tracked.all()
	e.tracked.set(append(list[:len(list):len(list)], b))
	return nil
}

// Withdraw is the reverse of Offer and Track. Pause the export first: when this
// returns a change that is on its way may still mark b.
func (e *Export) Withdraw(b *Bitmap) {
	e.srv.mu.Lock()
	defer e.srv.mu.Unlock()
	e.offered.without(b)
	e.tracked.without(b)
}

func (l *bitmapList) set(list []*Bitmap) { l.p.Store(&list) }

func (l *bitmapList) without(b *Bitmap) {
	var rest []*Bitmap
	for _, other := range l.all() {
		if other != b {
			rest = append(rest, other)
		}
	}
	l.set(rest)
}

// mark notes a change in every bitmap that is kept.
func (e *Export) mark(off, n int64) error {
	for _, b := range e.tracked.all() {
		if err := b.mark(off, n); err != nil {
			return err
		}
	}
	return nil
}

// BitmapPath is the file of a disk's bitmap: beside the extent, which is never
// renamed.
func BitmapPath(extent, name string) string { return extent + "." + name + bitmapSuffix }

// FindBitmaps lists the files of an extent's bitmaps.
func FindBitmaps(extent string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(extent))
	if err != nil {
		return nil, fmt.Errorf("nbd: looking for bitmaps: %w", err)
	}
	var found []string
	for _, e := range entries {
		name, ours := cutBitmapName(e.Name(), filepath.Base(extent))
		if ours && e.Type().IsRegular() && ValidBitmapName(name) {
			found = append(found, filepath.Join(filepath.Dir(extent), e.Name()))
		}
	}
	return found, nil
}
