package store

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// A Queue is records that are taken out in the order in which they were
// committed. Each member of a cluster has a part of its own, and keeps in memory
// what is in it; what is in the others' it reads when it is asked to.
//
// A record is put in by an Op, in the transaction of what it is about. Who has
// taken care of the oldest ones removes them by Ops, and drops them from memory.
type Queue struct {
	s       *Store
	name    string
	part    string        // "member/"
	items   []Item        // by revision; guarded by s.cache.mu, as what follows
	dropped int64         // items up to this revision were dropped
	ready   chan struct{} // holds something when there may be new items
}

// An Item is a record of a queue.
type Item struct {
	Part     string
	Key      string
	Value    []byte
	Revision int64
}

// NewQueue opens the queue called name, and member's part of it.
func NewQueue(ctx context.Context, s *Store, name, member string) (*Queue, error) {
	if member == "" || strings.ContainsAny(member, "/\x00") {
		return nil, fmt.Errorf("store: %q is no name of a member", member)
	}
	q := &Queue{s: s, name: name, part: member + "/", ready: make(chan struct{}, 1)}
	if err := s.load(ctx, name, q); err != nil {
		return nil, fmt.Errorf("store: loading queue %s: %w", name, err)
	}
	return q, nil
}

// Close ends the keeping of items in memory.
func (q *Queue) Close() {
	q.s.cache.loading.Lock()
	defer q.s.cache.loading.Unlock()
	q.s.cache.mu.Lock()
	defer q.s.cache.mu.Unlock()
	if q.s.cache.tables[q.name] == table(q) {
		delete(q.s.cache.tables, q.name)
	}
	q.items = nil
}

// Add puts a record at the end of this member's part. key must be one that was
// never used.
func (q *Queue) Add(key string, value []byte) Op {
	o := Op{at: "/" + q.name + "/" + q.part + key, need: anything, err: checkKey(q.part + key)}
	o.op = &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(o.at), Value: value}}}
	return o
}

// Remove takes a record out; it does not matter whether it is there.
func (q *Queue) Remove(i Item) Op {
	o := Op{at: "/" + q.name + "/" + i.Part + i.Key, need: anything}
	o.op = &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(o.at)}}}
	return o
}

// Take is Remove, and makes the transaction fail with ErrNotFound if somebody
// else has taken the record out.
func (q *Queue) Take(i Item) Op {
	o := q.Remove(i)
	o.need = mustExist
	return o
}

// Len is how many items of this member's part wait.
func (q *Queue) Len() int {
	q.s.cache.mu.RLock()
	defer q.s.cache.mu.RUnlock()
	return len(q.items)
}

// Ready holds something when items may have come since it was last received
// from.
func (q *Queue) Ready() <-chan struct{} { return q.ready }

// Oldest returns about n items of this member's part that were not dropped yet:
// all of a transaction, or none.
func (q *Queue) Oldest(n int) []Item {
	q.s.cache.mu.RLock()
	defer q.s.cache.mu.RUnlock()
	n = min(n, len(q.items))
	for n > 0 && n < len(q.items) && q.items[n].Revision == q.items[n-1].Revision {
		n++
	}
	return slices.Clone(q.items[:n])
}

// Drop forgets the items up to and including this one, which was the last that
// Oldest returned. It removes nothing from the store.
func (q *Queue) Drop(last Item) {
	q.s.cache.mu.Lock()
	defer q.s.cache.mu.Unlock()
	q.dropped = last.Revision
	at, _ := slices.BinarySearchFunc(q.items, last.Revision+1, func(i Item, rev int64) int { return cmp.Compare(i.Revision, rev) })
	clear(q.items[:at])
	if q.items = q.items[at:]; len(q.items) == 0 {
		q.items = nil // or the array would grow for ever
	}
}

// Others returns the items of other members' parts, by revision.
func (q *Queue) Others(ctx context.Context) ([]Item, error) {
	if err := q.s.sync(ctx); err != nil {
		return nil, fmt.Errorf("store: reading queue %s: %w", q.name, err)
	}
	var all []Item
	for page, err := range q.s.pages(ctx, "/"+q.name+"/", q.s.etcd.Server.KV().Rev()) {
		if err != nil {
			return nil, fmt.Errorf("store: reading queue %s: %w", q.name, fromEtcd(err))
		}
		for _, kv := range page {
			if i, ok := q.item(string(kv.Key[len(q.name)+2:]), kv); ok && i.Part != q.part {
				all = append(all, i)
			}
		}
	}
	slices.SortFunc(all, byRevision)
	return all, nil
}

func byRevision(a, b Item) int {
	return cmp.Or(cmp.Compare(a.Revision, b.Revision), strings.Compare(a.Key, b.Key))
}

// item cuts "member/key".
func (q *Queue) item(key string, kv *mvccpb.KeyValue) (Item, bool) {
	member, rest, ok := strings.Cut(key, "/")
	return Item{Part: member + "/", Key: rest, Value: kv.Value, Revision: kv.ModRevision}, ok && rest != ""
}

func (q *Queue) prepare(key string, kv *mvccpb.KeyValue) any {
	if !strings.HasPrefix(key, q.part) {
		return nil
	}
	i, _ := q.item(key, kv)
	return i
}

func (q *Queue) install(_ string, prepared any) {
	if i, ok := prepared.(Item); ok {
		q.items = append(q.items, i)
		q.wake()
	}
}

func (q *Queue) wake() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

func (q *Queue) stage(pages iter.Seq2[[]*mvccpb.KeyValue, error]) (func() []string, error) {
	var all []Item
	for page, err := range pages {
		if err != nil {
			return nil, fromEtcd(err)
		}
		for _, kv := range page {
			if i, ok := q.item(string(kv.Key[len(q.name)+2:]), kv); ok && i.Part == q.part {
				all = append(all, i)
			}
		}
	}
	slices.SortFunc(all, byRevision)
	return func() []string {
		// What was dropped may still be there: its removal is under way.
		q.items = slices.DeleteFunc(all, func(i Item) bool { return i.Revision <= q.dropped })
		q.wake()
		return nil
	}, nil
}

// Record names what the operation is about, and whether it makes it.
func (o Op) Record() (collection, key string, creates bool) {
	collection, key, _ = split([]byte(o.at))
	return collection, key, o.need == mustNotExist
}

// Name is this member's.
func (s *Store) Name() string { return s.name }

// Dir is the state folder.
func (s *Store) Dir() string { return s.dir }
