package audit

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestFileSink(t *testing.T) {
	dir, head := realLog(t, 20)
	path := filepath.Join(t.TempDir(), "anchors.jsonl")
	s, err := ParseSink(path)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Anchor(t.Context(), head); err != nil {
			t.Fatal(err)
		}
	}
	anchors, err := ReadAnchors(path)
	if err != nil || len(anchors) != 2 {
		t.Fatalf("%+v, %v", anchors, err)
	}
	if r := verified(t, dir, VerifyOptions{Anchors: anchors}); !r.OK() || r.Anchors != 1 {
		t.Errorf("%+v", r)
	}
}

func TestParseSink(t *testing.T) {
	for _, bad := range []string{"", "loghost:514", "udp://loghost:514", "tcp://loghost", "tcp://:514", "tls://h:1?ca=/does/not/exist", "tcp://h:1/x"} {
		if _, err := ParseSink(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

// TestSyslog sends anchors to a server that goes away and comes back.
func TestSyslog(t *testing.T) {
	for _, scheme := range []string{"tcp", "tls"} {
		t.Run(scheme, func(t *testing.T) {
			_, head := realLog(t, 1)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			name := scheme + "://" + l.Addr().String()
			if scheme == "tls" {
				cert, ca := selfSigned(t)
				l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}})
				name += "?ca=" + ca
			}
			s, err := ParseSink(name)
			if err != nil {
				t.Fatal(err)
			}
			got := make(chan string, 10)
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					r := bufio.NewReader(c)
					length, _ := r.ReadString(' ')
					n, err := strconv.Atoi(strings.TrimSpace(length))
					if err == nil {
						b := make([]byte, n)
						if _, err := io.ReadFull(r, b); err == nil {
							got <- string(b)
						}
					}
					c.Close() // after each message
				}
			}()
			a := NewAnchorer(s, slog.New(slog.NewTextHandler(t.Output(), nil)))
			defer a.Close()
			for i := range 2 {
				h := head
				h.Sequence += uint64(i)
				for sent := false; !sent; {
					a.Anchor(h)
					h.Sequence += 10 // a write into a closed connection may be lost
					select {
					case m := <-got:
						_, body, _ := strings.Cut(m, " audit-head - ")
						if !strings.HasPrefix(m, "<110>1 ") || body == "" {
							t.Errorf("message %q", m)
						}
						if h, err := ParseHead([]byte(body)); err != nil || h.Log.String() != head.Log.String() {
							t.Errorf("%q: %v", body, err)
						}
						sent = true
					case <-time.After(200 * time.Millisecond):
					}
				}
			}
		})
	}
}

func selfSigned(t *testing.T) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, path
}
