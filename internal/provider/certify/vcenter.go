package certify

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kmipc"
)

const asVCenter = "vCenter"

// What vCenter calls the keys that it makes. The values say what they are, for
// whoever finds a test key that was left.
func vmTags() []kmip.Attribute {
	return []kmip.Attribute{
		tag("x-Product_Version", "7.0.3 build-19480866"), tag("x-Vendor", "VMware, Inc."), tag("x-Product", "VMware vSphere"),
	}
}

func hostTags() []kmip.Attribute {
	return []kmip.Attribute{
		tag("x-Identifier", "mortise-certify"), tag("x-Component", "ESXi Server"), tag("x-Name", "mortise-certify.example.com"),
	}
}

func tag(name, value string) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeName(name), AttributeValue: value}
}

// action opens a connection as vCenter opens each: with an empty
// DiscoverVersions.
func (r *run) action(ctx context.Context) (*kmipc.Link, error) {
	l, err := r.dial(ctx, 0)
	if err != nil {
		return nil, err
	}
	if _, err := r.discover(ctx, l); err != nil {
		l.Close()
		return nil, fmt.Errorf("DiscoverVersions, with which each connection begins: %w", err)
	}
	return l, nil
}

func (r *run) discover(ctx context.Context, l *kmipc.Link) ([]kmip.ProtocolVersion, error) {
	a, err := ask[payloads.DiscoverVersionsResponsePayload](ctx, r, l, kmip.V1_1, &payloads.DiscoverVersionsRequestPayload{})
	if err != nil {
		return nil, err
	}
	return a.ProtocolVersion, nil
}

// vcenter plays what vCenter does: the health poll, registering the provider,
// and for a VM's key and a host's key: create, tag, fetch.
func (r *run) vcenter(ctx context.Context) {
	r.healthPoll(ctx)
	r.register(ctx)
	vm := r.create(ctx, "create a VM's key")
	r.tag(ctx, "tag a VM's key", vm, vmTags())
	first := r.fetch(ctx, "fetch the key for a host", vm)
	again := r.fetch(ctx, "fetch it again after a host's restart", vm)
	if first != nil && again != nil && *first != *again {
		r.step(asVCenter, "the same key twice", func(s *Step) {
			s.fails("VMs that it encrypted cannot be opened again", "do not use this server", "two Gets of one key gave different bytes")
		})
	}
	host := r.create(ctx, "create a host's key")
	r.tag(ctx, "tag a host's key", host, hostTags())
	r.fetch(ctx, "fetch the host's key", host)
	r.herd(ctx, vm)
}

func (r *run) healthPoll(ctx context.Context) {
	r.step(asVCenter, "health poll: a connection without a message", func(s *Step) {
		l, err := r.dial(ctx, 0)
		if err != nil {
			s.fails(`it shows the server as "not connected" every five minutes`, mendConnection(err), "%s", describe(err))
			return
		}
		l.Close()
		s.works("is borne")
	})
	r.step(asVCenter, "health poll: DiscoverVersions twice on a connection", func(s *Step) {
		l, err := r.dial(ctx, 0)
		if err != nil {
			s.fails(`it shows the server as "not connected"`, mendConnection(err), "%s", describe(err))
			return
		}
		defer l.Close()
		list, err := r.discover(ctx, l)
		if err == nil {
			_, err = r.discover(ctx, l)
		}
		if err != nil {
			s.fails(`it shows the server as "not connected"`, "the server must answer DiscoverVersions of KMIP 1.1, and keep the connection open after it", "%s", describe(err))
			return
		}
		r.take(s, list)
	})
}

// take judges the server's list of versions.
func (r *run) take(s *Step, list []kmip.ProtocolVersion) {
	has11, sorted := false, true
	for i, v := range list {
		r.report.Versions = append(r.report.Versions, versionName(v))
		if v == kmip.V1_1 {
			has11 = true
		}
		if v.ProtocolVersionMajor == 1 && v.ProtocolVersionMinor <= 4 && less(r.best, v) {
			r.best = v
		}
		if i > 0 && less(list[i-1], v) {
			sorted = false
		}
	}
	found := "KMIP " + strings.Join(r.report.Versions, ", ")
	switch {
	case len(list) == 0:
		s.deviates("it speaks 1.1 whatever is listed", "", "no version is listed")
	case !has11:
		s.fails("it speaks KMIP 1.1 and no other", "allow KMIP 1.1 at the server", "%s", found)
	case !sorted:
		s.deviates("it speaks 1.1 wherever it stands in the list", "", "%s: not the most preferred first (KMIP 1.1 §4.26)", found)
	default:
		s.works("%s", found)
	}
}

func less(a, b kmip.ProtocolVersion) bool {
	return a.ProtocolVersionMajor < b.ProtocolVersionMajor || a.ProtocolVersionMajor == b.ProtocolVersionMajor && a.ProtocolVersionMinor < b.ProtocolVersionMinor
}

func (r *run) register(ctx context.Context) {
	r.step(asVCenter, "register the provider: Query", func(s *Step) {
		l, err := r.action(ctx)
		if err != nil {
			s.fails("it cannot add the provider", "", "%s", describe(err))
			return
		}
		defer l.Close()
		q, err := ask[payloads.QueryResponsePayload](ctx, r, l, kmip.V1_1, &payloads.QueryRequestPayload{
			QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation},
		})
		if err != nil {
			s.deviates("it adds the provider and does not show who made the server", "the server should answer Query (KMIP 1.1 §4.25)", "%s", describe(err))
			return
		}
		r.report.Vendor = describe(errors.New(q.VendorIdentification))
		s.works("vendor %q", r.report.Vendor)
	})
}

// create makes a key and returns its id, "" if there is none.
func (r *run) create(ctx context.Context, name string) (id string) {
	const then = `encrypting fails: "Cannot generate key"`
	r.step(asVCenter, name, func(s *Step) {
		l, err := r.action(ctx)
		if err != nil {
			s.fails(then, "", "%s", describe(err))
			return
		}
		defer l.Close()
		a, err := ask[payloads.CreateResponsePayload](ctx, r, l, kmip.V1_1, createKey())
		switch {
		case err != nil:
			s.fails(then, "the server must make AES-256 keys for this client from algorithm, usage mask (Encrypt, Decrypt) and length alone: without a name, a group or a policy", "%s", describe(err))
		case a.UniqueIdentifier == "":
			s.fails(then, "the server must answer with the key's identifier", "no identifier")
		default:
			id = a.UniqueIdentifier
			r.keys = append(r.keys, id)
			if strings.TrimSpace(id) != id || len(id) > 100 {
				s.deviates("it stores the identifier as it is", "", "%.120q", id)
				return
			}
			s.works("%s", id)
		}
	})
	return id
}

func createKey(more ...kmip.Attribute) *payloads.CreateRequestPayload {
	return &payloads.CreateRequestPayload{
		ObjectType: kmip.ObjectTypeSymmetricKey,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: append([]kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(256)},
		}, more...)},
	}
}

// tag looks for attributes that a new key does not have, a message each, and
// adds all three in one message.
func (r *run) tag(ctx context.Context, name, id string, tags []kmip.Attribute) {
	if id == "" {
		r.skip(asVCenter, name, "there is no key")
		return
	}
	r.step(asVCenter, name+": look for tags that it lacks", func(s *Step) {
		const then = "it stops before it tags the key; the key can be used all the same"
		const mend = "the server should answer GetAttributes for an x- attribute that the key lacks with success and nothing (KMIP 1.1 §4.12)"
		l, err := r.action(ctx)
		if err != nil {
			s.fails("encrypting fails", "", "%s", describe(err))
			return
		}
		defer l.Close()
		for _, t := range tags {
			a, err := ask[payloads.GetAttributesResponsePayload](ctx, r, l, kmip.V1_1, getAttributes(id, t.AttributeName))
			if err != nil {
				s.deviates(then, mend, "%s: %s", t.AttributeName, describe(err))
				return
			}
			if len(a.Attribute) > 0 {
				s.deviates("it takes the key for tagged already", mend, "%s: %d values of a key just made", t.AttributeName, len(a.Attribute))
				return
			}
		}
		s.works("success, and nothing in it")
	})
	kept := r.step(asVCenter, name+": three AddAttribute in a message", func(s *Step) {
		const then = "it goes on; its keys cannot be told from others at the server"
		const mend = "the server should keep custom attributes (AddAttribute of x- names)"
		l, err := r.action(ctx)
		if err != nil {
			s.fails("encrypting fails", "", "%s", describe(err))
			return
		}
		defer l.Close()
		var ops []kmip.OperationPayload
		for _, t := range tags {
			ops = append(ops, &payloads.AddAttributeRequestPayload{UniqueIdentifier: id, Attribute: t})
		}
		items, err := r.send(ctx, l, kmip.V1_1, ops...)
		if err != nil {
			s.deviates(then, mend, "%s", describe(err))
			return
		}
		for _, item := range items {
			if err := resultError(item); err != nil {
				s.deviates(then, mend, "%s", describe(err))
				return
			}
		}
		for i, item := range items {
			if want := fmt.Sprintf("QLKC%d", r.items-len(items)+1+i); string(item.UniqueBatchItemID) != want {
				s.deviates("it goes by the items' order", "the server should return each item's batch item id", "item %d is called %.40q, not %s", i+1, item.UniqueBatchItemID, want)
				return
			}
		}
		s.works("are kept")
	})
	if kept == Works {
		r.step(asVCenter, name+": read the tags back", func(s *Step) { r.readTags(ctx, s, id, tags) })
	}
}

func (r *run) readTags(ctx context.Context, s *Step, id string, tags []kmip.Attribute) {
	const then, mend = "it goes on; its keys cannot be told from others at the server", "the server says success and should keep what it was given"
	l, err := r.action(ctx)
	if err != nil {
		s.fails("encrypting fails", "", "%s", describe(err))
		return
	}
	defer l.Close()
	for _, t := range tags {
		a, err := ask[payloads.GetAttributesResponsePayload](ctx, r, l, kmip.V1_1, getAttributes(id, t.AttributeName))
		if err != nil {
			s.deviates(then, mend, "%s: %s", t.AttributeName, describe(err))
			return
		}
		if len(a.Attribute) != 1 || text(a.Attribute[0].AttributeValue) != t.AttributeValue {
			s.deviates(then, mend, "%s is not what was added", t.AttributeName)
			return
		}
	}
	s.works("as they were added")
}

// text is the value of a custom attribute of text type.
func text(v any) any {
	if c, ok := v.(ttlv.Value); ok {
		return c.Value
	}
	return v
}

func getAttributes(id string, names ...kmip.AttributeName) *payloads.GetAttributesRequestPayload {
	return &payloads.GetAttributesRequestPayload{UniqueIdentifier: id, AttributeName: names}
}

// digest stands for a key's bytes, which are compared and not kept.
type digest = [sha256.Size]byte

// fetch gets a key as vCenter does before it pushes it to a host: its bytes, its
// state, and Activate when it is Pre-Active.
func (r *run) fetch(ctx context.Context, name, id string) (sum *digest) {
	const then = `power-on fails: "Cannot get key"`
	if id == "" {
		r.skip(asVCenter, name, "there is no key")
		return nil
	}
	var state kmip.State
	got := r.step(asVCenter, name+": Get and state", func(s *Step) {
		l, err := r.action(ctx)
		if err != nil {
			s.fails(then, "", "%s", describe(err))
			return
		}
		defer l.Close()
		a, err := ask[payloads.GetResponsePayload](ctx, r, l, kmip.V1_1, &payloads.GetRequestPayload{UniqueIdentifier: id})
		if err != nil {
			s.fails(then, "the server must give this client the bytes of keys that it made, without wrapping", "Get: %s", describe(err))
			return
		}
		if sum, err = rawAES256(a); err != nil {
			s.fails(then, "the server must answer Get with the 32 bytes of an AES key in Raw format", "Get: %s", describe(err))
			return
		}
		if state, err = r.state(ctx, l, kmip.V1_1, id); err != nil {
			s.fails(then, "the server must answer GetAttributes(State)", "GetAttributes(State): %s", describe(err))
			return
		}
		s.works("Raw AES, 256 bits; %s", ttlv.EnumStr(state))
	})
	if got == Fails {
		return nil
	}
	switch state {
	case kmip.StateActive:
		return sum
	case kmip.StatePreActive:
	default:
		r.step(asVCenter, name+": usable state", func(s *Step) {
			s.fails(then, "a new key must be Pre-Active or Active", "the key is %s", ttlv.EnumStr(state))
		})
		return nil
	}
	r.step(asVCenter, name+": activate", func(s *Step) {
		l, err := r.action(ctx)
		if err != nil {
			s.fails(then, "", "%s", describe(err))
			return
		}
		defer l.Close()
		if _, err := ask[payloads.ActivateResponsePayload](ctx, r, l, kmip.V1_1, &payloads.ActivateRequestPayload{UniqueIdentifier: id}); err != nil {
			s.fails(then, "the server must let this client activate the keys that it made", "Activate: %s", describe(err))
			return
		}
		switch state, err := r.state(ctx, l, kmip.V1_1, id); {
		case err != nil:
			s.fails(then, "the server must answer GetAttributes(State)", "GetAttributes(State): %s", describe(err))
		case state != kmip.StateActive:
			s.fails(then, "the server says success and must activate the key", "after Activate the key is %s", ttlv.EnumStr(state))
		default:
			s.works("Active")
		}
	})
	return sum
}

// state asks for a key's State attribute.
func (r *run) state(ctx context.Context, l *kmipc.Link, v kmip.ProtocolVersion, id string) (kmip.State, error) {
	a, err := ask[payloads.GetAttributesResponsePayload](ctx, r, l, v, getAttributes(id, kmip.AttributeNameState))
	if err != nil {
		return 0, err
	}
	for _, attr := range a.Attribute {
		if s, ok := attr.AttributeValue.(kmip.State); ok {
			return s, nil
		}
	}
	return 0, &oddError{"no state in the answer"}
}

// rawAES256 checks the form of a key and returns the digest of its bytes, which
// it wipes.
func rawAES256(a *payloads.GetResponsePayload) (*digest, error) {
	key, ok := a.Object.(*kmip.SymmetricKey)
	if !ok || a.ObjectType != kmip.ObjectTypeSymmetricKey {
		return nil, &oddError{"it is no symmetric key"}
	}
	b := &key.KeyBlock
	if b.KeyFormatType != kmip.KeyFormatTypeRaw || b.KeyValue == nil {
		return nil, &oddError{"it is not in Raw format"}
	}
	material, err := key.KeyMaterial()
	if err != nil {
		return nil, &oddError{"it is not in Raw format"}
	}
	defer clear(material)
	switch {
	case b.KeyWrappingData != nil:
		return nil, &oddError{"it is wrapped"}
	case b.CryptographicAlgorithm != 0 && b.CryptographicAlgorithm != kmip.CryptographicAlgorithmAES:
		return nil, &oddError{"it is a key for " + ttlv.EnumStr(b.CryptographicAlgorithm)}
	case len(material) != 32:
		return nil, &oddError{fmt.Sprintf("it has %d bytes, not 32", len(material))}
	}
	sum := sha256.Sum256(material)
	return &sum, nil
}

// herdSize is how many connections a small boot of vSAN hosts opens at once.
const herdSize = 20

// herd fetches a key on many connections at once: vSAN's hosts go to the key
// server themselves, all with one certificate.
func (r *run) herd(ctx context.Context, id string) {
	name := fmt.Sprintf("vSAN: %d hosts boot at once with one certificate", herdSize)
	if id == "" {
		r.skip(asVCenter, name, "there is no key")
		return
	}
	r.step(asVCenter, name, func(s *Step) {
		results := make(chan error, herdSize)
		for range herdSize {
			go func() { results <- r.oneOfHerd(ctx, id) }()
		}
		var last error
		failed := 0
		for range herdSize {
			if err := <-results; err != nil {
				failed++
				last = err
			}
		}
		if failed > 0 {
			s.fails("vSAN hosts mount their encrypted disk groups late or not at all", "raise the server's limit on connections, of one client too", "%d of %d failed: %s", failed, herdSize, describe(last))
			return
		}
		s.works("all are served")
	})
}

func (r *run) oneOfHerd(ctx context.Context, id string) error {
	l, err := r.dial(ctx, 0)
	if err != nil {
		return err
	}
	defer l.Close()
	p, err := l.Ask(ctx, kmip.V1_1, &payloads.GetRequestPayload{UniqueIdentifier: id})
	if err != nil {
		return err
	}
	a, ok := p.(*payloads.GetResponsePayload)
	if !ok {
		return &oddError{"the answer has another operation's payload"}
	}
	_, err = rawAES256(a)
	return err
}
