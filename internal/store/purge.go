package store

import (
	"context"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// purgePage is how many records one transaction of Purge removes: no write of
// somebody else waits long for it.
const purgePage = 1000

// Keys returns the keys of all records of the collection called name, open or
// not: linearizable.
func (s *Store) Keys(ctx context.Context, name string) ([]string, error) {
	if err := s.sync(ctx); err != nil {
		return nil, fmt.Errorf("store: listing %s: %w", name, err)
	}
	var list []string
	prefix := "/" + name + "/"
	for page, err := range s.pages(ctx, prefix, 0) {
		if err != nil {
			return nil, fmt.Errorf("store: listing %s: %w", name, fromEtcd(err))
		}
		for _, kv := range page {
			list = append(list, string(kv.Key[len(prefix):]))
		}
	}
	return list, nil
}

// Purge removes every record of the collection called name, page by page, and
// returns how many there were. What it was interrupted at goes on with the next
// call. The collection should not be written to meanwhile.
func (s *Store) Purge(ctx context.Context, name string) (removed int64, err error) {
	prefix := "/" + name + "/"
	end := clientv3.GetPrefixRangeEnd(prefix)
	for {
		page, err := s.client.Get(ctx, prefix, clientv3.WithRange(end), clientv3.WithKeysOnly(), clientv3.WithLimit(purgePage))
		if err != nil {
			return removed, fmt.Errorf("store: purging %s: %w", name, fromEtcd(err))
		}
		if len(page.Kvs) == 0 {
			return removed, nil
		}
		last := string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
		gone, err := s.client.Delete(ctx, prefix, clientv3.WithRange(last))
		if err != nil {
			return removed, fmt.Errorf("store: purging %s: %w", name, fromEtcd(err))
		}
		removed += gone.Deleted
	}
}
