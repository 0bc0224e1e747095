package task

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mortise/internal/inventory"
	"mortise/internal/store"
)

// center is an engine on a store, that can be stopped and opened again.
type center struct {
	t         testing.TB
	dir       string
	handlers  map[string]Handler
	failpoint func(ctx context.Context, run *Run, step string)

	store  *store.Store
	inv    *inventory.Inventory
	engine *Engine
	stop   context.CancelFunc
	done   sync.WaitGroup
}

func (c *center) start() {
	c.t.Helper()
	log := slog.New(slog.NewTextHandler(c.t.Output(), nil))
	var err error
	c.store, err = store.Open(c.t.Context(), store.Config{Dir: c.dir, Name: "center-1"})
	if err == nil {
		c.inv, err = inventory.Open(c.t.Context(), c.store)
	}
	if err == nil {
		c.engine, err = NewEngine(c.t.Context(), Config{Inventory: c.inv, Logger: log, Clock: time.Now, Failpoint: c.failpoint}, c.handlers)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	c.done.Go(func() { c.inv.Run(ctx) })
	c.done.Go(func() { c.engine.Run(ctx) })
}

func (c *center) halt() {
	c.stop()
	c.done.Wait()
	c.store.Close()
}

func newCenter(t testing.TB, handlers map[string]Handler) *center {
	c := &center{t: t, dir: t.TempDir(), handlers: handlers}
	c.start()
	t.Cleanup(func() { c.halt() })
	return c
}

func (c *center) wait(ref inventory.Ref) *Record {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r, err := c.engine.Wait(ctx, ref)
	if err != nil {
		c.t.Fatalf("waiting for %s: %v", ref, err)
	}
	return r
}

func spec(typ string, locks ...string) Spec {
	return Spec{Type: typ, Name: "Test." + typ, Entity: inventory.DefaultCluster, User: "u", Locks: locks, Cancelable: true, Data: struct{}{}}
}

func TestEnds(t *testing.T) {
	c := newCenter(t, map[string]Handler{
		"good": func(ctx context.Context, r *Run) error {
			r.Progress(ctx, "half way", 50, 100)
			return r.SetResult(ctx, "vm-99")
		},
		"fault": func(ctx context.Context, r *Run) error {
			return fmt.Errorf("around: %w", &Fault{Kind: NoDiskSpace, Message: "datastore ds is full; free space and repeat", Object: "datastore-1"})
		},
		"error": func(ctx context.Context, r *Run) error { return errors.New("it broke") },
		"panic": func(ctx context.Context, r *Run) error { panic("key bytes might be in here") },
	})
	for typ, want := range map[string]struct {
		state  State
		kind   FaultKind
		text   string
		result inventory.Ref
	}{
		"good":  {Success, "", "", "vm-99"},
		"fault": {Failed, NoDiskSpace, "datastore ds is full; free space and repeat", ""},
		"error": {Failed, Internal, "it broke", ""},
		"panic": {Failed, Internal, "center's log has the details", ""},
	} {
		ref, err := c.engine.Submit(t.Context(), spec(typ))
		if err != nil {
			t.Fatal(err)
		}
		r := c.wait(ref)
		if r.State != want.state || r.Result != want.result || r.EntityName != "Cluster" || r.Started.IsZero() || r.Finished.IsZero() || r.Cancelable {
			t.Errorf("%s: %+v", typ, r)
		}
		if f := r.Error; (f == nil) != (want.kind == "") || f != nil && (f.Kind != want.kind || !strings.Contains(f.Message, want.text) || strings.Contains(f.Message, "key bytes")) {
			t.Errorf("%s ended with %+v", typ, f)
		}
	}
	if _, err := c.engine.Submit(t.Context(), spec("unheard of")); err == nil {
		t.Error("a task without a handler was taken")
	}
}

func TestExclusive(t *testing.T) {
	release := make(chan struct{})
	c := newCenter(t, map[string]Handler{"slow": func(ctx context.Context, r *Run) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}})
	first, err := c.engine.Submit(t.Context(), spec("slow", "vm-1"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.engine.Submit(t.Context(), spec("slow", "vm-2", "vm-1"))
	var f *Fault
	if !errors.As(err, &f) || f.Kind != TaskInProgress || f.Task != first || !strings.Contains(f.Message, "Test.slow") {
		t.Fatalf("a second task on the VM: %v", err)
	}
	second, err := c.engine.Submit(t.Context(), spec("slow", "vm-2")) // the refused one holds nothing
	if err != nil {
		t.Fatal(err)
	}
	if err := c.engine.Do(t.Context(), spec("", "vm-1"), nil); !Is(err, TaskInProgress) {
		t.Errorf("Do on a locked VM: %v", err)
	}
	// The locks outlive a restart.
	c.halt()
	c.start()
	if _, err := c.engine.Submit(t.Context(), spec("slow", "vm-1")); !Is(err, TaskInProgress) {
		t.Errorf("after a restart, a second task on the VM: %v", err)
	}
	close(release)
	c.wait(first)
	c.wait(second)
	if ref, err := c.engine.Submit(t.Context(), spec("slow", "vm-1", "vm-2")); err != nil {
		t.Errorf("after both ended: %v", err)
	} else {
		c.wait(ref)
	}
}

func TestCancel(t *testing.T) {
	begun := make(chan struct{}, 1)
	var forward atomic.Bool
	c := newCenter(t, map[string]Handler{"slow": func(ctx context.Context, r *Run) error {
		if forward.Load() {
			if err := r.SetCancelable(ctx, false); err != nil {
				return err
			}
		}
		begun <- struct{}{}
		if forward.Load() {
			return nil
		}
		<-ctx.Done()
		return ctx.Err()
	}})
	ref, _ := c.engine.Submit(t.Context(), spec("slow", "vm-1"))
	<-begun
	if err := c.engine.Cancel(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if r := c.wait(ref); r.State != Failed || r.Error.Kind != Canceled || !r.Cancelled {
		t.Errorf("a cancelled task ended as %+v, %v", r, r.Error)
	}
	if err := c.engine.Cancel(t.Context(), ref); !Is(err, InvalidState) {
		t.Errorf("cancelling it again: %v", err)
	}
	if err := c.engine.Cancel(t.Context(), "task-4711"); !Is(err, NotFound) {
		t.Errorf("cancelling nothing: %v", err)
	}
	forward.Store(true)
	ref, err := c.engine.Submit(t.Context(), spec("slow", "vm-1"))
	if err != nil {
		t.Fatal(err)
	}
	<-begun
	c.wait(ref)
	if r, _ := inventory.Lookup[Record](c.inv.View(), ref); r.Cancelable || r.State != Success {
		t.Errorf("it ended as %+v", r)
	}
}

// A task of three steps is stopped before and after each one is written down,
// and always goes on to the same end with the same operation id.
func TestResumesAtEveryStep(t *testing.T) {
	type data struct{ Steps []string }
	steps := []string{"one", "two", "three"}
	for point := range 2 * len(steps) {
		t.Run(fmt.Sprint(point), func(t *testing.T) {
			var mu sync.Mutex
			acts := map[string]int{} // what the outside world saw, by operation and step
			var operations []string
			var armed atomic.Bool
			var seen atomic.Int32
			reached := make(chan struct{})
			handler := func(ctx context.Context, r *Run) error {
				var d data
				if err := r.Load(&d); err != nil {
					return err
				}
				mu.Lock()
				operations = append(operations, r.Operation())
				mu.Unlock()
				for i := len(d.Steps); i < len(steps); i++ {
					mu.Lock()
					acts[r.Operation()+steps[i]]++
					mu.Unlock()
					d.Steps = append(d.Steps, steps[i])
					if err := r.Save(ctx, steps[i], d); err != nil {
						return err
					}
				}
				return r.SetResult(ctx, "vm-7")
			}
			c := &center{t: t, dir: t.TempDir(), handlers: map[string]Handler{"steps": handler}}
			c.failpoint = func(ctx context.Context, r *Run, step string) {
				if armed.Load() && int(seen.Add(1))-1 == point {
					close(reached)
					<-ctx.Done() // center dies here
				}
			}
			armed.Store(true)
			c.start()
			s := spec("steps", "vm-1")
			s.Data = data{}
			ref, err := c.engine.Submit(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			<-reached
			c.halt()
			armed.Store(false)
			c.start()
			defer c.halt()
			r := c.wait(ref)
			if r.State != Success || r.Result != "vm-7" || string(r.Data) != `{"Steps":["one","two","three"]}` {
				t.Errorf("it ended as %+v with %s", r, r.Data)
			}
			if len(operations) != 2 || operations[0] != operations[1] {
				t.Errorf("operation ids %v", operations)
			}
			for _, step := range steps {
				// The step whose writing was cut off is done once more; no other is.
				want := 1
				if point%2 == 0 && steps[point/2] == step {
					want = 2
				}
				if got := acts[r.Operation+step]; got != want {
					t.Errorf("step %s was done %d times, want %d", step, got, want)
				}
			}
			if by, locked := c.engine.Locked("vm-1"); locked {
				t.Errorf("the VM is still locked by %s", by)
			}
		})
	}
}

func TestProgressIsThrottled(t *testing.T) {
	begun, goOn := make(chan struct{}), make(chan struct{})
	c := newCenter(t, map[string]Handler{"chatty": func(ctx context.Context, r *Run) error {
		for i := range int64(5000) {
			r.Progress(ctx, "copying", i, 5000)
		}
		r.Progress(ctx, "checking", 1, 5000)
		close(begun)
		<-goOn
		return nil
	}})
	ref, err := c.engine.Submit(t.Context(), spec("chatty"))
	if err != nil {
		t.Fatal(err)
	}
	from := c.inv.View().Revision()
	<-begun
	r, _ := inventory.Lookup[Record](c.inv.View(), ref)
	if r.Stage != "checking" || r.Progress != 0 || r.TotalBytes != 5000 {
		t.Errorf("the record says %+v", r)
	}
	if n := c.inv.View().Revision() - from; n > 10 {
		t.Errorf("5000 reports made %d changes", n)
	}
	close(goOn)
	if r := c.wait(ref); r.Progress != 100 {
		t.Errorf("a task that succeeded is at %d %%", r.Progress)
	}
}

func TestDoEndsWithItsCaller(t *testing.T) {
	c := newCenter(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var ref inventory.Ref
	err := c.engine.Do(ctx, spec("", "vm-1"), func(ctx context.Context, r *Run) error {
		ref = r.Ref()
		cancel()
		<-ctx.Done()
		return ctx.Err()
	})
	if err == nil {
		t.Error("the caller went away, but all is well")
	}
	if r := c.wait(ref); r.State != Failed {
		t.Errorf("the task is %s", r.State)
	}
	// One that center's end cuts off is not resumed; it has failed.
	begun := make(chan struct{})
	go c.engine.Do(context.Background(), spec("", "vm-1"), func(ctx context.Context, r *Run) error {
		ref = r.Ref()
		close(begun)
		<-ctx.Done()
		return ctx.Err()
	})
	<-begun
	c.halt()
	c.start()
	if r := c.wait(ref); r.State != Failed || r.Error == nil {
		t.Errorf("after a restart the task is %+v", r)
	}
	if _, locked := c.engine.Locked("vm-1"); locked {
		t.Error("its lock is still held")
	}
}

func TestOldTasksGo(t *testing.T) {
	c := newCenter(t, map[string]Handler{"quick": func(context.Context, *Run) error { return nil }})
	c.engine.keep = 40
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 12 {
				ref, err := c.engine.Submit(t.Context(), spec("quick"))
				if err != nil {
					t.Error(err)
					return
				}
				c.engine.Wait(t.Context(), ref)
			}
		})
	}
	group.Wait()
	if n := len(c.inv.View().All(inventory.KindTask)); n > 40+4+8 || n < 40 {
		t.Errorf("%d tasks are kept", n)
	}
}

func TestFault(t *testing.T) {
	cause := errors.New("cause")
	f := (&Fault{Kind: HostDown, Message: "m"}).Because(cause)
	err := fmt.Errorf("more: %w", f)
	if AsFault(err) != f || !Is(err, HostDown) || Is(err, NotFound) || !errors.Is(err, cause) || AsFault(nil) != nil {
		t.Error("faults are not found in errors")
	}
	if g := AsFault(cause); g.Kind != Internal || g.Message != "cause" || !errors.Is(g, cause) {
		t.Errorf("a plain error becomes %+v", g)
	}
}
