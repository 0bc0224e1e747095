package cli

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"

	"mortise/internal/pki"
	"mortise/internal/vimapi/vimext"
)

const (
	dialTimeout = 15 * time.Second
	userAgent   = "mortise"
)

// A client is one verb's connection to a center, with its session.
type client struct {
	*streams
	vim *vim25.Client
	ext *vimext.Client // what vSphere has no call for
	url string
}

// parseURL reads the address of a center: a URL, or a host with or without port.
func parseURL(text string) (*url.URL, error) {
	if text == "" {
		return nil, fmt.Errorf("the URL of the center is missing: e.g. https://center.example.com:8443")
	}
	full := text
	if !strings.Contains(full, "://") {
		full = "https://" + full
	}
	u, err := url.Parse(full)
	switch {
	case err != nil || u.Hostname() == "":
		return nil, fmt.Errorf("%q is no URL: e.g. https://center.example.com:8443", text)
	case u.Scheme != "https":
		return nil, fmt.Errorf("%q: only https is spoken, because a password and a session travel on it", text)
	case u.User != nil:
		return nil, fmt.Errorf("a user or a password does not belong in the URL, where others can read it: use --user and --password-file")
	case u.Path != "" && u.Path != "/" && u.Path != "/sdk" && u.Path != "/sdk/", u.RawQuery != "", u.Fragment != "":
		return nil, fmt.Errorf("%q: give host and port only, e.g. https://%s", text, u.Host)
	}
	return &url.URL{Scheme: "https", Host: strings.ToLower(u.Host)}, nil
}

// dialTLS makes the function that opens connections. With a thumbprint the
// server's certificate must be that very one; without, the system's roots and
// the host's name decide.
func dialTLS(thumbprint string) (func(ctx context.Context, network, addr string) (net.Conn, error), error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}
	if thumbprint != "" {
		want, err := pki.ParseThumbprint(thumbprint)
		if err != nil {
			return nil, err
		}
		conf.InsecureSkipVerify = true // VerifyConnection compares with the pin instead
		conf.VerifyConnection = func(s tls.ConnectionState) error {
			if got := sha256.Sum256(s.PeerCertificates[0].Raw); got != want {
				return &pinError{want: pki.FormatThumbprint(want), got: pki.FormatThumbprint(got)}
			}
			return nil
		}
	}
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		return (&tls.Dialer{Config: conf}).DialContext(ctx, network, addr)
	}, nil
}

// pinError says that a center shows another certificate than the known one.
type pinError struct{ want, got string }

func (e *pinError) Error() string {
	return fmt.Sprintf("its certificate has the SHA-256 thumbprint %s, but the one that was trusted has %s. If center's certificate was renewed, check the new thumbprint with its administrator and log in again with --thumbprint; if not, somebody stands between", e.got, e.want)
}

// fetchCertificate reads the certificate that a server shows, without trusting
// it: no secret may be sent before somebody has.
func fetchCertificate(ctx context.Context, u *url.URL) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	d := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}}
	conn, err := d.DialContext(ctx, "tcp", hostPort(u))
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", u, err)
	}
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

func hostPort(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	return net.JoinHostPort(u.Hostname(), "443")
}

// dial connects to a center without a session.
func dial(ctx context.Context, u *url.URL, thumbprint, session string) (*vim25.Client, error) {
	sdk := u.JoinPath("sdk")
	s := soap.NewClient(sdk, false)
	s.UserAgent = userAgent
	dial, err := dialTLS(thumbprint)
	if err != nil {
		return nil, err
	}
	s.DefaultTransport().DialTLSContext = dial
	if session != "" {
		s.Jar.SetCookies(sdk, []*http.Cookie{{Name: soap.SessionCookieName, Value: session, Path: "/", Secure: true}})
	}
	vim, err := vim25.NewClient(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", u, err)
	}
	return vim, nil
}

// connect opens the session that login kept.
func (g *globals) connect(ctx context.Context, cmd *cobra.Command) (*client, error) {
	conf, err := loadConfig()
	if err != nil {
		return nil, err
	}
	where := g.url
	if where == "" {
		where = os.Getenv("MORTISE_URL")
	}
	if where == "" {
		where = conf.Current
	}
	if where == "" {
		return nil, fmt.Errorf("no center is known yet: run mortise login URL first")
	}
	u, err := parseURL(where)
	if err != nil {
		return nil, err
	}
	known := conf.Centers[u.String()]
	if known == nil || known.Session == "" {
		return nil, fmt.Errorf("not logged in to %s: run mortise login %[1]s first", u)
	}
	vim, err := dial(ctx, u, known.Thumbprint, known.Session)
	if err != nil {
		return nil, err
	}
	return &client{streams: g.streams(cmd), vim: vim, ext: vimext.NewClient(vim.Client), url: u.String()}, nil
}

func (c *client) collector() *property.Collector { return property.DefaultCollector(c.vim) }
