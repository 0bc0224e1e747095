package inventory

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// KindSnapshot is the managed object type of a VM's snapshot. A snapshot has no
// record of its own: it is in its VM's.
const KindSnapshot Kind = "VirtualMachineSnapshot"

// Snapshot is the disks of a VM as they were at an instant.
type Snapshot struct {
	ID          int32     `json:"id"`               // in its VM, counted from 1, never used again
	Parent      int32     `json:"parent,omitempty"` // 0: none
	Name        string    `json:"name"`             // not unique
	Description string    `json:"description,omitempty"`
	Created     time.Time `json:"created"`
	PoweredOn   bool      `json:"poweredOn,omitempty"` // the guest ran: its disks are as after a power cut
}

// Snapshot finds a snapshot by its id; nil when there is none.
func (vm *VM) Snapshot(id int32) *Snapshot {
	for i := range vm.Snapshots {
		if vm.Snapshots[i].ID == id {
			return &vm.Snapshots[i]
		}
	}
	return nil
}

// SnapshotsOn lists the snapshots whose parent is id, oldest first; the roots
// when id is 0. One whose parent is not there is a root.
func (vm *VM) SnapshotsOn(id int32) []Snapshot {
	var list []Snapshot
	for _, s := range vm.Snapshots {
		if s.Parent == id || id == 0 && vm.Snapshot(s.Parent) == nil {
			list = append(list, s)
		}
	}
	return list
}

// snapshotPrefix begins the Refs of snapshots.
const snapshotPrefix = "snapshot-"

// SnapshotRef is the managed object id of a VM's snapshot: number 2 of vm-13 is
// snapshot-13-2.
func SnapshotRef(vm Ref, id int32) Ref {
	_, n := vm.split()
	return Ref(fmt.Sprintf("%s%d-%d", snapshotPrefix, n, id))
}

// Snapshot tells which snapshot of which VM r is; ok is false when it is none.
// Its Kind is empty, because the view has no record of it.
func (r Ref) Snapshot() (vm Ref, id int32, ok bool) {
	rest, ok := strings.CutPrefix(string(r), snapshotPrefix)
	if !ok {
		return "", 0, false
	}
	first, second, ok := strings.Cut(rest, "-")
	if !ok {
		return "", 0, false
	}
	v, err := strconv.ParseInt(first, 10, 64)
	if err != nil || v <= 0 {
		return "", 0, false
	}
	n, err := strconv.ParseInt(second, 10, 32)
	if err != nil || n <= 0 {
		return "", 0, false
	}
	vm, id = NewRef("vm", v), int32(n)
	return vm, id, SnapshotRef(vm, id) == r // "snapshot-013-2" is none
}
