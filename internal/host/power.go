package host

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"mortise/internal/domain"
	"mortise/internal/hostapi"
	"mortise/internal/vmxfile"
)

func consoleSocket(runDir string) string { return filepath.Join(runDir, guestDir, "console.sock") }

// powerOn opens the VM and starts its guest. With a failure nothing stays
// behind: no process, no lock.
func (m *machine) powerOn(ctx context.Context, path string) (err error) {
	m.mu.Lock()
	on := m.power == hostapi.PowerState_POWERED_ON
	m.mu.Unlock()
	if on {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "VM %s is powered on already", m.uuid)
	}
	// libvirt has the last word: a guest that we do not know of must not get a
	// second set of disks.
	if st, err := m.agent.cfg.Guests.State(ctx, m.uuid); err == nil && st != domain.Off {
		return hostapi.Faultf(hostapi.Fault_WRONG_POWER_STATE, "libvirt has a guest of VM %s already, in state %s", m.uuid, st)
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
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			_ = p.end(ctx)
		}
	}()
	st, err := p.Open(ctx, &hostapi.OpenRequest{Ref: m.ref, Keys: keys, Serve: true})
	if err != nil {
		return err
	}
	spec, err := m.spec(path, st)
	if err != nil {
		return err
	}
	if err := m.agent.cfg.Guests.Start(ctx, spec); err != nil {
		return fmt.Errorf("starting the guest: %w", err)
	}
	m.attach(p)
	m.setPower(hostapi.PowerState_POWERED_ON)
	m.openConsole()
	m.agent.announce(m)
	m.agent.running.Go(m.supervise)
	return nil
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
	spec.ConsoleSocket = consoleSocket(m.agent.vmDir(m.uuid))
	spec.NVRAM = st.NvramPath
	return spec, nil
}

// powerOff pulls the plug and closes the VM.
func (m *machine) powerOff(ctx context.Context) error {
	if err := m.agent.cfg.Guests.PowerOff(ctx, m.uuid); err != nil {
		return err
	}
	return m.close(ctx)
}

// close ends the vmx of a guest that has ended, however it did.
func (m *machine) close(ctx context.Context) error {
	m.mu.Lock()
	p, console, was := m.proc, m.console, m.power
	m.proc, m.console = nil, nil
	m.mu.Unlock()
	m.setPower(hostapi.PowerState_POWERED_OFF)
	m.wake() // supervise ends
	if console != nil {
		console.Close()
	}
	var err error
	if p != nil {
		err = p.end(ctx)
	}
	if was == hostapi.PowerState_POWERED_ON {
		m.agent.announce(m)
	}
	return err
}

// guestChanged hears what libvirt tells of the guest.
func (m *machine) guestChanged(ev domain.Event) {
	ctx := m.agent.ctx
	switch ev.State {
	case domain.Off:
		// powerOff holds the operation and closes by itself; this is a guest that
		// ended on its own.
		m.agent.running.Go(func() {
			select {
			case m.op <- struct{}{}:
			case <-ctx.Done():
				return
			}
			defer func() { <-m.op; m.agent.forget(m) }()
			m.mu.Lock()
			on := m.power == hostapi.PowerState_POWERED_ON
			m.mu.Unlock()
			if !on {
				return
			}
			if st, err := m.agent.cfg.Guests.State(ctx, m.uuid); err == nil && st != domain.Off {
				return // it was started again since
			}
			m.agent.log.Info("guest ended", "vm", m.uuid, "reason", ev.Reason)
			if err := m.close(context.WithoutCancel(ctx)); err != nil {
				m.agent.log.Error("closing a VM whose guest ended", "vm", m.uuid, "error", err)
			}
		})
	case domain.PausedOnError:
		m.mu.Lock()
		m.paused = true
		if m.problem == "" {
			m.problem = "the guest waits: one of its disks answered with an error"
		}
		m.mu.Unlock()
		m.agent.log.Warn("guest paused on a disk error", "vm", m.uuid)
		m.agent.announce(m)
		m.wake()
	case domain.Running:
		m.mu.Lock()
		changed := m.paused
		m.paused = false
		if changed {
			m.problem = ""
		}
		m.mu.Unlock()
		if changed {
			m.agent.announce(m)
		}
	}
}

// supervise keeps a running guest's disks served (design §4 Failure): a vmx that
// died is started again, with the keys that the cache has; a guest that libvirt
// paused on a disk error is resumed, again and again, while its vmx is well.
func (m *machine) supervise() {
	ctx := m.agent.ctx
	backoff := backoff{least: 100 * time.Millisecond, most: 10 * time.Second}
	for {
		m.mu.Lock()
		p, retry, on, paused := m.proc, m.retry, m.power == hostapi.PowerState_POWERED_ON, m.paused
		m.mu.Unlock()
		if !on {
			return
		}
		var exited <-chan struct{}
		var again <-chan time.Time
		switch {
		case p == nil || !p.alive():
			if err := m.restart(ctx); err != nil {
				m.trouble(fmt.Sprintf("its vmx is not running and cannot be started: %v", err))
				again = time.After(backoff.next())
				break
			}
			backoff.reset()
			continue
		case paused:
			exited = p.exited
			if st, err := p.Status(ctx, &hostapi.StatusRequest{}); err != nil || st.Problem != "" {
				// A failed fsync is final: the guest must not go on (design §4).
				if err == nil {
					m.trouble(st.Problem)
				}
			} else if err := m.agent.cfg.Guests.Resume(ctx, m.uuid); err != nil {
				m.agent.log.Warn("resuming a guest", "vm", m.uuid, "error", err)
			} else {
				m.agent.log.Info("asked a paused guest to go on", "vm", m.uuid)
			}
			again = time.After(backoff.next())
		default:
			exited = p.exited
			backoff.reset()
		}
		select {
		case <-ctx.Done():
			return
		case <-exited:
			m.mu.Lock()
			on = m.power == hostapi.PowerState_POWERED_ON && m.proc == p
			m.mu.Unlock()
			if on {
				m.agent.log.Error("vmx died under a running guest; starting it again", "vm", m.uuid, "pid", p.pid)
				unmountFiles(p.dir)
			}
		case <-again:
		case <-retry:
		}
	}
}

// restart opens the VM again for a guest that runs already.
func (m *machine) restart(ctx context.Context) error {
	m.mu.Lock()
	ref := m.ref
	m.mu.Unlock()
	path, err := m.agent.vmxPath(ref)
	if err != nil {
		return err
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
	if _, err := p.Open(ctx, &hostapi.OpenRequest{Ref: ref, Keys: keys, Serve: true, Restarted: true}); err != nil {
		_ = p.end(context.WithoutCancel(ctx))
		return err
	}
	m.mu.Lock()
	// The guest may have ended meanwhile.
	gone := m.power != hostapi.PowerState_POWERED_ON
	if !gone {
		m.proc, m.problem, m.missing = p, "", nil
	}
	m.mu.Unlock()
	if gone {
		return p.end(context.WithoutCancel(ctx))
	}
	m.agent.log.Info("vmx is back", "vm", m.uuid, "pid", p.pid)
	m.agent.announce(m)
	return nil
}

// trouble notes why the guest waits, and tells the watchers once.
func (m *machine) trouble(text string) {
	m.mu.Lock()
	changed := m.problem != text
	m.problem = text
	m.mu.Unlock()
	if changed {
		m.agent.log.Error("VM in trouble", "vm", m.uuid, "problem", text)
		m.agent.announce(m)
	}
}

// backoff doubles from least to most.
type backoff struct{ least, most, now time.Duration }

func (b *backoff) reset() { b.now = 0 }

func (b *backoff) next() time.Duration {
	b.now = min(max(2*b.now, b.least), b.most)
	return b.now
}
