package dev

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"mortise/internal/domain"
	"mortise/internal/host"
	"mortise/internal/pki"
)

// MarkFile in a role's state folder makes it one of a development machine.
const MarkFile = "DEVELOPMENT"

// Marked tells whether a state folder bears the mark.
func Marked(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, MarkFile))
	return err == nil
}

// Config says what to run.
type Config struct {
	StateDir   string // everything is below; made when missing
	Hosts      int    // 1 to 16
	Executable string // the mortise binary
	KMIP       string // listen addresses, on loopback
	API        string
	Join       string
	HostPort   int       // of the first host; the others follow
	KeepGuests bool      // let guests run on when it stops
	Out        io.Writer // for a person
	Logger     *slog.Logger
}

// A node is a host of the machine.
type node struct {
	name, dir, run, listen string
	virt                   *Libvirtd
}

// A Machine is a whole Mortise that runs.
type Machine struct {
	cfg   Config
	run   string // folder for sockets; short
	lock  *os.File
	nodes []*node
	roles *roles
}

// Run starts everything, says on Out where it is, and waits until ctx ends; then
// it stops everything in order. A role that dies meanwhile is started again.
func Run(ctx context.Context, cfg Config) (err error) {
	m, err := prepare(cfg)
	if err != nil {
		return err
	}
	defer m.lock.Close()
	// Stopping must not be stopped: ctx has ended by then.
	defer func() { err = errors.Join(err, m.stop(context.WithoutCancel(ctx))) }()
	if err := m.start(ctx); err != nil {
		if ctx.Err() != nil {
			return nil // Ctrl-C during the start
		}
		return err
	}
	<-ctx.Done()
	fmt.Fprintln(m.cfg.Out, "Stopping.")
	return nil
}

func prepare(cfg Config) (*Machine, error) {
	if cfg.Hosts < 1 || cfg.Hosts > 16 {
		return nil, fmt.Errorf("%d hosts: 1 to 16 are possible", cfg.Hosts)
	}
	for _, a := range []string{cfg.KMIP, cfg.API, cfg.Join} {
		h, _, err := net.SplitHostPort(a)
		if err != nil {
			return nil, fmt.Errorf("address %q: %w", a, err)
		}
		if ip := net.ParseIP(h); ip == nil || !ip.IsLoopback() {
			return nil, fmt.Errorf("address %q: a development machine listens on loopback only, e.g. 127.0.0.1:8443", a)
		}
	}
	var err error
	if cfg.StateDir, err = filepath.Abs(cfg.StateDir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(cfg.StateDir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("another 'mortise dev' runs with %s: stop it, or choose another --state-dir", cfg.StateDir)
	}
	sum := sha256.Sum256([]byte(cfg.StateDir))
	m := &Machine{cfg: cfg, run: fmt.Sprintf("/run/mortise-dev-%x", sum[:4]), lock: lock, roles: newRoles(cfg.Logger)}
	hostIP, _, _ := net.SplitHostPort(cfg.API)
	for i := range cfg.Hosts {
		name := fmt.Sprintf("esx%d", i+1)
		m.nodes = append(m.nodes, &node{
			name: name, dir: filepath.Join(cfg.StateDir, name), run: filepath.Join(m.run, name),
			listen: net.JoinHostPort(hostIP, fmt.Sprint(cfg.HostPort+i)),
		})
	}
	return m, nil
}

// start brings the roles up in the order in which they need each other.
func (m *Machine) start(ctx context.Context) error {
	for _, d := range []string{m.dir("kms"), m.dir("center"), m.dir("datastore1"), m.dir("logs"), m.run} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	for _, d := range []string{"kms", "center"} {
		if err := mark(m.dir(d)); err != nil {
			return err
		}
		if err := makePassphrase(m.passphrase(d)); err != nil {
			return err
		}
	}
	if err := host.InitDatastore(host.Datastore{Name: "datastore1", Path: m.dir("datastore1")}); err != nil {
		return err
	}

	// A fresh libvirtd takes seconds to find out what QEMU can do: all of them do
	// it while the other roles start.
	var virt errgroup.Group
	for _, n := range m.nodes {
		m.say(n.name, "starting a libvirtd of its own")
		virt.Go(func() (err error) {
			if err := os.MkdirAll(n.run, 0o700); err != nil {
				return err
			}
			n.virt, err = StartLibvirtd(ctx, LibvirtdConfig{Dir: filepath.Join(n.dir, "libvirt"), Name: n.name, Shared: []string{n.run}, Log: m.cfg.Logger})
			return err
		})
	}
	if err := errors.Join(m.startCore(ctx), virt.Wait()); err != nil {
		return err
	}
	var hosts errgroup.Group
	for _, n := range m.nodes {
		m.say(n.name, "starting")
		hosts.Go(func() error {
			if err := m.startHost(ctx, n); err != nil {
				return fmt.Errorf("host %s: %w", n.name, err)
			}
			return nil
		})
	}
	if err := hosts.Wait(); err != nil {
		return err
	}
	m.say("hosts", "connecting")
	if err := m.waitConnected(ctx); err != nil {
		return err
	}
	return m.announce()
}

// startCore starts what hosts need.
func (m *Machine) startCore(ctx context.Context) error {
	m.say("kms", "starting")
	if err := m.roles.start(ctx, m.kms()); err != nil {
		return err
	}
	m.say("center", "starting")
	return m.roles.start(ctx, m.center())
}

// waitConnected waits until center has heard from every host what it has: only
// then is there anywhere to put a VM.
func (m *Machine) waitConnected(ctx context.Context) error {
	limit, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		text, err := m.mortise(limit, "center", "status", "--json", "--admin-socket", m.CenterSocket())
		var st struct {
			Hosts []struct{ Name, Connection string } `json:"hosts"`
		}
		if err == nil {
			err = json.Unmarshal([]byte(text), &st)
		}
		waiting := ""
		for _, h := range st.Hosts {
			if h.Connection != "connected" {
				waiting = h.Name
			}
		}
		if err == nil && waiting == "" {
			return nil
		}
		select {
		case <-limit.Done():
			if err == nil {
				err = fmt.Errorf("host %s is not connected to center; see %s", waiting, m.log(waiting))
			}
			return errors.Join(ctx.Err(), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (m *Machine) startHost(ctx context.Context, n *node) error {
	state := filepath.Join(n.dir, "state")
	if err := os.MkdirAll(state, 0o700); err != nil {
		return err
	}
	if err := mark(state); err != nil {
		return err
	}
	r := role{
		name: n.name, ready: tcpReady(n.listen), log: m.log(n.name),
		args: []string{"host", "serve", "--dev", "--state-dir", state, "--run-dir", n.run, "--listen", n.listen,
			"--libvirt-socket", n.virt.Socket(), "--qemu-user", "root", "--datastore", "datastore1=" + m.dir("datastore1"),
			"--center", m.cfg.Join, "--advertise", n.listen},
	}
	if _, err := host.LoadMembership(state); err != nil {
		token, err := m.mortise(ctx, "center", "token", "create", "--admin-socket", m.CenterSocket(), "--name", n.name)
		if err != nil {
			return err
		}
		file := filepath.Join(n.dir, "join-token")
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			return err
		}
		defer os.Remove(file)
		r.firstArgs = []string{"--join", "@" + file}
	}
	r.executable = m.cfg.Executable
	return m.roles.start(ctx, r)
}

func (m *Machine) kms() role {
	return role{
		name: "kms", executable: m.cfg.Executable, ready: tcpReady(m.cfg.KMIP), log: m.log("kms"),
		args: []string{"kms", "serve", "--dev", "--state-dir", m.dir("kms"), "--listen", m.cfg.KMIP,
			"--admin-socket", m.KMSSocket(), "--admin-listen", "", "--passphrase-file", m.passphrase("kms")},
	}
}

func (m *Machine) center() role {
	return role{
		name: "center", executable: m.cfg.Executable, ready: tcpReady(m.cfg.API), log: m.log("center"),
		args: []string{"center", "serve", "--dev", "--state-dir", m.dir("center"), "--listen", m.cfg.API, "--join-listen", m.cfg.Join,
			"--admin-socket", m.CenterSocket(), "--passphrase-file", m.passphrase("center"),
			"--initial-password-file", m.dir("initial-password")},
	}
}

// KMSSocket is the admin socket of kms.
func (m *Machine) KMSSocket() string { return filepath.Join(m.run, "kms.sock") }

// CenterSocket is the admin socket of center.
func (m *Machine) CenterSocket() string { return filepath.Join(m.run, "center.sock") }

func (m *Machine) dir(name string) string        { return filepath.Join(m.cfg.StateDir, name) }
func (m *Machine) passphrase(role string) string { return m.dir(role + ".passphrase") }
func (m *Machine) log(name string) string        { return filepath.Join(m.dir("logs"), name+".log") }

// mortise runs a verb of the binary and returns what it prints.
func (m *Machine) mortise(ctx context.Context, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, m.cfg.Executable, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("mortise %s: %w: %s", strings.Join(args[:2], " "), err, strings.TrimSpace(errs.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

func (m *Machine) say(who, what string) { fmt.Fprintf(m.cfg.Out, "%-8s %s\n", who, what) }

// announce tells where everything is; the generated password is shown once.
func (m *Machine) announce() error {
	file := m.dir("initial-password")
	password, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	chain, err := pki.LoadCertificates(filepath.Join(m.dir("center"), "api.pem"))
	if err != nil {
		return err
	}
	thumbprint := pki.Thumbprint(chain[0])
	w := m.cfg.Out
	fmt.Fprintf(w, "\nMortise runs on this machine.\n\n")
	fmt.Fprintf(w, "  vSphere API     https://%s/sdk\n", m.cfg.API)
	fmt.Fprintf(w, "  its thumbprint  %s\n", thumbprint)
	fmt.Fprintf(w, "  KMIP            %s\n", m.cfg.KMIP)
	for _, n := range m.nodes {
		fmt.Fprintf(w, "  host %-10s %s   virsh -c 'qemu+unix:///system?socket=%s'\n", n.name, n.listen, n.virt.Socket())
	}
	fmt.Fprintf(w, "  datastore1      %s\n", m.dir("datastore1"))
	fmt.Fprintf(w, "  logs            %s\n", m.dir("logs"))
	fmt.Fprintf(w, "  admin sockets   %s, %s\n\n", m.KMSSocket(), m.CenterSocket())
	fmt.Fprintf(w, "  user            administrator@mortise.local\n")
	if len(password) > 0 {
		fmt.Fprintf(w, "  password        %s   (shown this once)\n", strings.TrimSpace(string(password)))
	} else {
		fmt.Fprintf(w, "  password        as shown at the first start; forgotten? mortise center password reset --admin-socket %s\n", m.CenterSocket())
	}
	fmt.Fprintf(w, "\nTry:  mortise login https://%s\n", m.cfg.API)
	fmt.Fprintf(w, "      mortise provider add dev-kms %s\n", m.cfg.KMIP)
	fmt.Fprintf(w, "      mortise provider trust dev-kms --kms-admin-socket %s\n\nCtrl-C stops everything.\n", m.KMSSocket())
	if len(password) > 0 {
		return os.Remove(file)
	}
	return nil
}

// stop ends everything: guests first, so that their disks are flushed and
// released by processes that still have everything they need.
func (m *Machine) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	var errs []error
	if !m.cfg.KeepGuests {
		for _, n := range m.nodes {
			if n.virt != nil {
				errs = append(errs, m.stopGuests(ctx, n))
			}
		}
	}
	errs = append(errs, m.roles.stop(ctx))
	for _, n := range m.nodes {
		if n.virt != nil {
			errs = append(errs, n.virt.Stop(ctx, !m.cfg.KeepGuests))
		}
	}
	m.tidy()
	return errors.Join(errs...)
}

// tidy removes the empty folders for sockets. It never goes into a folder: a VM's
// files could still be mounted there.
func (m *Machine) tidy() {
	for _, n := range m.nodes {
		for _, name := range []string{"vm", "kvm-probe", ""} {
			_ = os.Remove(filepath.Join(n.run, name))
		}
	}
	for _, name := range []string{m.KMSSocket(), m.CenterSocket(), m.run} {
		_ = os.Remove(name)
	}
}

// stopGuests pulls the plug of a host's guests and waits until its agent has
// closed their VMs.
func (m *Machine) stopGuests(ctx context.Context, n *node) error {
	conn, err := domain.Connect(ctx, domain.Config{Socket: n.virt.Socket()})
	if err != nil {
		return err
	}
	defer conn.Close()
	guests, err := conn.Running(ctx)
	if err != nil {
		return err
	}
	for _, g := range guests {
		if err := conn.PowerOff(ctx, g); err != nil {
			return err
		}
	}
	for range 100 {
		open, _ := filepath.Glob(filepath.Join(n.run, "vm", "*", "control.sock"))
		if len(open) == 0 {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("host %s did not close its VMs in time; see %s", n.name, m.log(n.name))
}

func mark(dir string) error {
	return os.WriteFile(filepath.Join(dir, MarkFile), []byte("State of 'mortise dev'. Do not use it for a real installation: its passphrases lie beside it.\n"), 0o600)
}

// makePassphrase makes a random passphrase once. It lies beside what it
// protects, which is why the state is marked.
func makePassphrase(file string) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var b [24]byte
	rand.Read(b[:])
	_, err = f.WriteString(base64.RawURLEncoding.EncodeToString(b[:]) + "\n")
	return errors.Join(err, f.Sync(), f.Close())
}

// tcpReady tells whether somebody accepts connections at an address.
func tcpReady(addr string) func(context.Context) bool {
	return func(ctx context.Context) bool {
		d := net.Dialer{Timeout: time.Second}
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return false
		}
		c.Close()
		return true
	}
}
