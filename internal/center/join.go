package center

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
	"mortise/internal/pki"
	"mortise/internal/store"
	"mortise/internal/task"
)

const (
	tokenLife    = time.Hour
	maxTokenLife = 7 * 24 * time.Hour
)

// CreateJoinToken makes a token with which one machine can join as the host
// called name. ttl 0 means an hour. The text is a secret until it is used;
// center keeps its hash only.
func (c *Center) CreateJoinToken(ctx context.Context, p Principal, name string, ttl time.Duration) (string, error) {
	if err := c.Check(p, authz.HostAddToCluster, inventory.DefaultCluster); err != nil {
		return "", err
	}
	if ttl == 0 {
		ttl = tokenLife
	}
	if ttl < time.Minute || ttl > maxTokenLife {
		return "", invalid("ttl", "a join token lives for a minute to %v, not %v", maxTokenLife, ttl)
	}
	id := pki.Identity{Role: pki.RoleHost, Name: name}
	if err := id.Check(); err != nil {
		return "", invalid("name", "%v", err)
	}
	if owner, taken, err := c.inv.Owner(ctx, inventory.ClaimName(inventory.DefaultCluster, name)); err != nil {
		return "", storeFault("looking for the host's name", err)
	} else if taken {
		f := fault(task.DuplicateName, "a host %q is in the inventory already; remove it first, or choose another name", name)
		f.Object, f.Name = owner, name
		return "", f
	}
	token, err := pki.NewJoinToken(id, c.ca.Certificate(), ttl, c.now())
	if err != nil {
		return "", err
	}
	record := token.Record()
	ops := append(c.expiredTokens(ctx), c.tokens.Create(tokenKey(record.SecretHash), record))
	if _, err := c.store.Commit(ctx, ops...); err != nil {
		return "", storeFault("writing down the join token", err)
	}
	c.events.Post(ctx, Event{Type: event.JoinTokenCreated, User: p.User, Entity: inventory.DefaultCluster,
		Message: fmt.Sprintf("A token for the host %q was made; it ends at %s", name, token.Expires.Format(time.RFC3339))})
	return token.Text(), nil
}

func tokenKey(hash []byte) string { return hex.EncodeToString(hash) }

// expiredTokens deletes some of the tokens that are over.
func (c *Center) expiredTokens(ctx context.Context) (ops []store.Op) {
	list, _ := c.tokens.List(ctx, "")
	for _, e := range list {
		if c.now().After(e.Value.Expires.Add(time.Hour)) && len(ops) < 100 {
			ops = append(ops, c.tokens.Delete(e.Key, e.Revision))
		}
	}
	return ops
}

// ServeJoin answers joining hosts on l until ctx ends.
func (c *Center) ServeJoin(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(pki.HTTPSServer(c.ca.own))),
		grpc.MaxRecvMsgSize(64<<10), grpc.MaxConcurrentStreams(4), grpc.ConnectionTimeout(10*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 30 * time.Second, MaxConnectionAge: time.Minute}),
	)
	hostapi.RegisterJoinServer(s, &joinServer{c: c})
	defer context.AfterFunc(ctx, s.Stop)()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("center: serving joins: %w", err)
	}
	return nil
}

type joinServer struct {
	hostapi.UnimplementedJoinServer
	c *Center
}

// Join certifies a new host's key and brings the host into the inventory. What
// it answers to a stranger says no more than that the token is no good.
func (s *joinServer) Join(ctx context.Context, r *hostapi.JoinRequest) (*hostapi.JoinReply, error) {
	reply, err := s.c.join(ctx, r)
	if err == nil {
		return reply, nil
	}
	from := ""
	if p, ok := peer.FromContext(ctx); ok {
		from = p.Addr.String()
	}
	s.c.log.Warn("a host could not join", "name", trim(r.GetName(), 80), "from", from, "error", err)
	switch {
	case errors.Is(err, pki.ErrTokenExpired), errors.Is(err, pki.ErrTokenSpent):
		return nil, status.Error(codes.PermissionDenied, err.Error()) // the sender had the secret
	case errors.Is(err, pki.ErrTokenRefused):
		return nil, status.Error(codes.PermissionDenied, "the join token is not known here, or not for this name; make a new one on center")
	case errors.As(err, new(*Fault)):
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return nil, status.Error(codes.Internal, "center could not complete the join; its log has the details")
}

func (c *Center) join(ctx context.Context, r *hostapi.JoinRequest) (*hostapi.JoinReply, error) {
	csr, err := x509.ParseCertificateRequest(r.GetCsr())
	if err != nil {
		return nil, fmt.Errorf("%w: its certificate request is malformed", pki.ErrTokenRefused)
	}
	address, err := joinAddress(ctx, r.GetAddress())
	if err != nil {
		return nil, err
	}
	key := tokenKey(pki.HashJoinSecret(r.GetTokenSecret()))
	e, err := c.tokens.Get(ctx, key)
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("%w: unknown secret", pki.ErrTokenRefused)
	}
	if err != nil {
		return nil, err
	}
	token := e.Value
	again := token.SpentBy != nil
	if err := token.Spend(r.TokenSecret, r.Name, csr, c.now()); err != nil {
		return nil, err
	}
	cert, err := c.ca.Issue(csr, pki.Grant{Identity: token.ID, Server: true, Life: hostLife}, c.now())
	if err != nil {
		return nil, err
	}
	host, err := c.joined(ctx, token, again, address, cert, c.tokens.Update(key, e.Revision, token))
	if err != nil {
		return nil, err
	}
	return &hostapi.JoinReply{Certificate: cert.Raw, CaCertificate: c.ca.Certificate().Raw, HostId: string(host)}, nil
}

// joined writes the host's record, and that the token is spent, together. A
// host whose answer was lost joins again: it has its record, and now pins the
// newer certificate.
func (c *Center) joined(ctx context.Context, token pki.JoinRecord, again bool, address string, cert *x509.Certificate, spend store.Op) (Ref, error) {
	sum := pki.Fingerprint(cert)
	thumb := hex.EncodeToString(sum[:])
	claim := inventory.ClaimName(inventory.DefaultCluster, token.ID.Name)
	if owner, taken, err := c.inv.Owner(ctx, claim); err != nil {
		return "", err
	} else if taken && !again {
		return "", fault(task.DuplicateName, "a host %q is in the inventory already", token.ID.Name)
	} else if taken {
		e, err := c.inv.Hosts.Get(ctx, string(owner))
		if err != nil {
			return "", err
		}
		e.Value.Address, e.Value.CertThumbprint = address, thumb
		return owner, c.inv.Commit(ctx, spend, c.inv.Hosts.Update(e.Key, e.Revision, e.Value))
	}
	ref, err := c.inv.NextRef(ctx, "host")
	if err != nil {
		return "", err
	}
	err = c.inv.Commit(ctx, spend, c.inv.Take(claim, ref), c.inv.Hosts.Create(string(ref), inventory.Host{
		Entity:  inventory.Entity{Ref: ref, Name: token.ID.Name, Parent: inventory.DefaultCluster},
		Address: address, Connection: inventory.NotResponding, CryptoState: inventory.HostIncapable,
		CertThumbprint: thumb, JoinedAt: c.now().UTC(),
	}))
	if err != nil {
		return "", err
	}
	c.events.Post(ctx, Event{Type: event.HostJoined, Entity: ref, Message: fmt.Sprintf("Host %q (%s) has joined", token.ID.Name, address)})
	return ref, nil
}

// joinAddress checks where a host says it listens; "every address" becomes the
// one that it called from.
func joinAddress(ctx context.Context, address string) (string, error) {
	host, port, err := net.SplitHostPort(address)
	n, perr := strconv.Atoi(port)
	if err != nil || perr != nil || n < 1 || n > 65535 || len(host) > 255 {
		return "", invalid("address", "%.300q is not host:port", address)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		p, ok := peer.FromContext(ctx)
		if !ok {
			return "", invalid("address", "the host must say at which address it listens")
		}
		if host, _, err = net.SplitHostPort(p.Addr.String()); err != nil {
			return "", invalid("address", "the host must say at which address it listens")
		}
	}
	return net.JoinHostPort(host, port), nil
}
