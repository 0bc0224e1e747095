package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"

	"mortise/internal/domain"
	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vmx"
)

// Guests is the hypervisor as the agent uses it; *domain.Conn is one.
type Guests interface {
	Running(ctx context.Context) (uuids []string, err error)
	Start(ctx context.Context, spec domain.Spec) error
	PowerOff(ctx context.Context, uuid string) error // pulls the plug; no error when it is off
	Shutdown(ctx context.Context, uuid string) error
	Reset(ctx context.Context, uuid string) error
	Resume(ctx context.Context, uuid string) error // after an I/O error, when the disks are back
	State(ctx context.Context, uuid string) (domain.State, error)
	Events(ctx context.Context) <-chan domain.Event
	HostInfo(ctx context.Context) (domain.HostInfo, error)
	Networks(ctx context.Context) ([]domain.Network, error)
}

// A machine is a VM that this host holds something for: a vmx process, a guest,
// or both.
type machine struct {
	agent *Agent
	uuid  string
	op    chan struct{} // holds one token while an operation runs

	mu      sync.Mutex // protects what follows
	ref     *hostapi.VMRef
	proc    *process
	power   hostapi.PowerState
	paused  bool   // the guest waits for its disks
	problem string // in words, empty when all is well
	missing []keysafe.KeyID
	boot    time.Time
	console *domain.Console
	retry   chan struct{} // wakes supervise: keys came, or a guest paused
}

// begin starts an operation on the VM; only one runs at a time.
func (m *machine) begin(ref *hostapi.VMRef) (end func(), err error) {
	select {
	case m.op <- struct{}{}:
	default:
		return nil, hostapi.Faultf(hostapi.Fault_BUSY, "another operation runs on VM %s: wait for it, or cancel its task", m.uuid)
	}
	m.mu.Lock()
	if ref != nil {
		m.ref = ref
	}
	m.mu.Unlock()
	return func() { <-m.op; m.agent.forget(m) }, nil
}

func (m *machine) runtime() *hostapi.VMRuntime {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := &hostapi.VMRuntime{
		Uuid: m.uuid, Power: m.power, PausedOnError: m.paused, Problem: m.problem,
		HasKeys: len(m.missing) == 0, Missing: toWireAll(m.missing),
	}
	if m.power == hostapi.PowerState_POWERED_ON {
		r.BootTimeUnix = m.boot.Unix()
	}
	return r
}

func (m *machine) setPower(p hostapi.PowerState) {
	m.mu.Lock()
	m.power = p
	if p == hostapi.PowerState_POWERED_ON {
		m.boot = m.agent.cfg.Now()
		m.retry = make(chan struct{}, 1)
	} else {
		m.paused, m.problem, m.missing = false, "", nil
	}
	m.mu.Unlock()
}

func (m *machine) attach(p *process) {
	m.mu.Lock()
	m.proc = p
	m.mu.Unlock()
}

// wake has supervise look again.
func (m *machine) wake() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.retry == nil {
		return
	}
	select {
	case m.retry <- struct{}{}:
	default:
	}
}

func (m *machine) letGo() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.proc != nil {
		m.proc.conn.Close()
		m.proc = nil
	}
	if m.console != nil {
		m.console.Close()
		m.console = nil
	}
}

// withProcess runs f with the VM's vmx: the one that serves it, or one started
// for f and ended after it.
func (m *machine) withProcess(ctx context.Context, path string, f func(*process) error) (err error) {
	m.mu.Lock()
	p := m.proc
	m.mu.Unlock()
	if p != nil {
		return f(p)
	}
	p, err = m.start(ctx, path)
	if err != nil {
		return err
	}
	defer func() {
		// The end is part of the operation: only a vmx that has gone has let go
		// of the disks. It must not hang on a caller that went away.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if eerr := p.end(ctx); eerr != nil && err == nil {
			err = fmt.Errorf("closing the VM: %w", eerr)
		}
		_ = os.RemoveAll(p.dir)
	}()
	return f(p)
}

func (m *machine) start(ctx context.Context, path string) (*process, error) {
	dir := m.agent.vmDir(m.uuid)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	m.mu.Lock()
	ref := m.ref
	m.mu.Unlock()
	if err := writeRef(dir, ref); err != nil {
		return nil, fmt.Errorf("noting the VM in its run folder: %w", err)
	}
	return m.agent.startProcess(ctx, dir, path)
}

// keysFor takes from the cache the KEKs that open the VM as it is on disk, and
// those of more. The message's buffers are the caller's to clear.
func (m *machine) keysFor(path string, more ...keysafe.KeyID) ([]*hostapi.KEK, error) {
	want, err := vmx.RequiredKeys(path)
	if err != nil {
		return nil, err
	}
	// A safe may name several KEKs, of which one is enough: vmx says which are
	// needed if what the cache has does not do.
	var have []keysafe.KeyID
	for _, alternatives := range want {
		missing := m.agent.keys.missing(m.uuid, alternatives)
		if len(missing) == len(alternatives) {
			return nil, m.missingKeys(missing)
		}
		have = append(have, without(alternatives, missing)...)
	}
	keys, missing, err := m.agent.keys.copyFor(m.uuid, append(have, more...))
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, m.missingKeys(missing)
	}
	defer wipeAll(keys)
	return keysToWire(keys), nil
}

func (m *machine) missingKeys(missing []keysafe.KeyID) error {
	m.mu.Lock()
	m.missing = missing
	m.mu.Unlock()
	return &hostapi.FaultError{
		Fault: &hostapi.Fault{Kind: hostapi.Fault_MISSING_KEYS, Missing: toWireAll(missing)},
		Err:   &keysafe.KeysRequiredError{Required: missing},
	}
}

func keysToWire(keys map[keysafe.KeyID]*secret.Key) (out []*hostapi.KEK) {
	for id, k := range keys {
		kek := &hostapi.KEK{Id: toWire(id)}
		k.Use(func(b []byte) { kek.Bytes = append([]byte(nil), b...) })
		out = append(out, kek)
	}
	return out
}

func clearKeys(keys []*hostapi.KEK) {
	for _, k := range keys {
		clear(k.Bytes)
	}
}

// openConsole connects to the guest's serial line.
func (m *machine) openConsole() {
	c := domain.OpenConsole(consoleSocket(m.agent.vmDir(m.uuid)), m.agent.log.With("vm", m.uuid))
	m.mu.Lock()
	m.console = c
	m.mu.Unlock()
}

// refill puts the KEKs of a surviving vmx into the cache (design §4 Failure).
func (m *machine) refill(ctx context.Context, p *process) error {
	open, err := p.Keys(ctx, &hostapi.KeysRequest{})
	if err != nil {
		return err
	}
	defer clearKeys(open.Keys)
	for _, k := range open.Keys {
		key, err := secret.Take(k.Bytes)
		if err != nil {
			return err
		}
		m.agent.keys.put(fromWire(k.Id), key, m.uuid)
	}
	return nil
}

// dropUnused ends the VM's use of keys that its files do not name any more.
func (m *machine) dropUnused(path string) {
	want, err := vmx.RequiredKeys(path)
	if err != nil {
		return
	}
	used := map[keysafe.KeyID]bool{}
	for _, alternatives := range want {
		for _, id := range alternatives {
			used[id] = true
		}
	}
	for _, u := range m.agent.keys.list() {
		if !used[u.ID] {
			m.agent.keys.dropVM(m.uuid, u.ID)
		}
	}
}

func parseUUID(s string) (uuid.UUID, error) {
	if len(s) != 36 {
		return uuid.UUID{}, errors.New("a UUID is written as 8-4-4-4-12 hexadecimal digits")
	}
	return uuid.Parse(s)
}

func without(all, drop []keysafe.KeyID) (left []keysafe.KeyID) {
next:
	for _, id := range all {
		for _, d := range drop {
			if d == id {
				continue next
			}
		}
		left = append(left, id)
	}
	return left
}
