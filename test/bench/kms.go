package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
	"mortise/internal/kms/kmipd"
	"mortise/internal/pki"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

const (
	kmsRounds  = 3               // of each figure; the median counts
	kmsRound   = 2 * time.Second // each
	kmsClients = 64              // that create at once (design.md §8)
)

// benchKMS measures the KMS as a client sees it, over mutual TLS on loopback.
// Its peers see the same client: a TLS server that answers a constant of the
// same size, PyKMIP's server, and for durable creates an etcd of its own that
// takes puts of the same size from as many writers without any wire.
func benchKMS(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp(".", "kms-bench-") // not on a tmpfs: durable means durable
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := startKMS(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.stop()) }()
	for _, v := range []struct {
		name    string
		version uint16
	}{{"tls13", tls.VersionTLS13}, {"tls12", tls.VersionTLS12}} {
		if err := b.compare(ctx, "kms/get-fresh-"+v.name, 8, 0.85, b.fresh(b.addr, v.version), b.fresh(b.bare, v.version)); err != nil {
			return err
		}
		if err := b.compare(ctx, "kms/vcenter-sequence-"+v.name, 8, 0, b.sequence(b.addr, v.version, true), b.sequence(b.bare, v.version, false)); err != nil {
			return err
		}
	}
	if err := b.compare(ctx, "kms/get-kept", 16, 0, b.kept(b.addr, b.get), b.kept(b.bare, b.get)); err != nil {
		return err
	}
	kept, err := median3(ctx, 16, b.kept(b.addr, b.get))
	if err != nil {
		return err
	}
	figure{name: "kms/get-kept-least", ours: kept, peer: 20_000, unit: "/s", peerName: "least", target: 1}.print()
	if err := b.compareCreate(ctx, dir); err != nil {
		return err
	}
	if err := benchThree(ctx, filepath.Join(dir, "three")); err != nil {
		return err
	}
	if err := b.herd(ctx); err != nil {
		return err
	}
	return b.comparePyKMIP(ctx, dir)
}

type kmsBench struct {
	store      *store.Store
	kms        *kms.KMS
	addr, bare string
	tls        *tls.Config
	pem        pemFiles // of the same certificates
	get        []byte   // a Get, encoded
	stop       func() error
	closeStore func() error // after the KMS
}

// openKMS opens the KMS in dir, and makes it if there is none.
func openKMS(ctx context.Context, dir string) (*store.Store, *kms.KMS, error) {
	s, err := store.Open(ctx, store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		return nil, nil, err
	}
	root, err := rootkeytest.Keyring(dir)
	if err != nil {
		return nil, nil, err
	}
	k, err := kms.Open(ctx, s, kms.Options{})
	if err != nil {
		return nil, nil, err
	}
	return s, k, k.Unlock(ctx, root)
}

func startKMS(ctx context.Context, dir string) (*kmsBench, error) {
	s, k, err := openKMS(ctx, dir)
	if err != nil {
		return nil, err
	}
	return serveKMS(ctx, dir, s, k)
}

// serveKMS serves a KMS and, beside it, a constant.
func serveKMS(ctx context.Context, dir string, s *store.Store, k *kms.KMS) (*kmsBench, error) {
	b := &kmsBench{store: s, kms: k, closeStore: s.Close}
	now := time.Now()
	serverKey, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	server, err := pki.SelfSigned(serverKey, pki.Grant{Server: true, Life: time.Hour, Hosts: []string{"localhost"}}, "kms", now)
	if err != nil {
		return nil, err
	}
	clientKey, err := pki.GenerateKey()
	if err != nil {
		return nil, err
	}
	client, err := pki.SelfSigned(clientKey, pki.Grant{Client: true, Life: time.Hour}, "client", now)
	if err != nil {
		return nil, err
	}
	if _, err := k.AddClient(ctx, kms.Actor{}, kms.DefaultInstance, kms.NewClient{Certificate: client, Role: kms.RoleAdministrator}); err != nil {
		return nil, err
	}
	credentials, err := pki.NewCredentials([]*x509.Certificate{server}, serverKey)
	if err != nil {
		return nil, err
	}
	ours, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	bare, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(server)
	if b.pem, err = writePEM(dir, server, serverKey, client, clientKey); err != nil {
		return nil, err
	}
	b.addr, b.bare = ours.Addr().String(), bare.Addr().String()
	b.tls = &tls.Config{RootCAs: pool, ServerName: "localhost", Certificates: []tls.Certificate{{Certificate: [][]byte{client.Raw}, PrivateKey: clientKey, Leaf: client}}}

	run, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- kmipd.Serve(run, ours, k, kmipd.Options{Credentials: credentials}) }()
	b.stop = func() error {
		cancel()
		err := <-served
		bare.Close()
		k.Close()
		return errors.Join(err, b.closeStore())
	}
	// One key to get, and what the answer looks like.
	c, err := tls.Dial("tcp", b.addr, b.tls)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	answer, err := exchange(c, encodeRequest(createRequest()))
	if err != nil {
		return nil, err
	}
	var m kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(answer, &m); err != nil || m.BatchItem[0].Err() != nil {
		return nil, fmt.Errorf("the first create: %w, %+v", err, m)
	}
	id := m.BatchItem[0].ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	b.get = encodeRequest(&payloads.GetRequestPayload{UniqueIdentifier: id})
	if answer, err = exchange(c, b.get); err != nil {
		return nil, err
	}
	go serveConstant(tls.NewListener(bare, pki.KMIPServer(credentials, nil, func(*x509.Certificate) error { return nil })), answer)
	return b, nil
}

// serveConstant is the limit: it reads a request's length and bytes, and
// answers the same each time.
func serveConstant(l net.Listener, answer []byte) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			for {
				if _, err := readMessage(c); err != nil {
					return
				}
				if _, err := c.Write(answer); err != nil {
					return
				}
			}
		}()
	}
}

func createRequest() *payloads.CreateRequestPayload {
	return &payloads.CreateRequestPayload{ObjectType: kmip.ObjectTypeSymmetricKey, TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
		{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
		{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
		{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
	}}}
}

func encodeRequest(p ...kmip.OperationPayload) []byte {
	m := kmip.NewRequestMessage(kmip.V1_1, p...)
	return ttlv.MarshalTTLV(&m)
}

func exchange(c net.Conn, request []byte) ([]byte, error) {
	if _, err := c.Write(request); err != nil {
		return nil, err
	}
	return readMessage(c)
}

func readMessage(c net.Conn) ([]byte, error) {
	b := make([]byte, 8, 1024)
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, err
	}
	b = append(b, make([]byte, binary.BigEndian.Uint32(b[4:]))...)
	_, err := io.ReadFull(c, b[8:])
	return b, err
}

// A worker does one thing over and over; begin makes it, for one client.
type worker func() (do func() error, end func(), err error)

// fresh is a Get on a new connection each time.
func (b *kmsBench) fresh(addr string, version uint16) worker {
	cfg := b.tls.Clone()
	cfg.MinVersion, cfg.MaxVersion = version, version
	return func() (func() error, func(), error) {
		return func() error {
			c, err := tls.Dial("tcp", addr, cfg)
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = exchange(c, b.get)
			return err
		}, func() {}, nil
	}
}

// kept is a request on a connection that stays.
func (b *kmsBench) kept(addr string, request []byte) worker {
	return func() (func() error, func(), error) {
		c, err := tls.Dial("tcp", addr, b.tls)
		if err != nil {
			return nil, nil, err
		}
		return func() error { _, err := exchange(c, request); return err }, func() { c.Close() }, nil
	}
}

func (b *kmsBench) compare(ctx context.Context, name string, clients int, target float64, ours, peer worker) error {
	return b.compareNamed(ctx, name, clients, target, ours, "bare-tls", peer)
}

// median3 is the median rate of several rounds.
func median3(ctx context.Context, clients int, w worker) (float64, error) {
	var a []float64
	for range kmsRounds {
		x, err := rate(ctx, clients, w)
		if err != nil {
			return 0, err
		}
		a = append(a, x)
	}
	return median(a), nil
}

func (b *kmsBench) compareNamed(ctx context.Context, name string, clients int, target float64, ours worker, peerName string, peer worker) error {
	var a, p []float64
	for range kmsRounds {
		x, err := rate(ctx, clients, ours)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		y, err := rate(ctx, clients, peer)
		if err != nil {
			return fmt.Errorf("%s, %s: %w", name, peerName, err)
		}
		a, p = append(a, x), append(p, y)
	}
	figure{name: name, ours: median(a), peer: median(p), unit: "/s", peerName: peerName, target: target}.print()
	return nil
}

// rate is how often a second that many clients together get w done.
func rate(ctx context.Context, clients int, w worker) (float64, error) {
	var (
		wg    sync.WaitGroup
		count atomic.Int64
		first atomic.Pointer[error]
	)
	begin := time.Now()
	end := begin.Add(kmsRound)
	for range clients {
		wg.Go(func() {
			do, done, err := w()
			if err != nil {
				first.CompareAndSwap(nil, &err)
				return
			}
			defer done()
			for time.Now().Before(end) && ctx.Err() == nil {
				if err := do(); err != nil {
					first.CompareAndSwap(nil, &err)
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	if err := first.Load(); err != nil {
		return 0, *err
	}
	return float64(count.Load()) / time.Since(begin).Seconds(), ctx.Err()
}
