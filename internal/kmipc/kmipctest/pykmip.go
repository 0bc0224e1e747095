// Package kmipctest starts PyKMIP, a KMIP server that is not ours, for tests.
// It needs Debian's python3-pykmip.
//
// Place in the flow: tests of kmipc and provider/standard only. It imports
// nothing of Mortise.
package kmipctest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// Files are what a PyKMIP server is made of: paths of PEM files, and of its
// database. Two servers on one database share keys.
type Files struct {
	Certificate, Key string
	ClientCA         string // certificates that client certificates must come from; may be those themselves
	Database         string
}

// A Server is a PyKMIP server. It may be stopped and started again.
type Server struct {
	Address string

	config, log string
	process     *exec.Cmd
	ended       chan struct{}
}

// Start runs a PyKMIP server until the test ends.
func Start(t testing.TB, f Files) *Server {
	t.Helper()
	if err := exec.Command(python, "-c", "import kmip.services.server").Run(); err != nil {
		t.Fatalf("PyKMIP is missing (install Debian's python3-pykmip): %v", err)
	}
	dir := t.TempDir()
	s := &Server{Address: freeAddress(t), config: filepath.Join(dir, "server.conf"), log: filepath.Join(dir, "server.log")}
	_, port, _ := net.SplitHostPort(s.Address)
	policies := filepath.Join(dir, "policies")
	if err := os.Mkdir(policies, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.config, fmt.Appendf(nil, `[server]
hostname=127.0.0.1
port=%s
certificate_path=%s
key_path=%s
ca_path=%s
auth_suite=TLS1.2
policy_path=%s
enable_tls_client_auth=True
logging_level=INFO
database_path=%s
`, port, f.Certificate, f.Key, f.ClientCA, policies, f.Database), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Start(t)
	t.Cleanup(func() {
		s.Stop(t)
		if t.Failed() {
			text, _ := os.ReadFile(s.log)
			t.Logf("PyKMIP's log:\n%s", tail(text, 4000))
		}
	})
	return s
}

const python = "/usr/bin/python3"

// Start starts a stopped server and waits until it listens.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	out, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(python, "-W", "ignore", "-c", "from kmip.services.server import server; server.main()", "-f", s.config, "-l", s.log)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its helper processes end with it
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting PyKMIP: %v", err)
	}
	s.process, s.ended = cmd, make(chan struct{})
	go func() { cmd.Wait(); close(s.ended) }()
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", s.Address); err == nil {
			c.Close()
			return
		}
		select {
		case <-s.ended:
			t.Fatal("PyKMIP ended")
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("PyKMIP does not listen after 60 s")
		}
	}
}

// Stop kills the server.
func (s *Server) Stop(testing.TB) {
	syscall.Kill(-s.process.Process.Pid, syscall.SIGKILL)
	<-s.ended
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// freeAddress finds a port that nobody listens on just now.
func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
