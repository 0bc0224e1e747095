package vdisk

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
)

// A frozen link gets another key while its clone is closed; nothing can be written to
// it, and what stands on it shows the same.
func TestFrozen(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	model := make([]byte, 1<<20)
	d := open(t, path, w.options())
	scribble(t, d, model, rand.New(rand.NewPCG(3, 4)), 30)
	d.Close()
	dir := filepath.Join(filepath.Dir(filepath.Dir(path)), "clone")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	other := uuid.New()
	clone := filepath.Join(dir, "clone.vmdk")
	if err := LinkedClone(t.Context(), path, clone, w.options(), CloneSpec{VM: other}); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenChain(t.Context(), path, w.options()); !errors.Is(err, ErrSealed) {
		t.Fatalf("for writing: %v", err)
	}
	o := w.options()
	o.Frozen = true
	c, err := OpenChain(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	_, serr := c.Snapshot(t.Context(), LinkSpec{})
	for name, err := range map[string]error{
		"write": c.WriteAt(make([]byte, 512), 0), "trim": c.Trim(0, 4096), "zero": c.WriteZeroes(0, 4096, true),
		"grow": c.Grow(t.Context(), 2<<20), "snapshot": serr, "consolidate": c.Consolidate(t.Context(), MergeSpec{}),
	} {
		if !errors.Is(err, ErrSealed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := c.Convert(t.Context(), Target{Kind: Recrypting, Key: kekB, Epoch: 2}, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	o = w.options()
	o.VM, o.Bases = other, []Base{{filepath.Dir(path), w.vm}}
	if c, err = OpenChain(t.Context(), clone, o); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	compare(t, c, model)
	if i := c.Links()[0]; i.Epoch != 2 || i.Sealed == "" || len(i.Keys) != 1 || i.Keys[0] != kekB {
		t.Errorf("the base: %+v", i)
	}
}

// When it is not known whether the new link is recorded as the disk's top, it stays,
// and nothing is written to the disk any more: either may be the disk after a crash.
func TestUndecidedSnapshot(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	o := w.chainOptions(t)
	c := openChain(t, path, o)
	model := make([]byte, 1<<20)
	scribble(t, c, model, rand.New(rand.NewPCG(5, 6)), 30)
	var link string
	_, err := c.Snapshot(t.Context(), LinkSpec{Commit: func(path string) error {
		link = path
		return fmt.Errorf("syncing a folder: %w", ErrUndecided)
	}})
	if !errors.Is(err, ErrUndecided) || c.Failed() == nil {
		t.Fatalf("%v; failed: %v", err, c.Failed())
	}
	if err := c.WriteAt(make([]byte, 512), 0); err == nil {
		t.Error("it can be written")
	}
	c.Close()
	c = openChain(t, link, o)
	defer c.Close()
	compare(t, c, model)
}

// A branch whose descriptor cannot be read is not passed over (R3): what is done to
// every link fails, and says which is the one.
func TestUnreadableBranch(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	o := w.chainOptions(t)
	c := openChain(t, path, o)
	old, err := c.Snapshot(t.Context(), LinkSpec{})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	top, err := Revert(t.Context(), path, o, LinkSpec{})
	if err != nil {
		t.Fatal(err)
	}
	good := readFile(t, old)
	if err := os.WriteFile(old, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	c = openChain(t, top, o)
	defer c.Close()
	_, ferr := DescribeFolder(filepath.Dir(path))
	for name, err := range map[string]error{
		"shallow": c.ShallowRecrypt(t.Context(), kekB), "deep": c.Convert(t.Context(), Target{Kind: Recrypting, Key: kekB, Epoch: 2}, nil), "describe": ferr,
	} {
		if !errors.Is(err, ErrParent) || !strings.Contains(err.Error(), filepath.Base(old)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(old, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Convert(t.Context(), Target{Kind: Recrypting, Key: kekB, Epoch: 2}, nil); err != nil {
		t.Fatal(err)
	}
	if i, err := Describe(old); err != nil || i.Keys[0] != kekB || i.Epoch != 2 {
		t.Errorf("%+v, %v", i, err)
	}
}
