package vmx

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
)

// killAt names, in the environment of a vmx, the step at which it kills itself:
// "home.form:2" is the second time that it gets there. The names of all steps that
// it passes are in the file steps of its run folder.
const (
	killAt      = "MORTISE_TEST_KILL_AT"
	alsoInDisks = "MORTISE_TEST_IN_DISKS" // the steps of vdisk too, as disk/…
)

// steps is the hook of a vmx that dies by the order of its environment.
func steps(runDir string) func(string) {
	order := os.Getenv(killAt)
	if order == "" {
		return nil
	}
	var mu sync.Mutex // a disk's steps come from several goroutines
	seen := map[string]int{}
	return func(step string) {
		mu.Lock()
		defer mu.Unlock()
		seen[step]++
		at := fmt.Sprintf("%s:%d", step, seen[step])
		if at == order {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		if f, err := os.OpenFile(filepath.Join(runDir, "steps"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
			fmt.Fprintln(f, at)
			f.Close()
		}
	}
}

// TestKilledAtEveryStep kills the process at every step of every change of a VM's
// files and disk, repeats the request as center does, and checks that nothing is
// lost, nothing is in clear, and nothing is left behind (R3, R4).
func TestKilledAtEveryStep(t *testing.T) {
	if testing.Short() {
		t.Skip("see build/test.sh")
	}
	variables := map[string]string{"web1.nvram": strings.Repeat("FIRMWARE-VARIABLE ", 300), "web1.vmss": "SUSPEND-STATE"}
	data := content()
	fresh := func(t *testing.T) *lab {
		l := newLab(t)
		l.create(nil, nil)
		l.fill(data)
		for name, text := range variables {
			if err := os.WriteFile(filepath.Join(filepath.Dir(l.path), name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return l
	}
	changes := func(l *lab) []*hostapi.ReconfigureVMRequest {
		return []*hostapi.ReconfigureVMRequest{
			l.change(encrypt, encrypt, l.key("k1")), l.change(shallow, shallow, l.key("k2")),
			l.change(deep, deep, l.key("k3")), l.change(decrypt, decrypt, nil),
		}
	}
	check := func(l *lab, encrypted bool) {
		l.Helper()
		if got := l.read(); !bytes.Equal(got, data) { // opening settles, too
			l.Error("the disk reads otherwise")
		}
		p := l.start()
		st, err := p.Open(l.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
		if err != nil {
			l.Fatalf("%v\n%s", err, p.log)
		}
		for name, text := range variables {
			if got, err := os.ReadFile(filepath.Join(filepath.Dir(st.NvramPath), name)); err != nil || string(got) != text {
				l.Errorf("%s: %d bytes of %d: %v", name, len(got), len(text), err)
			}
			if clear := l.onDatastore([]byte(text[:13])); clear == encrypted {
				l.Errorf("%s in clear: %v", name, clear)
			}
		}
		l.stop(p)
		if left, _ := filepath.Glob(filepath.Join(filepath.Dir(l.path), "*.new-*")); len(left) > 0 {
			l.Errorf("left behind: %v", left)
		}
	}
	for i, kind := range []string{"encrypt", "shallow", "deep", "decrypt"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			l := fresh(t)
			for _, c := range changes(l)[:i] {
				l.must(c)
			}
			// What the change does, step by step, on a copy of the folder.
			before := filepath.Join(t.TempDir(), "before")
			if err := os.CopyFS(before, os.DirFS(filepath.Dir(l.path))); err != nil {
				t.Fatal(err)
			}
			l.kill = "never"
			p := l.start()
			l.kill = ""
			if _, err := l.reconfigure(p, changes(l)[i]); err != nil {
				t.Fatalf("%v\n%s", err, p.log)
			}
			text, err := os.ReadFile(filepath.Join(p.run, "steps"))
			if err != nil {
				t.Fatal(err)
			}
			l.stop(p)
			all := strings.Fields(string(text))
			if len(all) < 3 {
				t.Fatalf("steps: %v", all)
			}
			for _, step := range all {
				if err := os.RemoveAll(filepath.Dir(l.path)); err != nil {
					t.Fatal(err)
				}
				if err := os.CopyFS(filepath.Dir(l.path), os.DirFS(before)); err != nil {
					t.Fatal(err)
				}
				l.kill = step
				p := l.start()
				l.kill = ""
				if _, err := l.reconfigure(p, changes(l)[i]); err == nil {
					t.Fatalf("%s: not killed\n%s", step, p.log)
				}
				<-p.done
				info := l.must(changes(l)[i])
				if info.Encrypted != (i < 3) || info.Disks[0].Encrypted != (i < 3) || info.Disks[0].Conversion != "" {
					t.Errorf("%s: after the repeated change: %v", step, info)
				}
				check(l, i < 3)
				if t.Failed() {
					t.Fatalf("killed at %s", step)
				}
			}
			slices.Sort(all)
			t.Logf("killed at %v", slices.Compact(all))
		})
	}
}

// TestSettleLosesNothing: when the form that the VMX decided for cannot be read,
// neither form is removed.
func TestSettleLosesNothing(t *testing.T) {
	l := newLab(t)
	l.create(nil, nil)
	dir := filepath.Dir(l.path)
	nvram := filepath.Join(dir, "web1.nvram")
	if err := os.WriteFile(nvram, []byte("variables"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.must(l.change(encrypt, none, l.key("k1")))
	old, err := os.ReadFile(nvram)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(killAt, "home.decided:1")
	p := l.start()
	if _, err := l.reconfigure(p, l.change(deep, none, l.key("k2"))); err == nil {
		t.Fatal("not killed")
	}
	<-p.done
	os.Unsetenv(killAt)
	form, err := os.ReadFile(nvram + newEncrypted)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(nvram+newEncrypted, form[:100], 0o600); err != nil { // as storage that fails would show it
		t.Fatal(err)
	}
	q := l.start()
	_, err = q.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
	if f, text := hostapi.AsFault(err); err == nil || f.Kind != hostapi.Fault_TAMPERED || !strings.Contains(text, "both were kept") {
		t.Errorf("opened, or: %v", err)
	}
	l.stop(q)
	if now, err := os.ReadFile(nvram); err != nil || !bytes.Equal(now, old) {
		t.Errorf("the old form: %v", err)
	}
	if err := os.WriteFile(nvram+newEncrypted, form, 0o600); err != nil {
		t.Fatal(err)
	}
	q = l.start()
	st, err := q.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(st.NvramPath); err != nil || string(got) != "variables" {
		t.Errorf("%q, %v", got, err)
	}
	l.stop(q)
	// A form in clear that somebody put beside an encrypted file is not taken.
	if err := os.WriteFile(nvram+newPlain, []byte("planted"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.must(l.change(none, none, nil))
	q = l.start()
	if st, err = q.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true}); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(st.NvramPath); string(got) != "variables" || exists(nvram+newPlain) {
		t.Errorf("a planted file was taken: %q", got)
	}
	l.stop(q)
}

// TestForgedRecrypt: whoever can write the datastore edits the key id of a
// descriptor, so that a deep recrypt to that key seems to be done already. The
// descriptor is proven before it is believed.
func TestForgedRecrypt(t *testing.T) {
	l := newLab(t)
	l.create(l.key("k1"), l.key("k1"))
	k2 := l.key("k2")
	desc := filepath.Join(filepath.Dir(l.path), "web1.vmdk")
	if err := editLines(desc, func(s string) string {
		if strings.HasPrefix(s, "encryption.keySafe") {
			return strings.ReplaceAll(s, "k1", "k2")
		}
		return s
	}); err != nil {
		t.Fatal(err)
	}
	info := InspectDisk(desc)
	if info.KeyId.GetKey() != "k2" {
		t.Fatalf("the forgery does not look like one: %v", info)
	}
	p := l.start()
	_, err := l.reconfigure(p, l.change(none, deep, k2))
	if f, _ := hostapi.AsFault(err); err == nil || f.Kind != hostapi.Fault_TAMPERED {
		t.Errorf("a forged recrypt was believed: %v", err)
	}
	l.stop(p)
}

// TestGuestElsewhere: the files of a VM are not replaced while another process
// has its disks, on whatever host.
func TestGuestElsewhere(t *testing.T) {
	l := newLab(t)
	l.create(nil, nil)
	p := l.start()
	if _, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Serve: true}); err != nil {
		t.Fatal(err)
	}
	q := l.start()
	_, err := l.reconfigure(q, l.change(encrypt, none, l.key("k1")))
	if f, _ := hostapi.AsFault(err); err == nil || f.Kind != hostapi.Fault_IN_USE {
		t.Errorf("files were encrypted under a guest: %v", err)
	}
	l.stop(q)
	l.stop(p)
}

// TestTwinDisks: a copied descriptor must not stand for the disk it was copied from.
func TestTwinDisks(t *testing.T) {
	l := newLab(t)
	l.create(nil, nil)
	dir := filepath.Dir(l.path)
	text, err := os.ReadFile(filepath.Join(dir, "web1.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	text = bytes.ReplaceAll(text, []byte("web1-flat"), []byte("twin-flat"))
	flat, err := os.ReadFile(filepath.Join(dir, "web1-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"twin.vmdk": text, "twin-flat.vmdk": flat} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := editLines(l.path, func(s string) string {
		if strings.HasPrefix(s, "scsi0:0.") {
			return s + strings.NewReplacer("scsi0:0", "scsi0:1", "web1.vmdk", "twin.vmdk").Replace(s)
		}
		return s
	}); err != nil {
		t.Fatal(err)
	}
	p := l.start()
	_, err = p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Serve: true})
	if f, text := hostapi.AsFault(err); err == nil || f.Kind != hostapi.Fault_INVALID || !strings.Contains(text, "are both disk") {
		t.Errorf("twins were opened: %v", err)
	}
	l.stop(p)
}

// TestRemovedDiskIsFound: a removal that was interrupted between the VMX and the
// files removes the files when it is repeated.
func TestRemovedDiskIsFound(t *testing.T) {
	l := newLab(t)
	l.create(l.key("k1"), l.key("k1"))
	r := &hostapi.ReconfigureVMRequest{Ref: l.ref(), RemoveDiskUuids: []string{l.disk.String()}, DeleteRemoved: true}
	t.Setenv(killAt, "disk.dropped:1")
	p := l.start()
	if _, err := l.reconfigure(p, r); err == nil {
		t.Fatal("not killed")
	}
	<-p.done
	os.Unsetenv(killAt)
	if info := l.must(r); len(info.Disks) != 0 {
		t.Errorf("disks: %v", info.Disks)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(l.path), "*.vmdk*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestOtherFilesFollow is E1 for whatever holds guest data in an imported folder.
func TestOtherFilesFollow(t *testing.T) {
	l := newLab(t)
	l.create(nil, nil)
	vmem := filepath.Join(filepath.Dir(l.path), "web1-Snapshot1.vmem")
	if err := os.WriteFile(vmem, []byte("GUEST-MEMORY"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.must(l.change(encrypt, encrypt, l.key("k1")))
	l.must(l.change(deep, deep, l.key("k2")))
	if l.onDatastore([]byte("GUEST-MEMORY")) {
		t.Error("memory of the guest is in clear in the folder of an encrypted VM")
	}
	l.must(l.change(decrypt, decrypt, nil))
	if got, err := os.ReadFile(vmem); err != nil || string(got) != "GUEST-MEMORY" {
		t.Errorf("%q, %v", got, err)
	}
	if left, err := Delete(l.path, l.vm.String()); err != nil || len(left) > 0 {
		t.Errorf("delete: %v, %v", left, err)
	}
}

// TestFailedCreate leaves no disks, of which nothing would know.
func TestFailedCreate(t *testing.T) {
	l := newLab(t)
	p := l.start()
	_, err := p.Create(t.Context(), &hostapi.VMXCreateRequest{Keys: l.send(), Vm: &hostapi.CreateVMRequest{
		Uuid: l.vm.String(), Name: "web1", Disks: []*hostapi.NewDisk{{Uuid: l.disk.String(), CapacityBytes: 1 << 20}, {Uuid: uuid.NewString(), CapacityBytes: 1 << 20, Controller: "scsi9:0"}},
	}})
	if err == nil {
		t.Fatal("a disk was put at scsi9:0")
	}
	l.stop(p)
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(l.path), "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	l.create(nil, nil)
}
