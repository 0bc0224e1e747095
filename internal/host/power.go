package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"mortise/internal/domain"
	"mortise/internal/hostapi"
	"mortise/internal/vmxfile"
)

func consoleSocket(runDir string) string { return filepath.Join(runDir, guestDir, "console.sock") }

// powerOn opens the VM and starts its guest. With a failure nothing stays
// behind: no process, no lock, no guest.
func (m *machine) powerOn(ctx context.Context, path string) (err error) {
	if m.isOn() {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is powered on already", m.uuid)
	}
	// libvirt has the last word: a guest that we do not know of must not get a
	// second set of disks.
	st, err := m.agent.cfg.Guests.State(ctx, m.uuid)
	if err != nil {
		return fmt.Errorf("asking libvirt about the guest: %w", err)
	}
	if st != domain.Off {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "libvirt has a guest of VM %s already, in state %q: power it off first", m.uuid, st)
	}
	keys, err := m.keysFor(path)
	if err != nil {
		return err
	}
	defer clearKeys(keys)
	p, err := m.start(ctx, path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.end(), removeRunDir(p.dir))
		}
	}()
	served, err := p.Open(ctx, &hostapi.OpenRequest{Ref: m.ref, Keys: keys, Serve: true})
	if err != nil {
		return p.explain(err)
	}
	spec, err := m.spec(path, served)
	if err != nil {
		return err
	}
	if err := m.agent.cfg.Guests.Start(ctx, spec); err != nil {
		err = fmt.Errorf("starting the guest: %w", err)
		if errors.Is(err, domain.ErrAlreadyRunning) {
			return err // it is not ours to end
		}
		// The answer may be lost, and the guest running.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		if perr := m.agent.cfg.Guests.PowerOff(ctx, m.uuid); perr != nil {
			err = fmt.Errorf("%w; if libvirt has started it all the same, power it off when libvirt answers again: %w", err, perr)
		}
		return err
	}
	m.poweredOn(p, m.agent.cfg.Now())
	return nil
}

// poweredOn begins to look after a guest; p may be nil when its vmx is to be
// started again.
func (m *machine) poweredOn(p *process, since time.Time) {
	ctx, stop := context.WithCancel(m.agent.ctx)
	b := &boot{since: since, stop: stop, supervised: make(chan struct{})}
	m.mu.Lock()
	m.boot, m.proc = b, p
	m.console = domain.OpenConsole(consoleSocket(m.dir()), m.agent.log.With("vm", m.uuid))
	if err := m.record(); err != nil {
		m.agent.log.Error("the next agent will not know this VM", "vm", m.uuid, "error", err)
	}
	m.mu.Unlock()
	m.agent.announce(m)
	m.agent.spawn(func() {
		defer close(b.supervised)
		m.supervise(ctx)
	})
}

// takeOver goes on with a guest that an earlier agent started.
func (m *machine) takeOver(ctx context.Context) {
	r, err := readRecord(m.dir(), m.uuid)
	if err != nil {
		m.agent.log.Error("a guest without a readable record of its VM: until center names its folder it is only watched", "vm", m.uuid, "error", err)
		r = record{Ref: &hostapi.VMRef{Uuid: m.uuid}}
		if err := os.MkdirAll(m.dir(), 0o711); err != nil {
			m.agent.log.Error("making a run folder", "vm", m.uuid, "error", err)
		}
	}
	m.mu.Lock()
	m.ref, m.lostNVRAM = r.Ref, r.NVRAMLost
	m.mu.Unlock()
	since := time.Unix(r.Boot, 0)
	if r.Boot == 0 {
		since = m.agent.cfg.Now()
	}
	p, err := adopt(m.dir())
	if err == nil {
		if err = m.refill(ctx, p); err != nil {
			// One that was being opened, or hangs, is of no use to the guest.
			m.agent.log.Error("ending a vmx that does not serve its guest", "vm", m.uuid, "pid", p.pid, "error", errors.Join(err, p.end()))
			p = nil
		} else {
			m.agent.log.Info("adopted a running VM", "vm", m.uuid, "pid", p.pid)
		}
	}
	m.poweredOn(p, since)
}

// spec is the guest's hardware: the VMX, with the disks and files that its vmx
// serves.
func (m *machine) spec(path string, st *hostapi.VMXStatus) (domain.Spec, error) {
	dict, err := vmxfile.Load(path)
	if err != nil {
		return domain.Spec{}, err
	}
	sockets := map[string]string{}
	for _, d := range st.Disks {
		sockets[d.Controller] = d.NbdSocket
	}
	spec, err := domain.FromVMX(dict, sockets)
	if err != nil {
		return domain.Spec{}, hostapi.Faultf(hostapi.Fault_INVALID, "%s: %w", path, err)
	}
	for i, d := range spec.Disks {
		for _, served := range st.Disks {
			if served.Controller == d.Place {
				spec.Disks[i].Serial = strings.ReplaceAll(served.Uuid, "-", "")
			}
		}
	}
	spec.ConsoleSocket = consoleSocket(m.dir())
	spec.NVRAM = st.NvramPath
	return spec, nil
}

// powerOff pulls the plug and closes the VM.
func (m *machine) powerOff(ctx context.Context) error {
	if err := m.agent.cfg.Guests.PowerOff(ctx, m.uuid); err != nil {
		return err
	}
	m.close()
	return nil
}

// close ends the vmx of a guest that has ended, however it did. The caller has
// the operation.
func (m *machine) close() {
	m.mu.Lock()
	b := m.boot
	m.mu.Unlock()
	if b == nil {
		return
	}
	b.stop()
	<-b.supervised // so that it starts no vmx any more
	m.mu.Lock()
	p, console := m.proc, m.console
	m.boot, m.proc, m.console = nil, nil, nil
	m.paused, m.waits, m.failed, m.missing, m.lostNVRAM = false, "", "", nil, false
	m.mu.Unlock()
	if console != nil {
		console.Close()
	}
	var err error
	if p != nil {
		err = p.end()
	}
	if err = errors.Join(err, removeRunDir(m.dir())); err != nil {
		m.agent.alarm(m.runtime(), fmt.Sprintf("VM %s was powered off and not closed well: %v", m.uuid, err))
	}
	m.agent.announce(m)
}

// guestChanged hears what libvirt tells of the guest.
func (m *machine) guestChanged(ev domain.Event) {
	switch ev.State {
	case domain.Off:
		if _, err := m.agent.hold(m.uuid); err == nil {
			m.agent.spawn(func() { defer m.agent.drop(m); m.guestEnded(m.agent.ctx, ev.Reason) })
		}
	case domain.PausedOnError:
		m.mu.Lock()
		m.paused = true
		if m.waits == "" {
			m.waits = "the guest waits: one of its disks answered with an error"
		}
		m.mu.Unlock()
		m.agent.log.Warn("guest paused on a disk error", "vm", m.uuid)
		m.agent.announce(m)
		m.wake()
	case domain.Running:
		m.mu.Lock()
		changed := m.paused
		if changed {
			m.paused, m.waits = false, ""
		}
		m.mu.Unlock()
		if changed {
			m.agent.announce(m)
		}
	}
}

// guestEnded closes a VM whose guest ended by itself; one that was powered off is
// closed already. It waits for the operation that runs. The event may be old: only
// libvirt's word that there is no guest now lets go of the disks.
func (m *machine) guestEnded(ctx context.Context, reason string) {
	for {
		select {
		case m.op <- struct{}{}:
		case <-ctx.Done():
			return
		}
		done := !m.isOn()
		if !done {
			st, err := m.agent.cfg.Guests.State(ctx, m.uuid)
			if err == nil && st == domain.Off {
				m.agent.log.Info("guest ended", "vm", m.uuid, "reason", reason)
				m.close()
			}
			done = err == nil
		}
		<-m.op
		if done {
			return
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
	}
}
