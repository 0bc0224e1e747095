package domain

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"

	"mortise/internal/atomicfile"
)

// Config says where libvirt is.
type Config struct {
	Socket string // libvirtd's socket; default /run/libvirt/libvirt-sock
	QEMU   string // program for the KVM probe; default qemu-system-x86_64
	// ProbeFile keeps what the KVM probe found, so that a program that starts again
	// need not wait for it; it belongs on a file system that a reboot empties.
	// Empty: none.
	ProbeFile string
	Log       *slog.Logger
}

// DefaultSocket is where a machine's own libvirtd listens.
const DefaultSocket = "/run/libvirt/libvirt-sock"

// patience is how long a call waits for a libvirtd that is away, e.g. because it
// is being restarted. Guests run on meanwhile.
const patience = 15 * time.Second

// A Conn drives guests through one libvirtd. It connects again by itself when
// libvirtd restarts. All methods may be called at the same time.
type Conn struct {
	cfg    Config
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup
	kvm    chan struct{} // closed when kvmErr is known
	kvmErr error         // why guests run under TCG; nil: KVM works

	mu      sync.Mutex    // protects what follows
	session *session      // nil while libvirtd is away
	changed chan struct{} // closed when session changes
	subs    map[*subscription]bool
	known   map[string]State // our guests, as last told to subscribers
}

// A session is one connection to libvirtd.
type session struct {
	virt *libvirt.Libvirt
	conn *checkedConn
}

// Connect connects to libvirtd and begins to probe KVM. It fails when libvirtd
// does not answer now; from then on it reconnects for ever, until Close.
func Connect(ctx context.Context, cfg Config) (*Conn, error) {
	if cfg.Socket == "" {
		cfg.Socket = DefaultSocket
	}
	if cfg.QEMU == "" {
		cfg.QEMU = "qemu-system-x86_64"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s, err := dial(ctx, cfg.Socket)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w; is it running? (Debian packages libvirt-daemon-system and libvirt-daemon-driver-qemu; the socket is readable by root and group libvirt)", ErrUnavailable, cfg.Socket, err)
	}
	c := &Conn{
		cfg: cfg, kvm: make(chan struct{}), changed: make(chan struct{}),
		subs: map[*subscription]bool{}, known: map[string]State{},
	}
	c.ctx, c.cancel = context.WithCancel(context.WithoutCancel(ctx))
	c.tasks.Go(c.probeKVM)
	c.tasks.Go(func() { c.keep(s) })
	return c, nil
}

// Close ends the connection and every Events channel. Guests run on.
func (c *Conn) Close() error {
	c.cancel()
	c.tasks.Wait()
	return nil
}

// dial opens a session: connected, authenticated, opened on qemu:///system.
func dial(ctx context.Context, path string) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	conn := newCheckedConn(raw)
	virt := libvirt.NewWithDialer(dialers.NewAlreadyConnected(conn))
	failed := make(chan error, 1)
	go func() {
		err := virt.ConnectToURI(libvirt.QEMUSystem)
		if err == nil {
			_, err = virt.ConnectGetLibVersion()
		}
		failed <- err
	}()
	select {
	case err = <-failed:
	case <-ctx.Done():
		err = fmt.Errorf("it accepts connections and says nothing: %w", ctx.Err())
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &session{virt: virt, conn: conn}, nil
}

// keep holds a session open, the first and those after it.
func (c *Conn) keep(s *session) {
	defer c.endSubscriptions()
	wait := 50 * time.Millisecond
	for {
		if s == nil {
			select {
			case <-c.ctx.Done():
				return
			case <-time.After(wait):
			}
			wait = min(2*wait, 2*time.Second)
			var err error
			if s, err = dial(c.ctx, c.cfg.Socket); err != nil {
				c.cfg.Log.Debug("libvirtd is away", "socket", c.cfg.Socket, "error", err)
				s = nil
				continue
			}
			c.cfg.Log.Info("connected to libvirtd again", "socket", c.cfg.Socket)
		}
		wait = 50 * time.Millisecond
		// Events are subscribed to before anyone can use the session, so that what
		// a call causes is seen.
		if err := c.follow(s); err != nil {
			c.cfg.Log.Warn("subscribing to libvirt's events", "error", err)
			s.conn.Close()
			s = nil
			continue
		}
		c.setSession(s)
		select {
		case <-c.ctx.Done():
			c.setSession(nil)
			s.conn.Close()
			return
		case <-s.conn.done:
		}
		c.setSession(nil)
		s.conn.Close()
		s = nil
		c.cfg.Log.Warn("lost libvirtd; guests run on", "socket", c.cfg.Socket)
	}
}

func (c *Conn) setSession(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.session = s
	close(c.changed)
	c.changed = make(chan struct{})
}

// current waits for a session.
func (c *Conn) current(ctx context.Context) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		c.mu.Lock()
		s, changed := c.session, c.changed
		c.mu.Unlock()
		if s != nil {
			return s, nil
		}
		select {
		case <-c.ctx.Done():
			return nil, fmt.Errorf("connection to libvirtd: %w", ErrClosed)
		case <-ctx.Done():
			return nil, fmt.Errorf("%w at %s", ErrUnavailable, c.cfg.Socket)
		case <-changed:
		}
	}
}

// call runs one libvirt call. libvirt's RPC cannot be cancelled: when ctx ends
// first, the call goes on at libvirtd and its answer is dropped.
func call[T any](ctx context.Context, c *Conn, f func(*libvirt.Libvirt) (T, error)) (T, error) {
	var zero T
	s, err := c.current(ctx)
	if err != nil {
		return zero, err
	}
	return callOn(ctx, s, f)
}

func callOn[T any](ctx context.Context, s *session, f func(*libvirt.Libvirt) (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	var zero T
	done := make(chan answer, 1)
	go func() {
		v, err := f(s.virt)
		done <- answer{v, err}
	}()
	select {
	case a := <-done:
		if errors.Is(a.err, libvirt.ErrInterrupted) {
			return zero, fmt.Errorf("%w: the connection was lost during the call", ErrUnavailable)
		}
		return a.value, a.err
	case <-s.conn.done:
		return zero, fmt.Errorf("%w: the connection was lost during the call", ErrUnavailable)
	case <-ctx.Done():
		return zero, ctx.Err()
	}
}

func (c *Conn) probeKVM() {
	defer close(c.kvm)
	if c.kvmErr = c.probeOnce(); c.kvmErr != nil {
		c.cfg.Log.Info("guests will run under TCG, which is slower: KVM does not work here", "reason", c.kvmErr)
	}
}

// probeOnce probes KVM, or takes the answer that an earlier program left.
func (c *Conn) probeOnce() error {
	if c.cfg.ProbeFile == "" {
		return probe(c.ctx, c.cfg.QEMU, "kvm")
	}
	if text, err := os.ReadFile(c.cfg.ProbeFile); err == nil {
		if why, no := strings.CutPrefix(string(text), "no: "); no {
			return errors.New(why)
		}
		return nil
	}
	err := probe(c.ctx, c.cfg.QEMU, "kvm")
	if c.ctx.Err() != nil {
		return err
	}
	text := "yes"
	if err != nil {
		text = "no: " + err.Error()
	}
	if werr := atomicfile.Write(c.cfg.ProbeFile, []byte(text), 0o600); werr != nil {
		c.cfg.Log.Warn("keeping the result of the KVM probe", "error", werr)
	}
	return err
}

// usesKVM waits for the probe.
func (c *Conn) usesKVM(ctx context.Context) (bool, error) {
	select {
	case <-c.kvm:
		return c.kvmErr == nil, nil
	case <-c.ctx.Done():
		return false, fmt.Errorf("connection to libvirtd: %w", ErrClosed)
	case <-ctx.Done():
		return false, ctx.Err()
	}
}
