package center

import (
	"context"
	"time"

	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// An Estimate says what a change of a VM would rewrite (E7).
type Estimate struct {
	Bytes int64         // of data, on all disks
	Idle  time.Duration // beside an idle guest, or none
	Busy  time.Duration // at most, beside a guest that is never idle
	Disks []DiskEstimate
}

// DiskEstimate is one disk's part.
type DiskEstimate struct {
	Key        int32
	Controller string
	Kind       string // inventory.Convert…
	Bytes      int64
	Rate       int64 // bytes per second, by a trial; 0 without data
	Idle, Busy time.Duration
}

// EstimateReconfigure plans a change as ReconfigureVM does, with the same
// refusals, has the host try what it would take, and changes nothing.
func (c *Center) EstimateReconfigure(ctx context.Context, p Principal, ref Ref, spec ReconfigureSpec) (*Estimate, error) {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return nil, err
	}
	data, _, err := c.planReconfigure(ctx, p, vm, &spec)
	if err != nil {
		return nil, err
	}
	by := map[string]int{} // index of each disk's estimate
	e := &Estimate{}
	var ids []string
	for _, d := range data.Crypto.Disks {
		if d.Kind == inventory.ConvertShallow {
			continue // rewrites a key safe
		}
		by[d.UUID], ids = len(e.Disks), append(ids, d.UUID)
		e.Disks = append(e.Disks, DiskEstimate{Key: d.Key, Controller: vm.Disk(d.Key).Controller, Kind: d.Kind})
	}
	if len(ids) == 0 {
		return e, nil
	}
	if other, busy := c.tasks.Locked(string(ref)); busy {
		f := fault(task.TaskInProgress, "task %s is working on VM %q; wait for it, or cancel it, and ask again", other, vm.Name)
		f.Task, f.Object, f.Name = other, ref, vm.Name
		return nil, f
	}
	const doing = "estimating a conversion"
	if err := c.mustReach(vm.Host, doing); err != nil {
		return nil, err
	}
	var reply *hostapi.EstimateReply
	err = c.onHost(ctx, vm.Host, doing, func(_ *link, h *inventory.Host, client hostapi.HostClient) error {
		r, err := c.vmRef(vm)
		if err != nil {
			return err
		}
		if keys := vm.Keys(); len(keys) > 0 {
			if err := c.ensureKeys(ctx, h, client, "", vm.UUID, keys, doing); err != nil {
				return err
			}
		}
		reply, err = client.EstimateVM(ctx, &hostapi.EstimateRequest{Header: c.header(""), Ref: r, DiskUuids: ids})
		return hostFault(h, vm, doing, err)
	})
	if err != nil {
		return nil, err
	}
	for _, d := range reply.Disks {
		i, asked := by[d.Uuid]
		if !asked {
			continue
		}
		x := &e.Disks[i]
		x.Bytes, x.Rate, x.Idle, x.Busy = d.Bytes, d.BytesPerSecond, seconds(d.IdleSeconds), seconds(d.BusySeconds)
		e.Bytes, e.Idle, e.Busy = e.Bytes+x.Bytes, e.Idle+x.Idle, e.Busy+x.Busy
	}
	return e, nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
