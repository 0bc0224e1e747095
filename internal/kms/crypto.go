package kms

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"hash"
	"reflect"

	"github.com/ovh/kmip-go"
)

// MaxRandom is how many random bytes one request gets.
const MaxRandom = 64 << 10

// A CipherRequest is the fields of Encrypt and Decrypt (KMIP 1.4 §4.29, §4.30).
type CipherRequest struct {
	Parameters  *kmip.CryptographicParameters // nil: the key's own
	Data        []byte
	IV          []byte
	Additional  []byte // authenticated with the data, GCM
	Tag         []byte // to check, Decrypt with GCM
	Correlation []byte // of a stream that is under way
	Init, Final bool   // the first and the last part of a stream
}

// A CipherResult is the answer.
type CipherResult struct {
	Data        []byte
	IV          []byte // when the server made it
	Tag         []byte
	Correlation []byte // of a stream that goes on
}

// Encrypt encrypts with a key that never leaves the server. Usage Limits are
// spent before anything is told.
func (s *Session) Encrypt(ctx context.Context, id string, r CipherRequest) (CipherResult, error) {
	return s.cipher(ctx, id, r, true)
}

// Decrypt is the reverse.
func (s *Session) Decrypt(ctx context.Context, id string, r CipherRequest) (CipherResult, error) {
	return s.cipher(ctx, id, r, false)
}

func (s *Session) cipher(ctx context.Context, id string, r CipherRequest, encrypt bool) (result CipherResult, err error) {
	o, err := s.online(ctx, id)
	if err != nil {
		return result, err
	}
	use := kmip.CryptographicUsageDecrypt
	if encrypt {
		use = kmip.CryptographicUsageEncrypt
	}
	if err := o.mayUse(use, s, encrypt); err != nil {
		return result, err
	}
	if encrypt {
		if err := s.spend(ctx, id, o, len(r.Data)); err != nil {
			return result, err
		}
	}
	if r.Init || len(r.Correlation) > 0 || r.Final {
		return s.stream(ctx, id, o, r, encrypt)
	}
	c, p, err := s.symmetric(ctx, o, r.Parameters)
	if err != nil {
		return result, err
	}
	if !encrypt {
		iv, err := c.checkIV(r.IV, p)
		if err == nil {
			result.Data, err = c.decrypt(iv, r.Additional, r.Data, r.Tag)
		}
		return result, err
	}
	iv, made, err := c.ivFor(r.IV, p)
	if err != nil {
		return result, err
	}
	if result.Data, result.Tag, err = c.encrypt(iv, r.Additional, r.Data); made {
		result.IV = iv
	}
	return result, err
}

// symmetric prepares the object's key for what is asked.
func (s *Session) symmetric(ctx context.Context, o *object, given *kmip.CryptographicParameters) (c *symmetric, p kmip.CryptographicParameters, err error) {
	if p, err = o.parameters(given); err != nil {
		return nil, p, err
	}
	key, err := s.plain(ctx, o)
	if err != nil {
		return nil, p, err
	}
	defer key.Wipe()
	key.Use(func(b []byte) { c, err = newSymmetric(o.Algorithm, b, p) })
	return c, p, err
}

// mayUse checks type, usage mask, state and dates.
func (o *object) mayUse(use kmip.CryptographicUsageMask, s *Session, protect bool) error {
	if o.Type != kmip.ObjectTypeSymmetricKey {
		return Refuse(kmip.ResultReasonInvalidField, "the object is no symmetric key")
	}
	if o.Usage&int32(use) == 0 {
		return Refuse(kmip.ResultReasonPermissionDenied, "the key's Cryptographic Usage Mask does not allow it")
	}
	if protect {
		return o.mayProtect(s.now())
	}
	return o.mayProcess(s.now())
}

// spend takes what an operation over n bytes uses off the key's Usage Limits, if
// it has any.
func (s *Session) spend(ctx context.Context, id string, o *object, n int) error {
	if o.Limits == nil {
		return nil
	}
	return s.change(ctx, id, func(t *tx, o *object) error {
		if err := o.mayProtect(t.now); err != nil {
			return err
		}
		switch {
		case o.Limits == nil:
			return nil
		case o.Limits.Unit == kmip.UsageLimitsUnitObject:
			return o.spend(1)
		}
		return o.spend(int64(n))
	})
}

// parameters are those of the request, else the object's with the lowest index,
// else none.
func (o *object) parameters(given *kmip.CryptographicParameters) (p kmip.CryptographicParameters, err error) {
	if given != nil && !reflect.ValueOf(*given).IsZero() {
		return *given, nil
	}
	at := o.find(kmip.AttributeNameCryptographicParameters, nil)
	if at < 0 {
		return p, nil
	}
	a, err := o.Attributes[at].decode()
	if err != nil {
		return p, damaged(err)
	}
	p, _ = a.AttributeValue.(kmip.CryptographicParameters)
	return p, nil
}

// MAC makes a message authentication code (KMIP 1.4 §4.33).
func (s *Session) MAC(ctx context.Context, id string, given *kmip.CryptographicParameters, data []byte) ([]byte, error) {
	return s.mac(ctx, id, given, data, true)
}

// MACVerify tells whether mac is that of data (KMIP 1.4 §4.34).
func (s *Session) MACVerify(ctx context.Context, id string, given *kmip.CryptographicParameters, data, mac []byte) (bool, error) {
	want, err := s.mac(ctx, id, given, data, false)
	return err == nil && subtle.ConstantTimeCompare(want, mac) == 1, err
}

func (s *Session) mac(ctx context.Context, id string, given *kmip.CryptographicParameters, data []byte, make bool) ([]byte, error) {
	o, err := s.online(ctx, id)
	if err != nil {
		return nil, err
	}
	use := kmip.CryptographicUsageMACVerify
	if make {
		use = kmip.CryptographicUsageMACGenerate
	}
	if err := o.mayUse(use, s, make); err != nil {
		return nil, err
	}
	if make {
		if err := s.spend(ctx, id, o, len(data)); err != nil {
			return nil, err
		}
	}
	p, err := o.parameters(given)
	if err != nil {
		return nil, err
	}
	key, err := s.plain(ctx, o)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	var h hash.Hash
	key.Use(func(b []byte) { h, err = newMAC(b, o.Algorithm, p) })
	if err != nil {
		return nil, err
	}
	h.Write(data)
	return h.Sum(nil), nil
}

// Hash hashes data (KMIP 1.4 §4.37).
func (s *Session) Hash(p kmip.CryptographicParameters, data []byte) ([]byte, error) {
	h := hashOf(p.HashingAlgorithm)
	if h == nil {
		return nil, Refuse(kmip.ResultReasonInvalidField, "the hashing algorithms here are MD5, SHA-1, SHA-2 and SHA-3")
	}
	sum := h()
	sum.Write(data)
	return sum.Sum(nil), nil
}

// Random returns n bytes of the operating system's random number generator
// (KMIP 1.4 §4.35).
func (s *Session) Random(n int32) ([]byte, error) {
	if n < 1 || n > MaxRandom {
		return nil, Refuse(kmip.ResultReasonInvalidField, "one request gets 1 to %d random bytes", MaxRandom)
	}
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		return nil, &Error{kmip.ResultReasonCryptographicFailure, "no random bytes could be made", err}
	}
	return b, nil
}

// Seed is offered entropy (KMIP 1.4 §4.36), and says how much of it is used:
// none. The operating system seeds its generator itself, and what a client sends
// is known to the client.
func (s *Session) Seed([]byte) int32 { return 0 }
