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
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// instanceRecord is how an instance is stored: in clear, its keys wrapped by
// the CRK.
type instanceRecord struct {
	Created time.Time
	// Provider is the kind of root-key provider that keeps the CRK.
	Provider string
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

	objects *store.Collection[*object]
	names   *store.Collection[string]
	clients *store.Collection[Client]
	apiKeys *store.Collection[APIKey]
}

// openInstance unwraps the keys of the instance called id and loads its records.
func openInstance(ctx context.Context, s *store.Store, roots map[string]RootKeys, id string, r instanceRecord) (_ *instance, err error) {
	root := roots[r.Provider]
	if root == nil {
		return nil, fmt.Errorf("its CRK is kept by a root-key provider of kind %q, which is not configured", r.Provider)
	}
	i, err := unwrapInstance(ctx, root, id, r)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			i.close()
		}
	}()
	if i.objects, err = store.NewCollection(ctx, s, "object-"+id, store.Codec[*object](objectCodec{i}), store.DecodeOnRead[*object](), store.IndexBy(indexObject)); err != nil {
		return nil, err
	}
	if i.names, err = store.NewCollection(ctx, s, "name-"+id, store.JSON[string](1)); err != nil {
		return nil, err
	}
	if i.clients, err = store.NewCollection(ctx, s, "client-"+id, store.Sealed(store.JSON[Client](1), i)); err != nil {
		return nil, err
	}
	i.apiKeys, err = store.NewCollection(ctx, s, "apikey-"+id, store.Sealed(store.JSON[APIKey](1), i))
	return i, err
}

// close forgets the instance's records and wipes what keys it can.
func (i *instance) close() {
	if i.objects != nil {
		i.objects.Close()
	}
	if i.names != nil {
		i.names.Close()
	}
	if i.clients != nil {
		i.clients.Close()
	}
	if i.apiKeys != nil {
		i.apiKeys.Close()
	}
	i.wipe()
}

// newInstance makes a CRK for the instance called id, and its keys.
func newInstance(ctx context.Context, root RootKeys, id string, now time.Time) (r instanceRecord, err error) {
	r = instanceRecord{Created: now.UTC(), Provider: root.Kind(), Keys: []wrappedKey{{Generation: 1}}}
	if r.CRK, err = root.Create(ctx); err != nil {
		return r, err
	}
	if r.Keys[0].Wrapped, err = wrapNew(ctx, root, r.CRK, keyBinding(id, 1)); err != nil {
		return r, err
	}
	r.NameKey, err = wrapNew(ctx, root, r.CRK, nameBinding(id))
	return r, err
}

// wrapNew makes an AES-256 key and returns it wrapped.
func wrapNew(ctx context.Context, root RootKeys, crk string, binding []byte) ([]byte, error) {
	key, err := secret.Random(nil, 32)
	if err != nil {
		return nil, err
	}
	defer key.Wipe()
	return root.Seal(ctx, crk, key, binding)
}

func keyBinding(id string, generation uint32) []byte {
	return fmt.Appendf(nil, "mortise kms instance key\x00%s\x00%d", id, generation)
}

func nameBinding(id string) []byte { return []byte("mortise kms name key\x00" + id) }

func unwrapInstance(ctx context.Context, root RootKeys, id string, r instanceRecord) (_ *instance, err error) {
	if len(r.Keys) == 0 {
		return nil, errors.New("its record names no key")
	}
	i := &instance{id: id, seals: map[uint32]cipher.AEAD{}}
	defer func() {
		if err != nil {
			i.wipe()
		}
	}()
	if i.nameKey, err = root.Open(ctx, r.CRK, r.NameKey, nameBinding(id)); err != nil {
		return nil, fmt.Errorf("unwrapping its name key: %w", err)
	}
	for _, w := range r.Keys {
		key, err := root.Open(ctx, r.CRK, w.Wrapped, keyBinding(id, w.Generation))
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
	return hex.EncodeToString(sum)
}

// A sealed record begins with sealVersion and the generation of the instance
// key, 4 bytes big-endian; nonce (12), ciphertext and tag (16) follow.
const (
	sealVersion = 1
	sealHeader  = 5
	sealLabel   = "mortise kms record\x00"
)

// Seal seals a record with the instance's newest key, bound to the record's
// name. An instance is a store.Sealer.
func (i *instance) Seal(plain, at []byte) ([]byte, error) {
	out := make([]byte, sealHeader, sealHeader+len(plain)+28)
	out[0] = sealVersion
	binary.BigEndian.PutUint32(out[1:], i.current)
	return i.seals[i.current].Seal(out, nil, plain, sealBinding(out, at)), nil
}

// Open is the reverse of Seal, for every generation that is there.
func (i *instance) Open(sealed, at []byte) ([]byte, error) {
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
