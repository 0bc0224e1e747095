package host

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
)

// Config is what an agent needs to know. Every field is required unless it says
// otherwise.
type Config struct {
	Name       string
	UUID       string // of this host, kept in its state folder
	Version    string // Mortise's
	RunDir     string // for sockets; on tmpfs, short: a unix socket's path has 107 bytes at most
	Datastores []Datastore
	Executable string   // the mortise binary, for vmx processes
	VMXArgs    []string // what makes that binary a vmx: {"vmx"}
	VMXEnv     []string // more environment for vmx processes; may be empty
	QEMUUID    int      // of the user that libvirt runs QEMU as; 0: root
	QEMUGID    int
	Guests     Guests
	Logger     *slog.Logger
	Now        func() time.Time
}

// An Agent is the host's half of center: it holds keys, opens VMs, runs guests.
// Its methods may be called concurrently.
type Agent struct {
	cfg  Config
	log  *slog.Logger
	keys *keyCache

	mu       sync.Mutex // protects what follows
	machines map[string]*machine
	watchers map[chan *hostapi.HostEvent]bool
	term     int64 // of the last command that was obeyed

	ctx     context.Context // ends with Stop; for what outlives a request
	stop    context.CancelFunc
	running sync.WaitGroup
}

// Start makes an agent and takes over what an earlier one left running: its vmx
// processes give back their keys, and guests whose vmx died get a new one as
// soon as their keys are here.
func Start(ctx context.Context, cfg Config) (*Agent, error) {
	ctx, stop := context.WithCancel(ctx)
	a := &Agent{
		cfg: cfg, log: cfg.Logger, keys: newKeyCache(cfg.Now), ctx: ctx, stop: stop,
		machines: map[string]*machine{}, watchers: map[chan *hostapi.HostEvent]bool{},
	}
	if err := os.MkdirAll(a.vmDir(""), 0o711); err != nil {
		stop()
		return nil, fmt.Errorf("making the run folder: %w", err)
	}
	if err := a.takeOver(ctx); err != nil {
		a.Stop()
		return nil, err
	}
	a.running.Go(a.followGuests)
	return a, nil
}

// Stop ends the agent and wipes its keys. vmx processes and guests run on: an
// agent's end is no reason to stop a machine.
func (a *Agent) Stop() {
	a.stop()
	a.running.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range a.machines {
		m.letGo()
	}
	a.keys.wipe()
}

// vmDir is the run folder of a VM's vmx.
func (a *Agent) vmDir(uuid string) string { return filepath.Join(a.cfg.RunDir, "vm", uuid) }

// machineOf finds or makes the record of a VM and notes where center says it is.
func (a *Agent) machineOf(ref *hostapi.VMRef) (*machine, error) {
	if _, err := parseUUID(ref.GetUuid()); err != nil {
		return nil, hostapi.Faultf(hostapi.Fault_INVALID, "the VM's UUID: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	m := a.machines[ref.Uuid]
	if m == nil {
		m = &machine{agent: a, uuid: ref.Uuid, op: make(chan struct{}, 1), power: hostapi.PowerState_POWERED_OFF}
		a.machines[ref.Uuid] = m
	}
	return m, nil
}

// forget drops the record of a VM that has neither process nor guest.
func (a *Agent) forget(m *machine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	m.mu.Lock()
	idle := m.proc == nil && m.power != hostapi.PowerState_POWERED_ON
	m.mu.Unlock()
	if idle && a.machines[m.uuid] == m {
		delete(a.machines, m.uuid)
		a.tell(&hostapi.HostEvent{Kind: hostapi.HostEvent_VM_GONE, Vm: &hostapi.VMRuntime{Uuid: m.uuid, Power: hostapi.PowerState_POWERED_OFF}})
	}
}

// datastore finds a datastore by name.
func (a *Agent) datastore(name string) (Datastore, error) {
	for _, d := range a.cfg.Datastores {
		if d.Name == name {
			return d, nil
		}
	}
	return Datastore{}, hostapi.Faultf(hostapi.Fault_NOT_FOUND, "host %s has no datastore %q: add it to the host's configuration", a.cfg.Name, name)
}

// vmxPath is the path of a VM's VMX on this host.
func (a *Agent) vmxPath(ref *hostapi.VMRef) (string, error) {
	d, err := a.datastore(ref.GetDatastore())
	if err != nil {
		return "", err
	}
	p, err := d.resolve(ref.GetPath())
	if err != nil {
		return "", hostapi.Faultf(hostapi.Fault_INVALID, "%w", err)
	}
	return p, nil
}

// obey checks the term of a command: one that a center lost since is refused.
func (a *Agent) obey(h *hostapi.Header) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if h.GetTerm() < a.term {
		return hostapi.Faultf(hostapi.Fault_STALE_TERM, "the command is of term %d, this host follows term %d: another member of center leads now", h.GetTerm(), a.term)
	}
	a.term = h.GetTerm()
	return nil
}

// takeOver adopts the vmx processes and guests of an earlier agent.
func (a *Agent) takeOver(ctx context.Context) error {
	guests, err := a.cfg.Guests.Running(ctx)
	if err != nil {
		return fmt.Errorf("asking libvirt which guests run: %w", err)
	}
	entries, err := os.ReadDir(a.vmDir(""))
	if err != nil {
		return err
	}
	for _, e := range entries {
		uuid := e.Name()
		if _, err := parseUUID(uuid); err != nil {
			continue
		}
		ref, err := readRef(a.vmDir(uuid))
		if err != nil {
			a.log.Warn("a run folder without a readable VM", "vm", uuid, "error", err)
			ref = &hostapi.VMRef{Uuid: uuid}
		}
		runs := slices.Contains(guests, uuid)
		p, err := adopt(a.vmDir(uuid))
		if err != nil && !runs {
			unmountFiles(a.vmDir(uuid))
			_ = os.RemoveAll(a.vmDir(uuid)) // nothing is left of it
			continue
		}
		m, err := a.machineOf(ref)
		if err != nil {
			return err
		}
		m.ref = ref
		if p != nil && !runs {
			// An operation that the earlier agent led: its end is center's to ask
			// for again. The VM is let go in an orderly way.
			a.log.Info("ending the vmx of a VM that is not powered on", "vm", uuid)
			if err := p.end(ctx); err != nil {
				a.log.Warn("ending a vmx", "vm", uuid, "error", err)
			}
			_ = os.RemoveAll(a.vmDir(uuid))
			a.forget(m)
			continue
		}
		m.setPower(hostapi.PowerState_POWERED_ON)
		if p != nil {
			if err := m.refill(ctx, p); err != nil {
				a.log.Warn("taking keys back from a vmx", "vm", uuid, "error", err)
			}
			m.attach(p)
			a.log.Info("adopted a running VM", "vm", uuid, "pid", p.pid)
		}
		m.openConsole()
		a.running.Go(m.supervise)
	}
	return nil
}

// followGuests hears from libvirt which guests ended or wait for their disks.
func (a *Agent) followGuests() {
	for ev := range a.cfg.Guests.Events(a.ctx) {
		a.mu.Lock()
		m := a.machines[ev.UUID]
		a.mu.Unlock()
		if m != nil {
			m.guestChanged(ev)
		}
	}
}

// tell sends an event to every watcher. It is called with a.mu held. A watcher
// that does not keep up is dropped: it reads everything again.
func (a *Agent) tell(ev *hostapi.HostEvent) {
	for w := range a.watchers {
		select {
		case w <- ev:
		default:
			delete(a.watchers, w)
			close(w)
		}
	}
}

// announce tells the watchers what a VM is now.
func (a *Agent) announce(m *machine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tell(&hostapi.HostEvent{Kind: hostapi.HostEvent_VM, Vm: m.runtime()})
}

// refFile keeps, beside a vmx's sockets, which VM it is for. It holds no secret.
const refFile = "vm.json"

func writeRef(dir string, ref *hostapi.VMRef) error {
	text, err := protojson.Marshal(ref)
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, refFile+".new")
	if err := os.WriteFile(tmp, text, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, refFile))
}

func readRef(dir string) (*hostapi.VMRef, error) {
	text, err := os.ReadFile(filepath.Join(dir, refFile))
	if err != nil {
		return nil, err
	}
	var ref hostapi.VMRef
	if err := protojson.Unmarshal(text, &ref); err != nil {
		return nil, err
	}
	return &ref, nil
}

func fromWire(id *hostapi.KeyID) keysafe.KeyID {
	return keysafe.KeyID{Provider: id.GetProvider(), Key: id.GetKey()}
}

func toWire(id keysafe.KeyID) *hostapi.KeyID {
	return &hostapi.KeyID{Provider: id.Provider, Key: id.Key}
}

func toWireAll(ids []keysafe.KeyID) (out []*hostapi.KeyID) {
	for _, id := range ids {
		out = append(out, toWire(id))
	}
	return out
}
