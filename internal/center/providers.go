package center

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"mortise/internal/pki"
	"mortise/internal/provider"
	"mortise/internal/secret"
	"mortise/internal/store"
	"mortise/internal/task"
)

// OpenProvider makes the client of a standard key provider. It does not connect.
type OpenProvider func(ProviderConfig) (provider.Provider, error)

// ProviderConfig is what a standard provider's client needs to know.
type ProviderConfig struct {
	ID          string
	Servers     []ProviderServer // those whose certificate was confirmed
	Certificate tls.Certificate  // center's, towards them
}

// ProviderServer is one KMS server.
type ProviderServer struct {
	Name    string
	Address string // host:port
	Pins    [][sha256.Size]byte
}

// providerRecord is a key provider in the store. Private keys are sealed by the
// root key.
type providerRecord struct {
	ID      string         `json:"id"`
	Servers []serverRecord `json:"servers,omitempty"`
	Trusted []string       `json:"trusted,omitempty"` // pins for all servers: SHA-256, hex
	Shared  string         `json:"shared,omitempty"`  // the servers that have proven to share keys (K5)

	Client  *clientRecord `json:"client,omitempty"`  // in use
	Pending *clientRecord `json:"pending,omitempty"` // self-signed, not yet in use
	Request *clientRecord `json:"request,omitempty"` // a CSR that waits for its certificate
}

type serverRecord struct {
	KmipServer
	Trusted []string `json:"trusted,omitempty"`
}

type clientRecord struct {
	PEM []byte `json:"pem"` // certificate chain, or the CSR
	Key []byte `json:"key"` // sealed
}

// defaultRecord says which provider is the default of an entity; the key of the
// global one is "global".
type defaultRecord struct {
	Provider string `json:"provider"`
}

const globalDefault = "global"

// keyTag is kept beside a key at its provider.
type keyTag = provider.Tag

// fetching bounds the calls to key servers at one time, so that a boot herd
// does not melt them.
const fetching = 32

// providers are the configured key providers and their open clients.
type providers struct {
	c        *Center
	records  *store.Collection[providerRecord]
	defaults *store.Collection[defaultRecord]
	slots    chan struct{}

	mu   sync.Mutex // guards open
	open map[string]openProvider
}

type openProvider struct {
	provider.Provider
	revision int64 // of the record that it was made from
}

func openProviders(ctx context.Context, c *Center) (*providers, error) {
	s := &providers{c: c, slots: make(chan struct{}, fetching), open: map[string]openProvider{}}
	var err1, err2 error
	s.records, err1 = store.NewCollection(ctx, c.store, "provider", store.JSON[providerRecord](1))
	s.defaults, err2 = store.NewCollection(ctx, c.store, "default-provider", store.JSON[defaultRecord](1))
	return s, errors.Join(err1, err2)
}

func (s *providers) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.open {
		p.Close()
	}
	s.open = map[string]openProvider{}
}

// get returns the client of a provider as it is configured now. Its error says
// what is missing in the configuration.
func (s *providers) get(ctx context.Context, id string) (provider.Provider, error) {
	e, err := s.record(ctx, id)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p, ok := s.open[id]; ok {
		if p.revision == e.Revision {
			return p, nil
		}
		p.Close()
		delete(s.open, id)
	}
	cfg, err := s.config(e.Value)
	if err != nil {
		return nil, err
	}
	p, err := s.c.cfg.OpenProvider(cfg)
	if err != nil {
		return nil, fault(task.ProviderError, "key provider %q: %v", id, err).Because(err)
	}
	s.open[id] = openProvider{p, e.Revision}
	return p, nil
}

// record reads a provider's record. K6: a provider that is gone is missed by its
// name, and adding it back under that name is the way out.
func (s *providers) record(ctx context.Context, id string) (store.Entry[providerRecord], error) {
	e, err := s.records.Get(ctx, id)
	if id == "" || errors.Is(err, store.ErrNotFound) {
		f := fault(task.ProviderError, "there is no key provider %q; add it under this name", trim(id, 100))
		f.Name = id
		return e, f
	}
	if err != nil {
		return e, storeFault("reading the key provider", err)
	}
	return e, nil
}

// config makes a client's configuration from a record.
func (s *providers) config(r providerRecord) (ProviderConfig, error) {
	cfg := ProviderConfig{ID: r.ID}
	if len(r.Servers) == 0 {
		return cfg, fault(task.ProviderError, "key provider %q has no key server; add one", r.ID)
	}
	for _, server := range r.Servers {
		pins, err := parsePins(append(slices.Clone(server.Trusted), r.Trusted...))
		if err != nil {
			return cfg, fault(task.Internal, "key provider %q: %v", r.ID, err)
		}
		if len(pins) > 0 {
			cfg.Servers = append(cfg.Servers, ProviderServer{Name: server.Name, Address: server.address(), Pins: pins})
		}
	}
	if len(cfg.Servers) == 0 {
		return cfg, fault(task.ProviderError, "key provider %q: no server's certificate is trusted yet; confirm its thumbprint (provider trust)", r.ID)
	}
	if r.Client == nil {
		return cfg, fault(task.ProviderError, "key provider %q: center has no client certificate for it; generate or upload one (provider trust)", r.ID)
	}
	cert, err := s.c.clientCertificate(r.ID, r.Client)
	cfg.Certificate = cert
	return cfg, err
}

func (k KmipServer) address() string {
	return net.JoinHostPort(k.Address, strconv.Itoa(int(k.port())))
}

func (k KmipServer) port() int32 {
	if k.Port == 0 {
		return 5696
	}
	return k.Port
}

func parsePins(list []string) ([][sha256.Size]byte, error) {
	var pins [][sha256.Size]byte
	for _, text := range list {
		b, err := hex.DecodeString(text)
		if err != nil || len(b) != sha256.Size {
			return nil, fmt.Errorf("%.80q is no SHA-256", text)
		}
		if pin := [sha256.Size]byte(b); !slices.Contains(pins, pin) {
			pins = append(pins, pin)
		}
	}
	return pins, nil
}

// clientCertificate opens the sealed key of a client certificate.
func (c *Center) clientCertificate(id string, r *clientRecord) (tls.Certificate, error) {
	chain, err := pki.ParseCertificates(r.PEM)
	if err != nil {
		return tls.Certificate{}, fault(task.InvalidCertificate, "key provider %q: center's client certificate: %v", id, err)
	}
	sealed, err := c.cfg.RootKey.Open(r.Key, clientBinding(id))
	if err != nil {
		return tls.Certificate{}, fault(task.Internal, "key provider %q: opening center's client key: %v", id, err)
	}
	defer sealed.Wipe()
	key, err := pki.ParseKey(sealed)
	if err != nil {
		return tls.Certificate{}, fault(task.Internal, "key provider %q: center's client key: %v", id, err)
	}
	cert := tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, x := range chain {
		cert.Certificate = append(cert.Certificate, x.Raw)
	}
	return cert, nil
}

// clientBinding ties a sealed client key to its provider.
func clientBinding(id string) []byte { return append([]byte("mortise kmip client key\x00"), id...) }

// kek fetches a key; the caller wipes it.
func (s *providers) kek(ctx context.Context, id KeyID) (*secret.Key, error) {
	p, err := s.get(ctx, id.Provider)
	if err != nil {
		return nil, withKey(err, id)
	}
	var k *secret.Key
	err = s.limited(ctx, func(ctx context.Context) (err error) {
		k, _, err = p.KEK(ctx, id.Key)
		return err
	})
	return k, providerFault(id, "fetching", err)
}

// newKEK makes a key and returns its id. Its bytes are fetched again when they
// are sent: by then the id is durable.
func (s *providers) newKEK(ctx context.Context, name, operation string, tags ...keyTag) (KeyID, error) {
	id := KeyID{Provider: name}
	p, err := s.get(ctx, name)
	if err != nil {
		return id, err
	}
	if err := s.proveSharing(ctx, name, p); err != nil {
		return id, err
	}
	err = s.limited(ctx, func(ctx context.Context) error {
		key, kek, err := p.NewKEK(ctx, operation, tags...)
		kek.Wipe()
		id.Key = key
		return err
	})
	return id, providerFault(KeyID{Provider: name}, "making", err)
}

// proveSharing has a provider's servers prove that they share keys, once for
// each set of servers and before a key is made there (K5): a key that only one
// of them has is lost with that one. That a server is away now proves nothing.
func (s *providers) proveSharing(ctx context.Context, name string, p provider.Provider) error {
	e, err := s.record(ctx, name)
	if err != nil {
		return err
	}
	cfg, err := s.config(e.Value)
	if err != nil || len(cfg.Servers) < 2 {
		return err
	}
	set := sha256.New()
	for _, server := range cfg.Servers {
		fmt.Fprintf(set, "%q %q\n", server.Name, server.Address)
	}
	servers := hex.EncodeToString(set.Sum(nil))
	if e.Value.Shared == servers {
		return nil
	}
	err = s.limited(ctx, p.TestSharing)
	if errors.Is(err, provider.ErrNotShared) {
		f := fault(task.ProviderError, "the servers of key provider %q do not share keys: %v. Make them replicate, or put them into providers of their own", name, err)
		f.Name = name
		return f.Because(err)
	}
	if err != nil {
		s.c.log.Info("key servers could not yet prove that they share keys", "provider", name, "error", err)
		return nil
	}
	_, err = s.records.Edit(ctx, name, func(r *providerRecord) error { r.Shared = servers; return nil })
	if err != nil {
		return storeFault("recording that the key servers share keys", err)
	}
	return nil
}

// usableState returns nil for a key that may encrypt (K7: Active, or Pre-Active,
// which is activated when it is fetched).
func (s *providers) usableState(ctx context.Context, id KeyID) error {
	p, err := s.get(ctx, id.Provider)
	if err != nil {
		return withKey(err, id)
	}
	var state provider.State
	err = s.limited(ctx, func(ctx context.Context) (err error) {
		state, err = p.KeyState(ctx, id.Key)
		return err
	})
	if err == nil && !state.Usable() {
		err = &provider.StateError{Provider: id.Provider, KeyID: id.Key, State: state}
	}
	return providerFault(id, "looking up", err)
}

// readBack proves that every server of the provider has the key.
func (s *providers) readBack(ctx context.Context, id KeyID) error {
	p, err := s.get(ctx, id.Provider)
	if err != nil {
		return withKey(err, id)
	}
	k, err := s.kek(ctx, id)
	if err != nil {
		return err
	}
	defer k.Wipe()
	err = s.limited(ctx, func(ctx context.Context) error { return p.ReadBack(ctx, id.Key, k) })
	return providerFault(id, "reading back", err)
}

// limited calls f when few enough other calls are under way.
func (s *providers) limited(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
		return f(ctx)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// providerFault words a provider's error.
func providerFault(id KeyID, doing string, err error) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf("key %s of key provider %q", id.Key, id.Provider)
	if id.Key == "" {
		what = fmt.Sprintf("a key at key provider %q", id.Provider)
	}
	var state *provider.StateError
	var f *Fault
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &state):
		f = fault(task.KeyState, "%s is %s at the key server; only an Active key may be used. Recrypt what it protects from a host that still holds it, or have the key server's administrator restore it", what, state.State)
	case errors.Is(err, provider.ErrNotFound):
		f = fault(task.KeyRequired, "%s is not at the key server; it was destroyed, or the server is another one. Restore the key there, or recrypt from a host that still holds it", what)
		f.MessageKey = "msg.vigor.enc.keyNotFound"
	case errors.Is(err, provider.ErrUnreachable), errors.Is(err, context.DeadlineExceeded):
		f = fault(task.ProviderDown, "%s %s: no server of the provider answers (%s); see the provider's status and the network between center and the key server", doing, what, cause(err, provider.ErrUnreachable))
	case errors.Is(err, provider.ErrUntrusted):
		f = fault(task.ProviderError, "%s %s: %s; compare the thumbprint of the server's certificate and confirm it (provider trust)", doing, what, cause(err, provider.ErrUntrusted))
	case errors.Is(err, provider.ErrRefused):
		f = fault(task.ProviderError, "%s %s: the key server refuses center (%s); register center's client certificate there", doing, what, cause(err, provider.ErrRefused))
	default:
		f = fault(task.ProviderError, "%s %s: %s", doing, what, cause(err, provider.ErrFailed))
	}
	f.Name = id.Provider
	return withKey(f.Because(err), id)
}

// cause is what a provider's error says beyond its kind: the fault says the rest
// in its own words.
func cause(err, kind error) string {
	text := err.Error()
	if _, after, ok := strings.Cut(text, kind.Error()+": "); ok {
		return after
	}
	return text
}

// withKey names the key in a fault about its provider.
func withKey(err error, id KeyID) error {
	var f *Fault
	if errors.As(err, &f) && id.Key != "" && len(f.Keys) == 0 {
		n := *f
		n.Keys = []KeyID{id}
		return n.Because(err)
	}
	return err
}
