package ha

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mortise/internal/dev"
	"mortise/internal/kmipc"
	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/kms/cluster"
	"mortise/internal/pki"
)

// member is one key server process in its namespace.
type member struct {
	t      *testing.T
	binary string
	name   string
	ns, ip string
	dir    string // passphrase, socket, clock, log
	state  string // the state folder, on disk
	disk   *disk

	mu   sync.Mutex
	log  *os.File
	cmd  *exec.Cmd
	gone chan struct{}
}

func newMember(t *testing.T, w *wire, binary, name string, i int) *member {
	t.Helper()
	ns, ip := w.plug(i)
	dir, err := os.MkdirTemp("", "mortise-ha-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Join(dir, "real")); os.RemoveAll(dir) })
	m := &member{t: t, binary: binary, name: name, ns: ns, ip: ip, dir: dir, state: filepath.Join(dir, "mnt", "kms")}
	for _, d := range []string{"real", "mnt"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	m.disk = mount(t, filepath.Join(dir, "real"), filepath.Join(dir, "mnt"))
	t.Cleanup(func() {
		m.kill()
		if t.Failed() {
			t.Logf("the end of what %s said:\n%s", m.name, m.said(60))
		}
	})
	if m.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	err = errors.Join(os.Mkdir(m.state, 0o700),
		os.WriteFile(filepath.Join(m.state, dev.MarkFile), nil, 0o600),
		os.WriteFile(m.in("passphrase"), []byte("passphrase of the fault tests\n"), 0o600),
		os.WriteFile(m.in("clock"), []byte("0s\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *member) in(name string) string { return filepath.Join(m.dir, name) }
func (m *member) address() string       { return m.ip + ":5696" }
func (m *member) admin() *admin.Client  { return admin.DialSocket(m.in("admin.sock")) }
func (m *member) setClock(by string) {
	m.t.Helper()
	if err := os.WriteFile(m.in("clock.new"), []byte(by), 0o600); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(m.in("clock.new"), m.in("clock")); err != nil {
		m.t.Fatal(err)
	}
}

// said is the end of the member's log.
func (m *member) said(lines int) string {
	text, err := os.ReadFile(m.in("log"))
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(text, []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

// start runs the member. Only its first start has the passphrase: afterwards it
// must get its root keys from the others.
func (m *member) start(args ...string) {
	m.t.Helper()
	args = append([]string{"--net=/run/netns/" + m.ns, m.binary, "kms", "serve", "--dev", "--state-dir", m.state,
		"--listen", m.address(), "--admin-listen", "", "--admin-socket", m.in("admin.sock"),
		"--clock-offset-file", m.in("clock"), "--peer-address", m.ip + ":5698"}, args...)
	cmd := exec.Command("nsenter", args...)
	cmd.Stdout, cmd.Stderr = m.log, m.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	gone := make(chan struct{})
	m.mu.Lock()
	m.cmd, m.gone = cmd, gone
	m.mu.Unlock()
	go func() { cmd.Wait(); close(gone) }()
}

func (m *member) passphrase() []string { return []string{"--passphrase-file", m.in("passphrase")} }

// signal sends a signal; nsenter without a fork is the member itself.
func (m *member) signal(s syscall.Signal) {
	m.mu.Lock()
	cmd, gone := m.cmd, m.gone
	m.mu.Unlock()
	if cmd == nil {
		return
	}
	select {
	case <-gone:
	default:
		cmd.Process.Signal(s)
	}
}

func (m *member) kill() {
	m.signal(syscall.SIGKILL)
	m.wait(10 * time.Second)
}

// wait returns whether the process has ended within d.
func (m *member) wait(d time.Duration) bool {
	m.mu.Lock()
	gone := m.gone
	m.mu.Unlock()
	if gone == nil {
		return true
	}
	select {
	case <-gone:
		return true
	case <-time.After(d):
		return false
	}
}

func (m *member) running() bool { return !m.wait(0) }

// ready waits until the member serves KMIP.
func (m *member) ready() {
	m.t.Helper()
	eventually(m.t, m.name+" serves", 40*time.Second, func() bool {
		if !m.running() {
			m.t.Fatalf("%s ended:\n%s", m.name, m.said(30))
		}
		c, err := tls.Dial("tcp", m.address(), &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			c.Close()
		}
		return err == nil || strings.Contains(err.Error(), "certificate") // it asks for ours, which is an answer
	})
}

func eventually(t *testing.T, what string, within time.Duration, f func() bool) {
	t.Helper()
	for end := time.Now().Add(within); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// cluster is all the members, and the client that knows them.
type group struct {
	t       *testing.T
	w       *wire
	binary  string
	members []*member
	cert    tls.Certificate
	client  *kmipc.Client // servers in the order of members
	next    int
}

func newGroup(t *testing.T) *group {
	t.Helper()
	g := &group{t: t, w: newWire(t), next: 1}
	if g.binary = os.Getenv("MORTISE_BINARY"); g.binary == "" {
		g.binary = build(t)
	}
	for i := range 3 {
		g.add(fmt.Sprintf("kms-%d", i+1))
	}
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Client: true, Life: 24 * time.Hour}, "ha", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	g.cert = tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
	_, err = g.members[1].admin().AddClient(t.Context(), kms.DefaultInstance, admin.AddClient{
		Certificate: string(pki.EncodeCertificates(cert)), Name: "ha", Role: kms.RoleAdministrator})
	if err != nil {
		t.Fatal(err)
	}
	g.client = g.connect()
	return g
}

func build(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "mortise")
	cmd := exec.Command("go", "build", "-o", binary, "mortise/cmd/mortise")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building mortise: %v\n%s", err, out)
	}
	return binary
}

// add starts one more member, which joins those that are there.
func (g *group) add(name string) *member {
	g.t.Helper()
	m := newMember(g.t, g.w, g.binary, name, g.next)
	g.next++
	args := m.passphrase()
	if len(g.members) > 0 {
		var i admin.Invitation
		g.asked("invite "+name, func(a *admin.Client, ctx context.Context) (err error) {
			i, err = a.InviteMember(ctx, admin.InviteMember{Name: name})
			return err
		})
		args = append(args, "--join", i.Token)
	} else {
		args = append(args, "--name", name)
	}
	m.start(args...)
	m.ready()
	g.members = append(g.members, m)
	g.votes(name)
	return m
}

// asked repeats an administrative call on any member until one does it.
func (g *group) asked(what string, f func(*admin.Client, context.Context) error) {
	g.t.Helper()
	var err error
	for end := time.Now().Add(40 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		for _, m := range g.members {
			if !m.running() {
				continue
			}
			ctx, cancel := context.WithTimeout(g.t.Context(), 10*time.Second)
			err = f(m.admin(), ctx)
			cancel()
			if err == nil {
				return
			}
		}
	}
	g.t.Fatalf("%s: %v", what, err)
}

func (g *group) list() []cluster.Member {
	for _, m := range g.members {
		if !m.running() {
			continue
		}
		ctx, cancel := context.WithTimeout(g.t.Context(), 2*time.Second)
		list, err := m.admin().Members(ctx)
		cancel()
		if err == nil && len(list) > 0 {
			return list
		}
	}
	return nil
}

func (g *group) votes(name string) {
	g.t.Helper()
	eventually(g.t, name+" votes", 40*time.Second, func() bool {
		for _, m := range g.list() {
			if m.Name == name && (m.Status == "leader" || m.Status == "follower") {
				return true
			}
		}
		return false
	})
}

func (g *group) leader() *member {
	g.t.Helper()
	var found *member
	eventually(g.t, "there is a leader", 20*time.Second, func() bool {
		for _, l := range g.list() {
			for _, m := range g.members {
				if l.Status == "leader" && l.Name == m.name {
					found = m
				}
			}
		}
		return found != nil
	})
	return found
}

// follower is a member that is not the leader.
func (g *group) follower() *member {
	g.t.Helper()
	leader := g.leader()
	for _, m := range g.members {
		if m != leader {
			return m
		}
	}
	return nil
}

func (g *group) connect() *kmipc.Client {
	g.t.Helper()
	cfg := kmipc.Config{Certificate: g.cert, HandshakeTimeout: time.Second, RequestTimeout: 2 * time.Second}
	for _, m := range g.members {
		own, err := pki.LoadCertificates(filepath.Join(m.state, "kmip.pem"))
		if err != nil {
			g.t.Fatal(err)
		}
		cfg.Endpoints = append(cfg.Endpoints, kmipc.Endpoint{Name: m.name, Address: m.address(), Pins: [][32]byte{pki.Fingerprint(own[0])}})
	}
	c, err := kmipc.New(cfg)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(c.Close)
	return c
}

// all waits until every member serves and votes.
func (g *group) all() {
	g.t.Helper()
	for _, m := range g.members {
		m.ready()
		g.votes(m.name)
	}
}
