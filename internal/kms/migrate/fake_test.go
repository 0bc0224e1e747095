package migrate

import (
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"testing"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kmipc"
	"mortise/internal/pki"
)

// fakeSource answers Locate as a test wants it.
type fakeSource struct {
	locate func(*payloads.LocateRequestPayload) []string
}

func (f *fakeSource) start(t *testing.T) kmipc.LinkConfig {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair(t, pki.Grant{Server: true}, "fake")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(c)
		}
	}()
	return kmipc.LinkConfig{Address: l.Addr().String(), Certificate: pair(t, pki.Grant{Client: true}, "client")}
}

func (f *fakeSource) serve(c net.Conn) {
	defer c.Close()
	for {
		b := make([]byte, 8)
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		b = append(b, make([]byte, binary.BigEndian.Uint32(b[4:]))...)
		if _, err := io.ReadFull(c, b[8:]); err != nil {
			return
		}
		var req kmip.RequestMessage
		if ttlv.UnmarshalTTLV(b, &req) != nil {
			return
		}
		p, ok := req.BatchItem[0].RequestPayload.(*payloads.LocateRequestPayload)
		if !ok {
			return
		}
		resp := &kmip.ResponseMessage{Header: kmip.ResponseHeader{ProtocolVersion: req.Header.ProtocolVersion, BatchCount: 1}, BatchItem: []kmip.ResponseBatchItem{{
			Operation: kmip.OperationLocate, ResponsePayload: &payloads.LocateResponsePayload{UniqueIdentifier: f.locate(p)},
		}}}
		if _, err := c.Write(ttlv.MarshalTTLV(resp)); err != nil {
			return
		}
	}
}
