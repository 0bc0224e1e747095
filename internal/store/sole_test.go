package store

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// TestSole: a member that is alone does not ask raft, one that is not does, and
// in each term the first read asks.
func TestSole(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	cfg := g.config("a", g.front("a"), nil)
	a := g.open(cfg)
	alone := func(want bool) {
		t.Helper()
		if _, is := a.sole(); is != want {
			t.Errorf("alone: %v, want %v", is, want)
		}
	}
	alone(true)
	if a.cache.soleIn.Load() != 0 {
		t.Error("raft was not asked after the start")
	}
	vms := collection(t, a, "vm", JSON[vm](1))
	if term, _ := a.sole(); a.cache.soleIn.Load() != term {
		t.Errorf("in term %d it is asked once more than in %d", term, a.cache.soleIn.Load())
	}
	// Whatever has been acknowledged is seen, by whoever reads after it.
	var (
		wg   sync.WaitGroup
		done atomic.Int64
	)
	wg.Go(func() {
		for i := range 300 {
			commit(t, a, vms.Put("counter", vm{Rev: i + 1}))
			done.Store(int64(i + 1))
		}
	})
	for range 3 {
		wg.Go(func() {
			for done.Load() < 300 {
				least := int(done.Load())
				if e, err := vms.Get(t.Context(), "counter"); least > 0 && (err != nil || e.Value.Rev < least) {
					t.Errorf("%d was acknowledged, and %d read (%v)", least, e.Value.Rev, err)
					return
				}
			}
		})
	}
	wg.Wait()

	f := g.front("b")
	var m Member
	g.retry(func() (err error) { m, _, err = a.AddLearner(t.Context(), f.url()); return err })
	alone(false)
	g.retry(func() error { return a.RemoveMember(t.Context(), m.ID) })
	alone(true)
	for i := range 3 {
		commit(t, a, vms.Put(fmt.Sprint(i), vm{}))
		if _, err := vms.Get(t.Context(), fmt.Sprint(i)); err != nil {
			t.Error(err)
		}
	}

	b, _ := g.join(a, "b")
	alone(false)
	if _, is := b.sole(); is {
		t.Error("the other one takes itself for the only one")
	}
	commit(t, b, collection(t, b, "vm", JSON[vm](1)).Put("of b", vm{}))
	if _, err := vms.Get(t.Context(), "of b"); err != nil {
		t.Errorf("what another member has acknowledged: %v", err)
	}
}
