package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

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

// A machine is a VM that this host holds something for: an operation, or a guest
// and the vmx process that serves it.
type machine struct {
	agent *Agent
	uuid  string
	op    chan struct{} // holds one token while an operation runs
	retry chan struct{} // wakes supervise: keys came, or the guest paused
	users int           // who has the record in hand; protected by agent.mu

	mu      sync.Mutex // protects what follows
	ref     *hostapi.VMRef
	boot    *boot    // nil: powered off
	proc    *process // of the guest; nil while there is none
	console *domain.Console
	paused  bool   // the guest waits for its disks
	waits   string // what for, in words
	failed  string // a disk failed for good: the guest is never resumed (design §4 Failure)
	missing []keysafe.KeyID
	job     *job // the change that runs or waits; nil: none

	// lostNVRAM says that a vmx died under an EFI guest: QEMU's open file of the
	// firmware's variables is dead until the guest's next start (doc/threat-model.md).
	lostNVRAM bool
}

// A boot is the time from a guest's power-on to its end.
type boot struct {
	since      time.Time
	stop       context.CancelFunc // ends supervise
	supervised chan struct{}      // closed when it has ended
}

// patience is how long an operation waits for bookkeeping, which is no operation
// of anybody, before it calls the VM busy.
const patience = 300 * time.Millisecond

// begin starts an operation on a VM; only one runs at a time.
func (a *Agent) begin(ref *hostapi.VMRef) (m *machine, end func(), err error) {
	if m, err = a.hold(ref.GetUuid()); err != nil {
		return nil, nil, err
	}
	select {
	case m.op <- struct{}{}:
	case <-time.After(patience):
		a.drop(m)
		return nil, nil, hostapi.Faultf(hostapi.Fault_BUSY, "another operation runs on VM %s: wait for it, or cancel its task", m.uuid)
	}
	end = func() { <-m.op; a.drop(m) }
	if err := m.placed(ref); err != nil {
		end()
		return nil, nil, err
	}
	return m, end, nil
}

// placed notes where center says the VM is, and what it expects of it now: the
// vmx that is started next, be it by the next agent, must not be held to less or
// to something that is true no more.
func (m *machine) placed(ref *hostapi.VMRef) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	on := m.boot != nil
	if on && m.ref.Path != "" && (m.ref.Path != ref.Path || m.ref.Datastore != ref.Datastore) {
		return hostapi.Faultf(hostapi.Fault_INVALID, "VM %s runs from [%s] %s, not from [%s] %s: power it off before it is moved", m.uuid, m.ref.Datastore, m.ref.Path, ref.Datastore, ref.Path)
	}
	m.ref = ref
	if !on {
		return nil
	}
	return m.record()
}

// record writes what the next agent must know. m.mu is held.
func (m *machine) record() error {
	r := record{Ref: m.ref, NVRAMLost: m.lostNVRAM}
	if m.boot != nil {
		r.Boot = m.boot.since.Unix()
	}
	if err := writeRecord(m.dir(), r); err != nil {
		return fmt.Errorf("noting the VM in its run folder: %w", err)
	}
	return nil
}

func (m *machine) dir() string { return m.agent.vmDir(m.uuid) }

func (m *machine) isOn() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boot != nil
}

func (m *machine) mustBeOff(verb string) error {
	if m.isOn() {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "cannot %s VM %s while it is powered on: power it off first", verb, m.uuid)
	}
	return nil
}

func (m *machine) mustBeOn(verb string) error {
	if !m.isOn() {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "cannot %s VM %s while it is powered off", verb, m.uuid)
	}
	return nil
}

func (m *machine) runtime() *hostapi.VMRuntime {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := &hostapi.VMRuntime{Uuid: m.uuid, Power: hostapi.PowerState_POWERED_OFF, HasKeys: len(m.missing) == 0, Missing: toWireAll(m.missing)}
	if m.boot == nil {
		return r
	}
	r.Power, r.BootTimeUnix, r.PausedOnError = hostapi.PowerState_POWERED_ON, m.boot.since.Unix(), m.paused
	var problems []string
	switch {
	case m.failed != "":
		problems = append(problems, m.failed)
	case m.waits != "":
		problems = append(problems, m.waits)
	}
	if m.lostNVRAM {
		problems = append(problems, nvramNotSaved)
	}
	r.Problem = strings.Join(problems, "; ")
	return r
}

// wake has supervise look again.
func (m *machine) wake() {
	select {
	case m.retry <- struct{}{}:
	default:
	}
}

// letGo forgets a VM that runs on without this agent.
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

// withProcess runs f with the VM's vmx: the one that serves its guest, or one
// started for f and ended after it. The context that f gets ends before the vmx is
// told to, so that no call of f's keeps it from ending.
func (m *machine) withProcess(ctx context.Context, path string, f func(context.Context, *process) error) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	m.mu.Lock()
	p, on := m.proc, m.boot != nil
	m.mu.Unlock()
	if on {
		if p == nil || !p.alive() {
			return hostapi.Faultf(hostapi.Fault_BUSY, "the vmx of VM %s ended under its guest and is being started again: try again soon", m.uuid)
		}
		return p.explain(f(ctx, p))
	}
	if p, err = m.start(ctx, path); err != nil {
		return err
	}
	defer func() {
		// The end is part of the operation: only a vmx that has gone has let go
		// of the disks.
		cancel()
		if eerr := errors.Join(p.end(), removeRunDir(p.dir)); eerr != nil && err == nil {
			err = fmt.Errorf("closing the VM: %w", eerr)
		}
	}()
	return p.explain(f(ctx, p))
}

// explain gives an error its cause when that is the vmx's death. Busy is what the VM
// is then: whoever asks again finds it with its next vmx.
func (p *process) explain(err error) error {
	switch code := status.Code(err); {
	case code == codes.Unavailable:
	case code == codes.Canceled && !p.alive(): // supervise has closed the connection already
	default:
		return err
	}
	return hostapi.Faultf(hostapi.Fault_BUSY, "the vmx ended in the middle; nothing is lost, do it again: %s", status.Convert(err).Message())
}

// start runs a vmx for the VM.
func (m *machine) start(ctx context.Context, path string) (*process, error) {
	if err := os.MkdirAll(m.dir(), 0o711); err != nil {
		return nil, err
	}
	m.mu.Lock()
	err := m.record()
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return m.agent.startProcess(ctx, m.dir(), path)
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
			return nil, missingKeys(missing)
		}
		have = append(have, without(alternatives, missing)...)
	}
	return m.newKeys(append(have, more...))
}

// newKeys takes exactly the wanted keys from the cache.
func (m *machine) newKeys(want []keysafe.KeyID) ([]*hostapi.KEK, error) {
	keys, missing, err := m.agent.keys.copyFor(m.uuid, want)
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, missingKeys(missing)
	}
	defer wipeAll(keys)
	return keysToWire(keys), nil
}

func missingKeys(missing []keysafe.KeyID) error {
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

// refill puts the KEKs of a surviving vmx, which must serve the guest, into the
// cache (design §4 Failure).
func (m *machine) refill(ctx context.Context, p *process) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	st, err := p.Status(ctx, &hostapi.StatusRequest{})
	if err != nil {
		return err
	}
	if !st.Serving || st.Uuid != m.uuid {
		return fmt.Errorf("it does not serve the VM")
	}
	open, err := p.Keys(ctx, &hostapi.KeysRequest{})
	if err != nil {
		// An operation that the earlier agent led may be ending still; the guest is
		// served, and center has the keys.
		m.agent.log.Warn("taking keys back from a vmx", "vm", m.uuid, "error", err)
		return nil
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

// dropUnused ends the VM's use of keys that its files do not name any more. While
// something in the folder cannot be read, nothing is dropped: it may need them.
func (m *machine) dropUnused(path string, info *hostapi.VMInfo) {
	want, err := vmx.RequiredKeys(path)
	if err != nil || vmx.Unreadable(info) {
		return
	}
	used := slices.Concat(want...)
	for _, u := range m.agent.keys.list() {
		if !slices.Contains(used, u.ID) {
			m.agent.keys.dropVM(m.uuid, u.ID)
		}
	}
}

func parseUUID(s string) (uuid.UUID, error) {
	u, err := uuid.Parse(s)
	if err != nil || u.String() != s {
		return uuid.Nil, fmt.Errorf("%q is no UUID: it is written as 8-4-4-4-12 hexadecimal digits in lower case", s)
	}
	return u, nil
}

func without(all, drop []keysafe.KeyID) []keysafe.KeyID {
	return slices.DeleteFunc(slices.Clone(all), func(id keysafe.KeyID) bool { return slices.Contains(drop, id) })
}
