package host

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
)

// A job is a change of a VM that runs, or waits for its turn, as others may act on
// it: they hold its conversions back or let them go.
type job struct {
	store string // its datastore
	turns *turns // nil: it converts nothing
	force bool   // it waits for no turn

	mu      sync.Mutex // protects what follows
	pace    *hostapi.Pace
	changed chan struct{} // closed when the pace is set
}

// newJob is the job of a request. Only conversions wait: a shallow recrypt rewrites
// no data.
func (a *Agent) newJob(r *hostapi.ReconfigureVMRequest) *job {
	j := &job{store: r.Ref.GetDatastore(), force: r.Undo, changed: make(chan struct{}), pace: r.Pace}
	for _, d := range r.Disks {
		if k := d.Change.GetKind(); k != hostapi.CryptoChange_NONE && k != hostapi.CryptoChange_SHALLOW_RECRYPT {
			j.turns = a.turns
		}
	}
	return j
}

func (j *job) set(p *hostapi.Pace) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pace = p
	close(j.changed)
	j.changed = make(chan struct{})
}

// now is the pace, and what tells that it is another.
func (j *job) now() (*hostapi.Pace, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.pace, j.changed
}

// turn waits until the job may convert: until it is not paused, then for its turn,
// which it loses when it is paused before that comes.
func (j *job) turn(ctx context.Context, tell func(string)) (done func(), err error) {
	if j.turns == nil {
		return func() {}, nil
	}
	for {
		p, changed := j.now()
		if !p.GetPaused() {
			done, err := j.take(ctx, changed, tell)
			if err == nil || ctx.Err() != nil {
				return done, err
			}
			continue // paused, perhaps
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// take waits for a turn, while the job is not paused.
func (j *job) take(ctx context.Context, changed <-chan struct{}, tell func(string)) (done func(), err error) {
	if j.force {
		return j.turns.take(j.store), nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		for {
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
			var p *hostapi.Pace
			if p, changed = j.now(); p.GetPaused() {
				cancel()
				return
			}
		}
	}()
	return j.turns.wait(ctx, j.store, tell)
}

// lead gives its vmx the job's pace, whenever that is another, until ctx ends. A
// job that is paused gives its turn back, and waits for another before it goes on.
// changed tells when pace, which the vmx has, is not the job's any more.
func (j *job) lead(ctx context.Context, p *process, pace *hostapi.Pace, changed <-chan struct{}, done func(), tell func(string)) {
	defer func() { done() }()
	for resting := false; ; {
		if pace.GetPaused() && !resting {
			resting = true
			done()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
		pace, changed = j.now()
		if resting && !pace.GetPaused() {
			again, err := j.turn(ctx, tell)
			if err != nil {
				return
			}
			done, resting = again, false
			pace, changed = j.now()
		}
		if err := p.pace(ctx, pace); err != nil && ctx.Err() == nil {
			tell(fmt.Sprintf("its pace could not be set: %v", err))
		}
	}
}

func (p *process) pace(ctx context.Context, to *hostapi.Pace) error {
	if to == nil {
		to = &hostapi.Pace{}
	}
	_, err := p.SetPace(ctx, to)
	return err
}

// ReconfigureVM implements hostapi.HostServer.
func (s *Server) ReconfigureVM(r *hostapi.ReconfigureVMRequest, stream hostapi.Host_ReconfigureVMServer) error {
	result, err := s.reconfigure(r, stream)
	if err != nil {
		return err
	}
	// Sent when the VM is free for the next command.
	return stream.Send(&hostapi.Progress{Stage: "done", Result: result})
}

func (s *Server) reconfigure(r *hostapi.ReconfigureVMRequest, stream hostapi.Host_ReconfigureVMServer) (result *hostapi.VMInfo, err error) {
	m, path, end, err := s.operate(r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	for _, d := range r.AttachDisks {
		if d.Datastore != "" && d.Datastore != r.Ref.Datastore || filepath.Dir(d.Path) != filepath.Dir(r.Ref.Path) {
			return nil, hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "disk [%s] %s is not in the folder of [%s] %s: move it there first, or import it with 'mortise vm import'", d.Datastore, d.Path, r.Ref.Datastore, r.Ref.Path)
		}
	}
	if len(r.AddDisks) > 0 {
		if err := s.agent.storageFor(stream.Context(), r.Ref.Datastore, filepath.Dir(path), r.AddDisks); err != nil {
			return nil, err
		}
	}
	var sending sync.Mutex
	send := func(p *hostapi.Progress) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(p)
	}
	tell := func(stage string) { _ = send(&hostapi.Progress{Stage: stage, Back: r.Undo}) }

	ctx := stream.Context()
	j := s.agent.newJob(r)
	m.setJob(j)
	defer m.setJob(nil)
	done, err := j.turn(ctx, tell)
	if err != nil {
		return nil, err
	}
	var leading sync.WaitGroup
	defer leading.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	keys, err := m.keysFor(path, keysOf(r)...)
	if err != nil {
		done()
		return nil, err
	}
	defer clearKeys(keys)
	led := false
	err = m.withProcess(ctx, path, func(ctx context.Context, p *process) error {
		pace, changed := j.now()
		if err := p.pace(ctx, pace); err != nil {
			return err
		}
		led = true
		leading.Go(func() { j.lead(ctx, p, pace, changed, done, tell) })
		updates, err := p.Reconfigure(ctx, &hostapi.VMXReconfigureRequest{Change: r, Keys: keys})
		if err != nil {
			return err
		}
		result, err = relay(updates, send)
		return err
	})
	if !led {
		done()
	}
	if err != nil {
		return nil, err
	}
	return s.finish(m, r.Ref, path, result)
}

// keysOf lists the keys that a change, or its undoing, needs besides those that
// open the VM.
func keysOf(r *hostapi.ReconfigureVMRequest) (ids []keysafe.KeyID) {
	add := func(id *hostapi.KeyID) {
		if id != nil {
			ids = append(ids, fromWire(id))
		}
	}
	if r.Undo {
		add(r.HomeBefore.GetKey())
		for _, d := range r.Disks {
			add(d.Before.GetKey())
		}
		return ids
	}
	add(r.Home.GetKey())
	for _, d := range r.Disks {
		add(d.Change.GetKey())
	}
	for _, d := range r.AddDisks {
		add(d.KeyId)
	}
	return ids
}

// SetPace implements hostapi.HostServer.
func (s *Server) SetPace(_ context.Context, r *hostapi.PaceRequest) (*hostapi.PaceReply, error) {
	if err := s.agent.obey(r.Header); err != nil {
		return nil, err
	}
	if n := r.Pace.GetLimitBytesPerSecond(); n < 0 {
		return nil, hostapi.Faultf(hostapi.Fault_INVALID, "a limit of %d bytes per second: it is more than 0, or 0 for none", n)
	}
	nothing := hostapi.Faultf(hostapi.Fault_NOT_FOUND, "nothing is changed on VM %s that could be held back", r.Ref.GetUuid())
	m := s.agent.held(r.Ref.GetUuid())
	if m == nil {
		return nil, nothing
	}
	defer s.agent.drop(m)
	m.mu.Lock()
	j := m.job
	m.mu.Unlock()
	if j == nil {
		return nil, nothing
	}
	j.set(r.Pace)
	return &hostapi.PaceReply{}, nil
}

func (m *machine) setJob(j *job) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.job = j
}

// EstimateVM implements hostapi.HostServer.
func (s *Server) EstimateVM(ctx context.Context, r *hostapi.EstimateRequest) (reply *hostapi.EstimateReply, err error) {
	m, path, end, err := s.operate(r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	keys, err := m.keysFor(path)
	if err != nil {
		return nil, err
	}
	defer clearKeys(keys)
	on := m.isOn()
	err = m.withProcess(ctx, path, func(ctx context.Context, p *process) error {
		if !on {
			if _, err := p.Open(ctx, &hostapi.OpenRequest{Ref: r.Ref, Keys: keys}); err != nil {
				return err
			}
		}
		reply, err = p.Estimate(ctx, r)
		return err
	})
	return reply, err
}
