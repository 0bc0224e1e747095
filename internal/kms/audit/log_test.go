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
