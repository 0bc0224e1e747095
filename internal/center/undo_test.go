package center_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"mortise/internal/center"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// same compares a VM's encryption with what it was before.
func sameCrypto(was, is *inventory.VM) string {
	word := func(vm *inventory.VM) string {
		s := fmt.Sprintf("%s: files %v %v %v", vm.Name, vm.Encrypted, vm.KeyID, vm.Converting)
		for _, d := range vm.Disks {
			s += fmt.Sprintf("; disk %d %v %v %v", d.Key, d.Encrypted, d.KeyID, d.Converting)
		}
		return s
	}
	if word(was) == word(is) {
		return ""
	}
	return word(is) + ", and was " + word(was)
}

// TestCancelRunsBack cancels every kind of change in the middle, of running and of
// powered-off VMs: each runs back, and the next change finds the VM as it was.
func TestCancelRunsBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	for name, c := range map[string]struct {
		profile policy.ID
		kind    center.CryptoKind
		on      bool
		after   int // steps of the second disk; its first is done then
	}{
		"encrypt":      {"", center.CryptoEncrypt, false, 3},
		"encrypt-on":   {"", center.CryptoEncrypt, true, 3},
		"deep-on":      {policy.VMEncryption, center.CryptoDeep, true, 3},
		"decrypt":      {policy.VMEncryption, center.CryptoDecrypt, false, 3},
		"just-started": {policy.VMEncryption, center.CryptoDecrypt, true, -5},
	} {
		ref := w.createVM(name, c.profile)
		if c.on {
			w.ok(w.c.PowerOn(ctx, w.p, ref))
		}
		was := w.vm(ref)
		at := make(chan bool)
		steps, back := 0, 0
		w.host.OnStep(func(step int) {
			if step < 0 {
				back++
				return
			}
			if steps++; steps == 9+c.after {
				at <- true
				<-at
			}
		})
		spec := center.ReconfigureSpec{Name: name + "2", Crypto: center.CryptoSpec{Kind: c.kind}}
		taskRef, err := w.c.ReconfigureVM(ctx, w.p, ref, spec)
		w.must(err)
		<-at
		w.must(w.c.CancelTask(ctx, w.p, taskRef))
		time.Sleep(50 * time.Millisecond) // until the host hears of it: its steps take no time
		at <- true
		f := w.faulted(task.Canceled, name+" cancelled", second2(w.end(taskRef, nil)))
		if strings.Contains(f.Message, "half way") {
			t.Errorf("%s: %s", name, f.Message)
		}
		w.host.OnStep(nil)
		if wrong := sameCrypto(was, w.vm(ref)); wrong != "" {
			t.Errorf("%s: %s", name, wrong)
		}
		if back == 0 {
			t.Errorf("%s: nothing ran back", name)
		}
		for _, vms := range w.host.Held() {
			if len(vms) > 1 {
				t.Errorf("%s: keys are kept: %v", name, w.host.Held())
			}
		}
		held := 0
		for _, vms := range w.host.Held() {
			for _, id := range vms {
				if id == was.UUID {
					held++
				}
			}
		}
		if held != len(was.Keys()) {
			t.Errorf("%s: the host holds %d keys for the VM, which has %d", name, held, len(was.Keys()))
		}
		r, _ := inventory.Lookup[task.Record](w.c.View(), taskRef)
		if !r.Cancelled || !r.Undoing || r.Cancelable {
			t.Errorf("%s: the task's record: %+v", name, r)
		}
		w.ok(w.c.ReconfigureVM(ctx, w.p, ref, spec)) // the name is free, the VM whole
		if vm := w.vm(ref); vm.Name != name+"2" || vm.Encrypted != (c.kind != center.CryptoDecrypt) || vm.Disks[1].Converting != nil {
			t.Errorf("%s: changed after all: %+v", name, vm)
		}
		if c.on {
			w.ok(w.c.PowerOff(ctx, w.p, ref))
		}
		w.ok(w.c.DestroyVM(ctx, w.p, ref))
	}
}

// TestCancelTwice: who cancels what runs back already is told so, and it goes on;
// so it does when the host goes away meanwhile.
func TestCancelTwice(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", policy.VMEncryption)
	was := w.vm(ref)
	cancelled, restarted := false, false
	var taskRef inventory.Ref
	begun := make(chan bool)
	w.host.OnStep(func(step int) {
		switch {
		case step == 5 && !cancelled:
			<-begun
			cancelled = true
			w.must(w.c.CancelTask(ctx, w.p, taskRef))
			time.Sleep(50 * time.Millisecond)
		case step == -2 && !restarted:
			restarted = true
			w.faulted(task.InvalidState, "too late taken back", w.c.CancelTask(ctx, w.p, taskRef))
			if r, _ := inventory.Lookup[task.Record](w.c.View(), taskRef); r.Stage != "running back" {
				t.Errorf("stage %q", r.Stage)
			}
			go w.host.Restart()
			time.Sleep(100 * time.Millisecond)
		}
	})
	taskRef, err := w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoDeep}})
	w.must(err)
	close(begun)
	w.faulted(task.Canceled, "web", second2(w.end(taskRef, nil)))
	if wrong := sameCrypto(was, w.vm(ref)); wrong != "" || !restarted {
		t.Errorf("%s, restarted %v", wrong, restarted)
	}
	w.faulted(task.InvalidState, "ended", w.c.CancelTask(ctx, w.p, taskRef))
	w.faulted(task.InvalidState, "ended", w.c.SetTaskPace(ctx, w.p, taskRef, center.PaceChange{}))
}

// TestUndoCrashes stops center before and after every durable step of a cancelled
// task: the next one takes back what is left to take back.
func TestUndoCrashes(t *testing.T) {
	if testing.Short() {
		t.Skip("see build/test.sh")
	}
	t.Parallel()
	w := newCrashes(t)
	for at, total := -1, 0; at < total; at++ {
		w.arm(-1)
		ref := w.createVM("new", "")
		was := w.vm(ref)
		reached, last := make(chan bool), false
		w.host.OnStep(func(step int) {
			if step == 4 && !last {
				last = true
				reached <- true
				<-reached
			}
		})
		w.arm(at)
		taskRef, err := w.c.ReconfigureVM(w.ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt}})
		w.must(err)
		crash := func() { <-w.reached; w.at.Store(-1); w.reopen() }
		select {
		case <-w.reached: // before it is cancelled
			w.at.Store(-1)
			w.reopen()
			<-reached
		case <-reached:
		}
		w.must(w.c.CancelTask(w.ctx, w.p, taskRef))
		time.Sleep(50 * time.Millisecond)
		reached <- true
		if w.at.Load() >= 0 {
			crash()
		}
		r := w.end(taskRef, nil)
		if r.Error == nil || r.Error.Kind != task.Canceled {
			t.Fatalf("crash %d of %v: the task ended with %v", at, w.steps, r.Error)
		}
		w.connected()
		w.mu.Lock()
		if at < 0 {
			total = len(w.steps)
		}
		steps := w.steps
		w.mu.Unlock()
		if wrong := sameCrypto(was, w.vm(ref)); wrong != "" {
			t.Errorf("crash %d of %v: %s", at, steps, wrong)
		}
		w.ok(w.c.DestroyVM(w.ctx, w.p, ref))
		if at == total-1 {
			t.Logf("crashed at %v", steps)
		}
	}
}

// TestPace pauses, holds back and lets go a conversion; the pace outlives center.
func TestPace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", policy.VMEncryption)
	uuid := w.vm(ref).UUID
	half, once := make(chan bool), false
	w.host.OnStep(func(step int) {
		if step == 4 && !once {
			once = true
			half <- true
			<-half
		}
	})
	taskRef, err := w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoDeep}})
	w.must(err)
	<-half
	w.faulted(task.InvalidArgument, "limit", w.c.SetTaskPace(ctx, w.p, taskRef, center.PaceChange{Limit: ptr(int64(-1))}))
	w.must(w.c.SetTaskPace(ctx, w.p, taskRef, center.PaceChange{Limit: ptr(int64(5 << 20)), Paused: ptr(true)}))
	w.eventually("the host is told", func() bool { p := w.host.Pace(uuid); return p.GetPaused() && p.LimitBytesPerSecond == 5<<20 })
	half <- true
	w.reopen()
	w.eventually("the next center tells it too", func() bool { p := w.host.Pace(uuid); return p.GetPaused() && p.LimitBytesPerSecond == 5<<20 })
	r, _ := inventory.Lookup[task.Record](w.c.View(), taskRef)
	if r.Done() || !r.Pace.Paused || !r.Paceable {
		t.Errorf("the record of a paused task: %+v", r)
	}
	w.must(w.c.SetTaskPace(ctx, w.p, taskRef, center.PaceChange{Paused: ptr(false)}))
	w.ok(taskRef, nil)
	if r, _ := inventory.Lookup[task.Record](w.c.View(), taskRef); r.Rate != 1<<20 {
		t.Errorf("its rate was %d", r.Rate)
	}
	// A task that rewrites nothing has no pace.
	w.host.OnCall(func(method string) error {
		if method == "ReconfigureVM" {
			time.Sleep(200 * time.Millisecond)
		}
		return nil
	})
	taskRef, err = w.c.ReconfigureVM(ctx, w.p, ref, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: center.CryptoShallow}})
	w.must(err)
	w.faulted(task.NotSupported, "converts no disk", w.c.SetTaskPace(ctx, w.p, taskRef, center.PaceChange{Paused: ptr(true)}))
	w.ok(taskRef, nil)
	w.host.OnCall(nil)
	w.faulted(task.NotFound, "task-999", w.c.SetTaskPace(ctx, w.p, "task-999", center.PaceChange{}))
}

// TestEstimate says what a change would rewrite, refuses as the change would, and
// changes nothing.
func TestEstimate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	ref := w.createVM("web", "")
	keys := len(w.kms.Keys())
	spec := func(k center.CryptoKind) center.ReconfigureSpec {
		return center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: k}}
	}
	e, err := w.c.EstimateReconfigure(ctx, w.p, ref, spec(center.CryptoEncrypt))
	w.must(err)
	var all int64
	for _, d := range w.vm(ref).Disks {
		all += d.CapacityBytes
	}
	if e.Bytes != all || len(e.Disks) != 2 || e.Idle != time.Duration(all>>20)*time.Second || e.Busy != 5*e.Idle || e.Disks[0].Rate != 1<<20 || e.Disks[0].Kind != inventory.ConvertEncrypt {
		t.Errorf("estimate: %+v", e)
	}
	if len(w.kms.Keys()) != keys || w.vm(ref).Encrypted || w.host.Calls("ReconfigureVM") > 0 {
		t.Error("an estimate changed something")
	}
	w.faulted(task.InvalidVMConfig, "not encrypted", second3(w.c.EstimateReconfigure(ctx, w.p, ref, spec(center.CryptoDeep))))
	w.ok(w.c.ReconfigureVM(ctx, w.p, ref, spec(center.CryptoEncrypt)))
	w.host.Restart() // its keys are gone: the estimate brings them
	w.eventually("the host is back", func() bool {
		e, err = w.c.EstimateReconfigure(ctx, w.p, ref, spec(center.CryptoDeep))
		return err == nil
	})
	if e.Bytes != all {
		t.Errorf("estimate of a recrypt: %+v, %v", e, err)
	}
	if e, err = w.c.EstimateReconfigure(ctx, w.p, ref, spec(center.CryptoShallow)); err != nil || e.Bytes != 0 || len(e.Disks) != 0 {
		t.Errorf("estimate of a shallow recrypt: %+v, %v", e, err)
	}
	w.host.Stop()
	w.eventually("the host is away", func() bool { return w.hostNamed("esx1").Connection != inventory.Connected })
	w.faulted(task.HostDown, "esx1", second3(w.c.EstimateReconfigure(ctx, w.p, ref, spec(center.CryptoDeep))))
	w.host.Start()
	_, err = w.c.EstimateReconfigure(ctx, w.p, "vm-999", spec(center.CryptoDeep))
	w.faulted(task.NotFound, "vm-999", err)
}

func second3(_ *center.Estimate, err error) error { return err }
