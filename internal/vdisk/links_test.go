package vdisk

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
)

// Every link of a disk with two branches is converted, and shows the same in each
// form; interrupted, the same call goes on.
func TestConvertEveryLink(t *testing.T) {
	w := newWorld(t)
	x := newTree(t, w, 1<<20+SectorSize, keysafe.KeyID{}, 3)
	closeChain(t, x.d)
	branch, err := Revert(t.Context(), x.d.links[1].path, x.o, LinkSpec{})
	if err != nil {
		t.Fatal(err)
	}
	b := openChain(t, branch, x.o)
	model := slices.Clone(x.frozen[x.d.links[1].path])
	compare(t, b, model)
	scribble(t, b, model, x.r, 20)
	if err := b.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	closeChain(t, b)
	x.frozen[branch] = model
	x.d = openChain(t, x.top, x.o)
	x.d.links[0].opts.zone = 64 << 10
	for _, target := range []Target{{Kind: Encrypting, Key: kekA, Epoch: 5}, {Kind: Recrypting, Key: kekB, Epoch: 6}, {Kind: Recrypting, Key: kekA}, {Kind: Decrypting}, {Kind: Encrypting, Key: kekB, Epoch: 9}} {
		ctx, cancel := context.WithCancel(t.Context())
		calls := 0
		err := x.d.Convert(ctx, target, func(p Progress) {
			if calls++; calls == 4 {
				cancel()
			}
			if p.Done > p.Total {
				t.Errorf("%d of %d bytes", p.Done, p.Total)
			}
		})
		cancel()
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		scribble(t, x.d, x.model, x.r, 10)
		x.reopen(t)
		x.snapshot(t) // born in the target's form, or converted with the others
		scribble(t, x.d, x.model, x.r, 10)
		if err := x.d.Convert(t.Context(), target, nil); err != nil {
			t.Fatalf("%s: %v", target.Kind, err)
		}
		x.check(t)
		info, links, err := DescribeChain(x.top, nil)
		if err != nil {
			t.Fatal(err)
		}
		one, err := Describe(branch)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range append(links, info, one, x.d.Info()) {
			if l.Encrypted != (target.Kind != Decrypting) || l.Conversion != NotConverting || l.Encrypted && (len(l.Keys) != 1 || l.Keys[0] != target.Key || l.Epoch < target.Epoch) {
				t.Errorf("after %s: %+v", target.Kind, l)
			}
		}
	}

	// Shallow: as one task, whose first call is stopped by a missing key.
	o := x.o
	o.KEKs = keysafe.KEKSet{kekB: w.keks[kekB]}
	closeChain(t, x.d)
	x.d = openChain(t, x.top, o)
	if err := x.d.ShallowRecrypt(t.Context(), kekA); err == nil {
		t.Fatal("recrypted to a key that is not there")
	}
	x.reopen(t)
	if err := x.d.ShallowRecrypt(t.Context(), kekA); err != nil {
		t.Fatal(err)
	}
	x.check(t)
	one, err := Describe(branch)
	if i := x.d.Info(); err != nil || !slices.Equal(i.Keys, []keysafe.KeyID{kekA}) || !slices.Equal(one.Keys, i.Keys) {
		t.Errorf("keys %v and %v, %v", i.Keys, one.Keys, err)
	}
}

// A link in clear on an encrypted base, and the other way round, are one disk.
func TestLinksOfDifferentForms(t *testing.T) {
	w := newWorld(t)
	x := newTree(t, w, 1<<20, keysafe.KeyID{}, 3)
	if err := x.d.ConvertLink(t.Context(), "vm-000001.vmdk", Target{Kind: Encrypting, Key: kekA}, nil); err != nil {
		t.Fatal(err)
	}
	if err := x.d.ConvertLink(t.Context(), "vm-000003.vmdk", Target{Kind: Encrypting, Key: kekB}, nil); err != nil {
		t.Fatal(err)
	}
	if i := x.d.Info(); !i.Encrypted || i.Conversion != Encrypting || len(i.Keys) != 2 {
		t.Errorf("a disk of which half is encrypted: %+v", i)
	}
	x.check(t)
	clear(x.frozen)
	for range 3 {
		scribble(t, x.d, x.model, x.r, 20)
		x.merge(t, x.d.links[1+x.r.IntN(len(x.d.links)-1)].path)
	}
	if len(x.d.links) != 1 {
		t.Fatalf("%d links", len(x.d.links))
	}
}

// Linked clones share a base, which nobody changes any more.
func TestLinkedClones(t *testing.T) {
	w := newWorld(t)
	for _, key := range []keysafe.KeyID{{}, kekA} {
		store := t.TempDir()
		mkdir(t, filepath.Join(store, "template"))
		base := filepath.Join(store, "template", "vm.vmdk")
		create(t, base, w.spec(1<<20, key))
		o := w.chainOptions(t)
		d := openChain(t, base, o)
		r := rand.New(rand.NewPCG(31, 32))
		model := make([]byte, d.Size())
		scribble(t, d, model, r, 40)
		link := takeSnapshot(t, d)
		scribble(t, d, model, r, 40)
		if err := d.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := LinkedClone(t.Context(), link, filepath.Join(store, "c", "c.vmdk"), o, CloneSpec{VM: uuid.New()}); !errors.Is(err, ErrInUse) {
			t.Fatalf("a clone of what a VM writes to: %v", err)
		}
		closeChain(t, d)

		type clone struct {
			d     *Chain
			model []byte
		}
		var clones []clone
		for _, name := range []string{"c1", "c2"} {
			mkdir(t, filepath.Join(store, name))
			path := filepath.Join(store, name, "disk.vmdk")
			vm := uuid.New()
			if err := LinkedClone(t.Context(), link, path, o, CloneSpec{VM: vm}); err != nil {
				t.Fatal(err)
			}
			co := o
			co.VM = vm
			if _, err := OpenChain(t.Context(), path, co); !errors.Is(err, ErrParent) {
				t.Fatalf("a clone whose base nobody vouches for: %v", err)
			}
			co.Bases = []Base{{Folder: filepath.Join(store, "template"), VM: w.vm}}
			c := clone{openChain(t, path, co), slices.Clone(model)}
			if c.d.Info().Encrypted != (key != keysafe.KeyID{}) || c.d.Info().UUID == d.links[0].desc.UUID() {
				t.Errorf("clone: %+v", c.d.Info())
			}
			clones = append(clones, c)
		}
		for range 3 {
			for _, c := range clones {
				scribble(t, c.d, c.model, r, 20)
				compare(t, c.d, c.model)
				takeSnapshot(t, c.d)
				scribble(t, c.d, c.model, r, 20)
				top := c.d.links[len(c.d.links)-1].path
				if err := c.d.Consolidate(t.Context(), MergeSpec{Link: top}); err != nil {
					t.Fatal(err)
				}
				if err := c.d.Consolidate(t.Context(), MergeSpec{Link: c.d.links[2].path}); !errors.Is(err, ErrSealed) {
					t.Fatalf("merging a clone with the template: %v", err)
				}
				compare(t, c.d, c.model)
			}
		}
		for _, c := range clones {
			closeChain(t, c.d)
		}
		for what, try := range map[string]func() error{
			"opening for writing": func() error { _, err := OpenChain(t.Context(), link, o); return err },
			"deleting":            func() error { return Delete(t.Context(), link) },
		} {
			if err := try(); !errors.Is(err, ErrSealed) {
				t.Errorf("%s the sealed base: %v", what, err)
			}
		}
		ro := o
		ro.ReadOnly = true
		compare(t, openChain(t, link, ro), model)
	}
}

func TestGrow(t *testing.T) {
	w := newWorld(t)
	for _, key := range []keysafe.KeyID{{}, kekA} {
		path := diskPath(t)
		const size = 1<<20 + 3*SectorSize
		create(t, path, w.spec(size, key))
		o := w.chainOptions(t)
		var steps []string
		o.at = func(p string) { steps = append(steps, p) }
		d := openChain(t, path, o)
		r := rand.New(rand.NewPCG(41, 42))
		model := make([]byte, size)
		scribble(t, d, model, r, 40)
		for _, to := range []int64{size + 100, size - SectorSize, MaxSize + SectorSize, -1} {
			if err := d.Grow(t.Context(), to); err == nil {
				t.Errorf("grew to %d", to)
			}
		}
		steps = nil
		const more = 2<<20 + SectorSize
		if err := d.Grow(t.Context(), more); err != nil || d.Size() != more {
			t.Fatal(d.Size(), err)
		}
		model = append(model, make([]byte, more-size)...)
		compare(t, d, model)
		scribble(t, d, model, r, 40)
		closeChain(t, d)
		d = openChain(t, path, o)
		compare(t, d, model)

		// Killed at each step, it has the old length or the new one.
		for n := range steps {
			dir := t.TempDir()
			copyFolder(t, filepath.Dir(path), dir)
			closeChain(t, d)
			kill := filepath.Join(dir, filepath.Base(path))
			o := o
			left := n
			o.at = func(string) {
				if left--; left == -1 {
					panic("killed")
				}
			}
			func() {
				defer func() { recover() }()
				o2 := o
				o2.at = nil
				d, err := OpenChain(t.Context(), kill, o2)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				d.links[0].opts.at = o.at
				if d.links[0].state != nil {
					d.links[0].state.at = o.at
				}
				_ = d.Grow(t.Context(), 3<<20)
			}()
			o.at = nil
			k := openChain(t, kill, o)
			if k.Size() != more && k.Size() != 3<<20 {
				t.Fatalf("killed at %s: %d bytes", steps[n], k.Size())
			}
			compare(t, k, append(slices.Clone(model), make([]byte, k.Size()-more)...))
			if err := k.Grow(t.Context(), 3<<20); err != nil {
				t.Fatal(err)
			}
			closeChain(t, k)
			d = openChain(t, path, o)
		}

		takeSnapshot(t, d)
		if err := d.Grow(t.Context(), 4<<20); !errors.Is(err, ErrChildren) {
			t.Fatalf("growing a disk with snapshots: %v", err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Fatal(err)
		}
	}
}
