package host

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"mortise/internal/domain"
	"mortise/internal/hostapi"
	"mortise/internal/vmx"
)

const (
	shallow = hostapi.CryptoChange_SHALLOW_RECRYPT
	deep    = hostapi.CryptoChange_DEEP_RECRYPT
	decrypt = hostapi.CryptoChange_DECRYPT
)

// TestVMLife runs a VM through every command, with what each is refused for.
func TestVMLife(t *testing.T) {
	l := newLab(t)
	events := l.watch()
	v := l.createVM("web1", "bios")
	data := bytes.Repeat([]byte("SECRET! "), 64<<10)
	if r, err := v.importData(0, bytes.Clone(data)); err != nil || r.WrittenBytes != int64(len(data)) {
		t.Fatal(r, err)
	}
	_, err := v.importData(diskSize-512, make([]byte, 1024))
	l.wantFault("import beyond the disk", err, hostapi.Fault_INVALID, "larger")
	_, err = v.importData(1<<62, make([]byte, 512))
	l.wantFault("import far beyond the disk", err, hostapi.Fault_INVALID, "larger")
	_, err = v.importData(0, make([]byte, 100))
	l.wantFault("import of half a sector", err, hostapi.Fault_INVALID, "sectors")

	v.powerOn()
	_, err = v.PowerOn(t.Context(), v.request())
	l.wantFault("second power-on", err, hostapi.Fault_WRONG_POWER_STATE, "already")
	_, err = v.importData(0, data)
	l.wantFault("import under a guest", err, hostapi.Fault_WRONG_POWER_STATE, "powered on")
	_, err = v.DeleteVM(t.Context(), v.request())
	l.wantFault("delete under a guest", err, hostapi.Fault_WRONG_POWER_STATE, "powered on")
	_, err = v.Release(t.Context(), v.request())
	l.wantFault("release under a guest", err, hostapi.Fault_WRONG_POWER_STATE, "powered on")
	moved := &hostapi.PowerRequest{Ref: &hostapi.VMRef{Uuid: v.id, Datastore: "ds1", Path: "other/other.vmx"}}
	_, err = v.Reset(t.Context(), moved)
	l.wantFault("the same VM elsewhere", err, hostapi.Fault_INVALID, "runs from")

	// Shallow under the guest; the old key leaves cache and vmx (K9).
	info, err := v.reconfigure(v.recrypt(shallow, l.push("k2", v.id)))
	if err != nil || info.Key.Key != "k2" || info.Disks[0].KeyId.Key != "k2" {
		t.Fatalf("shallow recrypt: %v, %v", info, err)
	}
	if got := l.keys(); !slices.Equal(got, []string{"k2"}) {
		t.Errorf("after a recrypt the cache holds %v", got)
	}
	held, err := v.vmx().Keys(t.Context(), &hostapi.KeysRequest{})
	if err != nil || len(held.Keys) != 1 || held.Keys[0].Id.Key != "k2" {
		t.Errorf("after a recrypt the vmx holds %d keys: %v", len(held.Keys), err)
	}
	_, err = v.reconfigure(v.recrypt(shallow, &hostapi.KeyID{Provider: "kms", Key: "nowhere"}))
	if f := l.wantFault("recrypt to a key that is not here", err, hostapi.Fault_MISSING_KEYS, "nowhere"); len(f.Missing) != 1 || f.Missing[0].Key != "nowhere" {
		t.Errorf("missing: %v", f.Missing)
	}
	if r := v.runtime(); !r.HasKeys {
		t.Errorf("a failed recrypt left the running VM without keys: %v", r)
	}
	v.powerOff()
	v.powerOff() // again is no error
	_, err = v.Reset(t.Context(), v.request())
	l.wantFault("reset", err, hostapi.Fault_WRONG_POWER_STATE, "powered off")

	if info, err = v.reconfigure(v.recrypt(deep, l.push("k3", v.id))); err != nil || info.Key.Key != "k3" {
		t.Fatalf("deep recrypt: %v, %v", info, err)
	}
	if info, err = v.reconfigure(v.recrypt(decrypt, nil)); err != nil || info.Encrypted || info.Disks[0].Encrypted {
		t.Fatalf("decrypt: %v, %v", info, err)
	}
	if got := l.keys(); len(got) > 0 {
		t.Errorf("after the decryption the cache holds %v", got)
	}
	flat, err := os.ReadFile(filepath.Join(l.store, "web1", "web1-flat.vmdk"))
	if err != nil || !bytes.Equal(flat[:len(data)], data) || len(bytes.Trim(flat[len(data):], "\x00")) > 0 {
		t.Errorf("the decrypted disk reads otherwise: %v", err)
	}

	other := &hostapi.PowerRequest{Ref: &hostapi.VMRef{Uuid: uuid.NewString(), Datastore: "ds1", Path: v.ref.Path}}
	_, err = v.DeleteVM(t.Context(), other)
	l.wantFault("delete of another VM's folder", err, hostapi.Fault_TAMPERED, "nothing was removed")
	if r, err := v.DeleteVM(t.Context(), v.request()); err != nil || len(r.LeftBehind) > 0 {
		t.Errorf("delete: %v, %v", r, err)
	}
	if _, err := os.Stat(filepath.Join(l.store, "web1")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is there: %v", err)
	}

	var on, off bool
	for _, ev := range events() {
		on = on || ev.Vm.GetPower() == hostapi.PowerState_POWERED_ON
		off = off || on && ev.Vm.GetPower() == hostapi.PowerState_POWERED_OFF
	}
	if !on || !off {
		t.Errorf("the watcher was not told of power-on and power-off")
	}
}

// TestKeysGo checks K9: a key is wiped with the last VM that is released or
// deleted, and power-on then names what is missing.
func TestKeysGo(t *testing.T) {
	l := newLab(t)
	a, b := l.createVM("a", "bios"), l.createVM("b", "bios")
	r, err := l.Release(t.Context(), a.request())
	if err != nil || len(r.Wiped) > 0 || len(l.keys()) != 1 {
		t.Errorf("release of one of two: wiped %v, %v", r.GetWiped(), err)
	}
	_, err = l.PowerOn(t.Context(), a.request())
	if f := l.wantFault("power-on without a key", err, hostapi.Fault_MISSING_KEYS, "k1"); len(f.Missing) != 1 || f.Missing[0].Key != "k1" {
		t.Errorf("missing: %v", f.Missing)
	}
	info, err := l.InspectVM(t.Context(), &hostapi.InspectVMRequest{Ref: a.ref})
	if err != nil || !info.Locked || !strings.Contains(info.LockedReason, "k1") {
		t.Errorf("not locked: %v, %v", info, err)
	}
	if d, err := l.DeleteVM(t.Context(), b.request()); err != nil || len(d.Wiped) != 1 || len(l.keys()) != 0 {
		t.Errorf("delete of the last: %v, %v, cache %v", d, err, l.keys())
	}
	l.push("k1", a.id)
	a.powerOn()
	if reply, err := l.RemoveKeys(t.Context(), &hostapi.RemoveKeysRequest{VmUuid: b.id, Keys: []*hostapi.KeyID{{Provider: "kms", Key: "k1"}, {Provider: "kms", Key: "unknown"}}}); err != nil || len(reply.StillUsed) != 1 || reply.StillUsed[0].Key != "k1" {
		t.Errorf("removing keys of b: %v, %v", reply, err)
	}
	a.powerOff()
}

// TestUnreadableDiskKeepsKeys: a key goes only when nothing needs it for certain.
func TestUnreadableDiskKeepsKeys(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	if _, err := v.reconfigure(&hostapi.ReconfigureVMRequest{Disks: v.recrypt(shallow, l.push("k2", v.id)).Disks}); err != nil {
		t.Fatal(err)
	}
	desc := filepath.Join(l.store, "web1", "web1.vmdk")
	if err := os.Rename(desc, desc+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := v.reconfigure(&hostapi.ReconfigureVMRequest{Name: "renamed"}); err == nil {
		t.Error("a VM without its disk was reconfigured")
	}
	if err := os.Rename(desc+".away", desc); err != nil {
		t.Fatal(err)
	}
	v.powerOn()
	v.powerOff()
}

// TestVMXKilled: a vmx that dies under a guest is started again and the guest
// resumed (design §4 Failure).
func TestVMXKilled(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	v.powerOn()
	for range 3 {
		v.kill()
		v.goesOn()
	}
	if l.guests.resumed == 0 {
		t.Error("nobody resumed the guest")
	}
	// Power-off in the middle of a restart.
	v.kill()
	v.powerOff()
	v.powerOn()
	v.powerOff()
	if _, err := os.Stat(l.agent.vmDir(v.id)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the run folder is left: %v", err)
	}
}

// TestDirectIO: what the host is told reaches its vmx processes.
func TestDirectIO(t *testing.T) {
	l := newLab(t)
	l.stopAgent()
	l.cfg.DirectIO = true
	l.startAgent()
	if err := l.agent.storageFor(t.Context(), "ds1", "", nil); err != nil {
		t.Skipf("the folder for tests cannot: %v", err)
	}
	v := l.createVM("web1", "bios")
	v.powerOn()
	if args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", v.vmx().pid)); err != nil || !strings.Contains(string(args), "--direct-io") {
		t.Errorf("its arguments: %q, %v", args, err)
	}
	v.powerOff()
}

// TestAgentRestarts: the next agent adopts what runs, keys included; when both
// died it waits for center's keys, and says which.
func TestAgentRestarts(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	v.powerOn()
	boot := v.runtime().BootTimeUnix
	pid := v.vmx().pid
	if _, err := Start(t.Context(), l.cfg); err == nil || !strings.Contains(err.Error(), "another host agent") {
		t.Errorf("a second agent on the run folder: %v", err)
	}
	l.stopAgent()
	l.startAgent()
	if r := v.runtime(); r.Power != hostapi.PowerState_POWERED_ON || r.BootTimeUnix != boot || v.vmx().pid != pid {
		t.Errorf("not adopted: %v", r)
	}
	if got := l.keys(); !slices.Equal(got, []string{"k1"}) {
		t.Errorf("keys taken back: %v", got)
	}
	l.stopAgent()
	v.kill()
	l.startAgent()
	l.until("the agent says what is missing", func() bool {
		r := v.runtime()
		return r.Power == hostapi.PowerState_POWERED_ON && r.PausedOnError && len(r.Missing) == 1 && strings.Contains(r.Problem, "k1")
	})
	_, err := v.reconfigure(&hostapi.ReconfigureVMRequest{Name: "x", Hardware: &hostapi.Hardware{}})
	l.wantFault("reconfigure without keys", err, hostapi.Fault_MISSING_KEYS, "k1")
	l.push("k1", v.id)
	v.goesOn()
	if r := v.runtime(); r.Problem != "" || !r.HasKeys {
		t.Errorf("after the keys came: %v", r)
	}
	// The guest ends while no agent looks; the next one lets go.
	l.stopAgent()
	l.guests.PowerOff(t.Context(), v.id)
	l.startAgent()
	if r := v.runtime(); r.Power != hostapi.PowerState_POWERED_OFF {
		t.Errorf("the guest ended and is %v", r)
	}
	l.push("k1", v.id)
	v.powerOn()
	v.powerOff()
}

// TestExpectationOutlivesAgent: what center expects changes with an operation
// under the guest; a vmx started later, by the next agent, must be held to that.
func TestExpectationOutlivesAgent(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	expect := func(converting bool) {
		v.ref.Expect = &hostapi.Expect{Encrypted: true, Epoch: 1, Disks: []*hostapi.DiskExpect{{Uuid: v.disk, Encrypted: true, Epoch: 1, Converting: converting}}}
	}
	expect(false)
	v.powerOn()
	expect(true)
	info, err := v.reconfigure(&hostapi.ReconfigureVMRequest{Disks: v.recrypt(decrypt, nil).Disks})
	if err != nil || info.Disks[0].Encrypted {
		t.Fatalf("decrypting a disk under its guest: %v, %v", info, err)
	}
	l.stopAgent()
	v.kill()
	l.startAgent()
	l.push("k1", v.id)
	v.goesOn()
}

// TestGuestEnds by itself, also while libvirt is away: the disks are let go of
// only on libvirt's word.
func TestGuestEnds(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	v.powerOn()
	m := l.agent.held(v.id)
	l.guests.set(func() { l.guests.down = domain.ErrUnavailable })
	m.guestChanged(domain.Event{UUID: v.id, State: domain.Off}) // an old event
	time.Sleep(300 * time.Millisecond)
	if !m.isOn() || !v.vmx().alive() {
		t.Fatal("closed under a guest that may run")
	}
	l.guests.set(func() { l.guests.down = nil })
	time.Sleep(1200 * time.Millisecond)
	if !m.isOn() {
		t.Fatal("closed under a guest that runs")
	}
	l.agent.drop(m)
	if _, err := l.Shutdown(t.Context(), v.request()); err != nil {
		t.Fatal(err)
	}
	l.until("the VM is closed", func() bool { return v.runtime().Power == hostapi.PowerState_POWERED_OFF })
	l.until("its run folder is gone", func() bool {
		_, err := os.Stat(l.agent.vmDir(v.id))
		return errors.Is(err, os.ErrNotExist)
	})
}

// TestPowerOnFails half-way: nothing stays behind.
func TestPowerOnFails(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	nothing := func(what string) {
		t.Helper()
		if ids, _ := l.guests.Running(t.Context()); len(ids) > 0 {
			t.Errorf("%s: a guest runs", what)
		}
		if _, err := os.Stat(l.agent.vmDir(v.id)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: a run folder is left: %v", what, err)
		}
		if r := v.runtime(); r.Power != hostapi.PowerState_POWERED_OFF {
			t.Errorf("%s: %v", what, r)
		}
	}
	l.guests.set(func() { l.guests.down = domain.ErrUnavailable })
	_, err := l.PowerOn(t.Context(), v.request())
	l.wantFault("libvirt is away", err, hostapi.Fault_UNKNOWN, "not answering")
	l.guests.set(func() { l.guests.down, l.guests.lost = nil, true })
	_, err = l.PowerOn(t.Context(), v.request())
	l.wantFault("libvirt's answer is lost", err, hostapi.Fault_UNKNOWN, "not answering")
	nothing("libvirt's answer is lost")
	l.guests.set(func() { l.guests.lost = false })
	v.powerOn()
	v.powerOff()
	nothing("power-off")
}

// TestFailedSync: a failed fsync is final. The guest stays paused with an alarm
// and is never resumed, although vmx and agent die and storage is well again.
func TestFailedSync(t *testing.T) {
	l := newLab(t)
	events := l.watch()
	v := l.createVM("web1", "bios")
	v.powerOn()
	p := v.vmx()
	if err := syscall.Kill(p.pid, syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	l.until("fsync fails", func() bool { _, err := os.Stat(filepath.Join(p.dir, "syncs-fail")); return err == nil })
	if text, _ := os.ReadFile(filepath.Join(p.dir, "syncs-fail")); string(text) != "<nil>" {
		t.Fatalf("%s", text)
	}
	img := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(img, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	st, err := p.Status(t.Context(), &hostapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("nbdcopy", "--flush", img, "nbd+unix:///?socket="+st.Disks[0].NbdSocket).CombinedOutput(); err == nil {
		t.Fatalf("a flush succeeded: %s", out)
	}
	if _, err := os.Stat(filepath.Join(p.dir, vmx.FailedFile)); err != nil {
		t.Fatalf("the guest heard of the failure before it was marked: %v", err)
	}
	resumed := l.guests.resumed
	l.guests.set(func() { l.guests.tell(v.id, domain.PausedOnError) })
	stays := func(when string) {
		t.Helper()
		l.until(when+": the VM says why it is paused", func() bool {
			r := v.runtime()
			return r.PausedOnError && strings.Contains(r.Problem, "failed for good")
		})
		time.Sleep(400 * time.Millisecond)
		if l.guests.resumed != resumed {
			t.Fatalf("%s: the guest was resumed", when)
		}
	}
	stays("storage failed")
	l.until("an alarm is raised", func() bool { return hasAlarm(events(), "failed for good") })
	v.kill()
	stays("vmx was killed")
	l.stopAgent()
	v.kill()
	l.startAgent()
	l.push("k1", v.id)
	stays("vmx and agent were killed")
	v.powerOff()
	v.powerOn()
	if r := v.runtime(); r.Problem != "" {
		t.Errorf("after a power cycle: %v", r)
	}
	v.powerOff()
}

// TestFirmwareVariablesAlarm: after the death of its vmx an EFI guest's variables
// are not saved, which must be said, and must block nothing.
func TestFirmwareVariablesAlarm(t *testing.T) {
	l := newLab(t)
	events := l.watch()
	v := l.createVM("efi1", "efi")
	v.powerOn()
	v.kill()
	v.goesOn()
	l.until("an alarm is raised", func() bool { return hasAlarm(events(), "power-cycled") })
	says := func(when string, want bool) {
		t.Helper()
		if r := v.runtime(); strings.Contains(r.Problem, nvramNotSaved) != want {
			t.Errorf("%s: problem %q", when, r.Problem)
		}
	}
	says("vmx was restarted", true)
	l.stopAgent()
	l.startAgent()
	says("the agent was restarted", true)
	v.powerOff()
	v.powerOn()
	says("power-cycled", false)
	v.powerOff()
}

// TestBusyAndStale: one operation at a time, and only of the center that leads.
func TestBusyAndStale(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	s, err := l.ImportDisk(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&hostapi.ImportChunk{Ref: v.ref, DiskUuid: v.disk}); err != nil {
		t.Fatal(err)
	}
	l.until("the import runs", func() bool { _, err := os.Stat(l.agent.vmDir(v.id)); return err == nil })
	_, err = l.PowerOn(t.Context(), v.request())
	l.wantFault("power-on during an import", err, hostapi.Fault_BUSY, "another operation")
	if _, err := s.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
	for range 5 { // bookkeeping of a guest's end makes nobody busy
		v.powerOn()
		v.powerOff()
	}

	if _, err := l.PowerOn(t.Context(), &hostapi.PowerRequest{Header: &hostapi.Header{Term: 7}, Ref: v.ref}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, err = l.PowerOff(t.Context(), &hostapi.PowerRequest{Header: &hostapi.Header{Term: 6}, Ref: v.ref})
		l.wantFault("a stale term", err, hostapi.Fault_STALE_TERM, "term 7")
		l.stopAgent()
		l.startAgent() // still, after a restart
	}
	if _, err := l.PowerOff(t.Context(), &hostapi.PowerRequest{Header: &hostapi.Header{Term: 7}, Ref: v.ref}); err != nil {
		t.Fatal(err)
	}
}

// TestAgentDiesInAnOperation: its vmx stops at a durable point and lets go.
func TestAgentDiesInAnOperation(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	s, err := l.ImportDisk(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&hostapi.ImportChunk{Ref: v.ref, DiskUuid: v.disk}); err != nil {
		t.Fatal(err)
	}
	var p *process
	l.until("the vmx runs", func() bool { p, err = adopt(l.agent.vmDir(v.id)); return err == nil })
	defer p.conn.Close()
	l.stopAgent()
	l.startAgent()
	<-p.exited
	l.push("k1", v.id)
	v.powerOn()
	v.powerOff()
}

// TestWatch: everything first, then SYNCED; a watcher that does not keep up is
// dropped and told.
func TestWatch(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	v.powerOn()
	s, err := l.Watch(t.Context(), &hostapi.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	first, err := s.Recv()
	if err != nil || first.Kind != hostapi.HostEvent_VM || first.Vm.Uuid != v.id || first.Vm.Power != hostapi.PowerState_POWERED_ON {
		t.Fatalf("first: %v, %v", first, err)
	}
	if ev, err := s.Recv(); err != nil || ev.Kind != hostapi.HostEvent_SYNCED {
		t.Fatalf("second: %v, %v", ev, err)
	}
	// The guest is one that nobody knows.
	l.guests.set(func() { l.guests.tell(uuid.NewString(), domain.Running) })
	if ev, err := s.Recv(); err != nil || ev.Kind != hostapi.HostEvent_ALARM || !strings.Contains(ev.Message, "power it off") {
		t.Errorf("a stray guest: %v, %v", ev, err)
	}
	// Nobody reads: more than buffers and flow control hold.
	for range 20_000 {
		l.agent.alarm(&hostapi.VMRuntime{Uuid: v.id}, strings.Repeat("x", 200))
	}
	for {
		if _, err = s.Recv(); err != nil {
			break
		}
	}
	l.wantFault("a slow watcher", err, hostapi.Fault_BUSY, "watch again")
	v.powerOff()
}

// TestStorageAway: the plug can be pulled while the datastore is away.
func TestStorageAway(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	v.powerOn()
	mark := filepath.Join(l.store, markerFile)
	if err := os.Rename(mark, mark+".away"); err != nil {
		t.Fatal(err)
	}
	_, err := v.reconfigure(&hostapi.ReconfigureVMRequest{Name: "x"})
	l.wantFault("reconfigure", err, hostapi.Fault_INVALID, "mounted")
	info, err := l.PowerOff(t.Context(), v.request())
	if err != nil || info.Runtime.Power != hostapi.PowerState_POWERED_OFF || len(info.Problems) != 1 {
		t.Errorf("power-off: %v, %v", info, err)
	}
}

// TestStaleRunFolder: an agent that finds rubbish in its run folder starts, and a
// guest whose record is lost is watched and can be powered off.
func TestStaleRunFolder(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	v.powerOn()
	l.stopAgent()
	stale := uuid.NewString()
	if err := errors.Join(
		os.WriteFile(filepath.Join(l.agent.vmDir(v.id), recordFile), []byte(`{"ref":{"uuid":"`+stale+`"}}`), 0o600),
		os.MkdirAll(filepath.Join(l.agent.vmDir(stale), guestDir), 0o700),
		os.WriteFile(filepath.Join(l.agent.vmDir(stale), recordFile), []byte("{"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	v.kill()
	l.startAgent()
	if _, err := os.Stat(l.agent.vmDir(stale)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a stale run folder is left: %v", err)
	}
	l.push("k1", v.id)
	l.until("it is watched", func() bool { return strings.Contains(v.runtime().Problem, "cannot be started") })
	if _, err := l.Reset(t.Context(), v.request()); err != nil { // names the folder again
		t.Fatal(err)
	}
	v.goesOn()
	v.powerOff()
}

// TestLogIsNoTrap: a link or FIFO in the place of the VM's log is refused.
func TestLogIsNoTrap(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	log := filepath.Join(l.store, "web1", "vmware.log")
	target := filepath.Join(t.TempDir(), "target")
	for name, make := range map[string]func() error{
		"link": func() error { return os.Symlink(target, log) },
		"FIFO": func() error { return syscall.Mkfifo(log, 0o600) },
	} {
		if err := errors.Join(os.Remove(log), make()); err != nil {
			t.Fatal(err)
		}
		if _, err := l.PowerOn(t.Context(), v.request()); err == nil || !strings.Contains(err.Error(), "log") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(target); err == nil {
			t.Errorf("%s: it was followed", name)
		}
	}
}

// TestSandbox: a vmx that serves a guest cannot leave its VM.
func TestSandbox(t *testing.T) {
	l := newLab(t)
	l.createVM("other", "bios")
	v := l.createVM("web1", "bios")
	v.powerOn()
	p := v.vmx()
	if err := syscall.Kill(p.pid, syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	var text []byte
	l.until("it has tried", func() (ok bool) {
		text, _ = os.ReadFile(filepath.Join(p.dir, "escapes"))
		return bytes.Contains(text, []byte("its own VMX"))
	})
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) != 10 {
		t.Errorf("%d attempts:\n%s", len(lines), text)
	}
	for _, line := range lines {
		denied := strings.Contains(line, "permission denied") || strings.Contains(line, "operation not permitted")
		if own := strings.HasPrefix(line, "its own VMX"); own == denied || own && !strings.HasSuffix(line, "<nil>") {
			t.Errorf("%s", line)
		}
	}
	v.powerOff()
}

// TestConsole: the serial line of a guest that runs, and of none that does not.
func TestConsole(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	s, err := l.Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&hostapi.ConsoleData{Ref: v.ref}); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	_, err = s.Recv()
	l.wantFault("console of a VM that is off", err, hostapi.Fault_WRONG_POWER_STATE, "console")
}
