package host

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"mortise/internal/atomicfile"
	"mortise/internal/hostapi"
	"mortise/internal/pki"
)

// A host's state folder holds who it is, and nothing else.
const (
	identityFile = "host.pem"  // certificate chain and key, 0600
	caFile       = "ca.pem"    // the CA of center and its hosts
	uuidFile     = "host.uuid" // made once
)

// Membership is what makes a machine a host of one center.
type Membership struct {
	Name        string
	Credentials *pki.Credentials
	CA          *x509.Certificate
}

// LoadMembership reads what Join left in the state folder. The error is
// fs.ErrNotExist when this machine has not joined.
func LoadMembership(dir string) (*Membership, error) {
	creds, err := pki.LoadCredentials(filepath.Join(dir, identityFile), filepath.Join(dir, identityFile))
	if err != nil {
		return nil, err
	}
	cas, err := pki.LoadCertificates(filepath.Join(dir, caFile))
	if err != nil {
		return nil, err
	}
	id, err := pki.IdentityOf(creds.Leaf())
	if err != nil || id.Role != pki.RoleHost {
		return nil, fmt.Errorf("%s is not a host's certificate: join again with a new token", filepath.Join(dir, identityFile))
	}
	return &Membership{Name: id.Name, Credentials: creds, CA: cas[0]}, nil
}

// Join has this machine's key certified by the center at centerAddr, host:port,
// with a token that its administrator made. listenAddr is where center will find
// this host. The key is written before the call, so that a join whose answer was
// lost can be repeated with the same token.
func Join(ctx context.Context, dir, centerAddr, listenAddr, tokenText string) (*Membership, error) {
	token, err := pki.ParseJoinToken(tokenText)
	if err != nil {
		return nil, err
	}
	if token.ID.Role != pki.RoleHost {
		return nil, fmt.Errorf("the token is for a %s, not for a host", token.ID.Role)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := pki.LoadOrMakeKey(filepath.Join(dir, "join-key.pem"))
	if err != nil {
		return nil, err
	}
	csr, err := pki.NewCSR(key, token.ID.Name)
	if err != nil {
		return nil, err
	}
	center := pki.Identity{Role: pki.RoleCenter, Name: pki.CenterName}
	conn, err := grpc.NewClient("passthrough:///"+centerAddr, grpc.WithTransportCredentials(credentials.NewTLS(pki.JoinClient(token.CA, center, nil))))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	reply, err := hostapi.NewJoinClient(conn).Join(ctx, &hostapi.JoinRequest{
		TokenSecret: token.Secret(), Name: token.ID.Name, Address: listenAddr, Csr: csr,
	})
	if err != nil {
		_, text := hostapi.AsFault(err)
		return nil, fmt.Errorf("joining the center at %s: %s", centerAddr, text)
	}
	cert, err := x509.ParseCertificate(reply.Certificate)
	if err != nil {
		return nil, fmt.Errorf("center's answer: %w", err)
	}
	ca, err := x509.ParseCertificate(reply.CaCertificate)
	if err != nil {
		return nil, fmt.Errorf("center's answer: %w", err)
	}
	if pki.Fingerprint(ca) != token.CA {
		return nil, errors.New("center's answer names another CA than the token: nothing was saved")
	}
	if err := pki.SaveCertificates(filepath.Join(dir, caFile), ca); err != nil {
		return nil, err
	}
	if err := pki.SaveKeyPair(filepath.Join(dir, identityFile), []*x509.Certificate{cert, ca}, key); err != nil {
		return nil, err
	}
	_ = os.Remove(filepath.Join(dir, "join-key.pem"))
	return LoadMembership(dir)
}

// UUID is this host's own, made at the first call.
func UUID(dir string) (string, error) {
	name := filepath.Join(dir, uuidFile)
	text, err := os.ReadFile(name)
	if err == nil {
		u := strings.TrimSpace(string(text))
		if _, err := parseUUID(u); err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		return u, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	u := newUUID()
	return u, atomicfile.Write(name, []byte(u+"\n"), 0o644)
}

// maxMessage bounds a message from center: an import chunk has up to 1 MiB of
// data.
const maxMessage = 4 << 20

// Serve answers center on the listener until ctx ends. Only center's certificate
// of the host's CA is let in.
func Serve(ctx context.Context, l net.Listener, m *Membership, a *Agent) error {
	tls := pki.Mutual{Credentials: m.Credentials, CAs: []*x509.Certificate{m.CA}}.Server(
		func(id pki.Identity, _ *x509.Certificate) error {
			if id.Role != pki.RoleCenter {
				return fmt.Errorf("%s may not command a host", id)
			}
			return nil
		})
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(tls)), grpc.MaxRecvMsgSize(maxMessage),
		grpc.ConnectionTimeout(20*time.Second),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}))
	Register(s, a)
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}
