package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"google.golang.org/protobuf/proto"
)

// RevisionBump is how far a restored store's revisions are ahead of the
// backup's: further than the lost store can have come since. Whoever remembers
// a revision of it (the audit log does) never meets the same one again.
const RevisionBump = 1_000_000_000

// snapshotPage is how many records a read of an export brings, and how many a
// write of a restore takes.
const snapshotPage = 2000

// A Record is a record as etcd has it.
type Record struct {
	Collection, Key string
	Stored          []byte // the receiver must not keep it
	// Created and Modified are the revisions of its first and last write,
	// Version how many there were.
	Created, Modified, Version int64
}

// Export calls each with every record, in order of their names, all as of one
// revision: what was committed before the call is in it. It returns that
// revision. Elections and what else hangs on a lease are left out. Other work
// goes on meanwhile; an export that takes longer than old revisions are kept
// (an hour) fails.
func (s *Store) Export(ctx context.Context, each func(Record) error) (revision int64, err error) {
	if err := s.etcd.Server.LinearizableReadNotify(ctx); err != nil {
		return 0, fmt.Errorf("store: exporting: %w: %w", ErrUnavailable, err)
	}
	revision = s.etcd.Server.KV().Rev()
	end := clientv3.GetPrefixRangeEnd("/")
	for from := "/"; ; {
		answer, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithRev(revision),
			clientv3.WithLimit(snapshotPage), clientv3.WithSerializable())
		if err != nil {
			return 0, fmt.Errorf("store: exporting: %w", fromEtcd(err))
		}
		for _, kv := range answer.Kvs {
			name, key, ok := split(kv.Key)
			if !ok || kv.Lease != 0 {
				continue
			}
			if err := each(Record{name, key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.Version}); err != nil {
				return 0, err
			}
		}
		if !answer.More {
			return revision, nil
		}
		from = string(answer.Kvs[len(answer.Kvs)-1].Key) + "\x00"
	}
}

// Restore makes a store in cfg.Dir, which must not hold one, of exported
// records as of revision. records calls its argument with each. The new store
// has one member, no history, the records at their old revisions, and goes on
// at revision + [RevisionBump]. It is whole and durable when Restore returns;
// after an error the folder is of no use.
//
// The records are put into etcd's database directly, as etcd's own restore does
// it (etcdutl snapshot restore --bump-revision): raft's log does not know them.
// So the log is cut behind them, and a member that joins later is sent the
// whole database.
func Restore(ctx context.Context, cfg Config, revision int64, records func(func(Record) error) error) error {
	if _, err := os.Stat(filepath.Join(cfg.Dir, "etcd")); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("store: %s holds a store already (%v); a restore needs an empty folder", cfg.Dir, err)
	}
	cfg.Peers, cfg.Single = nil, false
	empty, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	if err := empty.Close(); err != nil {
		return err
	}
	count, err := fill(ctx, filepath.Join(cfg.Dir, "etcd", "member", "snap", "db"), revision, records)
	if err != nil {
		return fmt.Errorf("store: restoring: %w", err)
	}
	cfg.snapshotEvery = 1
	s, err := Open(ctx, cfg)
	if err != nil {
		return fmt.Errorf("store: opening what was restored: %w", err)
	}
	err = s.checkRestored(ctx, revision, count)
	return errors.Join(err, s.Close())
}

// fill puts records into etcd's database file.
func fill(ctx context.Context, path string, revision int64, records func(func(Record) error) error) (count int64, err error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true}) // synced at the end
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var tx *bbolt.Tx
	defer func() {
		if tx != nil {
			err = errors.Join(err, tx.Rollback())
		}
	}()
	subs := map[int64]int64{} // a revision's next sub-revision: several records of one transaction
	err = records(func(r Record) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := r.check(revision); err != nil {
			return err
		}
		if tx == nil {
			if tx, err = db.Begin(true); err != nil {
				return err
			}
		}
		at := mvcc.RevToBytes(mvcc.Revision{Main: r.Modified, Sub: subs[r.Modified]}, mvcc.NewRevBytes())
		subs[r.Modified]++
		kv, err := proto.Marshal(&mvccpb.KeyValue{
			Key: []byte("/" + r.Collection + "/" + r.Key), Value: r.Stored, CreateRevision: r.Created, ModRevision: r.Modified, Version: r.Version,
		})
		if err != nil {
			return err
		}
		if err := tx.Bucket(schema.Key.Name()).Put(at, kv); err != nil {
			return err
		}
		if count++; count%snapshotPage != 0 {
			return nil
		}
		err = tx.Commit()
		tx = nil
		return err
	})
	if err != nil {
		return 0, err
	}
	if tx == nil {
		if tx, err = db.Begin(true); err != nil {
			return 0, err
		}
	}
	// etcd takes the revision of a scheduled compaction for one that it has
	// reached, and finishes the compaction when it starts.
	bumped := mvcc.RevToBytes(mvcc.Revision{Main: revision + RevisionBump}, mvcc.NewRevBytes())
	if err := tx.Bucket(schema.Meta.Name()).Put(schema.ScheduledCompactKeyName, bumped); err != nil {
		return 0, err
	}
	err = tx.Commit()
	tx = nil
	return count, errors.Join(err, db.Sync())
}

// check refuses what no export has written.
func (r Record) check(revision int64) error {
	switch {
	case r.Collection == "" || strings.Trim(r.Collection, "abcdefghijklmnopqrstuvwxyz0123456789-") != "":
		return fmt.Errorf("%.60q is no name for a collection", r.Collection)
	case r.Created < 1 || r.Modified < r.Created || r.Modified > revision || r.Version < 1:
		return fmt.Errorf("record /%s/%.60q has revisions %d to %d and version %d in an export of revision %d", r.Collection, r.Key, r.Created, r.Modified, r.Version, revision)
	}
	return checkKey(r.Key)
}

// checkRestored reads the restored records back, and makes etcd cut its log:
// it does so when it has written a snapshot, after a few entries.
func (s *Store) checkRestored(ctx context.Context, revision, count int64) error {
	for range 4 {
		if _, err := s.client.Put(ctx, "restored", ""); err != nil { // outside of every collection
			return fmt.Errorf("store: cutting the log of the restored store: %w", fromEtcd(err))
		}
	}
	if _, err := s.client.Delete(ctx, "restored"); err != nil {
		return fmt.Errorf("store: cutting the log of the restored store: %w", fromEtcd(err))
	}
	found := int64(0)
	at, err := s.Export(ctx, func(Record) error { found++; return nil })
	if err != nil {
		return err
	}
	if found != count || at <= revision+RevisionBump {
		return fmt.Errorf("store: the restored store has %d records at revision %d, not %d after revision %d", found, at, count, revision+RevisionBump)
	}
	snaps, err := filepath.Glob(filepath.Join(s.dir, "etcd", "member", "snap", "*.snap"))
	if err != nil || len(snaps) == 0 {
		return fmt.Errorf("store: etcd has not cut the log of the restored store (%v)", err)
	}
	return nil
}
