package store

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// A Queue is items that are taken out in the order in which they were committed.
// Each member of a cluster has a part of its own, and keeps in memory what is in
// it; what is in the others' it reads when it is asked to.
//
// An item is put in by an Op, in the transaction of what it is about. Who has
// taken care of the oldest ones removes them by Ops, and drops them from memory.
//
// All items that one transaction adds are in one record, under the key of the
// first of them: itemsFormat, then for each a length (uvarint) and its key, a
// length and its value.
type Queue struct {
	s       *Store
	name    string
	part    string        // "member/"
	waiting []Item        // by revision; guarded by s.cache.mu, as what follows
	dropped int64         // items up to this revision were dropped
	length  atomic.Int64  // of waiting
	ready   chan struct{} // holds something when there may be new items
}

// An Item is what a queue holds.
type Item struct {
	Part     string
	Key      string
	Value    []byte
	Revision int64

	record string // the key of its record
}

// queued is an item to be added.
type queued struct {
	part  string // "/queue/member/"
	key   string
	value []byte
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
	q.waiting = nil
	q.count()
}

// Add puts an item at the end of this member's part. key must be one that was
// never used. The items of one transaction are in the order of its Ops.
func (q *Queue) Add(key string, value []byte) Op {
	part := "/" + q.name + "/" + q.part
	return Op{at: part + key, need: anything, err: checkKey(q.part + key), item: &queued{part, key, value}}
}

// itemRecord is what a transaction puts into one queue.
type itemRecord struct {
	part string
	put  *pb.PutRequest
}

// addTo adds the item to the record for its queue, or begins that, at the name at
// and with room for so many bytes.
func (i *queued) addTo(records []itemRecord, at string, room int) []itemRecord {
	n := slices.IndexFunc(records, func(r itemRecord) bool { return r.part == i.part })
	if n < 0 {
		n, records = len(records), append(records, itemRecord{i.part, &pb.PutRequest{Key: []byte(at), Value: append(make([]byte, 0, 1+room), itemsFormat)}})
	}
	put := records[n].put
	put.Value = appendItem(put.Value, i.key, i.value)
	return records
}

const itemsFormat = 2

func appendItem(b []byte, key string, value []byte) []byte {
	b = append(binary.AppendUvarint(b, uint64(len(key))), key...)
	return append(binary.AppendUvarint(b, uint64(len(value))), value...)
}

// items reads a record. One that is not as it should be is one item, for whoever
// takes it out to see.
func (q *Queue) items(at string, kv *mvccpb.KeyValue) []Item {
	member, record, ok := strings.Cut(at, "/")
	if !ok || record == "" {
		return nil
	}
	in := Item{Part: member + "/", Revision: kv.ModRevision, record: record}
	list, ok := parseItems(kv.Value, in)
	if !ok {
		in.Key, in.Value = record, kv.Value
		return []Item{in}
	}
	return list
}

func parseItems(b []byte, in Item) (list []Item, ok bool) {
	if len(b) < 2 || b[0] != itemsFormat {
		return nil, false
	}
	b = b[1:]
	take := func() (v []byte, ok bool) {
		n, size := binary.Uvarint(b)
		if size <= 0 || n > uint64(len(b)-size) {
			return nil, false
		}
		v, b = b[size:size+int(n):size+int(n)], b[size+int(n):]
		return v, true
	}
	for len(b) > 0 {
		key, ok1 := take()
		value, ok2 := take()
		if !ok1 || !ok2 || len(key) == 0 {
			return nil, false
		}
		in.Key, in.Value = string(key), value
		list = append(list, in)
	}
	return list, true
}

// Remove takes out the records of items: all items of each record must be among
// them. It does not matter whether they are there.
func (q *Queue) Remove(items []Item) (ops []Op) {
	for n, i := range items {
		if n > 0 && i.record == items[n-1].record && i.Part == items[n-1].Part {
			continue
		}
		o := Op{at: "/" + q.name + "/" + i.Part + i.record, need: anything}
		o.op = &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(o.at)}}}
		ops = append(ops, o)
	}
	return ops
}

// Take is Remove, and makes the transaction fail with ErrNotFound if somebody
// else has taken one of the records out.
func (q *Queue) Take(items []Item) []Op {
	ops := q.Remove(items)
	for n := range ops {
		ops[n].need = mustExist
	}
	return ops
}

// Len is how many items of this member's part wait.
func (q *Queue) Len() int { return int(q.length.Load()) }

// Ready holds something when items may have come since it was last received
// from.
func (q *Queue) Ready() <-chan struct{} { return q.ready }

// Oldest returns about n items of this member's part that were not dropped yet:
// all of a transaction, or none.
func (q *Queue) Oldest(n int) []Item {
	q.s.cache.mu.RLock()
	defer q.s.cache.mu.RUnlock()
	n = min(n, len(q.waiting))
	for n > 0 && n < len(q.waiting) && q.waiting[n].Revision == q.waiting[n-1].Revision {
		n++
	}
	return slices.Clone(q.waiting[:n])
}

// Drop forgets the items up to and including this one, which was the last that
// Oldest returned. It removes nothing from the store.
func (q *Queue) Drop(last Item) {
	q.s.cache.mu.Lock()
	defer q.s.cache.mu.Unlock()
	q.dropped = last.Revision
	at, _ := slices.BinarySearchFunc(q.waiting, last.Revision+1, func(i Item, rev int64) int { return cmp.Compare(i.Revision, rev) })
	clear(q.waiting[:at])
	if q.waiting = q.waiting[at:]; len(q.waiting) == 0 {
		q.waiting = nil // or the array would grow for ever
	}
	q.count()
}

// Others returns the items of other members' parts, by revision: those of a
// record together.
func (q *Queue) Others(ctx context.Context) ([][]Item, error) {
	if err := q.s.sync(ctx); err != nil {
		return nil, fmt.Errorf("store: reading queue %s: %w", q.name, err)
	}
	var all [][]Item
	for page, err := range q.s.pages(ctx, "/"+q.name+"/", q.s.etcd.Server.KV().Rev()) {
		if err != nil {
			return nil, fmt.Errorf("store: reading queue %s: %w", q.name, fromEtcd(err))
		}
		for _, kv := range page {
			if list := q.items(string(kv.Key[len(q.name)+2:]), kv); len(list) > 0 && list[0].Part != q.part {
				all = append(all, list)
			}
		}
	}
	slices.SortFunc(all, func(a, b []Item) int { return byRevision(a[0], b[0]) })
	return all, nil
}

// byRevision leaves the items of a record as they are, in a stable sort.
func byRevision(a, b Item) int {
	return cmp.Or(cmp.Compare(a.Revision, b.Revision), strings.Compare(a.record, b.record))
}

func (q *Queue) prepare(key string, kv *mvccpb.KeyValue) any {
	if !strings.HasPrefix(key, q.part) {
		return nil
	}
	return q.items(key, kv)
}

func (q *Queue) install(_ string, prepared any) {
	if list, ok := prepared.([]Item); ok {
		q.waiting = append(q.waiting, list...)
		q.count()
		q.wake()
	}
}

// count makes Len current: it is asked for each change. The lock is held.
func (q *Queue) count() { q.length.Store(int64(len(q.waiting))) }

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
			if list := q.items(string(kv.Key[len(q.name)+2:]), kv); len(list) > 0 && list[0].Part == q.part {
				all = append(all, list...)
			}
		}
	}
	slices.SortStableFunc(all, byRevision)
	return func() []string {
		// What was dropped may still be there: its removal is under way.
		q.waiting = slices.DeleteFunc(all, func(i Item) bool { return i.Revision <= q.dropped })
		q.count()
		q.wake()
		return nil
	}, nil
}

// Record names what the operation is about, and whether it makes it.
func (o Op) Record() (collection, key string, creates bool) {
	collection, key, _ = strings.Cut(o.at[1:], "/")
	return collection, key, o.need == mustNotExist
}

// Name is this member's.
func (s *Store) Name() string { return s.name }

// Dir is the state folder.
func (s *Store) Dir() string { return s.dir }
