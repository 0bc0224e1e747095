package admin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"mortise/internal/pki"
)

// maxAnswer bounds a JSON answer, in bytes.
const maxAnswer = 64 << 20

// A Client calls the API of a running KMS. Its methods, a file of them for each
// area, return an *[Error] when the server refuses.
type Client struct {
	base  string // what URLs begin with, without a final slash
	where string // for errors
	key   string // API key, "" for none
	http  *http.Client
}

// DialSocket returns a caller of the admin socket at path. It connects when
// called.
func DialSocket(path string) *Client {
	return &Client{base: "http://kms", where: "the admin socket " + path, http: &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				c, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "unix", path)
				if err != nil {
					return nil, fmt.Errorf("%w (is the key server running, and are you its user?)", err)
				}
				return c, nil
			},
		},
	}}
}

// Remote says how to reach a KMS over HTTPS and as whom.
type Remote struct {
	URL string // https://host or https://host:port; the port is [Port] if it is missing
	// Thumbprint of the server's certificate, or of a CA in its chain, SHA-256;
	// "" trusts the machine's CAs.
	Thumbprint  string
	APIKey      string           // "" for none
	Certificate *tls.Certificate // nil for none
}

// Dial returns a caller of a KMS over HTTPS. It connects when called.
func Dial(r Remote) (*Client, error) {
	u, err := url.Parse(r.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
		return nil, fmt.Errorf("admin: %q is no address of a key server: https://HOST or https://HOST:PORT is wanted", r.URL)
	}
	if u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), fmt.Sprint(Port))
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname()}
	if r.Thumbprint != "" {
		if config, err = pinned(r.Thumbprint); err != nil {
			return nil, err
		}
		if net.ParseIP(u.Hostname()) == nil {
			config.ServerName = u.Hostname()
		}
	}
	if r.Certificate != nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return r.Certificate, nil }
	}
	return &Client{base: "https://" + u.Host, where: u.String(), key: r.APIKey, http: &http.Client{
		Transport:     &http.Transport{TLSClientConfig: config, TLSHandshakeTimeout: 20 * time.Second, DialContext: (&net.Dialer{Timeout: 20 * time.Second}).DialContext},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// pinned trusts the one server certificate, or what the one CA issued.
func pinned(thumbprint string) (*tls.Config, error) {
	want, err := pki.ParseThumbprint(thumbprint)
	if err != nil {
		return nil, fmt.Errorf("admin: the server's thumbprint: %w", err)
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // of the machine's CAs; VerifyConnection is stricter
		VerifyConnection: func(s tls.ConnectionState) error {
			return verifyPinned(s.PeerCertificates, want, s.ServerName)
		},
	}, nil
}

func verifyPinned(chain []*x509.Certificate, want [sha256.Size]byte, name string) error {
	if len(chain) == 0 {
		return errors.New("the server shows no certificate")
	}
	if pki.Fingerprint(chain[0]) == want {
		return pki.CheckValid(chain[0], time.Now())
	}
	if ca, err := pki.FindCA(chain, want); err == nil {
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(ca)
		for _, c := range chain[1:] {
			between.AddCert(c)
		}
		_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: name})
		return err
	}
	return fmt.Errorf("the server shows a certificate with the thumbprint %s, not the one given: if it was renewed, check the new one with its administrator; if not, somebody stands between", pki.Thumbprint(chain[0]))
}

// call makes one call. query and req may be nil.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, req, resp any) error {
	var body io.Reader = http.NoBody
	if req != nil {
		text, err := json.Marshal(req)
		if err != nil {
			return fmt.Errorf("admin: %w", err)
		}
		body = bytes.NewReader(text)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout+15*time.Second)
	defer cancel()
	answer, err := c.send(ctx, method, path, query, body, "application/json")
	if err != nil {
		return err
	}
	defer answer.Close()
	return c.read(answer, resp)
}

// read reads an answer that is JSON.
func (c *Client) read(answer io.Reader, resp any) error {
	text, err := io.ReadAll(io.LimitReader(answer, maxAnswer))
	if err != nil {
		return fmt.Errorf("admin: reading the answer of %s: %w", c.where, err)
	}
	defer clear(text) // an issued key may be in it
	if err := json.Unmarshal(text, resp); err != nil {
		return fmt.Errorf("admin: the answer of %s is not what this version expects: %w", c.where, err)
	}
	return nil
}

// send makes one call and returns its answer as a stream, the caller's to close.
// It has no time limit but ctx's.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, body io.Reader, media string) (io.ReadCloser, error) {
	u := c.base + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, fmt.Errorf("admin: %w", err)
	}
	if body != http.NoBody {
		req.Header.Set("Content-Type", media)
	}
	if c.key != "" {
		req.Header.Set("Authorization", "Bearer "+c.key)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("admin: calling %s: %w", c.where, cause(err))
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	e := &Error{Status: resp.StatusCode}
	if err != nil || json.Unmarshal(text, e) != nil || e.Message == "" {
		e.Code, e.Message = "internal", fmt.Sprintf("%s answered %s, not as a mortise kms does", c.where, resp.Status)
	}
	return nil, e
}

// cause strips what net/http puts round an error: method and URL say nothing to
// who typed a verb.
func cause(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// at makes a path of the API of its segments.
func at(segments ...string) string {
	var b strings.Builder
	b.WriteString("/v1")
	for _, s := range segments {
		b.WriteString("/" + url.PathEscape(s))
	}
	return b.String()
}

// confirming is the query of a call that may need a confirmation.
func confirming(hash string) url.Values {
	if hash == "" {
		return nil
	}
	return url.Values{"confirm": {hash}}
}
