package center

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/pki"
)

const (
	firstRetry    = 200 * time.Millisecond // before a host is called again
	lastRetry     = 15 * time.Second
	describeEvery = 30 * time.Second
	answerTime    = 20 * time.Second // for calls that do no work on a VM
	maxMessage    = 16 << 20
	lostAfter     = 2 // failures in a row, before a host counts as lost (K2: one slow handshake raises no alarm)
)

// links are center's connections to the hosts, one for each host in the
// inventory.
type links struct {
	c *Center

	mu     sync.Mutex // guards what follows
	byHost map[Ref]*link
}

func newLinks(c *Center) *links { return &links{c: c, byHost: map[Ref]*link{}} }

// link is the connection to one host. It calls the host for as long as the host
// is in the inventory.
type link struct {
	c    *Center
	host Ref
	stop context.CancelFunc
	done chan struct{}

	recording sync.Mutex // held while a VM's reported or answered state is recorded: they stay in order

	mu     sync.Mutex // guards what follows
	client hostapi.HostClient
	up     chan struct{}     // closed while there is a client
	events map[string]uint64 // how many the host has sent, by VM; see runtime
	wake   chan struct{}     // asks for a synchronisation of keys
}

// run keeps one link for each host until ctx ends.
func (s *links) run(ctx context.Context) error {
	defer s.closeAll()
	for {
		at := s.c.view.Revision()
		present := map[Ref]bool{}
		for _, ref := range s.c.view.All(inventory.KindHost) {
			present[ref] = true
			s.open(ctx, ref)
		}
		s.mu.Lock()
		var gone []*link
		for ref, l := range s.byHost {
			if !present[ref] {
				gone = append(gone, l)
				delete(s.byHost, ref)
			}
		}
		s.mu.Unlock()
		for _, l := range gone {
			l.stop()
			<-l.done
		}
		for {
			refs, now, gap, err := s.c.view.Changes(ctx, at)
			if err != nil {
				return nil // ctx has ended
			}
			if at = now; gap || anyHost(refs) {
				break
			}
		}
	}
}

func anyHost(refs []Ref) bool {
	for _, r := range refs {
		if r.Kind() == inventory.KindHost {
			return true
		}
	}
	return false
}

func (s *links) open(ctx context.Context, host Ref) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byHost[host] != nil {
		return
	}
	ctx, stop := context.WithCancel(ctx)
	l := &link{c: s.c, host: host, stop: stop, done: make(chan struct{}), up: make(chan struct{}), events: map[string]uint64{}, wake: make(chan struct{}, 1)}
	s.byHost[host] = l
	go func() {
		defer close(l.done)
		l.run(ctx)
	}()
}

func (s *links) closeAll() {
	s.mu.Lock()
	all := s.byHost
	s.byHost = map[Ref]*link{}
	s.mu.Unlock()
	for _, l := range all {
		l.stop()
	}
	for _, l := range all {
		<-l.done
	}
}

func (s *links) of(host Ref) *link {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byHost[host]
}

// connected returns the client of a host that is connected now.
func (s *links) connected(host Ref) (*link, hostapi.HostClient, bool) {
	l := s.of(host)
	if l == nil {
		return nil, nil, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l, l.client, l.client != nil
}

// wait returns the client of a host, once it is connected, or the time is up.
func (s *links) wait(ctx context.Context, host Ref, atMost time.Duration, doing string) (*link, hostapi.HostClient, error) {
	timer := time.NewTimer(atMost)
	defer timer.Stop()
	for {
		var up chan struct{}
		if l := s.of(host); l != nil {
			l.mu.Lock()
			client := l.client
			up = l.up
			l.mu.Unlock()
			if client != nil {
				return l, client, nil
			}
		}
		h, ok := inventory.Lookup[inventory.Host](s.c.view, host)
		if !ok {
			return nil, nil, fault("NotFound", "%s needs host %s, which has been removed", doing, host)
		}
		poll := time.NewTimer(time.Second) // the link itself may not be there yet
		select {
		case <-up:
		case <-poll.C:
		case <-timer.C:
			poll.Stop()
			return nil, nil, hostDown(h, doing)
		case <-ctx.Done():
			poll.Stop()
			return nil, nil, ctx.Err()
		}
		poll.Stop()
	}
}

// run calls the host again and again, ever more slowly while it fails.
func (l *link) run(ctx context.Context) {
	failures, pause := 0, firstRetry
	for ctx.Err() == nil {
		began := l.c.now()
		synced, err := l.session(ctx, func() { failures, pause = 0, firstRetry })
		l.down()
		if ctx.Err() != nil {
			return
		}
		failures++
		if synced {
			l.c.log.Info("connection to host ended", "host", l.host, "after", l.c.now().Sub(began).Round(time.Second), "error", err)
		}
		if failures >= lostAfter {
			l.lost(ctx, err)
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2+1)): // spread, for many hosts fail together
		case <-ctx.Done():
		}
		pause = min(2*pause, lastRetry)
	}
}

// justStarted is the problem of a host that a former process of center was
// connected to, until it answers or is given up.
const justStarted = "center has just started and has not reached it yet"

// unreached marks, when center starts, the hosts that were connected.
func (c *Center) unreached(ctx context.Context) error {
	for _, ref := range c.view.All(inventory.KindHost) {
		err := editIfChanged(ctx, c, c.inv.Hosts, ref, func(h *inventory.Host) {
			if h.Connection == inventory.Connected {
				h.Connection, h.Problem = inventory.NotResponding, justStarted
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// lost records that the host does not answer.
func (l *link) lost(ctx context.Context, err error) {
	_, why := hostapi.AsFault(err)
	news := false
	h, eerr := l.c.inv.EditHost(ctx, l.host, func(h *inventory.Host) error {
		news = h.Connection == inventory.Connected || h.Problem == justStarted
		if !news && h.Problem == why {
			return errSaid
		}
		h.Connection, h.Problem = inventory.NotResponding, why
		return nil
	})
	if eerr != nil || !news {
		return
	}
	l.c.events.Post(ctx, Event{Type: event.HostLost, Severity: event.Warning, Entity: l.host,
		Message: fmt.Sprintf("Host %q does not answer: %s. Its VMs go on; center knows their last state", h.Name, why)})
}

// session is one connection: the host describes itself and reports its VMs;
// then commands may be sent, and keys are synchronised, until it breaks.
func (l *link) session(ctx context.Context, reached func()) (synced bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var helpers sync.WaitGroup
	defer helpers.Wait()
	defer cancel()
	h, ok := inventory.Lookup[inventory.Host](l.c.view, l.host)
	if !ok {
		return false, errors.New("the host has been removed")
	}
	conn, err := l.dial(h)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	client := hostapi.NewHostClient(conn)
	if err := l.describe(ctx, client); err != nil {
		return false, err
	}
	stream, err := client.Watch(ctx, &hostapi.WatchRequest{})
	if err != nil {
		return false, err
	}
	reported := map[string]bool{}
	for {
		ev, err := stream.Recv()
		if err != nil {
			return synced, err
		}
		switch ev.GetKind() {
		case hostapi.HostEvent_VM:
			reported[ev.GetVm().GetUuid()] = true
			l.vmChanged(ctx, ev.GetVm())
		case hostapi.HostEvent_VM_GONE:
			l.vmChanged(ctx, &hostapi.VMRuntime{Uuid: ev.GetVm().GetUuid(), Power: hostapi.PowerState_POWERED_OFF})
		case hostapi.HostEvent_ALARM:
			l.alarm(ctx, ev)
		case hostapi.HostEvent_HOST:
			if ev.GetHost() != nil {
				err = l.apply(ctx, ev.GetHost())
			}
		case hostapi.HostEvent_SYNCED:
			if synced {
				continue
			}
			l.unreported(ctx, reported)
			if err = l.connected(ctx, client); err == nil {
				synced = true
				reached()
				helpers.Go(func() { l.keepKeys(ctx, client) })
				helpers.Go(func() { l.c.settleHost(ctx, l.host) })
				helpers.Go(func() { l.keepDescribed(ctx, client, cancel) })
			}
		}
		if err != nil {
			return synced, err
		}
	}
}

// dial prepares the connection: mutual TLS under center's CA, the host's name
// in its certificate, and the very certificate that the host joined with, so
// that one of before its removal is worth nothing.
func (l *link) dial(h *inventory.Host) (*grpc.ClientConn, error) {
	cfg := l.c.ca.mutual().Client(pki.Identity{Role: pki.RoleHost, Name: h.Name})
	verify := cfg.VerifyConnection
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		if err := verify(s); err != nil {
			return err
		}
		sum := pki.Fingerprint(s.PeerCertificates[0])
		if hex.EncodeToString(sum[:]) != h.CertThumbprint {
			return fmt.Errorf("host %s shows another certificate than the one it joined with: %w", h.Name, pki.ErrUntrusted)
		}
		return nil
	}
	return grpc.NewClient("passthrough:///"+h.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Second, Multiplier: 1, MaxDelay: time.Second}, MinConnectTimeout: answerTime}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 15 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithDisableRetry(), // center repeats with the operation id in hand
	)
}

// describe asks the host what it is.
func (l *link) describe(ctx context.Context, client hostapi.HostClient) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	info, err := client.Describe(ctx, &hostapi.DescribeRequest{})
	if err != nil {
		return err
	}
	return l.apply(ctx, info)
}

// connected lets commands through.
func (l *link) connected(ctx context.Context, client hostapi.HostClient) error {
	l.mu.Lock()
	l.client = client // before the record says so: who reads it may command
	close(l.up)
	l.mu.Unlock()
	news := false
	h, err := l.c.inv.EditHost(ctx, l.host, func(h *inventory.Host) error {
		news = h.Connection != inventory.Connected && h.Problem != justStarted
		h.Connection, h.Problem = inventory.Connected, ""
		return nil
	})
	if err != nil {
		return err
	}
	if news {
		l.c.events.Post(ctx, Event{Type: event.HostConnected, Entity: l.host, Message: fmt.Sprintf("Host %q is connected", h.Name)})
	}
	return nil
}

func (l *link) down() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.client != nil {
		l.client = nil
		l.up = make(chan struct{})
	}
}

// keepDescribed refreshes what changes slowly, such as free space. A host that
// does not answer that any more is called anew.
func (l *link) keepDescribed(ctx context.Context, client hostapi.HostClient, broken context.CancelFunc) {
	tick := time.NewTicker(describeEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err := l.describe(ctx, client); err != nil && ctx.Err() == nil {
			l.c.log.Warn("host does not describe itself", "host", l.host, "error", err)
			broken()
			return
		}
	}
}

func (l *link) alarm(ctx context.Context, ev *hostapi.HostEvent) {
	entity := l.host
	if vm := l.c.vmByUUID(ev.GetVm().GetUuid()); vm != nil && vm.Host == l.host {
		entity = vm.Ref
	}
	l.c.events.Post(ctx, Event{Type: event.HostAlarm, Severity: event.Error, Entity: entity, Message: trim(ev.GetMessage(), 2000)})
}
