package centertest

import (
	"context"
	"slices"
	"time"

	"mortise/internal/hostapi"
)

// undo makes the VM what r says that it was, as a real host does: what is half way
// runs back step by step, what is done is done once more the other way.
func (h *Host) undo(ctx context.Context, d *Datastore, f *folder, r *hostapi.ReconfigureVMRequest, tell func(*hostapi.Progress)) error {
	for _, c := range slices.Backward(r.Disks) {
		at := slices.IndexFunc(f.disks, func(o *disk) bool { return o.uuid == c.DiskUuid })
		if at < 0 {
			return hostapi.Faultf(hostapi.Fault_NOT_FOUND, "no disk %s", c.DiskUuid)
		}
		if err := h.undoDisk(ctx, d, f, f.disks[at], c.Before, tell); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	f.disks = slices.DeleteFunc(f.disks, func(o *disk) bool {
		return slices.ContainsFunc(r.AddDisks, func(n *hostapi.NewDisk) bool { return n.Uuid == o.uuid })
	})
	if r.Hardware != nil {
		f.hardware = r.Hardware
	}
	if r.Name != "" {
		f.name = r.Name
	}
	return h.restore(f, &f.home, r.HomeBefore, f.uuid)
}

func (h *Host) undoDisk(ctx context.Context, d *Datastore, f *folder, disk *disk, before *hostapi.Before, tell func(*hostapi.Progress)) error {
	for {
		d.mu.Lock()
		at := disk.done
		under := disk.converting != ""
		disk.back = under
		d.mu.Unlock()
		if !under || at == 0 {
			break
		}
		if err := h.hold(ctx, f.uuid); err != nil {
			return err
		}
		h.mu.Lock()
		hook := h.onStep
		h.mu.Unlock()
		if hook != nil {
			hook(-at)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d.mu.Lock()
		disk.done--
		d.mu.Unlock()
		tell(&hostapi.Progress{Stage: "running back", DoneBytes: disk.capacity * int64(steps-at+1) / steps, TotalBytes: disk.capacity, Back: true})
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	disk.converting, disk.target, disk.back = "", nil, false
	return h.restore(f, &disk.sealed, before, disk.uuid)
}

// restore gives something the form and the key that it had. The datastore's lock is
// held.
func (h *Host) restore(f *folder, s *sealed, before *hostapi.Before, what string) (err error) {
	switch {
	case !before.GetEncrypted():
		*s = sealed{}
	case !same(s.key, before.Key):
		*s, err = h.seal(f.uuid, before.Key, what, s.epoch+1)
	}
	return err
}

// Pace is that of the change that runs on a VM; nil: none runs.
func (h *Host) Pace(vm string) *hostapi.Pace {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.paces[vm]
}

func (h *Host) setPace(vm string, p *hostapi.Pace, begin bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.paces == nil {
		h.paces = map[string]*hostapi.Pace{}
	}
	if !begin && h.paces[vm] == nil {
		return false
	}
	if p == nil {
		p = &hostapi.Pace{}
	}
	h.paces[vm] = p
	return true
}

func (h *Host) endPace(vm string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.paces, vm)
}

// hold rests while the VM's change is paused.
func (h *Host) hold(ctx context.Context, vm string) error {
	for h.Pace(vm).GetPaused() {
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (s *service) SetPace(_ context.Context, r *hostapi.PaceRequest) (*hostapi.PaceReply, error) {
	if err := s.h.enter("SetPace", r.Header); err != nil {
		return nil, err
	}
	if !s.h.setPace(r.Ref.GetUuid(), r.Pace, false) {
		return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "nothing is changed on VM %s", r.Ref.GetUuid())
	}
	return &hostapi.PaceReply{}, nil
}

// EstimateVM estimates a mebibyte a second.
func (s *service) EstimateVM(_ context.Context, r *hostapi.EstimateRequest) (*hostapi.EstimateReply, error) {
	h := s.h
	d, end, err := h.begin("EstimateVM", r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	d.mu.Lock()
	defer d.mu.Unlock()
	f, err := h.open(d, r.Ref)
	if err == nil {
		err = h.unlock(f)
	}
	if err != nil {
		return nil, err
	}
	reply := &hostapi.EstimateReply{}
	for _, id := range r.DiskUuids {
		at := slices.IndexFunc(f.disks, func(o *disk) bool { return o.uuid == id })
		if at < 0 {
			return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "no disk %s", id)
		}
		n := f.disks[at].capacity
		reply.Disks = append(reply.Disks, &hostapi.DiskEstimate{Uuid: id, Bytes: n, BytesPerSecond: 1 << 20, IdleSeconds: float64(n) / (1 << 20), BusySeconds: 5 * float64(n) / (1 << 20)})
	}
	return reply, nil
}
