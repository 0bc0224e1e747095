package host

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/google/uuid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"mortise/internal/domain"
	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vmx"
)

// The vmx processes of these tests are this binary again: real ones.
const actAsVMX = "MORTISE_TEST_HOST_VMX"

func TestMain(m *testing.M) {
	if os.Getenv(actAsVMX) != "" {
		if err := beVMX(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func beVMX(args []string) error {
	cfg := vmx.Config{Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	f := flag.NewFlagSet("vmx", flag.ContinueOnError)
	f.StringVar(&cfg.VMX, "vmx", "", "")
	f.StringVar(&cfg.RunDir, "run-dir", "", "")
	f.IntVar(&cfg.UID, "qemu-uid", 0, "")
	f.IntVar(&cfg.GID, "qemu-gid", 0, "")
	f.BoolVar(&cfg.Direct, "direct-io", false, "")
	if err := f.Parse(args); err != nil {
		return err
	}
	if err := secret.LockDown(); err != nil {
		return err
	}
	orders := make(chan os.Signal, 1)
	signal.Notify(orders, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() {
		for s := range orders {
			if s == syscall.SIGUSR1 {
				failSyncs(cfg)
			} else {
				tryToEscape(cfg)
			}
		}
	}()
	return vmx.Run(context.Background(), cfg)
}

// failSyncs makes storage fail: from now on an fsync of this process is an EIO.
func failSyncs(cfg vmx.Config) {
	err := seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync, Policy: seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		Syscalls:      []seccomp.SyscallGroup{{Action: seccomp.ActionErrno | seccomp.Action(unix.EIO), Names: []string{"fsync", "fdatasync"}}},
	}})
	_ = os.WriteFile(filepath.Join(cfg.RunDir, "syncs-fail"), fmt.Append(nil, err), 0o600)
}

// tryToEscape does what a vmx that was taken over would try, and reports what the
// kernel said.
func tryToEscape(cfg vmx.Config) {
	var out bytes.Buffer
	try := func(name string, err error) { fmt.Fprintf(&out, "%s: %v\n", name, err) }
	_, err := os.ReadFile("/etc/passwd")
	try("read a file", err)
	_, err = os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(cfg.VMX)), "other", "other.vmx"))
	try("read another VM", err)
	try("write outside", os.WriteFile(filepath.Join(filepath.Dir(filepath.Dir(cfg.VMX)), "x"), nil, 0o600))
	_, err = net.Listen("tcp", "127.0.0.1:0")
	try("listen", err)
	_, err = net.Dial("unix", "/run/systemd/notify")
	try("unix socket", err)
	_, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 0)
	try("netlink", err)
	try("exec", exec.Command("/bin/true").Run())
	try("mount", unix.Mount("tmpfs", cfg.RunDir, "tmpfs", 0, ""))
	_, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0)
	try("io_uring", errno)
	_, err = os.ReadFile(cfg.VMX)
	try("its own VMX", err)
	_ = os.WriteFile(filepath.Join(cfg.RunDir, "escapes"), out.Bytes(), 0o600)
}

// fakeGuests stands for libvirt and QEMU: a guest has a connection to each of its
// disks, pauses when one breaks, and on Resume connects again.
type fakeGuests struct {
	mu      sync.Mutex
	guests  map[string]*fakeGuest
	resumed int
	down    error // of libvirtd
	lost    bool  // Start succeeds and its answer is lost
	events  []chan domain.Event
}

type fakeGuest struct {
	spec  domain.Spec
	state domain.State
	conns []net.Conn
}

func newGuests() *fakeGuests { return &fakeGuests{guests: map[string]*fakeGuest{}} }

func (f *fakeGuests) tell(id string, st domain.State) {
	if g := f.guests[id]; g != nil {
		g.state = st
	}
	for _, c := range f.events {
		c <- domain.Event{UUID: id, State: st}
	}
}

// connect opens the guest's disks.
func (f *fakeGuests) connect(g *fakeGuest) error {
	for _, d := range g.spec.Disks {
		c, err := net.Dial("unix", d.Socket)
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(c, make([]byte, 18)); err != nil { // NBDMAGIC IHAVEOPT flags
			return err
		}
		g.conns = append(g.conns, c)
		go func() {
			c.Read(make([]byte, 1)) // ends with the connection
			f.mu.Lock()
			defer f.mu.Unlock()
			if slices.Contains(g.conns, c) && f.guests[g.spec.UUID] == g && g.state == domain.Running {
				f.tell(g.spec.UUID, domain.PausedOnError)
			}
		}()
	}
	return nil
}

func (g *fakeGuest) disconnect() {
	for _, c := range g.conns {
		c.Close()
	}
	g.conns = nil
}

func (f *fakeGuests) Running(context.Context) (ids []string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id := range f.guests {
		ids = append(ids, id)
	}
	return ids, f.down
}

func (f *fakeGuests) Start(_ context.Context, spec domain.Spec) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.down != nil {
		return f.down
	}
	if f.guests[spec.UUID] != nil {
		return domain.ErrAlreadyRunning
	}
	if err := spec.Validate(); err != nil {
		return err
	}
	g := &fakeGuest{spec: spec}
	if err := f.connect(g); err != nil {
		return err
	}
	f.guests[spec.UUID] = g
	f.tell(spec.UUID, domain.Running)
	if f.lost {
		return domain.ErrUnavailable
	}
	return nil
}

func (f *fakeGuests) PowerOff(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if g := f.guests[id]; g != nil {
		g.state = domain.Off
		g.disconnect()
		delete(f.guests, id)
		f.tell(id, domain.Off)
	}
	return nil
}

func (f *fakeGuests) Resume(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resumed++
	g := f.guests[id]
	if g == nil {
		return domain.ErrNotRunning
	}
	g.disconnect()
	if err := f.connect(g); err != nil {
		g.disconnect()
		return nil // it paused again
	}
	f.tell(id, domain.Running)
	return nil
}

func (f *fakeGuests) State(_ context.Context, id string) (domain.State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if g := f.guests[id]; g != nil {
		return g.state, f.down
	}
	return domain.Off, f.down
}

func (f *fakeGuests) Events(ctx context.Context) <-chan domain.Event {
	f.mu.Lock()
	defer f.mu.Unlock()
	in, out := make(chan domain.Event, 1000), make(chan domain.Event)
	for id, g := range f.guests {
		in <- domain.Event{UUID: id, State: g.state}
	}
	f.events = append(f.events, in)
	go func() {
		defer close(out)
		for {
			select {
			case ev := <-in:
				select {
				case out <- ev:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

func (f *fakeGuests) Shutdown(ctx context.Context, id string) error { return f.PowerOff(ctx, id) }
func (f *fakeGuests) Reset(context.Context, string) error           { return nil }
func (f *fakeGuests) HostInfo(context.Context) (domain.HostInfo, error) {
	return domain.HostInfo{Hypervisor: "fake", Cores: 1}, nil
}
func (f *fakeGuests) Networks(context.Context) ([]domain.Network, error) { return nil, nil }

func (f *fakeGuests) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// A lab is a host: an agent behind gRPC, and a caller in center's place.
type lab struct {
	*testing.T
	hostapi.HostClient
	cfg    Config
	guests *fakeGuests
	store  string
	agent  *Agent
	srv    *grpc.Server
	keks   map[string][]byte
}

func newLab(t *testing.T) *lab {
	dir, err := os.MkdirTemp("", "mth") // short, for socket paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &lab{T: t, guests: newGuests(), store: filepath.Join(dir, "ds"), keks: map[string][]byte{}}
	ds := Datastore{Name: "ds1", Path: l.store}
	if err := errors.Join(os.Mkdir(l.store, 0o700), InitDatastore(ds)); err != nil {
		t.Fatal(err)
	}
	l.cfg = Config{
		Name: "esx1", UUID: uuid.NewString(), Version: "test", RunDir: filepath.Join(dir, "run"), Datastores: []Datastore{ds},
		Executable: os.Args[0], VMXEnv: append(os.Environ(), actAsVMX+"=1", "GORACE=atexit_sleep_ms=0"), Guests: l.guests,
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Now: time.Now,
	}
	t.Cleanup(func() { // no vmx outlives its test
		l.stopAgent()
		for id := range l.guests.guests {
			l.guests.PowerOff(context.Background(), id)
		}
		if a, err := Start(context.Background(), l.cfg); err != nil {
			t.Error(err)
		} else {
			a.Stop()
		}
		if left, _ := os.ReadDir(filepath.Join(l.cfg.RunDir, "vm")); len(left) > 0 {
			t.Errorf("left in the run folder: %v", left)
		}
	})
	l.startAgent()
	return l
}

func (l *lab) startAgent() {
	l.Helper()
	var err error
	if l.agent, err = Start(context.Background(), l.cfg); err != nil {
		l.Fatal(err)
	}
	in := bufconn.Listen(1 << 20)
	l.srv = grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage))
	Register(l.srv, l.agent)
	go l.srv.Serve(in)
	c, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return in.DialContext(ctx) }))
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { c.Close() })
	l.HostClient = hostapi.NewHostClient(c)
}

func (l *lab) stopAgent() {
	l.srv.Stop()
	l.agent.Stop()
}

func (l *lab) push(name string, vms ...string) *hostapi.KeyID {
	l.Helper()
	if l.keks[name] == nil {
		l.keks[name] = make([]byte, keysafe.KEKSize)
		rand.Read(l.keks[name])
	}
	id := &hostapi.KeyID{Provider: "kms", Key: name}
	if _, err := l.PushKeys(l.Context(), &hostapi.PushKeysRequest{Keys: []*hostapi.KEK{{Id: id, Bytes: bytes.Clone(l.keks[name]), VmUuids: vms}}}); err != nil {
		l.Fatal(err)
	}
	return id
}

const diskSize = 4 << 20

// A testVM is an encrypted VM with one disk.
type testVM struct {
	*lab
	id, disk string
	ref      *hostapi.VMRef
	killed   int // the vmx that kill killed
}

func (l *lab) createVM(name, firmware string) *testVM {
	l.Helper()
	v := &testVM{lab: l, id: uuid.NewString(), disk: uuid.NewString()}
	key := l.push("k1", v.id)
	info, err := l.CreateVM(l.Context(), &hostapi.CreateVMRequest{
		Uuid: v.id, Name: name, Datastore: "ds1", Folder: name, HomeKey: key, Hardware: &hostapi.Hardware{Firmware: firmware},
		Disks: []*hostapi.NewDisk{{Uuid: v.disk, CapacityBytes: diskSize, KeyId: key}},
	})
	if err != nil {
		l.Fatal(err)
	}
	if !info.Encrypted || !info.Disks[0].Encrypted || info.Locked || !info.Runtime.HasKeys {
		l.Fatalf("created: %v", info)
	}
	v.ref = info.Ref
	return v
}

func (v *testVM) request() *hostapi.PowerRequest { return &hostapi.PowerRequest{Ref: v.ref} }

func (v *testVM) powerOn() {
	v.Helper()
	info, err := v.PowerOn(v.Context(), v.request())
	if err != nil {
		v.Fatal(err)
	}
	if info.Runtime.Power != hostapi.PowerState_POWERED_ON || info.Runtime.BootTimeUnix == 0 {
		v.Fatalf("powered on: %v", info.Runtime)
	}
}

func (v *testVM) powerOff() {
	v.Helper()
	if _, err := v.PowerOff(v.Context(), v.request()); err != nil {
		v.Fatal(err)
	}
}

func (v *testVM) importData(offset int64, data []byte) (*hostapi.ImportReply, error) {
	s, err := v.ImportDisk(v.Context())
	if err != nil {
		return nil, err
	}
	_ = s.Send(&hostapi.ImportChunk{Ref: v.ref, DiskUuid: v.disk}) // CloseAndRecv says why
	_ = s.Send(&hostapi.ImportChunk{Offset: offset, Data: data})
	return s.CloseAndRecv()
}

func (v *testVM) reconfigure(r *hostapi.ReconfigureVMRequest) (info *hostapi.VMInfo, err error) {
	r.Ref = v.ref
	s, err := v.ReconfigureVM(v.Context(), r)
	if err != nil {
		return nil, err
	}
	for {
		u, err := s.Recv()
		if err == io.EOF {
			return info, nil
		}
		if err != nil {
			return nil, err
		}
		info = u.Result
	}
}

// recrypt is a change of VM files and disk.
func (v *testVM) recrypt(kind hostapi.CryptoChange_Kind, key *hostapi.KeyID) *hostapi.ReconfigureVMRequest {
	c := &hostapi.CryptoChange{Kind: kind, Key: key}
	return &hostapi.ReconfigureVMRequest{Home: c, Disks: []*hostapi.DiskCryptoChange{{DiskUuid: v.disk, Change: c}}}
}

// vmx is the process that serves the VM.
func (v *testVM) vmx() *process {
	v.Helper()
	p, err := adopt(v.agent.vmDir(v.id))
	if err != nil {
		v.Fatalf("no vmx of VM %s: %v", v.id, err)
	}
	v.Cleanup(func() { p.conn.Close() })
	return p
}

func (v *testVM) kill() {
	v.Helper()
	p := v.vmx()
	if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil {
		v.Fatal(err)
	}
	<-p.exited
	v.killed = p.pid
}

func (v *testVM) runtime() *hostapi.VMRuntime {
	v.Helper()
	info, err := v.InspectVM(v.Context(), &hostapi.InspectVMRequest{Ref: v.ref})
	if err != nil {
		v.Fatal(err)
	}
	return info.Runtime
}

func (l *lab) until(what string, ok func() bool) {
	l.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			l.Fatalf("not after 20 s: %s", what)
		}
	}
}

// goesOn waits until the guest runs with its disk connected.
func (v *testVM) goesOn() {
	v.Helper()
	v.until("the guest runs", func() bool {
		st, _ := v.guests.State(v.Context(), v.id)
		p, err := adopt(v.agent.vmDir(v.id))
		if err != nil {
			return false
		}
		p.conn.Close()
		r := v.runtime()
		return p.pid != v.killed && st == domain.Running && !r.PausedOnError && r.Power == hostapi.PowerState_POWERED_ON
	})
}

func (l *lab) keys() (names []string) {
	l.Helper()
	r, err := l.ListKeys(l.Context(), &hostapi.ListKeysRequest{})
	if err != nil {
		l.Fatal(err)
	}
	for _, k := range r.Keys {
		names = append(names, k.Id.Key)
	}
	slices.Sort(names)
	return names
}

func (l *lab) wantFault(what string, err error, kind hostapi.Fault_Kind, text string) *hostapi.Fault {
	l.Helper()
	if err == nil {
		l.Fatalf("%s: no error", what)
	}
	f, msg := hostapi.AsFault(err)
	if f.Kind != kind || !strings.Contains(msg, text) {
		l.Errorf("%s: %v %q; want %v and %q", what, f.Kind, msg, kind, text)
	}
	return f
}

// watch collects events until the test ends.
func (l *lab) watch() func() []*hostapi.HostEvent {
	l.Helper()
	s, err := l.Watch(l.Context(), &hostapi.WatchRequest{})
	if err != nil {
		l.Fatal(err)
	}
	var mu sync.Mutex
	var all []*hostapi.HostEvent
	go func() {
		for {
			ev, err := s.Recv()
			if err != nil {
				return
			}
			mu.Lock()
			all = append(all, ev)
			mu.Unlock()
		}
	}()
	return func() []*hostapi.HostEvent {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

func hasAlarm(events []*hostapi.HostEvent, text string) bool {
	return slices.ContainsFunc(events, func(ev *hostapi.HostEvent) bool {
		return ev.Kind == hostapi.HostEvent_ALARM && strings.Contains(ev.Message, text)
	})
}
