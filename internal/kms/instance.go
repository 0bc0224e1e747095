package kms

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// instanceRecord is how an instance is stored: in clear, its keys wrapped by
// the CRK.
type instanceRecord struct {
	Created time.Time
	// CRK is the id of the root key that wraps the keys below.
	CRK string
	// Keys are the generations of the instance key. The last seals new records;
	// the others only open old ones.
	Keys []wrappedKey
	// NameKey is the wrapped key of the index of names.
	NameKey []byte
}

type wrappedKey struct {
	Generation uint32
	Wrapped    []byte
}

// instance is an open instance. A cipher.AEAD holds expanded key bytes on the
// Go heap for as long as it lives; secret.LockDown keeps them out of dumps.
type instance struct {
	id      string
	current uint32
	seals   map[uint32]cipher.AEAD // by generation
	nameKey *secret.Key
}

// openInstance unwraps the keys of the instance called id, making it if the
// store has none.
func openInstance(ctx context.Context, s *store.Store, records *store.Collection[instanceRecord], root RootKey, id string, now time.Time) (*instance, error) {
	e, err := records.Get(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		var fresh instanceRecord
		if fresh, err = newInstance(root, id, now); err != nil {
			return nil, err
		}
		if _, err = s.Commit(ctx, records.Create(id, fresh)); err != nil && !errors.Is(err, store.ErrExists) {
			return nil, err
		}
		e, err = records.Get(ctx, id)
	}
	if err != nil {
		return nil, err
	}
	if e.Value.CRK != root.ID() {
		return nil, fmt.Errorf("its keys are wrapped by root key %s, and root key %s was given: use the root key that belongs to this state folder", e.Value.CRK, root.ID())
	}
	return unwrapInstance(root, id, e.Value)
}

func newInstance(root RootKey, id string, now time.Time) (r instanceRecord, err error) {
	r = instanceRecord{Created: now.UTC(), CRK: root.ID(), Keys: []wrappedKey{{Generation: 1}}}
	if r.Keys[0].Wrapped, err = wrapNew(root, keyBinding(id, 1)); err != nil {
		return r, err
	}
	r.NameKey, err = wrapNew(root, nameBinding(id))
	return r, err
}

// wrapNew makes an AES-256 key and returns it wrapped.
func wrapNew(root RootKey, binding []byte) ([]byte, error) {
	key, err := secret.Random(nil, 32)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	return root.Seal(key, binding)
}

func keyBinding(id string, generation uint32) []byte {
	return fmt.Appendf(nil, "mortise kms instance key\x00%s\x00%d", id, generation)
}

func nameBinding(id string) []byte { return []byte("mortise kms name key\x00" + id) }

func unwrapInstance(root RootKey, id string, r instanceRecord) (_ *instance, err error) {
	if len(r.Keys) == 0 {
		return nil, errors.New("its record names no key")
	}
	i := &instance{id: id, seals: map[uint32]cipher.AEAD{}}
	defer func() {
		if err != nil {
			i.wipe()
		}
	}()
	if i.nameKey, err = root.Open(r.NameKey, nameBinding(id)); err != nil {
		return nil, fmt.Errorf("unwrapping its name key: %w", err)
	}
	for _, w := range r.Keys {
		key, err := root.Open(w.Wrapped, keyBinding(id, w.Generation))
		if err != nil {
			return nil, fmt.Errorf("unwrapping its key of generation %d: %w", w.Generation, err)
		}
		key.Use(func(b []byte) {
			var block cipher.Block
			if block, err = aes.NewCipher(b); err == nil {
				i.seals[w.Generation], err = cipher.NewGCMWithRandomNonce(block)
			}
		})
		key.Wipe()
		if err != nil {
			return nil, fmt.Errorf("preparing its key of generation %d: %w", w.Generation, err)
		}
		i.current = w.Generation
	}
	return i, nil
}

// wipe leaves the seals alone: the store may still be decoding with them, and
// Go has no way to zero what a cipher.AEAD has expanded.
func (i *instance) wipe() { i.nameKey.Wipe() }

// nameIndex is where the index of names has a name: by a keyed hash, for a name
// is sealed wherever it is stored.
func (i *instance) nameIndex(name []byte) string {
	var sum []byte
	i.nameKey.Use(func(b []byte) {
		mac := hmac.New(sha256.New, b)
		mac.Write(name)
		sum = mac.Sum(nil)
	})
	return i.id + "/" + hex.EncodeToString(sum)
}

// A sealed record begins with sealVersion and the generation of the instance
// key, 4 bytes big-endian; nonce (12), ciphertext and tag (16) follow.
const (
	sealVersion = 1
	sealHeader  = 5
	sealLabel   = "mortise kms record\x00"
)

// sealer seals records with the key of the instance that their name begins
// with. It is a store.Sealer; the additional data is the record's name.
type sealer struct{ instances map[string]*instance }

func (s sealer) Seal(plain, at []byte) ([]byte, error) {
	i, err := s.instanceOf(at)
	if err != nil {
		return nil, err
	}
	out := make([]byte, sealHeader, sealHeader+len(plain)+28)
	out[0] = sealVersion
	binary.BigEndian.PutUint32(out[1:], i.current)
	return i.seals[i.current].Seal(out, nil, plain, sealBinding(out, at)), nil
}

func (s sealer) Open(sealed, at []byte) ([]byte, error) {
	i, err := s.instanceOf(at)
	if err != nil {
		return nil, err
	}
	if len(sealed) < sealHeader || sealed[0] != sealVersion {
		return nil, errors.New("it is not sealed in a way that this program knows")
	}
	generation := binary.BigEndian.Uint32(sealed[1:])
	seal := i.seals[generation]
	if seal == nil {
		return nil, fmt.Errorf("it is sealed by generation %d of the instance key, which is not there", generation)
	}
	plain, err := seal.Open(nil, nil, sealed[sealHeader:], sealBinding(sealed[:sealHeader], at))
	if err != nil {
		return nil, errors.New("its seal is broken: it was altered, or belongs to another place")
	}
	return plain, nil
}

func sealBinding(header, at []byte) []byte {
	b := make([]byte, 0, len(sealLabel)+sealHeader+len(at))
	b = append(b, sealLabel...)
	b = append(b, header[:sealHeader]...)
	return append(b, at...)
}

// instanceOf reads the instance out of "/collection/instance/…".
func (s sealer) instanceOf(at []byte) (*instance, error) {
	if parts := strings.SplitN(string(at), "/", 4); len(parts) == 4 {
		if i := s.instances[parts[2]]; i != nil {
			return i, nil
		}
	}
	return nil, errors.New("it belongs to no open instance")
}
