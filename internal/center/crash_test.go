package center_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"mortise/internal/center"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// crashes is a world whose center can be stopped at any durable step of a task.
type crashes struct {
	*world
	ctx context.Context

	mu      sync.Mutex
	steps   []string     // that the present task has reached
	at      atomic.Int32 // the step to crash at; -1 for none
	reached chan struct{}
}

func newCrashes(t *testing.T) *crashes {
	w := &crashes{world: newWorld(t), ctx: context.Background(), reached: make(chan struct{}, 1)}
	w.at.Store(-1)
	w.failpoint = func(ctx context.Context, run *task.Run, step string) {
		w.mu.Lock()
		w.steps = append(w.steps, step)
		n := len(w.steps) - 1
		w.mu.Unlock()
		if int32(n) == w.at.Load() {
			w.reached <- struct{}{}
			<-ctx.Done() // the process is gone from here on
		}
	}
	w.reopen()
	w.connected()
	first := w.createVM("first", policy.VMEncryption) // so that the host is safe
	w.must(w.c.UnregisterVM(w.ctx, w.p, first))
	return w
}

func (w *crashes) connected() {
	w.t.Helper()
	w.eventually("the host is connected", func() bool { return w.hostNamed("esx1").Connection == inventory.Connected })
}

// arm crashes the next task at its step number at.
func (w *crashes) arm(at int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.steps = nil
	w.at.Store(int32(at))
}

func (w *crashes) uniform(vm *inventory.VM, encrypted bool) string {
	if vm.Converting != nil || vm.Encrypted != encrypted {
		return fmt.Sprintf("files encrypted %v, converting %v", vm.Encrypted, vm.Converting)
	}
	for _, d := range vm.Disks {
		if d.Converting != nil || d.Encrypted != encrypted || encrypted && *d.KeyID != *vm.KeyID {
			return fmt.Sprintf("disk %+v", d)
		}
	}
	if encrypted && !holds(w.host, vm.KeyID, vm) {
		return "the host does not hold the key"
	}
	return ""
}

// A crashCase is a task, on a VM of its own each time.
type crashCase struct {
	name    string
	profile policy.ID                          // of the VM before
	before  func(w *crashes, vm inventory.Ref) // nil: nothing
	noVM    bool                               // there is none before
	do      func(w *crashes, vm inventory.Ref) (inventory.Ref, error)
	keys    int // how many are made
	check   func(w *crashes, vm *inventory.VM) string
}

// TestCrashes stops center before and after every durable step of every task,
// opens its state again, and expects each task to come to the end that it would
// have come to: with the same keys, and nothing made twice.
func TestCrashes(t *testing.T) {
	if testing.Short() {
		t.Skip("see build/test.sh")
	}
	crypto := func(k center.CryptoKind) func(*crashes, inventory.Ref) (inventory.Ref, error) {
		return func(w *crashes, vm inventory.Ref) (inventory.Ref, error) {
			return w.c.ReconfigureVM(w.ctx, w.p, vm, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: k}})
		}
	}
	encrypted := func(w *crashes, vm *inventory.VM) string { return w.uniform(vm, true) }
	powerOn := func(w *crashes, vm inventory.Ref) { w.ok(w.c.PowerOn(w.ctx, w.p, vm)) }
	var group sync.WaitGroup
	slots := make(chan struct{}, 4)
	for _, c := range []crashCase{
		{name: "create", noVM: true, keys: 1, check: encrypted, do: func(w *crashes, _ inventory.Ref) (inventory.Ref, error) {
			return w.c.CreateVM(w.ctx, w.p, vmSpec("new", policy.VMEncryption))
		}},
		{name: "encrypt", keys: 1, do: crypto(center.CryptoEncrypt), check: encrypted},
		{name: "deep", profile: policy.VMEncryption, keys: 1, do: crypto(center.CryptoDeep), check: encrypted},
		{name: "shallow", profile: policy.VMEncryption, before: powerOn, keys: 1, do: crypto(center.CryptoShallow), check: encrypted},
		{name: "decrypt", profile: policy.VMEncryption, do: crypto(center.CryptoDecrypt), check: func(w *crashes, vm *inventory.VM) string { return w.uniform(vm, false) }},
		{name: "disks", profile: policy.VMEncryption, do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) {
			return w.c.ReconfigureVM(w.ctx, w.p, vm, center.ReconfigureSpec{Name: "new2",
				Disks: []center.DiskChange{{Op: center.DiskRemove, Key: 2000, Destroy: true}, {Op: center.DiskAdd, CapacityBytes: 1 << 20}}})
		}, check: func(w *crashes, vm *inventory.VM) string {
			if len(vm.Disks) != 2 || vm.Name != "new2" || slices.ContainsFunc(vm.Disks, func(d inventory.Disk) bool { return d.CapacityBytes == 8<<20 }) {
				return fmt.Sprintf("name %s, disks %+v", vm.Name, vm.Disks)
			}
			return w.uniform(vm, true)
		}},
		{name: "power on", profile: policy.VMEncryption, do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) { return w.c.PowerOn(w.ctx, w.p, vm) },
			check: func(w *crashes, vm *inventory.VM) string {
				if vm.Power != inventory.PoweredOn || !w.host.Running(vm.UUID) {
					return "it does not run"
				}
				return ""
			}},
		{name: "power off", before: powerOn, do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) { return w.c.PowerOff(w.ctx, w.p, vm) },
			check: func(w *crashes, vm *inventory.VM) string {
				if vm.Power != inventory.PoweredOff || w.host.Running(vm.UUID) {
					return "it runs"
				}
				return ""
			}},
		{name: "register", profile: policy.VMEncryption, check: encrypted,
			before: func(w *crashes, vm inventory.Ref) { w.must(w.c.UnregisterVM(w.ctx, w.p, vm)) },
			do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) {
				return w.c.RegisterVM(w.ctx, w.p, center.RegisterVMSpec{Path: "[ds1] new/new.vmx"})
			}},
		{name: "destroy", profile: policy.VMEncryption, do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) { return w.c.DestroyVM(w.ctx, w.p, vm) },
			check: func(w *crashes, vm *inventory.VM) string {
				if vm != nil || w.ds.VMs() != 1 {
					return fmt.Sprintf("%d VMs are left", w.ds.VMs()-1)
				}
				// A push that was under way is taken back.
				w.eventually("only the host key is left", func() bool { return len(w.host.Held()) == 1 })
				return ""
			}},
		{name: "create that fails", noVM: true, keys: 1, do: func(w *crashes, _ inventory.Ref) (inventory.Ref, error) {
			w.ds.SetFull(true)
			return w.c.CreateVM(w.ctx, w.p, vmSpec("new", policy.VMEncryption))
		}, check: func(w *crashes, vm *inventory.VM) string {
			w.ds.SetFull(false)
			if vm != nil || w.ds.VMs() != 1 {
				return "something is left"
			}
			w.ok(w.c.DestroyVM(w.ctx, w.p, w.createVM("new", ""))) // name and folder are free
			return ""
		}},
		{name: "encrypt that fails", keys: 1, do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) {
			w.ds.SetFull(true)
			return w.c.ReconfigureVM(w.ctx, w.p, vm, center.ReconfigureSpec{Name: "new2", Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt}})
		}, check: func(w *crashes, vm *inventory.VM) string {
			w.ds.SetFull(false)
			w.eventually("what is known is what was done", func() bool { // the host may have to come back first
				vm := w.vm(vm.Ref)
				return vm.Name == "new" && vm.Encrypted && vm.Converting == nil && vm.Disks[0].Converting != nil && vm.Disks[1].Converting == nil
			})
			w.ok(w.c.ReconfigureVM(w.ctx, w.p, vm.Ref, center.ReconfigureSpec{Name: "new2", Crypto: center.CryptoSpec{Kind: center.CryptoEncrypt}}))
			return w.uniform(w.vm(vm.Ref), true)
		}},
		{name: "snapshot", profile: policy.VMEncryption, before: powerOn, do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) {
			return w.c.CreateSnapshot(w.ctx, w.p, vm, center.SnapshotSpec{Name: "a"})
		}, check: func(w *crashes, vm *inventory.VM) string { return treeIs(vm, "1<0 a on; current 1") }},
		{name: "revert", before: func(w *crashes, vm inventory.Ref) { twoSnapshots(w.world, vm); powerOn(w, vm) },
			do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) {
				return w.c.RevertToSnapshot(w.ctx, w.p, vm, 1)
			},
			check: func(w *crashes, vm *inventory.VM) string {
				if vm.Power != inventory.PoweredOff || w.host.Running(vm.UUID) {
					return "it runs"
				}
				return treeIs(vm, "1<0 a off, 2<1 b off; current 1")
			}},
		{name: "remove snapshot", before: func(w *crashes, vm inventory.Ref) { twoSnapshots(w.world, vm) },
			do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) {
				return w.c.RemoveSnapshot(w.ctx, w.p, vm, 1, false)
			},
			check: func(w *crashes, vm *inventory.VM) string { return treeIs(vm, "2<0 b off; current 2") }},
		{name: "remove snapshot that fails", before: func(w *crashes, vm inventory.Ref) { twoSnapshots(w.world, vm) },
			do: func(w *crashes, vm inventory.Ref) (inventory.Ref, error) {
				w.ds.SetFull(true)
				return w.c.RemoveSnapshot(w.ctx, w.p, vm, 1, true)
			}, check: func(w *crashes, vm *inventory.VM) string {
				w.ds.SetFull(false)
				if wrong := treeIs(vm, "; current 0; consolidate"); wrong != "" {
					return wrong
				}
				w.ok(w.c.ConsolidateDisks(w.ctx, w.p, vm.Ref))
				return treeIs(w.vm(vm.Ref), "; current 0")
			}},
	} {
		group.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			t.Run(c.name, func(t *testing.T) { crashEverywhere(t, c) })
		})
	}
	group.Wait()
}

// crashEverywhere runs a task once to count its steps, then crashes it at each.
func crashEverywhere(t *testing.T, c crashCase) {
	w := newCrashes(t)
	for at, total := -1, 0; at < total; at++ {
		w.arm(-1)
		var vm inventory.Ref
		if !c.noVM {
			vm = w.createVM("new", c.profile)
		}
		if c.before != nil {
			c.before(w, vm)
		}
		keys := len(w.kms.Keys())
		w.arm(at)
		ref, err := c.do(w, vm)
		w.must(err)
		if at >= 0 {
			<-w.reached
			w.at.Store(-1)
			w.reopen()
		}
		r := w.end(ref, nil)
		if fails := strings.HasSuffix(c.name, "fails"); fails != (r.Error != nil) {
			t.Fatalf("crash %d: the task ended with %v", at, r.Error)
		}
		w.connected()
		w.mu.Lock()
		if at < 0 {
			total = len(w.steps)
		}
		steps := w.steps
		w.mu.Unlock()
		if r.Result.Kind() == inventory.KindVM {
			vm = r.Result
		}
		record, _ := inventory.Lookup[inventory.VM](w.c.View(), vm)
		if wrong := c.check(w, record); wrong != "" {
			t.Errorf("crash %d of %v: %s", at, steps, wrong)
		}
		if made := len(w.kms.Keys()) - keys; made != c.keys {
			t.Errorf("crash %d of %v: %d keys were made, want %d", at, steps, made, c.keys)
		}
		if record == nil {
			continue
		}
		if w.vm(vm).Power == inventory.PoweredOn {
			w.ok(w.c.PowerOff(w.ctx, w.p, vm))
		}
		w.ok(w.c.DestroyVM(w.ctx, w.p, vm))
		if _, still := w.c.View().Get(vm); still {
			t.Fatalf("crash %d of %v: the VM cannot be deleted", at, steps)
		}
	}
	// Whatever was interrupted, nothing that anybody needs was called unused.
	if _, text := w.events(); strings.Contains(text, "the task failed") != strings.HasPrefix(c.name, "create that") {
		t.Errorf("events about orphaned keys:\n%s", text)
	}
}
