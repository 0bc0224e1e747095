package centertest

import (
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"net"
	"path"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"mortise/internal/hostapi"
	"mortise/internal/pki"
)

// Host is a host made small: it joins with a token, speaks hostapi over mutual
// TLS, keeps pushed keys in memory for the VMs they are for, and obeys the rules
// of a real host: no key, no access; a folder that says less than center expects
// is refused; a conversion goes on from where it stopped; snapshots are a tree, and
// removing them takes steps. VMs are records in a [Datastore]; their guests are a
// flag.
type Host struct {
	Name string
	UUID string
	// Incapable says why the host cannot become safe.
	Incapable []string
	Stores    []*Datastore
	Networks  []string

	t     testing.TB
	addr  string
	creds *pki.Credentials
	ca    *x509.Certificate

	mu       sync.Mutex // guards what follows
	server   *grpc.Server
	served   chan struct{}
	term     int64
	keys     map[string]*heldKey // by "provider/key"
	running  map[string]*guest   // by VM UUID
	busy     map[string]bool
	watchers map[chan *hostapi.HostEvent]struct{}
	paces    map[string]*hostapi.Pace // of the changes that run, by VM UUID
	calls    map[string]int
	booted   time.Time
	onCall   func(method string) error
	onStep   func(step int)
}

type heldKey struct {
	id    *hostapi.KeyID
	bytes []byte
	vms   map[string]bool
	since time.Time
}

type guest struct {
	since time.Time
	at    *Datastore
	path  string
	lines chan []byte
}

// NewHost makes a host that has joined nothing yet.
func NewHost(t testing.TB, name string, stores ...*Datastore) *Host {
	h := &Host{Name: name, UUID: uuid.NewString(), Stores: stores, Networks: []string{"default"}, t: t, addr: "127.0.0.1:0",
		keys: map[string]*heldKey{}, running: map[string]*guest{}, busy: map[string]bool{}, watchers: map[chan *hostapi.HostEvent]struct{}{}, calls: map[string]int{}, booted: time.Now().Add(-time.Hour)}
	t.Cleanup(h.Stop)
	return h
}

// Join joins the center that answers at address, with a token of its, and
// starts serving.
func (h *Host) Join(address, tokenText string) error {
	l, err := net.Listen("tcp", h.addr)
	if err != nil {
		return err
	}
	h.addr = l.Addr().String()
	token, err := pki.ParseJoinToken(tokenText)
	if err != nil {
		return err
	}
	key, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	csr, err := pki.NewCSR(key, h.Name)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(
		pki.JoinClient(token.CA, pki.Identity{Role: pki.RoleCenter, Name: pki.CenterName}, nil))))
	if err != nil {
		return err
	}
	defer conn.Close()
	reply, err := hostapi.NewJoinClient(conn).Join(context.Background(), &hostapi.JoinRequest{TokenSecret: token.Secret(), Name: h.Name, Address: h.addr, Csr: csr})
	if err != nil {
		l.Close()
		return err
	}
	cert, err := x509.ParseCertificate(reply.Certificate)
	if err == nil {
		h.ca, err = x509.ParseCertificate(reply.CaCertificate)
	}
	if err == nil {
		h.creds, err = pki.NewCredentials([]*x509.Certificate{cert, h.ca}, key)
	}
	if err != nil {
		return err
	}
	h.serve(l)
	return nil
}

func (h *Host) serve(l net.Listener) {
	tls := pki.Mutual{Credentials: h.creds, CAs: []*x509.Certificate{h.ca}}.Server(func(id pki.Identity, _ *x509.Certificate) error {
		if id.Role != pki.RoleCenter {
			return fmt.Errorf("%s may not command a host", id)
		}
		return nil
	})
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(tls)), grpc.MaxRecvMsgSize(4<<20))
	hostapi.RegisterHostServer(s, &service{h: h})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.server, h.served = s, make(chan struct{})
	served := h.served
	go func() { defer close(served); s.Serve(l) }()
}

// Stop makes the host unreachable; guests and keys stay.
func (h *Host) Stop() {
	h.mu.Lock()
	s, served := h.server, h.served
	h.server = nil
	h.mu.Unlock()
	if s != nil {
		s.Stop()
		<-served
	}
}

// Start lets the host serve again, at its address.
func (h *Host) Start() {
	h.t.Helper()
	l, err := net.Listen("tcp", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.serve(l)
}

// Restart is what a power cut does: guests and keys are gone.
func (h *Host) Restart() {
	h.t.Helper()
	h.Stop()
	h.mu.Lock()
	h.keys, h.running, h.busy, h.term = map[string]*heldKey{}, map[string]*guest{}, map[string]bool{}, 0
	h.booted = time.Now()
	h.mu.Unlock()
	h.Start()
}

// Held lists the keys in the host's memory, each with the VMs that it is for.
func (h *Host) Held() map[string][]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	held := map[string][]string{}
	for id, k := range h.keys {
		held[id] = slices.Sorted(maps.Keys(k.vms))
	}
	return held
}

// Calls counts the calls of a method.
func (h *Host) Calls(method string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls[method]
}

// OnCall has f called before each call; its error is the answer. nil ends it.
func (h *Host) OnCall(f func(method string) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onCall = f
}

// OnStep has f called before each step of a conversion. nil ends it.
func (h *Host) OnStep(f func(step int)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onStep = f
}

// Running tells whether a VM's guest runs here.
func (h *Host) Running(vm string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.running[vm] != nil
}

// Crash ends a guest as if it had powered itself off.
func (h *Host) Crash(vm string) {
	h.mu.Lock()
	delete(h.running, vm)
	h.mu.Unlock()
	h.tell(&hostapi.HostEvent{Kind: hostapi.HostEvent_VM_GONE, Vm: &hostapi.VMRuntime{Uuid: vm, Power: hostapi.PowerState_POWERED_OFF}})
}

// tell sends an event to whoever watches.
func (h *Host) tell(ev *hostapi.HostEvent) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watchers {
		w <- ev
	}
}

// service is the host's face to center.
type service struct {
	hostapi.UnimplementedHostServer
	h *Host
}

// enter begins every call.
func (h *Host) enter(method string, header *hostapi.Header) error {
	h.mu.Lock()
	h.calls[method]++
	stale := header != nil && header.Term < h.term
	if header != nil {
		h.term = max(h.term, header.Term)
	}
	hook := h.onCall
	h.mu.Unlock()
	if stale {
		return hostapi.Faultf(hostapi.Fault_STALE_TERM, "term %d is over", header.Term)
	}
	if hook != nil {
		return hook(method)
	}
	return nil
}

func (s *service) Describe(context.Context, *hostapi.DescribeRequest) (*hostapi.HostInfo, error) {
	if err := s.h.enter("Describe", nil); err != nil {
		return nil, err
	}
	return s.h.describe(), nil
}

func (h *Host) describe() *hostapi.HostInfo {
	h.mu.Lock()
	defer h.mu.Unlock()
	info := &hostapi.HostInfo{Name: h.Name, Uuid: h.UUID, Version: "test", Hypervisor: "none", CpuModel: "test", CpuCores: 2, CpuMhz: 3000, MemoryBytes: 8 << 30,
		Aes: true, Xts: "generic", Os: "test", IncapableReasons: h.Incapable, BootTimeUnix: h.booted.Unix()}
	for _, d := range h.Stores {
		info.Datastores = append(info.Datastores, &hostapi.DatastoreInfo{Name: d.Name, Uuid: d.UUID, Path: "/" + d.Name, CapacityBytes: 1 << 40, FreeBytes: 1 << 39, Type: "test"})
	}
	for _, n := range h.Networks {
		info.Networks = append(info.Networks, &hostapi.NetworkInfo{Name: n})
	}
	return info
}

func (s *service) Watch(_ *hostapi.WatchRequest, stream grpc.ServerStreamingServer[hostapi.HostEvent]) error {
	h := s.h
	if err := h.enter("Watch", nil); err != nil {
		return err
	}
	events := make(chan *hostapi.HostEvent, 4096)
	h.mu.Lock()
	h.watchers[events] = struct{}{}
	for vm := range h.running {
		events <- &hostapi.HostEvent{Kind: hostapi.HostEvent_VM, Vm: h.runtime(vm)}
	}
	events <- &hostapi.HostEvent{Kind: hostapi.HostEvent_SYNCED}
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.watchers, events)
		h.mu.Unlock()
	}()
	for {
		select {
		case ev := <-events:
			if err := stream.Send(ev); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

// runtime is a VM's state. The lock is held.
func (h *Host) runtime(vm string) *hostapi.VMRuntime {
	r := &hostapi.VMRuntime{Uuid: vm, Power: hostapi.PowerState_POWERED_OFF, HasKeys: true}
	if g := h.running[vm]; g != nil {
		r.Power, r.BootTimeUnix = hostapi.PowerState_POWERED_ON, g.since.Unix()
	}
	return r
}

func keyName(id *hostapi.KeyID) string { return id.GetProvider() + "/" + id.GetKey() }

func (s *service) PushKeys(_ context.Context, r *hostapi.PushKeysRequest) (*hostapi.PushKeysReply, error) {
	h := s.h
	if err := h.enter("PushKeys", r.Header); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, k := range r.Keys {
		if len(k.Bytes) != 32 {
			return nil, hostapi.Faultf(hostapi.Fault_INVALID, "a KEK of %d bytes", len(k.Bytes))
		}
		held := h.keys[keyName(k.Id)]
		if held == nil {
			held = &heldKey{id: k.Id, bytes: slices.Clone(k.Bytes), vms: map[string]bool{}, since: time.Now()}
			h.keys[keyName(k.Id)] = held
		}
		for _, vm := range k.VmUuids {
			held.vms[vm] = true
		}
	}
	return &hostapi.PushKeysReply{}, nil
}

func (s *service) RemoveKeys(_ context.Context, r *hostapi.RemoveKeysRequest) (*hostapi.RemoveKeysReply, error) {
	h := s.h
	if err := h.enter("RemoveKeys", r.Header); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	reply := &hostapi.RemoveKeysReply{}
	for _, id := range r.Keys {
		k := h.keys[keyName(id)]
		switch {
		case k == nil:
		case r.VmUuid == "":
			delete(h.keys, keyName(id))
		default:
			if delete(k.vms, r.VmUuid); len(k.vms) == 0 {
				delete(h.keys, keyName(id))
			} else {
				reply.StillUsed = append(reply.StillUsed, id)
			}
		}
	}
	return reply, nil
}

func (s *service) ListKeys(context.Context, *hostapi.ListKeysRequest) (*hostapi.ListKeysReply, error) {
	h := s.h
	if err := h.enter("ListKeys", nil); err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	reply := &hostapi.ListKeysReply{}
	for _, k := range h.keys {
		reply.Keys = append(reply.Keys, &hostapi.HeldKey{Id: k.id, VmUuids: slices.Sorted(maps.Keys(k.vms)), SinceUnix: k.since.Unix()})
	}
	return reply, nil
}

// dropVM ends a VM's use of every key but those in keep. The lock is held.
func (h *Host) dropVM(vm string, keep ...string) {
	for id, k := range h.keys {
		if k.vms[vm] && !slices.Contains(keep, id) {
			if delete(k.vms, vm); len(k.vms) == 0 {
				delete(h.keys, id)
			}
		}
	}
}

// key returns a key's bytes if it is held for the VM. The lock is held.
func (h *Host) key(vm string, id *hostapi.KeyID) ([]byte, error) {
	k := h.keys[keyName(id)]
	if k == nil || !k.vms[vm] {
		return nil, &hostapi.FaultError{Fault: &hostapi.Fault{Kind: hostapi.Fault_MISSING_KEYS, Missing: []*hostapi.KeyID{id}},
			Err: fmt.Errorf("key %s is not on host %s for VM %s", keyName(id), h.Name, vm)}
	}
	return k.bytes, nil
}

func (h *Host) store(name string) (*Datastore, error) {
	for _, d := range h.Stores {
		if d.Name == name {
			return d, nil
		}
	}
	return nil, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "no datastore %q here", name)
}

// begin is how every command on a VM begins: one at a time.
func (h *Host) begin(method string, header *hostapi.Header, ref *hostapi.VMRef) (d *Datastore, end func(), err error) {
	if err := h.enter(method, header); err != nil {
		return nil, nil, err
	}
	if d, err = h.store(ref.GetDatastore()); err != nil {
		return nil, nil, err
	}
	at := d.UUID + path.Clean(ref.GetPath())
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy[at] {
		return nil, nil, hostapi.Faultf(hostapi.Fault_BUSY, "another operation works on %s", ref.Path)
	}
	h.busy[at] = true
	return d, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.busy, at)
	}, nil
}
