package kms

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// A sealed record begins with sealVersion and the generation of the instance
// key, 4 bytes big-endian; nonce (12), ciphertext and tag (16) follow.
const (
	sealVersion = 1
	sealHeader  = 5
	sealLabel   = "mortise kms record\x00"
)

// seal is one generation of an instance key, ready for use. Its AEAD holds
// expanded key bytes on the Go heap for as long as somebody refers to it;
// secret.LockDown keeps them out of dumps.
type seal struct {
	generation uint32
	aead       cipher.AEAD
}

func newSeal(generation uint32, key *secret.Key) (s *seal, err error) {
	s = &seal{generation: generation}
	key.Use(func(b []byte) {
		var block cipher.Block
		if block, err = aes.NewCipher(b); err == nil {
			s.aead, err = cipher.NewGCMWithRandomNonce(block)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("preparing its key of generation %d: %w", generation, err)
	}
	return s, nil
}

// Seal seals a record, bound to the record's name.
func (s *seal) Seal(plain, at []byte) ([]byte, error) {
	out := make([]byte, sealHeader, sealHeader+len(plain)+28)
	out[0] = sealVersion
	binary.BigEndian.PutUint32(out[1:], s.generation)
	return s.aead.Seal(out, nil, plain, sealBinding(out, at)), nil
}

// Open is the reverse of Seal.
func (s *seal) Open(sealed, at []byte) ([]byte, error) {
	if g, ok := generationOf(sealed); !ok || g != s.generation {
		return nil, errors.New("it is not sealed by this generation of the instance key")
	}
	plain, err := s.aead.Open(nil, nil, sealed[sealHeader:], sealBinding(sealed[:sealHeader], at))
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

// generationOf reads which generation sealed a record; false for what is not
// sealed.
func generationOf(stored []byte) (uint32, bool) {
	if len(stored) < sealHeader || stored[0] != sealVersion {
		return 0, false
	}
	return binary.BigEndian.Uint32(stored[1:]), true
}

// keyset is what an instance's records say of its key, unwrapped. It does not
// change: other records make another keyset.
type keyset struct {
	record  int64 // revision of the instance's record
	sealing int64 // revision of its sealing record, 0 if it has none
	crk     string
	newest  *seal            // seals
	seals   map[uint32]*seal // open
}

// Seal seals a record with the generation that is in use. An instance is a
// store.Sealer.
func (i *instance) Seal(plain, at []byte) ([]byte, error) {
	return i.keys.Load().newest.Seal(plain, at)
}

// Open opens a record of any generation that is there.
func (i *instance) Open(sealed, at []byte) ([]byte, error) {
	s, err := i.sealOf(sealed)
	if err != nil {
		return nil, err
	}
	return s.Open(sealed, at)
}

// sealOf returns what opens a record, also after its generation has been retired.
func (i *instance) sealOf(sealed []byte) (*seal, error) {
	g, ok := generationOf(sealed)
	if !ok {
		return nil, errors.New("it is not sealed in a way that this program knows")
	}
	if s := i.keys.Load().seals[g]; s != nil {
		return s, nil
	}
	i.missed.Store(g)
	return nil, fmt.Errorf("it is sealed by generation %d of the instance key, which is not there", g)
}

// commitSealed commits records of an instance. Nothing that an older generation
// has sealed is written once a newer one is in use, on whatever member it was
// sealed: then ErrConflict makes the caller read and seal again. Re-sealing
// relies on it: what it has passed stays passed.
func (k *KMS) commitSealed(ctx context.Context, i *instance, ops ...store.Op) (int64, error) {
	keys := i.keys.Load()
	for _, o := range ops {
		if g, ok := generationOf(o.Stored()); ok && i.owns(o.Name()) && g != keys.newest.generation {
			return 0, fmt.Errorf("kms: %s was sealed before the instance key changed: %w", o.Name(), store.ErrConflict)
		}
	}
	rev, err := k.store.Commit(ctx, append(ops, k.sealing.Unchanged(i.id, keys.sealing))...)
	if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrExists) {
		// Perhaps that was the sealing record: who tries again needs the new one.
		if fresh := k.refresh(ctx, i); fresh != nil {
			k.log.Warn("kms: an instance's keys could not be read again", "instance", i.id, "error", fresh)
		}
		if i.keys.Load().sealing != keys.sealing {
			return 0, fmt.Errorf("kms: the instance key changed meanwhile: %w", store.ErrConflict)
		}
	}
	return rev, err
}

// owns tells whether a record's name, "/collection/key", is in one of the
// instance's collections: kind-instance, and no kind has a hyphen.
func (i *instance) owns(name string) bool {
	collection, _, _ := strings.Cut(strings.TrimPrefix(name, "/"), "/")
	return i.ownsCollection(collection)
}

func (i *instance) ownsCollection(name string) bool {
	_, id, ok := strings.Cut(name, "-")
	return ok && id == i.id
}
