package host

import (
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/vdisk"
)

func TestDatastoreResolve(t *testing.T) {
	root := t.TempDir()
	d := Datastore{Name: "ds1", Path: filepath.Join(root, "ds")}
	if err := os.MkdirAll(filepath.Join(d.Path, "web1"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(root, "outside"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(root, "outside"), filepath.Join(d.Path, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.resolve("web1/web1.vmx"); err == nil || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("a folder without a marker was used: %v", err)
	}
	if err := InitDatastore(d); err != nil {
		t.Fatal(err)
	}
	first, err := d.marker()
	if err != nil {
		t.Fatal(err)
	}
	if err := InitDatastore(d); err != nil {
		t.Fatal(err)
	}
	if again, err := d.marker(); err != nil || again != first {
		t.Errorf("a second init changed the marker: %v, %v", again, err)
	}
	for name, ok := range map[string]bool{
		"web1/web1.vmx": true, "new/new.vmx": true, "top.vmx": true,
		"": false, "..": false, "../x.vmx": false, "web1/../../x": false, "/etc/passwd": false,
		"link/x.vmx": false, "a\x00b": false, "a\"b": false, "web1/./x": false,
	} {
		p, err := d.resolve(name)
		if (err == nil) != ok {
			t.Errorf("resolve(%q) = %q, %v; want ok=%v", name, p, err, ok)
		}
		if err == nil && !strings.HasPrefix(p, d.Path+"/") {
			t.Errorf("resolve(%q) = %q leaves %s", name, p, d.Path)
		}
	}
}

func TestDatastoreMarkerDamaged(t *testing.T) {
	for _, text := range []string{"", "{", `{"version":1}`, `{"version":9,"uuid":"x"}`} {
		d := Datastore{Name: "ds1", Path: t.TempDir()}
		if err := os.WriteFile(filepath.Join(d.Path, markerFile), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := InitDatastore(d); err == nil {
			t.Errorf("marker %q was taken for good or replaced", text)
		}
		if got, _ := os.ReadFile(filepath.Join(d.Path, markerFile)); string(got) != text {
			t.Errorf("marker %q was changed to %q", text, got)
		}
		if d.info().Problem == "" {
			t.Errorf("marker %q: no problem is shown", text)
		}
	}
}

// A folder whose storage would lose disks is not made a datastore, and if it was
// one already, no disk and no guest comes there.
func TestUnsafeStorage(t *testing.T) {
	d := Datastore{Name: "ds1", Path: t.TempDir()}
	if err := InitDatastore(d); err != nil {
		t.Fatal(err)
	}
	marker, err := os.ReadFile(filepath.Join(d.Path, markerFile))
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{cfg: Config{Datastores: []Datastore{d}}, log: slog.New(slog.DiscardHandler)}
	if err := a.storageFor(t.Context(), "ds1", d.Path, []*hostapi.NewDisk{{CapacityBytes: 1 << 30}}); err != nil {
		t.Errorf("good storage: %v", err)
	}
	if err := a.storageFor(t.Context(), "ds1", d.Path, []*hostapi.NewDisk{{CapacityBytes: 1 << 62}}); err == nil || !strings.Contains(err.Error(), "smaller") {
		t.Errorf("a disk that cannot be: %v", err)
	}
	report, err := a.storageOf(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	a.cfg.DirectIO = true
	for offset, want := range map[int64]bool{0: false, 512: true, 4096: false} {
		was := report.Direct
		report.Direct.Offset = offset
		if err := a.storageFor(t.Context(), "ds1", d.Path, nil); (err == nil) != want || err != nil && !strings.Contains(err.Error(), "direct_io") {
			t.Errorf("direct I/O in blocks of %d: %v", offset, err)
		}
		report.Direct = was
	}
	a.cfg.DirectIO = false
	thick := func(sizes ...int64) (disks []*hostapi.NewDisk) {
		for _, n := range sizes {
			disks = append(disks, &hostapi.NewDisk{Uuid: uuid.NewString(), CapacityBytes: n, Thick: true})
		}
		return disks
	}
	if err := a.storageFor(t.Context(), "ds1", filepath.Join(d.Path, "web1"), thick(1<<20, 1<<20)); err != nil {
		t.Errorf("thick disks that fit: %v", err)
	}
	half := d.info().FreeBytes/2 + 1<<30
	var fault *hostapi.FaultError
	if err := a.storageFor(t.Context(), "ds1", d.Path, thick(half, half)); !errors.As(err, &fault) || fault.Fault.Kind != hostapi.Fault_NO_SPACE || !strings.Contains(err.Error(), "thin") {
		t.Errorf("thick disks that do not fit: %v", err)
	}
	there := thick(half, half)
	for _, n := range there { // as an earlier call made them, which a test leaves thin
		path := filepath.Join(d.Path, n.Uuid+".vmdk")
		if err := vdisk.Create(t.Context(), path, vdisk.Spec{Size: half / 512 * 512, UUID: uuid.MustParse(n.Uuid)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.storageFor(t.Context(), "ds1", d.Path, there); err != nil {
		t.Errorf("thick disks that are there: %v", err)
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "none", d.Path).CombinedOutput(); err != nil {
		t.Skipf("mount: %s", out)
	}
	t.Cleanup(func() { _ = exec.Command("umount", d.Path).Run() })
	if err := InitDatastore(d); err == nil || !strings.Contains(err.Error(), "power cut") {
		t.Errorf("a folder in memory: %v", err)
	}
	if _, err := os.Stat(filepath.Join(d.Path, markerFile)); !errors.Is(err, os.ErrNotExist) {
		t.Error("it was marked all the same")
	}
	if err := os.WriteFile(filepath.Join(d.Path, markerFile), marker, 0o644); err != nil {
		t.Fatal(err)
	}
	// Other storage is mounted there now: what was found out before does not count.
	if err := a.storageFor(t.Context(), "ds1", d.Path, nil); err == nil || !strings.Contains(err.Error(), "in memory") {
		t.Errorf("storage that was exchanged: %v", err)
	}
	if _, err := d.resolve("web1/web1.vmx"); err != nil {
		t.Errorf("a VM there cannot even be stopped: %v", err)
	}
}
