// Package providertest is the conformance suite of key providers: what center
// relies on, tried on a real one. Each implementation of provider.Provider runs
// it in its own tests.
//
// Place in the flow: tests only, beside provider. It imports provider and secret.
package providertest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"mortise/internal/provider"
	"mortise/internal/secret"
)

// A Harness runs one provider for the suite. New is required; a nil func means
// that this back end cannot do it, and skips what needs it.
type Harness struct {
	// New makes another provider of the same name over the same keys: what
	// center has after a restart.
	New func(t *testing.T) provider.Provider

	// SetState brings a key into a state, as the key server's administrator
	// does. Forgets says that the server no longer knows keys of that state.
	SetState func(t *testing.T, keyID string, s provider.State) (forgets bool)

	// PreActive makes a key that was never activated.
	PreActive func(t *testing.T) (keyID string)

	// Stop makes all servers unreachable, Start lets them serve again.
	Stop, Start func(t *testing.T)

	// Tags reads a key's tags.
	Tags func(t *testing.T, keyID string) map[string]string

	// UniqueNames: the back end refuses a second key of one name, so that even
	// one operation run twice at once makes one key.
	UniqueNames bool

	// Named is how many keys were ever made for an operation.
	Named func(t *testing.T, operation string) int
}

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	p := h.New(t)
	t.Cleanup(p.Close)
	s := suite{h, p}
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"Identity", s.identity},
		{"NewKEK", s.newKEK},
		{"SameOperationSameKey", s.sameOperation},
		{"ManyAtOnce", s.manyAtOnce},
		{"Tags", s.tags},
		{"PreActiveIsActivated", s.preActive},
		{"StatesForbid", s.states},
		{"RevokedOperation", s.revokedOperation},
		{"UnknownKeys", s.unknownKeys},
		{"ReadBack", s.readBack},
		{"Sharing", s.sharing},
		{"Status", s.status},
		{"Canceled", s.canceled},
		{"Unreachable", s.unreachable},
	} {
		t.Run(test.name, test.run)
	}
}

type suite struct {
	Harness
	p provider.Provider
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// make makes a key under an operation id of its own.
func (s suite) make(t *testing.T) (string, *secret.Key) {
	t.Helper()
	return newKEK(t, s.p, operation(t))
}

func newKEK(t *testing.T, p provider.Provider, operation string, tags ...provider.Tag) (string, *secret.Key) {
	t.Helper()
	id, kek, err := p.NewKEK(within(t), operation, tags...)
	if err != nil {
		t.Fatalf("NewKEK: %v", err)
	}
	t.Cleanup(kek.Wipe)
	if kek.Len() != 32 {
		t.Fatalf("a KEK of %d bytes", kek.Len())
	}
	if id == "" || strings.ContainsAny(id, " \n\"/()") {
		t.Fatalf("key id %q does not fit into a key locator", id)
	}
	return id, kek
}

// operation is unique: key servers outlive a test.
func operation(t *testing.T) string {
	return fmt.Sprintf("op-%s-%d", strings.ReplaceAll(t.Name(), "/", "-"), time.Now().UnixNano())
}

func (s suite) fetch(t *testing.T, p provider.Provider, id string) *secret.Key {
	t.Helper()
	kek, state, err := p.KEK(within(t), id)
	if err != nil {
		t.Fatalf("KEK: %v", err)
	}
	t.Cleanup(kek.Wipe)
	if state != provider.Active {
		t.Errorf("a key that is used is %s", state)
	}
	return kek
}

func (s suite) identity(t *testing.T) {
	if s.p.ID() == "" {
		t.Error("no id")
	}
	if k := s.p.Kind(); k != provider.Standard && k != provider.Native && k != provider.Trusted {
		t.Errorf("kind %q", k)
	}
}

func (s suite) newKEK(t *testing.T) {
	id, kek := s.make(t)
	other, otherKEK := s.make(t)
	if id == other || kek.Equal(otherKEK) {
		t.Error("two operations share a key")
	}
	if !s.fetch(t, s.p, id).Equal(kek) {
		t.Error("KEK returns another key than NewKEK did")
	}
	if state, err := s.p.KeyState(within(t), id); err != nil || state != provider.Active {
		t.Errorf("state %v, %v", state, err)
	}
	again := s.New(t)
	defer again.Close()
	if !s.fetch(t, again, id).Equal(kek) {
		t.Error("after a restart KEK returns another key")
	}
}

func (s suite) sameOperation(t *testing.T) {
	op := operation(t)
	id, kek := newKEK(t, s.p, op)
	again := s.New(t)
	defer again.Close()
	for _, p := range []provider.Provider{s.p, again} {
		id2, kek2 := newKEK(t, p, op)
		if id2 != id || !kek2.Equal(kek) {
			t.Errorf("a repeated operation made key %s beside %s", id2, id)
		}
	}
	if s.Named != nil {
		if n := s.Named(t, op); n != 1 {
			t.Errorf("%d keys for one operation", n)
		}
	}
	if s.UniqueNames { // two centers that resume one task
		op := operation(t)
		ids := make([]string, 4)
		var wg sync.WaitGroup
		for i := range ids {
			wg.Go(func() {
				id, kek, err := s.p.NewKEK(within(t), op)
				if err != nil {
					t.Error(err)
					return
				}
				kek.Wipe()
				ids[i] = id
			})
		}
		wg.Wait()
		for _, id := range ids {
			if id != ids[0] {
				t.Errorf("one operation, at once: keys %v", ids)
				break
			}
		}
	}
	// A longer name is another operation.
	if id3, _ := newKEK(t, s.p, op+"x"); id3 == id {
		t.Error("operations are told apart by a prefix only")
	}
}

func (s suite) manyAtOnce(t *testing.T) {
	op := operation(t)
	ids := make([]string, 12)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			id, kek, err := s.p.NewKEK(within(t), fmt.Sprint(op, "-", i))
			if err != nil {
				t.Error(err)
				return
			}
			defer kek.Wipe()
			ids[i] = id
			again, _, err := s.p.KEK(within(t), id)
			if err != nil {
				t.Error(err)
				return
			}
			defer again.Wipe()
			if !again.Equal(kek) {
				t.Errorf("key %s changed", id)
			}
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	for _, id := range ids {
		if seen[id] {
			t.Errorf("key id %q twice", id)
		}
		seen[id] = true
	}
}

func (s suite) tags(t *testing.T) {
	op := operation(t)
	tag := provider.Tag{Name: "x-Identifier", Value: "host-7"}
	id, _ := newKEK(t, s.p, op, tag) // must succeed whether or not tags can be kept
	newKEK(t, s.p, op, tag, provider.Tag{Name: "x-Component", Value: "host key"})
	if s.Tags == nil {
		t.Skip("this key server keeps no tags")
	}
	tags := s.Tags(t, id)
	for name, want := range map[string]string{"x-Identifier": "host-7", "x-Component": "host key", "x-Vendor": "Mortise", "x-Product": "Mortise center"} {
		if tags[name] != want {
			t.Errorf("tag %s is %q, want %q", name, tags[name], want)
		}
	}
	if tags["x-Product_Version"] == "" {
		t.Error("no version among the tags")
	}
}

func (s suite) preActive(t *testing.T) {
	if s.PreActive == nil {
		t.Skip("this back end has no Pre-Active keys")
	}
	id := s.PreActive(t)
	if state, err := s.p.KeyState(within(t), id); err != nil || state != provider.PreActive {
		t.Fatalf("state %v, %v", state, err)
	}
	var wg sync.WaitGroup
	for range 4 { // who comes second finds it Active
		wg.Go(func() {
			kek, state, err := s.p.KEK(within(t), id)
			if err != nil || state != provider.Active {
				t.Errorf("%v, %v", state, err)
			}
			kek.Wipe()
		})
	}
	wg.Wait()
	if state, err := s.p.KeyState(within(t), id); err != nil || state != provider.Active {
		t.Errorf("state afterwards %v, %v", state, err)
	}
}

func (s suite) states(t *testing.T) {
	if s.SetState == nil {
		t.Skip("keys of this back end have no states to set")
	}
	for _, state := range []provider.State{provider.Deactivated, provider.Compromised, provider.Destroyed, provider.DestroyedCompromised} {
		t.Run(state.String(), func(t *testing.T) {
			id, kek := s.make(t)
			forgets := s.SetState(t, id, state)
			got, reported, err := s.p.KEK(within(t), id)
			if got != nil {
				got.Wipe()
				t.Fatal("the key was fetched")
			}
			if forgets {
				if !errors.Is(err, provider.ErrNotFound) {
					t.Errorf("%v, want ErrNotFound", err)
				}
				return
			}
			var se *provider.StateError
			if !errors.As(err, &se) || se.State != state || se.KeyID != id || se.Provider != s.p.ID() || reported != state {
				t.Errorf("%v (%v), want a StateError of %v", err, reported, state)
			}
			for _, word := range []string{id, s.p.ID(), state.String()} {
				if err != nil && !strings.Contains(err.Error(), word) {
					t.Errorf("%q does not name %s", err, word)
				}
			}
			noKeyBytes(t, err, kek)
			if got, err := s.p.KeyState(within(t), id); err != nil || got != state {
				t.Errorf("KeyState: %v, %v", got, err)
			}
		})
	}
}

// revokedOperation: a resumed task is not given a key that may not be used.
func (s suite) revokedOperation(t *testing.T) {
	if s.SetState == nil {
		t.Skip("keys of this back end have no states to set")
	}
	op := operation(t)
	id, _ := newKEK(t, s.p, op)
	s.SetState(t, id, provider.Deactivated)
	_, kek, err := s.p.NewKEK(within(t), op)
	var se *provider.StateError
	if kek != nil || !errors.As(err, &se) || se.KeyID != id || se.State != provider.Deactivated {
		t.Errorf("%v, want a StateError", err)
	}
}

func (s suite) unknownKeys(t *testing.T) {
	for _, id := range []string{"no-such-key", "999999", "00000000-0000-4000-8000-000000000000"} {
		kek, _, err := s.p.KEK(within(t), id)
		if kek != nil || !errors.Is(err, provider.ErrNotFound) || !strings.Contains(err.Error(), id) || !strings.Contains(err.Error(), s.p.ID()) {
			t.Errorf("KEK(%q): %v", id, err)
		}
		if _, err := s.p.KeyState(within(t), id); !errors.Is(err, provider.ErrNotFound) {
			t.Errorf("KeyState(%q): %v", id, err)
		}
	}
	for _, id := range []string{"", "a\nb", "\x00", strings.Repeat("x", 100_000)} {
		kek, _, err := s.p.KEK(within(t), id)
		if kek != nil || err == nil || len(err.Error()) > 2000 || strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("KEK(%.20q): %.200v", id, err)
		}
	}
	for _, op := range []string{"", "a\nb", strings.Repeat("x", 100_000)} {
		if _, kek, err := s.p.NewKEK(within(t), op); err == nil {
			kek.Wipe()
			t.Errorf("NewKEK(%.20q) succeeded", op)
		}
	}
}

func (s suite) readBack(t *testing.T) {
	id, kek := s.make(t)
	if err := s.p.ReadBack(within(t), id, kek); err != nil {
		t.Error(err)
	}
	_, other := s.make(t)
	if err := s.p.ReadBack(within(t), id, other); !errors.Is(err, provider.ErrNotShared) {
		t.Errorf("another key's bytes: %v", err)
	} else {
		noKeyBytes(t, err, kek)
		noKeyBytes(t, err, other)
	}
	if err := s.p.ReadBack(within(t), "no-such-key", kek); err == nil {
		t.Error("an unknown key was read back")
	}
}

func (s suite) sharing(t *testing.T) {
	if err := s.p.TestSharing(within(t)); err != nil {
		t.Error(err)
	}
}

func (s suite) status(t *testing.T) {
	st := s.p.Status(within(t))
	if !st.Usable() {
		t.Errorf("%+v", st)
	}
	for _, server := range st.Servers {
		if !server.Reachable || !server.ServerTrusted || !server.ClientTrusted || server.Err != nil || server.Name == "" || server.Address == "" ||
			server.Version == "" || len(server.Thumbprint) != 95 || server.Expires.IsZero() || server.ClientCertExpires.IsZero() || server.Latency <= 0 {
			t.Errorf("%+v", server)
		}
	}
}

func (s suite) canceled(t *testing.T) {
	id, _ := s.make(t)
	ctx, cancel := context.WithCancel(within(t))
	cancel()
	if kek, _, err := s.p.KEK(ctx, id); err == nil {
		kek.Wipe()
		t.Error("KEK after its context ended")
	} else if !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
}

// unreachable comes last: the back end goes and returns.
func (s suite) unreachable(t *testing.T) {
	if s.Stop == nil {
		t.Skip("this back end cannot be away")
	}
	op := operation(t)
	id, kek := newKEK(t, s.p, op)
	s.Stop(t)
	if _, _, err := s.p.KEK(within(t), id); !errors.Is(err, provider.ErrUnreachable) {
		t.Errorf("KEK: %v", err)
	}
	if _, _, err := s.p.NewKEK(within(t), op); !errors.Is(err, provider.ErrUnreachable) {
		t.Errorf("NewKEK: %v", err)
	}
	if _, err := s.p.KeyState(within(t), id); !errors.Is(err, provider.ErrUnreachable) {
		t.Errorf("KeyState: %v", err)
	}
	if err := s.p.ReadBack(within(t), id, kek); !errors.Is(err, provider.ErrUnreachable) {
		t.Errorf("ReadBack: %v", err)
	}
	if st := s.p.Status(within(t)); st.Usable() || st.Servers[0].Err == nil {
		t.Errorf("status %+v", st)
	}
	if s.Start == nil {
		return
	}
	s.Start(t)
	if !s.fetch(t, s.p, id).Equal(kek) {
		t.Error("another key after the return")
	}
	if again, _ := newKEK(t, s.p, op); again != id {
		t.Error("another key for the operation after the return")
	}
	if st := s.p.Status(within(t)); !st.Usable() {
		t.Errorf("status after the return %+v", st)
	}
}

func noKeyBytes(t *testing.T, err error, kek *secret.Key) {
	t.Helper()
	kek.Use(func(b []byte) {
		for _, form := range []string{string(b[:8]), fmt.Sprintf("%x", b[:8]), fmt.Sprintf("%X", b[:8]), fmt.Sprint(b[:8])} {
			if strings.Contains(fmt.Sprintf("%v %+v %#v", err, err, err), form) {
				t.Error("key bytes in an error")
			}
		}
	})
}
