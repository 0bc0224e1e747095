package vmx

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
)

// An undoLab is a VM with two disks, files, and a change of all of it that can be
// stopped anywhere and undone.
type undoLab struct {
	*lab
	second  uuid.UUID // the disk that is changed first
	data    []byte
	kind    hostapi.CryptoChange_Kind
	was     hostapi.CryptoChange_Kind // ENCRYPT: encrypted before, under k1
	stopped string                    // a copy of the folder as the change was stopped
}

const stateFile = "web1.vmss"

func newUndoLab(t *testing.T, kind hostapi.CryptoChange_Kind) *undoLab {
	l := &undoLab{lab: newLab(t), second: uuid.New(), data: content(), kind: kind, stopped: filepath.Join(t.TempDir(), "stopped")}
	l.create(nil, nil)
	l.fill(l.data)
	if err := os.WriteFile(filepath.Join(filepath.Dir(l.path), stateFile), []byte("SUSPEND-STATE"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.must(&hostapi.ReconfigureVMRequest{Ref: l.ref(), AddDisks: []*hostapi.NewDisk{{Uuid: l.second.String(), CapacityBytes: 1 << 20}}})
	if kind != encrypt {
		l.must(l.both(encrypt, "k1"))
		l.was = encrypt
	}
	l.key("k2")
	return l
}

// both changes VM files and both disks; the second disk is the first to be changed.
func (l *undoLab) both(kind hostapi.CryptoChange_Kind, key string) *hostapi.ReconfigureVMRequest {
	id := l.key(key)
	if kind == decrypt {
		id = nil
	}
	r := l.change(kind, kind, id)
	r.Disks = append([]*hostapi.DiskCryptoChange{{DiskUuid: l.second.String(), Change: &hostapi.CryptoChange{Kind: kind, Key: id}}}, r.Disks...)
	return r
}

func (l *undoLab) forward() *hostapi.ReconfigureVMRequest { return l.both(l.kind, "k2") }

func (l *undoLab) back() *hostapi.ReconfigureVMRequest {
	r := l.forward()
	r.Undo = true
	r.HomeBefore = &hostapi.Before{}
	if l.was == encrypt {
		r.HomeBefore = &hostapi.Before{Encrypted: true, Key: l.key("k1")}
	}
	for _, d := range r.Disks {
		d.Before = r.HomeBefore
	}
	return r
}

// stop runs the change and kills it at a step, or in the middle of its last disk.
func (l *undoLab) stop(step string) {
	l.Helper()
	if step != "middle" {
		l.kill = step
	}
	p := l.start()
	l.kill = ""
	if _, err := p.SetPace(l.Context(), &hostapi.Pace{LimitBytesPerSecond: 1 << 20}); err != nil {
		l.Fatal(err)
	}
	s, err := p.Reconfigure(l.Context(), &hostapi.VMXReconfigureRequest{Change: l.forward(), Keys: l.send()})
	if err != nil {
		l.Fatal(err)
	}
	for {
		u, err := s.Recv()
		if err != nil {
			if step == "middle" {
				l.Fatalf("%v\n%s", err, p.log)
			}
			break // killed
		}
		if u.Result != nil {
			l.Fatalf("the change came to its end before %s", step)
		}
		if step == "middle" && strings.Contains(u.Stage, "2 of 2") && u.DoneBytes > 0 && u.DoneBytes < u.TotalBytes {
			break
		}
		if step != "middle" && u.TotalBytes > 1<<20 {
			_, _ = p.SetPace(l.Context(), &hostapi.Pace{}) // it may be dead already
		}
	}
	_ = p.cmd.Process.Kill()
	<-p.done
	l.copy(l.stopped, filepath.Dir(l.path))
}

// copy makes to a copy of the folder from, holes included.
func (l *undoLab) copy(to, from string) {
	l.Helper()
	if err := os.RemoveAll(to); err != nil {
		l.Fatal(err)
	}
	if out, err := exec.Command("cp", "-r", "--sparse=always", from, to).CombinedOutput(); err != nil {
		l.Fatalf("%v: %s", err, out)
	}
}

// restore puts back the folder as the change was stopped.
func (l *undoLab) restore() {
	l.Helper()
	l.copy(filepath.Dir(l.path), l.stopped)
}

// check compares the VM with what it was before the change.
func (l *undoLab) check(when string, info *hostapi.VMInfo) {
	l.Helper()
	was, key := l.was == encrypt, ""
	if was {
		key = "k1"
	}
	if info.Encrypted != was || info.Key.GetKey() != key {
		l.Errorf("%s: VM files encrypted %v, key %v", when, info.Encrypted, info.Key)
	}
	for _, d := range info.Disks {
		if d.Encrypted != was || d.KeyId.GetKey() != key || d.Conversion != "" || d.TargetKeyId != nil {
			l.Errorf("%s: disk %v", when, d)
		}
	}
	if len(info.Disks) != 2 {
		l.Errorf("%s: %d disks", when, len(info.Disks))
	}
	safes, err := RequiredKeys(l.path)
	if all := slices.Concat(safes...); err != nil || slices.ContainsFunc(all, func(id keysafe.KeyID) bool { return id.Key == "k2" }) {
		l.Errorf("%s: keys %v, %v", when, all, err)
	}
	all := l.keks
	l.keks = map[string][]byte{}
	if was {
		l.keks["k1"] = all["k1"] // the old key is enough
	}
	if got := l.read(); !bytes.Equal(got, l.data) {
		l.Errorf("%s: the disk reads otherwise", when)
	}
	l.keks = all
	if clear := l.onDatastore([]byte("SUSPEND-STATE")); clear == was {
		l.Errorf("%s: VM files in clear: %v", when, clear)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(l.path), "*.new-*")); len(left) > 0 {
		l.Errorf("%s: left behind: %v", when, left)
	}
	if l.Failed() {
		l.FailNow()
	}
}

// TestUndone stops every kind of change at its decisive steps, and in the middle
// of a disk while another is done, and undoes it: the VM is what it was, and opens
// with the old keys alone. The undoing is killed at each of its own steps, too.
func TestUndone(t *testing.T) {
	if testing.Short() {
		t.Skip("see build/test.sh")
	}
	for name, c := range map[string]struct {
		kind  hostapi.CryptoChange_Kind
		stops []string
	}{
		"encrypt": {encrypt, []string{"home.decided:1", "disk.done:2", "middle"}},
		"shallow": {shallow, []string{"home.both:1", "disk.begin:1", "disk.done:1"}},
		"deep":    {deep, []string{"home.decided:1", "disk.done:2", "middle"}},
		"decrypt": {decrypt, []string{"disk.begin:1", "disk.done:2", "middle"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newUndoLab(t, c.kind)
			before := filepath.Join(t.TempDir(), "before")
			l.copy(before, filepath.Dir(l.path))
			for _, stop := range c.stops {
				l.stopped = before
				l.restore()
				l.stopped = filepath.Join(t.TempDir(), "stopped")
				l.stop(stop)
				l.check("stopped at "+stop, l.must(l.back()))
			}
			// Now the undoing of the last one, killed at every step of its own.
			l.restore()
			l.kill = "never"
			p := l.start()
			if _, err := l.reconfigure(p, l.back()); err != nil {
				t.Fatalf("%v\n%s", err, p.log)
			}
			l.kill = ""
			text, err := os.ReadFile(filepath.Join(p.run, "steps"))
			if err != nil {
				t.Fatal(err)
			}
			l.lab.stop(p)
			all := strings.Fields(string(text))
			if len(all) < 4 {
				t.Fatalf("steps: %v", all)
			}
			for _, step := range all {
				l.restore()
				l.kill = step
				p := l.start()
				l.kill = ""
				if _, err := l.reconfigure(p, l.back()); err == nil {
					t.Fatalf("%s: not killed\n%s", step, p.log)
				}
				<-p.done
				l.check("killed at "+step, l.must(l.back()))
			}
			t.Logf("undoing was killed at %v", all)
			// The VM can be changed again, by the same change.
			info := l.must(l.forward())
			if info.Encrypted != (c.kind != decrypt) || info.Disks[0].Encrypted != info.Encrypted {
				t.Errorf("changed after all: %v", info)
			}
			if got := l.read(); !bytes.Equal(got, l.data) {
				t.Error("the disk reads otherwise")
			}
		})
	}
}

// TestPaced holds a conversion back under a guest, stops it in the middle and
// undoes it under the guest; and estimates it before.
func TestPaced(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.create(l.key("k1"), l.key("k1"))
	data := content()
	l.fill(data)
	p := l.start()
	if _, err := p.Estimate(t.Context(), &hostapi.EstimateRequest{Ref: l.ref(), DiskUuids: []string{l.disk.String()}}); err == nil {
		t.Error("a VM that is not open was estimated")
	}
	st, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
	if err != nil {
		t.Fatalf("%v\n%s", err, p.log)
	}
	e, err := p.Estimate(t.Context(), &hostapi.EstimateRequest{Ref: l.ref(), DiskUuids: []string{l.disk.String()}})
	if err != nil || len(e.Disks) != 1 {
		t.Fatalf("estimate: %v, %v", e, err)
	}
	if d := e.Disks[0]; d.Bytes < 9<<20 || d.Bytes > diskSize || d.BytesPerSecond <= 0 || d.IdleSeconds <= 0 || d.BusySeconds <= d.IdleSeconds {
		t.Errorf("estimate: %v", d)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(l.path), "*trial*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := p.SetPace(t.Context(), &hostapi.Pace{LimitBytesPerSecond: -1}); err == nil {
		t.Error("a negative limit was taken")
	}

	if _, err := p.SetPace(t.Context(), &hostapi.Pace{LimitBytesPerSecond: 2 << 20}); err != nil {
		t.Fatal(err)
	}
	l.key("k2")
	change := l.change(none, deep, l.key("k2"))
	ctx, cancel := context.WithCancel(t.Context())
	s, err := p.Reconfigure(ctx, &hostapi.VMXReconfigureRequest{Change: change, Keys: l.send()})
	if err != nil {
		t.Fatal(err)
	}
	var at int64
	for at == 0 {
		u, err := s.Recv()
		if err != nil {
			t.Fatalf("%v\n%s", err, p.log)
		}
		if at = u.DoneBytes; at > 0 && (u.BytesPerSecond <= 0 || u.Back || u.TotalBytes != diskSize) {
			t.Errorf("progress: %v", u)
		}
	}
	if at >= diskSize {
		t.Fatal("a limit of 2 MiB a second did not hold it back")
	}
	if _, err := p.SetPace(t.Context(), &hostapi.Pace{Paused: true}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	one, _ := os.ReadFile(filepath.Join(filepath.Dir(l.path), "web1-flat.vmdk.state"))
	if out, err := exec.Command("nbdcopy", "nbd+unix:///?socket="+st.Disks[0].NbdSocket, filepath.Join(t.TempDir(), "out")).CombinedOutput(); err != nil {
		t.Errorf("the guest is held up by a paused conversion: %v\n%s", err, out)
	}
	if two, _ := os.ReadFile(filepath.Join(filepath.Dir(l.path), "web1-flat.vmdk.state")); !bytes.Equal(one, two) {
		t.Error("a paused conversion went on")
	}
	if _, err := p.Estimate(t.Context(), &hostapi.EstimateRequest{Ref: l.ref()}); err == nil {
		t.Error("a VM was estimated in the middle of a change")
	}
	// What agent and center do on a cancel: the call ends, then the undoing begins.
	cancel()
	change.Undo = true
	change.Disks[0].Before = &hostapi.Before{Encrypted: true, Key: l.key("k1")}
	if _, err := p.SetPace(t.Context(), &hostapi.Pace{}); err != nil {
		t.Fatal(err)
	}
	s, err = p.Reconfigure(t.Context(), &hostapi.VMXReconfigureRequest{Change: change, Keys: l.send()})
	if err != nil {
		t.Fatal(err)
	}
	var info *hostapi.VMInfo
	back := false
	for {
		u, err := s.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, p.log)
		}
		back, info = back || u.Back && u.TotalBytes > 0, u.Result
	}
	if d := info.GetDisks()[0]; !back || d.KeyId.Key != "k1" || d.Conversion != "" {
		t.Errorf("after running back (%v): %v", back, d)
	}
	l.stop(p)
	delete(l.keks, "k2")
	if got := l.read(); !bytes.Equal(got, data) {
		t.Error("the disk reads otherwise")
	}
}

// TestGuestWithoutFiles: the files of a VM change under a guest that has none of
// them open, which is so with a BIOS; of one that has they do not.
func TestGuestWithoutFiles(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.create(nil, nil)
	data := content()
	l.fill(data)
	run := func(p *proc, r *hostapi.ReconfigureVMRequest) *hostapi.VMInfo {
		t.Helper()
		info, err := l.reconfigure(p, r)
		if err != nil {
			t.Fatalf("%v\n%s", err, p.log)
		}
		return info
	}
	p := l.start()
	if _, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Serve: true}); err != nil {
		t.Fatal(err)
	}
	nvram := filepath.Join(filepath.Dir(l.path), "web1.nvram")
	if err := os.WriteFile(nvram, []byte("variables"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := l.reconfigure(p, l.change(encrypt, encrypt, l.key("k1")))
	if f, text := hostapi.AsFault(err); f.Kind != hostapi.Fault_WRONG_POWER_STATE || !strings.Contains(text, "web1.nvram") {
		t.Errorf("files were encrypted under a guest that has them open: %v", err)
	}
	if err := os.Remove(nvram); err != nil {
		t.Fatal(err)
	}
	for i, kind := range []hostapi.CryptoChange_Kind{encrypt, deep, shallow, decrypt} {
		key := l.key(fmt.Sprintf("k%d", i+1))
		if kind == decrypt {
			key = nil
		}
		info := run(p, l.change(kind, kind, key))
		if info.Encrypted != (kind != decrypt) || info.Disks[0].Encrypted != info.Encrypted {
			t.Errorf("%v under a guest: %v", kind, info)
		}
		if kind == deep { // the next vmx of the same guest has to open it as well
			l.stop(p)
			p = l.start()
			if _, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true, Restarted: true}); err != nil {
				t.Fatalf("%v\n%s", err, p.log)
			}
		}
	}
	l.stop(p)
	if got := l.read(); !bytes.Equal(got, data) {
		t.Error("the disk reads otherwise")
	}
}
