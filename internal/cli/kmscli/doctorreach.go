package kmscli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// probeTimeout is for one endpoint.
const probeTimeout = 3 * time.Second

// certificateWarning is how long before its end doctor speaks of a server's
// certificate.
const certificateWarning = 30 * 24 * time.Hour

// examineEndpoints looks at every address that clients are told, as a client
// does: does it answer, and with the certificate that clients are told to trust?
// Where something stands between, a balancer or a firewall, that is what it shows.
func examineEndpoints(ctx context.Context, instances []kms.Instance, now time.Time, add adder) {
	const check = "endpoints"
	members := map[string]string{} // by thumbprint
	for _, i := range instances {
		for _, e := range i.Endpoints {
			members[e.Thumbprint] = e.Member
		}
	}
	seen := map[string]bool{} // address and thumbprint
	answered, bad := 0, false
	for _, i := range instances {
		if i.State != kms.InstanceServing {
			continue
		}
		for _, e := range i.Endpoints {
			at := net.JoinHostPort(e.Host, strconv.Itoa(e.Port))
			if seen[at+e.Thumbprint] {
				continue
			}
			seen[at+e.Thumbprint] = true
			leaf, err := certificateAt(ctx, at, e)
			if err != nil {
				bad = true
				add(check, unknown, "if clients reach it there, all is well; if not, open the way, or say with mortise kms serve --advertise how they do",
					"%s (member %s) does not answer here: %v", at, e.Member, err)
				continue
			}
			got := pki.Thumbprint(leaf)
			other, ours := members[got]
			switch {
			case got != e.Thumbprint && ours:
				bad = true
				add(check, advice, "give all members that share an address one certificate: --tls-cert and --tls-key",
					"member %s is advertised at %s, where %s answers with a certificate of its own: clients that trust one do not trust the other", e.Member, at, other)
				continue
			case got != e.Thumbprint:
				bad = true
				add(check, problem, "what stands between must pass TLS through; or another server has this address", "%s (member %s) shows a certificate that is no member's: %s", at, e.Member, got)
				continue
			}
			if err := leaf.VerifyHostname(e.Host); err != nil {
				bad = true
				add(check, advice, "vCenter, which trusts the thumbprint, does not mind; for clients that compare names give the server a certificate with it: --tls-cert and --tls-key",
					"%s: %v", at, err)
			}
			switch left := leaf.NotAfter.Sub(now); {
			case left <= 0:
				bad = true
				add(check, problem, "give the server another one; each client trusts it anew", "the certificate of member %s ended at %s", e.Member, leaf.NotAfter.UTC().Format(time.RFC3339))
			case left < certificateWarning:
				bad = true
				add(check, advice, "give the server another one in working hours; each client trusts it anew", "the certificate of member %s ends in %d days", e.Member, int(left.Hours()/24))
			}
			answered++
		}
	}
	if answered > 0 && !bad {
		add(check, good, "", "every address that clients are told answers, with the certificate that they are told (%d)", answered)
	}
}

var errSeen = errors.New("the certificate was seen")

// certificateAt returns the certificate that a server shows. Nothing is sent that
// needs trust: the handshake ends there.
func certificateAt(ctx context.Context, at string, e kms.Endpoint) (leaf *x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	name := e.ServerName
	if _, err := netip.ParseAddr(e.Host); err != nil && name == "" {
		name = e.Host
	}
	d := tls.Dialer{Config: &tls.Config{MinVersion: tls.VersionTLS12, ServerName: name, InsecureSkipVerify: true, VerifyConnection: func(s tls.ConnectionState) error {
		leaf = s.PeerCertificates[0]
		return errSeen
	}}}
	c, err := d.DialContext(ctx, "tcp", at)
	if err == nil {
		c.Close()
	}
	if leaf == nil {
		return nil, fmt.Errorf("no certificate: %w", err)
	}
	return leaf, nil
}
