package kms

import (
	"context"
	"errors"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// A Form is how Get and Export give an object's material.
type Form struct {
	Format kmip.KeyFormatType // 0: as it was registered
	Wrap   *kmip.KeyWrappingSpecification
	Type   kmip.KeyWrapType // KMIP 1.4; 0: as registered
}

// Get returns the object's material as it was registered (KMIP 1.4 §4.11). It is
// there in every state but the destroyed ones: a deactivated or compromised key
// still decrypts (K7); whether it may encrypt is for the client to heed. The
// first Get makes the object one that is not Fresh any more.
func (s *Session) Get(ctx context.Context, id string) (Material, error) {
	return s.GetAs(ctx, id, Form{})
}

// GetAs returns the object's material in another form.
func (s *Session) GetAs(ctx context.Context, id string, f Form) (Material, error) {
	o, err := s.online(ctx, id)
	if err != nil {
		return Material{}, err
	}
	m, err := s.material(ctx, id, o, f)
	if err != nil || o.is(flagServed) {
		return m, err
	}
	err = s.change(ctx, id, func(_ *tx, o *object) error {
		if o.gone() {
			return errGone()
		}
		o.flag(flagServed, true)
		return nil
	})
	if errors.Is(err, store.ErrFull) { // a key is worth more than the note that it was fetched
		s.k.log.Warn("kms: object could not be marked as served: the store is full", "object", id)
		err = nil
	}
	if err != nil {
		m.Bytes.Wipe()
		return Material{}, err
	}
	return m, nil
}

func errGone() error { return Refuse(kmip.ResultReasonItemNotFound, "the object is destroyed") }

// material is the object's material as a client wants it.
func (s *Session) material(ctx context.Context, id string, o *object, f Form) (m Material, err error) {
	m = Material{Type: o.Type, Subtype: o.Subtype, Format: o.format(), Algorithm: o.Algorithm, Length: o.Length}
	if f.Format != 0 {
		m.Format = f.Format
	}
	if err := o.canBe(m.Format); err != nil {
		return m, err
	}
	switch {
	case o.gone():
		return m, errGone()
	case o.is(flagKeyless):
		if f.Wrap != nil {
			return m, Refuse(kmip.ResultReasonKeyValueNotPresent, "the object has no key value that could be wrapped")
		}
		return m, nil
	case o.material == 0:
		return m, errGone()
	case o.is(flagInextractable):
		return m, Refuse(kmip.ResultReasonNotExtractable, "the object is not extractable")
	case f.Type > kmip.AsRegistered:
		return m, Refuse(kmip.ResultReasonInvalidField, "the Key Wrap Type is not known")
	}
	wrapped := len(o.Wrapping) > 0
	if o.is(flagSensitive) && f.Wrap == nil && (!wrapped || f.Type == kmip.NotWrapped) {
		return m, Refuse(kmip.ResultReasonSensitive, "the object is sensitive; it is given wrapped only")
	}
	if wrapped && f.Wrap == nil && f.Type != kmip.NotWrapped {
		if m.Bytes, err = o.open(); err != nil {
			return m, damaged(err)
		}
		m.Structured = o.is(flagStructured)
		m.Wrapping, err = o.wrapping()
		if err != nil {
			m.Bytes.Wipe()
		}
		return m, err
	}
	key, err := s.plain(ctx, o)
	if err != nil {
		return m, err
	}
	if f.Wrap == nil {
		m.Bytes = key
		return m, nil
	}
	defer key.Wipe()
	return m, s.wrap(ctx, id, o, &m, key, *f.Wrap)
}

// canBe tells whether the object's material has a form in the format.
func (o *object) canBe(f kmip.KeyFormatType) error {
	switch {
	case f == kmip.KeyFormatTypeRaw, f == kmip.KeyFormatTypeOpaque && o.format() == f,
		f == kmip.KeyFormatTypeTransparentSymmetricKey && o.Type == kmip.ObjectTypeSymmetricKey && len(o.Wrapping) == 0:
		return nil
	}
	return Refuse(kmip.ResultReasonKeyFormatTypeNotSupported, "this object is given as Raw, or in the format in which it was registered")
}

// plain opens the object's material, and unwraps it if it is kept wrapped.
func (s *Session) plain(ctx context.Context, o *object) (*secret.Key, error) {
	switch {
	case o.is(flagKeyless):
		return nil, Refuse(kmip.ResultReasonKeyValueNotPresent, "the object was registered without a key value")
	case o.gone() || o.material == 0:
		return nil, errGone()
	}
	key, err := o.open()
	if err != nil {
		return nil, damaged(err)
	}
	if len(o.Wrapping) == 0 {
		return key, nil
	}
	defer key.Wipe()
	w, err := o.wrapping()
	if err != nil {
		return nil, err
	}
	return s.unwrap(ctx, key, *w)
}

// wrapping is the Key Wrapping Data of material that is kept wrapped.
func (o *object) wrapping() (*kmip.KeyWrappingData, error) {
	var w kmip.KeyWrappingData
	if err := ttlv.UnmarshalTTLV(o.Wrapping, &w); err != nil {
		return nil, damaged(err)
	}
	return &w, nil
}
