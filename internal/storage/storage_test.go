package storage

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// onLoop makes a file system on a loop device and mounts it.
func onLoop(t *testing.T, sector, options string, mkfs ...string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		t.Skipf("%s is missing: install e2fsprogs and xfsprogs", mkfs[0])
	}
	dir := t.TempDir()
	image, point := filepath.Join(dir, "image"), filepath.Join(dir, "mnt")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 512<<20), os.Mkdir(point, 0o700)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-f", "--show", "-b", sector, image).CombinedOutput()
	if err != nil {
		t.Skipf("no loop device here: %s", out)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", device).Run() })
	if out, err := exec.Command(mkfs[0], append(mkfs[1:], device)...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %s", strings.Join(mkfs, " "), out)
	}
	mountAt(t, point, "-o", options, device, point)
	return point
}

// mountAt mounts and skips the test where that is not possible.
func mountAt(t *testing.T, point string, args ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting needs root")
	}
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Skipf("mount %s: %s", strings.Join(args, " "), out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", point).CombinedOutput(); err != nil {
			t.Errorf("umount: %s", out)
		}
	})
}

func mustProbe(t *testing.T, dir string) *Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	before := list(t, dir)
	r, err := Probe(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	if after := list(t, dir); !slices.Equal(before, after) {
		t.Errorf("left behind: %q", after)
	}
	return r
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// Real file systems: what they can do is found, and nothing is held against them.
func TestProbeLocal(t *testing.T) {
	for _, tt := range []struct {
		name, sector, options string
		mkfs                  []string
		direct                int64
		warnings              int
	}{
		{"ext4", "512", "defaults", []string{"mkfs.ext4", "-q"}, 512, 0},
		{"ext4 on 4096-byte sectors", "4096", "defaults", []string{"mkfs.ext4", "-q"}, 4096, 0},
		{"ext4 with data=journal", "512", "data=journal", []string{"mkfs.ext4", "-q"}, 0, 1},
		{"ext4 with data=writeback", "512", "data=writeback", []string{"mkfs.ext4", "-q"}, 512, 1},
		{"xfs", "512", "defaults", []string{"mkfs.xfs", "-q"}, 512, 0},
		{"xfs on 4096-byte sectors", "4096", "defaults", []string{"mkfs.xfs", "-q", "-s", "size=4096"}, 4096, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := mustProbe(t, onLoop(t, tt.sector, tt.options, tt.mkfs...))
			if err := r.Err(); err != nil {
				t.Error(err)
			}
			if r.Type != strings.Fields(tt.name)[0] || !strings.HasPrefix(r.Source, "/dev/loop") || r.Network {
				t.Errorf("%+v", r)
			}
			if r.Direct.Offset != tt.direct || r.Direct.Memory > 4096 || (r.Direct.Memory == 0) != (tt.direct == 0) {
				t.Errorf("direct I/O: %+v", r.Direct)
			}
			if r.Sector != map[string]int64{"512": 512, "4096": 4096}[tt.sector] {
				t.Errorf("sectors of %d bytes", r.Sector)
			}
			if !r.Punch || !r.Zero || !r.Reserve || !r.Sparse || !r.DSync || !r.Locks || r.MaxFile < 2<<40-4096 {
				t.Errorf("%+v", r)
			}
			if r.Free <= 100<<20 || r.Free > r.Capacity || r.Capacity > 512<<20 {
				t.Errorf("free %d of %d", r.Free, r.Capacity)
			}
			if len(r.Warnings) != tt.warnings {
				t.Errorf("warnings: %v", r.Warnings)
			}
		})
	}
}

// What would lose disks is refused, with the reason and the way out.
func TestProbeUnsafe(t *testing.T) {
	check := func(t *testing.T, dir string, want ...string) {
		t.Helper()
		var unsafe *UnsafeError
		if err := mustProbe(t, dir).Err(); !errors.As(err, &unsafe) || len(unsafe.Findings) != 1 {
			t.Fatalf("%v", err)
		}
		for _, w := range want {
			if !strings.Contains(unsafe.Error(), w) {
				t.Errorf("%q does not say %q", unsafe.Error(), w)
			}
		}
	}
	t.Run("no barriers", func(t *testing.T) {
		check(t, onLoop(t, "512", "barrier=0", "mkfs.ext4", "-q"), "barriers", "power cut", "without nobarrier")
	})
	t.Run("read-only", func(t *testing.T) {
		check(t, onLoop(t, "512", "ro", "mkfs.ext4", "-q"), "read-only", "mount it read-write")
	})
	t.Run("memory", func(t *testing.T) {
		dir := t.TempDir()
		mountAt(t, dir, "-t", "tmpfs", "none", dir)
		check(t, dir, "tmpfs", "power cut", "ext4")
	})
	overlay := func(t *testing.T, options string) string {
		dir := onLoop(t, "512", "defaults", "mkfs.ext4", "-q")
		for _, d := range []string{"lower", "upper", "work", "merged"} {
			if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		merged := filepath.Join(dir, "merged")
		mountAt(t, merged, "-t", "overlay", "overlay", "-o", "lowerdir="+dir+"/lower,upperdir="+dir+"/upper,workdir="+dir+"/work"+options, merged)
		return merged
	}
	t.Run("volatile overlay", func(t *testing.T) { check(t, overlay(t, ",volatile"), "volatile", "fsync") })
	t.Run("overlay", func(t *testing.T) {
		r := mustProbe(t, overlay(t, ""))
		if r.Err() != nil || len(r.Warnings) != 1 || !r.Locks || !r.Punch {
			t.Errorf("%+v", r)
		}
	})
}

// A full file system is an error that says so, and leaves nothing.
func TestProbeFull(t *testing.T) {
	dir := onLoop(t, "512", "defaults", "mkfs.ext4", "-q", "-m", "0")
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 1<<20); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := Probe(t.Context(), dir); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v", err)
	}
	if left := list(t, dir); !slices.Equal(left, []string{"ballast", "lost+found"}) {
		t.Errorf("left behind: %q", left)
	}
}

func TestProbeRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{file: "no folder", filepath.Join(dir, "away"): "no such file"} {
		if _, err := Probe(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	// Either is right: it was quick, or it was not waited for.
	if _, err := Probe(ended, dir); err != nil && !errors.Is(err, ErrSilent) {
		t.Errorf("%v", err)
	}
}

// What a killed probe left is removed, and what another one is using is not.
func TestProbeRemains(t *testing.T) {
	dir := t.TempDir()
	old, fresh := filepath.Join(dir, trialPrefix+"1"), filepath.Join(dir, trialPrefix+"2")
	if err := errors.Join(os.WriteFile(old, nil, 0o600), os.WriteFile(fresh, nil, 0o600), os.Chtimes(old, time.Time{}, time.Now().Add(-2*trialLife))); err != nil {
		t.Fatal(err)
	}
	if _, err := Probe(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if left := list(t, dir); !slices.Equal(left, []string{filepath.Base(fresh)}) {
		t.Errorf("left: %q", left)
	}
}

// Mounts as the kernel prints them, judged by type and options alone.
func TestJudge(t *testing.T) {
	for line, want := range map[string]string{
		`40 27 8:1 / /srv rw,noatime - ext4 /dev/sda1 rw`:                                       "",
		`40 27 8:1 / /srv rw,noatime shared:1 master:2 - xfs /dev/sda1 rw,inode64`:              "",
		`40 27 8:1 / /srv rw,noatime - ext4 /dev/sda1 rw,nobarrier`:                             "barriers",
		`40 27 0:50 / /srv rw - nfs4 nas:/vms rw,vers=4.2,hard,proto=tcp,local_lock=none`:       "",
		`40 27 0:50 / /srv rw - nfs4 nas:/vms rw,vers=4.0,hard,nolock`:                          "locks stay on this machine",
		`40 27 0:50 / /srv rw - nfs4 nas:/vms rw,vers=4.2,hard,local_lock=posix`:                "locks stay on this machine",
		`40 27 0:50 / /srv rw - nfs4 nas:/vms rw,vers=4.2,hard,local_lock=flock`:                "",
		`40 27 0:50 / /srv rw - nfs4 nas:/vms rw,vers=4.2,soft,timeo=600`:                       "soft",
		`40 27 0:50 / /srv rw - nfs nas:/vms rw,vers=3,hard,local_lock=none`:                    "NFS version 3",
		`40 27 0:50 / /my\040vms rw - tmpfs none rw`:                                            "in memory",
		`40 27 0:50 / /srv ro - ext4 /dev/sda1 rw`:                                              "read-only",
		`40 27 0:50 / /srv rw - fuse.sshfs me@there: rw`:                                        "fuse.sshfs",
		`40 27 0:50 / /srv rw - cifs //nas/vms rw`:                                              "cifs",
		`40 27 0:50 / /srv rw - 9p share rw`:                                                    "9p",
		`40 27 0:50 / /srv rw - virtiofs share rw`:                                              "virtiofs",
		`40 27 0:50 / /srv rw - overlay overlay rw,lowerdir=/a,upperdir=/b,workdir=/c,volatile`: "volatile",
		`40 27 0:50 / /srv rw - zfs tank/vms rw`:                                                "",
	} {
		m, err := parseMount(line)
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		r := &Report{Path: m.Point, Type: m.Type}
		r.judge(m)
		if err := r.Err(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", line, err)
		}
		for _, f := range append(r.Unsafe, r.Warnings...) {
			if f.What == "" || f.Why == "" || f.Fix == "" {
				t.Errorf("%s: %+v", line, f)
			}
		}
	}
}

func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	a, err := Identity(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	mountAt(t, dir, "-t", "tmpfs", "none", dir)
	if b, err := Identity(t.Context(), dir); err != nil || b == a {
		t.Errorf("the same with another file system mounted: %v", err)
	}
	if _, err := Identity(t.Context(), filepath.Join(dir, "away")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// FuzzMount parses any line: what comes of it is never half a mount.
func FuzzMount(f *testing.F) {
	f.Add(`40 27 8:1 / /srv rw,noatime shared:1 - xfs /dev/sda1 rw,inode64`)
	f.Add(`1 1 0:1 / /a\040b rw - nfs4 nas:/x rw,vers=4.2,nolock`)
	f.Add(` - `)
	f.Add("")
	f.Fuzz(func(t *testing.T, line string) {
		m, err := parseMount(line)
		if err == nil && len(m.Options) == 0 {
			t.Error("a mount without options")
		}
		r := &Report{}
		r.judge(m)
		_ = r.Err()
	})
}
