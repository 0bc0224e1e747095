// Package vcenter replays what a vCenter 7.0.3 sends a key server, and what the
// hosts of a vSAN cluster send when they all start at once, against the built
// program. The messages are those of traces of vCenter against PyKMIP.
package vcenter

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/test/kmsproc"
)

var programs, _ = os.MkdirTemp("", "mtsb")

var built = sync.OnceValues(func() (string, error) { return kmsproc.Build(programs) })

func TestMain(m *testing.M) {
	code := m.Run()
	os.RemoveAll(programs)
	os.Exit(code)
}

// server starts a key server and lets one client in, in the role that
// `mortise kms client add` gives.
func server(t *testing.T) *vcenter {
	t.Helper()
	dir, err := os.MkdirTemp("", "mtsv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin, err := built()
	if err != nil {
		t.Fatal(err)
	}
	s, err := kmsproc.New(bin, dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Errorf("stopping the server: %v", err)
		}
		if t.Failed() {
			t.Log(s.Log())
		}
	})
	client, err := s.Client(t.Context(), "vcenter", "")
	if err != nil {
		t.Fatal(err)
	}
	return &vcenter{t: t, s: s, client: client}
}

type vcenter struct {
	t       *testing.T
	s       *kmsproc.Server
	client  kmsproc.Client
	version uint16 // of TLS
	counter atomic.Int64
}

func (v *vcenter) dial() (net.Conn, error) {
	cfg := v.s.TLS(v.client)
	cfg.MinVersion, cfg.MaxVersion = v.version, v.version
	return tls.DialWithDialer(&net.Dialer{Timeout: 30 * time.Second}, "tcp", v.s.Address, cfg)
}

// message is one of vCenter's: version 1.1, no time stamp, no authentication,
// batch item ids "QLKC" and a counter.
func (v *vcenter) message(list ...kmip.OperationPayload) kmip.RequestMessage {
	m := kmip.RequestMessage{Header: kmip.RequestHeader{ProtocolVersion: kmip.V1_1, BatchCount: int32(len(list))}}
	for _, p := range list {
		m.BatchItem = append(m.BatchItem, kmip.RequestBatchItem{
			Operation: p.Operation(), UniqueBatchItemID: fmt.Appendf(nil, "QLKC%d", v.counter.Add(1)), RequestPayload: p,
		})
	}
	return m
}

func (v *vcenter) send(c net.Conn, list ...kmip.OperationPayload) ([]kmip.OperationPayload, error) {
	request := v.message(list...)
	raw, err := kmsproc.RoundTrip(c, ttlv.MarshalTTLV(&request))
	if err != nil {
		return nil, err
	}
	var m kmip.ResponseMessage
	if err := ttlv.UnmarshalTTLV(raw, &m); err != nil {
		return nil, err
	}
	if m.Header.ProtocolVersion != kmip.V1_1 || int(m.Header.BatchCount) != len(list) || len(m.BatchItem) != len(list) {
		return nil, fmt.Errorf("header %+v with %d items answers %d", m.Header, len(m.BatchItem), len(list))
	}
	var answers []kmip.OperationPayload
	for i, it := range m.BatchItem {
		switch {
		case it.Err() != nil:
			return nil, fmt.Errorf("item %d: %w", i, it.Err())
		case it.Operation != request.BatchItem[i].Operation || !bytes.Equal(it.UniqueBatchItemID, request.BatchItem[i].UniqueBatchItemID):
			return nil, fmt.Errorf("item %d is the answer to another: %+v", i, it)
		}
		answers = append(answers, it.ResponsePayload)
	}
	return answers, nil
}

// action is a connection of its own: an empty DiscoverVersions, then messages.
func (v *vcenter) action(messages ...[]kmip.OperationPayload) ([]kmip.OperationPayload, error) {
	c, err := v.dial()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	hello, err := v.send(c, &payloads.DiscoverVersionsRequestPayload{})
	if err != nil {
		return nil, err
	}
	if known := hello[0].(*payloads.DiscoverVersionsResponsePayload).ProtocolVersion; len(known) != 5 || known[0] != kmip.V1_4 {
		return nil, fmt.Errorf("DiscoverVersions: %v, want the most preferred first", known)
	}
	var all []kmip.OperationPayload
	for _, m := range messages {
		answers, err := v.send(c, m...)
		if err != nil {
			return nil, err
		}
		all = append(all, answers...)
	}
	return all, nil
}

func (v *vcenter) must(messages ...[]kmip.OperationPayload) []kmip.OperationPayload {
	v.t.Helper()
	answers, err := v.action(messages...)
	if err != nil {
		v.t.Fatal(err)
	}
	return answers
}

type message = []kmip.OperationPayload

func text(name, value string) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeName(name), AttributeValue: value}
}

func attributesOf(id string, name kmip.AttributeName) message {
	return message{&payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: []kmip.AttributeName{name}}}
}

// TestTraffic is the table of vCenter's actions, in their order.
func TestTraffic(t *testing.T) {
	v := server(t)
	for _, v.version = range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(v.version), func(t *testing.T) { v.t = t; v.traffic() })
	}
}

func (v *vcenter) traffic() {
	t := v.t
	// Register the provider.
	about := v.must(message{&payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation}}})
	if about[0].(*payloads.QueryResponsePayload).VendorIdentification == "" {
		t.Error("Query tells no vendor")
	}
	v.poll()
	for _, tags := range [][]kmip.Attribute{
		{text("x-Product_Version", "7.0.3 build-21477706"), text("x-Vendor", "VMware, Inc."), text("x-Product", "VMware vSphere")},
		{text("x-Identifier", "host-1015"), text("x-Component", "ESXi Server"), text("x-Name", "esx1.example.com")},
	} {
		id, key := v.create()
		v.tag(id, tags)
		v.fetch(id, key, kmip.StatePreActive)
		v.fetch(id, key, kmip.StateActive) // the second time there is nothing to activate
		v.poll()
	}
}

// poll is the look at the server's health every 300 s: a connection on which
// nothing is said, and one with DiscoverVersions twice.
func (v *vcenter) poll() {
	v.t.Helper()
	raw, err := net.Dial("tcp", v.s.Address)
	if err != nil {
		v.t.Fatal(err)
	}
	raw.Close()
	silent, err := v.dial()
	if err != nil {
		v.t.Fatal(err)
	}
	silent.Close()
	v.must(message{&payloads.DiscoverVersionsRequestPayload{}})
}

// create makes a KEK: no name, no activation date.
func (v *vcenter) create() (id string, key []byte) {
	v.t.Helper()
	made := v.must(message{&payloads.CreateRequestPayload{
		ObjectType: kmip.ObjectTypeSymmetricKey,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		}},
	}})
	id = made[0].(*payloads.CreateResponsePayload).UniqueIdentifier
	return id, v.get(id)
}

func (v *vcenter) get(id string) []byte {
	v.t.Helper()
	answer := v.must(message{&payloads.GetRequestPayload{UniqueIdentifier: id}})[0].(*payloads.GetResponsePayload)
	block := answer.Object.(*kmip.SymmetricKey).KeyBlock
	if answer.UniqueIdentifier != id || block.KeyFormatType != kmip.KeyFormatTypeRaw || block.CryptographicAlgorithm != kmip.CryptographicAlgorithmAES || block.CryptographicLength != 256 {
		v.t.Errorf("Get: %+v", block)
	}
	key, err := block.GetBytes()
	if err != nil || len(key) != 32 {
		v.t.Fatalf("a key of %d bytes: %v", len(key), err)
	}
	return key
}

// tag asks for each attribute, which the key lacks, in messages of their own, and
// adds them all in one.
func (v *vcenter) tag(id string, tags []kmip.Attribute) {
	v.t.Helper()
	var ask []message
	var adds message
	for _, a := range tags {
		ask = append(ask, attributesOf(id, a.AttributeName))
		adds = append(adds, &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: a})
	}
	for i, p := range v.must(ask...) {
		if got := p.(*payloads.GetAttributesResponsePayload); got.UniqueIdentifier != id || len(got.Attribute) != 0 {
			v.t.Errorf("attribute %d, which is not there: %+v", i, got)
		}
	}
	v.must(adds)
	for i, p := range v.must(ask...) {
		got := p.(*payloads.GetAttributesResponsePayload).Attribute
		if len(got) != 1 || fmt.Sprint(got[0].AttributeValue.(ttlv.Value).Value) != tags[i].AttributeValue {
			v.t.Errorf("after tagging with %v: %+v", tags[i], got)
		}
	}
}

// fetch gets a KEK, asks for its state, and activates it if it is Pre-Active.
func (v *vcenter) fetch(id string, key []byte, want kmip.State) {
	v.t.Helper()
	if !bytes.Equal(v.get(id), key) {
		v.t.Error("the key is another one")
	}
	state := v.must(attributesOf(id, kmip.AttributeNameState))[0].(*payloads.GetAttributesResponsePayload).Attribute[0].AttributeValue
	if state != want {
		v.t.Errorf("state %v, want %v", state, want)
	}
	if state == kmip.StatePreActive {
		v.must(message{&payloads.ActivateRequestPayload{UniqueIdentifier: id}})
	}
}

const (
	herdHosts = 1000
	herdKeys  = 20
)

// TestBootHerd: a vSAN cluster has power again. 1,000 hosts with one certificate
// connect at once, a connection each, and fetch 20 keys each.
func TestBootHerd(t *testing.T) {
	v := server(t)
	v.version = tls.VersionTLS13
	var ids []string
	want := map[string][]byte{}
	for range herdKeys {
		id, key := v.create()
		v.fetch(id, key, kmip.StatePreActive)
		ids, want[id] = append(ids, id), key
	}
	host := func(ctx context.Context) error {
		c, err := v.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := v.send(c, &payloads.DiscoverVersionsRequestPayload{}); err != nil {
			return err
		}
		for _, id := range ids {
			answers, err := v.send(c, &payloads.GetRequestPayload{UniqueIdentifier: id})
			if err != nil {
				return fmt.Errorf("key %s: %w", id, err)
			}
			block := answers[0].(*payloads.GetResponsePayload).Object.(*kmip.SymmetricKey).KeyBlock
			if key, err := block.GetBytes(); err != nil || !bytes.Equal(key, want[id]) {
				return fmt.Errorf("key %s is another one: %v", id, err)
			}
			state, err := v.send(c, attributesOf(id, kmip.AttributeNameState)...)
			if err != nil {
				return err
			}
			if s := state[0].(*payloads.GetAttributesResponsePayload).Attribute[0].AttributeValue; s != kmip.StateActive {
				return fmt.Errorf("key %s is %v", id, s)
			}
		}
		return ctx.Err()
	}
	var hosts sync.WaitGroup
	var failed atomic.Int64
	begin := time.Now()
	for i := range herdHosts {
		hosts.Go(func() {
			if err := host(t.Context()); err != nil && failed.Add(1) <= 5 {
				t.Errorf("host %d: %v", i, err)
			}
		})
	}
	hosts.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d hosts failed", n, herdHosts)
	}
	t.Logf("%d hosts have their %d keys after %v", herdHosts, herdKeys, time.Since(begin).Round(time.Millisecond))
}
