package ha

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/ovh/kmip-go"

	"mortise/internal/kmipc"
)

// The life of one key as clients see it (KMIP 1.4 §3.22), as far as the load
// drives it. A key begins Pre-Active, with its acknowledged Create.
type op struct {
	key  string
	what action
}

type action int

const (
	activate action = iota
	revoke
	destroy
	look
)

func (a action) String() string { return [...]string{"activate", "revoke", "destroy", "look"}[a] }

// outcome is what a client was told.
type outcome struct {
	state   kmip.State // of a look
	refused bool       // the key's state does not allow it
	unknown bool       // no answer: it may have happened, then or later
}

// step says whether a key in a state may behave so, and what its state is then.
func step(state, input, output any) (bool, any) {
	s, in, out := state.(kmip.State), input.(op), output.(outcome)
	after, allowed := s, false
	switch in.what {
	case activate:
		after, allowed = kmip.StateActive, s == kmip.StatePreActive
	case revoke:
		after, allowed = kmip.StateDeactivated, s == kmip.StateActive
	case destroy:
		after, allowed = kmip.StateDestroyed, s == kmip.StatePreActive || s == kmip.StateDeactivated
	case look:
		return out.state == s, s
	}
	switch {
	case out.unknown && allowed: // if it never happened, it stands at the very end
		return true, after
	case out.unknown:
		return true, s
	case out.refused:
		return !allowed, s
	}
	return allowed, after
}

var model = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string][]porcupine.Operation{}
		for _, o := range history {
			byKey[o.Input.(op).key] = append(byKey[o.Input.(op).key], o)
		}
		var parts [][]porcupine.Operation
		for _, p := range byKey {
			parts = append(parts, p)
		}
		return parts
	},
	Init:  func() any { return kmip.StatePreActive },
	Step:  step,
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(input, output any) string {
		return fmt.Sprintf("%v → %+v", input, output)
	},
}

// load is clients at work, and what they were told.
type load struct {
	g       *group
	ctx     context.Context
	stop    context.CancelFunc
	wg      sync.WaitGroup
	start   time.Time
	clients atomic.Pointer[kmipc.Client]

	mu       sync.Mutex
	history  []porcupine.Operation
	created  []string        // acknowledged
	revoked  map[string]bool // acknowledged
	open     []string        // keys to work on
	acks     []ack           // of creates, in order
	failures map[string]int  // reads and writes that failed, by error kind
}

type ack struct{ began, ended time.Time }

const never = int64(1) << 62

func begin(g *group, workers int) *load {
	l := &load{g: g, start: time.Now(), revoked: map[string]bool{}, failures: map[string]int{}}
	l.ctx, l.stop = context.WithCancel(g.t.Context())
	l.clients.Store(g.client)
	for i := range workers {
		l.wg.Go(func() { l.work(i) })
	}
	// One for each member asks only for new keys, without waiting long: they show
	// when writes are back.
	for i := range 3 {
		l.wg.Go(func() { l.probe(i) })
	}
	return l
}

// create makes a key at a server and enters it once it is acknowledged.
func (l *load) create(server *kmipc.Server, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(l.ctx, wait)
	defer cancel()
	began := time.Now()
	id, err := server.Create(ctx, fmt.Sprintf("ha-%d", rand.Uint64()))
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.created = append(l.created, id)
	l.open = append(l.open, id)
	l.acks = append(l.acks, ack{began, time.Now()})
	return nil
}

func (l *load) probe(i int) {
	for l.ctx.Err() == nil {
		_ = l.create(l.clients.Load().Servers()[i], time.Second) // its failures are the outage
		time.Sleep(30 * time.Millisecond)
	}
}

func (l *load) work(client int) {
	for l.ctx.Err() == nil {
		servers := l.clients.Load().Servers()
		server := servers[rand.IntN(len(servers))]
		l.mu.Lock()
		var key string
		if len(l.open) > 0 {
			key = l.open[max(0, len(l.open)-1-rand.IntN(24))] // recent keys: clients meet at them
		}
		l.mu.Unlock()
		dice := rand.IntN(10)
		if key == "" || dice == 0 {
			if l.create(server, 3*time.Second) != nil {
				time.Sleep(20 * time.Millisecond)
			}
			continue
		}
		what := look
		switch {
		case dice == 1:
			what = destroy
		case dice <= 3:
			what = revoke
		case dice <= 5:
			what = activate
		}
		if !l.do(client, server, op{key, what}) {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// do runs one operation and enters what the client was told.
func (l *load) do(client int, server *kmipc.Server, o op) (answered bool) {
	ctx, cancel := context.WithTimeout(l.ctx, 3*time.Second)
	defer cancel()
	call := time.Since(l.start).Nanoseconds()
	var out outcome
	var err error
	switch o.what {
	case activate:
		err = server.Activate(ctx, o.key)
	case revoke:
		err = server.Revoke(ctx, o.key, false)
	case destroy:
		err = server.Destroy(ctx, o.key)
	case look:
		var a kmipc.Attributes
		a, err = server.GetAttributes(ctx, o.key, "State")
		out.state = a.State
	}
	returned := time.Since(l.start).Nanoseconds()
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		if o.what == revoke {
			l.revoked[o.key] = true
		}
	case errors.Is(err, kmipc.ErrDenied):
		out.refused = true
	case errors.Is(err, kmipc.ErrNotFound): // every key in the load was acknowledged
		l.g.t.Errorf("%s of %s at %s: an acknowledged key is not there: %v", o.what, o.key, server.Name(), err)
		return true
	case errors.Is(err, kmipc.ErrFailed) && !strings.Contains(err.Error(), "is full") && !strings.Contains(err.Error(), "cannot write its audit log"): // a lost leader is not to be answered
		l.g.t.Errorf("%s of %s at %s: %v", o.what, o.key, server.Name(), err)
		fallthrough
	default:
		l.failures[kindOf(err)]++
		if o.what == look || errors.Is(err, kmipc.ErrUnreachable) {
			return false // it did not happen, or changes nothing
		}
		out.unknown, returned = true, never
	}
	if out.refused && o.what == look {
		return true
	}
	l.history = append(l.history, porcupine.Operation{ClientId: client, Input: o, Call: call, Output: out, Return: returned})
	return !out.unknown
}

func kindOf(err error) string {
	for _, k := range []error{kmipc.ErrUnreachable, kmipc.ErrOutcomeUnknown, kmipc.ErrFailed, kmipc.ErrProtocol, kmipc.ErrRefused} {
		if errors.Is(err, k) {
			return k.Error()
		}
	}
	return err.Error()
}

// back is how long after from the first write was acknowledged that began after
// it: how long writes were away.
func (l *load) back(from time.Time) (time.Duration, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range l.acks {
		if a.began.After(from) {
			return a.ended.Sub(from), true
		}
	}
	return 0, false
}

// end stops the load and checks it: linearizable, nothing acknowledged lost, and
// nothing revoked served as Active by any member.
func (l *load) end(t *testing.T) {
	t.Helper()
	l.stop()
	l.wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	unknown := 0
	for _, o := range l.history {
		if o.Output.(outcome).unknown {
			unknown++
		}
	}
	began := time.Now()
	result, info := porcupine.CheckOperationsVerbose(model, l.history, 60*time.Second)
	t.Logf("HA operations=%d creates=%d revokes=%d unknown=%d linearizable=%s checked_in=%v failures=%v",
		len(l.history), len(l.created), len(l.revoked), unknown, result, time.Since(began).Round(time.Millisecond), l.failures)
	if result != porcupine.Ok {
		path := t.ArtifactDir() + "/history.html"
		_ = porcupine.VisualizePath(model, info, path)
		t.Errorf("what clients were told is not linearizable (%s); see %s", result, path)
	}
	if len(l.created) < 100 || len(l.revoked) < 10 {
		t.Errorf("the load did too little: %d creates, %d revokes", len(l.created), len(l.revoked))
	}
	lost, wrong := 0, 0
	servers := l.clients.Load().Servers()
	var wg sync.WaitGroup
	var mu sync.Mutex
	slots := make(chan struct{}, 8)
	for i, id := range l.created {
		for j, server := range servers {
			if !l.revoked[id] && j != i%len(servers) {
				continue // a revoked one is asked for at every member
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				a, err := server.GetAttributes(ctx, id, "State")
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					lost++
					t.Logf("key %s at %s: %v", id, server.Name(), err)
				} else if l.revoked[id] && (a.State == kmip.StateActive || a.State == kmip.StatePreActive) {
					wrong++
				}
			})
		}
	}
	wg.Wait()
	t.Logf("HA acknowledged=%d lost=%d revoked=%d revived=%d", len(l.created), lost, len(l.revoked), wrong)
	if lost > 0 || wrong > 0 {
		t.Errorf("%d acknowledged keys are lost, %d acknowledged revokes do not hold", lost, wrong)
	}
}
