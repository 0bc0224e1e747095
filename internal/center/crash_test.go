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

// TestCrashes stops center before and after every durable step of every task,
// opens its state again, and expects each task to come to the end that it would
// have come to: with the same keys, and nothing made twice.
func TestCrashes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx := context.Background()
	var mu sync.Mutex
	var steps []string // of the present task
	var crashAt atomic.Int32
	crashAt.Store(-1)
	crashed := make(chan struct{}, 1)
	w.failpoint = func(ctx context.Context, run *task.Run, step string) {
		mu.Lock()
		steps = append(steps, step)
		n := len(steps) - 1
		mu.Unlock()
		if int32(n) == crashAt.Load() {
			crashed <- struct{}{}
			<-ctx.Done() // the process is gone from here on
		}
	}
	w.reopen()
	begin := func(at int32) {
		w.eventually("the host is connected", func() bool { return w.hostNamed("esx1").Connection == inventory.Connected })
		mu.Lock()
		defer mu.Unlock()
		steps = nil
		crashAt.Store(at)
	}
	begin(-1)
	first := w.createVM("first", policy.VMEncryption) // so that the host is safe
	w.must(w.c.UnregisterVM(ctx, w.p, first))

	crypto := func(k center.CryptoKind) func(inventory.Ref) (inventory.Ref, error) {
		return func(vm inventory.Ref) (inventory.Ref, error) {
			return w.c.ReconfigureVM(ctx, w.p, vm, center.ReconfigureSpec{Crypto: center.CryptoSpec{Kind: k}})
		}
	}
	uniform := func(vm *inventory.VM, encrypted bool) string {
		if vm.Converting != nil || vm.Encrypted != encrypted {
			return fmt.Sprintf("files encrypted %v, converting %v", vm.Encrypted, vm.Converting)
		}
		for _, d := range vm.Disks {
			if d.Converting != nil || d.Encrypted != encrypted || encrypted && *d.KeyID != *vm.KeyID {
				return fmt.Sprintf("disk %+v", d)
			}
		}
		return ""
	}
	encrypted := func(vm *inventory.VM) string {
		if !holds(w.host, vm.KeyID, vm) {
			return "the host does not hold the key"
		}
		return uniform(vm, true)
	}
	for _, c := range []struct {
		name    string
		profile policy.ID // of the VM before; "none" to have none
		on      bool
		do      func(vm inventory.Ref) (inventory.Ref, error)
		keys    int // how many are made
		check   func(vm *inventory.VM) string
	}{
		{"create", "none", false, func(inventory.Ref) (inventory.Ref, error) {
			return w.c.CreateVM(ctx, w.p, vmSpec("new", policy.VMEncryption))
		}, 1, encrypted},
		{"encrypt", "", false, crypto(center.CryptoEncrypt), 1, encrypted},
		{"deep", policy.VMEncryption, false, crypto(center.CryptoDeep), 1, encrypted},
		{"shallow", policy.VMEncryption, true, crypto(center.CryptoShallow), 1, encrypted},
		{"decrypt", policy.VMEncryption, false, crypto(center.CryptoDecrypt), 0, func(vm *inventory.VM) string { return uniform(vm, false) }},
		{"disks", policy.VMEncryption, false, func(vm inventory.Ref) (inventory.Ref, error) {
			return w.c.ReconfigureVM(ctx, w.p, vm, center.ReconfigureSpec{Name: "new2", Disks: []center.DiskChange{{Op: center.DiskRemove, Key: 2000, Destroy: true}, {Op: center.DiskAdd, CapacityBytes: 1 << 20}}})
		}, 0, func(vm *inventory.VM) string {
			if len(vm.Disks) != 2 || vm.Name != "new2" || slices.ContainsFunc(vm.Disks, func(d inventory.Disk) bool { return d.CapacityBytes == 8<<20 }) {
				return fmt.Sprintf("name %s, disks %+v", vm.Name, vm.Disks)
			}
			return encrypted(vm)
		}},
		{"power on", policy.VMEncryption, false, func(vm inventory.Ref) (inventory.Ref, error) { return w.c.PowerOn(ctx, w.p, vm) }, 0, func(vm *inventory.VM) string {
			if vm.Power != inventory.PoweredOn || !w.host.Running(vm.UUID) {
				return "it does not run"
			}
			return ""
		}},
		{"power off", "", true, func(vm inventory.Ref) (inventory.Ref, error) { return w.c.PowerOff(ctx, w.p, vm) }, 0, func(vm *inventory.VM) string {
			if vm.Power != inventory.PoweredOff || w.host.Running(vm.UUID) {
				return "it runs"
			}
			return ""
		}},
		{"register", "unregistered", false, func(inventory.Ref) (inventory.Ref, error) {
			return w.c.RegisterVM(ctx, w.p, center.RegisterVMSpec{Path: "[ds1] new/new.vmx"})
		}, 0, encrypted},
		{"destroy", policy.VMEncryption, false, func(vm inventory.Ref) (inventory.Ref, error) { return w.c.DestroyVM(ctx, w.p, vm) }, 0, func(vm *inventory.VM) string {
			if vm != nil || w.ds.VMs() != 1 || len(w.host.Held()) != 1 {
				return fmt.Sprintf("%d VMs, keys %v are left", w.ds.VMs()-1, w.host.Held())
			}
			return ""
		}},
	} {
		// The first run counts the steps, the others crash at each.
		for at, total := -1, 0; at < total; at++ {
			begin(-1)
			var vm inventory.Ref
			switch c.profile {
			case "none":
			case "unregistered":
				vm = w.createVM("new", policy.VMEncryption)
				w.must(w.c.UnregisterVM(ctx, w.p, vm))
			default:
				vm = w.createVM("new", c.profile)
			}
			if c.on {
				w.ok(w.c.PowerOn(ctx, w.p, vm))
			}
			keys := len(w.kms.Keys())
			begin(int32(at))
			ref, err := c.do(vm)
			w.must(err)
			if at >= 0 {
				<-crashed
				crashAt.Store(-1)
				w.reopen()
			}
			r := w.ok(ref, nil)
			w.eventually("the host is connected", func() bool { return w.hostNamed("esx1").Connection == inventory.Connected })
			mu.Lock()
			where := "no crash"
			if at < 0 {
				total = len(steps)
			} else {
				where = "crash " + fmt.Sprint(at)
			}
			mu.Unlock()
			if vm == "" || c.profile == "unregistered" {
				vm = r.Result
			}
			record, _ := inventory.Lookup[inventory.VM](w.c.View(), vm)
			if wrong := c.check(record); wrong != "" {
				t.Errorf("%s, %s: %s", c.name, where, wrong)
			}
			if made := len(w.kms.Keys()) - keys; made != c.keys {
				t.Errorf("%s, %s: %d keys were made, want %d", c.name, where, made, c.keys)
			}
			if record != nil {
				if record.Power == inventory.PoweredOn {
					w.ok(w.c.PowerOff(ctx, w.p, vm))
				}
				w.ok(w.c.DestroyVM(ctx, w.p, vm))
				if _, still := w.c.View().Get(vm); still {
					t.Fatalf("%s, %s: the VM cannot be deleted", c.name, where)
				}
			}
		}
	}
	// Whatever was interrupted, nothing that anybody needs was called unused.
	if _, text := w.events(); strings.Contains(text, "the task failed") {
		t.Errorf("a resumed task left orphans:\n%s", text)
	}
}
