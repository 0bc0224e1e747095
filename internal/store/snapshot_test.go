package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// exported collects an export.
func exported(t *testing.T, s *Store) (map[string]Record, int64) {
	t.Helper()
	all := map[string]Record{}
	rev, err := s.Export(t.Context(), func(r Record) error {
		r.Stored = slices.Clone(r.Stored)
		all["/"+r.Collection+"/"+r.Key] = r
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all, rev
}

func from(all map[string]Record) func(func(Record) error) error {
	return func(each func(Record) error) error {
		for _, name := range slices.Sorted(maps.Keys(all)) {
			if err := each(all[name]); err != nil {
				return err
			}
		}
		return nil
	}
}

// TestRestore: an export restored elsewhere has the same records at the same
// revisions, goes on far behind them, and gives all of it to members that join.
func TestRestore(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	g := newGroup(t)
	old := g.open(Config{Dir: t.TempDir(), Name: "old"})
	vms, hosts := collection(t, old, "vm", JSON[vm](1)), collection(t, old, "host-1", JSON[vm](1))
	for i := range 3*snapshotPage/500 + 1 { // several pages
		var ops []Op
		for j := range 500 {
			ops = append(ops, vms.Create(fmt.Sprintf("%03d-%03d", i, j), vm{Rev: i}))
		}
		commit(t, old, ops...)
	}
	commit(t, old, vms.Put("000-000", vm{Rev: 77}), hosts.Create("h/1", vm{Rev: 1}))
	commit(t, old, vms.Delete("000-001", 0))
	term := make(chan struct{})
	run, cancel := context.WithCancel(ctx)
	led := make(chan struct{})
	go func() {
		defer close(led)
		old.Lead(run, "sweeper", func(ctx context.Context, _ Term) error { close(term); <-ctx.Done(); return nil })
	}()
	<-term
	all, rev := exported(t, old)
	cancel()
	<-led
	if len(all) != len(slices.Collect(maps.Keys(all))) || all["/vm/000-000"].Version != 2 || all["/vm/000-001"].Collection != "" || all["/host-1/h/1"].Created != all["/vm/000-000"].Modified {
		t.Fatalf("export: %d records, %+v", len(all), all["/vm/000-000"])
	}

	// Restored as the later first member of a cluster.
	f := g.front("a")
	cfg := g.config("a", f, nil)
	if err := Restore(ctx, cfg, rev, from(all)); err != nil {
		t.Fatal(err)
	}
	if err := Restore(ctx, cfg, rev, from(all)); err == nil || !strings.Contains(err.Error(), "holds a store already") {
		t.Errorf("a second restore into the folder: %v", err)
	}
	a := g.open(cfg)
	again, at := exported(t, a)
	same := func(x, y Record) bool {
		return x.Created == y.Created && x.Modified == y.Modified && x.Version == y.Version && slices.Equal(x.Stored, y.Stored)
	}
	if !maps.EqualFunc(all, again, same) || at <= rev+RevisionBump {
		t.Errorf("restored %d records at revision %d, exported %d at %d", len(again), at, len(all), rev)
	}
	b, _ := g.join(a, "b")
	joined := collection(t, b, "vm", JSON[vm](1))
	if e, err := joined.Get(ctx, "000-000"); err != nil || e.Value.Rev != 77 || e.Revision != all["/vm/000-000"].Modified {
		t.Errorf("on a member that joined: %+v, %v", e, err)
	}
	restored := collection(t, a, "vm", JSON[vm](1))
	next := commit(t, a, restored.Create("new", vm{}))
	if next <= rev+RevisionBump {
		t.Errorf("the next revision is %d", next)
	}
	if e, err := joined.Get(ctx, "new"); err != nil || e.Revision != next {
		t.Errorf("a new record on the other member: %+v, %v", e, err)
	}
	onB, _ := exported(t, b)
	if len(onB) != len(all)+1 {
		t.Errorf("the member that joined has %d records of %d", len(onB), len(all)+1)
	}
}

func TestRestoreRefuses(t *testing.T) {
	t.Parallel()
	good := Record{Collection: "vm", Key: "a", Stored: []byte("x"), Created: 2, Modified: 3, Version: 1}
	stop := errors.New("stop")
	for name, c := range map[string]struct {
		change func(*Record)
		want   string
	}{
		"collection":      {func(r *Record) { r.Collection = "a/b" }, "no name for a collection"},
		"empty key":       {func(r *Record) { r.Key = "" }, "a record's key has 1 to"},
		"later revision":  {func(r *Record) { r.Modified = 9 }, "in an export of revision 8"},
		"before creation": {func(r *Record) { r.Modified = 1 }, "revisions 2 to 1"},
		"no version":      {func(r *Record) { r.Version = 0 }, "version 0"},
	} {
		t.Run(name, func(t *testing.T) {
			r := good
			c.change(&r)
			if err := r.check(8); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
	dir := filepath.Join(t.TempDir(), "s")
	err := Restore(t.Context(), Config{Dir: dir, Name: "a"}, 8, func(each func(Record) error) error {
		return errors.Join(each(good), stop)
	})
	if !errors.Is(err, stop) {
		t.Errorf("an error of the source: %v", err)
	}
}
