package kmipc

import (
	"context"
	"errors"
	"fmt"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/secret"
)

// kekLen is the length of a KEK in bytes: AES-256 (K1).
const kekLen = 32

// maxID bounds a key id and a name that we send, in bytes.
const maxID = 1024

// operations are the KMIP operations that a key provider needs, over whatever
// carries them out: one server, or the first that answers. Errors are *Error or
// hold several.
type operations struct {
	call func(ctx context.Context, req kmip.OperationPayload) (kmip.OperationPayload, error)
}

func do[Resp any](ctx context.Context, o operations, req kmip.OperationPayload) (*Resp, error) {
	resp, err := o.call(ctx, req)
	if err != nil {
		return nil, err
	}
	typed, ok := any(resp).(*Resp)
	if !ok {
		return nil, badAnswer(req.Operation(), "a payload of another operation")
	}
	return typed, nil
}

// badAnswer is an error about a well-formed answer that makes no sense.
func badAnswer(op kmip.Operation, format string, args ...any) error {
	return fmt.Errorf("%s: %w: %s", ttlv.EnumStr(op), ErrProtocol, fmt.Sprintf(format, args...))
}

// Create makes an AES-256 key that may encrypt and decrypt, with a Name, and
// returns its id. The key is Pre-Active. Names are not unique at most servers:
// Locate first.
func (o operations) Create(ctx context.Context, name string) (id string, err error) {
	if err := checkText("name", name); err != nil {
		return "", err
	}
	resp, err := do[payloads.CreateResponsePayload](ctx, o, &payloads.CreateRequestPayload{
		ObjectType: kmip.ObjectTypeSymmetricKey,
		TemplateAttribute: kmip.TemplateAttribute{Attribute: []kmip.Attribute{
			{AttributeName: kmip.AttributeNameCryptographicAlgorithm, AttributeValue: kmip.CryptographicAlgorithmAES},
			{AttributeName: kmip.AttributeNameCryptographicLength, AttributeValue: int32(8 * kekLen)},
			{AttributeName: kmip.AttributeNameCryptographicUsageMask, AttributeValue: kmip.CryptographicUsageEncrypt | kmip.CryptographicUsageDecrypt},
			nameAttribute(name),
		}},
	})
	if err != nil {
		return "", err
	}
	if resp.ObjectType != kmip.ObjectTypeSymmetricKey || checkText("key id", resp.UniqueIdentifier) != nil {
		return "", badAnswer(kmip.OperationCreate, "no usable id of a symmetric key")
	}
	return resp.UniqueIdentifier, nil
}

func nameAttribute(name string) kmip.Attribute {
	return kmip.Attribute{
		AttributeName:  kmip.AttributeNameName,
		AttributeValue: kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString},
	}
}

// Locate returns the ids of at most max symmetric keys of that Name. A server
// may ignore what it does not understand: check the names of what it returns.
func (o operations) Locate(ctx context.Context, name string, max int) ([]string, error) {
	if err := checkText("name", name); err != nil {
		return nil, err
	}
	resp, err := do[payloads.LocateResponsePayload](ctx, o, &payloads.LocateRequestPayload{
		MaximumItems: int32(max),
		Attribute: []kmip.Attribute{
			nameAttribute(name),
			{AttributeName: kmip.AttributeNameObjectType, AttributeValue: kmip.ObjectTypeSymmetricKey},
		},
	})
	if err != nil {
		return nil, err
	}
	ids := resp.UniqueIdentifier
	for _, id := range ids {
		if checkText("key id", id) != nil {
			return nil, badAnswer(kmip.OperationLocate, "an unusable id among %d", len(ids))
		}
	}
	return ids[:min(len(ids), max)], nil
}

// Get fetches the bytes of an AES-256 key.
func (o operations) Get(ctx context.Context, id string) (*secret.Key, error) {
	if err := checkText("key id", id); err != nil {
		return nil, err
	}
	resp, err := do[payloads.GetResponsePayload](ctx, o, &payloads.GetRequestPayload{UniqueIdentifier: id, KeyFormatType: kmip.KeyFormatTypeRaw})
	if err != nil {
		return nil, err
	}
	key, ok := resp.Object.(*kmip.SymmetricKey)
	if !ok || resp.ObjectType != kmip.ObjectTypeSymmetricKey {
		return nil, badAnswer(kmip.OperationGet, "key %s is a %s, not a symmetric key", id, ttlv.EnumStr(resp.ObjectType))
	}
	block := &key.KeyBlock
	if block.KeyValue == nil {
		return nil, badAnswer(kmip.OperationGet, "key %s without its bytes", id)
	}
	material, err := key.KeyMaterial()
	if err != nil {
		return nil, badAnswer(kmip.OperationGet, "key %s not in raw form", id)
	}
	defer clear(material)
	switch {
	case resp.UniqueIdentifier != id:
		return nil, badAnswer(kmip.OperationGet, "key %.100q instead of %s", resp.UniqueIdentifier, id)
	case block.KeyWrappingData != nil:
		return nil, badAnswer(kmip.OperationGet, "key %s is wrapped", id)
	case block.CryptographicAlgorithm != 0 && block.CryptographicAlgorithm != kmip.CryptographicAlgorithmAES:
		return nil, badAnswer(kmip.OperationGet, "key %s is for %s, not AES", id, ttlv.EnumStr(block.CryptographicAlgorithm))
	case len(material) != kekLen:
		return nil, badAnswer(kmip.OperationGet, "key %s has %d bits, not 256", id, 8*len(material))
	}
	return secret.Take(material)
}

// Attributes are what GetAttributes told of a key; what is missing is zero.
type Attributes struct {
	State kmip.State
	Names []string
	Text  map[string]string // attributes of text type, such as x-Vendor
}

// GetAttributes asks for attributes by name, such as "State", "Name", "x-Vendor".
func (o operations) GetAttributes(ctx context.Context, id string, names ...string) (Attributes, error) {
	if err := checkText("key id", id); err != nil {
		return Attributes{}, err
	}
	req := &payloads.GetAttributesRequestPayload{UniqueIdentifier: id}
	for _, n := range names {
		req.AttributeName = append(req.AttributeName, kmip.AttributeName(n))
	}
	resp, err := do[payloads.GetAttributesResponsePayload](ctx, o, req)
	if err != nil {
		return Attributes{}, err
	}
	if resp.UniqueIdentifier != id {
		return Attributes{}, badAnswer(kmip.OperationGetAttributes, "key %.100q instead of %s", resp.UniqueIdentifier, id)
	}
	got := Attributes{Text: map[string]string{}}
	for _, a := range resp.Attribute {
		switch v := a.AttributeValue.(type) {
		case kmip.State:
			got.State = v
		case kmip.Name:
			got.Names = append(got.Names, v.NameValue)
		case ttlv.Value: // what the codec makes of an attribute that KMIP does not define
			if text, ok := v.Value.(string); ok {
				got.Text[string(a.AttributeName)] = text
			}
		}
	}
	return got, nil
}

// AddAttribute adds a custom attribute of text type, such as x-Vendor.
func (o operations) AddAttribute(ctx context.Context, id, name, value string) error {
	if err := errors.Join(checkText("key id", id), checkText("attribute name", name)); err != nil {
		return err
	}
	_, err := do[payloads.AddAttributeResponsePayload](ctx, o, &payloads.AddAttributeRequestPayload{
		UniqueIdentifier: id, Attribute: kmip.Attribute{AttributeName: kmip.AttributeName(name), AttributeValue: value},
	})
	return err
}

// Activate makes a Pre-Active key Active. Servers refuse it for a key in any
// other state.
func (o operations) Activate(ctx context.Context, id string) error {
	if err := checkText("key id", id); err != nil {
		return err
	}
	_, err := do[payloads.ActivateResponsePayload](ctx, o, &payloads.ActivateRequestPayload{UniqueIdentifier: id})
	return err
}

// Revoke makes an Active key Deactivated or, if it is known to be compromised,
// a key of any state Compromised.
func (o operations) Revoke(ctx context.Context, id string, compromised bool) error {
	if err := checkText("key id", id); err != nil {
		return err
	}
	req := &payloads.RevokeRequestPayload{UniqueIdentifier: id}
	req.RevocationReason.RevocationReasonCode = kmip.RevocationReasonCodeCessationOfOperation
	if compromised {
		req.RevocationReason.RevocationReasonCode = kmip.RevocationReasonCodeKeyCompromise
	}
	_, err := do[payloads.RevokeResponsePayload](ctx, o, req)
	return err
}

// Destroy ends a key for good. Servers refuse it for an Active key.
func (o operations) Destroy(ctx context.Context, id string) error {
	if err := checkText("key id", id); err != nil {
		return err
	}
	_, err := do[payloads.DestroyResponsePayload](ctx, o, &payloads.DestroyRequestPayload{UniqueIdentifier: id})
	return err
}

// Info is what a server says of itself.
type Info struct {
	Vendor string // KMIP's Vendor Identification
}

// Query asks for the server's information, as vCenter does when a provider is
// registered.
func (o operations) Query(ctx context.Context) (Info, error) {
	resp, err := do[payloads.QueryResponsePayload](ctx, o, &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation}})
	if err != nil {
		return Info{}, err
	}
	return Info{Vendor: printable(resp.VendorIdentification)}, nil
}

// checkText refuses what no server can mean, before it is sent or believed:
// a key id ends up in logs and in files that are lines of text.
func checkText(what, s string) error {
	if s == "" || len(s) > maxID || printable(s) != s {
		return fmt.Errorf("kmipc: %s %.100q must be 1 to %d bytes of printable text", what, s, maxID)
	}
	return nil
}
