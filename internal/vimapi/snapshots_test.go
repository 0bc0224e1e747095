package vimapi_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/vimapi/vimapitest"
)

// tree words a snapshot tree: "a(b(c) d)", the current one with a star.
func tree(info *types.VirtualMachineSnapshotInfo) string {
	if info == nil {
		return ""
	}
	var words func(list []types.VirtualMachineSnapshotTree) string
	words = func(list []types.VirtualMachineSnapshotTree) string {
		var all []string
		for _, s := range list {
			text := s.Name
			if info.CurrentSnapshot != nil && s.Snapshot == *info.CurrentSnapshot {
				text += "*"
			}
			if s.State == types.VirtualMachinePowerStatePoweredOn {
				text += "+"
			}
			if len(s.ChildSnapshotList) > 0 {
				text += "(" + words(s.ChildSnapshotList) + ")"
			}
			all = append(all, text)
		}
		return strings.Join(all, " ")
	}
	return words(info.RootSnapshotList)
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	w := vimapitest.Start(t)
	ref := vmRef(w.CreateVM("web1"))
	ctx := t.Context()
	client := w.Client()
	vm := object.NewVirtualMachine(client.Client, ref)
	ok := func(task *object.Task, err error) *types.TaskInfo {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		info, err := task.WaitForResult(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	shows := func(want string) mo.VirtualMachine {
		t.Helper()
		var v mo.VirtualMachine
		if err := vm.Properties(ctx, ref, []string{"snapshot", "rootSnapshot", "runtime", "capability"}, &v); err != nil {
			t.Fatal(err)
		}
		if got := tree(v.Snapshot); got != want {
			t.Errorf("the tree is %q, want %q", got, want)
		}
		return v
	}
	if v := shows(""); v.Snapshot != nil || v.RootSnapshot != nil || v.Runtime.ConsolidationNeeded || !v.Capability.SnapshotOperationsSupported || v.Capability.MemorySnapshotsSupported {
		t.Errorf("before any snapshot: %+v", v)
	}

	// Somebody watches the VM, and its snapshots by a traversal.
	ended := make(chan error, 1)
	seen := make(chan string, 100)
	watching, stop := context.WithCancel(ctx)
	defer stop()
	watcher := w.Client()
	go func() {
		filter := new(property.WaitFilter)
		filter.Spec.PropSet = []types.PropertySpec{{Type: "VirtualMachine", PathSet: []string{"snapshot", "runtime.consolidationNeeded"}},
			{Type: "VirtualMachineSnapshot", PathSet: []string{"childSnapshot"}}}
		filter.Spec.ObjectSet = []types.ObjectSpec{{Obj: ref, SelectSet: []types.BaseSelectionSpec{&types.TraversalSpec{
			SelectionSpec: types.SelectionSpec{Name: "roots"}, Type: "VirtualMachine", Path: "rootSnapshot", SelectSet: []types.BaseSelectionSpec{&types.TraversalSpec{
				SelectionSpec: types.SelectionSpec{Name: "children"}, Type: "VirtualMachineSnapshot", Path: "childSnapshot",
				SelectSet: []types.BaseSelectionSpec{&types.SelectionSpec{Name: "children"}}}}}}}}
		ended <- property.WaitForUpdatesEx(watching, property.DefaultCollector(watcher.Client), filter, func(updates []types.ObjectUpdate) bool {
			for _, u := range updates {
				text := fmt.Sprintf("%s %s", u.Kind, u.Obj.Value)
				for _, c := range u.ChangeSet {
					if info, ok := c.Val.(types.VirtualMachineSnapshotInfo); ok {
						text += " " + tree(&info)
					}
				}
				seen <- text
			}
			return false
		})
	}()
	had := map[string]bool{}
	sees := func(want string) {
		t.Helper()
		for !had[want] {
			select {
			case got := <-seen:
				had[got] = true
			case <-time.After(10 * time.Second):
				t.Fatalf("the watcher does not see %q", want)
			}
		}
	}
	sees("enter " + ref.Value)

	first, fine := ok(vm.CreateSnapshot(ctx, "a", "before", true, true)).Result.(types.ManagedObjectReference)
	if want := "snapshot-" + strings.TrimPrefix(ref.Value, "vm-") + "-1"; !fine || first.Type != "VirtualMachineSnapshot" || first.Value != want {
		t.Errorf("the new snapshot is %v", first)
	}
	sees("modify " + ref.Value + " a*")
	ok(vm.PowerOn(ctx))
	for what, f := range map[string]func() (*object.Task, error){
		"memory=false":  func() (*object.Task, error) { return vm.CreateSnapshot(ctx, "b", "", true, false) },
		"quiesce=false": func() (*object.Task, error) { return vm.CreateSnapshot(ctx, "b", "", false, true) },
		"no agent": func() (*object.Task, error) {
			return vm.CreateSnapshotEx(ctx, "b", "", false, &types.VirtualMachineGuestQuiesceSpec{Timeout: 1})
		},
		"-m=false": func() (*object.Task, error) { return vm.CreateSnapshotEx(ctx, "b", "", true, nil) },
	} {
		_, err := f()
		if !soap.IsSoapFault(err) || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		} else if _, is := soap.ToSoapFault(err).VimFault().(types.NotSupported); !is {
			t.Errorf("%s: a fault %T", what, soap.ToSoapFault(err).VimFault())
		}
	}
	ok(vm.CreateSnapshotEx(ctx, "b", "", false, nil))
	sees("modify " + first.Value) // it has a child
	sees("enter snapshot-" + strings.TrimPrefix(ref.Value, "vm-") + "-2")
	v := shows("a(b*+)")
	if s := v.Snapshot.RootSnapshotList[0]; s.Description != "before" || s.Id != 1 || s.Vm != ref || s.Quiesced || time.Since(s.CreateTime).Abs() > time.Minute || len(v.RootSnapshot) != 1 {
		t.Errorf("the tree's root is %+v, rootSnapshot %v", s, v.RootSnapshot)
	}
	ok(vm.RevertToSnapshot(ctx, "a", false))
	ok(vm.CreateSnapshot(ctx, "c", "", true, false)) // it is off
	if v := shows("a(b+ c*)"); v.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff {
		t.Errorf("after the revert it is %s", v.Runtime.PowerState)
	}
	ok(vm.RevertToCurrentSnapshot(ctx, true))
	if _, err := methods.RenameSnapshot(ctx, client.Client, &types.RenameSnapshot{This: first, Name: "first"}); err != nil {
		t.Error(err)
	}
	shows("first(b+ c*)")
	var s mo.VirtualMachineSnapshot
	if err := client.RetrieveOne(ctx, first, []string{"vm", "childSnapshot"}, &s); err != nil || s.Vm != ref || len(s.ChildSnapshot) != 2 {
		t.Errorf("the snapshot's properties: %+v, %v", s, err)
	}

	// Cancelled in the middle, it says what is to be done.
	at := make(chan bool)
	w.Host.OnStep(func(step int) {
		if step == 2 {
			at <- true
			<-at
		}
	})
	removing, err := vm.RemoveSnapshot(ctx, "first/b", false, nil)
	if err != nil {
		t.Fatal(err)
	}
	<-at
	if err := removing.Cancel(ctx); err != nil {
		t.Error(err)
	}
	time.Sleep(50 * time.Millisecond)
	at <- true
	w.Host.OnStep(nil)
	if err := removing.Wait(ctx); err == nil || !strings.Contains(err.Error(), "consolidate") {
		t.Errorf("the cancelled task: %v", err)
	}
	sees("leave snapshot-" + strings.TrimPrefix(ref.Value, "vm-") + "-2")
	if v := shows("first(c*)"); !v.Runtime.ConsolidationNeeded {
		t.Error("nothing is to be consolidated")
	}
	res, err := methods.ConsolidateVMDisks_Task(ctx, client.Client, &types.ConsolidateVMDisks_Task{This: ref})
	if err != nil {
		t.Fatal(err)
	}
	ok(object.NewTask(client.Client, res.Returnval), nil)
	if v := shows("first(c*)"); v.Runtime.ConsolidationNeeded {
		t.Error("still something is to be consolidated")
	}
	no := false
	if _, err := vm.RemoveAllSnapshot(ctx, &no); err == nil || !strings.Contains(err.Error(), "consolidat") {
		t.Errorf("removing without consolidating: %v", err)
	}

	// Who may only read does not change; who asks for what is not there is told.
	w.User("auditor@mortise.local", authz.RoleReadOnly)
	auditor := w.ClientAs("auditor@mortise.local", vimapitest.UserPassword)
	for _, err := range []error{
		second(methods.RevertToSnapshot_Task(ctx, auditor.Client, &types.RevertToSnapshot_Task{This: first})),
		second(methods.RemoveSnapshot_Task(ctx, auditor.Client, &types.RemoveSnapshot_Task{This: first})),
		second(methods.RenameSnapshot(ctx, auditor.Client, &types.RenameSnapshot{This: first, Name: "x"})),
		second(object.NewVirtualMachine(auditor.Client, ref).CreateSnapshot(ctx, "x", "", false, false)),
	} {
		if !soap.IsSoapFault(err) || !strings.Contains(err.Error(), "VirtualMachine.State.") {
			t.Errorf("an auditor: %v", err)
		}
	}
	for _, bad := range []string{"snapshot-1-1", "snapshot-x", "", ref.Value, first.Value + "0"} {
		this := types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: bad}
		if _, err := methods.RevertToSnapshot_Task(ctx, client.Client, &types.RevertToSnapshot_Task{This: this}); !soap.IsSoapFault(err) || !strings.Contains(err.Error(), "VirtualMachineSnapshot") {
			t.Errorf("reverting to %q: %v", bad, err)
		}
	}
	ok(vm.RemoveSnapshot(ctx, first.Value, true, nil))
	shows("")
	sees("leave " + first.Value)
	stop()
	<-ended
}

func second[T any](_ T, err error) error { return err }
