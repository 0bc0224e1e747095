package kmipd

import (
	"crypto/tls"
	"errors"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// TestResumed: a client may resume its TLS session, which saves both sides the
// signatures. Who it is comes from the ticket, so it is looked up again all the
// same: a certificate that is removed lets nobody in by an old ticket, not even to
// a listener that was there when it was made.
func TestResumed(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		b := serve(t, Options{})
		cfg := b.config(b.client, version)
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		req := request(4, &payloads.DiscoverVersionsRequestPayload{})
		wire := ttlv.MarshalTTLV(&req)
		// try connects, and asks for something if it may.
		try := func() (resumed bool, err error) {
			c, err := tls.Dial("tcp", b.addr, cfg)
			if err != nil {
				return false, err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := c.Write(wire); err != nil {
				return false, err
			}
			m, _, err := receive(c)
			if err != nil {
				return false, err
			}
			if m.BatchItem[0].ResultStatus != kmip.ResultStatusSuccess {
				return false, errors.New(m.BatchItem[0].ResultMessage)
			}
			return c.ConnectionState().DidResume, nil
		}
		if resumed, err := try(); err != nil || resumed {
			t.Fatalf("TLS %x: the first connection: resumed %v, %v", version, resumed, err)
		}
		if resumed, err := try(); err != nil || !resumed {
			t.Errorf("TLS %x: the second connection: resumed %v, %v", version, resumed, err)
		}
		if _, err := b.RemoveClient(t.Context(), kms.Actor{}, kms.DefaultInstance, pki.Thumbprint(b.client.Leaf)); err != nil {
			t.Fatal(err)
		}
		if resumed, err := try(); err == nil {
			t.Errorf("TLS %x: a removed certificate was let in; resumed %v", version, resumed)
		}
	}
}
