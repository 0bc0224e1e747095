package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ovh/kmip-go/payloads"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"

	"mortise/internal/pki"
)

// recordSize is that of a sealed AES-256 key without attributes of the client's,
// in bytes.
const recordSize = 162

// compareCreate sets creates over TLS against bare puts of the same size by as
// many writers, in this process, into an etcd that has nothing else to do.
func (b *kmsBench) compareCreate(ctx context.Context, dir string) error {
	client, stop, err := bareEtcd(filepath.Join(dir, "etcd"), 1)
	if err != nil {
		return err
	}
	defer stop()
	return b.compareNamed(ctx, "kms/create-64-clients", kmsClients, 0.5, b.kept(b.addr, encodeRequest(createRequest())), "etcd-puts", puts(ctx, client))
}

// puts are bare ones of the size of a key.
func puts(ctx context.Context, client *clientv3.Client) worker {
	var n atomic.Int64
	value := strings.Repeat("x", recordSize)
	return func() (func() error, func(), error) {
		return func() error {
			_, err := client.Put(ctx, fmt.Sprintf("/object-default/%036d", n.Add(1)), value)
			return err
		}, func() {}, nil
	}
}

// bareEtcd starts a cluster of n members in this process and returns a client of
// its leader.
func bareEtcd(dir string, n int) (_ *clientv3.Client, stop func(), err error) {
	var (
		cluster []string
		peers   []url.URL
		members []*embed.Etcd
	)
	stop = func() {
		for _, m := range members {
			m.Close()
		}
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	for i := range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, nil, err
		}
		peers = append(peers, url.URL{Scheme: "http", Host: l.Addr().String()})
		cluster = append(cluster, fmt.Sprintf("bare-%d=http://%s", i, l.Addr()))
		l.Close()
	}
	for i := range n {
		e := embed.NewConfig()
		e.Dir, e.Name = fmt.Sprintf("%s-%d", dir, i), fmt.Sprintf("bare-%d", i)
		e.ListenClientUrls, e.AdvertiseClientUrls, e.ListenPeerUrls = nil, nil, nil
		e.AdvertisePeerUrls = peers[i : i+1]
		if n > 1 {
			e.ListenPeerUrls = peers[i : i+1]
		}
		e.InitialCluster = strings.Join(cluster, ",")
		e.LogLevel = "fatal"
		m, err := embed.StartEtcd(e)
		if err != nil {
			return nil, nil, fmt.Errorf("starting a bare etcd: %w", err)
		}
		members = append(members, m)
	}
	for _, m := range members {
		select {
		case <-m.Server.ReadyNotify():
		case <-time.After(time.Minute):
			return nil, nil, errors.New("a bare etcd is not ready after a minute")
		}
	}
	leader := members[0]
	for _, m := range members {
		if m.Server.MemberID() == m.Server.Leader() {
			leader = m
		}
	}
	return v3client.New(leader.Server), stop, nil
}

type pemFiles struct{ server, serverKey, client, clientKey string }

func writePEM(dir string, server *x509.Certificate, serverKey crypto.Signer, client *x509.Certificate, clientKey crypto.Signer) (f pemFiles, err error) {
	write := func(name string, text []byte) string {
		path := filepath.Join(dir, name)
		err = errors.Join(err, os.WriteFile(path, text, 0o600))
		return path
	}
	private := func(name string, key crypto.Signer) string {
		der, e := x509.MarshalPKCS8PrivateKey(key)
		err = errors.Join(err, e)
		return write(name, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	f = pemFiles{
		server: write("server.pem", pki.EncodeCertificates(server)), serverKey: private("server.key", serverKey),
		client: write("client.pem", pki.EncodeCertificates(client)), clientKey: private("client.key", clientKey),
	}
	return f, err
}

const python = "/usr/bin/python3"

// comparePyKMIP sets ours against PyKMIP's server: one client of ours, and
// PyKMIP's own, against both.
func (b *kmsBench) comparePyKMIP(ctx context.Context, dir string) error {
	if err := exec.Command(python, "-c", "import kmip.services.server").Run(); err != nil {
		fmt.Println("BENCH kms/pykmip skipped: Debian's python3-pykmip is not installed")
		return nil
	}
	addr, stop, err := b.startPyKMIP(dir)
	if err != nil {
		return err
	}
	defer stop()
	cfg := b.tls.Clone() // PyKMIP has TLS 1.2 only
	cfg.MinVersion, cfg.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	same := &kmsBench{tls: cfg}
	c, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		return err
	}
	answer, err := exchange(c, encodeRequest(createRequest()))
	c.Close()
	if err != nil {
		return err
	}
	id, err := createdID(answer)
	if err != nil {
		return err
	}
	theirs := encodeRequest(&payloads.GetRequestPayload{UniqueIdentifier: id})
	fresh := func(addr string, request []byte) worker {
		return (&kmsBench{tls: cfg, get: request}).fresh(addr, tls.VersionTLS12)
	}
	create := encodeRequest(createRequest())
	for _, f := range []struct {
		name       string
		clients    int
		target     float64
		ours, peer worker
	}{
		{"kms/get-fresh-pykmip", 8, 10, fresh(b.addr, b.get), fresh(addr, theirs)},
		{"kms/get-kept-pykmip", 16, 0, same.kept(b.addr, b.get), same.kept(addr, theirs)},
		{"kms/create-pykmip", kmsClients, 50, same.kept(b.addr, create), same.kept(addr, create)},
	} {
		if err := b.compareNamed(ctx, f.name, f.clients, f.target, f.ours, "pykmip", f.peer); err != nil {
			return err
		}
	}
	return b.pythonClient(ctx, addr)
}

// startPyKMIP runs PyKMIP's server; stop ends it with its helper processes.
func (b *kmsBench) startPyKMIP(dir string) (addr string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	addr = l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	policies, config, log := filepath.Join(dir, "policies"), filepath.Join(dir, "pykmip.conf"), filepath.Join(dir, "pykmip.log")
	if err := errors.Join(os.Mkdir(policies, 0o700), os.WriteFile(config, fmt.Appendf(nil, `[server]
hostname=127.0.0.1
port=%s
certificate_path=%s
key_path=%s
ca_path=%s
auth_suite=TLS1.2
policy_path=%s
enable_tls_client_auth=True
logging_level=WARNING
database_path=%s
`, port, b.pem.server, b.pem.serverKey, b.pem.client, policies, filepath.Join(dir, "pykmip.db")), 0o600)); err != nil {
		return "", nil, err
	}
	cmd := exec.Command(python, "-W", "ignore", "-c", "from kmip.services.server import server; server.main()", "-f", config, "-l", log)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		cmd.Wait()
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return addr, stop, nil
		}
		if time.Now().After(deadline) {
			stop()
			return "", nil, errors.New("PyKMIP's server does not listen after a minute")
		}
	}
}

// pythonClient measures both servers with PyKMIP's client: one, on a connection
// that it keeps.
func (b *kmsBench) pythonClient(ctx context.Context, pykmip string) error {
	const script = `
import sys, time
from kmip.pie.client import ProxyKmipClient
from kmip import enums
host, port, cert, key, ca = sys.argv[1:6]
with ProxyKmipClient(hostname=host, port=int(port), cert=cert, key=key, ca=ca, ssl_version="PROTOCOL_TLSv1_2") as c:
    n, end = 0, time.time() + 2
    begin = time.time()
    while time.time() < end:
        c.create(enums.CryptographicAlgorithm.AES, 256)
        n += 1
    print(n / (time.time() - begin))
`
	run := func(addr string) (float64, error) {
		host, port, _ := net.SplitHostPort(addr)
		cmd := exec.CommandContext(ctx, python, "-W", "ignore", "-c", script, host, port, b.pem.client, b.pem.clientKey, b.pem.server)
		var said strings.Builder
		cmd.Stderr = &said
		out, err := cmd.Output()
		if err != nil {
			return 0, fmt.Errorf("PyKMIP's client: %w\n%s", err, said.String())
		}
		var x float64
		_, err = fmt.Sscan(string(out), &x)
		return x, err
	}
	var a, p []float64
	for range kmsRounds {
		x, err := run(b.addr)
		if err != nil {
			return err
		}
		y, err := run(pykmip)
		if err != nil {
			return err
		}
		a, p = append(a, x), append(p, y)
	}
	figure{name: "kms/create-pykmip-client", ours: median(a), peer: median(p), unit: "/s", peerName: "pykmip", target: 1}.print()
	return nil
}
