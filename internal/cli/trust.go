package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/atomicfile"
	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/pki"
)

// trustOptions are the flags of provider trust (rule K13).
type trustOptions struct {
	thumbprints            []string
	yes                    bool
	clientCert, clientKey  string
	csr, renew             bool
	signed                 string
	kmsSocket, kmsInstance string
	out                    string
}

func providerTrust(g *globals) *cobra.Command {
	var o trustOptions
	cmd := &cobra.Command{
		Use:   "trust NAME",
		Short: "Make center and a key provider trust each other's certificates",
		Long: `Trust has two halves.

center must know the key server: the server's certificate is shown, and you confirm
its SHA-256 thumbprint, or give it with --thumbprint (once for each server).

The key server must know center, by one of these:
  (nothing said)            center makes a self-signed certificate; it is printed, for you
                            to give to the key server. Run again, it prints the same one;
                            --renew makes a new one.
  --kms-admin-socket PATH   the same, and it is pinned at once at a mortise kms on this
                            machine, whose administrator you are
  --client-cert, --client-key   a certificate and key that the key server gave you
  --csr                     center makes a key and a request; give the request to the key
                            server, and the certificate that it signs to --signed

center keeps its private key sealed; it never leaves center. The key of --client-key is
sent to center once, inside the session: delete the file afterwards.

JSON: {"provider", "servers": [{"server", "thumbprint"}], "clientCertificate" or "csr"
(PEM), "pinned" (by --kms-admin-socket)}.`,
		Example: `  mortise provider trust kms1
  mortise provider trust kms1 --thumbprint 5A:…:9F --out center.pem
  mortise provider trust kms1 --yes --kms-admin-socket /run/mortise/kms.sock
  mortise provider trust kms1 --client-cert c.pem --client-key c.key
  mortise provider trust kms1 --csr --out center.csr
  mortise provider trust kms1 --signed center.crt`,
		Args: needs("NAME"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			return c.trustProvider(ctx, args[0], o)
		}),
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.thumbprints, "thumbprint", nil, "SHA-256 thumbprint that a server's certificate may have")
	f.BoolVar(&o.yes, "yes", false, "trust whatever certificates the servers show now; safe only where nobody stands between")
	f.StringVar(&o.clientCert, "client-cert", "", "certificate for center, PEM, from the key server")
	f.StringVar(&o.clientKey, "client-key", "", "its key, PEM, mode 0600")
	f.BoolVar(&o.csr, "csr", false, "have center make a certificate request")
	f.StringVar(&o.signed, "signed", "", "the certificate, PEM, that was signed for the request of --csr")
	f.BoolVar(&o.renew, "renew", false, "make a new self-signed certificate, although there is one")
	f.StringVar(&o.kmsSocket, "kms-admin-socket", "", "pin center's certificate at the mortise kms with this admin socket")
	f.StringVar(&o.kmsInstance, "kms-instance", kms.DefaultInstance, "KMS instance to pin it in")
	f.StringVar(&o.out, "out", "", "file for center's certificate or request (default: it is printed)")
	cmd.MarkFlagsMutuallyExclusive("client-cert", "csr", "signed", "kms-admin-socket")
	cmd.MarkFlagsMutuallyExclusive("client-cert", "csr", "signed", "renew")
	cmd.MarkFlagsRequiredTogether("client-cert", "client-key")
	cmd.MarkFlagsMutuallyExclusive("thumbprint", "yes")
	return cmd
}

// trustJSON is what provider trust did, in JSON.
type trustJSON struct {
	Provider          string            `json:"provider"`
	Servers           []trustServerJSON `json:"servers"`
	ClientCertificate string            `json:"clientCertificate,omitempty"`
	CSR               string            `json:"csr,omitempty"`
	Pinned            bool              `json:"pinned,omitempty"`
}

type trustServerJSON struct {
	Server     string `json:"server"`
	Thumbprint string `json:"thumbprint"`
}

func (c *client) trustProvider(ctx context.Context, name string, o trustOptions) error {
	p, err := c.provider(ctx, name)
	if err != nil {
		return err
	}
	if len(p.Servers) == 0 {
		return fmt.Errorf("key provider %s has no server yet: add one with mortise provider add %[1]s ADDRESS", name)
	}
	report := trustJSON{Provider: name, Servers: []trustServerJSON{}}
	for _, s := range p.Servers {
		thumb, err := c.trustServer(ctx, p.ClusterId, s, o)
		if err != nil {
			return err
		}
		report.Servers = append(report.Servers, trustServerJSON{s.Name, thumb})
	}
	if err := c.trustClient(ctx, p.ClusterId, o, &report); err != nil {
		return err
	}
	if c.json {
		return c.printJSON(report)
	}
	return nil
}

// trustServer is the first half: center is told which certificate is the server's.
func (c *client) trustServer(ctx context.Context, id types.KeyProviderId, s types.KmipServerInfo, o trustOptions) (string, error) {
	m := *c.vim.ServiceContent.CryptoManager
	res, err := methods.RetrieveKmipServerCert(ctx, c.vim, &types.RetrieveKmipServerCert{This: m, KeyProvider: id, Server: s})
	if err != nil {
		return "", fmt.Errorf("fetching the certificate of key server %s: %w", s.Name, err)
	}
	chain, err := pki.ParseCertificates([]byte(res.Returnval.Certificate))
	if err != nil {
		return "", fmt.Errorf("the certificate of key server %s: %w", s.Name, err)
	}
	thumb := pki.Thumbprint(chain[0])
	known := res.Returnval.ClientTrustServer != nil && *res.Returnval.ClientTrustServer
	if err := c.confirmServer(s, chain[0], known, o); err != nil {
		return "", err
	}
	if known {
		return thumb, nil
	}
	if err := c.ext.TrustKeyServer(ctx, id.Id, s.Name, res.Returnval.Certificate); err != nil {
		return "", fmt.Errorf("telling center to trust key server %s: %w", s.Name, err)
	}
	c.say("center trusts key server %s by its certificate %s.", s.Name, thumb)
	return thumb, nil
}

func (c *client) confirmServer(s types.KmipServerInfo, cert *x509.Certificate, known bool, o trustOptions) error {
	thumb := pki.Thumbprint(cert)
	for _, t := range o.thumbprints {
		want, err := pki.ParseThumbprint(t)
		if err != nil {
			return fmt.Errorf("--thumbprint: %w", err)
		}
		if want == pki.Fingerprint(cert) {
			return nil
		}
	}
	switch {
	case len(o.thumbprints) > 0:
		return fmt.Errorf("key server %s shows a certificate with the thumbprint %s, which no --thumbprint names: check with its administrator; if his differs, somebody stands between", s.Name, thumb)
	case o.yes, known:
		return nil
	}
	fmt.Fprintf(c.err, "Key server %s (%s) shows this certificate:\n", clean(s.Name), clean(s.Address))
	printCertificate(c.err, cert)
	return c.confirm("Is this the thumbprint that the key server's administrator gave you?", "--thumbprint "+thumb+" after comparing it, or --yes")
}

// trustClient is the second half: the key server is to know center.
func (c *client) trustClient(ctx context.Context, id types.KeyProviderId, o trustOptions, report *trustJSON) error {
	m := *c.vim.ServiceContent.CryptoManager
	switch {
	case o.clientCert != "":
		cert, key, err := readKeyPair(o.clientCert, o.clientKey)
		if err != nil {
			return err
		}
		_, err = methods.UploadClientCert(ctx, c.vim, &types.UploadClientCert{This: m, Cluster: id, Certificate: cert, PrivateKey: key})
		if err != nil {
			return fmt.Errorf("giving center the client certificate: %w", err)
		}
		report.ClientCertificate = cert
		c.say("center uses the certificate from %s. Delete %s now: center keeps the key, sealed.", o.clientCert, o.clientKey)
		return nil
	case o.csr:
		res, err := methods.GenerateClientCsr(ctx, c.vim, &types.GenerateClientCsr{This: m, Cluster: id})
		if err != nil {
			return fmt.Errorf("having center make a certificate request: %w", err)
		}
		report.CSR = res.Returnval
		return c.handOut(o, res.Returnval, fmt.Sprintf("Have the key server sign this request, then: mortise provider trust %s --signed FILE", id.Id))
	case o.signed != "":
		text, err := atomicfile.Read(o.signed, maxConfig)
		if err != nil {
			return fmt.Errorf("--signed: %w", err)
		}
		if _, err := pki.ParseCertificates(text); err != nil {
			return fmt.Errorf("--signed: %s: %w", o.signed, err)
		}
		_, err = methods.UpdateKmsSignedCsrClientCert(ctx, c.vim, &types.UpdateKmsSignedCsrClientCert{This: m, Cluster: id, Certificate: string(text)})
		if err != nil {
			return fmt.Errorf("giving center the signed certificate: %w", err)
		}
		report.ClientCertificate = string(text)
		c.say("center uses the signed certificate.")
		return nil
	}
	cert, err := c.ownCertificate(ctx, id, o.renew)
	if err != nil {
		return err
	}
	report.ClientCertificate = cert
	if o.kmsSocket != "" {
		pinned, err := admin.DialSocket(o.kmsSocket).AddClient(ctx, o.kmsInstance, admin.AddClient{Certificate: cert})
		if err != nil {
			return fmt.Errorf("pinning center's certificate at the key server: %w", err)
		}
		report.Pinned = true
		c.say("The key server trusts center by its certificate %s (%s).", pinned.Name, pinned.Fingerprint)
		if o.out == "" {
			return nil
		}
	}
	return c.handOut(o, cert, fmt.Sprintf("Give this certificate to the key server as that of a client (a mortise kms: mortise kms client add FILE), then see: mortise provider status %s", id.Id))
}

// ownCertificate is the client certificate that center made, in use; center
// makes one when there is none, or a new one is wanted.
func (c *client) ownCertificate(ctx context.Context, id types.KeyProviderId, renew bool) (string, error) {
	m := *c.vim.ServiceContent.CryptoManager
	if !renew {
		res, err := methods.RetrieveClientCert(ctx, c.vim, &types.RetrieveClientCert{This: m, Cluster: id})
		if err == nil && res.Returnval != "" {
			return res.Returnval, nil
		}
		// That there is none yet is how a new provider begins; what else is wrong
		// shows when one is made.
	}
	res, err := methods.GenerateSelfSignedClientCert(ctx, c.vim, &types.GenerateSelfSignedClientCert{This: m, Cluster: id})
	if err != nil {
		return "", fmt.Errorf("having center make a client certificate: %w", err)
	}
	_, err = methods.UpdateSelfSignedClientCert(ctx, c.vim, &types.UpdateSelfSignedClientCert{This: m, Cluster: id, Certificate: res.Returnval})
	if err != nil {
		return "", fmt.Errorf("having center use its new client certificate: %w", err)
	}
	return res.Returnval, nil
}

// handOut gives the administrator a PEM text, on the screen or in a file.
func (c *client) handOut(o trustOptions, text, next string) error {
	if o.out != "" {
		if err := atomicfile.Write(o.out, []byte(text), 0o644); err != nil {
			return fmt.Errorf("--out: %w", err)
		}
		c.say("Written to %s.", o.out)
	} else if !c.json {
		fmt.Fprint(c.out, text)
	}
	c.say("%s", next)
	return nil
}

// readKeyPair reads a client certificate and its key and sees that they belong
// together, before the key is sent anywhere.
func readKeyPair(certFile, keyFile string) (cert, key string, err error) {
	certPEM, err := atomicfile.Read(certFile, maxConfig)
	if err != nil {
		return "", "", fmt.Errorf("--client-cert: %w", err)
	}
	st, err := os.Stat(keyFile)
	if err == nil && st.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%s can be read by others (mode %04o): run chmod 600 on it", keyFile, st.Mode().Perm())
	}
	if err != nil {
		return "", "", fmt.Errorf("--client-key: %w", err)
	}
	keyPEM, err := atomicfile.Read(keyFile, maxConfig)
	if err != nil {
		return "", "", fmt.Errorf("--client-key: %w", err)
	}
	defer clear(keyPEM)
	if _, _, err := pki.ParseKeyPair(certPEM, keyPEM); err != nil {
		return "", "", errors.Join(fmt.Errorf("%s and %s", certFile, keyFile), err)
	}
	return string(certPEM), string(keyPEM), nil
}
