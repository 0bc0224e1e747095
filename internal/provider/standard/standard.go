// Package standard is the standard key provider: KEKs live on KMIP servers
// (K2), of which there may be several that share keys (K5).
//
// Place in the flow: level 2; center gets one from cmd, behind the contract of
// provider. It imports provider, kmipc and secret.
package standard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kmipc"
	"mortise/internal/provider"
	"mortise/internal/secret"
)

// keys is what a KMIP server does for us, and what any of several does.
type keys interface {
	Create(ctx context.Context, name string) (id string, err error)
	Locate(ctx context.Context, name string, max int) ([]string, error)
	Get(ctx context.Context, id string) (*secret.Key, error)
	GetAttributes(ctx context.Context, id string, names ...string) (kmipc.Attributes, error)
	AddAttribute(ctx context.Context, id, name, value string) error
	Activate(ctx context.Context, id string) error
	Destroy(ctx context.Context, id string) error
}

// Config describes a standard provider.
type Config struct {
	ID      string // the provider's name
	Version string // of Mortise; keys are tagged with it
	KMIP    kmipc.Config
	Log     *slog.Logger
}

// Provider is a standard key provider.
type Provider struct {
	id     string
	tags   []provider.Tag
	client *kmipc.Client
	pool   keys // the client: the first server that answers
	log    *slog.Logger

	replication time.Duration // how long a key may take from one server to the others
}

var _ provider.Provider = (*Provider)(nil)

// New makes a provider of KMIP servers. It does not connect.
func New(cfg Config) (*Provider, error) {
	if cfg.ID == "" {
		return nil, errors.New("standard: a key provider needs a name")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.KMIP.Log == nil {
		cfg.KMIP.Log = cfg.Log.With("provider", cfg.ID)
	}
	client, err := kmipc.New(cfg.KMIP)
	if err != nil {
		return nil, fmt.Errorf("key provider %s: %w", cfg.ID, err)
	}
	return &Provider{
		id: cfg.ID, client: client, pool: client, log: cfg.Log.With("provider", cfg.ID), replication: 10 * time.Second,
		// The names are those that vCenter uses.
		tags: []provider.Tag{{Name: "x-Vendor", Value: "Mortise"}, {Name: "x-Product", Value: "Mortise center"}, {Name: "x-Product_Version", Value: cfg.Version}},
	}, nil
}

// ID is the provider's name.
func (p *Provider) ID() string { return p.id }

// Kind is provider.Standard.
func (p *Provider) Kind() provider.Kind { return provider.Standard }

// Close closes idle connections.
func (p *Provider) Close() { p.client.Close() }

// maxSameName is how many keys of one operation are looked at. One is usual;
// an answer lost between two servers may make a second.
const maxSameName = 16

// NewKEK makes a key whose Name is the operation, unless there is one already,
// then tags and activates it.
func (p *Provider) NewKEK(ctx context.Context, operation string, tags ...provider.Tag) (string, *secret.Key, error) {
	id, isNew, err := p.locateOrCreate(ctx, operation)
	if err != nil {
		return "", nil, p.wrap("making a key", "", err)
	}
	p.tag(ctx, id, isNew, append(slices.Clip(p.tags), tags...))
	kek, _, err := p.KEK(ctx, id)
	if err != nil {
		return "", nil, err
	}
	return id, kek, nil
}

// locateOrCreate finds the key that an earlier try of the operation made, or
// makes it. Create is never repeated blindly: when its answer is lost, or the
// name is taken because somebody else was faster, the key is looked for again.
func (p *Provider) locateOrCreate(ctx context.Context, operation string) (id string, isNew bool, err error) {
	for try := 1; ; try++ {
		id, err = p.locate(ctx, operation)
		if err != nil || id != "" {
			return id, false, err
		}
		id, err = p.pool.Create(ctx, operation)
		lookAgain := errors.Is(err, kmipc.ErrOutcomeUnknown) || errors.Is(err, kmipc.ErrFailed)
		if err == nil || !lookAgain || try == 2 || ctx.Err() != nil {
			return id, true, err
		}
		p.log.Info("looking for a key whose creation was not confirmed", "operation", operation, "error", err)
	}
}

// locate finds the usable key of an operation; "" if none was made. What a
// server locates is checked: some ignore filters that they do not know. Of
// several keys every caller picks the same. A key that was revoked meanwhile is
// an error: whoever revoked it did not mean another to be made in its place.
func (p *Provider) locate(ctx context.Context, operation string) (string, error) {
	ids, err := p.pool.Locate(ctx, operation, maxSameName)
	if err != nil {
		return "", err
	}
	slices.Sort(ids)
	var unusable error
	for _, id := range ids {
		a, err := p.pool.GetAttributes(ctx, id, "Name", "State")
		if errors.Is(err, kmipc.ErrNotFound) {
			continue
		}
		if err != nil {
			return "", err
		}
		if !slices.Contains(a.Names, operation) {
			continue
		}
		if state := stateOf(a); state.Usable() {
			return id, nil
		} else if unusable == nil {
			unusable = &provider.StateError{Provider: p.id, KeyID: id, State: state}
		}
	}
	return "", unusable
}

// tag adds the tags that a key lacks. Not every server can keep them, and
// nothing depends on them.
func (p *Provider) tag(ctx context.Context, id string, isNew bool, tags []provider.Tag) {
	have := map[string]string{}
	if !isNew { // an earlier try may have stopped midway; adding a tag twice would double it
		names := make([]string, len(tags))
		for i, t := range tags {
			names[i] = t.Name
		}
		if a, err := p.pool.GetAttributes(ctx, id, names...); err == nil {
			have = a.Text
		}
	}
	for _, t := range tags {
		if _, done := have[t.Name]; done || t.Value == "" {
			continue
		}
		if err := p.pool.AddAttribute(ctx, id, t.Name, t.Value); err != nil {
			p.log.Info("key server does not keep tags", "key", id, "tag", t.Name, "error", err)
			return
		}
	}
}

// KEK checks the state before it fetches, so that a key that may not be used
// does not leave the server (K7).
func (p *Provider) KEK(ctx context.Context, keyID string) (*secret.Key, provider.State, error) {
	state, err := p.KeyState(ctx, keyID)
	if err != nil {
		return nil, state, err
	}
	if state == provider.PreActive {
		// Somebody else may be doing the same: what counts is the state after.
		activateErr := p.pool.Activate(ctx, keyID)
		if state, err = p.KeyState(ctx, keyID); err != nil {
			return nil, state, err
		}
		if state == provider.PreActive {
			return nil, state, p.wrap("activating", keyID, errors.Join(errNotActivated, activateErr))
		}
	}
	if state != provider.Active {
		return nil, state, &provider.StateError{Provider: p.id, KeyID: keyID, State: state}
	}
	kek, err := p.pool.Get(ctx, keyID)
	if err != nil {
		return nil, state, p.wrap("fetching", keyID, err)
	}
	return kek, state, nil
}

var errNotActivated = errors.New("the key stays Pre-Active")

// KeyState asks for the State attribute.
func (p *Provider) KeyState(ctx context.Context, keyID string) (provider.State, error) {
	a, err := p.pool.GetAttributes(ctx, keyID, "State")
	if err != nil {
		return 0, p.wrap("looking up the state of", keyID, err)
	}
	state := stateOf(a)
	if state < provider.PreActive || state > provider.DestroyedCompromised {
		return 0, p.wrap("looking up the state of", keyID, fmt.Errorf("%w: no known state", kmipc.ErrProtocol))
	}
	return state, nil
}

// stateOf relies on provider's states having KMIP's numbers (KMIP 1.4 §9.1.3.2.18).
func stateOf(a kmipc.Attributes) provider.State { return provider.State(a.State) }

// Compile-time check of that.
var _ = [1]struct{}{}[provider.DestroyedCompromised-provider.State(kmip.StateDestroyedCompromised)]

// wrap says what failed, and sorts KMIP's errors into the contract's.
func (p *Provider) wrap(doing, keyID string, err error) error {
	var state *provider.StateError
	if errors.As(err, &state) {
		return err
	}
	kind := provider.ErrFailed
	for _, c := range []struct{ is, kind error }{
		{kmipc.ErrNotFound, provider.ErrNotFound}, // by one server, whatever became of the others
		{kmipc.ErrDenied, provider.ErrRefused},
		{kmipc.ErrRefused, provider.ErrRefused},
		{kmipc.ErrCertificateChanged, provider.ErrUntrusted},
		{kmipc.ErrUnreachable, provider.ErrUnreachable},
		{kmipc.ErrOutcomeUnknown, provider.ErrUnreachable},
	} {
		if errors.Is(err, c.is) {
			kind = c.kind
			break
		}
	}
	if keyID != "" {
		doing += fmt.Sprintf(" key %.100q", keyID)
	}
	return fmt.Errorf("key provider %s: %s: %w: %w", p.id, doing, kind, err)
}
