package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/vmx"
)

// answerTime bounds a question to a vmx that needs no storage.
const answerTime = 10 * time.Second

// supervise keeps a guest's disks served until ctx, that of its boot, ends (design
// §4 Failure): a vmx that died is started again, with the keys that the cache has;
// a guest that libvirt paused on a disk error is resumed, again and again, while
// its vmx is well. One whose disk failed for good stays paused.
func (m *machine) supervise(ctx context.Context) {
	backoff := backoff{least: 100 * time.Millisecond, most: 10 * time.Second}
	for ctx.Err() == nil {
		m.mu.Lock()
		p, paused := m.proc, m.paused
		m.mu.Unlock()
		var exited <-chan struct{}
		var again <-chan time.Time
		switch {
		case p == nil:
			err := m.restart(ctx)
			if err == nil {
				backoff.reset()
				continue
			}
			m.trouble(ctx, fmt.Sprintf("its vmx is not running and cannot be started: %v", err), err)
			again = time.After(backoff.next())
		case !p.alive():
			m.bury(p)
			continue
		case !paused:
			exited = p.exited
			backoff.reset()
		default:
			exited = p.exited
			why, err := m.failure(ctx, p)
			if err == nil && why == "" {
				err = m.agent.cfg.Guests.Resume(ctx, m.uuid)
			}
			switch {
			case why != "":
				m.giveUp(why)
			case err != nil:
				m.agent.log.Warn("resuming a guest", "vm", m.uuid, "error", err)
				again = time.After(backoff.next())
			default:
				m.agent.log.Info("asked a paused guest to go on", "vm", m.uuid)
				again = time.After(backoff.next())
			}
		}
		select {
		case <-ctx.Done():
		case <-exited:
		case <-again:
		case <-m.retry:
		}
	}
}

// bury lets go of a vmx that died under its guest.
func (m *machine) bury(p *process) {
	m.agent.log.Error("vmx died under a running guest; starting it again", "vm", m.uuid, "pid", p.pid)
	p.conn.Close()
	if err := unmountFiles(p.dir); err != nil {
		m.agent.log.Error("after the death of a vmx", "vm", m.uuid, "error", err)
	}
	m.mu.Lock()
	m.proc = nil
	m.mu.Unlock()
}

const nvramNotSaved = "firmware variables are not saved until the VM is power-cycled"

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
	st, err := p.Open(ctx, &hostapi.OpenRequest{Ref: ref, Keys: keys, Serve: true, Restarted: true})
	if err != nil {
		return errors.Join(p.explain(err), p.end())
	}
	m.mu.Lock()
	lost := st.NvramPath != "" && st.FilesMount != "" && !m.lostNVRAM
	m.proc, m.waits, m.missing, m.lostNVRAM = p, "", nil, m.lostNVRAM || lost
	if err := m.record(); err != nil {
		m.agent.log.Error("the next agent will know less of this VM", "vm", m.uuid, "error", err)
	}
	m.mu.Unlock()
	m.agent.log.Info("vmx is back", "vm", m.uuid, "pid", p.pid)
	if lost {
		m.agent.alarm(m.runtime(), "The vmx of an EFI guest was restarted: "+nvramNotSaved)
	}
	m.agent.announce(m)
	return nil
}

// failure says why the guest must not go on: a disk of it failed for good, e.g.
// because an fsync failed. What the guest wrote may be lost, and a request that is
// repeated would succeed and hide it. The vmx marks the run folder before the guest
// hears of the failure, so this holds after the death of vmx and agent too. It is
// empty when all is well.
func (m *machine) failure(ctx context.Context, p *process) (why string, err error) {
	mark := filepath.Join(m.dir(), vmx.FailedFile)
	text, err := os.ReadFile(mark)
	if err == nil {
		return "storage failed: " + string(text), nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	st, err := p.Status(ctx, &hostapi.StatusRequest{})
	if err != nil || st.Problem == "" {
		return "", err
	}
	return "storage failed: " + st.Problem, os.WriteFile(mark, []byte(st.Problem), 0o600) // the vmx could not
}

// giveUp leaves the guest paused for good.
func (m *machine) giveUp(why string) {
	text := "a disk failed for good, and the guest stays paused: power the VM off, then check storage and the guest's file systems: " + why
	m.mu.Lock()
	news := m.failed == ""
	m.failed = text
	m.mu.Unlock()
	if news {
		m.agent.alarm(m.runtime(), text)
		m.agent.announce(m)
	}
}

// trouble notes why the guest waits, and tells the watchers once.
func (m *machine) trouble(ctx context.Context, text string, err error) {
	if ctx.Err() != nil {
		return // the guest has ended
	}
	var missing []keysafe.KeyID
	fault, _ := hostapi.AsFault(err)
	for _, id := range fault.Missing {
		missing = append(missing, fromWire(id))
	}
	m.mu.Lock()
	changed := m.waits != text
	m.waits, m.missing = text, missing
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
