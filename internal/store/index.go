package store

import (
	"cmp"
	"context"
	"fmt"
	"hash/maphash"
	"iter"
	"maps"
	"runtime"
	"slices"
	"sync"

	"k8s.io/utils/third_party/forked/golang/btree"
)

// An IndexTerm is something that an index finds records by: a value of a kind,
// both in the caller's own words.
type IndexTerm struct {
	Kind  string
	Value []byte
}

// IndexBy lets a collection be searched ([Collection.Find]) by the terms that
// terms gives each record. It must depend on the value alone.
func IndexBy[T any](terms func(v T, add func(kind string, value []byte))) Option[T] {
	return func(c *Collection[T]) { c.index = newIndex(terms) }
}

// degree of the trees: 63 rows at most in a node.
const degree = 32

// index finds rows by the hash of a term, newest first. Two terms may share a
// hash: what it finds are candidates.
type index[T any] struct {
	terms    func(T, func(kind string, value []byte))
	seed     maphash.Seed
	free     *btree.FreeList[*row[T]]
	all      *btree.BTree[*row[T]]
	postings [shards]map[uint64]posting[T] // by hash, each in its shard
	cloning  sync.Mutex                    // Clone writes to what it clones
}

// shards is how many cores can build an index at once.
const shards = 16

// posting is the rows of one term. Most terms have one row, and no tree.
type posting[T any] struct {
	one  *row[T]
	many *btree.BTree[*row[T]]
}

func newIndex[T any](terms func(T, func(string, []byte))) *index[T] {
	x := &index[T]{terms: terms, seed: maphash.MakeSeed(), free: btree.NewFreeList[*row[T]](64)}
	x.reset()
	return x
}

func (x *index[T]) reset() {
	x.all = x.tree()
	for i := range x.postings {
		x.postings[i] = map[uint64]posting[T]{}
	}
}

// rowsOf is the rows of a term.
func (x *index[T]) rowsOf(term uint64) posting[T] { return x.postings[term%shards][term] }

func (x *index[T]) tree() *btree.BTree[*row[T]] {
	return btree.NewWithFreeList(degree, older[T], x.free)
}

// older is the order of creation; what one transaction created goes by key.
func older[T any](a, b *row[T]) bool { return byAge(a, b) < 0 }

func byAge[T any](a, b *row[T]) int {
	if a.created != b.created {
		return cmp.Compare(a.created, b.created)
	}
	return cmp.Compare(a.key, b.key)
}

func (x *index[T]) hash(kind string, value []byte) uint64 {
	var h maphash.Hash
	h.SetSeed(x.seed)
	h.WriteString(kind)
	h.WriteByte(0)
	h.Write(value)
	return h.Sum64()
}

// termsOf returns the hashes of v's terms, each once, in order.
func (x *index[T]) termsOf(v T) []uint64 {
	var room [16]uint64
	list := room[:0]
	x.terms(v, func(kind string, value []byte) { list = append(list, x.hash(kind, value)) })
	slices.Sort(list)
	return slices.Clone(slices.Compact(list))
}

// replace takes old out and puts r in; either may be nil.
func (x *index[T]) replace(old, r *row[T]) {
	if old != nil {
		if r == nil || old.created != r.created {
			x.all.Delete(old)
		}
		for _, t := range old.terms {
			// In a tree r takes the place of a row of its order by itself.
			if r == nil || old.created != r.created || !slices.Contains(r.terms, t) {
				x.remove(t, old)
			}
		}
	}
	if r != nil {
		x.all.ReplaceOrInsert(r)
		for _, t := range r.terms {
			x.add(t, r)
		}
	}
}

func (x *index[T]) add(term uint64, r *row[T]) {
	p := x.rowsOf(term)
	switch {
	case p.many != nil:
		p.many.ReplaceOrInsert(r)
		return
	case p.one == nil || p.one.key == r.key:
		p.one = r
	default:
		p.many = x.tree()
		p.many.ReplaceOrInsert(p.one)
		p.many.ReplaceOrInsert(r)
		p.one = nil
	}
	x.postings[term%shards][term] = p
}

func (x *index[T]) remove(term uint64, old *row[T]) {
	p := x.rowsOf(term)
	if p.many != nil {
		p.many.Delete(old)
	}
	if p.one == old || p.many != nil && p.many.Len() == 0 {
		delete(x.postings[term%shards], term)
	}
}

// of makes a new index of rows, as x would have it. Each core takes some of the
// shards, and one of them the order of all.
func (x *index[T]) of(rows map[string]*row[T]) *index[T] {
	fresh := newIndex(x.terms)
	fresh.seed = x.seed // the rows' terms are hashed with it
	list := slices.AppendSeq(make([]*row[T], 0, len(rows)), maps.Values(rows))
	slices.SortFunc(list, byAge)
	var builders sync.WaitGroup
	builders.Go(func() {
		for _, r := range list {
			fresh.all.ReplaceOrInsert(r)
		}
	})
	n := uint64(min(runtime.GOMAXPROCS(0), shards))
	for i := range n {
		builders.Go(func() {
			for _, r := range list {
				for _, t := range r.terms {
					if t%shards%n == i {
						fresh.add(t, r)
					}
				}
			}
		})
	}
	builders.Wait()
	return fresh
}

// Found is what a search found, as of one revision.
type Found[T any] struct {
	c    *Collection[T]
	one  *row[T]
	many *btree.BTree[*row[T]]
}

// Find looks for the records that have all of terms, or for all records if
// there are none: linearizable. It takes the rarest term for it, and what it
// finds are candidates: each still has to be looked at. The cost does not depend
// on how many there are, and nobody waits while they are looked at.
func (c *Collection[T]) Find(ctx context.Context, terms ...IndexTerm) (Found[T], error) {
	if err := c.s.sync(ctx); err != nil {
		return Found[T]{}, fmt.Errorf("store: searching %s: %w", c.name, err)
	}
	c.s.cache.mu.RLock()
	defer c.s.cache.mu.RUnlock()
	x := c.index
	best, n := posting[T]{many: x.all}, x.all.Len()
	for _, t := range terms {
		p := x.rowsOf(x.hash(t.Kind, t.Value))
		if m := p.len(); m < n {
			best, n = p, m
		}
	}
	found := Found[T]{c: c, one: best.one}
	if best.many != nil {
		x.cloning.Lock()
		found.many = best.many.Clone()
		x.cloning.Unlock()
	}
	return found, nil
}

func (p posting[T]) len() int {
	switch {
	case p.many != nil:
		return p.many.Len()
	case p.one != nil:
		return 1
	}
	return 0
}

// Len is how many candidates there are.
func (f Found[T]) Len() int { return posting[T]{f.one, f.many}.len() }

// Newest goes through the candidates, the newest first. A damaged one comes
// with the error that says so.
func (f Found[T]) Newest() iter.Seq2[Entry[T], error] {
	return func(yield func(Entry[T], error) bool) {
		each := func(r *row[T]) bool { return yield(f.c.entry(r)) }
		switch {
		case f.many != nil:
			f.many.Descend(each)
		case f.one != nil:
			each(f.one)
		}
	}
}
