package kmipd

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// parallel divides b.N requests among clients; each gets its own from begin.
func parallel(b *testing.B, clients int, begin func() (do func(), end func())) {
	var (
		wg sync.WaitGroup
		n  atomic.Int64
	)
	b.ResetTimer()
	for range clients {
		wg.Go(func() {
			do, end := begin()
			defer end()
			for n.Add(1) <= int64(b.N) {
				do()
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
}

func exchange(b *testing.B, c net.Conn, wire []byte) {
	if _, err := c.Write(wire); err != nil {
		b.Error(err)
		return
	}
	if m, _, err := receive(c); err != nil || m.BatchItem[0].ResultStatus != kmip.ResultStatusSuccess {
		b.Errorf("%v, %+v", err, m)
	}
}

func connect(b *testing.B, s *bed, version uint16) net.Conn {
	c, err := tls.Dial("tcp", s.addr, s.config(s.client, version))
	if err != nil {
		b.Fatal(err)
	}
	return c
}

func BenchmarkGet(b *testing.B) {
	s := serve(b, Options{})
	req := request(1, &payloads.GetRequestPayload{UniqueIdentifier: newKey(b, s.dial(b))})
	wire := ttlv.MarshalTTLV(&req)
	for _, clients := range []int{1, 16} {
		b.Run(fmt.Sprintf("kept/clients=%d", clients), func(b *testing.B) {
			parallel(b, clients, func() (func(), func()) {
				c := connect(b, s, tls.VersionTLS13)
				return func() { exchange(b, c, wire) }, func() { c.Close() }
			})
		})
	}
	for name, version := range map[string]uint16{"tls12": tls.VersionTLS12, "tls13": tls.VersionTLS13} {
		b.Run("fresh/"+name, func(b *testing.B) {
			parallel(b, 8, func() (func(), func()) {
				return func() {
					c := connect(b, s, version)
					defer c.Close()
					exchange(b, c, wire)
				}, func() {}
			})
		})
	}
}

// BenchmarkAnswer is a Get without TLS, a connection and waiting: one client.
func BenchmarkAnswer(b *testing.B) {
	k := openKMS(b)
	s, err := newServer(k, Options{Credentials: &pki.Credentials{}})
	if err != nil {
		b.Fatal(err)
	}
	client := newClient(b, time.Now(), time.Hour)
	letIn(b, k, client)
	open := func(ctx context.Context) (*kms.Session, error) {
		return k.Presume(ctx, kms.DefaultInstance, client.Leaf, "bench")
	}
	ask := func(p kmip.OperationPayload) kmip.ResponseMessage {
		req := request(1, p)
		e, _ := s.answer(b.Context(), "bench", open, ttlv.MarshalTTLV(&req))
		defer s.release(e)
		var m kmip.ResponseMessage
		if err := ttlv.UnmarshalTTLV(e.Bytes(), &m); err != nil || m.BatchItem[0].Err() != nil {
			b.Fatal(err, m)
		}
		return m
	}
	id := ask(createAES()).BatchItem[0].ResponsePayload.(*payloads.CreateResponsePayload).UniqueIdentifier
	ask(&payloads.GetRequestPayload{UniqueIdentifier: id})
	req := request(1, &payloads.GetRequestPayload{UniqueIdentifier: id})
	wire := ttlv.MarshalTTLV(&req)
	b.ReportAllocs()
	for b.Loop() {
		e, _ := s.answer(b.Context(), "bench", open, wire)
		s.release(e)
	}
}

func BenchmarkCreate(b *testing.B) {
	s := serve(b, Options{})
	req := request(1, createAES())
	wire := ttlv.MarshalTTLV(&req)
	for _, clients := range []int{1, 64} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			parallel(b, clients, func() (func(), func()) {
				c := connect(b, s, tls.VersionTLS13)
				return func() { exchange(b, c, wire) }, func() { c.Close() }
			})
		})
	}
}
