package kms

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/ovh/kmip-go"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// A Session is what one client may do: the operations on the objects of its own
// instance. [KMS.Session] makes it, for one request: it sees everything that was
// committed before it was made, its own writes, and perhaps more. It is for one
// goroutine. All its errors are an *[Error].
type Session struct {
	k      *KMS
	inst   *instance
	synced bool // the cache holds all that this session must see
	Actor       // who the client is
}

// Material is an object as Register takes it and Get gives it.
type Material struct {
	Type      kmip.ObjectType // SymmetricKey, SecretData or OpaqueObject
	Subtype   uint32          // SecretDataType or OpaqueDataType
	Algorithm kmip.CryptographicAlgorithm
	Length    int32       // bits
	Bytes     *secret.Key // the receiver's to wipe
}

// Create makes a symmetric key (KMIP 1.4 §4.1) and returns its id once it is
// durable. Only AES keys are made; the length is 256 bits unless given.
func (s *Session) Create(ctx context.Context, t kmip.ObjectType, attributes []kmip.Attribute) (string, error) {
	if t != kmip.ObjectTypeSymmetricKey {
		return "", Refuse(kmip.ResultReasonInvalidField, "only symmetric keys are created here")
	}
	o, err := s.newObject(t, attributes)
	if err != nil {
		return "", err
	}
	if o.Length == 0 {
		o.Length = 256
	}
	switch {
	case o.Algorithm != kmip.CryptographicAlgorithmAES:
		return "", Refuse(kmip.ResultReasonInvalidField, "a Cryptographic Algorithm is needed, and AES is the one that keys are made for")
	case o.Length != 128 && o.Length != 192 && o.Length != 256:
		return "", Refuse(kmip.ResultReasonInvalidField, "an AES key has 128, 192 or 256 bits, not %d", o.Length)
	case o.Usage == 0:
		return "", Refuse(kmip.ResultReasonInvalidField, "a Cryptographic Usage Mask is needed")
	}
	key, err := secret.Random(nil, int(o.Length/8))
	if err != nil {
		return "", &Error{kmip.ResultReasonCryptographicFailure, "the key could not be made", err}
	}
	return s.add(ctx, o, key)
}

// Register keeps an object that the client brings (KMIP 1.4 §4.3). It takes
// over m.Bytes.
func (s *Session) Register(ctx context.Context, m Material, attributes []kmip.Attribute) (string, error) {
	o, err := s.newObject(m.Type, attributes)
	if err == nil {
		err = o.adopt(m)
	}
	if err != nil {
		m.Bytes.Wipe()
		return "", err
	}
	return s.add(ctx, o, m.Bytes)
}

// adopt checks the attributes that a client gives against the object that it
// brings, and takes from the object those that it did not give.
func (o *object) adopt(m Material) error {
	o.Subtype = m.Subtype
	switch m.Type {
	case kmip.ObjectTypeSecretData, kmip.ObjectTypeOpaqueObject:
		return nil
	case kmip.ObjectTypeSymmetricKey:
	default:
		return Refuse(kmip.ResultReasonInvalidField, "symmetric keys, secret data and opaque objects are kept here, no others")
	}
	bits := int32(m.Bytes.Len()) * 8
	if o.Algorithm == 0 {
		o.Algorithm = m.Algorithm
	}
	if o.Length == 0 {
		o.Length = bits
	}
	switch {
	case o.Algorithm == 0 || m.Algorithm != 0 && m.Algorithm != o.Algorithm:
		return Refuse(kmip.ResultReasonInvalidField, "the key's Cryptographic Algorithm is missing or given twice with different values")
	case o.Length != bits || m.Length != 0 && m.Length != bits:
		return Refuse(kmip.ResultReasonInvalidField, "the key has %d bits, and another Cryptographic Length was given", bits)
	case o.Algorithm == kmip.CryptographicAlgorithmAES && bits != 128 && bits != 192 && bits != 256:
		return Refuse(kmip.ResultReasonInvalidField, "an AES key has 128, 192 or 256 bits, not %d", bits)
	case o.Usage == 0:
		return Refuse(kmip.ResultReasonInvalidField, "a Cryptographic Usage Mask is needed")
	}
	return nil
}

// newObject makes an object of the attributes that a client gives for it.
func (s *Session) newObject(t kmip.ObjectType, attributes []kmip.Attribute) (*object, error) {
	now := s.now()
	o := &object{Version: objectVersion, Type: t, State: kmip.StatePreActive, Initial: now, LastChange: now}
	for _, a := range attributes {
		r, ok := ruleOf(a.AttributeName)
		if !ok || !r.given {
			return nil, Refuse(kmip.ResultReasonInvalidField, "attribute %q cannot be given for a new object", a.AttributeName)
		}
		if err := o.set(a, now); err != nil {
			return nil, asInvalidField(err)
		}
	}
	return o, nil
}

// asInvalidField: what is illegal to do to an object is an invalid field of one
// to be made (KMIP 1.4 §11.1, §11.3).
func asInvalidField(err error) error {
	var e *Error
	if errors.As(err, &e) && e.Reason == kmip.ResultReasonIllegalOperation {
		return &Error{kmip.ResultReasonInvalidField, e.Message, e.cause}
	}
	return err
}

// add writes a new object and the index entries of its names. It wipes key.
func (s *Session) add(ctx context.Context, o *object, key *secret.Key) (string, error) {
	defer key.Wipe()
	key.Use(func(b []byte) {
		sum := sha256.Sum256(b)
		o.Digest = sum[:]
	})
	if o.Type == kmip.ObjectTypeOpaqueObject {
		o.Digest = nil // KMIP 1.4 §3.17: not for opaque objects
	}
	o.material, o.sealed.fresh = key.Len(), key
	id, err := uuid.NewRandom()
	if err != nil {
		return "", &Error{kmip.ResultReasonCryptographicFailure, "no identifier could be made", err}
	}
	for {
		ops := []store.Op{s.inst.objects.Create(id.String(), o)}
		for _, a := range o.Attributes {
			if a.Name == kmip.AttributeNameName {
				ops = append(ops, s.inst.names.Create(s.inst.nameIndex(a.Value), id.String()))
			}
		}
		err := s.commit(ctx, ops...)
		switch {
		case err == nil:
			return id.String(), nil
		case errors.Is(err, store.ErrExists):
			return "", &Error{kmip.ResultReasonInvalidField, "another object has this name", err}
		case !errors.Is(err, store.ErrConflict): // else the instance key has changed: seal again
			return "", AsError(err)
		}
	}
}

// Get returns the object's material (KMIP 1.4 §4.11). It is there in every
// state but the destroyed ones: a deactivated or compromised key still decrypts
// (K7); whether it may encrypt is for the client to heed.
func (s *Session) Get(ctx context.Context, id string) (Material, error) {
	e, err := s.read(ctx, id)
	if err != nil {
		return Material{}, err
	}
	o := e.Value
	if o.gone() || o.material == 0 {
		return Material{}, Refuse(kmip.ResultReasonItemNotFound, "the object is destroyed")
	}
	key, err := o.open()
	if err != nil {
		return Material{}, &Error{kmip.ResultReasonGeneralFailure, "the stored object is damaged; the server's log says more", err}
	}
	return Material{o.Type, o.Subtype, o.Algorithm, o.Length, key}, nil
}

// Attributes returns the object's attributes of the given names, all if there
// are none. A name that the object does not have yields nothing: vCenter asks
// for such and goes on.
func (s *Session) Attributes(ctx context.Context, id string, names ...kmip.AttributeName) ([]kmip.Attribute, error) {
	for i, n := range names {
		if slices.Contains(names[:i], n) {
			return nil, Refuse(kmip.ResultReasonInvalidMessage, "attribute name %q is given more than once", n)
		}
	}
	e, err := s.read(ctx, id)
	if err != nil {
		return nil, err
	}
	all, err := e.Value.list(id)
	if err != nil {
		return nil, &Error{kmip.ResultReasonGeneralFailure, "the stored object is damaged; the server's log says more", err}
	}
	if len(names) == 0 {
		return all, nil
	}
	var some []kmip.Attribute
	for _, n := range names {
		for _, a := range all {
			if a.AttributeName == n {
				some = append(some, a)
			}
		}
	}
	return some, nil
}

// AddAttribute adds an instance of an attribute and returns it with its index.
func (s *Session) AddAttribute(ctx context.Context, id string, a kmip.Attribute) (kmip.Attribute, error) {
	r, ok := ruleOf(a.AttributeName)
	if !ok || !r.add {
		return a, Refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be added", a.AttributeName)
	}
	err := s.change(ctx, id, func(o *object, now time.Time) ([]store.Op, error) {
		if err := o.editable(); err != nil {
			return nil, err
		}
		before := len(o.Attributes)
		if err := o.set(a, now); err != nil {
			return nil, err
		}
		if len(o.Attributes) == before { // one of the object's own dates
			return nil, nil
		}
		added := o.Attributes[before]
		a.AttributeIndex = nil
		if added.Index > 0 {
			a.AttributeIndex = &added.Index
		}
		if a.AttributeName == kmip.AttributeNameName {
			return []store.Op{s.inst.names.Create(s.inst.nameIndex(added.Value), id)}, nil
		}
		return nil, nil
	})
	return a, err
}

// ModifyAttribute changes an existing instance; without an index, the first.
func (s *Session) ModifyAttribute(ctx context.Context, id string, a kmip.Attribute) (kmip.Attribute, error) {
	r, ok := ruleOf(a.AttributeName)
	if !ok || !r.modify {
		return a, Refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be modified", a.AttributeName)
	}
	err := s.change(ctx, id, func(o *object, now time.Time) ([]store.Op, error) {
		if err := o.editable(); err != nil {
			return nil, err
		}
		switch {
		case a.AttributeName == kmip.AttributeNameActivationDate && !o.Activation.IsZero(),
			a.AttributeName == kmip.AttributeNameDeactivationDate && !o.Deactivated.IsZero():
			return nil, o.setDate(a, now)
		}
		at := o.find(a.AttributeName, a.AttributeIndex)
		if at < 0 {
			if a.AttributeIndex != nil && o.find(a.AttributeName, nil) >= 0 {
				return nil, Refuse(kmip.ResultReasonItemNotFound, "attribute %q has no instance %d", a.AttributeName, *a.AttributeIndex)
			}
			return nil, Refuse(kmip.ResultReasonInvalidField, "the object has no attribute %q; add it", a.AttributeName)
		}
		if err := checkValue(a); err != nil {
			return nil, err
		}
		old, value := o.Attributes[at], encodeAttribute(a)
		if len(value) > maxAttributeBytes {
			return nil, Refuse(kmip.ResultReasonInvalidField, "an attribute has at most %d bytes", maxAttributeBytes)
		}
		o.Attributes = slices.Clone(o.Attributes)
		o.Attributes[at].Value = value
		a.AttributeIndex = nil
		if old.Index > 0 {
			a.AttributeIndex = &old.Index
		}
		if a.AttributeName != kmip.AttributeNameName || slices.Equal(old.Value, value) {
			return nil, nil
		}
		return []store.Op{
			s.inst.names.Delete(s.inst.nameIndex(old.Value), 0),
			s.inst.names.Create(s.inst.nameIndex(value), id),
		}, nil
	})
	return a, err
}

// DeleteAttribute removes an instance, without an index the first, and returns
// what it removed.
func (s *Session) DeleteAttribute(ctx context.Context, id string, name kmip.AttributeName, index *int32) (removed kmip.Attribute, err error) {
	r, ok := ruleOf(name)
	if !ok || !r.remove {
		return removed, Refuse(kmip.ResultReasonPermissionDenied, "attribute %q cannot be deleted", name)
	}
	err = s.change(ctx, id, func(o *object, _ time.Time) ([]store.Op, error) {
		if err := o.editable(); err != nil {
			return nil, err
		}
		at := o.find(name, index)
		if at < 0 {
			return nil, Refuse(kmip.ResultReasonItemNotFound, "the object has no such instance of attribute %q", name)
		}
		old := o.Attributes[at]
		o.Attributes = slices.Delete(slices.Clone(o.Attributes), at, at+1)
		if removed, err = old.decode(); err != nil {
			return nil, err
		}
		if name == kmip.AttributeNameName {
			return []store.Op{s.inst.names.Delete(s.inst.nameIndex(old.Value), 0)}, nil
		}
		return nil, nil
	})
	return removed, err
}

// Activate makes a Pre-Active object Active.
func (s *Session) Activate(ctx context.Context, id string) error {
	return s.change(ctx, id, func(o *object, now time.Time) ([]store.Op, error) { return nil, o.activate(now) })
}

// Revoke deactivates the object or marks it compromised, as the reason says.
// occurred is the Compromise Occurrence Date, zero for none.
func (s *Session) Revoke(ctx context.Context, id string, reason kmip.RevocationReason, occurred time.Time) error {
	r := revocation{Code: reason.RevocationReasonCode, Message: reason.RevocationMessage}
	if r.Code < kmip.RevocationReasonCodeUnspecified || r.Code > kmip.RevocationReasonCodePrivilegeWithdrawn {
		return Refuse(kmip.ResultReasonInvalidField, "a Revocation Reason is needed")
	}
	if occurred.Year() > 9999 || occurred.Year() < 1 || len(r.Message) > maxAttributeBytes {
		return Refuse(kmip.ResultReasonInvalidField, "the Compromise Occurrence Date or the message does not fit")
	}
	return s.change(ctx, id, func(o *object, now time.Time) ([]store.Op, error) {
		return nil, o.revoke(r, occurred.UTC(), now)
	})
}

// Destroy ends the serving of the object's material at once and frees its
// names; the material is purged after [GraceTime].
func (s *Session) Destroy(ctx context.Context, id string) error {
	return s.change(ctx, id, func(o *object, now time.Time) (ops []store.Op, err error) {
		for _, a := range o.Attributes {
			if a.Name == kmip.AttributeNameName {
				ops = append(ops, s.inst.names.Delete(s.inst.nameIndex(a.Value), 0))
			}
		}
		return ops, o.destroy(now)
	})
}

// editable: the attributes of a destroyed object are a record of what it was.
func (o *object) editable() error {
	if o.gone() {
		return Refuse(kmip.ResultReasonPermissionDenied, "the object is destroyed")
	}
	return nil
}

// change applies f to a private copy of the object and writes it together with
// the operations that f returns, again from the start when somebody else was
// faster.
func (s *Session) change(ctx context.Context, id string, f func(*object, time.Time) ([]store.Op, error)) error {
	for {
		e, err := s.read(ctx, id)
		if err != nil {
			return err
		}
		o, now := *e.Value, s.now()
		ops, err := f(&o, now)
		if err != nil {
			return AsError(err)
		}
		o.LastChange = now
		err = s.commit(ctx, append(ops, s.inst.objects.Update(e.Key, e.Revision, &o))...)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, store.ErrExists):
			return &Error{kmip.ResultReasonIllegalOperation, "another object has this name", err}
		case !errors.Is(err, store.ErrConflict):
			return AsError(err)
		}
	}
}

// read returns the object in the state that its dates have brought it to.
func (s *Session) read(ctx context.Context, id string) (store.Entry[*object], error) {
	if id == "" {
		return store.Entry[*object]{}, Refuse(kmip.ResultReasonItemNotFound, "no identifier is given, and none comes from earlier in the batch")
	}
	e, ok := s.inst.objects.Peek(id)
	if !s.synced || !ok { // Get also says what is wrong
		var err error
		if e, err = s.inst.objects.Get(ctx, id); err != nil {
			return e, AsError(err)
		}
		s.synced = true
	}
	e, err := s.k.settle(ctx, s.inst, e)
	if err != nil {
		return e, AsError(err)
	}
	return e, nil
}

// settled returns o, or a copy if its dates have changed its state.
func (o *object) settled(now time.Time) *object {
	c := *o
	if c.settle(now) {
		return &c
	}
	return o
}

// now is the time in whole seconds, as KMIP's dates have it.
func (s *Session) now() time.Time { return s.k.now().UTC().Truncate(time.Second) }
