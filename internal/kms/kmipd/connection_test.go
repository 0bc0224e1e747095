package kmipd

import (
	"crypto"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// TestHandshake: who may connect (S3).
func TestHandshake(t *testing.T) {
	b := serve(t, Options{HandshakeTimeout: time.Second})
	try := func(client tls.Certificate, version uint16) error {
		cfg := b.config(client, version)
		if client.Certificate == nil {
			cfg.Certificates = nil
		}
		c, err := tls.Dial("tcp", b.addr, cfg)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		req := request(1, &payloads.DiscoverVersionsRequestPayload{})
		c.Write(ttlv.MarshalTTLV(&req))
		_, _, err = receive(c) // in TLS 1.3 the refusal comes with the first read
		return err
	}
	expired := newClient(t, time.Now().Add(-48*time.Hour), 24*time.Hour)
	removed := newClient(t, time.Now(), time.Hour)
	if _, err := b.AddClient(t.Context(), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Certificate: removed.Leaf}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.RemoveClient(t.Context(), kms.Actor{}, kms.DefaultInstance, pki.Thumbprint(removed.Leaf)); err != nil {
		t.Fatal(err)
	}
	stolen := b.client // the certificate is public; the key is not
	stolen.PrivateKey = newClient(t, time.Now(), time.Hour).PrivateKey.(crypto.Signer)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if err := try(b.client, version); err != nil {
			t.Errorf("TLS %x: the known client: %v", version, err)
		}
		for what, c := range map[string]tls.Certificate{
			"none": {}, "unknown": newClient(t, time.Now(), time.Hour), "expired": expired, "removed": removed, "stolen": stolen,
		} {
			if err := try(c, version); err == nil {
				t.Errorf("TLS %x: client certificate %s was taken", version, what)
			}
		}
	}
	if err := try(b.client, tls.VersionTLS11); err == nil {
		t.Error("TLS 1.1 was taken")
	}
	if log := b.log.String(); !strings.Contains(log, "mortise kms client add") || !strings.Contains(log, "expired") {
		t.Errorf("the log does not say why and what to do: %s", log)
	}

	// A handshake that never comes, and one that stops half way.
	for _, first := range []string{"", "\x16\x03\x01\x02\x00\x01"} {
		c, err := net.Dial("tcp", b.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, first)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		begin := time.Now()
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) > 5*time.Second {
			t.Errorf("a handshake of %d bytes was waited for %v", len(first), time.Since(begin))
		}
	}
}

// TestRemovedInMidConnection: an open connection ends with its certificate.
func TestRemovedInMidConnection(t *testing.T) {
	b := serve(t, Options{})
	c := b.dial(t)
	id := newKey(t, c)
	if _, err := b.RemoveClient(t.Context(), kms.Actor{}, kms.DefaultInstance, pki.Thumbprint(b.client.Leaf)); err != nil {
		t.Fatal(err)
	}
	m := roundTrip(t, c, request(4, &payloads.GetRequestPayload{UniqueIdentifier: id}))
	if len(m.BatchItem) != 1 || m.BatchItem[0].ResultReason != kmip.ResultReasonPermissionDenied {
		t.Errorf("after removal: %+v", m)
	}
	if _, _, err := receive(c); !errors.Is(err, io.EOF) {
		t.Errorf("the connection goes on: %v", err)
	}
}

// TestLimits: slow and silent clients, too many connections.
func TestLimits(t *testing.T) {
	b := serve(t, Options{MaxConnections: 3, ReadTimeout: 300 * time.Millisecond, IdleTimeout: 1500 * time.Millisecond})
	req := request(1, &payloads.DiscoverVersionsRequestPayload{})
	bytesOf := ttlv.MarshalTTLV(&req)

	slow := b.dial(t)
	begin := time.Now()
	go func() {
		for _, x := range bytesOf {
			if _, err := slow.Write([]byte{x}); err != nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	if _, _, err := receive(slow); err == nil || time.Since(begin) > 3*time.Second {
		t.Errorf("a request a byte at a time: %v after %v", err, time.Since(begin))
	}
	silent := b.dial(t)
	time.Sleep(700 * time.Millisecond) // longer than the read time, shorter than the idle time
	do[*payloads.DiscoverVersionsResponsePayload](t, silent, 1, &payloads.DiscoverVersionsRequestPayload{})
	begin = time.Now()
	if _, _, err := receive(silent); !errors.Is(err, io.EOF) || time.Since(begin) < time.Second {
		t.Errorf("a silent client: %v after %v", err, time.Since(begin))
	}
	time.Sleep(300 * time.Millisecond) // both are forgotten
	var open []net.Conn
	for range 3 {
		open = append(open, b.dial(t))
	}
	if c, err := tls.Dial("tcp", b.addr, b.config(b.client, tls.VersionTLS13)); err == nil {
		c.Close()
		t.Error("a fourth connection was taken")
	}
	open[0].Close()
	time.Sleep(300 * time.Millisecond)
	do[*payloads.DiscoverVersionsResponsePayload](t, b.dial(t), 1, &payloads.DiscoverVersionsRequestPayload{})
}

// TestDrain: Serve ends at once for idle connections, and after the request for
// the others.
func TestDrain(t *testing.T) {
	b := serve(t, Options{})
	for range 20 {
		b.dial(t)
	}
	busy := b.dial(t)
	var creates []kmip.OperationPayload
	for range 500 {
		creates = append(creates, createAES())
	}
	req := request(4, creates...)
	if _, err := busy.Write(ttlv.MarshalTTLV(&req)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(20 * time.Millisecond)
	begin := time.Now()
	stopped := make(chan error, 1)
	go func() { stopped <- b.stop() }()
	m, _, err := receive(busy)
	if err != nil || len(m.BatchItem) != 500 || m.BatchItem[499].Err() != nil {
		t.Errorf("the request under way: %d items, %v", len(m.BatchItem), err)
	}
	if err := <-stopped; err != nil || time.Since(begin) > 20*time.Second {
		t.Errorf("drained with %v after %v", err, time.Since(begin))
	}
	if c, err := net.Dial("tcp", b.addr); err == nil {
		c.Close()
		t.Error("the listener is still open")
	}
}

func TestManyClientsAtOnce(t *testing.T) {
	b := serve(t, Options{})
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			c, err := tls.Dial("tcp", b.addr, b.config(b.client, tls.VersionTLS12))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			for range 25 {
				req := request(4, createAES(custom("x-g", fmt.Sprint(g))), &payloads.ActivateRequestPayload{}, &payloads.GetRequestPayload{})
				if _, err := c.Write(ttlv.MarshalTTLV(&req)); err != nil {
					t.Error(err)
					return
				}
				m, _, err := receive(c)
				if err != nil || len(m.BatchItem) != 3 || m.BatchItem[2].Err() != nil {
					t.Errorf("%+v, %v", m, err)
					return
				}
			}
		})
	}
	wg.Wait()
	l := do[*payloads.LocateResponsePayload](t, b.dial(t), 4, &payloads.LocateRequestPayload{})
	if *l.LocatedItems != 200 {
		t.Errorf("%d keys, want 200", *l.LocatedItems)
	}
}
