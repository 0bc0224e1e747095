package ha

import (
	"context"
	"crypto/tls"
	"os"
	"syscall"
	"testing"
	"time"

	"mortise/internal/kms/admin"
)

// backWithin is the promise: writes are back this soon after the leader is lost.
// Other faults leave a leader in doubt about itself for a while longer.
const (
	backWithin     = 3 * time.Second
	backEventually = 6 * time.Second
)

// TestFaults does to a cluster under load what happens to machines, one thing
// after the other. MORTISE_TORTURE_HA=10m goes on doing so for that long.
func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes two minutes")
	}
	g := newGroup(t)
	l := begin(g, 8)
	defer l.stop()
	eventually(t, "the load works", 20*time.Second, func() bool { _, ok := l.back(l.start); return ok })

	faults := []struct {
		name string
		do   func()
	}{
		{"kill -9 of the leader", g.killed(l)},
		{"the leader cut off from the others", g.cutOff(l, true, true)},
		{"the leader hears nobody", g.cutOff(l, true, false)},
		{"nobody hears the leader", g.cutOff(l, false, true)},
		{"the leader pauses", g.paused(l)},
		{"a slow disk", g.slowDisk(l)},
		{"a full disk", g.fullDisk(l)},
		{"a wrong clock", g.wrongClock(l)},
		{"an upgrade, one at a time", g.upgraded(l)},
	}
	end := time.Now()
	if d, err := time.ParseDuration(os.Getenv("MORTISE_TORTURE_HA")); err == nil {
		end = end.Add(d)
	}
	for round := 0; round == 0 || time.Now().Before(end); round++ {
		for _, f := range faults {
			began := time.Now()
			f.do()
			if t.Failed() {
				t.Fatalf("after %s", f.name)
			}
			g.all()
			t.Logf("HA fault=%q took=%v", f.name, time.Since(began).Round(time.Millisecond))
		}
	}
	g.replaced(l)
	l.end(t)
}

// away measures how long writes are away after a fault and holds it against the
// promise.
func (g *group) away(l *load, what string, from time.Time, limit time.Duration) {
	g.t.Helper()
	var d time.Duration
	eventually(g.t, "writes are back after "+what, 20*time.Second, func() (ok bool) {
		d, ok = l.back(from)
		return ok
	})
	g.t.Logf("HA writes_back=%v after=%q limit=%v", d.Round(time.Millisecond), what, limit)
	if d > limit {
		g.t.Errorf("writes were away for %v after %s, at most %v is promised", d, what, limit)
	}
}

func (g *group) killed(l *load) func() {
	return func() {
		m := g.leader()
		from := time.Now()
		m.kill()
		g.away(l, "kill -9 of the leader", from, backWithin)
		time.Sleep(time.Second)
		m.start() // nobody types a passphrase: the others have the keys
	}
}

func (g *group) cutOff(l *load, in, out bool) func() {
	return func() {
		m := g.leader()
		from := time.Now()
		g.w.cut(m, in, out)
		g.away(l, "losing the leader to the network", from, backEventually)
		time.Sleep(2 * time.Second)
		g.w.mend(m)
	}
}

func (g *group) paused(l *load) func() {
	return func() {
		m := g.leader()
		from := time.Now()
		m.signal(syscall.SIGSTOP)
		g.away(l, "a paused leader", from, backEventually)
		time.Sleep(time.Second)
		m.signal(syscall.SIGCONT)
	}
}

// slowDisk: a follower's syncs take 300 ms; the others do not wait for it.
func (g *group) slowDisk(l *load) func() {
	return func() {
		m := g.follower()
		m.disk.slow.Store(int64(300 * time.Millisecond))
		from := time.Now()
		time.Sleep(3 * time.Second)
		g.away(l, "a slow disk", from, backEventually)
		m.disk.slow.Store(0)
	}
}

// fullDisk: a member that cannot write ends, rather than to acknowledge what it
// has not kept. The others go on; with space again it comes back.
func (g *group) fullDisk(l *load) func() {
	return func() {
		m := g.leader()
		from := time.Now()
		m.disk.full.Store(true)
		g.away(l, "the leader's disk is full", from, backEventually)
		time.Sleep(time.Second)
		m.disk.full.Store(false)
		if m.wait(3 * time.Second) {
			m.start()
		}
	}
}

// wrongClock: a member that is five minutes ahead serves nobody; the others do.
func (g *group) wrongClock(l *load) func() {
	return func() {
		m := g.follower()
		m.setClock("5m")
		serves := func() bool {
			c, err := tls.Dial("tcp", m.address(), &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{g.cert}})
			if err == nil {
				c.Close()
			}
			return err == nil
		}
		eventually(g.t, m.name+" stops serving", 20*time.Second, func() bool { return !serves() })
		s, err := m.admin().Clock(g.t.Context())
		if err != nil || s.Problem == "" {
			g.t.Errorf("its clock's status: %+v, %v", s, err)
		}
		g.away(l, "a wrong clock", time.Now(), backEventually)
		m.setClock("0s")
		eventually(g.t, m.name+" serves again", 20*time.Second, serves)
	}
}

// upgraded restarts the members one at a time, as an upgrade does.
func (g *group) upgraded(l *load) func() {
	return func() {
		for _, m := range g.members {
			from := time.Now()
			m.signal(syscall.SIGTERM)
			if !m.wait(20 * time.Second) {
				g.t.Fatalf("%s does not end:\n%s", m.name, m.said(20))
			}
			g.away(l, "an orderly stop of "+m.name, from, backEventually)
			m.start()
			m.ready()
			g.votes(m.name)
		}
	}
}

// replaced removes a member and lets a new machine join under its name.
func (g *group) replaced(l *load) {
	old := g.leader()
	from := time.Now()
	g.asked("remove "+old.name, func(a *admin.Client, ctx context.Context) error { return a.RemoveMember(ctx, old.name) })
	if !old.wait(20 * time.Second) {
		g.t.Errorf("%s was removed and goes on", old.name)
	}
	g.away(l, "the leader's removal", from, backEventually)
	old.start()
	if !old.wait(30 * time.Second) {
		g.t.Errorf("%s was removed and started again", old.name)
	}
	for i, m := range g.members {
		if m == old {
			g.members = append(g.members[:i], g.members[i+1:]...)
			break
		}
	}
	g.add(old.name)
	g.client = g.connect()
	l.clients.Store(g.client)
	time.Sleep(2 * time.Second)
	g.all()
}
