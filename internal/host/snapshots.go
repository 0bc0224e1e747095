package host

import (
	"context"
	"fmt"
	"io"

	"mortise/internal/hostapi"
)

// ChangeSnapshots implements hostapi.HostServer.
func (s *Server) ChangeSnapshots(r *hostapi.SnapshotRequest, stream hostapi.Host_ChangeSnapshotsServer) error {
	result, err := s.changeSnapshots(r, stream)
	if err != nil {
		return err
	}
	// Sent when the VM is free for the next command.
	return stream.Send(&hostapi.Progress{Stage: "done", Result: result})
}

func (s *Server) changeSnapshots(r *hostapi.SnapshotRequest, stream hostapi.Host_ChangeSnapshotsServer) (result *hostapi.VMInfo, err error) {
	m, path, end, err := s.operate(r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	if r.Act == hostapi.SnapshotRequest_REVERT {
		if err := m.mustBeOff("go back to a snapshot of"); err != nil {
			return nil, err
		}
	}
	keys, err := m.keysFor(path)
	if err != nil {
		return nil, err
	}
	defer clearKeys(keys)
	err = m.withProcess(stream.Context(), path, func(ctx context.Context, p *process) error {
		updates, err := p.ChangeSnapshots(ctx, &hostapi.VMXSnapshotRequest{Change: r, Keys: keys, Running: m.isOn()})
		if err != nil {
			return err
		}
		result, err = relay(updates, stream.Send)
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.finish(m, r.Ref, path, result)
}

// relay passes on what a vmx tells of a change, until its last message, which has
// the result.
func relay(updates interface {
	Recv() (*hostapi.Progress, error)
}, send func(*hostapi.Progress) error) (result *hostapi.VMInfo, err error) {
	for {
		u, err := updates.Recv()
		if err == io.EOF && result != nil {
			return result, nil
		}
		if err == io.EOF {
			return nil, fmt.Errorf("vmx ended without a result; see the VM's log")
		}
		if err != nil {
			return nil, err
		}
		if u.Result != nil {
			result = u.Result
		} else if err := send(u); err != nil {
			return nil, err
		}
	}
}
