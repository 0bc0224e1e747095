package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"mortise/internal/hostapi"
	"mortise/test/guest"
)

// fioLoop writes files over and over and verifies what it has written, until it is
// told to stop; /run/passes has how often it went well.
const fioLoop = `cd /tmp; n=0; while [ ! -e /run/stop ]; do ` +
	`fio --name=v --directory=/data --size=16m --rw=randrw --rwmixread=30 --bsrange=512-64k --ba=512 --direct=1 --ioengine=libaio --iodepth=8 --fsync=64 ` +
	`--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=$n >/run/fio.log 2>&1 || { echo $? >/run/failed; break; }; ` +
	`n=$((n+1)); echo $n >/run/passes; done; : >/run/ended`

// TestGuestVerifiesItsDisk: fio writes and verifies on an ext4 while its disk is
// encrypted, re-keyed, snapshotted, decrypted and consolidated under it, and vmx and
// the host agent are killed in the middle (R2–R4). No byte is another one afterwards,
// and the file system is clean.
func TestGuestVerifiesItsDisk(t *testing.T) {
	t.Parallel()
	const size = 208 << 20
	img, err := guest.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tools, err := guest.Tools(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h := startHost(t)
	vm, boot, toolbox, disk := uuid.NewString(), uuid.NewString(), uuid.NewString(), uuid.NewString()
	k1 := h.push("k1", vm)
	info, err := h.CreateVM(t.Context(), &hostapi.CreateVMRequest{
		Uuid: vm, Name: "fio", Datastore: "ds1", Folder: "fio", HomeKey: k1,
		Hardware: &hostapi.Hardware{MemoryMib: 384, Cpus: 1},
		Disks: []*hostapi.NewDisk{
			{Uuid: boot, CapacityBytes: length(t, img.Raw), KeyId: k1},
			{Uuid: toolbox, CapacityBytes: length(t, tools)},
			{Uuid: disk, CapacityBytes: size},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ref := info.Ref
	h.importRaw(ref, boot, img.Raw)
	h.importRaw(ref, toolbox, tools)
	if _, err := h.PowerOn(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
	g := h.console(ref)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := g.Boot(ctx); err != nil {
		t.Fatalf("%v\n%s", err, g.Console())
	}
	h.do(g, fmt.Sprintf("tools %d", size))
	h.run(g, "head -c 16777216 /dev/urandom >/data/keep && cd /data && sha256sum keep >/run/sums && sync")
	h.run(g, "("+fioLoop+") </dev/null >/dev/null 2>&1 &")

	change := func(kind hostapi.CryptoChange_Kind, key *hostapi.KeyID) *hostapi.ReconfigureVMRequest {
		return &hostapi.ReconfigureVMRequest{Ref: ref, Disks: []*hostapi.DiskCryptoChange{{DiskUuid: disk, Change: &hostapi.CryptoChange{Kind: kind, Key: key}}}}
	}
	t.Log("encrypt; kill vmx in the middle")
	kill := func() {
		if err := syscall.Kill(h.vmxPID(vm), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	h.interrupted(change(hostapi.CryptoChange_ENCRYPT, k1), kill)
	h.verifies(g)
	if now := h.finish(change(hostapi.CryptoChange_ENCRYPT, k1)); !now.Disks[2].Encrypted {
		t.Errorf("not encrypted: %v", now.Disks[2])
	}
	t.Log("snapshot; kill vmx")
	h.snapshots(&hostapi.SnapshotRequest{Ref: ref, Act: hostapi.SnapshotRequest_CREATE, Name: "encrypted"}, nil)
	kill()
	h.verifies(g)

	t.Log("deep recrypt; kill the host agent and vmx in the middle")
	k2 := h.push("k2", vm)
	h.interrupted(change(hostapi.CryptoChange_DEEP_RECRYPT, k2), func() {
		h.stopAgent()
		kill()
	})
	h.startAgent()
	g = h.console(ref)
	h.push("k1", vm)
	h.push("k2", vm)
	if now := h.finish(change(hostapi.CryptoChange_DEEP_RECRYPT, k2)); now.Disks[2].KeyId.GetKey() != "k2" {
		t.Errorf("not recrypted: %v", now.Disks[2])
	}
	h.verifies(g)

	t.Log("another snapshot; decrypt")
	h.snapshots(&hostapi.SnapshotRequest{Ref: ref, Act: hostapi.SnapshotRequest_CREATE, Name: "recrypted"}, nil)
	if now := h.finish(change(hostapi.CryptoChange_DECRYPT, nil)); now.Disks[2].Encrypted {
		t.Errorf("still encrypted: %v", now.Disks[2])
	}
	h.verifies(g)

	t.Log("consolidate; kill vmx in the middle")
	if now := h.snapshots(&hostapi.SnapshotRequest{Ref: ref, Act: hostapi.SnapshotRequest_REMOVE_ALL}, kill); now.ConsolidationNeeded || len(now.Snapshots) > 0 {
		t.Errorf("snapshots are left: %v", now)
	}
	h.verifies(g)

	h.run(g, ": >/run/stop; while [ ! -e /run/ended ]; do usleep 100000; done; [ ! -e /run/failed ]")
	t.Logf("fio verified its files %s times", h.run(g, "cat /run/passes"))
	h.run(g, "cd / && umount /data && e2fsck -f -n $(cat /run/disk)")
	h.run(g, "mount -t ext4 $(cat /run/disk) /data && cd /data && sha256sum -c /run/sums")
	if _, err := h.PowerOff(t.Context(), &hostapi.PowerRequest{Ref: ref}); err != nil {
		t.Fatal(err)
	}
}

func length(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Size()
}

// run runs a command among the guest's tools, which must succeed, and returns the
// last line of its output.
func (h *testHost) run(g *guest.Agent, command string) string {
	h.Helper()
	a := h.do(g, "run "+command)
	if a.Values["rc"] != "0" {
		h.Fatalf("guest: %s: %s\n%s", command, a.Text, g.Console())
	}
	return a.Values["out"]
}

// verifies waits until fio has verified once more what it wrote.
func (h *testHost) verifies(g *guest.Agent) {
	h.Helper()
	passes := "[ ! -e /run/failed ] && { cat /run/passes 2>/dev/null || echo 0; }"
	first := h.run(g, passes)
	for end := time.Now().Add(2 * time.Minute); h.run(g, passes) == first; time.Sleep(500 * time.Millisecond) {
		if time.Now().After(end) {
			h.Fatalf("fio has not come to the end of its files; %s\n%s", h.run(g, "tail -n 1 /run/fio.log"), g.Console())
		}
	}
}

// interrupted begins a change, slowly, and breaks it off when its conversion is
// under way.
func (h *testHost) interrupted(r *hostapi.ReconfigureVMRequest, breakOff func()) {
	h.Helper()
	r.Pace = &hostapi.Pace{LimitBytesPerSecond: 4 << 20}
	s, err := h.ReconfigureVM(h.Context(), r)
	if err != nil {
		h.Fatal(err)
	}
	broken := false
	for {
		m, err := s.Recv()
		if broken && err != nil && err != io.EOF {
			h.Logf("broken off: %v", err)
			return
		}
		if err != nil || m.Result != nil {
			h.Fatalf("the change came to its end: %v, %v", m, err)
		}
		if !broken && m.TotalBytes > 0 && m.DoneBytes > m.TotalBytes/8 {
			broken = true
			breakOff()
		}
	}
}

// snapshots changes snapshots. middle, if any, is called once when that has begun to
// move data, and the act is repeated.
func (h *testHost) snapshots(r *hostapi.SnapshotRequest, middle func()) *hostapi.VMInfo {
	h.Helper()
	r.Header = &hostapi.Header{OperationId: uuid.NewString()}
	try := func() (*hostapi.VMInfo, error) {
		s, err := h.ChangeSnapshots(h.Context(), r)
		if err != nil {
			return nil, err
		}
		var info *hostapi.VMInfo
		for {
			m, err := s.Recv()
			if err == io.EOF {
				return info, nil
			}
			if err != nil {
				return nil, err
			}
			if info = m.Result; m.TotalBytes > 0 && middle != nil {
				middle()
				middle = nil
			}
		}
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(300 * time.Millisecond) {
		info, err := try()
		if err == nil {
			if middle != nil {
				h.Error("no data was moved")
			}
			return info
		}
		if time.Now().After(end) {
			h.Fatal(err)
		}
		h.Logf("again: %v", err)
	}
}

// finish makes a change, or goes on with it: the host takes a moment to have a vmx
// again that was killed.
func (h *testHost) finish(r *hostapi.ReconfigureVMRequest) *hostapi.VMInfo {
	h.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(300 * time.Millisecond) {
		info, err := h.tryReconfigure(r)
		if err == nil {
			return info
		}
		if time.Now().After(end) {
			h.Fatal(err)
		}
		h.Logf("again: %v", err)
	}
}

func (h *testHost) tryReconfigure(r *hostapi.ReconfigureVMRequest) (info *hostapi.VMInfo, err error) {
	s, err := h.ReconfigureVM(h.Context(), r)
	if err != nil {
		return nil, err
	}
	for {
		m, err := s.Recv()
		if err == io.EOF {
			return info, nil
		}
		if err != nil {
			return nil, err
		}
		info = m.Result
	}
}
