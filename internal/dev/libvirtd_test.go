package dev

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortise/internal/domain"
)

func testDir(t *testing.T) string {
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

func startOne(t *testing.T, cfg LibvirtdConfig) *Libvirtd {
	t.Helper()
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	l, err := StartLibvirtd(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if l.lock == nil {
			return // stopped, or abandoned by the test
		}
		if err := l.Stop(context.Background(), true); err != nil {
			t.Error(err)
		}
	})
	return l
}

func dialOne(t *testing.T, l *Libvirtd) *domain.Conn {
	t.Helper()
	// The probe of KVM is not what is tested here.
	c, err := domain.Connect(t.Context(), domain.Config{Socket: l.Socket(), QEMU: "false"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// bare is a guest without disks: its firmware finds nothing to boot and waits.
func bare(dir, id string) domain.Spec {
	return domain.Spec{Name: "bare", UUID: id, MemoryMiB: 32, CPUs: 1, Firmware: domain.BIOS, ConsoleSocket: filepath.Join(dir, "console.sock")}
}

const bareID = "564d0102-0304-0506-0708-090a0b0c0d0e"

func TestTwoHosts(t *testing.T) {
	dir := testDir(t)
	conns := map[string]*domain.Conn{}
	for _, name := range []string{"host1", "host2"} {
		l := startOne(t, LibvirtdConfig{Dir: filepath.Join(dir, name), Name: name})
		c := dialOne(t, l)
		info, err := c.HostInfo(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if info.Hostname != name {
			t.Errorf("host %s calls itself %s", name, info.Hostname)
		}
		conns[name] = c
	}
	id1, _ := os.ReadFile(filepath.Join(dir, "host1", "host-uuid"))
	id2, _ := os.ReadFile(filepath.Join(dir, "host2", "host-uuid"))
	if len(id1) != 36 || string(id1) == string(id2) {
		t.Errorf("host UUIDs: %s, %s", id1, id2)
	}
	// The same VM on both: each libvirtd knows its own only.
	if err := conns["host1"].Start(t.Context(), bare(dir, bareID)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]domain.State{"host1": domain.Running, "host2": domain.Off} {
		if st, err := conns[name].State(t.Context(), bareID); err != nil || st != want {
			t.Errorf("%s: %v, %v; want %v", name, st, err, want)
		}
	}
	if _, err := StartLibvirtd(t.Context(), LibvirtdConfig{Dir: filepath.Join(dir, "host1"), Name: "host1", Log: slog.New(slog.DiscardHandler)}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second start in one folder: %v", err)
	}
}

// A guest outlives kill -9 of libvirtd, and of the process that started it.
func TestTakeOver(t *testing.T) {
	dir := testDir(t)
	cfg := LibvirtdConfig{Dir: filepath.Join(dir, "h"), Name: "host1"}
	l := startOne(t, cfg)
	c := dialOne(t, l)
	events := c.Events(t.Context())
	if err := c.Start(t.Context(), bare(dir, bareID)); err != nil {
		t.Fatal(err)
	}
	guests := l.guests()
	if len(guests) != 1 {
		t.Fatalf("guests: %v", guests)
	}
	same := func(when string) {
		t.Helper()
		if st, err := c.State(t.Context(), bareID); err != nil || st != domain.Running {
			t.Errorf("%s: %v, %v", when, st, err)
		}
		if now := l.guests(); !slices.Equal(now, guests) {
			t.Errorf("%s: guests %v, were %v", when, now, guests)
		}
	}

	// kill -9 of libvirtd.
	if err := l.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-l.Exited()
	l.release()
	l = startOne(t, cfg)
	same("after libvirtd was killed")

	// kill -9 of us: libvirtd is left behind, the lock is gone.
	left := l.cmd.Process.Pid
	l.release()
	l = startOne(t, cfg)
	if l.isOurs(left, libvirtd) {
		t.Errorf("libvirtd %d was left running", left)
	}
	same("after take-over")

	// A pid file that names someone else's process does it no harm.
	if err := l.Stop(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.path("run"), "libvirtd.pid"), fmt.Appendf(nil, "%d\n", os.Getpid()), 0o600); err != nil {
		t.Fatal(err)
	}
	l = startOne(t, cfg)
	same("after a clean stop")

	if err := l.Stop(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if left := l.guests(); len(left) != 0 {
		t.Errorf("guests after the end: %v", left)
	}
	// The next one finds the guest gone and says so.
	l = startOne(t, cfg)
	for limit := time.After(30 * time.Second); ; {
		select {
		case ev := <-events:
			if ev.State == domain.Off {
				return
			}
		case <-limit:
			t.Fatal("the guest's end was not told")
		}
	}
}

// Mounts made after the start are seen inside, as the FUSE views of VMs must be.
func TestSharedMounts(t *testing.T) {
	dir := testDir(t)
	shared := filepath.Join(dir, "run")
	l := startOne(t, LibvirtdConfig{Dir: filepath.Join(dir, "h"), Name: "host1", Shared: []string{shared}})
	view := filepath.Join(shared, "vm", "files")
	if err := os.MkdirAll(view, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", view, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	mounted := true
	defer func() {
		if mounted {
			unix.Unmount(view, unix.MNT_DETACH)
		}
	}()
	if err := os.WriteFile(filepath.Join(view, "nvram"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	inside := fmt.Sprintf("/proc/%d/root%s/nvram", l.cmd.Process.Pid, view)
	if got, err := os.ReadFile(inside); err != nil || string(got) != "x" {
		t.Errorf("inside the namespace: %q, %v", got, err)
	}
	if err := unix.Unmount(view, 0); err != nil {
		t.Fatal(err)
	}
	mounted = false
	if _, err := os.Stat(inside); !os.IsNotExist(err) {
		t.Errorf("after unmounting, inside: %v", err)
	}
	// As after kill -9: our mount is there already.
	l.release()
	l = startOne(t, l.cfg)
	if err := l.Stop(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if point, _, err := mountOf(shared); err != nil || point == shared {
		t.Errorf("our mount is left behind: %s, %v", point, err)
	}
}

func TestLongStateFolder(t *testing.T) {
	dir := filepath.Join(testDir(t), strings.Repeat("long-name-", 12))
	l := startOne(t, LibvirtdConfig{Dir: dir, Name: "host1"})
	if len(l.Socket()) > 107 {
		t.Fatalf("socket %s", l.Socket())
	}
	c, err := net.Dial("unix", l.Socket())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := l.Stop(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Dir(l.Socket())); !os.IsNotExist(err) {
		t.Errorf("the short name is left behind: %v", err)
	}
}
