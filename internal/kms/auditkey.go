package kms

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"mortise/internal/kms/audit"
	"mortise/internal/store"
)

// auditKey is a member's signing key in the store: its seed sealed by an
// instance's key.
type auditKey struct {
	Public   audit.Hex
	Instance string
	Sealed   []byte
	// Former are public keys that the member signed with before.
	Former []audit.Hex `json:",omitempty"`
	Since  time.Time
}

// keepAuditKey gives the log its signing key once an instance is open, and keeps
// that sealed by a key that is in use.
func (k *KMS) keepAuditKey(ctx context.Context) {
	if k.journal.HasKey() && time.Since(k.keyed) < resealEvery {
		return
	}
	inst := k.auditInstance()
	if inst == nil {
		return
	}
	if err := k.openAuditKey(ctx, inst); err != nil && ctx.Err() == nil {
		k.log.Error("kms: the audit log's signing key cannot be used; its heads are not signed", "error", err)
	}
	k.keyed = time.Now()
}

// auditInstance is the one whose key seals the signing key.
func (k *KMS) auditInstance() *instance {
	list := k.open()
	slices.SortFunc(list, func(a, b *instance) int {
		if (a.id == DefaultInstance) != (b.id == DefaultInstance) {
			if a.id == DefaultInstance {
				return -1
			}
			return 1
		}
		if a.id < b.id {
			return -1
		}
		return 1
	})
	if len(list) == 0 {
		return nil
	}
	return list[0]
}

func (k *KMS) sealedAt(instance string) []byte {
	return auditKeyAt(instance, k.member)
}

func auditKeyAt(instance, member string) []byte {
	return []byte("/audit-key-" + instance + "/" + member)
}

func (k *KMS) openAuditKey(ctx context.Context, inst *instance) error {
	for {
		err := k.sealAuditKey(ctx, inst)
		if !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrExists) {
			return err
		}
		// A write of this member's own, given up when it was stopped, was made
		// after all; or the instance's key is being changed.
		if err := k.refresh(ctx, inst); err != nil {
			return err
		}
	}
}

func (k *KMS) sealAuditKey(ctx context.Context, inst *instance) error {
	e, err := k.auditKeys.Get(ctx, k.member)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	r := e.Value
	var seed []byte
	defer func() { clear(seed) }()
	if sealer := k.opened(r.Instance); sealer != nil && len(r.Sealed) > 0 {
		if seed, err = sealer.Open(r.Sealed, k.sealedAt(r.Instance)); err != nil || len(seed) != ed25519.SeedSize {
			k.log.Error("kms: the audit log's signing key does not open; another is made", "key", r.Public.String(), "error", err)
			seed = nil
		}
	} else if len(r.Sealed) > 0 && k.known(ctx, r.Instance) {
		return fmt.Errorf("kms: it is sealed by instance %q, which is not open", r.Instance)
	}
	fresh := seed == nil
	if fresh {
		seed = make([]byte, ed25519.SeedSize)
		if _, err := rand.Read(seed); err != nil {
			return err
		}
		if len(r.Public) > 0 {
			r.Former = append(r.Former, r.Public)
		}
		r.Since = k.now().UTC()
	}
	key := ed25519.NewKeyFromSeed(seed)
	r.Public, r.Instance = audit.Hex(key.Public().(ed25519.PublicKey)), inst.id
	keys := inst.keys.Load()
	if r.Sealed, err = keys.newest.Seal(seed, k.sealedAt(inst.id)); err != nil {
		return fmt.Errorf("kms: sealing it: %w", err)
	}
	op := k.auditKeys.Update(k.member, e.Revision, r)
	if e.Revision == 0 {
		op = k.auditKeys.Create(k.member, r)
	}
	ops := []store.Op{op, k.sealing.Unchanged(inst.id, keys.sealing)}
	if fresh {
		// Who reads the log learns of the key from the log too.
		note := k.entry(Actor{Kind: "server", Name: k.member}, "", "New Audit Key", r.Public.String(), nil)
		ops = append(ops, k.enqueue(&note))
	}
	if _, err = k.store.Commit(ctx, ops...); err != nil {
		return fmt.Errorf("kms: keeping it: %w", err)
	}
	k.journal.SetKey(key)
	return nil
}

// resealAuditKeys seals the signing keys of all members that an older generation
// of the instance's key has sealed by the one that seals now, before the older
// ones are dropped. None comes back: sealAuditKey compares what seals.
func (k *KMS) resealAuditKeys(ctx context.Context, inst *instance, guard store.Op) error {
	keys := inst.keys.Load()
	entries, err := k.auditKeys.List(ctx, "")
	if err != nil && !errors.Is(err, store.ErrDamaged) {
		return err
	}
	for _, e := range entries {
		for {
			err := k.resealAuditKey(ctx, inst, keys, e, guard)
			if err == nil {
				break
			}
			if !gone(err) {
				return fmt.Errorf("re-sealing the signing key of the audit log of %s: %w", e.Key, err)
			}
			if e, err = k.auditKeys.Get(ctx, e.Key); err != nil { // its member was faster
				return err
			}
		}
	}
	return nil
}

func (k *KMS) resealAuditKey(ctx context.Context, inst *instance, keys *keyset, e store.Entry[auditKey], guard store.Op) error {
	r, at := e.Value, auditKeyAt(inst.id, e.Key)
	if g, ok := generationOf(r.Sealed); r.Instance != inst.id || !ok || g == keys.newest.generation {
		return nil
	}
	seed, err := inst.Open(r.Sealed, at)
	if err != nil {
		// Nobody can use it; its member makes another, and says so in its log.
		k.log.Error("kms: the signing key of an audit log does not open", "member", e.Key, "key", r.Public.String(), "error", err)
		return nil
	}
	defer clear(seed)
	if r.Sealed, err = keys.newest.Seal(seed, at); err != nil {
		return err
	}
	_, err = k.store.Commit(ctx, k.auditKeys.Update(e.Key, e.Revision, r), k.sealing.Unchanged(inst.id, keys.sealing), guard)
	return err
}

// opened returns an open instance, nil if it is not.
func (k *KMS) opened(id string) *instance {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.instances[id]
}

// known tells whether there is such an instance, open or not.
func (k *KMS) known(ctx context.Context, id string) bool {
	_, err := k.records.Get(ctx, id)
	return !errors.Is(err, store.ErrNotFound)
}

// AuditKeys lists the public keys with which members sign, and signed before.
func (k *KMS) AuditKeys(ctx context.Context) ([]audit.MemberKey, error) {
	entries, err := k.auditKeys.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing audit keys: %w", err)
	}
	list := []audit.MemberKey{}
	for _, e := range entries {
		for _, key := range append(e.Value.Former, e.Value.Public) {
			list = append(list, audit.MemberKey{Member: e.Key, Key: key})
		}
	}
	return list, nil
}
