package kms

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"mortise/internal/secret"
	"mortise/internal/store"
)

// A Backup is what the KMS remembers of a backup that was made of it (S9): with
// it, and with what opens it, keys that are shredded here open again (S6).
type Backup struct {
	ID   string    `json:"id"`
	Time time.Time `json:"time"`
	By   string    `json:"by"`
	// CRKs are the ids of the root keys that open its records. Those of kind
	// "file" are in the backup; a token's stay in the token.
	CRKs []string `json:"crks"`
	// Complete is false until the whole backup was handed over. A part of one
	// may exist.
	Complete bool  `json:"complete"`
	Revision int64 `json:"revision,omitempty"` // of the store, that the backup is of
	Records  int64 `json:"records,omitempty"`
}

// BackupHeader is what a backup says of itself first.
type BackupHeader struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
	// CRKs are the root keys that its records need, by kind of provider.
	CRKs map[string][]string `json:"crks"`
}

// A BackupSink takes a backup: the header, then the root keys that can be in it,
// then the records. It must not keep what it is given.
type BackupSink interface {
	Header(BackupHeader) error
	// RootKeys gets root keys in the form in which members share them.
	RootKeys(kind string, share *secret.Key) error
	Record(store.Record) error
}

// KindFile is the kind of root-key provider whose keys a backup can hold. A
// token's keys cannot leave it.
const KindFile = "file"

// backupShare is how many root keys are shared at a time.
const backupShare = 32

// errChangedMeanwhile: a CRK was made or rotated while a backup ran.
var errChangedMeanwhile = errors.New("root keys have changed while the backup was made; make it again")

// LeftOutOfBackup tells whether a collection stays out of backups: membership
// and cluster time belong to the cluster that is lost, and the next one has its
// own; so do the anchors of its members' audit logs (S9).
func LeftOutOfBackup(collection string) bool {
	switch collection {
	case "member", "join-token", "peer-authority", "holdings", "clock", quarantineCollection, actsCollection:
		return true
	}
	return strings.HasPrefix(collection, "audit")
}

// Backup hands everything of one revision to sink. It is in the list of backups
// before the first byte leaves, so that no backup exists that the list does not
// have. The store goes on working meanwhile.
func (k *KMS) Backup(ctx context.Context, by Actor, sink BackupSink) (Backup, error) {
	if _, err := k.Quarantined(ctx); err == nil {
		return Backup{}, fmt.Errorf("kms: %w: release the restored server before you back it up", ErrQuarantined)
	} else if !errors.Is(err, store.ErrNotFound) {
		return Backup{}, err
	}
	b, needed, err := k.beginBackup(ctx, by)
	if err != nil {
		return b, err
	}
	// What can fail does so before the first byte.
	shares, err := k.shareRootKeys(ctx, needed[KindFile])
	defer func() {
		for _, s := range shares {
			s.Wipe()
		}
	}()
	if err != nil {
		return b, fmt.Errorf("kms: backing up the root keys: %w", err)
	}
	if err := sink.Header(BackupHeader{b.ID, b.Time, needed}); err != nil {
		return b, err
	}
	for _, s := range shares {
		if err := sink.RootKeys(KindFile, s); err != nil {
			return b, err
		}
	}
	b.Revision, err = k.store.Export(ctx, func(r store.Record) error {
		if LeftOutOfBackup(r.Collection) {
			return nil
		}
		if r.Collection == "instance" {
			if err := checkCRKs("/"+r.Collection+"/"+r.Key, r.Stored, needed); err != nil {
				return err
			}
		}
		b.Records++
		return sink.Record(r)
	})
	if err != nil {
		return b, fmt.Errorf("kms: backing up: %w", err)
	}
	b.Complete = true
	if err := k.commitAs(ctx, by, nil, "backup", b.ID, k.backups.Put(b.ID, b)); err != nil {
		return b, fmt.Errorf("kms: recording the backup: %w", err)
	}
	k.log.Info("kms: backup made", "backup", b.ID, "revision", b.Revision, "records", b.Records, "by", by.Name)
	return b, nil
}

// beginBackup puts a backup on the list, and says which CRKs it needs.
func (k *KMS) beginBackup(ctx context.Context, by Actor) (b Backup, needed map[string][]string, err error) {
	entries, err := k.records.List(ctx, "")
	if err != nil {
		return b, nil, fmt.Errorf("kms: reading the instances: %w", err)
	}
	crks, err := k.crks.List(ctx, "")
	if err != nil {
		return b, nil, fmt.Errorf("kms: reading the CRKs: %w", err)
	}
	b = Backup{Time: k.now().UTC().Truncate(time.Second), By: by.Name, CRKs: []string{}}
	needed = map[string][]string{}
	need := func(kind, id string) {
		if !slices.Contains(needed[kind], id) {
			needed[kind] = append(needed[kind], id)
			b.CRKs = append(b.CRKs, id)
		}
	}
	for _, e := range entries {
		need(e.Value.Provider, e.Value.CRK)
	}
	// And those that are about to be used: a rotation may be under way. Retired
	// ones open nothing that is in this backup.
	for _, e := range crks {
		if e.Value.State == CRKUnused || e.Value.State == CRKActive {
			need(e.Value.Provider, e.Key)
		}
	}
	slices.Sort(b.CRKs)
	b.ID = fmt.Sprintf("%s-%s", b.Time.Format("20060102t150405z"), strings.ToLower(rand.Text()[:8]))
	if err := k.commitAs(ctx, by, nil, "backup begin", b.ID, k.backups.Create(b.ID, b)); err != nil {
		return b, nil, fmt.Errorf("kms: recording the backup: %w", err)
	}
	return b, needed, nil
}

// shareRootKeys returns the root keys, the caller's to wipe, after an error too.
func (k *KMS) shareRootKeys(ctx context.Context, ids []string) (shares []*secret.Key, err error) {
	if len(ids) == 0 {
		return nil, nil
	}
	k.mu.RLock()
	root := k.roots[KindFile]
	k.mu.RUnlock()
	if root == nil {
		return nil, ErrLocked
	}
	keys, ok := root.(Sharer)
	if !ok {
		return nil, errors.New("this root-key provider cannot hand on its keys")
	}
	here, err := keys.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if !slices.Contains(here, id) {
			return nil, fmt.Errorf("this member has no CRK %s; make the backup on another member", id)
		}
	}
	for chunk := range slices.Chunk(ids, backupShare) {
		share, err := keys.Share(ctx, chunk)
		if err != nil {
			return shares, err
		}
		shares = append(shares, share)
	}
	return shares, nil
}

// checkCRKs makes sure that a backed-up instance opens with the CRKs of its
// backup.
func checkCRKs(at string, stored []byte, needed map[string][]string) error {
	r, err := store.JSON[instanceRecord](1).Decode(at, stored)
	if err != nil {
		return err
	}
	if !slices.Contains(needed[r.Provider], r.CRK) {
		return errChangedMeanwhile
	}
	return nil
}

// Backups lists the backups that were made, the oldest first.
func (k *KMS) Backups(ctx context.Context) ([]Backup, error) {
	entries, err := k.backups.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: listing backups: %w", err)
	}
	list := make([]Backup, 0, len(entries))
	for _, e := range entries {
		list = append(list, e.Value)
	}
	return list, nil
}

// ForgetBackup takes a backup off the list: for one that is known to be gone,
// with all its copies.
func (k *KMS) ForgetBackup(ctx context.Context, by Actor, id string) error {
	if err := k.commitAs(ctx, by, nil, "backup forget", id, k.backups.Delete(id, 0)); err != nil {
		return fmt.Errorf("kms: forgetting backup %.80q: %w", id, err)
	}
	return nil
}
