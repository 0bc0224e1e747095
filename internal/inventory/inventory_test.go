package inventory

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"mortise/internal/store"
)

func openStore(t testing.TB, dir string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: dir, Name: "center-1", Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func open(t testing.TB, s *store.Store) *Inventory {
	t.Helper()
	inv, err := Open(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); inv.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return inv
}

func TestRef(t *testing.T) {
	for ref, kind := range map[Ref]Kind{
		"group-d1": KindFolder, "group-v3": KindFolder, "datacenter-2": KindDatacenter, "domain-c7": KindCluster, "resgroup-8": KindResourcePool,
		"host-10": KindHost, "datastore-11": KindDatastore, "network-12": KindNetwork, "vm-13": KindVM, "task-14": KindTask,
		"": "", "vm": "", "vm-": "", "vm-0": "", "13": "", "vm-x": "", "group-q3": "", "vm-99999999999999999999": "", "-5": "",
	} {
		if got := ref.Kind(); got != kind {
			t.Errorf("%q is a %q, want %q", ref, got, kind)
		}
	}
	for prefix, kind := range prefixes {
		r := NewRef(prefix, 42)
		if p, n := r.split(); p != prefix || n != 42 || r.Kind() != kind {
			t.Errorf("NewRef(%q, 42) = %q, which splits into %q and %d", prefix, r, p, n)
		}
	}
}

func TestDefaultInventory(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	inv := open(t, s)
	v := inv.View()
	if got := v.Children(DefaultDatacenter); !slices.Equal(got, []Ref{"group-h4", "group-n6", "group-s5", "group-v3"}) {
		t.Errorf("the datacenter holds %v", got)
	}
	if c, ok := Lookup[Cluster](v, DefaultCluster); !ok || c.ResourcePool != DefaultPool || c.Name != "Cluster" {
		t.Errorf("the cluster is %+v", c)
	}
	if _, ok := Lookup[Host](v, DefaultCluster); ok {
		t.Error("a cluster was handed out as a host")
	}
	for ref, want := DefaultPool, 0; ; want++ {
		p, ok := v.Parent(ref)
		if !ok {
			if ref != RootFolder || want != 4 {
				t.Errorf("the way up from the pool ends at %s after %d steps", ref, want)
			}
			break
		}
		ref = p
	}
	ref, err := inv.NextRef(t.Context(), "vm")
	if err != nil || ref != "vm-10" {
		t.Errorf("the first new ref is %s, %v", ref, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// A second start finds it, gives no number twice and changes nothing.
	inv = open(t, openStore(t, dir))
	if ref, err := inv.NextRef(t.Context(), "vm"); err != nil || ref != "vm-11" {
		t.Errorf("after a restart the next ref is %s, %v", ref, err)
	}
	if got := len(inv.View().All(KindFolder)); got != 5 {
		t.Errorf("%d folders after a restart", got)
	}
}

func newVM(t testing.TB, inv *Inventory, name string) Ref {
	t.Helper()
	ref, err := inv.NextRef(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	err = inv.Commit(t.Context(), inv.VMs.Create(string(ref), VM{Entity: Entity{ref, name, DefaultVMFolder}}),
		inv.Take(ClaimName(DefaultVMFolder, name), ref))
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func TestViewFollows(t *testing.T) {
	inv := open(t, openStore(t, t.TempDir()))
	v := inv.View()
	start := v.Revision()
	a, b := newVM(t, inv, "a"), newVM(t, inv, "b")
	if got := v.Children(DefaultVMFolder); !slices.Equal(got, []Ref{a, b}) {
		t.Fatalf("right after the commit the folder holds %v", got)
	}
	before, _ := Lookup[VM](v, a)
	after, err := inv.EditVM(t.Context(), a, func(vm *VM) error { vm.Power = PoweredOn; return nil })
	if err != nil {
		t.Fatal(err)
	}
	seen, _ := Lookup[VM](v, a)
	if before.Power == PoweredOn || after.Power != PoweredOn || seen.Power != PoweredOn {
		t.Errorf("before %q, answer %q, view %q", before.Power, after.Power, seen.Power)
	}
	boom := errors.New("boom")
	if _, err := inv.EditVM(t.Context(), a, func(vm *VM) error { vm.Power = Suspended; return boom }); !errors.Is(err, boom) {
		t.Errorf("an edit that fails says %v", err)
	}
	if seen, _ := Lookup[VM](v, a); seen.Power != PoweredOn {
		t.Error("an edit that failed changed the record")
	}
	if err := inv.Commit(t.Context(), inv.VMs.Delete(string(b), 0), inv.Release(ClaimName(DefaultVMFolder, "b"))); err != nil {
		t.Fatal(err)
	}
	refs, now, gap, err := v.Changes(t.Context(), start)
	if err != nil || gap || now != v.Revision() || !slices.Equal(refs, []Ref{a, b}) {
		t.Errorf("changes since the start: %v to %d, gap %v, %v", refs, now, gap, err)
	}
	if _, ok := v.Get(b); ok || len(v.All(KindVM)) != 1 {
		t.Error("a deleted VM is still seen")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if refs, _, _, err := v.Changes(ctx, now); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nothing changed, but Changes says %v, %v", refs, err)
	}
}

func TestNameIsTakenOnce(t *testing.T) {
	inv := open(t, openStore(t, t.TempDir()))
	a := newVM(t, inv, "web")
	ref, _ := inv.NextRef(t.Context(), "vm")
	err := inv.Commit(t.Context(), inv.VMs.Create(string(ref), VM{Entity: Entity{ref, "web", DefaultVMFolder}}),
		inv.Take(ClaimName(DefaultVMFolder, "web"), ref))
	if !errors.Is(err, store.ErrExists) {
		t.Fatalf("a second VM of the name: %v", err)
	}
	if _, ok := inv.View().Get(ref); ok {
		t.Error("the refused VM is there")
	}
	if owner, ok, err := inv.Owner(t.Context(), ClaimName(DefaultVMFolder, "web")); owner != a || !ok || err != nil {
		t.Errorf("the name belongs to %s, %v, %v", owner, ok, err)
	}
}

// Many writers and readers: no reader ever sees a record go back, and every
// reader that follows Changes ends with what the store has.
func TestViewUnderLoad(t *testing.T) {
	inv := open(t, openStore(t, t.TempDir()))
	v := inv.View()
	const vms, edits = 8, 25
	var refs []Ref
	for i := range vms {
		refs = append(refs, newVM(t, inv, fmt.Sprint("vm", i)))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var readers, writers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			last := map[Ref]int64{}
			for at := int64(0); ; {
				changed, now, gap, err := v.Changes(ctx, at)
				if err != nil {
					break
				}
				if at = now; gap {
					continue
				}
				for _, ref := range changed {
					if vm, ok := Lookup[VM](v, ref); ok {
						if vm.SizeBytes < last[ref] {
							t.Errorf("%s went from %d back to %d", ref, last[ref], vm.SizeBytes)
						}
						last[ref] = vm.SizeBytes
					}
				}
			}
			for _, ref := range refs {
				if last[ref] != 2*edits {
					t.Errorf("a reader last saw %s at %d", ref, last[ref])
				}
			}
		})
	}
	for _, ref := range append(refs, refs...) {
		writers.Go(func() {
			for range edits {
				if _, err := inv.EditVM(t.Context(), ref, func(vm *VM) error { vm.SizeBytes++; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	time.Sleep(50 * time.Millisecond)
	cancel()
	readers.Wait()
}

func TestChangesGap(t *testing.T) {
	v := newView()
	for i := range int64(changeLog + 10) {
		v.apply([]update{{ref: "vm-1", record: &VM{Entity: Entity{Ref: "vm-1"}}, stored: i + 1}})
	}
	if _, now, gap, err := v.Changes(t.Context(), 3); !gap || err != nil || now != v.Revision() {
		t.Errorf("far behind: now %d, gap %v, %v", now, gap, err)
	}
	if refs, _, gap, err := v.Changes(t.Context(), v.Revision()-5); gap || err != nil || len(refs) != 1 {
		t.Errorf("a little behind: %v, gap %v, %v", refs, gap, err)
	}
}

func TestKeysOfVM(t *testing.T) {
	k := func(s string) *KeyID { return &KeyID{"p", s} }
	vm := VM{KeyID: k("a"), Disks: []Disk{
		{KeyID: k("a")},
		{KeyID: k("b"), Converting: &Conversion{Kind: ConvertDeep, Target: k("c")}},
		{Converting: &Conversion{Kind: ConvertDecrypt}},
	}}
	if got := fmt.Sprint(vm.Keys()); got != "[p/a p/b p/c]" {
		t.Errorf("keys are %s", got)
	}
	if plain := (&VM{Disks: make([]Disk, 2)}); plain.AnyEncrypted() || !vm.AnyEncrypted() {
		t.Error("AnyEncrypted is wrong")
	}
}

func TestSnapshotRef(t *testing.T) {
	r := SnapshotRef("vm-13", 2)
	if vm, id, ok := r.Snapshot(); r != "snapshot-13-2" || vm != "vm-13" || id != 2 || !ok || r.Kind() != "" {
		t.Errorf("%s is snapshot %d of %s, %v, of kind %q", r, id, vm, ok, r.Kind())
	}
	for _, r := range []Ref{"", "vm-13", "snapshot-", "snapshot-13", "snapshot-13-", "snapshot-13-0", "snapshot-0-1", "snapshot-013-2", "snapshot-13-02",
		"snapshot--1-2", "snapshot-13-+2", "snapshot-13-2-3", "snapshot-13-2147483648", "snapshot-9223372036854775808-1"} {
		if vm, id, ok := r.Snapshot(); ok {
			t.Errorf("%q is snapshot %d of %s", r, id, vm)
		}
	}
	tree := VM{Snapshots: []Snapshot{{ID: 2}, {ID: 3, Parent: 2}, {ID: 4, Parent: 2}, {ID: 5, Parent: 1}}}
	ids := func(list []Snapshot) (ids []int32) {
		for _, s := range list {
			ids = append(ids, s.ID)
		}
		return ids
	}
	if roots, on2, on5 := ids(tree.SnapshotsOn(0)), ids(tree.SnapshotsOn(2)), ids(tree.SnapshotsOn(5)); !slices.Equal(roots, []int32{2, 5}) || !slices.Equal(on2, []int32{3, 4}) || on5 != nil {
		t.Errorf("roots %v, on 2 %v, on 5 %v", roots, on2, on5)
	}
}

func FuzzRef(f *testing.F) {
	for _, s := range []string{"vm-13", "group-d1", "", "domain-c7", "vm-013", "snapshot-13-2", "snapshot-013-2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if vm, id, ok := Ref(s).Snapshot(); ok && (SnapshotRef(vm, id) != Ref(s) || Ref(s).Kind() != "" || vm.Kind() != KindVM) {
			t.Errorf("%q is snapshot %d of %s", s, id, vm)
		}
		if r := Ref(s); r.Kind() != "" {
			prefix, n := r.split()
			if prefixes[prefix] == "" || n < 1 {
				t.Errorf("%q has kind %s but splits into %q and %d", s, r.Kind(), prefix, n)
			}
		}
	})
}
