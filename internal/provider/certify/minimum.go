package certify

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kmipc"
)

const certified = "certified minimum"

// minimum tries the operations that certified key servers offer VMware's
// products, in the best version that the server speaks: Create, Locate, Get,
// GetAttributes, AddAttribute, Activate, Revoke, Destroy, DiscoverVersions.
func (r *run) minimum(ctx context.Context) {
	r.step(certified, "KMIP 1.4", func(s *Step) {
		if r.best == kmip.V1_4 {
			s.works("is spoken")
			return
		}
		s.deviates("it speaks 1.1", "", "the best version listed is %s", versionName(r.best))
	})
	v := r.best
	if v == (kmip.ProtocolVersion{}) {
		v = kmip.V1_1
	}
	l, err := r.dial(ctx, 0)
	if err != nil {
		r.step(certified, "connect", func(s *Step) { s.fails("it cannot use the server", mendConnection(err), "%s", describe(err)) })
		return
	}
	defer l.Close()
	m := &minimum{run: r, l: l, v: v, name: fmt.Sprintf("mortise-certify-%d", r.cfg.Now().UnixNano())}
	m.create(ctx)
	if m.id == "" {
		r.skip(certified, "Locate, Get, GetAttributes, AddAttribute, Activate, Revoke, Destroy", "there is no key")
		return
	}
	m.locate(ctx)
	m.readAndTag(ctx)
	m.end(ctx)
}

// minimum is one key's way through the operations, on one connection.
type minimum struct {
	*run
	l    *kmipc.Link
	v    kmip.ProtocolVersion
	name string // of the key
	id   string
}

func (m *minimum) create(ctx context.Context) {
	m.step(certified, "Create with a Name", func(s *Step) {
		a, err := ask[payloads.CreateResponsePayload](ctx, m.run, m.l, m.v, createKey(nameOf(m.name)))
		if err != nil {
			s.fails("products that name their keys cannot make any", "the server must take a Name with Create", "%s", describe(err))
			return
		}
		m.id = a.UniqueIdentifier
		m.keys = append(m.keys, m.id)
		s.works("%s", m.id)
	})
}

func nameOf(name string) kmip.Attribute {
	return kmip.Attribute{AttributeName: kmip.AttributeNameName, AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString}}
}

// locate also looks for a name that no key has: a server that ignores the
// filter would give away any key for the one that was meant.
func (m *minimum) locate(ctx context.Context) {
	find := func(name string) ([]string, error) {
		a, err := ask[payloads.LocateResponsePayload](ctx, m.run, m.l, m.v, &payloads.LocateRequestPayload{
			Attribute: []kmip.Attribute{nameOf(name), {AttributeName: kmip.AttributeNameObjectType, AttributeValue: kmip.ObjectTypeSymmetricKey}},
		})
		if err != nil {
			return nil, err
		}
		return a.UniqueIdentifier, nil
	}
	m.step(certified, "Locate by Name", func(s *Step) {
		const then = "vCenter never locates keys; other products may make a new key each time, or use a wrong one"
		ids, err := find(m.name)
		if err != nil {
			s.deviates(then, "the server should find keys by Name and Object Type", "%s", describe(err))
			return
		}
		if len(ids) != 1 || ids[0] != m.id {
			s.deviates(then, "the server should find exactly the key of that Name", "%d keys, not the one made", len(ids))
			return
		}
		if ids, err = find(m.name + "-none"); err != nil || len(ids) > 0 {
			s.deviates(then, "the server must not ignore what it is asked for", "a name that no key has finds %d keys", len(ids))
			return
		}
		s.works("finds the key and no other")
	})
}

func (m *minimum) readAndTag(ctx context.Context) {
	m.step(certified, "Get", func(s *Step) {
		a, err := ask[payloads.GetResponsePayload](ctx, m.run, m.l, m.v, &payloads.GetRequestPayload{UniqueIdentifier: m.id, KeyFormatType: kmip.KeyFormatTypeRaw})
		if err == nil {
			_, err = rawAES256(a)
		}
		if err != nil {
			s.fails("it cannot use the key", "the server must answer Get with Raw AES", "%s", describe(err))
			return
		}
		s.works("Raw AES, 256 bits")
	})
	m.step(certified, "GetAttributes", func(s *Step) {
		a, err := ask[payloads.GetAttributesResponsePayload](ctx, m.run, m.l, m.v, getAttributes(m.id))
		if err != nil {
			s.fails("it cannot see a key's state", "the server must answer GetAttributes", "%s", describe(err))
			return
		}
		var missing []string
		for _, want := range []kmip.AttributeName{
			kmip.AttributeNameObjectType, kmip.AttributeNameState, kmip.AttributeNameCryptographicAlgorithm, kmip.AttributeNameCryptographicLength,
			kmip.AttributeNameCryptographicUsageMask, kmip.AttributeNameInitialDate, kmip.AttributeNameName,
		} {
			if !hasAttribute(a.Attribute, want) {
				missing = append(missing, string(want))
			}
		}
		if len(missing) > 0 {
			s.deviates("it asks for State alone", "", "of a key's %d attributes these are missing: %s", len(a.Attribute), strings.Join(missing, ", "))
			return
		}
		s.works("%d attributes", len(a.Attribute))
	})
	m.step(certified, "AddAttribute", func(s *Step) {
		_, err := ask[payloads.AddAttributeResponsePayload](ctx, m.run, m.l, m.v, &payloads.AddAttributeRequestPayload{UniqueIdentifier: m.id, Attribute: tag("x-Vendor", "Mortise")})
		if err != nil {
			s.deviates("it goes on; its keys cannot be told from others at the server", "the server should keep custom attributes", "%s", describe(err))
			return
		}
		s.works("is kept")
	})
	m.step(certified, "Activate", func(s *Step) {
		if state, err := m.state(ctx, m.l, m.v, m.id); err == nil && state == kmip.StateActive {
			s.works("the key was Active already")
			return
		}
		if _, err := ask[payloads.ActivateResponsePayload](ctx, m.run, m.l, m.v, &payloads.ActivateRequestPayload{UniqueIdentifier: m.id}); err != nil {
			s.fails(`power-on fails: "Cannot get key"`, "the server must let this client activate its keys", "%s", describe(err))
			return
		}
		s.works("Active")
	})
}

func hasAttribute(list []kmip.Attribute, name kmip.AttributeName) bool {
	for _, a := range list {
		if a.AttributeName == name {
			return true
		}
	}
	return false
}

// end revokes and destroys the key. A certificate that may not do that is no
// failing: VMware's products never destroy a key.
func (m *minimum) end(ctx context.Context) {
	const then = "it never revokes or destroys keys; they pile up until an administrator removes them"
	denied := m.step(certified, "Revoke", func(s *Step) {
		err := m.revoke(ctx, m.l, m.v, m.id)
		switch {
		case isReason(err, kmip.ResultReasonPermissionDenied):
			s.deviates(then, "none needed: it is safer so", "this certificate may not revoke: %s", describe(err))
		case err != nil:
			s.deviates(then, "the server should let an administrator revoke keys", "%s", describe(err))
		default:
			if state, err := m.state(ctx, m.l, m.v, m.id); err != nil || state != kmip.StateDeactivated {
				s.deviates("a revoked key may still be used to encrypt", "the server says success and should deactivate the key", "after Revoke the key is %s", ttlv.EnumStr(state))
				return
			}
			s.works("Deactivated")
		}
	}) != Works
	m.step(certified, "Destroy", func(s *Step) {
		if m.cfg.Keep {
			s.works("not tried: the test keys are kept")
			return
		}
		err := m.destroy(ctx, m.l, m.v, m.id)
		switch {
		case err != nil && denied:
			s.deviates(then, "none needed: it is safer so", "a key that cannot be revoked is not destroyed: %s", describe(err))
		case err != nil:
			s.deviates(then, "the server should let an administrator destroy keys", "%s", describe(err))
		default:
			_, err := ask[payloads.GetResponsePayload](ctx, m.run, m.l, m.v, &payloads.GetRequestPayload{UniqueIdentifier: m.id})
			if err == nil {
				s.fails("a destroyed key is still handed out", "the server must not serve a destroyed key", "Get after Destroy succeeds")
				return
			}
			s.works("and is not served any more")
		}
	})
}

func (r *run) revoke(ctx context.Context, l *kmipc.Link, v kmip.ProtocolVersion, id string) error {
	_, err := ask[payloads.RevokeResponsePayload](ctx, r, l, v, &payloads.RevokeRequestPayload{
		UniqueIdentifier: id,
		RevocationReason: kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeCessationOfOperation},
	})
	return err
}

// destroy takes the key from the list of those to clean up, if it succeeds.
func (r *run) destroy(ctx context.Context, l *kmipc.Link, v kmip.ProtocolVersion, id string) error {
	_, err := ask[payloads.DestroyResponsePayload](ctx, r, l, v, &payloads.DestroyRequestPayload{UniqueIdentifier: id})
	if err != nil {
		return err
	}
	var rest []string
	for _, k := range r.keys {
		if k != id {
			rest = append(rest, k)
		}
	}
	r.keys = rest
	return nil
}

// cleanUp destroys the test keys, also when the run was interrupted, and reports
// those that stay.
func (r *run) cleanUp(ctx context.Context) {
	if len(r.keys) == 0 {
		return
	}
	if r.cfg.Keep {
		r.report.Left = r.keys
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*r.cfg.Timeout+5*time.Second)
	defer cancel()
	var why error
	for _, id := range append([]string(nil), r.keys...) {
		if err := r.remove(ctx, id); err != nil {
			why = err
		}
	}
	if len(r.keys) == 0 {
		return
	}
	r.report.Left = r.keys
	r.step("clean-up", "destroy the test keys", func(s *Step) {
		s.deviates("", "have an administrator of the server destroy them", "%d test keys stay: %s", len(r.keys), describe(why))
	})
}

func (r *run) remove(ctx context.Context, id string) error {
	l, err := r.dial(ctx, 0)
	if err != nil {
		return err
	}
	defer l.Close()
	revokeErr := r.revoke(ctx, l, kmip.V1_1, id) // fails for a key that was never Active, which is no matter
	if err := r.destroy(ctx, l, kmip.V1_1, id); err != nil {
		return errors.Join(err, revokeErr)
	}
	return nil
}
