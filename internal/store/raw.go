package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
)

// Records as they are stored, for who re-seals them without knowing what they
// are.

// Name is the record that o is about: "/collection/key".
func (o Op) Name() string { return o.at }

// Stored is what o writes, nil if it writes nothing. It must not be changed.
func (o Op) Stored() []byte { return o.op.GetRequestPut().GetValue() }

// Collections lists the names of the collections that have records, now.
func (s *Store) Collections(ctx context.Context) ([]string, error) {
	if err := s.readIndex(ctx); err != nil {
		return nil, fmt.Errorf("store: listing collections: %w", err)
	}
	var names []string
	for from := []byte("/"); ; {
		r, err := s.etcd.Server.KV().Range(ctx, from, []byte("0"), mvcc.RangeOptions{Limit: 1})
		if err != nil {
			return nil, fmt.Errorf("store: listing collections: %w", fromEtcd(err))
		}
		if len(r.KVs) == 0 {
			return names, nil
		}
		name, _, _ := strings.Cut(string(r.KVs[0].Key[1:]), "/")
		names = append(names, name)
		from = []byte("/" + name + "0") // '0' follows '/': past everything of that name
	}
}

// Scan calls each with every record of a collection, as of one revision: what
// was committed before the call is in it. It does not go through the cache.
func (s *Store) Scan(ctx context.Context, collection string, each func(Record) error) error {
	if err := s.readIndex(ctx); err != nil {
		return fmt.Errorf("store: scanning %s: %w", collection, err)
	}
	prefix := "/" + collection + "/"
	for kvs, err := range s.pages(ctx, prefix, s.etcd.Server.KV().Rev()) {
		if err != nil {
			return fmt.Errorf("store: scanning %s: %w", collection, fromEtcd(err))
		}
		for _, kv := range kvs {
			if err := each(record(collection, kv)); err != nil {
				return err
			}
		}
	}
	return nil
}

func record(collection string, kv *mvccpb.KeyValue) Record {
	return Record{collection, string(kv.Key[len(collection)+2:]), kv.Value, kv.CreateRevision, kv.ModRevision, kv.Version}
}

// Rewrite puts other bytes in the place of a record that Scan gave; ErrConflict
// if it has changed since.
func Rewrite(r Record, stored []byte) Op {
	o := Op{at: "/" + r.Collection + "/" + r.Key, need: mustBeAt, rev: r.Modified, err: checkKey(r.Key)}
	if len(stored) == 0 {
		o.err = errors.New("a record is not rewritten to nothing")
	}
	o.op = &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(o.at), Value: stored}}}
	return o
}

// Reload decodes a collection's records anew: for one whose codec could not read
// some of them when they came.
func (c *Collection[T]) Reload(ctx context.Context) error {
	c.s.cache.loading.Lock()
	defer c.s.cache.loading.Unlock()
	c.s.cache.mu.RLock()
	at, open := c.s.cache.revision.Load(), c.s.cache.tables[c.name] == table(c)
	c.s.cache.mu.RUnlock()
	if !open {
		return fmt.Errorf("store: reloading %s: it is closed", c.name)
	}
	replace, err := c.stage(c.s.pages(ctx, "/"+c.name+"/", at))
	if err != nil {
		return fmt.Errorf("store: reloading %s: %w", c.name, fromEtcd(err))
	}
	c.s.cache.mu.Lock()
	defer c.s.cache.mu.Unlock()
	replace()
	return nil
}
