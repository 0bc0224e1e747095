// Package e2e runs whole parts of Mortise on real libvirt, QEMU and Linux
// guests. It needs root and the packages of build/packages.sh test.
package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"mortise/internal/dev"
	"mortise/internal/domain"
	"mortise/internal/host"
	"mortise/internal/hostapi"
	"mortise/test/guest"
)

// binary is the real program: the one that MORTISE_BINARY names, or built now.
func binary(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("MORTISE_BINARY"); path != "" {
		return path
	}
	dir := shortDir(t)
	out := filepath.Join(dir, "mortise")
	cmd := exec.Command("go", "build", "-o", out, "mortise/cmd/mortise")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building mortise: %v\n%s", err, text)
	}
	return out
}

// shortDir is a folder whose socket paths fit; t.TempDir's may not.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "mtse")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A testHost is a host agent with a libvirtd of its own, and a caller in
// center's place.
type testHost struct {
	*testing.T
	dir   string
	cfg   host.Config
	virt  *dev.Libvirtd
	agent *host.Agent
	srv   *grpc.Server
	hostapi.HostClient
	keks map[string][]byte
}

func startHost(t *testing.T) *testHost {
	dir := shortDir(t)
	h := &testHost{T: t, dir: dir, keks: map[string][]byte{}}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	run, store := filepath.Join(dir, "run"), filepath.Join(dir, "ds")
	for _, d := range []string{run, store} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	virt, err := dev.StartLibvirtd(t.Context(), dev.LibvirtdConfig{Dir: filepath.Join(dir, "virt"), Name: "esx1", Shared: []string{run}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	h.virt = virt
	t.Cleanup(func() {
		if err := virt.Stop(context.Background(), true); err != nil {
			t.Error(err)
		}
	})
	ds := host.Datastore{Name: "ds1", Path: store}
	if err := host.InitDatastore(ds); err != nil {
		t.Fatal(err)
	}
	h.cfg = host.Config{
		Name: "esx1", UUID: uuid.NewString(), Version: "test", RunDir: run, Datastores: []host.Datastore{ds},
		Executable: binary(t), VMXArgs: []string{"vmx"}, Logger: log, Now: time.Now,
	}
	h.startAgent()
	return h
}

// startAgent starts the agent, the first or one that takes over.
func (h *testHost) startAgent() {
	h.Helper()
	conn, err := domain.Connect(h.Context(), domain.Config{Socket: h.virt.Socket(), Log: h.cfg.Logger})
	if err != nil {
		h.Fatal(err)
	}
	h.cfg.Guests = conn
	if h.agent, err = host.Start(context.Background(), h.cfg); err != nil {
		h.Fatal(err)
	}
	l := bufconn.Listen(1 << 20)
	h.srv = grpc.NewServer(grpc.MaxRecvMsgSize(4 << 20))
	host.Register(h.srv, h.agent)
	go h.srv.Serve(l)
	c, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		h.Fatal(err)
	}
	h.HostClient = hostapi.NewHostClient(c)
	agent := h.agent
	h.Cleanup(func() { c.Close(); h.srv.Stop(); agent.Stop(); conn.Close() })
}

func (h *testHost) stopAgent() { h.srv.Stop(); h.agent.Stop() }

// push gives the host a KEK for a VM, as center does.
func (h *testHost) push(name string, vm string) *hostapi.KeyID {
	h.Helper()
	if h.keks[name] == nil {
		h.keks[name] = make([]byte, 32)
		rand.Read(h.keks[name])
	}
	id := &hostapi.KeyID{Provider: "kms", Key: name}
	if _, err := h.PushKeys(h.Context(), &hostapi.PushKeysRequest{Keys: []*hostapi.KEK{{Id: id, Bytes: bytes.Clone(h.keks[name]), VmUuids: []string{vm}}}}); err != nil {
		h.Fatal(err)
	}
	return id
}

// importRaw writes an image into a VM's disk, as center relays it.
func (h *testHost) importRaw(ref *hostapi.VMRef, disk, image string) {
	h.Helper()
	data, err := os.ReadFile(image)
	if err != nil {
		h.Fatal(err)
	}
	s, err := h.ImportDisk(h.Context())
	if err != nil {
		h.Fatal(err)
	}
	if err := s.Send(&hostapi.ImportChunk{Ref: ref, DiskUuid: disk}); err != nil {
		h.Fatal(err)
	}
	for off := 0; off < len(data); off += 1 << 20 {
		piece := data[off:min(off+1<<20, len(data))]
		if len(bytes.Trim(piece, "\x00")) == 0 {
			continue
		}
		if s.Send(&hostapi.ImportChunk{Offset: int64(off), Data: piece}) != nil {
			break
		}
	}
	if _, err := s.CloseAndRecv(); err != nil {
		h.Fatal(err)
	}
}

func (h *testHost) console(ref *hostapi.VMRef) *guest.Agent {
	h.Helper()
	s, err := h.Console(h.Context())
	if err != nil {
		h.Fatal(err)
	}
	if err := s.Send(&hostapi.ConsoleData{Ref: ref}); err != nil {
		h.Fatal(err)
	}
	return guest.NewAgent(&line{t: h.T, s: s})
}

type line struct {
	t    *testing.T
	s    hostapi.Host_ConsoleClient
	rest []byte
}

func (l *line) Read(p []byte) (int, error) {
	for len(l.rest) == 0 {
		m, err := l.s.Recv()
		if err != nil {
			if l.t.Context().Err() == nil {
				l.t.Logf("console: %v", err)
			}
			return 0, err
		}
		l.rest = m.Data
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

func (l *line) Write(p []byte) (int, error) {
	return len(p), l.s.Send(&hostapi.ConsoleData{Data: bytes.Clone(p)})
}

func (h *testHost) do(a *guest.Agent, command string) guest.Answer {
	h.Helper()
	ctx, cancel := context.WithTimeout(h.Context(), 90*time.Second)
	defer cancel()
	ans, err := a.Do(ctx, command)
	if err != nil {
		h.Fatalf("guest: %s: %v\n%s", command, err, a.Console())
	}
	return ans
}

// vmxPID finds the process that serves a VM.
func (h *testHost) vmxPID(vm string) int {
	h.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		h.Fatal(err)
	}
	for _, e := range entries {
		text, err := os.ReadFile(e)
		if err == nil && bytes.Contains(text, []byte(filepath.Join(h.cfg.RunDir, "vm", vm))) && bytes.Contains(text, []byte("\x00vmx\x00")) {
			pid, err := strconv.Atoi(strings.Split(e, "/")[2])
			if err != nil {
				h.Fatal(err)
			}
			return pid
		}
	}
	h.Fatalf("no vmx of VM %s", vm)
	return 0
}

// TestHostRunsEncryptedGuest is the host's half of the main job: a real guest
// boots from an encrypted disk, and neither the death of its vmx, nor of the
// agent, nor of both stops it (design §4 Failure).
func TestHostRunsEncryptedGuest(t *testing.T) {
	t.Parallel()
	img, err := guest.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h := startHost(t)
	vm, disk := uuid.NewString(), uuid.NewString()
	k1 := h.push("k1", vm)
	st, err := os.Stat(img.Raw)
	if err != nil {
		t.Fatal(err)
	}
	info, err := h.CreateVM(t.Context(), &hostapi.CreateVMRequest{
		Uuid: vm, Name: "web1", Datastore: "ds1", Folder: "web1", HomeKey: k1,
		Hardware: &hostapi.Hardware{MemoryMib: 256, Cpus: 1},
		Disks:    []*hostapi.NewDisk{{Uuid: disk, CapacityBytes: st.Size(), KeyId: k1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if !info.Encrypted || !info.Disks[0].Encrypted || info.Locked {
		t.Fatalf("not encrypted, or locked: %v", info)
	}
	ref := info.Ref
	h.importRaw(ref, disk, img.Raw)
	if _, err := h.PowerOn(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	g := h.console(ref)
	boot, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := g.Boot(boot); err != nil {
		t.Fatalf("%v\n%s", err, g.Console())
	}
	h.do(g, "marker write")
	h.do(g, "io start")

	t.Log("kill vmx")
	if err := syscall.Kill(h.vmxPID(vm), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.waitProgress(g)

	t.Log("restart the agent")
	h.stopAgent()
	h.startAgent()
	g = h.console(ref)
	h.waitProgress(g)
	if keys, err := h.ListKeys(t.Context(), &hostapi.ListKeysRequest{}); err != nil || len(keys.Keys) != 1 {
		t.Errorf("the new agent took %v back from the vmx: %v", keys, err)
	}

	t.Log("kill both; the keys come from center")
	h.stopAgent()
	if err := syscall.Kill(h.vmxPID(vm), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.startAgent()
	g = h.console(ref)
	time.Sleep(2 * time.Second)
	h.push("k1", vm)
	h.waitProgress(g)

	h.runsBack(g, ref, disk)

	if a := h.do(g, "io stop"); a.Values["errors"] != "0" {
		t.Errorf("the guest saw errors: %v", a)
	}
	if a := h.do(g, "io scan"); a.Values["torn"] != "0" {
		t.Errorf("torn blocks: %v", a)
	}
	t.Log("shallow recrypt under the guest")
	k2 := h.push("k2", vm)
	res := h.reconfigure(&hostapi.ReconfigureVMRequest{
		Ref: ref, Home: &hostapi.CryptoChange{Kind: hostapi.CryptoChange_SHALLOW_RECRYPT, Key: k2},
		Disks: []*hostapi.DiskCryptoChange{{DiskUuid: disk, Change: &hostapi.CryptoChange{Kind: hostapi.CryptoChange_SHALLOW_RECRYPT, Key: k2}}},
	})
	if res.Key.Key != "k2" || res.Disks[0].KeyId.Key != "k2" {
		t.Errorf("keys after the shallow recrypt: %v, %v", res.Key, res.Disks[0].KeyId)
	}
	if keys, err := h.ListKeys(t.Context(), &hostapi.ListKeysRequest{}); err != nil || len(keys.Keys) != 1 || keys.Keys[0].Id.Key != "k2" {
		t.Errorf("the old key is still in the cache: %v, %v", keys, err)
	}
	h.do(g, "marker write")
	if _, err := h.PowerOff(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.PowerOn(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.PowerOn(t.Context(), &hostapi.PowerRequest{Ref: ref}); err == nil {
		t.Error("a second power-on was allowed")
	}
	if _, err := h.PowerOff(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	for _, needle := range []string{"MORTISE-MARKER", "MORTISE-IO", guest.Plaintext} {
		if err := exec.Command("grep", "-rq", needle, filepath.Join(h.dir, "ds", "web1")).Run(); err == nil {
			t.Errorf("%q is on the datastore in clear", needle)
		}
	}
}

// runsBack gives a busy guest's disk a new key, slowly, pauses that, cancels it in
// the middle, and has it run back: the disk has its old key, and the guest noticed
// nothing.
func (h *testHost) runsBack(g *guest.Agent, ref *hostapi.VMRef, disk string) {
	h.Helper()
	h.Log("deep recrypt under the guest: held back, paused, cancelled, run back")
	pace := func(p *hostapi.Pace) {
		h.Helper()
		if _, err := h.SetPace(h.Context(), &hostapi.PaceRequest{Ref: ref, Pace: p}); err != nil {
			h.Fatal(err)
		}
	}
	r := &hostapi.ReconfigureVMRequest{Ref: ref, Pace: &hostapi.Pace{LimitBytesPerSecond: 1 << 20}, Disks: []*hostapi.DiskCryptoChange{{DiskUuid: disk,
		Change: &hostapi.CryptoChange{Kind: hostapi.CryptoChange_DEEP_RECRYPT, Key: h.push("k3", ref.Uuid)},
		Before: &hostapi.Before{Encrypted: true, Key: h.push("k1", ref.Uuid)}}}}
	ctx, cancel := context.WithCancel(h.Context())
	defer cancel()
	s, err := h.ReconfigureVM(ctx, r)
	if err != nil {
		h.Fatal(err)
	}
	for at := int64(0); at == 0; {
		u, err := s.Recv()
		if err != nil {
			h.Fatal(err)
		}
		if at = u.DoneBytes; at > 0 && at >= u.TotalBytes {
			h.Fatal("a limit did not hold it back")
		}
	}
	pace(&hostapi.Pace{Paused: true})
	h.waitProgress(g)
	pace(&hostapi.Pace{LimitBytesPerSecond: 4 << 20})
	cancel()
	h.waitProgress(g)
	r.Undo, r.Pace = true, nil
	var res *hostapi.VMInfo
	for began := time.Now(); res == nil; time.Sleep(100 * time.Millisecond) {
		s, err := h.ReconfigureVM(h.Context(), r)
		back := false
		for err == nil {
			var u *hostapi.Progress
			if u, err = s.Recv(); err == nil {
				back = back || u.Back && u.DoneBytes > 0
				res = u.Result
			}
		}
		if f, _ := hostapi.AsFault(err); res == nil && (f.Kind != hostapi.Fault_BUSY || time.Since(began) > time.Minute) { // the call before may be ending
			h.Fatal(err)
		}
		if res != nil && !back {
			h.Error("nothing was told of the way back")
		}
	}
	if d := res.Disks[0]; d.KeyId.Key != "k1" || d.Conversion != "" {
		h.Errorf("after running back: %v", d)
	}
	h.waitProgress(g)
}

// waitProgress waits until the guest's writer has written more.
func (h *testHost) waitProgress(g *guest.Agent) {
	h.Helper()
	began := time.Now()
	first, _ := strconv.Atoi(h.do(g, "io status").Values["written"])
	for time.Since(began) < 90*time.Second {
		a := h.do(g, "io status")
		if n, _ := strconv.Atoi(a.Values["written"]); n > first+2 {
			h.Logf("guest goes on after %v: %d blocks", time.Since(began).Round(100*time.Millisecond), n)
			return
		}
		time.Sleep(300 * time.Millisecond)
	}
	h.Fatalf("the guest does not go on\n%s", g.Console())
}

func (h *testHost) reconfigure(r *hostapi.ReconfigureVMRequest) (info *hostapi.VMInfo) {
	h.Helper()
	s, err := h.ReconfigureVM(h.Context(), r)
	if err != nil {
		h.Fatal(err)
	}
	for {
		u, err := s.Recv()
		if err == io.EOF {
			return info
		}
		if err != nil {
			h.Fatal(err)
		}
		info = u.Result
	}
}
