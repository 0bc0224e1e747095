package migrate

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kmipc"
	"mortise/internal/kms"
	"mortise/internal/secret"
)

// page is how many identifiers are asked for at a time.
const page = 500

// tries is how often a read is tried on a connection that breaks.
const tries = 4

// errOdd: an answer that decodes and is not what was asked for.
var errOdd = errors.New("the source's answer makes no sense")

// source is one connection to the server that objects come from, made anew when
// it breaks: everything that is asked of it only reads.
type source struct {
	cfg     kmipc.LinkConfig
	version kmip.ProtocolVersion
	link    *kmipc.Link
}

func (s *source) close() {
	if s.link != nil {
		s.link.Close()
		s.link = nil
	}
}

func (s *source) dial(ctx context.Context) (err error) {
	if s.link == nil {
		s.link, err = kmipc.DialLink(ctx, s.cfg)
	}
	return err
}

func (s *source) greet(ctx context.Context) (versions []kmip.ProtocolVersion, vendor string, err error) {
	if err := s.dial(ctx); err != nil {
		return nil, "", err
	}
	if versions, err = s.link.Versions(ctx); err != nil {
		return nil, "", err
	}
	p, err := s.link.Ask(ctx, versions[0], &payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{kmip.QueryFunctionServerInformation}})
	if q, ok := p.(*payloads.QueryResponsePayload); ok && err == nil {
		vendor = q.VendorIdentification
	}
	return versions, vendor, nil // who made it is only for the report
}

// isAnswer tells a server's refusal from a broken connection.
func isAnswer(err error) bool {
	var r *kmipc.ResultError
	return errors.As(err, &r)
}

// ask sends one operation, again on a fresh connection if one breaks.
func ask[Answer any](ctx context.Context, s *source, req kmip.OperationPayload) (*Answer, error) {
	var err error
	for try := range tries {
		if try > 0 {
			s.close()
			select {
			case <-time.After(time.Duration(try) * time.Second):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		if err = s.dial(ctx); err == nil {
			var p kmip.OperationPayload
			if p, err = s.link.Ask(ctx, s.version, req); err == nil {
				if a, ok := any(p).(*Answer); ok {
					return a, nil
				}
				return nil, fmt.Errorf("%w: another operation's payload", errOdd)
			}
		}
		if isAnswer(err) || ctx.Err() != nil || errors.Is(err, kmipc.ErrRefused) || errors.Is(err, kmipc.ErrCertificateChanged) {
			return nil, err
		}
	}
	return nil, err
}

// locate calls each with the identifiers of all objects, page by page; each says
// how many of them are new. A server older than KMIP 1.3 cannot page, and one
// that ignores the offset shows the same page again: both are asked for
// everything at once.
func (s *source) locate(ctx context.Context, each func([]string) (news int)) error {
	canPage := s.version.ProtocolVersionMajor > 1 || s.version.ProtocolVersionMinor >= 3
	mask := kmip.StorageStatusOnlineStorage | kmip.StorageStatusArchivalStorage
	for offset := 0; ; {
		req := &payloads.LocateRequestPayload{StorageStatusMask: mask}
		if canPage {
			req.MaximumItems, req.OffsetItems = page, int32(offset)
		}
		a, err := ask[payloads.LocateResponsePayload](ctx, s, req)
		if isAnswer(err) && mask != 0 { // a server without archives may not know the mask
			mask = 0
			continue
		}
		if err != nil {
			return err
		}
		for _, id := range a.UniqueIdentifier {
			if id == "" {
				return fmt.Errorf("%w: an empty identifier", errOdd)
			}
		}
		news := each(a.UniqueIdentifier)
		offset += len(a.UniqueIdentifier)
		switch {
		case !canPage || len(a.UniqueIdentifier) == 0:
			return nil
		case offset > len(a.UniqueIdentifier) && news == 0 && len(a.UniqueIdentifier) >= page:
			canPage = false
		case len(a.UniqueIdentifier) > page: // it ignores the maximum too: that was all
			return nil
		}
	}
}

func (s *source) attributes(ctx context.Context, id string) ([]kmip.Attribute, error) {
	a, err := ask[payloads.GetAttributesResponsePayload](ctx, s, &payloads.GetAttributesRequestPayload{UniqueIdentifier: id})
	if err != nil {
		return nil, err
	}
	if a.UniqueIdentifier != id {
		return nil, fmt.Errorf("%w: attributes of %.100q instead of %.100q", errOdd, a.UniqueIdentifier, id)
	}
	return a.Attribute, nil
}

// get fetches an object's material, the caller's to wipe.
func (s *source) get(ctx context.Context, id string, attributes []kmip.Attribute) (m kms.Material, err error) {
	req := &payloads.GetRequestPayload{UniqueIdentifier: id}
	if typeOf(attributes) == kmip.ObjectTypeSymmetricKey {
		req.KeyFormatType = kmip.KeyFormatTypeRaw
	}
	a, err := ask[payloads.GetResponsePayload](ctx, s, req)
	if err != nil {
		return m, err
	}
	var value []byte
	m, value, err = materialOf(a.Object)
	if err == nil && (a.UniqueIdentifier != id || a.ObjectType != m.Type) {
		err = fmt.Errorf("%w: another object than %.100q", errOdd, id)
	}
	if err == nil && (len(value) == 0 || len(value) > kms.MaxMaterial) {
		err = fmt.Errorf("%w: %d bytes of material; 1 to %d are kept here", errOdd, len(value), kms.MaxMaterial)
	}
	if err != nil {
		clear(value)
		return m, err
	}
	m.Bytes, err = secret.Take(value)
	return m, err
}

// materialOf takes an object apart; value is where its bytes are.
func materialOf(o kmip.Object) (m kms.Material, value []byte, err error) {
	var block *kmip.KeyBlock
	switch o := o.(type) {
	case *kmip.SymmetricKey:
		m.Type, block = kmip.ObjectTypeSymmetricKey, &o.KeyBlock
		value, err = o.KeyMaterial()
	case *kmip.SecretData:
		m.Type, m.Subtype, block = kmip.ObjectTypeSecretData, uint32(o.SecretDataType), &o.KeyBlock
		value, err = o.Data()
	case *kmip.OpaqueObject:
		m.Type, m.Subtype = kmip.ObjectTypeOpaqueObject, uint32(o.OpaqueDataType)
		return m, o.OpaqueDataValue, nil
	default:
		return m, nil, fmt.Errorf("%w: no object of a kind that is kept here", errOdd)
	}
	switch {
	case block.KeyWrappingData != nil:
		clear(value)
		return m, nil, fmt.Errorf("%w: it is wrapped, and was asked for in clear", errOdd)
	case err != nil:
		return m, nil, fmt.Errorf("%w: key format %s", errOdd, ttlv.EnumStr(block.KeyFormatType))
	}
	m.Format, m.Algorithm, m.Length = block.KeyFormatType, block.CryptographicAlgorithm, block.CryptographicLength
	if m.Type == kmip.ObjectTypeSymmetricKey {
		m.Format = kmip.KeyFormatTypeRaw
	}
	return m, value, nil
}

func sumOf(k *secret.Key) (sum [sha256.Size]byte) {
	k.Use(func(b []byte) { sum = sha256.Sum256(b) })
	return sum
}
