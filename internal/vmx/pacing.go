package vmx

import (
	"context"
	"math"
	"sync"

	"mortise/internal/hostapi"
	"mortise/internal/vdisk"
)

// pacing is the pace of the VM's conversions, of which one runs at a time. It is
// set while an operation runs, so it has a lock of its own.
type pacing struct {
	mu   sync.Mutex
	pace vdisk.Pace
	disk *vdisk.Chain // that is being converted; nil: none
}

func (p *pacing) set(to vdisk.Pace) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pace = to
	if p.disk != nil {
		p.disk.SetPace(to)
	}
}

// of runs a conversion of d at the pace.
func (p *pacing) of(d *vdisk.Chain, convert func() error) error {
	p.mu.Lock()
	p.disk = d
	d.SetPace(p.pace)
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.disk = nil
		p.mu.Unlock()
	}()
	return convert()
}

// SetPace implements hostapi.VMXServer.
func (s *server) SetPace(_ context.Context, r *hostapi.Pace) (*hostapi.PaceReply, error) {
	if r.LimitBytesPerSecond < 0 {
		return nil, hostapi.Faultf(hostapi.Fault_INVALID, "a limit of %d bytes per second: it is more than 0, or 0 for none", r.LimitBytesPerSecond)
	}
	s.vm.pacing.set(vdisk.Pace{Limit: r.LimitBytesPerSecond, Paused: r.Paused})
	return &hostapi.PaceReply{}, nil
}

// Estimate implements hostapi.VMXServer.
func (s *server) Estimate(ctx context.Context, r *hostapi.EstimateRequest) (*hostapi.EstimateReply, error) {
	if !s.op.TryLock() {
		return nil, hostapi.Faultf(hostapi.Fault_BUSY, "VM %s is being changed: estimate when that is done", r.Ref.GetUuid())
	}
	defer s.op.Unlock()
	if s.open == nil {
		return nil, hostapi.Faultf(hostapi.Fault_INVALID, "the VM is not open")
	}
	ctx, done := s.whileOpen(ctx)
	defer done()
	reply := &hostapi.EstimateReply{}
	for _, name := range r.DiskUuids {
		id, err := parseUUID("a disk", name)
		if err != nil {
			return nil, err
		}
		d := s.open.disks[id]
		if d == nil {
			return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "%s has no disk %s", s.cfg.VMX, id)
		}
		e, err := d.Estimate(ctx)
		if err != nil {
			return nil, faultOf(err)
		}
		reply.Disks = append(reply.Disks, &hostapi.DiskEstimate{Uuid: name, Bytes: e.Bytes, BytesPerSecond: int64(math.Round(e.Rate)),
			IdleSeconds: e.Took.Seconds(), BusySeconds: e.Busy.Seconds()})
	}
	return reply, nil
}
