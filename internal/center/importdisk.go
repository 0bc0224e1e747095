package center

import (
	"context"
	"errors"
	"fmt"
	"io"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// importChunk bounds the data of one message to a host.
const importChunk = 1 << 20

// ImportDisk writes the content of a disk of a powered-off VM: through its
// encryption, in one pass (E7). It returns how many bytes the host has written.
// The VM is locked against other tasks meanwhile.
func (c *Center) ImportDisk(ctx context.Context, p Principal, ref Ref, diskKey int32, r DiskStream) (int64, error) {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return 0, err
	}
	disk := vm.Disk(diskKey)
	if disk == nil {
		f := fault(task.NotFound, "VM %q has no disk with the key %d", vm.Name, diskKey)
		f.Object, f.Name = ref, vm.Name
		return 0, f
	}
	privileges := []string{authz.VMDiskRandom}
	if vm.AnyEncrypted() {
		privileges = append(privileges, authz.CryptoAccess)
	}
	if err := c.checkAll(p, ref, privileges...); err != nil {
		return 0, err
	}
	if vm.Power != inventory.PoweredOff {
		return 0, wrongPower(vm, inventory.PoweredOff, "importing a disk")
	}
	if disk.Converting != nil {
		return 0, halfWay(vm, disk)
	}
	if err := c.mustReach(vm.Host, "importing a disk"); err != nil {
		return 0, err
	}
	var written int64
	spec := task.Spec{Name: "VirtualMachine.importDisk", Entity: ref, User: p.User, Locks: lockVM(ref), Cancelable: true}
	err = c.tasks.Do(ctx, spec, func(ctx context.Context, run *task.Run) error {
		_, client, err := c.links.wait(ctx, vm.Host, c.cfg.HostWait, "importing a disk")
		if err != nil {
			return err
		}
		h, _ := inventory.Lookup[inventory.Host](c.view, vm.Host)
		if err := c.ensureKeys(ctx, h, client, run.Operation(), vm.UUID, vm.Keys(), fmt.Sprintf("a disk of VM %q is imported", vm.Name)); err != nil {
			return err
		}
		written, err = c.sendDisk(ctx, run, client, vm, disk, r)
		return hostFault(h, vm, fmt.Sprintf("importing disk %s", disk.Path), err)
	})
	if err != nil {
		return written, err
	}
	c.events.Post(ctx, Event{Type: event.VMDiskImported, User: p.User, Entity: ref, Message: fmt.Sprintf("%d bytes were imported into disk %s of VM %q", written, disk.Path, vm.Name)})
	c.refresh(ctx, ref)
	return written, nil
}

// sendDisk relays the stream to the host. What is out of order or beyond the
// disk's end ends it.
func (c *Center) sendDisk(ctx context.Context, run *task.Run, client hostapi.HostClient, vm *inventory.VM, disk *inventory.Disk, r DiskStream) (int64, error) {
	ref, err := c.vmRef(vm)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.ImportDisk(ctx)
	if err != nil {
		return 0, err
	}
	send := func(m *hostapi.ImportChunk) error {
		err := stream.Send(m)
		if errors.Is(err, io.EOF) {
			_, err = stream.CloseAndRecv() // the host has ended it, and says why here
			if err == nil {
				err = errors.New("the host ended the import early")
			}
		}
		return err
	}
	first := &hostapi.ImportChunk{Header: c.header(run.Operation()), Ref: ref, DiskUuid: disk.UUID}
	if err := send(first); err != nil {
		return 0, err
	}
	var at int64
	for {
		offset, data, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, fault(task.InvalidArgument, "the content of disk %s broke off at %d bytes: %v; import it again", disk.Path, at, err).Because(err)
		}
		if offset < at || offset > disk.CapacityBytes || int64(len(data)) > disk.CapacityBytes-offset {
			return 0, invalid("content", "the content at offset %d (%d bytes) is out of order or beyond the end of disk %s, which has %d bytes", offset, len(data), disk.Path, disk.CapacityBytes)
		}
		for len(data) > 0 {
			n := min(len(data), importChunk)
			if err := send(&hostapi.ImportChunk{Offset: offset, Data: data[:n]}); err != nil {
				return 0, err
			}
			offset, data = offset+int64(n), data[n:]
		}
		at = offset
		run.Progress(ctx, "importing "+disk.Path, at, disk.CapacityBytes)
	}
	reply, err := stream.CloseAndRecv()
	return reply.GetWrittenBytes(), err
}

// refresh reads what a VM's folder takes up, after its content has changed.
func (c *Center) refresh(ctx context.Context, ref Ref) {
	vm, ok := inventory.Lookup[inventory.VM](c.view, ref)
	if !ok {
		return
	}
	_, client, up := c.links.connected(vm.Host)
	r, err := c.vmRef(vm)
	if !up || err != nil {
		return
	}
	info, err := client.InspectVM(ctx, &hostapi.InspectVMRequest{Ref: r})
	if err != nil || info.GetRef().GetUuid() != vm.UUID {
		return
	}
	_ = editIfChanged(ctx, c, c.inv.VMs, ref, func(vm *inventory.VM) {
		next := cloneVM(vm)
		next.SizeBytes = info.SizeBytes
		for i := range next.Disks {
			for _, d := range info.Disks {
				if d.Uuid == next.Disks[i].UUID {
					next.Disks[i].AllocatedBytes = d.AllocatedBytes
				}
			}
		}
		*vm = *next
	})
}
