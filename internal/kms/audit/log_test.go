package audit

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func testKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	return ed25519.NewKeyFromSeed([]byte("0123456789abcdef0123456789abcdef"))
}

func open(t testing.TB, o Options) *Log {
	t.Helper()
	if o.Member == "" {
		o.Member = "kms-1"
	}
	if o.SegmentSize == 0 {
		o.SegmentSize = 64 << 10
	}
	l, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	l.SetKey(testKey(t))
	return l
}

func entry(i int) *Entry {
	return &Entry{
		Time: time.Unix(1_700_000_000, int64(i)*1000).UTC(), Member: "kms-1", Instance: "default", Actor: "certificate", Client: "center",
		Fingerprint: strings.Repeat("ab", 32), Role: "key-manager", From: "192.0.2.7:4711", Operation: "Get", Object: fmt.Sprintf("object-%d", i), Result: Success,
	}
}

// add appends n entries and waits for all.
func add(t testing.TB, l *Log, from, n int) {
	t.Helper()
	var last Ticket
	for i := range n {
		var err error
		if last, err = l.Append(entry(from+i), false); err != nil {
			t.Fatalf("entry %d: %v", from+i, err)
		}
		if i%50 == 49 {
			if err := last.Wait(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := last.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func records(t testing.TB, dir string) (all []Record) {
	t.Helper()
	for r, err := range ReadFolder(dir) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

func verified(t testing.TB, dir string, o VerifyOptions) Report {
	t.Helper()
	r, err := Verify(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestLogKeepsWhatItAcknowledged(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Options{Dir: dir})
	add(t, l, 0, 10)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, Options{Dir: dir})
	add(t, l, 10, 3)
	l.Close()
	all := records(t, dir)
	if len(all) != 14 || all[0].Operation != "Begin Audit Log" {
		t.Fatalf("%d entries, the first is %+v", len(all), all[0])
	}
	for i, r := range all[1:] {
		want := *entry(i)
		want.Sequence = uint64(i + 2)
		if r.Entry != want {
			t.Errorf("entry %d is %+v, want %+v", i, r.Entry, want)
		}
	}
	r := verified(t, dir, VerifyOptions{Keys: []ed25519.PublicKey{testKey(t).Public().(ed25519.PublicKey)}})
	if !r.OK() || r.Last != 14 || r.Signed != 14 || !r.Trusted || r.Heads == 0 {
		t.Errorf("report: %+v", r)
	}
}

func TestLogIsOpenOnce(t *testing.T) {
	dir := t.TempDir()
	open(t, Options{Dir: dir})
	if _, err := Open(Options{Dir: dir, Member: "kms-1"}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second Open: %v", err)
	}
}

func TestOtherMembersLogIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, Options{Dir: dir}).Close()
	if _, err := Open(Options{Dir: dir, Member: "kms-2"}); err == nil || !strings.Contains(err.Error(), `"kms-1"`) {
		t.Errorf("Open: %v", err)
	}
}

func TestSegmentsRotate(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Options{Dir: dir})
	const n = 2000 // of about 200 bytes each, in segments of 64 KiB
	add(t, l, 0, n)
	head, err := l.Sign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stats, err := l.Stats()
	if err != nil || stats.Segments < 4 || stats.Durable != n+1 {
		t.Fatalf("stats %+v, %v", stats, err)
	}
	l.Close()
	r := verified(t, dir, VerifyOptions{Anchors: []Head{head}})
	if !r.OK() || r.Segments != stats.Segments || r.Last != n+1 || r.Anchors != 1 {
		t.Fatalf("report: %+v", r)
	}
	// A restart at every place goes on.
	l = open(t, Options{Dir: dir, Anchor: &head})
	add(t, l, n, 100)
	l.Close()
	if r := verified(t, dir, VerifyOptions{Anchors: []Head{head}}); !r.OK() || r.Last != n+101 {
		t.Fatalf("report after a restart: %+v", r)
	}
}

func TestManyAppendTogether(t *testing.T) {
	dir := t.TempDir()
	var syncs, synced atomic.Int64
	l := open(t, Options{Dir: dir, SegmentSize: 1 << 20, Synced: func(n int, _ time.Duration) { syncs.Add(1); synced.Add(int64(n)) }})
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			for i := range 50 {
				ticket, err := l.Append(entry(g*1000+i), false)
				if err == nil {
					err = ticket.Wait(t.Context())
				}
				if err != nil {
					t.Error(err)
					return
				}
				if i%10 == 0 {
					if _, err := l.Sign(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	l.Close()
	if r := verified(t, dir, VerifyOptions{}); !r.OK() || r.Last != 1601 {
		t.Fatalf("report: %+v", r)
	}
	if synced.Load() != 1601 || syncs.Load() >= 1601 {
		t.Errorf("%d syncs for %d entries", syncs.Load(), synced.Load())
	}
}

// TestKilledAtEveryStep lets the disk stop at each step in turn, and after half
// of a write, as when the machine goes down there.
func TestKilledAtEveryStep(t *testing.T) {
	for _, step := range []string{"write", "sync", "begin", "rename", "spare"} {
		for nth := range 6 {
			t.Run(fmt.Sprintf("%s/%d", step, nth), func(t *testing.T) {
				dir := t.TempDir()
				var count atomic.Int64
				l, err := Open(Options{Dir: dir, Member: "kms-1", SegmentSize: 64 << 10, Step: func(name string) error {
					if name == step && count.Add(1) > int64(nth) {
						return errors.New("the machine is down")
					}
					return nil
				}})
				if err != nil {
					if step == "write" || step == "sync" {
						t.Fatal(err)
					}
					return // nothing was acknowledged
				}
				l.SetKey(testKey(t))
				acknowledged := map[string]bool{}
				for i, failed := 0, false; i < 800 && !failed; i += 20 {
					var tickets []Ticket
					for j := i; j < i+20; j++ {
						ticket, err := l.Append(entry(j), false)
						if failed = err != nil; failed {
							break
						}
						tickets = append(tickets, ticket)
					}
					for j, ticket := range tickets {
						if ticket.Wait(t.Context()) == nil {
							acknowledged[entry(i+j).Object] = true
						}
					}
				}
				l.Close()
				l = open(t, Options{Dir: dir})
				add(t, l, 5000, 5)
				l.Close()
				got := map[string]int{}
				for _, r := range records(t, dir) {
					got[r.Object]++
				}
				for object := range acknowledged {
					if got[object] != 1 {
						t.Errorf("%s is in the log %d times", object, got[object])
					}
				}
				if r := verified(t, dir, VerifyOptions{}); !r.OK() {
					t.Errorf("%+v", r.Problems)
				}
			})
		}
	}
}

func lastSegment(t testing.TB, dir string) string {
	t.Helper()
	all, err := list(dir, segmentSuffix)
	if err != nil || len(all) == 0 {
		t.Fatal(err)
	}
	return filepath.Join(dir, segmentName(all[len(all)-1]))
}

// ends returns where each block of a segment ends.
func ends(t testing.TB, path string) (all []int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, n, err := readHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	for b, err := range blocks(f, h.id, int64(n)) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b.offset+b.length)
	}
	return all
}

func TestTornTail(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Options{Dir: dir})
	for i := range 3 {
		add(t, l, i, 1)
	}
	anchor, err := l.Sign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	path := lastSegment(t, dir)
	pristine, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := ends(t, path)
	end := at[len(at)-1]
	restore := func() {
		if err := os.WriteFile(path, pristine, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	poke := func(offset int64, b []byte) {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(b, offset); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("half a block is cut off and noted", func(t *testing.T) {
		defer restore()
		poke(end, []byte("MBLK\x01\x00\x00\x01\x00half of a block"))
		l := open(t, Options{Dir: dir, Anchor: &anchor})
		add(t, l, 3, 1)
		l.Close()
		all := records(t, dir)
		note := all[len(all)-2]
		if note.Operation != "Cut Torn Tail" || !strings.HasPrefix(note.Detail, "24 bytes") || all[len(all)-1].Object != "object-3" {
			t.Errorf("the log ends with %+v", all[len(all)-2:])
		}
		if r := verified(t, dir, VerifyOptions{Anchors: []Head{anchor}}); !r.OK() {
			t.Errorf("%+v", r.Problems)
		}
	})
	t.Run("a broken block that others follow is damage", func(t *testing.T) {
		defer restore()
		poke(at[0]+30, []byte{0xff})
		_, err := Open(Options{Dir: dir, Member: "kms-1"})
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "audit verify") {
			t.Errorf("Open: %v", err)
		}
	})
	t.Run("zeros over a block that others follow are damage", func(t *testing.T) {
		defer restore()
		poke(at[0], make([]byte, at[1]-at[0]))
		if _, err := Open(Options{Dir: dir, Member: "kms-1"}); !errors.Is(err, ErrDamaged) {
			t.Errorf("Open: %v", err)
		}
	})
	t.Run("a tail that the anchor knows is not cut off", func(t *testing.T) {
		defer restore()
		poke(at[0], make([]byte, end-at[0]))
		_, err := Open(Options{Dir: dir, Member: "kms-1", Anchor: &anchor})
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "the newest entries are gone") {
			t.Errorf("Open: %v", err)
		}
	})
	t.Run("a log of another id than the anchor's is refused", func(t *testing.T) {
		other := anchor
		other.Log = make(Hex, idLen)
		if _, err := Open(Options{Dir: dir, Member: "kms-1", Anchor: &other}); !errors.Is(err, ErrDamaged) {
			t.Errorf("Open: %v", err)
		}
	})
	t.Run("a log that is gone is begun anew and says so", func(t *testing.T) {
		fresh := t.TempDir()
		open(t, Options{Dir: fresh, Anchor: &anchor}).Close()
		if all := records(t, fresh); !strings.Contains(all[0].Detail, anchor.Log.String()) {
			t.Errorf("the first entry is %+v", all[0])
		}
		r := verified(t, fresh, VerifyOptions{Anchors: []Head{anchor}})
		if len(r.Problems) != 1 || r.Problems[0].Kind != Replaced {
			t.Errorf("%+v", r.Problems)
		}
	})
}

// TestFullDisk uses a file system of its own, of 1 MiB.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("mounting: ", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 640<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	l := open(t, Options{Dir: filepath.Join(dir, "log"), SegmentSize: 128 << 10})
	var err error
	done := 0
	for ; done < 10_000 && err == nil; done++ {
		var ticket Ticket
		if ticket, err = l.Append(entry(done), false); err == nil {
			err = ticket.Wait(t.Context())
		}
	}
	if !errors.Is(err, ErrNoSpace) || !errors.Is(l.Err(), ErrNoSpace) || !strings.Contains(err.Error(), dir) {
		t.Fatalf("after %d entries: %v; Err: %v", done, err, l.Err())
	}
	// What has happened already, and what makes room, is still taken.
	for i := range 50 {
		ticket, err := l.Append(entry(20_000+i), true)
		if err == nil {
			err = ticket.Wait(t.Context())
		}
		if err != nil {
			t.Fatalf("reserved entry %d: %v", i, err)
		}
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); l.Err() != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("space is back, and the log still says: %v", l.Err())
		}
	}
	add(t, l, 30_000, 100)
	l.Close()
	if r := verified(t, filepath.Join(dir, "log"), VerifyOptions{}); !r.OK() || r.Last != uint64(1+done-1+50+100) {
		t.Errorf("last %d, %+v", r.Last, r.Problems)
	}
}

// TestWriteFindsNoSpace is what a file system does that copies on write.
func TestWriteFindsNoSpace(t *testing.T) {
	dir := t.TempDir()
	var full atomic.Bool
	l := open(t, Options{Dir: dir, Step: func(name string) error {
		if full.Load() && (name == "write" || name == "repair") {
			return unix.ENOSPC
		}
		return nil
	}})
	add(t, l, 0, 3)
	full.Store(true)
	ticket, err := l.Append(entry(3), false)
	if err == nil {
		err = ticket.Wait(t.Context())
	}
	if !errors.Is(err, ErrNoSpace) || !errors.Is(l.Err(), ErrNoSpace) {
		t.Fatalf("append: %v; Err: %v", err, l.Err())
	}
	full.Store(false)
	for deadline := time.Now().Add(10 * time.Second); l.Err() != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("space is back, and the log still says: %v", l.Err())
		}
	}
	add(t, l, 4, 3)
	l.Close()
	if r := verified(t, dir, VerifyOptions{}); !r.OK() || r.Last != 7 {
		t.Errorf("last %d, %+v", r.Last, r.Problems)
	}
}

func TestFailedSyncIsFinal(t *testing.T) {
	dir := t.TempDir()
	var broken atomic.Bool
	l := open(t, Options{Dir: dir, Step: func(name string) error {
		if broken.Load() && name == "sync" {
			return unix.EIO
		}
		return nil
	}})
	add(t, l, 0, 3)
	broken.Store(true)
	ticket, err := l.Append(entry(3), false)
	if err == nil {
		err = ticket.Wait(t.Context())
	}
	broken.Store(false)
	if _, again := l.Append(entry(4), true); !errors.Is(err, ErrFailed) || !errors.Is(again, ErrFailed) {
		t.Fatalf("append: %v, then %v", err, again)
	}
}

func TestRemove(t *testing.T) {
	dir := t.TempDir()
	var stop atomic.Bool
	l := open(t, Options{Dir: dir, Step: func(name string) error {
		if stop.Load() && name == "remove" {
			return errors.New("the machine is down")
		}
		return nil
	}})
	if _, err := l.Remove(t.Context(), 1000, "root", "tidy"); !errors.Is(err, ErrNothing) {
		t.Errorf("removing the segment in use: %v", err)
	}
	add(t, l, 0, 2000)
	first, err := l.Remove(t.Context(), 700, "root", "kept for a year")
	if err != nil {
		t.Fatal(err)
	}
	if first.First != 1 || first.Last > 700 || first.Last < 300 {
		t.Errorf("tombstone %+v", first)
	}
	stop.Store(true)
	if _, err := l.Remove(t.Context(), 1500, "root", "more"); err == nil {
		t.Error("the removal was not interrupted")
	}
	anchor, err := l.Sign(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	l = open(t, Options{Dir: dir, Anchor: &anchor})
	l.Close()
	r := verified(t, dir, VerifyOptions{Anchors: []Head{anchor}})
	if !r.OK() || len(r.Tombstones) != 2 || r.Last != 2001 {
		t.Fatalf("%+v", r)
	}
	if all := records(t, dir); all[0].Sequence != r.Tombstones[1].Last+1 {
		t.Errorf("the first entry left is %d", all[0].Sequence)
	}
	// A tombstone does not cover more than was signed.
	path := filepath.Join(dir, tombstoneName(1))
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), `"kept for a year"`, `"kept for a day"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := verified(t, dir, VerifyOptions{}); r.OK() {
		t.Error("an altered tombstone was not found")
	}
}

func TestRecordsWhileWriting(t *testing.T) {
	l := open(t, Options{Dir: t.TempDir()})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 1000 {
			if ticket, err := l.Append(entry(i), false); err != nil || ticket.Wait(context.Background()) != nil {
				t.Error(err)
				return
			}
		}
	}()
	for more := true; more; {
		select {
		case <-done:
			more = false
		default:
		}
		upTo, n := l.Durable(), uint64(0)
		for r, err := range l.Records(1) {
			if err != nil {
				t.Fatal(err)
			}
			if n++; r.Sequence != n {
				t.Fatalf("entry %d came after %d", r.Sequence, n-1)
			}
		}
		if n < upTo {
			t.Fatalf("%d entries were read, and %d were durable", n, upTo)
		}
		// And what is exported meanwhile verifies.
		copied := t.TempDir()
		files, err := l.Files()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			w, err := os.Create(filepath.Join(copied, f.Name))
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(f.Copy(w), w.Close()); err != nil {
				t.Fatal(err)
			}
		}
		if r := verified(t, copied, VerifyOptions{}); !r.OK() || r.Last < upTo {
			t.Fatalf("exported at %d: %+v", upTo, r)
		}
	}
}

func TestAppendDoesNotAllocateMuch(t *testing.T) {
	l := open(t, Options{Dir: t.TempDir(), SegmentSize: 16 << 20})
	e := entry(1)
	add(t, l, 0, 10)
	per := testing.AllocsPerRun(500, func() {
		if _, err := l.Append(e, false); err != nil {
			t.Fatal(err)
		}
		runtime.Gosched()
	})
	if per > 3 { // a batch and its channel, when the writer keeps up
		t.Errorf("%.1f allocations an entry", per)
	}
}

func BenchmarkAppend(b *testing.B) {
	for _, workers := range []int{1, 64} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			var syncs atomic.Int64
			l := open(b, Options{Dir: b.TempDir(), SegmentSize: 16 << 20, Synced: func(int, time.Duration) { syncs.Add(1) }})
			b.ReportAllocs()
			b.SetParallelism(max(1, workers/runtime.GOMAXPROCS(0)))
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					e := *entry(7)
					ticket, err := l.Append(&e, false)
					if err == nil {
						err = ticket.Wait(context.Background())
					}
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.ReportMetric(float64(b.N)/float64(max(1, syncs.Load())), "entries/sync")
		})
	}
}
