package center_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/center/centertest"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
)

// provider is the name of the key provider in these tests.
const provider = "kms"

type centertestTampered = centertest.Tampered

// world is a center on a real store, a real KMS and small hosts.
type world struct {
	t    testing.TB
	dir  string
	kms  *centertest.KMS
	ds   *centertest.Datastore
	host *centertest.Host

	c        *center.Center
	p        center.Principal // the administrator
	password string
	joinAt   string

	// failpoint is called at each step of each task.
	failpoint func(ctx context.Context, run *task.Run, step string)
	clock     func() time.Time
	stop      context.CancelFunc
	done      sync.WaitGroup
}

// newWorld starts a center that trusts its KMS, and one host.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := newEmptyWorld(t)
	w.setUpProvider()
	w.host = w.join("esx1")
	return w
}

// newEmptyWorld starts a center and a KMS that know nothing of each other.
func newEmptyWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), kms: centertest.StartKMS(t), ds: centertest.NewDatastore("ds1"),
		p: center.Principal{User: authz.Administrator}}
	w.open()
	t.Cleanup(w.close)
	return w
}

func (w *world) open() {
	w.t.Helper()
	c, err := w.tryOpen()
	if err != nil {
		w.t.Fatal(err)
	}
	if p := c.InitialPassword(); p != "" {
		w.password = p
	}
	w.c = c
	ctx, stop := context.WithCancel(context.Background())
	w.stop = stop
	at := w.joinAt
	if at == "" {
		at = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", at)
	if err != nil {
		w.t.Fatal(err)
	}
	w.joinAt = l.Addr().String()
	w.done.Go(func() {
		if err := c.Run(ctx); err != nil {
			w.t.Errorf("center ended: %v", err)
		}
	})
	w.done.Go(func() {
		if err := c.ServeJoin(ctx, l); err != nil {
			w.t.Errorf("the join service ended: %v", err)
		}
	})
}

func (w *world) tryOpen() (*center.Center, error) {
	return center.Open(context.Background(), center.Config{
		Dir: w.dir, Name: "center-1", RootKey: centertest.RootKey(w.t, w.dir), OpenProvider: centertest.OpenProvider,
		Logger:   slog.New(slog.NewTextHandler(w.t.Output(), nil)),
		HostWait: 4 * time.Second, Failpoint: w.failpoint, Clock: w.clock,
	})
}

// close stops center as a signal does; tasks stay where they are.
func (w *world) close() {
	if w.stop == nil {
		return
	}
	w.stop()
	w.done.Wait()
	w.c.Close()
	w.stop = nil
}

// reopen is a restart of center.
func (w *world) reopen() {
	w.close()
	w.open()
}

// setUpProvider does what an administrator does to add a KMS (K13).
func (w *world) setUpProvider() {
	w.t.Helper()
	ctx := context.Background()
	w.must(w.c.RegisterKmipServer(ctx, w.p, provider, center.KmipServer{Name: "kms-1", Address: "127.0.0.1", Port: w.kms.Port}))
	pem, _, err := w.c.FetchServerCertificate(ctx, w.p, provider, "kms-1")
	w.must(err)
	w.must(w.c.TrustServerCertificate(ctx, w.p, provider, "", pem))
	cert, err := w.c.GenerateSelfSignedClientCert(ctx, w.p, provider)
	w.must(err)
	w.must(w.c.UpdateSelfSignedClientCert(ctx, w.p, provider, cert))
	w.kms.Trust(cert)
}

// join makes a host and joins it.
func (w *world) join(name string) *centertest.Host {
	w.t.Helper()
	h := centertest.NewHost(w.t, name, w.ds)
	token, err := w.c.CreateJoinToken(context.Background(), w.p, name, 0)
	w.must(err)
	w.must(h.Join(w.joinAt, token))
	w.eventually("host "+name+" is connected", func() bool { return w.hostNamed(name).Connection == inventory.Connected })
	return h
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// eventually waits until f holds.
func (w *world) eventually(what string, f func() bool) {
	w.t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if f() {
			return
		}
	}
	w.t.Fatalf("it did not come about that %s", what)
}

func (w *world) hostNamed(name string) *inventory.Host {
	var found *inventory.Host
	inventory.Each(w.c.View(), func(h *inventory.Host) bool {
		if h.Name == name {
			found = h
		}
		return true
	})
	if found == nil {
		return &inventory.Host{}
	}
	return found
}

func (w *world) vm(ref inventory.Ref) *inventory.VM {
	w.t.Helper()
	vm, ok := inventory.Lookup[inventory.VM](w.c.View(), ref)
	if !ok {
		w.t.Fatalf("VM %s is not in the inventory", ref)
	}
	return vm
}

// end waits for a task that was begun, and returns its record.
func (w *world) end(ref inventory.Ref, err error) *task.Record {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = w.c.WaitTask(ctx, ref)
	if errors.Is(err, context.DeadlineExceeded) {
		r, _ := inventory.Lookup[task.Record](w.c.View(), ref)
		w.t.Fatalf("task %s does not end: %+v", ref, r)
	}
	r, _ := inventory.Lookup[task.Record](w.c.View(), ref)
	return r
}

// done waits for a task that must succeed.
func (w *world) ok(ref inventory.Ref, err error) *task.Record {
	w.t.Helper()
	r := w.end(ref, err)
	if r.Error != nil {
		w.t.Fatalf("%s failed: %s: %s", r.Name, r.Error.Kind, r.Error.Message)
	}
	return r
}

// fails expects a fault of kind, at once or from the task, whose message has all
// of words.
func (w *world) fails(kind task.FaultKind, words string, ref inventory.Ref, err error) *center.Fault {
	w.t.Helper()
	if err == nil {
		if ref == "" {
			w.t.Fatalf("no fault, want %s", kind)
		}
		if r := w.end(ref, nil); r.Error != nil {
			err = r.Error
		}
	}
	return w.faulted(kind, words, err)
}

// faulted expects err to be a fault of kind whose message has all of words.
func (w *world) faulted(kind task.FaultKind, words string, err error) *center.Fault {
	w.t.Helper()
	var f *center.Fault
	if !errors.As(err, &f) || f.Kind != kind {
		w.t.Fatalf("got %T %v, want a fault %s", err, err, kind)
	}
	for _, word := range strings.Fields(words) {
		if !strings.Contains(f.Message, word) {
			w.t.Errorf("the fault %q does not say %q", f.Message, word)
		}
	}
	return f
}

// createVM makes a VM with two disks, encrypted or not.
func (w *world) createVM(name string, profile policy.ID) inventory.Ref {
	w.t.Helper()
	return w.ok(w.c.CreateVM(context.Background(), w.p, vmSpec(name, profile))).Result
}

func vmSpec(name string, profile policy.ID) center.CreateVMSpec {
	return center.CreateVMSpec{Name: name, Profile: profile, Hardware: center.HardwareSpec{MemoryMiB: 256, NICs: []inventory.NIC{{Network: "default"}}},
		Disks: []center.NewDiskSpec{{CapacityBytes: 8 << 20}, {CapacityBytes: 4 << 20}}}
}

// events lists the types of the events so far, and the messages.
func (w *world) events() (types []string, text string) {
	w.t.Helper()
	list, err := w.c.Events(context.Background(), w.p, 0, 10_000)
	w.must(err)
	for _, e := range list {
		types = append(types, e.Type)
		text += fmt.Sprintf("%s %s %s %v\n", e.Type, e.Entity, e.Message, e.Keys)
	}
	return types, text
}

func (w *world) sawEvent(typ string) bool {
	types, _ := w.events()
	return slices.Contains(types, typ)
}

// user makes an account with a role on an object, and returns who it is.
func (w *world) user(name string, role int32, on inventory.Ref) center.Principal {
	w.t.Helper()
	ctx := context.Background()
	a := w.c.Authority()
	if err := a.CreateUser(ctx, name, "", "a password for tests"); err != nil && !errors.Is(err, authz.ErrUserExists) {
		w.t.Fatal(err)
	}
	w.must(a.SetPermission(ctx, authz.Permission{Entity: on, Principal: name, Role: role, Propagate: true}))
	return center.Principal{User: name}
}

// holds tells whether the host holds a key for a VM.
func holds(h *centertest.Host, key *inventory.KeyID, vm *inventory.VM) bool {
	return key != nil && slices.Contains(h.Held()[key.String()], vm.UUID)
}
