package domain_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"mortise/internal/dev"
	"mortise/internal/domain"
	"mortise/test/guest"
)

// These tests boot a real Linux in a real QEMU under a libvirtd of their own, on
// a disk that qemu-nbd serves. They need root and Debian packages; they fail, and
// say which, when something is missing.

// shortDir is a folder whose socket paths fit; t.TempDir's may not.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "mortise-t")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("left behind: %v", err)
		}
	})
	return dir
}

func logger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

func startLibvirtd(t *testing.T, dir string) *dev.Libvirtd {
	t.Helper()
	l, err := dev.StartLibvirtd(t.Context(), dev.LibvirtdConfig{Dir: dir, Name: "test-host", Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Stop(context.Background(), true); err != nil {
			t.Error(err)
		}
	})
	return l
}

func connect(t *testing.T, socket string) *domain.Conn {
	t.Helper()
	c, err := domain.Connect(t.Context(), domain.Config{Socket: socket, Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A disk is a copy of the guest's, served by qemu-nbd.
type disk struct {
	t      *testing.T
	file   string
	socket string
	cmd    *exec.Cmd
}

func serve(t *testing.T, dir string) *disk {
	t.Helper()
	img, err := guest.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{t: t, file: filepath.Join(dir, "disk.raw"), socket: filepath.Join(dir, "nbd.sock")}
	if out, err := exec.Command("cp", "--sparse=always", img.Raw, d.file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.start()
	t.Cleanup(d.kill)
	return d
}

func (d *disk) start() {
	d.t.Helper()
	if _, err := exec.LookPath("qemu-nbd"); err != nil {
		d.t.Fatalf("%v: apt-get install qemu-utils", err)
	}
	os.Remove(d.socket)
	d.cmd = exec.Command("qemu-nbd", "--format=raw", "--socket="+d.socket, "--persistent", "--shared=8", "--discard=unmap", d.file)
	d.cmd.Stderr = d.t.Output()
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	for range 200 {
		if c, err := net.Dial("unix", d.socket); err == nil {
			c.Close()
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	d.t.Fatal("qemu-nbd does not listen")
}

// kill ends the server as kill -9 does.
func (d *disk) kill() {
	if d.cmd != nil {
		d.cmd.Process.Kill()
		d.cmd.Wait()
		d.cmd = nil
	}
}

func spec(dir string, d *disk) domain.Spec {
	return domain.Spec{
		Name: "web server/1", UUID: "564d0102-0304-0506-0708-090a0b0c0d0e", MemoryMiB: 256, CPUs: 1, GuestOS: "debian12-64",
		Firmware: domain.BIOS, ConsoleSocket: filepath.Join(dir, "console.sock"),
		Disks:          []domain.Disk{{Place: "scsi0:0", Model: domain.PVSCSI, Socket: d.socket, Serial: "6000c29a0b0c0d0e0f10111213141516", Boot: 1}},
		ReconnectDelay: time.Second,
	}
}

func console(t *testing.T, s domain.Spec) *guest.Agent {
	t.Helper()
	c := domain.OpenConsole(s.ConsoleSocket, logger(t))
	t.Cleanup(c.Close)
	line, err := c.Attach()
	if err != nil {
		t.Fatal(err)
	}
	return guest.NewAgent(line)
}

// do runs a command in the guest within a time that a slow machine needs.
func do(t *testing.T, a *guest.Agent, command string) guest.Answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	answer, err := a.Do(ctx, command)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

func boot(t *testing.T, a *guest.Agent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	if err := a.Boot(ctx); err != nil {
		t.Fatal(err)
	}
}

func number(t *testing.T, a guest.Answer, key string) int {
	t.Helper()
	n, err := strconv.Atoi(a.Values[key])
	if err != nil {
		t.Fatalf("%s of %q: %v", key, a.Text, err)
	}
	return n
}

func waitEvent(t *testing.T, events <-chan domain.Event, want domain.State) {
	t.Helper()
	limit := time.After(60 * time.Second)
	for {
		select {
		case ev, ok := <-events:
			if !ok {
				t.Fatal("the events ended")
			}
			t.Logf("event: %s %s", ev.State, ev.Reason)
			if ev.State == want {
				return
			}
		case <-limit:
			t.Fatalf("no event %q", want)
		}
	}
}

func TestGuestSurvivesDiskServerAndLibvirtd(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	l := startLibvirtd(t, filepath.Join(dir, "host"))
	c := connect(t, l.Socket())
	events := c.Events(t.Context())
	d := serve(t, dir)
	s := spec(dir, d)

	if st, err := c.State(t.Context(), s.UUID); err != nil || st != domain.Off {
		t.Fatalf("before start: %v, %v", st, err)
	}
	for _, f := range []func(context.Context, string) error{c.Shutdown, c.Reset, c.Resume} {
		if err := f(t.Context(), s.UUID); !errors.Is(err, domain.ErrNotRunning) {
			t.Fatalf("on a guest that is off: %v", err)
		}
	}
	if err := c.PowerOff(t.Context(), s.UUID); err != nil {
		t.Fatalf("powering off what is off: %v", err)
	}

	begin := time.Now()
	if err := c.Start(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	t.Logf("power-on to QEMU: %v", time.Since(begin))
	a := console(t, s)
	waitEvent(t, events, domain.Running)
	boot(t, a)
	t.Logf("power-on to agent: %v", time.Since(begin))
	if err := c.Start(t.Context(), s); !errors.Is(err, domain.ErrAlreadyRunning) {
		t.Fatalf("second start: %v", err)
	}
	ids, err := c.Running(t.Context())
	if err != nil || !slices.Equal(ids, []string{s.UUID}) {
		t.Fatalf("running: %v, %v", ids, err)
	}

	// The guest sees what the Spec says.
	info := do(t, a, "info")
	for key, want := range map[string]string{
		"firmware": "bios", "logical": "512", "physical": "4096", "cpus": "1", "uuid": s.UUID, "rng": "virtio_rng.0", "bytes": "134217728", "serial": s.Disks[0].Serial,
	} {
		if info.Values[key] != want {
			t.Errorf("the guest sees %s=%q, not %q", key, info.Values[key], want)
		}
	}
	if n := number(t, info, "discard"); n == 0 {
		t.Error("the guest cannot discard")
	}
	if trim := do(t, a, "trim"); trim.Values["zero"] != "yes" {
		t.Errorf("discarded blocks do not read as zeros: %s", trim.Text)
	}
	marker := do(t, a, "marker write").Words[1]

	// kill -9 of the disk's server under a guest that writes.
	run := do(t, a, "io start").Values["run"]
	d.kill()
	waitEvent(t, events, domain.PausedOnError)
	if st, err := c.State(t.Context(), s.UUID); err != nil || st != domain.PausedOnError {
		t.Fatalf("without its disk: %v, %v", st, err)
	}
	// Asking it to go on too early does no harm.
	if err := c.Resume(t.Context(), s.UUID); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, events, domain.PausedOnError)
	back := time.Now()
	d.start()
	resumeUntilRunning(t, c, s.UUID)
	t.Logf("server back to guest running: %v", time.Since(back))
	before := number(t, do(t, a, "io status"), "written")
	waitWritten(t, a, before+5)

	// libvirtd restarts; the guest does not notice and is found again.
	if err := l.Stop(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	do(t, a, "info")
	startLibvirtd(t, filepath.Join(dir, "host"))
	if st, err := c.State(t.Context(), s.UUID); err != nil || st != domain.Running {
		t.Fatalf("after libvirtd's restart: %v, %v", st, err)
	}

	stopped := do(t, a, "io stop")
	written := number(t, stopped, "written")
	if n := number(t, stopped, "errors"); n != 0 {
		t.Errorf("the guest saw %d errors", n)
	}

	// The power button; the end is told by the new libvirtd.
	if err := c.Reset(t.Context(), s.UUID); err != nil {
		t.Fatal(err)
	}
	boot(t, a)
	do(t, a, "marker read "+marker)
	if scan := do(t, a, "io scan "+run); number(t, scan, "max") != written-1 || number(t, scan, "torn") != 0 {
		t.Errorf("after %d acknowledged blocks the disk holds: %s", written, scan.Text)
	}
	if err := c.Shutdown(t.Context(), s.UUID); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, events, domain.Off)
	if st, err := c.State(t.Context(), s.UUID); err != nil || st != domain.Off {
		t.Fatalf("after shutdown: %v, %v", st, err)
	}
}

func resumeUntilRunning(t *testing.T, c *domain.Conn, id string) {
	t.Helper()
	for range 100 {
		if err := c.Resume(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
		if st, err := c.State(t.Context(), id); err != nil {
			t.Fatal(err)
		} else if st == domain.Running {
			return
		}
	}
	t.Fatal("the guest does not go on")
}

func waitWritten(t *testing.T, a *guest.Agent, n int) {
	t.Helper()
	for range 100 {
		if number(t, do(t, a, "io status"), "written") >= n {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("the guest does not write %d blocks", n)
}

func TestEFIGuestKeepsItsVariables(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	l := startLibvirtd(t, filepath.Join(dir, "host"))
	c := connect(t, l.Socket())
	events := c.Events(t.Context())
	d := serve(t, dir)
	s := spec(dir, d)
	s.Firmware, s.NVRAM = domain.EFI, filepath.Join(dir, "vm.nvram")
	s.Disks[0].Model = domain.VirtioSCSI

	if err := c.Start(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	a := console(t, s)
	boot(t, a)
	if info := do(t, a, "info"); info.Values["firmware"] != "efi" || info.Values["serial"] != s.Disks[0].Serial {
		t.Errorf("the guest sees: %s", info.Text)
	}
	variable := do(t, a, "nvram write").Words[1]
	if err := c.PowerOff(t.Context(), s.UUID); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, events, domain.Off)
	if st, err := os.Stat(s.NVRAM); err != nil || st.Size() < 64<<10 {
		t.Fatalf("variables' file: %v, %v", st, err)
	}
	if err := c.Start(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	boot(t, a)
	do(t, a, "nvram read "+variable)
}

// QEMU takes every device that a Spec can name.
func TestDeviceModels(t *testing.T) {
	dir := shortDir(t)
	l := startLibvirtd(t, filepath.Join(dir, "host"))
	c := connect(t, l.Socket())
	d := serve(t, dir)
	iso := filepath.Join(dir, "cd.iso")
	if err := os.WriteFile(iso, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s := spec(dir, d)
	s.CPUs, s.CoresPerSocket = 2, 2
	s.Disks = nil
	for i, at := range []struct {
		place string
		model domain.Model
	}{{"scsi0:0", domain.VirtioSCSI}, {"scsi0:15", domain.VirtioSCSI}, {"scsi1:3", domain.LSISAS}, {"scsi3:8", domain.PVSCSI}, {"sata0:4", domain.AHCI}, {"nvme0:1", domain.AHCI}} {
		s.Disks = append(s.Disks, domain.Disk{Place: at.place, Model: at.model, Socket: d.socket, ReadOnly: at.model != domain.AHCI, Boot: i + 1, Serial: "serial-" + strconv.Itoa(i)})
	}
	s.CDROMs = []domain.CDROM{{Place: "sata0:0", Image: iso}, {Place: "sata0:1"}}
	for i, model := range []string{"vmxnet3", "e1000", "e1000e", "pcnet", "virtio"} {
		n := strconv.Itoa(i)
		s.NICs = append(s.NICs, domain.NIC{Place: "ethernet" + n, MAC: "00:50:56:00:00:0" + n, Model: model})
	}
	if err := c.Start(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if st, err := c.State(t.Context(), s.UUID); err != nil || st != domain.Running {
		t.Fatalf("%v, %v", st, err)
	}
	if err := c.PowerOff(t.Context(), s.UUID); err != nil {
		t.Fatal(err)
	}
	// The golden files are what libvirt takes. Not every test machine has KVM, and
	// libvirt 9.0 reads the delay of NBD's reconnection but its schema lacks it.
	delay := regexp.MustCompile(`<reconnect delay="10"></reconnect>`)
	golden, err := filepath.Glob("testdata/*.xml")
	if err != nil || len(golden) < 3 {
		t.Fatalf("golden files: %v, %v", golden, err)
	}
	for _, g := range golden {
		text, err := os.ReadFile(g)
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.Replace(text, []byte(`<domain type="kvm">`), []byte(`<domain type="qemu">`), 1)
		text = delay.ReplaceAll(text, nil)
		virsh(t, l, string(text), "define", "--validate", "/dev/stdin")
		virsh(t, l, "", "undefine", "--nvram", s.UUID)
	}
}

func virsh(t *testing.T, l *dev.Libvirtd, input string, args ...string) {
	t.Helper()
	cmd := exec.Command("virsh", append([]string{"-c", "qemu+unix:///system?socket=" + l.Socket()}, args...)...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s (Debian package libvirt-clients)", args, err, out)
	}
}

func TestStartSaysWhatIsWrong(t *testing.T) {
	dir := shortDir(t)
	l := startLibvirtd(t, filepath.Join(dir, "host"))
	c := connect(t, l.Socket())
	nets, err := c.Networks(t.Context())
	if err != nil || len(nets) != 0 {
		t.Fatalf("networks of a fresh libvirtd: %v, %v", nets, err)
	}
	s := spec(dir, &disk{socket: filepath.Join(dir, "nobody.sock")})
	withNIC := s
	withNIC.NICs = []domain.NIC{{Place: "ethernet0", Network: "VM Network", MAC: "00:50:56:00:00:01", Model: "vmxnet3", Connected: true}}
	if err := c.Start(t.Context(), withNIC); !errors.Is(err, domain.ErrNoNetwork) {
		t.Errorf("an unknown network: %v", err)
	}
	if err := c.Start(t.Context(), s); err == nil || errors.Is(err, domain.ErrAlreadyRunning) {
		t.Errorf("a disk that nobody serves: %v", err)
	} else {
		t.Log(err)
	}
	if ids, err := c.Running(t.Context()); err != nil || len(ids) != 0 {
		t.Errorf("left running: %v, %v", ids, err)
	}
	// A domain of someone else is not ours.
	virsh(t, l, `<domain type='qemu'><name>foreign</name><memory unit='MiB'>32</memory><os><type machine='q35'>hvm</type></os></domain>`, "create", "/dev/stdin")
	if ids, err := c.Running(t.Context()); err != nil || len(ids) != 0 {
		t.Errorf("someone else's domain is listed: %v, %v", ids, err)
	}
	info, err := c.HostInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", info)
	if info.Hostname != "test-host" || info.Cores < 1 || info.MemoryBytes < 1<<28 || info.CPUModel == "" || info.KVM != (info.WhyNoKVM == "") {
		t.Errorf("host: %+v", info)
	}
}
