package store

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
)

// byNameAndDisks indexes a vm by its name and by each of its disks.
func byNameAndDisks() Option[vm] {
	return IndexBy(func(v vm, add func(string, []byte)) {
		add("name", []byte(v.Name))
		for _, d := range v.Disks {
			add("disk", []byte(d))
		}
	})
}

func indexed(t testing.TB, s *Store) *Collection[vm] {
	t.Helper()
	c, err := NewCollection(t.Context(), s, "vm", JSON[vm](1), byNameAndDisks(), DecodeOnRead[vm]())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// found lists the keys of what has the term, the newest first.
func found(t testing.TB, c *Collection[vm], terms ...IndexTerm) (keys []string) {
	t.Helper()
	f, err := c.Find(t.Context(), terms...)
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range f.Newest() {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, e.Key)
	}
	if len(keys) != f.Len() {
		t.Errorf("Len is %d, and %d were found", f.Len(), len(keys))
	}
	return keys
}

func term(kind, value string) IndexTerm { return IndexTerm{kind, []byte(value)} }

func TestIndex(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	vms := indexed(t, s)
	rev := commit(t, s, vms.Create("a", vm{Name: "one", Disks: []string{"x", "y", "x"}}))
	commit(t, s, vms.Create("c", vm{Name: "three", Disks: []string{"x"}}))
	commit(t, s, vms.Create("b", vm{Name: "two", Disks: []string{"x"}}))
	want := func(keys string, terms ...IndexTerm) {
		t.Helper()
		if got := strings.Join(found(t, vms, terms...), ""); got != keys {
			t.Errorf("%s: found %q, want %q", terms, got, keys)
		}
	}
	want("bca")
	want("bca", term("disk", "x"))
	want("a", term("disk", "x"), term("disk", "y"))
	want("c", term("name", "three"))
	want("", term("name", "x"))
	want("", term("disk", "x"), term("name", "four"))

	commit(t, s, vms.Update("a", rev, vm{Name: "four", Disks: []string{"x"}})) // an old record stays old
	want("bca", term("disk", "x"))
	want("a", term("name", "four"))
	want("", term("name", "one"))
	want("", term("disk", "y"))
	commit(t, s, vms.Delete("c", 0))
	want("ba", term("disk", "x"))
	commit(t, s, vms.Create("c", vm{Name: "three", Disks: []string{"x"}})) // the same key, made anew
	want("cba", term("disk", "x"))
	want("cba")

	// A damaged record is found under no term, and named among all.
	if _, err := s.client.Put(t.Context(), "/vm/b", "no JSON"); err != nil {
		t.Fatal(err)
	}
	want("ca", term("disk", "x"))
	f, err := vms.Find(t.Context())
	if err != nil || f.Len() != 3 {
		t.Fatal(f.Len(), err)
	}
	var damaged []string
	for e, err := range f.Newest() {
		if errors.Is(err, ErrDamaged) {
			damaged = append(damaged, e.Key)
		}
	}
	if !slices.Equal(damaged, []string{"b"}) {
		t.Errorf("damaged: %v", damaged)
	}
	commit(t, s, vms.Put("b", vm{Name: "two", Disks: []string{"x"}}))
	want("cba", term("disk", "x"))

	// What was found stays as it was.
	f, err = vms.Find(t.Context(), term("disk", "x"))
	if err != nil {
		t.Fatal(err)
	}
	commit(t, s, vms.Delete("a", 0), vms.Delete("b", 0))
	want("c", term("disk", "x"))
	n := 0
	for range f.Newest() {
		n++
	}
	if n != 3 {
		t.Errorf("%d of 3 are left of an earlier search", n)
	}

	s.Close()
	s = open(t, dir)
	vms = indexed(t, s)
	want("c", term("disk", "x"))
	want("c")
}

// TestIndexAtRandom sets the index against a plain look at all records.
func TestIndexAtRandom(t *testing.T) {
	s := open(t, t.TempDir())
	vms := indexed(t, s)
	var wg sync.WaitGroup
	for g := range 4 {
		r := rand.New(rand.NewPCG(1, uint64(g)))
		wg.Go(func() {
			for range 150 {
				key := fmt.Sprint(r.IntN(40))
				op := vms.Delete(key, 0)
				if r.IntN(4) > 0 {
					op = vms.Put(key, vm{Name: fmt.Sprint(r.IntN(5)), Disks: []string{fmt.Sprint(r.IntN(20)), fmt.Sprint(r.IntN(3))}})
				}
				if _, err := s.Commit(t.Context(), op); err != nil && !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
				found(t, vms, term("disk", fmt.Sprint(r.IntN(20))))
			}
		})
	}
	wg.Wait()
	compare := func() {
		t.Helper()
		all, err := vms.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(all, func(a, b Entry[vm]) int { return int(b.Created - a.Created) })
		for d := range 20 {
			var want []string
			for _, e := range all {
				if slices.Contains(e.Value.Disks, fmt.Sprint(d)) {
					want = append(want, e.Key)
				}
			}
			if got := found(t, vms, term("disk", fmt.Sprint(d))); !slices.Equal(got, want) {
				t.Errorf("disk %d: found %v, want %v", d, got, want)
			}
		}
		if got := found(t, vms); len(got) != len(all) {
			t.Errorf("%d records, the index has %d", len(all), len(got))
		}
	}
	compare()
	if err := s.rebuild(t.Context()); err != nil {
		t.Fatal(err)
	}
	compare()
}

// TestManyPages loads more records than fit into one page.
func TestManyPages(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	vms := indexed(t, s)
	const n = 2*loadPage + 7
	var ops []Op
	for i := range n {
		ops = append(ops, vms.Create(fmt.Sprintf("%05d", i), vm{Name: fmt.Sprint(i)}))
		if len(ops) == maxOps || i == n-1 {
			commit(t, s, ops...)
			ops = nil
		}
	}
	s.Close()
	s = open(t, dir)
	vms = indexed(t, s)
	if f, err := vms.Find(t.Context()); err != nil || f.Len() != n {
		t.Errorf("%d of %d records were loaded (%v)", f.Len(), n, err)
	}
	for _, i := range []int{0, loadPage - 1, loadPage, n - 1} {
		if e, err := vms.Get(t.Context(), fmt.Sprintf("%05d", i)); err != nil || e.Value.Name != fmt.Sprint(i) {
			t.Errorf("record %d: %+v, %v", i, e, err)
		}
	}
}

// TestUncached: a collection that is not in memory reads and writes like one that
// is.
func TestUncached(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	c, err := NewCollection(ctx, s, "vm", JSON[vm](1), Uncached[vm]())
	if err != nil {
		t.Fatal(err)
	}
	rev := commit(t, s, c.Create("a", vm{Name: "one"}), c.Create("b", vm{Name: "two"}))
	if e, err := c.Get(ctx, "a"); err != nil || e.Value.Name != "one" || e.Revision != rev || e.Key != "a" {
		t.Errorf("Get: %+v, %v", e, err)
	}
	if _, err := s.Commit(ctx, c.Create("a", vm{})); !errors.Is(err, ErrExists) {
		t.Errorf("a second Create: %v", err)
	}
	if _, err := c.Edit(ctx, "a", func(v *vm) error { v.Name = "changed"; return nil }); err != nil {
		t.Error(err)
	}
	if e, ok := c.Peek("a"); !ok || e.Value.Name != "changed" {
		t.Errorf("after Edit: %+v", e)
	}
	commit(t, s, c.Delete("b", rev))
	if _, err := c.Get(ctx, "b"); !errors.Is(err, ErrNotFound) {
		t.Errorf("after Delete: %v", err)
	}
	if list, err := c.List(ctx, ""); err != nil || len(list) != 1 || list[0].Key != "a" {
		t.Errorf("List: %+v, %v", list, err)
	}
	if _, err := s.client.Put(ctx, "/vm/a", "no JSON"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(ctx, "a"); !errors.Is(err, ErrDamaged) {
		t.Errorf("a damaged record: %v", err)
	}
	if err := s.rebuild(ctx); err != nil || len(c.rows) != 0 {
		t.Errorf("after a rebuild %d rows are in memory (%v)", len(c.rows), err)
	}
}

func BenchmarkFind(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		s := open(b, b.TempDir())
		vms := indexed(b, s)
		for i := 0; i < n; i += 1000 {
			var ops []Op
			for j := range 1000 {
				ops = append(ops, vms.Create(fmt.Sprint(i+j), vm{Name: fmt.Sprint(i + j), Disks: []string{"same"}}))
			}
			commit(b, s, ops...)
		}
		b.Run(fmt.Sprintf("records=%d", n), func(b *testing.B) {
			for i := range b.N {
				if got := found(b, vms, term("disk", "same"), term("name", fmt.Sprint(i%n))); len(got) != 1 {
					b.Fatal(got)
				}
			}
		})
		s.Close()
	}
}
