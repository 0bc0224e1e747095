package kms

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"
)

// The admin socket: HTTP with JSON over a unix socket that only its owner can
// open (design §1). Access is the file's mode; there is no log-in.
//
//	GET    /v1/instances/{instance}/clients
//	POST   /v1/instances/{instance}/clients                {"name": …, "certificate": PEM}
//	DELETE /v1/instances/{instance}/clients/{fingerprint}
//
// An error is {"error": text} with a 4xx or 5xx status.

// maxAdminBody bounds a request to the admin socket, in bytes.
const maxAdminBody = 64 << 10

// ListenAdmin makes the socket at path with mode 0600. A socket left by a dead
// process is replaced; one that answers is not.
func ListenAdmin(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("kms: admin socket %s is in use by another process", path)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("kms: removing the admin socket of a dead process: %w", err)
		}
	}
	// Bound under another name and mode first, so that nobody connects before
	// the mode is right.
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("kms: making the admin socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("kms: making the admin socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(fresh, 0o600), os.Rename(fresh, path)); err != nil {
		l.Close()
		return nil, fmt.Errorf("kms: making the admin socket: %w", err)
	}
	return l, nil
}

// ServeAdmin serves the admin socket until ctx ends.
func (k *KMS) ServeAdmin(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           k.adminHandler(),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
	}
	defer context.AfterFunc(ctx, func() {
		last, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		srv.Shutdown(last)
	})()
	if err := srv.Serve(l); ctx.Err() == nil {
		return fmt.Errorf("kms: serving the admin socket: %w", err)
	}
	return nil
}

type addRequest struct {
	Name        string `json:"name"`
	Certificate string `json:"certificate"` // PEM
}

func (k *KMS) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/instances/{instance}/clients", func(w http.ResponseWriter, r *http.Request) {
		list, err := k.Clients(r.Context(), r.PathValue("instance"))
		answer(w, list, err)
	})
	mux.HandleFunc("POST /v1/instances/{instance}/clients", func(w http.ResponseWriter, r *http.Request) {
		var req addRequest
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxAdminBody))
		d.DisallowUnknownFields()
		if err := d.Decode(&req); err != nil {
			answer(w, nil, fmt.Errorf("%w: %w", errBadRequest, err))
			return
		}
		cert, err := ParseClientCertificate([]byte(req.Certificate))
		if err != nil {
			answer(w, nil, err)
			return
		}
		c, err := k.AddClient(r.Context(), r.PathValue("instance"), req.Name, cert)
		answer(w, c, err)
	})
	mux.HandleFunc("DELETE /v1/instances/{instance}/clients/{fingerprint}", func(w http.ResponseWriter, r *http.Request) {
		answer(w, struct{}{}, k.RemoveClient(r.Context(), r.PathValue("instance"), r.PathValue("fingerprint")))
	})
	return mux
}

var errBadRequest = errors.New("bad request")

func answer(w http.ResponseWriter, v any, err error) {
	status := http.StatusOK
	switch {
	case err == nil:
	case errors.Is(err, ErrUnknownInstance), errors.Is(err, ErrUnknownClient):
		status = http.StatusNotFound
	case errors.Is(err, ErrClientExists):
		status = http.StatusConflict
	case errors.Is(err, ErrExpired), errors.Is(err, errBadRequest):
		status = http.StatusBadRequest
	default:
		status = http.StatusInternalServerError
	}
	if err != nil {
		v = map[string]string{"error": err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// ParseClientCertificate reads one PEM certificate; of a chain, the first. Text
// that holds a private key is refused: it does not belong here.
func ParseClientCertificate(text []byte) (*x509.Certificate, error) {
	if bytes.Contains(text, []byte("PRIVATE KEY-----")) {
		return nil, fmt.Errorf("%w: the file holds a private key; give the certificate alone", errBadRequest)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%w: no PEM certificate (-----BEGIN CERTIFICATE-----) is in it", errBadRequest)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: reading the certificate: %w", errBadRequest, err)
	}
	return cert, nil
}

// An Admin calls the admin socket of a running KMS.
type Admin struct {
	socket string
	http   *http.Client
}

// DialAdmin returns a caller of the socket at path; it connects when called.
func DialAdmin(path string) *Admin {
	return &Admin{socket: path, http: &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", path)
			},
		},
	}}
}

// AddClient lets the holder of the certificate, PEM, use an instance.
func (a *Admin) AddClient(ctx context.Context, instance, name string, certificate []byte) (c Client, err error) {
	body, err := json.Marshal(addRequest{name, string(certificate)})
	if err != nil {
		return c, err
	}
	err = a.call(ctx, http.MethodPost, body, &c, instance, "clients")
	return c, err
}

// Clients lists the certificates that may use an instance.
func (a *Admin) Clients(ctx context.Context, instance string) (list []Client, err error) {
	err = a.call(ctx, http.MethodGet, nil, &list, instance, "clients")
	return list, err
}

// RemoveClient ends the use of an instance by a certificate.
func (a *Admin) RemoveClient(ctx context.Context, instance, fingerprint string) error {
	return a.call(ctx, http.MethodDelete, nil, &struct{}{}, instance, "clients", fingerprint)
}

func (a *Admin) call(ctx context.Context, method string, body []byte, result any, path ...string) error {
	u := url.URL{Scheme: "http", Host: "kms", Path: "/v1/instances"}
	req, err := http.NewRequestWithContext(ctx, method, u.JoinPath(path...).String(), bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("kms: calling the admin socket: %w", err)
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return fmt.Errorf("kms: calling the admin socket %s (is the KMS running, and are you its user?): %w", a.socket, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("kms: reading the admin socket's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var e struct{ Error string }
		if json.Unmarshal(text, &e) != nil || e.Error == "" {
			e.Error = resp.Status
		}
		return errors.New(e.Error)
	}
	if err := json.Unmarshal(text, result); err != nil {
		return fmt.Errorf("kms: reading the admin socket's answer: %w", err)
	}
	return nil
}
