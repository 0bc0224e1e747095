package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"mortise/internal/hostapi"
)

// A place in the line, for TestTurns.
type place struct {
	name   string
	texts  chan string
	done   chan func()
	err    chan error
	cancel context.CancelFunc
}

func (t *turns) queue(ctx context.Context, name, store string) *place {
	ctx, cancel := context.WithCancel(ctx)
	p := &place{name: name, texts: make(chan string, 100), done: make(chan func(), 1), err: make(chan error, 1), cancel: cancel}
	ready := make(chan struct{})
	go func() {
		first := true
		done, err := t.wait(ctx, store, func(s string) {
			p.texts <- s
			if first {
				first = false
				close(ready)
			}
		})
		if err != nil {
			p.err <- err
		} else {
			p.done <- done
			if first {
				close(ready)
			}
		}
	}()
	<-ready
	return p
}

func (p *place) waits(t *testing.T, want string) {
	t.Helper()
	got := <-p.texts
	if got != want {
		t.Errorf("%s is told %q, want %q", p.name, got, want)
	}
}

// TestTurns: first come, first served; who waits for a busy datastore is passed by
// those of another one; who gives up makes room.
func TestTurns(t *testing.T) {
	t.Parallel()
	l := newTurns("esx1", Conversions{})
	ctx := t.Context()
	a1 := <-l.queue(ctx, "a1", "a").done
	a2 := l.queue(ctx, "a2", "a")
	a2.waits(t, "waiting for its turn on datastore a: 1 before it")
	a3 := l.queue(ctx, "a3", "a")
	a3.waits(t, "waiting for its turn on datastore a: 2 before it")
	b1 := <-l.queue(ctx, "b1", "b").done // passes them
	c1 := l.queue(ctx, "c1", "c")
	c1.waits(t, "waiting for its turn on host esx1: 4 before it")
	a2.cancel()
	if err := <-a2.err; !errors.Is(err, context.Canceled) {
		t.Errorf("gave up: %v", err)
	}
	a3.waits(t, "waiting for its turn on datastore a: 1 before it")
	b1() // frees the host's second turn: a3 came first and cannot use it
	done := <-c1.done
	u := l.take("a") // what is undone waits for nobody
	a1()
	select {
	case <-a3.done:
		t.Error("a3 began beside what is undone on its datastore")
	default:
	}
	u()
	done2 := <-a3.done
	done()
	done2()
	done2() // twice is once
	if l.total != 0 || len(l.taken) != 0 || len(l.line) != 0 {
		t.Errorf("left: %d turns, %v, %d in line", l.total, l.taken, len(l.line))
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := l.wait(ended, "a", nil); err == nil || len(l.line) != 0 {
		t.Errorf("who had given up before: %v", err)
	}
}

// begin begins a change and returns its stream.
func (v *testVM) begin(ctx context.Context, r *hostapi.ReconfigureVMRequest) hostapi.Host_ReconfigureVMClient {
	v.Helper()
	r.Ref = v.ref
	s, err := v.ReconfigureVM(ctx, r)
	if err != nil {
		v.Fatal(err)
	}
	return s
}

// hears waits until a change tells what is looked for.
func (v *testVM) hears(s hostapi.Host_ReconfigureVMClient, what string, ok func(*hostapi.Progress) bool) *hostapi.Progress {
	v.Helper()
	for {
		u, err := s.Recv()
		if err != nil {
			v.Fatalf("%s: %v", what, err)
		}
		if ok(u) {
			return u
		}
		if u.Result != nil {
			v.Fatalf("%s: it came to its end", what)
		}
	}
}

func ended(u *hostapi.Progress) bool { return u.Result != nil }

func says(text string) func(*hostapi.Progress) bool {
	return func(u *hostapi.Progress) bool { return strings.Contains(u.Stage, text) }
}

// TestConversionsWait: the second conversion on a datastore waits, visibly, and can
// be cancelled while it does; a shallow recrypt does not; a paused one lets it by.
func TestConversionsWait(t *testing.T) {
	l := newLab(t)
	var vms []*testVM
	for i := range 3 {
		v := l.createVM(fmt.Sprintf("web%d", i), "bios")
		if _, err := v.importData(0, slices.Repeat([]byte("DATA"), diskSize/8)); err != nil {
			t.Fatal(err)
		}
		vms = append(vms, v)
	}
	pace := func(v *testVM, p *hostapi.Pace) {
		t.Helper()
		if _, err := l.SetPace(t.Context(), &hostapi.PaceRequest{Ref: v.ref, Pace: p}); err != nil {
			t.Fatal(err)
		}
	}
	v1, v2, v3 := vms[0], vms[1], vms[2]
	k := func(v *testVM, name string) *hostapi.KeyID { return l.push(name, v.id) }
	_, err := l.SetPace(t.Context(), &hostapi.PaceRequest{Ref: v1.ref})
	l.wantFault("the pace of nothing", err, hostapi.Fault_NOT_FOUND, "nothing is changed")

	r1 := v1.recrypt(hostapi.CryptoChange_DEEP_RECRYPT, k(v1, "k2"))
	r1.Pace = &hostapi.Pace{LimitBytesPerSecond: 1} // the first zone passes, the next is years away
	s1 := v1.begin(t.Context(), r1)
	v1.hears(s1, "it converts", func(u *hostapi.Progress) bool { return u.TotalBytes > 0 })

	ctx, cancel := context.WithCancel(t.Context())
	s2 := v2.begin(ctx, v2.recrypt(hostapi.CryptoChange_DEEP_RECRYPT, k(v2, "k2")))
	v2.hears(s2, "it waits", says("waiting for its turn on datastore ds1: 1 before it"))
	if info, err := v3.reconfigure(v3.recrypt(hostapi.CryptoChange_SHALLOW_RECRYPT, k(v3, "k3"))); err != nil || info.Disks[0].KeyId.Key != "k3" {
		t.Errorf("a shallow recrypt beside: %v, %v", info, err)
	}
	cancel()
	if _, err := s2.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("cancelled while it waited: %v", err)
	}
	var again hostapi.Host_ReconfigureVMClient
	l.until("the VM is free", func() bool {
		again = v2.begin(t.Context(), v2.recrypt(hostapi.CryptoChange_DEEP_RECRYPT, k(v2, "k2")))
		u, err := again.Recv()
		return err == nil && strings.Contains(u.Stage, "waiting")
	})
	pace(v1, &hostapi.Pace{Paused: true})
	if u := v2.hears(again, "it passes the paused one", ended); u.Result.Disks[0].KeyId.Key != "k2" {
		t.Errorf("it ended with %v", u.Result)
	}
	// The paused one comes back when it may, and behind those that wait then.
	r3 := v3.recrypt(hostapi.CryptoChange_DEEP_RECRYPT, k(v3, "k4"))
	r3.Pace = &hostapi.Pace{Paused: true}
	s3 := v3.begin(t.Context(), r3) // begins paused: it takes no turn
	l.until("it can be told to go on", func() bool {
		_, err := l.SetPace(t.Context(), &hostapi.PaceRequest{Ref: v3.ref, Pace: &hostapi.Pace{LimitBytesPerSecond: 1}})
		return err == nil
	})
	v3.hears(s3, "it converts", func(u *hostapi.Progress) bool { return u.TotalBytes > 0 })
	pace(v1, &hostapi.Pace{})
	v1.hears(s1, "it waits again", says("waiting for its turn on datastore ds1: 1 before it"))
	pace(v3, nil)
	v3.hears(s3, "it ends", ended)
	if u := v1.hears(s1, "it ends", ended); u.Result.Disks[0].KeyId.Key != "k2" {
		t.Errorf("it ended with %v", u.Result)
	}
	if _, err := s1.Recv(); err != io.EOF {
		t.Errorf("after its end: %v", err)
	}
}

// TestUndoUnderGuest kills the vmx in the middle of a conversion under its guest,
// then the one that runs it back; the third makes the VM what it was.
func TestUndoUnderGuest(t *testing.T) {
	l := newLab(t)
	v := l.createVM("web1", "bios")
	big := uuid.NewString()
	v.disk2(big, 24<<20)
	v.powerOn()
	e, err := l.EstimateVM(t.Context(), &hostapi.EstimateRequest{Ref: v.ref, DiskUuids: []string{v.disk, big}})
	if err != nil || len(e.Disks) != 2 || e.Disks[1].Bytes < 20<<20 || e.Disks[1].IdleSeconds <= 0 {
		t.Errorf("estimate of a running VM: %v, %v", e, err)
	}
	change := func(undo bool) *hostapi.ReconfigureVMRequest {
		r := v.recrypt(hostapi.CryptoChange_DEEP_RECRYPT, l.push("k2", v.id))
		r.Disks = append(r.Disks, &hostapi.DiskCryptoChange{DiskUuid: big, Change: r.Home})
		r.Pace = &hostapi.Pace{LimitBytesPerSecond: 16 << 20}
		r.Undo, r.HomeBefore = undo, &hostapi.Before{Encrypted: true, Key: l.push("k1", v.id)}
		for _, d := range r.Disks {
			d.Before = r.HomeBefore
		}
		return r
	}
	half := func(s hostapi.Host_ReconfigureVMClient) {
		t.Helper()
		v.hears(s, "it is half way", func(u *hostapi.Progress) bool { return u.TotalBytes > diskSize && u.DoneBytes > 0 })
		v.kill()
		_, err := s.Recv()
		for err == nil {
			_, err = s.Recv()
		}
		l.wantFault("vmx killed", err, hostapi.Fault_BUSY, "nothing is lost")
		v.goesOn()
	}
	half(v.begin(t.Context(), change(false)))
	half(v.begin(t.Context(), change(true)))
	r := change(true)
	r.Pace = nil
	info, err := v.reconfigure(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range info.Disks {
		if d.KeyId.Key != "k1" || d.Conversion != "" || !d.Encrypted {
			t.Errorf("after running back: %v", d)
		}
	}
	if info.Key.Key != "k1" || slices.Contains(l.keys(), "k2") {
		t.Errorf("key %v, in the cache %v", info.Key, l.keys())
	}
	v.powerOff()
	if e, err = l.EstimateVM(t.Context(), &hostapi.EstimateRequest{Ref: v.ref, DiskUuids: []string{big}}); err != nil || len(e.Disks) != 1 || e.Disks[0].Bytes < 20<<20 {
		t.Errorf("estimate of a powered-off VM: %v, %v", e, err)
	}
	_, err = l.EstimateVM(t.Context(), &hostapi.EstimateRequest{Ref: v.ref, DiskUuids: []string{uuid.NewString()}})
	l.wantFault("an estimate of a disk that is not there", err, hostapi.Fault_NOT_FOUND, "no disk")
	v.powerOn()
	v.powerOff()
}

// disk2 adds a disk that is full of data.
func (v *testVM) disk2(id string, size int64) {
	v.Helper()
	if _, err := v.reconfigure(&hostapi.ReconfigureVMRequest{AddDisks: []*hostapi.NewDisk{{Uuid: id, CapacityBytes: size, KeyId: v.push("k1", v.id)}}}); err != nil {
		v.Fatal(err)
	}
	s, err := v.ImportDisk(v.Context())
	if err != nil {
		v.Fatal(err)
	}
	_ = s.Send(&hostapi.ImportChunk{Ref: v.ref, DiskUuid: id})
	for off := int64(0); off < size; off += 1 << 20 {
		_ = s.Send(&hostapi.ImportChunk{Offset: off, Data: slices.Repeat([]byte("DATA"), 1<<18)})
	}
	if _, err := s.CloseAndRecv(); err != nil {
		v.Fatal(err)
	}
}
