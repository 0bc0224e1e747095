package kms

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// instanceRecord is how an instance is stored: in clear, its keys wrapped by
// the CRK.
type instanceRecord struct {
	Created  time.Time
	Settings Settings
	// Ungranted is since when it may not use its CRK; zero: it may.
	Ungranted time.Time `json:",omitzero"`
	// Provider is the kind of root-key provider that keeps the CRK.
	Provider string
	// CRK is the id of the root key that wraps the keys below.
	CRK string
	// Keys are the generations of the instance key. The sealing record says which
	// one seals; the others only open.
	Keys []wrappedKey
	// NameKey is the wrapped key of the index of names.
	NameKey []byte
	// Shredded: what was destroyed and purged by then is shredded.
	Shredded time.Time `json:",omitzero"`
}

type wrappedKey struct {
	Generation uint32
	Wrapped    []byte
}

// instance is an open instance.
type instance struct {
	id         string
	keys       atomic.Pointer[keyset]
	refreshing sync.Mutex    // held while keys is replaced
	missed     atomic.Uint32 // generation of a record that came before its key; 0: none
	nameKey    *secret.Key

	objects *store.Collection[*object]
	names   *store.Collection[string]
	clients *store.Collection[Client]

	turns   turns // of groups' members
	apiKeys *store.Collection[APIKey]
	// authorities has the instance's CA, once it has one.
	authorities *store.Collection[*authority]

	created int64       // revision at which its record was made
	retired atomic.Bool // taken out of service
	pace    bucket      // of requests, see Quota
}

// openInstance unwraps the keys of an instance and loads its records.
func (k *KMS) openInstance(ctx context.Context, roots map[string]RootKeys, e store.Entry[instanceRecord]) (_ *instance, err error) {
	s, id := k.store, e.Key
	root := roots[e.Value.Provider]
	if root == nil {
		return nil, fmt.Errorf("its CRK is kept by a root-key provider of kind %q, which is not configured", e.Value.Provider)
	}
	i, err := k.unwrapInstance(ctx, root, e)
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
	if i.names, err = store.NewCollection(ctx, s, "name-"+id, store.JSON[string](1), store.Uncached[string]()); err != nil {
		return nil, err
	}
	if i.clients, err = store.NewCollection(ctx, s, "client-"+id, store.Sealed(store.JSON[Client](1), i)); err != nil {
		return nil, err
	}
	if i.apiKeys, err = store.NewCollection(ctx, s, "apikey-"+id, store.Sealed(store.JSON[APIKey](1), i)); err != nil {
		return nil, err
	}
	i.authorities, err = store.NewCollection(ctx, s, "authority-"+id, store.Codec[*authority](authorityCodec{i}))
	return i, err
}

// close forgets the instance's records and wipes what keys it can. Nobody must
// use the instance any more.
func (i *instance) close() {
	i.forget()
	i.wipe()
}

// forget closes the instance's collections: who still uses them finds nothing.
func (i *instance) forget() {
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
	if i.authorities != nil {
		i.authorities.Close()
	}
}

// reload decodes the instance's sealed records anew.
func (i *instance) reload(ctx context.Context) error {
	return errors.Join(i.objects.Reload(ctx), i.clients.Reload(ctx), i.apiKeys.Reload(ctx), i.authorities.Reload(ctx))
}

// newInstance makes a CRK for the instance called id, and its keys. Until done is
// called the CRK may be without an instance.
func (k *KMS) newInstance(ctx context.Context, root RootKeys, id string) (r instanceRecord, done func(), err error) {
	r = instanceRecord{Created: k.now().UTC(), Provider: root.Kind(), Keys: []wrappedKey{{Generation: 1}}}
	if r.CRK, done, err = k.mintNew(ctx, root, crkRecord{Instance: id, State: CRKUnused}); err != nil {
		return r, done, err
	}
	if r.Keys[0].Wrapped, err = wrapNew(ctx, root, r.CRK, keyBinding(id, 1)); err != nil {
		return r, done, err
	}
	r.NameKey, err = wrapNew(ctx, root, r.CRK, nameBinding(id))
	return r, done, err
}

// inUse is the write by which an instance begins to use a new CRK.
func (k *KMS) inUse(ctx context.Context, crk, instance string) (store.Op, error) {
	e, err := k.crks.Get(ctx, crk)
	if err != nil {
		return store.Op{}, fmt.Errorf("CRK %s: %w", crk, err)
	}
	if e.Value.State != CRKUnused {
		return store.Op{}, fmt.Errorf("CRK %s is %s: %w", crk, e.Value.State, ErrCRKInUse)
	}
	e.Value.State, e.Value.Changed, e.Value.Instance = CRKActive, k.now().UTC(), instance
	return k.crks.Update(crk, e.Revision, e.Value), nil
}

func keyBinding(id string, generation uint32) []byte {
	return fmt.Appendf(nil, "mortise kms instance key\x00%s\x00%d", id, generation)
}

func nameBinding(id string) []byte { return []byte("mortise kms name key\x00" + id) }

func (k *KMS) unwrapInstance(ctx context.Context, root RootKeys, e store.Entry[instanceRecord]) (*instance, error) {
	keys, err := k.unwrap(ctx, root, e, nil)
	if err != nil {
		return nil, err
	}
	i := &instance{id: e.Key}
	if i.nameKey, err = root.Open(ctx, e.Value.CRK, e.Value.NameKey, nameBinding(e.Key)); err != nil {
		return nil, fmt.Errorf("unwrapping its name key: %w", err)
	}
	i.keys.Store(keys)
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
