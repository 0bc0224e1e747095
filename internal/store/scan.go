package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"google.golang.org/protobuf/encoding/protowire"
)

// loadPage is how many records one read of a load brings.
const loadPage = 4096

// pages reads the records under prefix as of revision, page by page, in no order.
func (s *Store) pages(ctx context.Context, prefix string, revision int64) iter.Seq2[[]*mvccpb.KeyValue, error] {
	if s.count(prefix) > largeLoad {
		return s.scan(ctx, prefix, revision)
	}
	return s.ask(ctx, prefix, revision)
}

// count is about how many records are under prefix now.
func (s *Store) count(prefix string) int {
	end := []byte(clientv3.GetPrefixRangeEnd(prefix))
	r, err := s.etcd.Server.KV().Range(context.Background(), []byte(prefix), end, mvcc.RangeOptions{CountOnly: true})
	if err != nil {
		return 0
	}
	return r.Count
}

// ask is pages for few records: etcd looks each up in its database.
func (s *Store) ask(ctx context.Context, prefix string, revision int64) iter.Seq2[[]*mvccpb.KeyValue, error] {
	return func(yield func([]*mvccpb.KeyValue, error) bool) {
		end := []byte(clientv3.GetPrefixRangeEnd(prefix))
		for from := []byte(prefix); ; {
			r, err := s.etcd.Server.KV().Range(ctx, from, end, mvcc.RangeOptions{Rev: revision, Limit: loadPage + 1})
			if errors.Is(err, mvcc.ErrCompacted) {
				err = rpctypes.ErrCompacted
			}
			if err != nil {
				yield(nil, err)
				return
			}
			page := r.KVs[:min(len(r.KVs), loadPage)]
			if !yield(page, nil) || len(r.KVs) <= loadPage {
				return
			}
			from = r.KVs[loadPage].Key
		}
	}
}

// scan is pages for many: etcd's index tells which revision of each key counts,
// and the database, which is in the order of revisions, is read once from front to
// back. The records come in that order.
func (s *Store) scan(ctx context.Context, prefix string, revision int64) iter.Seq2[[]*mvccpb.KeyValue, error] {
	return func(yield func([]*mvccpb.KeyValue, error) bool) {
		r, err := s.etcd.Server.KV().Range(ctx, []byte(prefix), []byte(clientv3.GetPrefixRangeEnd(prefix)), mvcc.RangeOptions{Rev: revision, FastKeysOnly: true})
		if errors.Is(err, mvcc.ErrCompacted) {
			err = rpctypes.ErrCompacted
		}
		if err != nil {
			yield(nil, err)
			return
		}
		wanted := r.KVs
		slices.SortFunc(wanted, func(a, b *mvccpb.KeyValue) int {
			if a.ModRevision != b.ModRevision {
				return cmp.Compare(a.ModRevision, b.ModRevision)
			}
			return bytes.Compare(a.Key, b.Key)
		})
		// A read with a limit begins with what is not committed yet, and leaves a gap
		// behind it, so what is wanted has to be committed. A ConcurrentReadTx may even
		// have what was committed since in its copy of that buffer.
		s.etcd.Server.Backend().ForceCommit()
		tx := s.etcd.Server.Backend().ReadTx()
		end := mvcc.RevToBytes(mvcc.Revision{Main: revision + 1}, mvcc.NewRevBytes())
		for limit := loadPage; len(wanted) > 0; {
			if err := ctx.Err(); err != nil {
				yield(nil, err)
				return
			}
			from := mvcc.RevToBytes(mvcc.Revision{Main: wanted[0].ModRevision}, mvcc.NewRevBytes())
			tx.RLock() // nothing is committed meanwhile, and records stay where they are
			at, records := tx.UnsafeRange(schema.Key, from, end, int64(limit))
			n, err := fillIn(wanted, at, records, len(at) == limit)
			tx.RUnlock()
			if err != nil {
				yield(nil, err)
				return
			}
			if n == 0 { // one transaction has deleted very many
				limit *= 2
				continue
			}
			limit = loadPage
			if !yield(slices.Clone(wanted[:n]), nil) {
				return
			}
			clear(wanted[:n]) // the receiver's alone
			wanted = wanted[n:]
		}
	}
}

// fillIn gives the records that are wanted, in the order of revision and key,
// their values from a piece of the database, which begins with the first one's
// revision. It returns how many it has given: all of the revisions that the piece
// has whole. more tells that its last revision may not be among them.
func fillIn(wanted []*mvccpb.KeyValue, at, records [][]byte, more bool) (n int, err error) {
	missing := func() error {
		return fmt.Errorf("the database lacks revision %d of %q: it is damaged, or was compacted meanwhile; try again, or restore a backup", wanted[n].ModRevision, wanted[n].Key)
	}
	for i := 0; i < len(at) && n < len(wanted); {
		main := mvcc.BytesToRev(at[i]).Main
		if main < wanted[n].ModRevision {
			i++
			continue
		}
		last := i
		for last < len(at) && mvcc.BytesToRev(at[last]).Main == main {
			last++
		}
		if last == len(at) && more {
			return n, nil // the next piece has it whole
		}
		of := 0 // how many of wanted are of this revision
		for n+of < len(wanted) && wanted[n+of].ModRevision == main {
			of++
		}
		group, given := wanted[n:n+of], 0
		for ; i < last; i++ {
			if mvcc.IsTombstone(at[i]) {
				continue
			}
			key, value, ok := keyAndValue(records[i])
			if !ok {
				return n, fmt.Errorf("revision %d in the database cannot be read: it is damaged; restore a backup", main)
			}
			if j, ok := slices.BinarySearchFunc(group, key, func(kv *mvccpb.KeyValue, key []byte) int { return bytes.Compare(kv.Key, key) }); ok {
				group[j].Value = bytes.Clone(value)
				given++
			}
		}
		if given != of || of == 0 {
			return n, missing()
		}
		n += of
	}
	if n < len(wanted) && !more {
		return n, missing()
	}
	return n, nil
}

// keyAndValue reads an mvccpb.KeyValue, which is all fields of it; both are parts
// of b.
func keyAndValue(b []byte) (key, value []byte, ok bool) {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, nil, false
		}
		b = b[n:]
		if kind == protowire.BytesType && (field == 1 || field == 5) {
			var v []byte
			if v, n = protowire.ConsumeBytes(b); n < 0 {
				return nil, nil, false
			}
			if field == 1 {
				key = v
			} else {
				value = v
			}
		} else if n = protowire.ConsumeFieldValue(field, kind, b); n < 0 {
			return nil, nil, false
		}
		b = b[n:]
	}
	return key, value, true
}
