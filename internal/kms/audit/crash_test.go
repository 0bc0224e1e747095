package audit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
