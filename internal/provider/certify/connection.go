package certify

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/kmipc"
)

const connecting = "connection"

// connection tries TLS and the first message, and reports whether there is any
// point in going on.
func (r *run) connection(ctx context.Context) bool {
	var chain []*x509.Certificate
	best := r.step(connecting, "TLS handshake", func(s *Step) {
		l, err := r.dial(ctx, 0)
		if err != nil {
			s.fails(`it shows the server as "not connected"`, mendConnection(err), "%s", describe(err))
			return
		}
		defer l.Close()
		state := l.TLS()
		chain = state.PeerCertificates
		s.works("%s, %s", tls.VersionName(state.Version), tls.CipherSuiteName(state.CipherSuite))
	})
	if best == Fails {
		return false
	}
	leaf := chain[0]
	r.report.Thumbprint, r.report.Subject, r.report.NotAfter = thumbprint(leaf), leaf.Subject.String(), leaf.NotAfter.UTC()
	r.step(connecting, "TLS 1.2", func(s *Step) {
		l, err := r.dial(ctx, tls.VersionTLS12)
		if errors.Is(err, kmipc.ErrRefused) {
			s.works("is spoken; the client certificate is refused")
			return
		}
		if err != nil {
			s.deviates("vCenter 6.5 to 7.0 speak TLS 1.2 only and do not connect; vCenter 8 does", "allow TLS 1.2 at the server", "%s", describe(err))
			return
		}
		l.Close()
		s.works("is spoken")
	})
	r.step(connecting, "server certificate", func(s *Step) { r.judge(s, leaf) })
	return r.step(connecting, "client certificate", func(s *Step) {
		// Under TLS 1.3 a refusal shows only now.
		l, err := r.dial(ctx, 0)
		if err == nil {
			defer l.Close()
			_, err = r.send(ctx, l, kmip.V1_1, &payloads.DiscoverVersionsRequestPayload{})
		}
		switch {
		case errors.Is(err, kmipc.ErrRefused), errors.Is(err, kmipc.ErrUnreachable):
			s.fails(`it shows the server as "not connected"`, mendConnection(err), "%s", describe(err))
		case isReason(err, kmip.ResultReasonAuthenticationNotSuccessful):
			s.fails("it cannot use the server", "give this certificate's identity access to keys at the server", "%s", describe(err))
		default:
			s.works("is accepted")
		}
	}) != Fails
}

func mendConnection(err error) string {
	var cert *kmipc.CertificateError
	switch {
	case errors.As(err, &cert):
		return "if this thumbprint is the server's own, give it with --thumbprint"
	case errors.Is(err, kmipc.ErrRefused):
		return "register the client certificate at the server; some want extended key usage clientAuth, a subject they know, or a CA of their own"
	}
	return "check address, port and firewall, and that the server's log shows the connection; a server that ends the connection without a word often does not accept the client certificate"
}

// judge says what is wrong with a server's certificate: vCenter trusts it
// because an administrator confirmed it, whoever issued it.
func (r *run) judge(s *Step, cert *x509.Certificate) {
	now := r.cfg.Now()
	kind := cert.PublicKeyAlgorithm.String()
	weak := false
	switch k := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		kind = fmt.Sprintf("RSA %d bits", k.N.BitLen())
		weak = k.N.BitLen() < 2048
	case *ecdsa.PublicKey:
		kind = "ECDSA " + k.Params().Name
	}
	about := fmt.Sprintf("%q, %s, until %s", cert.Subject.String(), kind, cert.NotAfter.UTC().Format(time.DateOnly))
	switch {
	case now.After(cert.NotAfter), now.Before(cert.NotBefore):
		s.deviates("it raises the alarm that the KMS certificate is not valid", "renew the server's certificate, then trust the new one in vCenter", "%s: outside its validity", about)
	case cert.NotAfter.Sub(now) < 30*24*time.Hour:
		s.deviates("it raises the alarm that the KMS certificate expires", "renew the server's certificate, then trust the new one in vCenter", "%s: expires within 30 days", about)
	case weak:
		s.deviates("vCenter 8 may refuse it", "use RSA of 2048 bits or more, or ECDSA", "%s", about)
	case len(cert.DNSNames)+len(cert.IPAddresses) == 0:
		s.deviates("it accepts the certificate by its thumbprint; other KMIP clients look for a subject alternative name", "issue the certificate with the server's names in it", "%s: no subject alternative name", about)
	default:
		s.works("%s", about)
	}
}
