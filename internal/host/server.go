package host

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"google.golang.org/grpc"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/vmx"
)

// Server is the agent's face to center: the Host service. The caller registers
// it on a gRPC server that lets in only center's certificate.
type Server struct {
	hostapi.UnimplementedHostServer
	agent *Agent
}

// Register adds the Host service of the agent to a gRPC server.
func Register(s *grpc.Server, a *Agent) { hostapi.RegisterHostServer(s, &Server{agent: a}) }

// Describe implements hostapi.HostServer.
func (s *Server) Describe(ctx context.Context, _ *hostapi.DescribeRequest) (*hostapi.HostInfo, error) {
	return s.agent.describe(ctx)
}

// Watch implements hostapi.HostServer.
func (s *Server) Watch(_ *hostapi.WatchRequest, stream hostapi.Host_WatchServer) error {
	a := s.agent
	// Registered before the first look, so that no change falls between.
	events := make(chan *hostapi.HostEvent, 1024)
	a.mu.Lock()
	a.watchers[events] = true
	var now []*machine
	for _, m := range a.machines {
		now = append(now, m)
	}
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		delete(a.watchers, events)
		a.mu.Unlock()
	}()
	for _, m := range now {
		if err := stream.Send(&hostapi.HostEvent{Kind: hostapi.HostEvent_VM, Vm: m.runtime()}); err != nil {
			return err
		}
	}
	if err := stream.Send(&hostapi.HostEvent{Kind: hostapi.HostEvent_SYNCED}); err != nil {
		return err
	}
	for {
		select {
		case ev, ok := <-events:
			if !ok {
				return hostapi.Faultf(hostapi.Fault_BUSY, "the watcher does not keep up: watch again")
			}
			if err := stream.Send(ev); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		case <-a.ctx.Done():
			return nil
		}
	}
}

// operate is how every command that changes a VM's files begins: the term is
// current, the folder is within reach, nothing else works on the VM.
func (s *Server) operate(h *hostapi.Header, ref *hostapi.VMRef) (m *machine, path string, end func(), err error) {
	if err := s.agent.obey(h); err != nil {
		return nil, "", nil, err
	}
	if path, err = s.agent.vmxPath(ref); err != nil {
		return nil, "", nil, err
	}
	if m, end, err = s.agent.begin(ref); err != nil {
		return nil, "", nil, err
	}
	return m, path, end, nil
}

// CreateVM implements hostapi.HostServer.
func (s *Server) CreateVM(ctx context.Context, r *hostapi.CreateVMRequest) (*hostapi.VMInfo, error) {
	ref := &hostapi.VMRef{Uuid: r.Uuid, Datastore: r.Datastore, Path: r.Folder + "/" + filepath.Base(r.Folder) + ".vmx"}
	m, path, end, err := s.operate(r.Header, ref)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := m.mustBeOff("create"); err != nil {
		return nil, err
	}
	if err := s.agent.storageFor(ctx, r.Datastore, filepath.Dir(path), r.Disks); err != nil {
		return nil, err
	}
	if err := makeFolder(filepath.Dir(path)); err != nil {
		return nil, err
	}
	var want []keysafe.KeyID
	if r.HomeKey != nil {
		want = append(want, fromWire(r.HomeKey))
	}
	for _, d := range r.Disks {
		if d.KeyId != nil {
			want = append(want, fromWire(d.KeyId))
		}
	}
	keys, err := m.newKeys(want)
	if err != nil {
		return nil, err
	}
	defer clearKeys(keys)
	var info *hostapi.VMInfo
	err = m.withProcess(ctx, path, func(ctx context.Context, p *process) (err error) {
		info, err = p.Create(ctx, &hostapi.VMXCreateRequest{Vm: r, Keys: keys})
		return err
	})
	if err != nil {
		return nil, err
	}
	return s.finish(m, ref, path, info)
}

// makeFolder makes a VM's folder; its parent must exist.
func makeFolder(dir string) error {
	if err := os.Mkdir(dir, 0o711); err != nil && !os.IsExist(err) {
		return fmt.Errorf("making the VM's folder: %w", err)
	}
	parent, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return err
	}
	defer parent.Close()
	return parent.Sync()
}

// InspectVM implements hostapi.HostServer.
func (s *Server) InspectVM(_ context.Context, r *hostapi.InspectVMRequest) (*hostapi.VMInfo, error) {
	path, err := s.agent.vmxPath(r.Ref)
	if err != nil {
		return nil, err
	}
	info, err := vmx.Inspect(path)
	if err != nil {
		return nil, err
	}
	m := s.agent.held(info.Ref.GetUuid())
	if m != nil {
		defer s.agent.drop(m)
	}
	return s.complete(m, r.Ref, path, info)
}

// InspectDisk implements hostapi.HostServer.
func (s *Server) InspectDisk(_ context.Context, r *hostapi.InspectDiskRequest) (*hostapi.DiskInfo, error) {
	path, err := s.agent.vmxPath(&hostapi.VMRef{Datastore: r.Datastore, Path: r.Path})
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(path); err != nil {
		return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "datastore %s: %w", r.Datastore, err)
	}
	d := vmx.InspectDisk(path)
	d.Path = r.Path
	return d, nil
}

// finish drops the keys that the VM's files name no more and completes info.
func (s *Server) finish(m *machine, ref *hostapi.VMRef, path string, info *hostapi.VMInfo) (*hostapi.VMInfo, error) {
	m.dropUnused(path, info)
	return s.complete(m, ref, path, info)
}

// complete adds to what the folder says what only the agent knows.
func (s *Server) complete(m *machine, ref *hostapi.VMRef, path string, info *hostapi.VMInfo) (*hostapi.VMInfo, error) {
	info.Ref = &hostapi.VMRef{Uuid: info.Ref.GetUuid(), Datastore: ref.Datastore, Path: ref.Path}
	dir := filepath.ToSlash(filepath.Dir(ref.Path))
	for _, d := range info.Disks {
		d.Path = filepath.ToSlash(filepath.Join(dir, d.Path))
	}
	info.Runtime = &hostapi.VMRuntime{Uuid: info.Ref.Uuid, Power: hostapi.PowerState_POWERED_OFF}
	if m != nil {
		info.Runtime = m.runtime()
	}
	want, err := vmx.RequiredKeys(path)
	if err != nil {
		return nil, err
	}
	info.Runtime.HasKeys, info.Runtime.Missing = true, nil
	for i, alternatives := range want {
		missing := s.agent.keys.missing(info.Ref.Uuid, alternatives)
		if len(missing) < len(alternatives) {
			continue
		}
		info.Runtime.HasKeys = false
		for _, id := range missing {
			if !slices.ContainsFunc(info.Runtime.Missing, func(k *hostapi.KeyID) bool { return fromWire(k) == id }) {
				info.Runtime.Missing = append(info.Runtime.Missing, toWire(id))
			}
		}
		if i == 0 && info.Encrypted {
			// Locked is about the VM's configuration key (K6); a missing key of one
			// disk only fails the power-on.
			info.Locked = true
			info.LockedReason = fmt.Sprintf("the key %s that opens the VM's configuration is not on host %s", missing[0], s.agent.cfg.Name)
		}
	}
	return info, nil
}

// PowerOn implements hostapi.HostServer.
func (s *Server) PowerOn(ctx context.Context, r *hostapi.PowerRequest) (*hostapi.VMInfo, error) {
	m, path, end, err := s.operate(r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := s.agent.storageFor(ctx, r.Ref.GetDatastore(), "", nil); err != nil {
		return nil, err
	}
	if err := m.powerOn(ctx, path); err != nil {
		return nil, err
	}
	return s.inspect(m, r.Ref), nil
}

// PowerOff implements hostapi.HostServer.
func (s *Server) PowerOff(ctx context.Context, r *hostapi.PowerRequest) (*hostapi.VMInfo, error) {
	return s.power(r, func(m *machine) error { return m.powerOff(ctx) })
}

// Shutdown implements hostapi.HostServer.
func (s *Server) Shutdown(ctx context.Context, r *hostapi.PowerRequest) (*hostapi.VMInfo, error) {
	return s.power(r, func(m *machine) error {
		if err := m.mustBeOn("shut down"); err != nil {
			return err
		}
		return s.agent.cfg.Guests.Shutdown(ctx, m.uuid)
	})
}

// Reset implements hostapi.HostServer.
func (s *Server) Reset(ctx context.Context, r *hostapi.PowerRequest) (*hostapi.VMInfo, error) {
	return s.power(r, func(m *machine) error {
		if err := m.mustBeOn("reset"); err != nil {
			return err
		}
		return s.agent.cfg.Guests.Reset(ctx, m.uuid)
	})
}

// power acts on a guest. Its folder need not be within reach: the plug can be
// pulled while the storage is away.
func (s *Server) power(r *hostapi.PowerRequest, f func(*machine) error) (*hostapi.VMInfo, error) {
	if err := s.agent.obey(r.Header); err != nil {
		return nil, err
	}
	m, end, err := s.agent.begin(r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := f(m); err != nil {
		return nil, err
	}
	return s.inspect(m, r.Ref), nil
}

// inspect describes a VM after something was done to its guest. What is wrong
// with its folder does not undo that.
func (s *Server) inspect(m *machine, ref *hostapi.VMRef) *hostapi.VMInfo {
	info, err := func() (*hostapi.VMInfo, error) {
		path, err := s.agent.vmxPath(ref)
		if err != nil {
			return nil, err
		}
		info, err := vmx.Inspect(path)
		if err != nil {
			return nil, err
		}
		return s.complete(m, ref, path, info)
	}()
	if err != nil {
		return &hostapi.VMInfo{Ref: ref, Runtime: m.runtime(), Problems: []string{err.Error()}}
	}
	return info
}

// Release implements hostapi.HostServer.
func (s *Server) Release(_ context.Context, r *hostapi.PowerRequest) (*hostapi.ReleaseReply, error) {
	if err := s.agent.obey(r.Header); err != nil {
		return nil, err
	}
	m, end, err := s.agent.begin(r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := m.mustBeOff("let go of"); err != nil {
		return nil, err
	}
	return &hostapi.ReleaseReply{Wiped: toWireAll(s.agent.keys.dropVM(m.uuid))}, nil
}

// DeleteVM implements hostapi.HostServer.
func (s *Server) DeleteVM(_ context.Context, r *hostapi.PowerRequest) (*hostapi.DeleteVMReply, error) {
	m, path, end, err := s.operate(r.Header, r.Ref)
	if err != nil {
		return nil, err
	}
	defer end()
	if err := m.mustBeOff("delete"); err != nil {
		return nil, err
	}
	left, err := vmx.Delete(path, m.uuid)
	if err != nil {
		return nil, err
	}
	return &hostapi.DeleteVMReply{Wiped: toWireAll(s.agent.keys.dropVM(m.uuid)), LeftBehind: left}, nil
}
