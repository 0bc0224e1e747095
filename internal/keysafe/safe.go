package keysafe

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"

	"mortise/internal/secret"
)

const (
	nonceSize = 12
	tagSize   = 16
	overhead  = nonceSize + tagSize
)

// A Safe holds one DEK, wrapped under one or more KEKs. It is immutable: With,
// Without and the like return another. The zero Safe holds nothing.
type Safe struct{ pairs []pair }

type pair struct {
	id   KeyID
	blob []byte // nonce, ciphertext, tag; never changed
}

// Wrap makes a safe of one pair: dek under kek. Nonces come from random, nil
// meaning crypto/rand. The keys stay the caller's.
func Wrap(random io.Reader, b Binding, id KeyID, kek, dek *secret.Key) (Safe, error) {
	return Safe{}.With(random, b, id, kek, dek)
}

// With adds a pair: dek, which must be the one that s holds, under another KEK.
// The caller proves the result with Prove before it drops a pair.
func (s Safe) With(random io.Reader, b Binding, id KeyID, kek, dek *secret.Key) (Safe, error) {
	if err := errors.Join(b.check(), id.check()); err != nil {
		return Safe{}, err
	}
	if n := DEKSize(b.Cipher); dek.Len() != n {
		return Safe{}, fmt.Errorf("keysafe: a key of %d bytes for %s, which has %d", dek.Len(), b.Cipher, n)
	}
	if s.find(id) >= 0 {
		return Safe{}, fmt.Errorf("keysafe: %s already wraps the key of %s", id, b)
	}
	if len(s.pairs) >= MaxPairs {
		return Safe{}, fmt.Errorf("keysafe: %d pairs already wrap the key of %s; finish or drop an earlier recrypt first", MaxPairs, b)
	}
	aead, err := wrapper(id, kek)
	if err != nil {
		return Safe{}, err
	}
	if random == nil {
		random = rand.Reader
	}
	blob := make([]byte, nonceSize, overhead+dek.Len())
	if _, err := io.ReadFull(random, blob); err != nil {
		return Safe{}, fmt.Errorf("keysafe: reading a nonce: %w", err)
	}
	dek.Use(func(k []byte) { blob = aead.Seal(blob, blob[:nonceSize], k, b.additionalData(id)) })
	return Safe{append(slices.Clone(s.pairs), pair{id, blob})}, nil
}

// Without drops the pair of id. The last pair is not dropped: that would lose
// the key.
func (s Safe) Without(id KeyID) (Safe, error) {
	i := s.find(id)
	if i < 0 {
		return s, nil
	}
	if len(s.pairs) == 1 {
		return Safe{}, fmt.Errorf("keysafe: %s is the only key that opens this safe: dropping it would lose the data", id)
	}
	return Safe{slices.Delete(slices.Clone(s.pairs), i, i+1)}, nil
}

// Only drops every pair but that of id.
func (s Safe) Only(id KeyID) (Safe, error) {
	i := s.find(id)
	if i < 0 {
		return Safe{}, fmt.Errorf("keysafe: no pair of %s: dropping the others would lose the data", id)
	}
	return Safe{[]pair{s.pairs[i]}}, nil
}

// KeyIDs lists the KEKs, any of which opens the safe, in the order of the text.
func (s Safe) KeyIDs() []KeyID {
	ids := make([]KeyID, len(s.pairs))
	for i, p := range s.pairs {
		ids[i] = p.id
	}
	return ids
}

// Empty says whether the safe holds no key.
func (s Safe) Empty() bool { return len(s.pairs) == 0 }

func (s Safe) find(id KeyID) int {
	return slices.IndexFunc(s.pairs, func(p pair) bool { return p.id == id })
}

// Unwrap returns the DEK, which the caller wipes, and the id of the KEK that
// opened it: that of the first pair whose KEK the cache holds and that opens.
// Errors: *KeysRequiredError when the cache holds none of the KEKs,
// *TamperedError when none of those it holds opens its pair.
func (s Safe) Unwrap(b Binding, keks KEKs) (*secret.Key, KeyID, error) {
	if err := b.check(); err != nil {
		return nil, KeyID{}, err
	}
	if s.Empty() {
		return nil, KeyID{}, &MissingError{File: b.String(), What: "the key safe"}
	}
	var failed error
	for _, p := range s.pairs {
		kek, ok := keks.KEK(p.id)
		if !ok {
			continue
		}
		dek, err := p.open(b, kek)
		kek.Wipe()
		if err == nil {
			return dek, p.id, nil
		}
		failed = errors.Join(failed, err)
	}
	if failed != nil {
		return nil, KeyID{}, failed
	}
	return nil, KeyID{}, &KeysRequiredError{s.KeyIDs()}
}

// Prove opens every pair and checks that all hold one DEK; it needs all KEKs. A
// shallow recrypt calls it on what it read back, before the old pair goes.
func (s Safe) Prove(b Binding, keks KEKs) error {
	if err := b.check(); err != nil {
		return err
	}
	var first *secret.Key
	defer func() { first.Wipe() }()
	for _, p := range s.pairs {
		kek, ok := keks.KEK(p.id)
		if !ok {
			return &KeysRequiredError{[]KeyID{p.id}}
		}
		dek, err := p.open(b, kek)
		kek.Wipe()
		if err != nil {
			return err
		}
		if first == nil {
			first = dek
			continue
		}
		same := first.Equal(dek)
		dek.Wipe()
		if !same {
			return &TamperedError{"the key safe of " + b.String(), fmt.Sprintf("its pairs of %s and %s hold different keys", s.pairs[0].id, p.id)}
		}
	}
	if first == nil {
		return &MissingError{File: b.String(), What: "the key safe"}
	}
	return nil
}

// Rewrap is the first half of a shallow recrypt (rule R1): the safe with a pair
// of to added and proven to hold the DEK that the present pairs hold. Pairs whose
// KEK the cache lacks are kept and not proven. The caller makes the result
// durable, reads it back, and only then saves what Only(to) returns. Rewrap of a
// safe that has the pair already, left by an interrupted recrypt, proves it.
func (s Safe) Rewrap(random io.Reader, b Binding, keks KEKs, to KeyID) (Safe, error) {
	both := s
	if s.find(to) < 0 {
		dek, _, err := s.Unwrap(b, keks)
		if err != nil {
			return Safe{}, err
		}
		defer dek.Wipe()
		kek, ok := keks.KEK(to)
		if !ok {
			return Safe{}, &KeysRequiredError{[]KeyID{to}}
		}
		defer kek.Wipe()
		if both, err = s.With(random, b, to, kek, dek); err != nil {
			return Safe{}, err
		}
	}
	var provable Safe
	for _, p := range both.pairs {
		kek, ok := keks.KEK(p.id)
		if ok {
			kek.Wipe()
		}
		if ok || p.id == to {
			provable.pairs = append(provable.pairs, p)
		}
	}
	if len(provable.pairs) < 2 && len(both.pairs) > 1 {
		return Safe{}, &KeysRequiredError{s.KeyIDs()}
	}
	if err := provable.Prove(b, keks); err != nil {
		return Safe{}, err
	}
	return both, nil
}

func (p pair) open(b Binding, kek *secret.Key) (*secret.Key, error) {
	aead, err := wrapper(p.id, kek)
	if err != nil {
		return nil, err
	}
	tampered := &TamperedError{"the key safe of " + b.String(), fmt.Sprintf("its pair of key %s does not open with that key", p.id)}
	if len(p.blob) != overhead+DEKSize(b.Cipher) {
		return nil, tampered
	}
	plain, err := aead.Open(nil, p.blob[:nonceSize], p.blob[nonceSize:], b.additionalData(p.id))
	if err != nil {
		return nil, tampered
	}
	return secret.Take(plain)
}

func wrapper(id KeyID, kek *secret.Key) (aead cipher.AEAD, err error) {
	if kek.Len() != KEKSize {
		return nil, fmt.Errorf("keysafe: key %s has %d bytes, a KEK has %d", id, kek.Len(), KEKSize)
	}
	kek.Use(func(k []byte) { aead, err = newGCM(k) })
	return aead, err
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("keysafe: %w", err)
	}
	return cipher.NewGCM(block)
}
