// Package kmsproc runs the built program's key server as a process of its own,
// as an administrator would, for tests that speak KMIP to it from outside.
package kmsproc

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"mortise/internal/pki"
)

const wait = 30 * time.Second

// Build makes the program in dir and returns its path. If the environment has
// MORTISE_BINARY, that is taken: build/test.sh has just built it.
func Build(dir string) (string, error) {
	if bin := os.Getenv("MORTISE_BINARY"); bin != "" {
		return bin, nil
	}
	bin := filepath.Join(dir, "mortise")
	cmd := exec.Command("go", "build", "-o", bin, "mortise/cmd/mortise")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building mortise: %w\n%s", err, out)
	}
	return bin, nil
}

// BuildHelper makes the program that PKCS#11 tokens are reached by, in dir, and
// returns its path.
func BuildHelper(dir string) (string, error) {
	bin := filepath.Join(dir, "mortise-pkcs11")
	cmd := exec.Command("go", "build", "-o", bin, "mortise/cmd/mortise-pkcs11")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building mortise-pkcs11: %w\n%s", err, out)
	}
	return bin, nil
}

// A Server is a key server: its files, and its process while it runs.
type Server struct {
	Binary   string
	Dir      string // everything but the state
	StateDir string
	Address  string // KMIP
	Socket   string // of the administrator
	// Args are further ones for serve, and NoPassphrase leaves out the file of
	// the passphrase. Both are for the next start.
	Args         []string
	NoPassphrase bool

	certificate *x509.Certificate
	log         output
	cmd         *exec.Cmd
	ended       chan struct{}
	err         error // once ended
}

// output takes what the process says.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

// New prepares a server whose files are under dir; its path must be short, since
// a socket is among them. State is in stateDir, or under dir if that is "".
func New(binary, dir, stateDir string) (*Server, error) {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return nil, err
	}
	s := &Server{Binary: binary, Dir: dir, StateDir: stateDir, Socket: filepath.Join(dir, "kms.sock")}
	if stateDir == "" {
		s.StateDir = filepath.Join(dir, "state")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.Address = l.Addr().String()
	l.Close()
	if err := s.Renew(); err != nil {
		return nil, err
	}
	return s, os.WriteFile(s.in("passphrase"), []byte("passphrase of the tests\n"), 0o600)
}

func (s *Server) in(name string) string { return filepath.Join(s.Dir, name) }

// Renew writes a new certificate for the server, which shows it after SIGHUP or
// a start.
func (s *Server) Renew() error {
	key, err := pki.GenerateKey()
	if err != nil {
		return err
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Server: true, Life: 24 * time.Hour, Hosts: []string{"127.0.0.1"}}, "kms", time.Now())
	if err != nil {
		return err
	}
	s.certificate = cert
	if err := pki.SaveCertificates(s.in("ca.pem"), cert); err != nil {
		return err
	}
	return pki.SaveKeyPair(s.in("kms.pem"), []*x509.Certificate{cert}, key)
}

// CA is the file of the server's certificate, which clients trust.
func (s *Server) CA() string { return s.in("ca.pem") }

// Start runs the server and returns when it serves.
func (s *Server) Start(ctx context.Context) error {
	if err := s.Launch(); err != nil {
		return err
	}
	return s.await(ctx, "tcp", s.Address)
}

// StartLocked runs the server and returns when administrators reach it, also while
// it serves no client.
func (s *Server) StartLocked(ctx context.Context) error {
	if err := s.Launch(); err != nil {
		return err
	}
	return s.await(ctx, "unix", s.Socket)
}

// Serves returns when a server that runs serves clients.
func (s *Server) Serves(ctx context.Context) error { return s.await(ctx, "tcp", s.Address) }

// PassphraseFile has what seals the root keys.
func (s *Server) PassphraseFile() string { return s.in("passphrase") }

// PID is of the process that runs, or ran last.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Launch runs the server and does not wait for anything.
func (s *Server) Launch() error {
	args := []string{"kms", "serve", "--state-dir", s.StateDir, "--listen", s.Address, "--admin-socket", s.Socket,
		"--admin-listen", "", "--tls-cert", s.in("kms.pem"), "--tls-key", s.in("kms.pem")}
	if !s.NoPassphrase {
		args = append(args, "--passphrase-file", s.in("passphrase"))
	}
	s.cmd = exec.Command(s.Binary, append(args, s.Args...)...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) {
		s.err = cmd.Wait()
		close(ended)
	}(s.cmd, s.ended)
	return nil
}

func (s *Server) await(ctx context.Context, network, address string) error {
	for deadline := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial(network, address); err == nil {
			c.Close()
			return nil
		}
		select {
		case <-s.ended:
			return fmt.Errorf("the key server ended: %w\n%s", s.err, s.Log())
		case <-ctx.Done():
			return errors.Join(ctx.Err(), s.Stop())
		default:
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("the key server does not start\n%s", s.Log()), s.Stop())
		}
	}
}

// Ended is closed when the process has ended, with the error that Wait tells.
func (s *Server) Ended() <-chan struct{} { return s.ended }

// Signal sends the process a signal.
func (s *Server) Signal(sig os.Signal) error { return s.cmd.Process.Signal(sig) }

// Stop ends the server as systemd does, and waits for it.
func (s *Server) Stop() error {
	if s.cmd == nil || s.ended == nil {
		return nil
	}
	select {
	case <-s.ended:
		return s.err
	default:
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.ended:
		return s.err
	case <-time.After(wait):
		_ = s.cmd.Process.Kill()
		<-s.ended
		return fmt.Errorf("the key server does not end\n%s", s.Log())
	}
}

// Log is what the server has said so far.
func (s *Server) Log() string {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return s.log.b.String()
}

// A Client is a certificate that the server knows.
type Client struct {
	tls.Certificate
	File string // certificate and key, PEM
}

// Client makes a client with a role ("" for the usual one) and lets it in.
func (s *Server) Client(ctx context.Context, name, role string) (Client, error) {
	cert, key, err := pki.NewKMIPClient(24*time.Hour, time.Now())
	if err != nil {
		return Client{}, err
	}
	c := Client{File: s.in(name + ".pem")}
	if c.Certificate, err = pki.TLSCertificate([]*x509.Certificate{cert}, key); err != nil {
		return Client{}, err
	}
	public := s.in(name + ".cert.pem")
	if err := errors.Join(pki.SaveKeyPair(c.File, []*x509.Certificate{cert}, key), pki.SaveCertificates(public, cert)); err != nil {
		return Client{}, err
	}
	args := []string{"client", "add", public, "--name", name}
	if role != "" {
		args = append(args, "--role", role)
	}
	_, err = s.Admin(ctx, args...)
	return c, err
}

// Admin runs a verb of `mortise kms` and returns what it prints.
func (s *Server) Admin(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, s.Binary, append(append([]string{"kms"}, args...), "--admin-socket", s.Socket)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mortise kms %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// TLS is how c connects.
func (s *Server) TLS(c Client) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(s.certificate)
	return &tls.Config{RootCAs: pool, ServerName: "127.0.0.1", Certificates: []tls.Certificate{c.Certificate}}
}

// RoundTrip sends a KMIP message over c and reads the answer.
func RoundTrip(c net.Conn, request []byte) ([]byte, error) {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	if _, err := c.Write(request); err != nil {
		return nil, err
	}
	answer := make([]byte, 8)
	if _, err := io.ReadFull(c, answer); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(answer[4:])
	if length > 64<<20 {
		return nil, fmt.Errorf("the answer says it has %d bytes", length)
	}
	answer = append(answer, make([]byte, length)...)
	_, err := io.ReadFull(c, answer[8:])
	return answer, err
}
