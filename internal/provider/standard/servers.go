package standard

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"mortise/internal/kmipc"
	"mortise/internal/provider"
	"mortise/internal/secret"
)

// ReadBack compares kek with what every server has under its id.
func (p *Provider) ReadBack(ctx context.Context, keyID string, kek *secret.Key) error {
	for _, s := range p.client.Servers() {
		if err := p.compare(ctx, s, keyID, kek); err != nil {
			return err
		}
	}
	return nil
}

func (p *Provider) compare(ctx context.Context, s *kmipc.Server, keyID string, kek *secret.Key) error {
	theirs, err := s.Get(ctx, keyID)
	if errors.Is(err, kmipc.ErrNotFound) {
		return fmt.Errorf("key provider %s: key server %s has no key %s: %w", p.id, s.Name(), keyID, provider.ErrNotShared)
	}
	if err != nil {
		return p.wrap("reading back from "+s.Name(), keyID, err)
	}
	defer theirs.Wipe()
	if !theirs.Equal(kek) {
		return fmt.Errorf("key provider %s: key server %s has another key under the id %s: %w", p.id, s.Name(), keyID, provider.ErrNotShared)
	}
	return nil
}

// TestSharing makes a key on each server, reads it back from each, and destroys
// it again where it may: the key was never used, and never activated. With one
// server there is nothing to prove.
func (p *Provider) TestSharing(ctx context.Context) error {
	if len(p.client.Servers()) == 1 {
		return nil
	}
	for _, s := range p.client.Servers() {
		if err := p.testSharing(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

func (p *Provider) testSharing(ctx context.Context, from *kmipc.Server) error {
	var server keys = from // and not the pool
	id, err := server.Create(ctx, "mortise-sharing-test-"+rand.Text())
	if err != nil {
		return p.wrap("testing "+from.Name(), "", err)
	}
	defer func() {
		if err := server.Destroy(ctx, id); err != nil {
			p.log.Info("a test key stays at the key server", "server", from.Name(), "key", id, "error", err)
		}
	}()
	kek, err := server.Get(ctx, id)
	if err != nil {
		return p.wrap("testing "+from.Name(), id, err)
	}
	defer kek.Wipe()
	for deadline := time.Now().Add(p.replication); ; {
		err := p.ReadBack(ctx, id, kek)
		if err == nil {
			return nil
		}
		if !errors.Is(err, provider.ErrNotShared) || time.Now().After(deadline) {
			return fmt.Errorf("a key made on %s: %w", from.Name(), err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("a key made on %s: %w", from.Name(), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Status asks all servers at once.
func (p *Provider) Status(ctx context.Context) provider.Status {
	servers := p.client.Servers()
	st := provider.Status{Servers: make([]provider.ServerStatus, len(servers))}
	var wg sync.WaitGroup
	for i, s := range servers {
		wg.Go(func() { st.Servers[i] = serverStatus(s.Status(ctx)) })
	}
	wg.Wait()
	return st
}

func serverStatus(s kmipc.Status) provider.ServerStatus {
	st := provider.ServerStatus{
		Name: s.Server, Address: s.Address, Reachable: s.Reachable, Err: s.Err,
		ServerTrusted: s.Err == nil || errors.Is(s.Err, kmipc.ErrRefused),
		ClientTrusted: s.Err == nil,
		Latency:       s.Latency, Vendor: s.Vendor,
		Thumbprint: s.Thumbprint(), ClientCertExpires: s.ClientExpires,
	}
	if s.Version != "" {
		st.Version = "KMIP " + s.Version
	}
	if s.Certificate != nil {
		st.Expires = s.Certificate.NotAfter
	}
	return st
}
