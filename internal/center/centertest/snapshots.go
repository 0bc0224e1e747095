package centertest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"mortise/internal/hostapi"
)

// snapshots are a VM's tree, and what is left of snapshots that are gone.
type snapshots struct {
	tree    []*snapshot // parents first
	current int32
	last    int32 // id that was given last
	merge   int   // steps of links that no snapshot needs
}

type snapshot struct {
	*hostapi.Snapshot
	madeBy  string            // operation
	content map[string][]byte // of each disk, by UUID
}

func (s *snapshots) find(id int32) *snapshot {
	if i := slices.IndexFunc(s.tree, func(o *snapshot) bool { return o.Id == id }); i >= 0 {
		return s.tree[i]
	}
	return nil
}

func (s *snapshots) info(i *hostapi.VMInfo) {
	for _, o := range s.tree {
		i.Snapshots = append(i.Snapshots, o.Snapshot)
	}
	i.CurrentSnapshot, i.ConsolidationNeeded = s.current, s.merge > 0
}

// fixed refuses what would change which disks the VM has.
func (s *snapshots) fixed(r *hostapi.ReconfigureVMRequest) error {
	if len(s.tree) > 0 && len(r.AddDisks)+len(r.AttachDisks)+len(r.RemoveDiskUuids) > 0 {
		return hostapi.Faultf(hostapi.Fault_INVALID, "the VM has %d snapshots; remove them first", len(s.tree))
	}
	return nil
}

// top is the descriptor of the disk's newest link.
func (d *disk) top() string {
	if d.link == 0 {
		return d.path
	}
	return fmt.Sprintf("%s-%06d.vmdk", strings.TrimSuffix(d.path, ".vmdk"), d.link)
}

func (s *service) ChangeSnapshots(r *hostapi.SnapshotRequest, stream grpc.ServerStreamingServer[hostapi.Progress]) error {
	h := s.h
	d, end, err := h.begin("ChangeSnapshots", r.Header, r.Ref)
	if err != nil {
		return err
	}
	defer end()
	d.mu.Lock()
	f, err := h.open(d, r.Ref)
	if err == nil {
		err = h.unlock(f)
	}
	if err == nil {
		err = h.changeTree(f, r)
	}
	d.mu.Unlock()
	if err == nil {
		switch r.Act {
		case hostapi.SnapshotRequest_REMOVE, hostapi.SnapshotRequest_REMOVE_ALL, hostapi.SnapshotRequest_CONSOLIDATE:
			err = h.merge(stream.Context(), d, f, func(p *hostapi.Progress) { stream.Send(p) })
		}
	}
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return stream.Send(&hostapi.Progress{Stage: "done", Result: h.info(d, f)})
}

// changeTree is what happens at once. The datastore's lock is held.
func (h *Host) changeTree(f *folder, r *hostapi.SnapshotRequest) error {
	s, operation := &f.snapshots, r.Header.GetOperationId()
	at := s.find(r.Id)
	if at == nil && (r.Act == hostapi.SnapshotRequest_REVERT || r.Act == hostapi.SnapshotRequest_RENAME) {
		return hostapi.Faultf(hostapi.Fault_NOT_FOUND, "no snapshot %d", r.Id)
	}
	switch r.Act {
	case hostapi.SnapshotRequest_CREATE:
		if slices.ContainsFunc(s.tree, func(o *snapshot) bool { return o.madeBy == operation }) {
			return nil
		}
		s.last++
		made := &snapshot{Snapshot: &hostapi.Snapshot{Id: s.last, Parent: s.current, Name: r.Name, Description: r.Description,
			CreatedUnix: time.Now().Unix(), PoweredOn: h.isOn(f.uuid) == nil}, madeBy: operation, content: map[string][]byte{}}
		for _, disk := range f.disks {
			made.content[disk.uuid] = bytes.Clone(disk.content)
			disk.link++
		}
		s.tree, s.current = append(s.tree, made), made.Id
	case hostapi.SnapshotRequest_REVERT:
		if h.isOn(f.uuid) == nil {
			return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is powered on", f.uuid)
		}
		for _, disk := range f.disks {
			disk.content = bytes.Clone(at.content[disk.uuid])
			disk.link++
		}
		s.current = at.Id
	case hostapi.SnapshotRequest_REMOVE:
		var gone []int32
		if at != nil { // else an earlier call removed it
			gone = append(gone, at.Id)
		}
		for _, o := range s.tree {
			if r.Children && slices.Contains(gone, o.Parent) {
				gone = append(gone, o.Id)
			}
		}
		s.remove(gone)
	case hostapi.SnapshotRequest_REMOVE_ALL:
		var gone []int32
		for _, o := range s.tree {
			gone = append(gone, o.Id)
		}
		s.remove(gone)
	case hostapi.SnapshotRequest_RENAME:
		at.Snapshot = proto.CloneOf(at.Snapshot) // answers under way hold the old one
		at.Name, at.Description = r.Name, r.Description
	case hostapi.SnapshotRequest_CONSOLIDATE:
	default:
		return hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "snapshot act %s", r.Act)
	}
	return nil
}

// remove takes snapshots out of the tree; what stood on them stands on what they
// stood on. Their links are still to be merged.
func (s *snapshots) remove(gone []int32) {
	standing := func(id int32) int32 {
		for slices.Contains(gone, id) {
			id = s.find(id).Parent
		}
		return id
	}
	s.current = standing(s.current)
	var left []*snapshot
	for _, o := range s.tree {
		if !slices.Contains(gone, o.Id) {
			kept := proto.CloneOf(o.Snapshot)
			kept.Parent = standing(o.Parent)
			left = append(left, &snapshot{kept, o.madeBy, o.content})
		}
	}
	s.tree = left
	s.merge += steps * len(gone)
}

// merge merges what no snapshot needs, step by step. Cancelling stops between two.
func (h *Host) merge(ctx context.Context, d *Datastore, f *folder, tell func(*hostapi.Progress)) error {
	d.mu.Lock()
	total := f.snapshots.merge
	d.mu.Unlock()
	for at := range total {
		h.mu.Lock()
		hook := h.onStep
		h.mu.Unlock()
		if hook != nil {
			hook(at)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d.mu.Lock()
		full := d.Full
		if !full {
			f.snapshots.merge--
		}
		d.mu.Unlock()
		if full {
			return hostapi.Faultf(hostapi.Fault_NO_SPACE, "datastore %s is full; free space and repeat", d.Name)
		}
		tell(&hostapi.Progress{Stage: "consolidating", DoneBytes: int64(at+1) << 20, TotalBytes: int64(total) << 20, BytesPerSecond: 1 << 20, LeftSeconds: float64(total - at - 1)})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(f.snapshots.tree) == 0 {
		for _, disk := range f.disks {
			disk.link = 0
		}
	}
	return nil
}
