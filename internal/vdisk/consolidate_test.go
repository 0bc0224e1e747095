package vdisk

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mortise/internal/keysafe"
)

// A tree is a disk with snapshots and what each froze.
type tree struct {
	w      world
	o      Options
	r      *rand.Rand
	top    string
	d      *Chain
	model  []byte
	frozen map[string][]byte // by the link that a snapshot froze
}

func newTree(t *testing.T, w world, size int64, key keysafe.KeyID, snapshots int) *tree {
	x := &tree{w: w, o: w.chainOptions(t), r: rand.New(rand.NewPCG(21, uint64(size))), top: diskPath(t), model: make([]byte, size), frozen: map[string][]byte{}}
	create(t, x.top, w.spec(size, key))
	x.d = openChain(t, x.top, x.o)
	for range snapshots {
		scribble(t, x.d, x.model, x.r, 40)
		x.snapshot(t)
	}
	scribble(t, x.d, x.model, x.r, 40)
	return x
}

func (x *tree) snapshot(t *testing.T) {
	x.frozen[x.top] = slices.Clone(x.model)
	x.top = takeSnapshot(t, x.d)
}

func (x *tree) reopen(t *testing.T) {
	t.Helper()
	closeChain(t, x.d)
	x.d = openChain(t, x.top, x.o)
}

// merge merges a link and checks that disk and remaining snapshots show the same.
func (x *tree) merge(t *testing.T, link string) {
	t.Helper()
	err := x.d.Consolidate(t.Context(), MergeSpec{Link: link, Commit: func(top string) error { x.top = top; return nil }})
	if err != nil {
		t.Fatalf("merging %s: %v", link, err)
	}
	compare(t, x.d, x.model)
	x.check(t)
}

// check closes the disk and compares what its snapshots froze.
func (x *tree) check(t *testing.T) {
	t.Helper()
	closeChain(t, x.d)
	for link, want := range x.frozen {
		o := x.o
		o.ReadOnly = true
		d := openChain(t, link, o)
		compare(t, d, want)
		closeChain(t, d)
	}
	x.d = openChain(t, x.top, x.o)
	compare(t, x.d, x.model)
}

// Every link of a chain can be merged with its parent, in either direction.
func TestConsolidateEachLink(t *testing.T) { testConsolidateEachLink(t, newWorld(t)) }

func testConsolidateEachLink(t *testing.T, w world) {
	for _, key := range []keysafe.KeyID{{}, kekA} {
		for n := 1; n <= 4; n++ {
			t.Run(key.Key+string(rune('0'+n)), func(t *testing.T) {
				t.Parallel()
				x := newTree(t, w, 1<<20+SectorSize, key, 4)
				link, parent := x.d.links[n], x.d.links[n-1]
				delete(x.frozen, parent.path) // the snapshot that is deleted
				if f, ok := x.frozen[link.path]; ok && link.path != x.top {
					x.frozen[parent.path] = f // if the link goes, its parent has what it froze
					delete(x.frozen, link.path)
				}
				err := x.d.Consolidate(t.Context(), MergeSpec{Link: link.path, Commit: func(top string) error { x.top = top; return nil }})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := os.Stat(parent.path); err != nil { // up: the parent went
					x.frozen[link.path] = x.frozen[parent.path]
					delete(x.frozen, parent.path)
					if link.path == x.top {
						delete(x.frozen, link.path)
					}
				}
				compare(t, x.d, x.model)
				x.check(t)
				if stems := linkStems(t, link.dir()); len(stems) != len(x.d.links) {
					t.Errorf("files of %v are there, of %d links", stems, len(x.d.links))
				}
				for len(x.d.links) > 1 {
					top := x.d.links[len(x.d.links)-1].path
					clear(x.frozen)
					x.merge(t, top)
				}
			})
		}
	}
}

// linkStems are the links of which a folder has files.
func linkStems(t *testing.T, dir string) map[string]bool {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	stems := map[string]bool{}
	for _, e := range entries {
		stem, _, _ := strings.Cut(e.Name(), ".")
		stems[strings.TrimSuffix(strings.TrimSuffix(stem, "-delta"), "-flat")] = true
	}
	return stems
}

// A guest writes all the time while links come and go.
func TestConsolidateUnderLoad(t *testing.T) { testConsolidateUnderLoad(t, newWorld(t)) }

func testConsolidateUnderLoad(t *testing.T, w world) {
	x := newTree(t, w, 8<<20, kekA, 5)
	const workers = 4
	piece := int64(len(x.model)) / workers
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range int64(workers) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 77))
			mine := x.model[i*piece:][:piece]
			for {
				select {
				case <-stop:
					return
				default:
				}
				off := r.Int64N(piece/SectorSize) * SectorSize
				n := min(piece-off, (1+r.Int64N(60))*SectorSize)
				b := randomBytes(r.Uint64(), n)
				var err error
				if r.IntN(5) == 0 {
					clear(b)
					err = x.d.WriteZeroes(i*piece+off, n, true)
					copy(mine[off:], b)
				} else {
					copy(mine[off:], b)
					err = x.d.WriteAt(b, i*piece+off)
				}
				got := make([]byte, n)
				if err == nil {
					err = x.d.ReadAt(got, i*piece+off)
				}
				if err != nil || string(got) != string(mine[off:off+n]) {
					t.Errorf("a guest does not see its own write: %v", err)
					return
				}
				time.Sleep(200 * time.Microsecond)
			}
		})
	}
	merge := func(i int) {
		t.Helper()
		err := x.d.Consolidate(t.Context(), MergeSpec{Link: x.d.links[i].path, Commit: func(top string) error { x.top = top; return nil }})
		if err != nil {
			t.Fatal(err)
		}
	}
	merge(2) // in the middle
	merge(len(x.d.links) - 1)
	x.top = takeSnapshot(t, x.d)
	// A snapshot while the top is being merged.
	var once sync.Once
	err := x.d.Consolidate(t.Context(), MergeSpec{Link: x.d.links[len(x.d.links)-1].path,
		Commit: func(string) error { t.Error("the link is no longer the top"); return nil },
		Report: func(int64, int64) { once.Do(func() { x.top = takeSnapshot(t, x.d) }) }})
	if err != nil {
		t.Fatal(err)
	}
	for len(x.d.links) > 1 {
		merge(len(x.d.links) - 1)
	}
	close(stop)
	wg.Wait()
	compare(t, x.d, x.model)
	x.reopen(t)
	compare(t, x.d, x.model)
	if left := linkStems(t, filepath.Dir(x.top)); len(left) != 1 {
		t.Errorf("files left: %v", left)
	}
}

// A link is stopped by its context, by a failed record, and refused where it must
// be; then it goes on.
func TestConsolidateStopsAndRefuses(t *testing.T) {
	w := newWorld(t)
	x := newTree(t, w, 1<<20, kekA, 2)
	links := []string{x.d.links[0].path, x.d.links[1].path, x.d.links[2].path}
	if err := x.d.Consolidate(t.Context(), MergeSpec{Link: links[0]}); err == nil || !strings.Contains(err.Error(), "base") {
		t.Fatal(err)
	}
	if err := x.d.Consolidate(t.Context(), MergeSpec{Link: "vm-000009.vmdk"}); !errors.Is(err, ErrMissing) {
		t.Fatal(err)
	}
	no := errors.New("no")
	if err := x.d.Consolidate(t.Context(), MergeSpec{Link: links[2], Commit: func(string) error { return no }}); !errors.Is(err, no) {
		t.Fatal(err)
	}
	compare(t, x.d, x.model)
	scribble(t, x.d, x.model, x.r, 30)
	x.reopen(t)
	compare(t, x.d, x.model)
	if _, err := Revert(t.Context(), links[1], x.o, LinkSpec{}); !errors.Is(err, ErrInUse) && !errors.Is(err, ErrConverting) {
		t.Fatalf("reverting to what is being merged into: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := x.d.Consolidate(ctx, MergeSpec{Link: links[2]}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	delete(x.frozen, links[1])
	x.merge(t, links[2])
	if len(x.d.links) != 2 {
		t.Fatalf("%d links", len(x.d.links))
	}

	// With a branch on the base, the other link is kept out of it.
	closeChain(t, x.d)
	branch, err := Revert(t.Context(), links[0], x.o, LinkSpec{})
	if err != nil {
		t.Fatal(err)
	}
	x.d = openChain(t, x.top, x.o)
	if err := x.d.Consolidate(t.Context(), MergeSpec{Link: links[1]}); !errors.Is(err, ErrSealed) {
		t.Fatalf("a base committed while another link stands on it: %v", err)
	}
	compare(t, x.d, x.model)
	if err := Delete(t.Context(), branch); err != nil {
		t.Fatal(err)
	}
	clear(x.frozen)
	x.merge(t, links[1])
}
