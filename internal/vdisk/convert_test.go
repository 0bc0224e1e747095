package vdisk

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"mortise/internal/keysafe"
)

// A conversion that is cancelled stops at a boundary that is durable, tells how
// far it is, takes no other target, and goes on in another process; meanwhile the
// disk works.
func TestCancelAndResume(t *testing.T) { testCancelAndResume(t, newWorld(t)) }

func testCancelAndResume(t *testing.T, w world) {
	const size = 2 << 20
	path := diskPath(t)
	create(t, path, w.spec(size, keysafe.KeyID{}))
	model := make([]byte, size)
	r := rand.New(rand.NewPCG(12, 13))
	o := w.options()
	o.zone = 16 * UnitSize
	for _, target := range []Target{{Kind: Encrypting, Key: kekA, Epoch: 4}, {Kind: Recrypting, Key: kekB}, {Kind: Decrypting}} {
		d := open(t, path, o)
		scribble(t, d, model, r, 60)
		ctx, cancel := context.WithCancel(t.Context())
		var seen []Progress
		err := d.Convert(ctx, target, func(p Progress) {
			if seen = append(seen, p); len(seen) == 6 {
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("%s: %v", target.Kind, err)
		}
		if !slices.IsSortedFunc(seen, func(a, b Progress) int { return int(a.Done - b.Done) }) || seen[0].Done != 0 {
			t.Errorf("progress %v", seen)
		}
		for _, p := range seen {
			if p.Kind != target.Kind || p.Total != size || p.Rate < 0 {
				t.Errorf("progress %+v", p)
			}
		}
		info, err := Describe(path) // without a key, while it is open
		if err != nil || !reflect.DeepEqual(info, d.Info()) || info.Conversion != target.Kind || info.Boundary <= 0 || info.Boundary >= size || !info.Encrypted {
			t.Fatalf("%+v, %v", info, err)
		}
		if st := d.state.cur.Load(); st.hotLen != 0 {
			t.Errorf("a hot zone of %d bytes is left", st.hotLen)
		}
		scribble(t, d, model, r, 60)
		compare(t, d, model)
		for _, other := range []Target{{Kind: Encrypting, Key: kekB}, {Kind: Recrypting, Key: kekA}} {
			if err := d.Convert(t.Context(), other, nil); !errors.Is(err, ErrConverting) {
				t.Errorf("%s in the middle of %s: %v", other.Kind, target.Kind, err)
			}
		}
		if err := d.ShallowRecrypt(t.Context(), kekA); !errors.Is(err, ErrConverting) {
			t.Errorf("shallow recrypt in the middle of %s: %v", target.Kind, err)
		}
		d.Close()

		ro := w.options()
		ro.ReadOnly = true
		d = open(t, path, ro)
		compare(t, d, model)
		d.Close()

		d = open(t, path, o)
		compare(t, d, model)
		if err := d.Convert(t.Context(), target, nil); err != nil {
			t.Fatalf("going on to %s: %v", target.Kind, err)
		}
		compare(t, d, model)
		if err := d.Resume(t.Context(), nil); err != nil {
			t.Fatalf("resuming nothing: %v", err)
		}
		d.Close()
	}
	if _, err := os.Stat(strings.TrimSuffix(path, ".vmdk") + "-flat.vmdk.state"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a disk in clear has a state file: %v", err)
	}
}

func TestShallowRecrypt(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	d := open(t, path, w.options())
	model := make([]byte, 1<<20)
	scribble(t, d, model, rand.New(rand.NewPCG(14, 15)), 30)
	if err := d.ShallowRecrypt(t.Context(), keysafe.KeyID{Provider: "kms", Key: "gone"}); !errors.Is(err, ErrKeysRequired) {
		t.Fatalf("to a key that is not there: %v", err)
	}
	if err := d.ShallowRecrypt(t.Context(), kekB); err != nil {
		t.Fatal(err)
	}
	if i := d.Info(); len(i.Keys) != 1 || i.Keys[0] != kekB || i.Epoch != 1 {
		t.Fatalf("%+v", i)
	}
	compare(t, d, model)
	d.Close()
	o := w.options()
	o.KEKs = keysafe.KEKSet{kekA: w.keks[kekA]}
	if _, err := Open(t.Context(), path, o); !errors.Is(err, ErrKeysRequired) {
		t.Fatalf("with the old KEK: %v", err)
	}
	o.KEKs = keysafe.KEKSet{kekB: w.keks[kekB]}
	d = open(t, path, o)
	compare(t, d, model)

	// Somebody who writes the descriptor without the lock is not overwritten.
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(text, "ddb.comment = \"mine\"\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	d.opts.KEKs = w.keks
	if err := d.ShallowRecrypt(t.Context(), kekA); !errors.Is(err, ErrStale) {
		t.Fatalf("over somebody else's change: %v", err)
	}
	compare(t, d, model)
}
