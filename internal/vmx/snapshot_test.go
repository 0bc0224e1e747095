package vmx

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/internal/vdisk"
)

// A snapLab is a VM of two disks, and what its disks and each of its snapshots must
// show.
type snapLab struct {
	*lab
	disks []uuid.UUID
	now   []byte            // what both disks begin with; the rest is zero
	froze map[string][]byte // by the snapshot's name

	epoch map[string]uint64 // the highest that was told of a disk, which center expects from then on
}

const (
	snapDisk = 2 << 20
	snapUnit = 64 << 10
)

func newSnapLab(t *testing.T, home *string) *snapLab {
	l := &snapLab{lab: newLab(t), disks: []uuid.UUID{uuid.New(), uuid.New()}, now: make([]byte, snapDisk), froze: map[string][]byte{}}
	r := &hostapi.CreateVMRequest{Uuid: l.vm.String(), Name: "web1", Hardware: &hostapi.Hardware{MemoryMib: 64, Cpus: 1}}
	if home != nil {
		r.HomeKey = l.key(*home)
	}
	for _, d := range l.disks {
		r.Disks = append(r.Disks, &hostapi.NewDisk{Uuid: d.String(), CapacityBytes: snapDisk, KeyId: r.HomeKey})
	}
	p := l.start()
	defer l.stop(p)
	if _, err := p.Create(t.Context(), &hostapi.VMXCreateRequest{Keys: l.send(), Vm: r}); err != nil {
		t.Fatalf("%v\n%s", err, p.log)
	}
	return l
}

// write changes both disks: n pieces from the i-th on.
func (l *snapLab) write(text string, i, n int) {
	l.Helper()
	p := l.start()
	defer l.stop(p)
	if _, err := p.Open(l.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send()}); err != nil {
		l.Fatalf("open: %v\n%s", err, p.log)
	}
	l.writeThrough(p, text, i, n)
}

func (l *snapLab) writeThrough(p *proc, text string, i, n int) {
	l.Helper()
	piece := bytes.Repeat([]byte(fmt.Sprintf("%16.16s", text)), n*snapUnit/16)
	copy(l.now[i*snapUnit:], piece)
	for _, d := range l.disks {
		s, err := p.ImportDisk(l.Context())
		if err != nil {
			l.Fatal(err)
		}
		if err := s.Send(&hostapi.ImportChunk{Ref: l.ref(), DiskUuid: d.String(), Offset: int64(i) * snapUnit, Data: bytes.Clone(piece)}); err != nil {
			l.Fatal(err)
		}
		if _, err := s.CloseAndRecv(); err != nil {
			l.Fatalf("%v\n%s", err, p.log)
		}
	}
}

// act changes snapshots in a process of its own, or returns its error.
func (l *snapLab) act(p *proc, r *hostapi.SnapshotRequest) (*hostapi.VMInfo, error) {
	l.Helper()
	if p == nil {
		p = l.start()
		defer l.stop(p)
	}
	r.Ref = l.ref()
	s, err := p.ChangeSnapshots(l.Context(), &hostapi.VMXSnapshotRequest{Change: r, Keys: l.send()})
	if err != nil {
		return nil, err
	}
	var info *hostapi.VMInfo
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

func (l *snapLab) mustAct(r *hostapi.SnapshotRequest) *hostapi.VMInfo {
	l.Helper()
	info, err := l.act(nil, r)
	if err != nil {
		l.Fatal(err)
	}
	return info
}

// take makes a snapshot.
func (l *snapLab) take(name string) *hostapi.VMInfo {
	l.Helper()
	info := l.mustAct(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_CREATE, Name: name, Header: &hostapi.Header{OperationId: "make " + name}})
	l.froze[name] = bytes.Clone(l.now)
	return info
}

func (l *snapLab) revert(name string) *hostapi.VMInfo {
	l.Helper()
	info := l.mustAct(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_REVERT, Id: l.id(name)})
	l.now = bytes.Clone(l.froze[name])
	return info
}

func (l *snapLab) remove(name string) *hostapi.VMInfo {
	l.Helper()
	info := l.mustAct(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_REMOVE, Id: l.id(name)})
	delete(l.froze, name)
	return info
}

func (l *snapLab) id(name string) int32 {
	l.Helper()
	info, err := Inspect(l.path)
	if err != nil {
		l.Fatal(err)
	}
	for _, s := range info.Snapshots {
		if s.Name == name {
			return s.Id
		}
	}
	l.Fatalf("no snapshot %q", name)
	return 0
}

// expecting is the VM as center knows it.
func (l *snapLab) expecting() *hostapi.VMRef {
	l.Helper()
	info, err := Inspect(l.path)
	if err != nil {
		l.Fatal(err)
	}
	if l.epoch == nil {
		l.epoch = map[string]uint64{}
	}
	ref := l.ref()
	ref.Expect = &hostapi.Expect{}
	for _, d := range info.Disks {
		l.epoch[d.Uuid] = max(l.epoch[d.Uuid], d.Epoch)
		ref.Expect.Disks = append(ref.Expect.Disks, &hostapi.DiskExpect{Uuid: d.Uuid, Epoch: l.epoch[d.Uuid]})
	}
	return ref
}

// check reads the disks as a guest does.
func (l *snapLab) check(when string) {
	l.Helper()
	p := l.start()
	defer l.stop(p)
	st, err := p.Open(l.Context(), &hostapi.OpenRequest{Ref: l.expecting(), Keys: l.send(), Serve: true})
	if err != nil {
		l.Fatalf("%s: open: %v\n%s", when, err, p.log)
	}
	l.compare(when, st)
}

func (l *snapLab) compare(when string, st *hostapi.VMXStatus) {
	l.Helper()
	if len(st.Disks) != len(l.disks) {
		l.Fatalf("%s: %d disks", when, len(st.Disks))
	}
	for i, d := range st.Disks {
		out := filepath.Join(l.TempDir(), "out")
		if text, err := exec.Command("nbdcopy", "nbd+unix:///?socket="+d.NbdSocket, out).CombinedOutput(); err != nil {
			l.Fatalf("%s: nbdcopy: %v\n%s", when, err, text)
		}
		if data, err := os.ReadFile(out); err != nil || !bytes.Equal(data, l.now) {
			l.Errorf("%s: disk %d reads otherwise (%v)", when, i, err)
		}
	}
}

// checkAll goes back to every snapshot and reads it.
func (l *snapLab) checkAll(when string) {
	l.Helper()
	l.check(when)
	for _, name := range slices.Sorted(maps.Keys(l.froze)) {
		l.revert(name)
		l.check(when + ", back to " + name)
	}
}

// links are the descriptors in the folder.
func (l *snapLab) links() (names []string) {
	l.Helper()
	all, _ := filepath.Glob(filepath.Join(filepath.Dir(l.path), "*.vmdk"))
	for _, n := range all {
		if n = filepath.Base(n); !strings.Contains(n, "-flat") && !strings.Contains(n, "-delta") {
			names = append(names, n)
		}
	}
	return names
}

// Snapshots of a VM with two disks: a tree with branches, kept through every change
// of keys (R1–R3), and merged away.
func TestSnapshots(t *testing.T) {
	k1 := "k1"
	l := newSnapLab(t, &k1)
	l.write("base", 0, 20)
	l.take("one")
	l.write("after one", 5, 3)
	info := l.take("two")
	if len(info.Snapshots) != 2 || info.CurrentSnapshot != 2 || info.Snapshots[1].Parent != 1 || info.ConsolidationNeeded {
		t.Fatalf("%v", info)
	}
	l.write("after two", 6, 12)
	l.check("on two")
	l.revert("one")
	l.write("another way", 0, 2)
	l.check("on one again")
	if info = l.take("three"); info.Snapshots[2].Parent != 1 || info.CurrentSnapshot != 3 {
		t.Fatalf("%v", info)
	}
	l.write("after three", 30, 2)
	l.check("on three")

	// Disks cannot come and go meanwhile, and a snapshot is not made twice.
	if _, err := l.reconfigureOff(&hostapi.ReconfigureVMRequest{Ref: l.ref(), RemoveDiskUuids: []string{l.disks[1].String()}}); kindOf(err) != hostapi.Fault_INVALID {
		t.Fatalf("removing a disk: %v", err)
	}
	if info := l.mustAct(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_CREATE, Name: "three", Header: &hostapi.Header{OperationId: "make three"}}); len(info.Snapshots) != 3 {
		t.Fatalf("made again: %v", info)
	}
	for _, name := range []string{"", strings.Repeat("n", 81), "a\nb"} {
		if _, err := l.act(nil, &hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_CREATE, Name: name}); kindOf(err) != hostapi.Fault_INVALID {
			t.Errorf("name %q: %v", name, err)
		}
	}
	for _, act := range []hostapi.SnapshotRequest_Act{hostapi.SnapshotRequest_REVERT, hostapi.SnapshotRequest_RENAME} {
		if _, err := l.act(nil, &hostapi.SnapshotRequest{Act: act, Id: 9, Name: "x"}); kindOf(err) != hostapi.Fault_NOT_FOUND {
			t.Errorf("%v of none: %v", act, err)
		}
	}

	both := func(kind hostapi.CryptoChange_Kind, key *hostapi.KeyID) {
		t.Helper()
		r := &hostapi.ReconfigureVMRequest{Ref: l.ref(), Home: &hostapi.CryptoChange{Kind: kind, Key: key}}
		for _, d := range l.disks {
			r.Disks = append(r.Disks, &hostapi.DiskCryptoChange{DiskUuid: d.String(), Change: &hostapi.CryptoChange{Kind: kind, Key: key}})
		}
		info := l.must(r)
		l.epoch = nil // center takes the result of a change as it is
		for _, d := range info.Disks {
			if d.Encrypted != (kind != decrypt) || d.Conversion != "" {
				t.Fatalf("%v: %v", kind, d)
			}
		}
		if clear := l.onDatastore([]byte(fmt.Sprintf("%16.16s", "after one"))); clear != (kind == decrypt) {
			t.Fatalf("%v: in clear: %v", kind, clear)
		}
		for _, f := range []string{"web1.vmdk", "web1-000001.vmdk", "web1_1-000001.vmdk"} {
			text, err := os.ReadFile(filepath.Join(filepath.Dir(l.path), f))
			if err != nil || key != nil && !bytes.Contains(text, []byte(key.Key)) {
				t.Errorf("%v: %s is not under %v (%v)", kind, f, key, err)
			}
		}
	}
	both(shallow, l.key("k2"))
	delete(l.keks, "k1")
	l.check("after a shallow recrypt")
	l.halfRecrypted()
	l.checkAll("after half a deep recrypt that was undone")
	l.revert("three")
	both(deep, l.key("k3"))
	delete(l.keks, "k2")
	l.check("after a deep recrypt")
	both(decrypt, nil)
	l.check("after a decryption")
	both(encrypt, l.key("k4"))
	delete(l.keks, "k3")
	l.write("at last", 31, 1)
	l.take("four")
	l.checkAll("under the fourth key")

	l.mustAct(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_RENAME, Id: l.id("two"), Name: "second", Description: "with \"quotes\"\nand two lines"})
	l.froze["second"] = l.froze["two"]
	delete(l.froze, "two")
	l.revert("three")
	if info := l.remove("one"); !info.ConsolidationNeeded {
		t.Error("the base has two links on it, and nothing is left to be done?")
	}
	l.checkAll("without one")
	l.revert("four")
	if info := l.remove("second"); info.ConsolidationNeeded {
		t.Errorf("one branch is gone: %v", info)
	}
	l.checkAll("without two")
	l.remove("three")
	l.checkAll("without three")
	info = l.mustAct(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_REMOVE_ALL})
	if len(info.Snapshots) != 0 || info.CurrentSnapshot != 0 || info.ConsolidationNeeded || len(info.Problems) > 0 {
		t.Errorf("%v", info)
	}
	l.check("without any")
	if links := l.links(); len(links) != 2 {
		t.Errorf("links: %v, %v", links, info)
	}

	l.take("last")
	if left, err := Delete(l.path, l.vm.String()); err != nil || len(left) > 0 {
		t.Fatalf("deleting the VM leaves %v: %v", left, err)
	}
}

// halfRecrypted breaks a deep recrypt of the first disk off when some of its links
// have come to its end, and undoes it.
func (l *snapLab) halfRecrypted() {
	l.Helper()
	r := &hostapi.ReconfigureVMRequest{Ref: l.ref(), Pace: &hostapi.Pace{LimitBytesPerSecond: 1 << 20}, Disks: []*hostapi.DiskCryptoChange{{
		DiskUuid: l.disks[0].String(), Before: &hostapi.Before{Encrypted: true, Key: l.key("k2")},
		Change: &hostapi.CryptoChange{Kind: deep, Key: l.key("given up")},
	}}}
	epochs := func() (all []uint64) {
		links, err := vdisk.DescribeFolder(filepath.Dir(l.path))
		if err != nil {
			l.Fatal(err)
		}
		for _, i := range links {
			if i.UUID == l.disks[0] && i.Conversion == vdisk.NotConverting && !slices.Contains(all, i.Epoch) {
				all = append(all, i.Epoch)
			}
		}
		return all
	}
	p := l.start()
	if _, err := p.SetPace(l.Context(), r.Pace); err != nil {
		l.Fatal(err)
	}
	s, err := p.Reconfigure(l.Context(), &hostapi.VMXReconfigureRequest{Change: r, Keys: l.send()})
	if err != nil {
		l.Fatal(err)
	}
	for len(epochs()) < 2 {
		if _, err := s.Recv(); err != nil {
			l.Fatalf("it ended before it could be broken off: %v\n%s", err, p.log)
		}
	}
	if err := p.cmd.Process.Kill(); err != nil {
		l.Fatal(err)
	}
	<-p.done
	r.Undo, r.Pace = true, nil
	l.must(r)
	delete(l.keks, "given up")
	if e := epochs(); len(e) < 2 {
		l.Fatalf("every link has epoch %v", e)
	}
}

// reconfigureOff is reconfigure in a process of its own.
func (l *lab) reconfigureOff(r *hostapi.ReconfigureVMRequest) (*hostapi.VMInfo, error) {
	p := l.start()
	defer l.stop(p)
	return l.reconfigure(p, r)
}

func kindOf(err error) hostapi.Fault_Kind {
	f, _ := hostapi.AsFault(err)
	return f.GetKind()
}

// A guest that goes on working sees nothing of a snapshot and of its end, nor of a
// vmx that is killed in between, with writes that it has not flushed.
func TestSnapshotsUnderGuest(t *testing.T) {
	k1 := "k1"
	l := newSnapLab(t, &k1)
	l.write("base", 0, 20)
	p := l.start()
	st, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
	if err != nil {
		t.Fatalf("%v\n%s", err, p.log)
	}
	writeNow := func(text string, i int) {
		t.Helper()
		copy(l.now[i*snapUnit:], bytes.Repeat([]byte(fmt.Sprintf("%16.16s", text)), snapUnit/16))
		for _, d := range st.Disks {
			cmd := exec.Command("qemu-io", "-f", "raw", "-t", "unsafe", "-c", fmt.Sprintf("write -s %s %d %d", l.file(l.now[i*snapUnit:(i+1)*snapUnit]), i*snapUnit, snapUnit), "nbd+unix:///?socket="+d.NbdSocket)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("qemu-io: %v\n%s\n%s", err, out, p.log)
			}
		}
	}
	act := func(r *hostapi.SnapshotRequest) {
		t.Helper()
		if _, err := l.act(p, r); err != nil {
			t.Fatal(err)
		}
	}
	act(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_CREATE, Name: "one"})
	l.froze["one"] = bytes.Clone(l.now)
	writeNow("after one", 3)
	act(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_CREATE, Name: "two"})
	l.froze["two"] = bytes.Clone(l.now)
	writeNow("after two", 3)
	writeNow("also", 25)
	if _, err := l.act(p, &hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_REVERT, Id: 1}); kindOf(err) != hostapi.Fault_WRONG_POWER_STATE {
		t.Fatalf("revert under a guest: %v", err)
	}
	l.compare("on two", st)

	// Killed, and started again in the same run folder.
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-p.done
	p = l.startIn(p.run)
	if st, err = p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true, Restarted: true}); err != nil {
		t.Fatalf("%v\n%s", err, p.log)
	}
	l.compare("after a kill", st)

	act(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_REMOVE, Id: 1})
	writeNow("after the first end", 4)
	l.compare("without one", st)
	act(&hostapi.SnapshotRequest{Act: hostapi.SnapshotRequest_REMOVE_ALL})
	writeNow("after the last end", 5)
	l.compare("without any", st)
	if links := l.links(); len(links) != 2 {
		t.Errorf("links: %v", links)
	}
	l.stop(p)
	l.check("powered off")
}

// file is a file with these bytes.
func (l *lab) file(b []byte) string {
	l.Helper()
	name := filepath.Join(l.TempDir(), "piece")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		l.Fatal(err)
	}
	return name
}
