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

	"mortise/internal/domain"
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
	DirectIO   bool // disks are read and written round the page cache
	Guests     Guests
	Convert    Conversions
	Logger     *slog.Logger
	Now        func() time.Time
}

// An Agent is the host's half of center: it holds keys, opens VMs, runs guests.
// Its methods may be called concurrently.
type Agent struct {
	cfg   Config
	log   *slog.Logger
	keys  *keyCache
	turns *turns   // of conversions
	lock  *os.File // of the run folder

	mu       sync.Mutex // protects what follows
	machines map[string]*machine
	watchers map[chan *hostapi.HostEvent]bool
	term     int64 // of the last command that was obeyed
	ended    bool  // by Stop

	ctx     context.Context // ends with Stop; for what outlives a request
	stop    context.CancelFunc
	running sync.WaitGroup

	storage storageChecks
}

// Start makes an agent and takes over what an earlier one left running: its vmx
// processes give back their keys, and guests whose vmx died get a new one as
// soon as their keys are here.
func Start(ctx context.Context, cfg Config) (*Agent, error) {
	ctx, stop := context.WithCancel(ctx)
	if err := os.MkdirAll(filepath.Join(cfg.RunDir, "vm"), 0o711); err != nil {
		stop()
		return nil, fmt.Errorf("making the run folder: %w", err)
	}
	lock, err := lockRunDir(cfg.RunDir)
	if err != nil {
		stop()
		return nil, err
	}
	a := &Agent{
		lock: lock,
		cfg:  cfg, log: cfg.Logger, keys: newKeyCache(cfg.Now), turns: newTurns(cfg.Name, cfg.Convert), ctx: ctx, stop: stop,
		machines: map[string]*machine{}, watchers: map[chan *hostapi.HostEvent]bool{},
	}
	if a.term, err = readTerm(cfg.RunDir); err == nil {
		err = a.takeOver(ctx)
	}
	if err != nil {
		a.Stop()
		return nil, err
	}
	a.spawn(a.followGuests)
	a.spawn(func() { a.probeDatastores(a.ctx) })
	return a, nil
}

// Stop ends the agent and wipes its keys. vmx processes and guests run on: an
// agent's end is no reason to stop a machine.
func (a *Agent) Stop() {
	a.stop()
	a.mu.Lock()
	a.ended = true
	a.mu.Unlock()
	a.running.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range a.machines {
		m.letGo()
	}
	a.keys.wipe()
	a.lock.Close()
}

// vmDir is the run folder of a VM's vmx.
func (a *Agent) vmDir(uuid string) string { return filepath.Join(a.cfg.RunDir, "vm", uuid) }

// hold finds or makes the record of a VM and keeps it until drop.
func (a *Agent) hold(uuid string) (*machine, error) {
	if _, err := parseUUID(uuid); err != nil {
		return nil, hostapi.Faultf(hostapi.Fault_INVALID, "the VM's UUID: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	m := a.machines[uuid]
	if m == nil {
		m = &machine{agent: a, uuid: uuid, op: make(chan struct{}, 1), retry: make(chan struct{}, 1), ref: &hostapi.VMRef{Uuid: uuid}}
		a.machines[uuid] = m
	}
	m.users++
	return m, nil
}

// held is hold for a VM that has a record, else nil.
func (a *Agent) held(uuid string) *machine {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := a.machines[uuid]
	if m != nil {
		m.users++
	}
	return m
}

// drop lets go of a record. With the last user, that of a VM without a guest
// goes.
func (a *Agent) drop(m *machine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	m.users--
	if m.users > 0 || m.isOn() {
		return
	}
	delete(a.machines, m.uuid)
	a.tell(&hostapi.HostEvent{Kind: hostapi.HostEvent_VM_GONE, Vm: &hostapi.VMRuntime{Uuid: m.uuid, Power: hostapi.PowerState_POWERED_OFF}})
}

// spawn runs f, which ends with a.ctx, beside; Stop waits for it.
func (a *Agent) spawn(f func()) {
	a.mu.Lock()
	ended := a.ended
	if !ended {
		a.running.Go(f)
	}
	a.mu.Unlock()
	if ended {
		f() // its context has ended: it returns at once
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

// obey checks the term of a command: one that a center lost since is refused,
// also by the agent that runs next.
func (a *Agent) obey(h *hostapi.Header) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	term := h.GetTerm()
	if term < a.term {
		return hostapi.Faultf(hostapi.Fault_STALE_TERM, "the command is of term %d, this host follows term %d: another member of center leads now", term, a.term)
	}
	if term > a.term {
		if err := writeTerm(a.cfg.RunDir, term); err != nil {
			return fmt.Errorf("noting the term of center: %w", err)
		}
		a.term = term
	}
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
		if _, err := parseUUID(uuid); err != nil || slices.Contains(guests, uuid) {
			continue
		}
		// An operation that the earlier agent led, or a guest that ended since: what
		// is to be done about it is center's to ask for again. The VM is let go in
		// an orderly way.
		dir := a.vmDir(uuid)
		if p, err := adopt(dir); err == nil {
			a.log.Info("ending the vmx of a VM that is not powered on", "vm", uuid, "pid", p.pid)
			if err := p.end(); err != nil {
				a.log.Error("ending a vmx", "vm", uuid, "error", err)
			}
		}
		if err := removeRunDir(dir); err != nil {
			a.log.Error("removing the run folder of a VM", "vm", uuid, "error", err)
		}
	}
	for _, uuid := range guests {
		m, err := a.hold(uuid)
		if err != nil {
			a.log.Error("libvirt has a guest whose UUID is none", "vm", uuid, "error", err)
			continue
		}
		m.takeOver(ctx)
		a.drop(m)
	}
	return nil
}

// followGuests hears from libvirt which guests ended or wait for their disks.
func (a *Agent) followGuests() {
	for ev := range a.cfg.Guests.Events(a.ctx) {
		m := a.held(ev.UUID)
		switch {
		case m != nil:
			m.guestChanged(ev)
			a.drop(m)
		case ev.State != domain.Off:
			a.alarm(&hostapi.VMRuntime{Uuid: ev.UUID}, fmt.Sprintf("libvirt runs a guest of VM %s that was not powered on through this host: power it off", ev.UUID))
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

// alarm tells the watchers what a person must know.
func (a *Agent) alarm(vm *hostapi.VMRuntime, text string) {
	a.log.Error("alarm", "vm", vm.GetUuid(), "text", text)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tell(&hostapi.HostEvent{Kind: hostapi.HostEvent_ALARM, Vm: vm, Message: text})
}

// announce tells the watchers what a VM is now.
func (a *Agent) announce(m *machine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.tell(&hostapi.HostEvent{Kind: hostapi.HostEvent_VM, Vm: m.runtime()})
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
