package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mortise/internal/pki"
)

// party is a CA and what it has certified: a server on loopback and a client.
type party struct {
	ca             *pki.Authority
	server, client *pki.Credentials
	dir            string // the client's files, named as QEMU and libnbd want them
}

func newParty(t testing.TB) party {
	t.Helper()
	ca, err := pki.NewAuthority("disks", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	p := party{ca: ca, dir: t.TempDir()}
	p.server = p.issue(t, pki.Grant{Name: "server", Hosts: []string{"localhost", "127.0.0.1"}, Server: true, Life: time.Hour}, "server")
	p.client = p.issue(t, pki.Grant{Name: "backup", Client: true, Life: time.Hour}, "client")
	if err := pki.SaveCertificates(filepath.Join(p.dir, "ca-cert.pem"), ca.Certificate()); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p party) issue(t testing.TB, g pki.Grant, as string) *pki.Credentials {
	t.Helper()
	key, err := pki.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	der, err := pki.NewCSR(key, g.Name)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := p.ca.Issue(csr, g, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c, err := pki.NewCredentials([]*x509.Certificate{cert}, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := pki.MarshalKey(key)
	if err != nil {
		t.Fatal(err)
	}
	defer pkcs8.Wipe()
	pkcs8.Use(func(der []byte) {
		writePEM(t, filepath.Join(p.dir, as+"-key.pem"), "PRIVATE KEY", der)
	})
	writePEM(t, filepath.Join(p.dir, as+"-cert.pem"), "CERTIFICATE", cert.Raw)
	return c
}

// serveTLS serves s on loopback and returns the port.
func serveTLS(t testing.TB, s *Server, p party) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- s.ServeTLS(ctx, l, pki.DiskServer(p.server, []*x509.Certificate{p.ca.Certificate()}, nil, nil))
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("ServeTLS: %v", err)
		}
	})
	return l.Addr().(*net.TCPAddr).Port
}

func dialTCP(t testing.TB, port int) *client {
	t.Helper()
	nc, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	c := &client{t: t, c: nc}
	c.read(18)
	c.write(be32(3))
	return c
}

// secure does STARTTLS; without a certificate if cred is nil.
func (c *client) secure(p party, cred *pki.Credentials) error {
	c.t.Helper()
	if r := c.option(optStartTLS, nil); r.kind != repAck {
		c.t.Fatalf("STARTTLS: %+v", r)
	}
	roots := x509.NewCertPool()
	roots.AddCert(p.ca.Certificate())
	config := &tls.Config{RootCAs: roots, ServerName: "localhost"}
	if cred != nil {
		certificate := tlsCertificate(c.t, p, cred)
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil }
	}
	secured := tls.Client(c.c, config)
	if err := secured.Handshake(); err != nil {
		return err
	}
	c.c = secured
	return nil
}

// tlsCertificate reads a client's files.
func tlsCertificate(t testing.TB, p party, cred *pki.Credentials) tls.Certificate {
	t.Helper()
	name := "client"
	if cred.Leaf().Subject.CommonName == "server" {
		name = "server"
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(p.dir, name+"-cert.pem"), filepath.Join(p.dir, name+"-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// A disk over the network: everything works, and the end is as orderly.
func TestTLS(t *testing.T) {
	p := newParty(t)
	disk := randomDisk(t, 4<<20)
	s, exp, path := serve(t, disk, Options{}, false)
	port := serveTLS(t, s, p)
	c := dialTCP(t, port)
	if err := c.secure(p, p.client); err != nil {
		t.Fatal(err)
	}
	if r := c.option(optStartTLS, nil); r.kind != repErrInvalid {
		t.Errorf("STARTTLS twice: %+v", r)
	}
	c.structuredReplies()
	c.transmit("disk")
	want := disk.all()
	if !bytes.Equal(c.mustRead(0, 4<<20), want) {
		t.Error("wrong data")
	}
	c.mustWrite(0, want[1<<20:3<<20])
	if !bytes.Equal(c.mustRead(0, 2<<20), want[1<<20:3<<20]) {
		t.Error("wrong data after a write")
	}
	// A flush in clear on the unix socket covers what came through TLS.
	if r := connect(t, path, true).do(cmdFlush, 0, 0, 0, nil); r.err != 0 || !disk.durable() {
		t.Error("a flush on another connection did not cover the write")
	}
	if err := exp.Disconnect(soon(t)); err != nil {
		t.Error(err)
	}
	if _, err := c.c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the connection ended with %v and not with a goodbye", err)
	}
}

// Before TLS, and without the right certificate, there is nothing to be had.
func TestTLSForced(t *testing.T) {
	p, other := newParty(t), newParty(t)
	disk := randomDisk(t, 1<<20)
	s, _, _ := serve(t, disk, Options{HandshakeTimeout: 2 * time.Second}, false)
	port := serveTLS(t, s, p)

	c := dialTCP(t, port)
	for name, r := range map[string]optReply{
		"list":    c.option(optList, nil),
		"info":    c.option(optInfo, infoRequest("disk")),
		"go":      c.option(optGo, infoRequest("disk")),
		"reply":   c.option(optStructuredReply, nil),
		"context": c.option(optSetMetaContext, metaQuery("disk", metaAllocation)),
		"unknown": c.option(99, nil),
	} {
		if r.kind != repErrTLSReqd || len(r.infos) != 0 {
			t.Errorf("%s in clear: %+v", name, r)
		}
	}
	if r := c.option(optStartTLS, []byte{1}); r.kind != repErrInvalid {
		t.Errorf("STARTTLS with data: %+v", r)
	}
	if err := c.secure(p, p.client); err != nil {
		t.Fatal(err)
	}
	c.transmit("disk")

	t.Run("export name in clear", func(t *testing.T) {
		c := dialTCP(t, port)
		c.write(optionBytes(optExportName, []byte("disk")))
		c.closed()
	})
	t.Run("said before, done after", func(t *testing.T) {
		// What somebody in between puts behind STARTTLS must not count after it.
		c := dialTCP(t, port)
		c.write(join(optionBytes(optStartTLS, nil), optionBytes(optGo, infoRequest("disk"))))
		c.closed()
	})
	for name, cred := range map[string]*pki.Credentials{"no certificate": nil, "another CA's": other.client, "a server's": p.server} {
		t.Run(name, func(t *testing.T) {
			c := dialTCP(t, port)
			from := p
			if name == "another CA's" {
				from.dir = other.dir
			}
			if err := c.secure(from, cred); err != nil {
				return
			}
			// In TLS 1.3 the client hears of it with the first byte it reads.
			_, _ = c.c.Write(optionBytes(optGo, infoRequest("disk")))
			if n, err := c.c.Read(make([]byte, 1)); err == nil || timedOut(err) {
				t.Errorf("got in: %d bytes, %v", n, err)
			}
		})
	}
	t.Run("garbage for TLS", func(t *testing.T) {
		c := dialTCP(t, port)
		if r := c.option(optStartTLS, nil); r.kind != repAck {
			t.Fatalf("STARTTLS: %+v", r)
		}
		c.write(bytes.Repeat([]byte{0x16, 3, 1, 0xff}, 1000))
		_, _ = io.Copy(io.Discard, c.c) // an alert at most
	})
	t.Run("half open", func(t *testing.T) {
		began := time.Now()
		c := dialTCP(t, port)
		if r := c.option(optStartTLS, nil); r.kind != repAck {
			t.Fatalf("STARTTLS: %+v", r)
		}
		_, _ = io.Copy(io.Discard, c.c)
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("a client that says nothing was waited for %v", took)
		}
	})
}

// Strangers cannot keep those out who have a certificate.
func TestTLSStrangers(t *testing.T) {
	p := newParty(t)
	s, _, path := serve(t, newMemDisk(t, 1<<20), Options{MaxConns: 2}, false)
	port := serveTLS(t, s, p)
	for range maxStrangers + 40 {
		nc, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
	}
	c := dialTCP(t, port)
	if err := c.secure(p, p.client); err != nil {
		t.Fatal(err)
	}
	c.transmit("disk")
	c.mustRead(0, 512)
	connect(t, path, true).mustRead(0, 512) // the second client
	late := dialTCP(t, port)
	if err := late.secure(p, p.client); err == nil {
		late.closed()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.strangers) > maxStrangers {
		t.Errorf("%d strangers", len(s.strangers))
	}
}

// What would serve a disk to anybody is an error before the first connection.
func TestServeRefuses(t *testing.T) {
	p := newParty(t)
	good := pki.DiskServer(p.server, []*x509.Certificate{p.ca.Certificate()}, nil, nil)
	unchecked, anyCert := good.Clone(), good.Clone()
	unchecked.ClientAuth = tls.VerifyClientCertIfGiven
	anyCert.VerifyConnection = nil
	s := New(Options{})
	for name, config := range map[string]*tls.Config{"none": nil, "unchecked": unchecked, "any certificate": anyCert} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if err := s.ServeTLS(t.Context(), l, config); err == nil || !strings.Contains(err.Error(), "anybody") {
			t.Errorf("%s: %v", name, err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(t.Context(), l); err == nil || !strings.Contains(err.Error(), "in clear") {
		t.Errorf("in clear over TCP: %v", err)
	}
}

// libnbd's and QEMU's tools over TLS.
func TestToolsTLS(t *testing.T) {
	p := newParty(t)
	disk := sparseDisk(t, 16<<20)
	s, _, _ := serve(t, disk, Options{}, false)
	port := serveTLS(t, s, p)
	nbds := fmt.Sprintf("nbds://localhost:%d/disk?tls-certificates=%s", port, p.dir)
	var info struct{ TLS bool }
	if err := json.Unmarshal(tool(t, "nbdinfo", "--json", nbds), &info); err != nil || !info.TLS {
		t.Errorf("nbdinfo: %+v, %v", info, err)
	}
	out := filepath.Join(t.TempDir(), "copy")
	tool(t, "nbdcopy", "--connections=2", nbds, out)
	if !bytes.Equal(readFile(t, out), disk.all()) {
		t.Error("nbdcopy: the copy differs")
	}
	object := "tls-creds-x509,id=tls0,dir=" + p.dir + ",endpoint=client"
	image := fmt.Sprintf("driver=nbd,server.type=inet,server.host=localhost,server.port=%d,export=disk,tls-creds=tls0", port)
	said := string(tool(t, "qemu-io", "--object", object, "-t", "none", "--image-opts",
		"-c", "write -P 0x11 0 1M", "-c", "write -P 0x33 -f 1M 64k", "-c", "read -P 0x11 0 1M", "-c", "flush", image))
	if strings.Contains(said, "ailed") || strings.Count(said, "ops;") != 3 {
		t.Errorf("qemu-io:\n%s", said)
	}
	qcow := filepath.Join(t.TempDir(), "x.qcow2")
	tool(t, "qemu-img", "convert", "--object", object, "--image-opts", image, "-O", "qcow2", qcow)
	tool(t, "qemu-img", "compare", "--object", object, "--image-opts", image, "driver=qcow2,file.filename="+qcow)
	if !disk.durable() {
		t.Error("the flush did not arrive")
	}
}

func writePEM(t testing.TB, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}
