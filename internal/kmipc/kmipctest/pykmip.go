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

// Start runs a PyKMIP server until the test ends and returns its address.
func Start(t testing.TB, f Files) (address string) {
	t.Helper()
	const python = "/usr/bin/python3"
	if err := exec.Command(python, "-c", "import kmip.services.server").Run(); err != nil {
		t.Fatalf("PyKMIP is missing (install Debian's python3-pykmip): %v", err)
	}
	dir := t.TempDir()
	policies := filepath.Join(dir, "policies")
	if err := os.Mkdir(policies, 0o700); err != nil {
		t.Fatal(err)
	}
	address = freeAddress(t)
	_, port, _ := net.SplitHostPort(address)
	config := filepath.Join(dir, "server.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `[server]
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
	log := filepath.Join(dir, "server.log")
	cmd := exec.Command(python, "-W", "ignore", "-c", "from kmip.services.server import server; server.main()", "-f", config, "-l", log)
	out, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // its helper processes end with it
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting PyKMIP: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
		if t.Failed() {
			text, _ := os.ReadFile(log)
			t.Logf("PyKMIP's log:\n%s", tail(text, 4000))
		}
	})
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close()
			return address
		}
		select {
		case err := <-ended:
			ended <- err
			text, _ := os.ReadFile(out.Name())
			t.Fatalf("PyKMIP ended: %v\n%s", err, tail(text, 4000))
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("PyKMIP does not listen after 60 s")
		}
	}
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
