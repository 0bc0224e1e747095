package store

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"google.golang.org/protobuf/proto"
)

// TestScan sets the two ways of reading a collection against each other, while it
// is written to and compacted.
func TestScan(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	vms, err := NewCollection(ctx, s, "vm", JSON[vm](1))
	if err != nil {
		t.Fatal(err)
	}
	others, err := NewCollection(ctx, s, "vm2", JSON[vm](1)) // a name that begins alike
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	change := func(r *rand.Rand) {
		taken := map[string]bool{}
		var ops []Op
		for range 1 + r.IntN(30) {
			c, key := vms, fmt.Sprintf("%04d", r.IntN(3000))
			if r.IntN(3) == 0 {
				c = others
			}
			if taken[c.name+key] {
				continue
			}
			taken[c.name+key] = true
			ops = append(ops, c.Put(key, vm{Name: fmt.Sprint(r.Int())}))
		}
		if _, err := s.Commit(ctx, ops...); err != nil {
			t.Error(err)
		}
	}
	compare := func() {
		t.Helper()
		at := s.etcd.Server.KV().Rev()
		list := func(read func(func([]*mvccpb.KeyValue, error) bool)) (all []string) {
			for page, err := range read {
				if err != nil {
					t.Fatal(err)
				}
				for _, kv := range page {
					all = append(all, fmt.Sprintf("%s %d %d %d %s", kv.Key, kv.CreateRevision, kv.ModRevision, kv.Version, kv.Value))
				}
			}
			slices.Sort(all)
			return all
		}
		want, got := list(s.ask(ctx, "/vm/", at)), list(s.scan(ctx, "/vm/", at))
		if !slices.Equal(got, want) {
			t.Errorf("%d records were scanned, %d asked for, and they differ", len(got), len(want))
		}
	}
	compare() // nothing
	for range 600 {
		change(r)
	}
	compare()
	var writers sync.WaitGroup
	for g := range 2 {
		writers.Go(func() {
			r := rand.New(rand.NewPCG(3, uint64(g)))
			for range 100 {
				change(r)
			}
		})
	}
	for range 5 {
		compare()
	}
	writers.Wait()
	// One revision that deletes more than a page, and writes a record.
	for i := range 3 {
		var ops []Op
		for j := range maxOps {
			ops = append(ops, vms.Put(fmt.Sprintf("x%d-%d", i, j), vm{}), others.Put(fmt.Sprintf("x%d-%d", i, j), vm{}))
		}
		for part := range slices.Chunk(ops, maxOps) {
			commit(t, s, part...)
		}
	}
	del := func(prefix string) clientv3.Op { return clientv3.OpDelete(prefix, clientv3.WithPrefix()) }
	if _, err := s.client.Txn(ctx).Then(del("/vm/x"), del("/vm2/x"), clientv3.OpPut("/vm/z", "it")).Commit(); err != nil {
		t.Fatal(err)
	}
	compare()
	for range 10 {
		change(r)
	}
	if _, err := s.client.Compact(ctx, s.etcd.Server.KV().Rev()-5, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	compare()
	for _, err := range s.scan(ctx, "/vm/", 2) {
		if err == nil || !strings.Contains(err.Error(), "compacted") {
			t.Errorf("as of a revision that is compacted away: %v", err)
		}
	}
}

// TestScanRefused: a database that lacks what its index has is not taken for one
// that has fewer records.
func TestScanRefused(t *testing.T) {
	record := func(main int64, key string) (at, b []byte) {
		b, err := proto.Marshal(&mvccpb.KeyValue{Key: []byte(key), Value: []byte("v"), ModRevision: main})
		if err != nil {
			t.Fatal(err)
		}
		return mvcc.RevToBytes(mvcc.Revision{Main: main}, mvcc.NewRevBytes()), b
	}
	wanted := func() []*mvccpb.KeyValue {
		return []*mvccpb.KeyValue{{Key: []byte("a"), ModRevision: 5}, {Key: []byte("b"), ModRevision: 5}, {Key: []byte("c"), ModRevision: 7}}
	}
	a5, a := record(5, "a")
	b5, b := record(5, "b")
	c7, c := record(7, "c")
	c8, later := record(8, "c")
	for what, x := range map[string]struct {
		at, records [][]byte
		more        bool
		n           int
		says        string
	}{
		"all":                 {[][]byte{a5, b5, c7}, [][]byte{a, b, c}, false, 3, ""},
		"two, more to come":   {[][]byte{a5, b5, c7}, [][]byte{a, b, c}, true, 2, ""},
		"none, more to come":  {[][]byte{a5, b5}, [][]byte{a, b}, true, 0, ""},
		"nothing":             {nil, nil, false, 0, `revision 5 of "a"`},
		"half a transaction":  {[][]byte{a5, c7}, [][]byte{a, c}, false, 0, "revision 5"},
		"the end is missing":  {[][]byte{a5, b5}, [][]byte{a, b}, false, 2, `revision 7 of "c"`},
		"the key is another":  {[][]byte{a5, b5, c7}, [][]byte{a, b, a}, false, 2, `revision 7 of "c"`},
		"one revision is not": {[][]byte{a5, b5, c8}, [][]byte{a, b, later}, false, 2, `revision 7 of "c"`},
		"no record":           {[][]byte{a5, b5, c7}, [][]byte{a, b, c[:len(c)-1]}, false, 2, "cannot be read"},
	} {
		w := wanted()
		n, err := fillIn(w, x.at, x.records, x.more)
		if n != x.n || (err == nil) != (x.says == "") || err != nil && !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s: %d, %v; want %d, %q", what, n, err, x.n, x.says)
		}
		for _, kv := range w[:n] {
			if string(kv.Value) != "v" {
				t.Errorf("%s: %s has the value %q", what, kv.Key, kv.Value)
			}
		}
	}
}

func FuzzKeyAndValue(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{10, 1, 'a', 42, 1, 'b'})
	f.Add([]byte{10, 200, 1})
	if b, err := proto.Marshal(&mvccpb.KeyValue{Key: []byte("/vm/a"), Value: []byte("v"), CreateRevision: 3, ModRevision: 1 << 40, Version: 2, Lease: 9}); err == nil {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		key, value, ok := keyAndValue(b)
		var kv mvccpb.KeyValue
		if err := proto.Unmarshal(b, &kv); err != nil {
			return
		}
		if !ok || string(key) != string(kv.Key) || string(value) != string(kv.Value) {
			t.Fatalf("%x: %q, %q, %v; want %q, %q", b, key, value, ok, kv.Key, kv.Value)
		}
	})
}

// TestScanDamaged: among many records, one that is damaged and one that stands in
// another's place are refused by name, and the others are there.
func TestScanDamaged(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	codec := Sealed(JSON[vm](1), bound{})
	vms, err := NewCollection(ctx, s, "vm", codec, byNameAndDisks(), DecodeOnRead[vm]())
	if err != nil {
		t.Fatal(err)
	}
	const n = 2*loadPage + 100
	for from := 0; from < n; from += 1000 {
		var ops []Op
		for i := from; i < min(n, from+1000); i++ {
			ops = append(ops, vms.Create(fmt.Sprintf("%05d", i), vm{Name: fmt.Sprint(i), Disks: []string{"same"}}))
		}
		commit(t, s, ops...)
	}
	other, err := codec.Encode("/vm/00001", vm{Name: "1"})
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{"/vm/04100": "no record", "/vm/06000": string(other)} {
		if _, err := s.client.Put(ctx, key, value); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Sync(ctx); err != nil {
		t.Fatal(err)
	}
	replace, err := vms.stage(s.scan(ctx, "/vm/", s.etcd.Server.KV().Rev()))
	if err != nil {
		t.Fatal(err)
	}
	s.cache.mu.Lock()
	changed := replace()
	s.cache.mu.Unlock()
	if len(changed) > 0 {
		t.Errorf("what was loaded differs from what the watch has brought: %v", changed)
	}
	if got := len(found(t, vms, term("disk", "same"))); got != n-2 {
		t.Errorf("%d of %d records are found", got, n-2)
	}
	list, err := vms.List(ctx, "")
	if len(list) != n-2 || !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "/vm/04100") || !strings.Contains(err.Error(), "/vm/06000") {
		t.Errorf("%d of %d records, %v", len(list), n-2, err)
	}
	for _, key := range []string{"04100", "06000"} {
		if _, err := vms.Get(ctx, key); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "/vm/"+key) {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// bound seals nothing, and refuses what belongs to another place.
type bound struct{}

func (bound) Seal(plain, at []byte) ([]byte, error) {
	return append(append(bytes.Clone(at), 0), plain...), nil
}

func (bound) Open(sealed, at []byte) ([]byte, error) {
	plain, is := bytes.CutPrefix(sealed, append(bytes.Clone(at), 0))
	if !is {
		return nil, errors.New("it belongs to another place")
	}
	return bytes.Clone(plain), nil
}
