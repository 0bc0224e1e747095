package store

import (
	"bufio"
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

type vm struct {
	Name  string
	Disks []string
	Rev   int
}

// TestMain lets the test binary be the child that kill -9 hits.
func TestMain(m *testing.M) {
	if dir := os.Getenv("STORE_TEST_CHILD"); dir != "" {
		writeForever(dir)
	}
	os.Exit(m.Run())
}

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir, Name: "m1", Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func collection[T any](t testing.TB, s *Store, name string, codec Codec[T]) *Collection[T] {
	t.Helper()
	c, err := NewCollection(t.Context(), s, name, codec)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func commit(t testing.TB, s *Store, ops ...Op) int64 {
	t.Helper()
	rev, err := s.Commit(t.Context(), ops...)
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

func TestRecords(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx := t.Context()
	vms := collection(t, s, "vm", JSON[vm](1))

	if _, err := vms.Get(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("Get of nothing: %v", err)
	}
	rev := commit(t, s, vms.Create("a", vm{Name: "one"}))
	if e, err := vms.Get(ctx, "a"); err != nil || e.Value.Name != "one" || e.Revision != rev || e.Created != rev {
		t.Fatalf("Get: %+v, %v", e, err)
	}
	rev2 := commit(t, s, vms.Update("a", rev, vm{Name: "two"}))
	for _, c := range []struct {
		what string
		op   Op
		want error
	}{
		{"create over", vms.Create("a", vm{}), ErrExists},
		{"update of an old revision", vms.Update("a", rev, vm{}), ErrConflict},
		{"update of nothing", vms.Update("b", rev, vm{}), ErrNotFound},
		{"delete of an old revision", vms.Delete("a", rev), ErrConflict},
		{"delete of nothing", vms.Delete("b", 0), ErrNotFound},
		{"check of an old revision", vms.Unchanged("a", rev), ErrConflict},
		{"check for nothing", vms.Unchanged("a", 0), ErrExists},
		{"empty key", vms.Put("", vm{}), errAny},
		{"long key", vms.Delete(strings.Repeat("k", maxKey+1), 0), errAny},
	} {
		if _, err := s.Commit(ctx, c.op); err == nil || c.want != errAny && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
	}
	if e, _ := vms.Get(ctx, "a"); e.Revision != rev2 || e.Value.Name != "two" {
		t.Errorf("a refused write changed the record: %+v", e)
	}
	commit(t, s, vms.Put("dir/x", vm{Name: "x"}), vms.Put("dir/b", vm{Name: "b"}), vms.Unchanged("a", rev2))
	list, err := vms.List(ctx, "dir/")
	if err != nil || len(list) != 2 || list[0].Key != "dir/b" || list[1].Value.Name != "x" {
		t.Errorf("List: %+v, %v", list, err)
	}

	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := vms.Get(ctx, "a"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("Get after Close: %v", err)
	}
	s = open(t, dir)
	vms = collection(t, s, "vm", JSON[vm](1))
	if e, err := vms.Get(ctx, "a"); err != nil || e.Value.Name != "two" || e.Revision != rev2 {
		t.Errorf("after reopening: %+v, %v", e, err)
	}
	if _, err := NewCollection(ctx, s, "vm", JSON[vm](1)); err == nil {
		t.Error("a collection was opened twice")
	}
	if _, err := NewCollection(ctx, s, "VM/x", JSON[vm](1)); err == nil {
		t.Error("a bad name was taken")
	}
}

var errAny = errors.New("any error")

// TestTransaction: all or nothing over collections, and readers never see half.
func TestTransaction(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	vms, tasks := collection(t, s, "vm", JSON[vm](1)), collection(t, s, "task", JSON[vm](1))
	a := commit(t, s, vms.Create("a", vm{Rev: 1}), tasks.Create("a", vm{Rev: 1}))
	if _, err := s.Commit(ctx, vms.Put("b", vm{}), tasks.Create("a", vm{})); !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), "/task/a") {
		t.Fatalf("%v, want ErrExists that names /task/a", err)
	}
	if _, err := vms.Get(ctx, "b"); !errors.Is(err, ErrNotFound) {
		t.Error("half of a refused transaction was written")
	}
	if _, err := s.Commit(ctx, vms.Put("b", vm{}), vms.Delete("b", 0)); err == nil {
		t.Error("two operations on one record were taken")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i, rev := 2, a; i < 200; i++ {
			next, err := s.Commit(ctx, vms.Update("a", rev, vm{Rev: i}), tasks.Update("a", rev, vm{Rev: i}))
			if err != nil {
				t.Error(err)
				return
			}
			rev = next
		}
	}()
	for {
		s.cache.mu.RLock()
		x, y := vms.rows["a"], tasks.rows["a"]
		s.cache.mu.RUnlock()
		if x.revision != y.revision || x.value.Rev != y.value.Rev {
			t.Fatalf("half a revision was visible: %+v, %+v", x, y)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

func TestEditFromManySides(t *testing.T) {
	s := open(t, t.TempDir())
	vms := collection(t, s, "vm", JSON[vm](1))
	commit(t, s, vms.Create("a", vm{Disks: []string{"d"}}))
	before, _ := vms.Get(t.Context(), "a")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 10 {
				if _, err := vms.Edit(t.Context(), "a", func(v *vm) error { v.Rev++; v.Disks[0] += "x"; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	e, err := vms.Get(t.Context(), "a")
	if err != nil || e.Value.Rev != 80 || len(e.Value.Disks[0]) != 81 {
		t.Errorf("after 80 edits: %+v, %v", e, err)
	}
	if before.Value.Disks[0] != "d" {
		t.Error("Edit changed what another reader holds")
	}
	stop := errors.New("stop")
	if _, err := vms.Edit(t.Context(), "a", func(*vm) error { return stop }); err != stop {
		t.Errorf("Edit hid its caller's error: %v", err)
	}
}

// TestLinearizable: once a write is acknowledged every later read sees it.
func TestLinearizable(t *testing.T) {
	s := open(t, t.TempDir())
	vms := collection(t, s, "vm", JSON[vm](1))
	var acknowledged atomic.Int64
	acknowledged.Store(commit(t, s, vms.Put("a", vm{})))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				floor := acknowledged.Load()
				if e, err := vms.Get(t.Context(), "a"); err != nil || e.Revision < floor {
					t.Errorf("read revision %d after %d was acknowledged (%v)", e.Revision, floor, err)
					return
				}
			}
		})
	}
	for i := range 500 {
		acknowledged.Store(commit(t, s, vms.Put("a", vm{Rev: i})))
	}
	cancel()
	wg.Wait()
}

// TestCompactedWatch lets the watch fall behind a compaction and expects the
// cache to be rebuilt, with the changes reported.
func TestCompactedWatch(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	vms := collection(t, s, "vm", JSON[vm](1))
	commit(t, s, vms.Put("gone", vm{}), vms.Put("same", vm{}), vms.Put("new", vm{Rev: 1}))
	if _, err := vms.Get(ctx, "new"); err != nil {
		t.Fatal(err)
	}
	w := s.Watch("vm")
	defer w.Close()

	// Pretend to be a cache that stopped long ago: the watch ends, revisions go
	// by and are compacted, and the cache still stands where it was.
	s.stop()
	s.done.Wait()
	s.closing, s.stop = context.WithCancel(context.Background())
	commit(t, s, vms.Delete("gone", 0))
	rev := commit(t, s, vms.Put("new", vm{Rev: 2}))
	if _, err := s.client.Compact(ctx, rev, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	s.done.Go(func() { s.follow(s.closing) })

	if e, err := vms.Get(ctx, "new"); err != nil || e.Value.Rev != 2 {
		t.Errorf("after the rebuild: %+v, %v", e, err)
	}
	if _, err := vms.Get(ctx, "gone"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a deleted record survived the rebuild: %v", err)
	}
	changes, err := w.Next(ctx)
	if err != nil || len(changes) != 2 {
		t.Errorf("changes after the rebuild: %v, %v; want gone and new", changes, err)
	}
	commit(t, s, vms.Put("later", vm{}))
	if _, err := vms.Get(ctx, "later"); err != nil {
		t.Errorf("the watch did not go on: %v", err)
	}
}

func TestWatcher(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	vms, tasks := collection(t, s, "vm", JSON[vm](1)), collection(t, s, "task", JSON[vm](1))
	w, all := s.Watch("vm"), s.Watch()
	defer all.Close()
	commit(t, s, tasks.Put("t", vm{}))
	for i := range 5 {
		commit(t, s, vms.Put("a", vm{Rev: i}))
	}
	commit(t, s, vms.Put("b", vm{}))
	if _, err := vms.Get(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	got, err := w.Next(ctx)
	if want := (Change{"vm", "a"}); err != nil || len(got) != 2 || got[0] != want || got[1].Key != "b" {
		t.Errorf("changes %v, %v; want a and b once each", got, err)
	}
	if got, _ := all.Next(ctx); len(got) != 3 {
		t.Errorf("changes of all collections: %v", got)
	}
	go func() {
		time.Sleep(20 * time.Millisecond)
		s.Commit(ctx, vms.Delete("a", 0))
	}()
	if got, err := w.Next(ctx); err != nil || len(got) != 1 {
		t.Errorf("a delete was reported as %v, %v", got, err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if _, err := w.Next(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Next without changes: %v", err)
	}
	w.Close()
	go s.Close()
	for err = nil; err == nil; {
		_, err = all.Next(ctx)
	}
	if !errors.Is(err, ErrUnavailable) {
		t.Errorf("Next after Close: %v", err)
	}
}

// gcm is a Sealer as kms and center have one.
type gcm struct{ cipher.AEAD }

func newGCM(t testing.TB) gcm {
	key := make([]byte, 32)
	rand.Read(key)
	b, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	a, err := cipher.NewGCMWithRandomNonce(b)
	if err != nil {
		t.Fatal(err)
	}
	return gcm{a}
}

func (g gcm) Seal(p, ad []byte) ([]byte, error) { return g.AEAD.Seal(nil, nil, p, ad), nil }
func (g gcm) Open(c, ad []byte) ([]byte, error) { return g.AEAD.Open(nil, nil, c, ad) }

// TestSealed: a sealed record is not readable on disk, and neither altering it
// nor moving it goes unseen.
func TestSealed(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx := t.Context()
	secrets := collection(t, s, "secret", Sealed(JSON[vm](1), newGCM(t)))
	const marker = "marker-that-must-not-be-on-disk"
	commit(t, s, secrets.Create("a", vm{Name: marker}), secrets.Create("b", vm{Name: "b"}))
	if e, err := secrets.Get(ctx, "a"); err != nil || e.Value.Name != marker {
		t.Fatalf("%+v, %v", e, err)
	}
	raw, err := s.client.Get(ctx, "/secret/a")
	if err != nil {
		t.Fatal(err)
	}
	stored := raw.Kvs[0].Value
	for what, b := range map[string][]byte{
		"moved":     stored,
		"altered":   append(bytes.Clone(stored[:len(stored)-1]), stored[len(stored)-1]^1),
		"truncated": stored[:10],
		"empty":     {},
		"plain":     []byte(`{"v":1,"d":{"Name":"evil"}}`),
	} {
		if _, err := s.client.Put(ctx, "/secret/b", string(b)); err != nil {
			t.Fatal(err)
		}
		if e, err := secrets.Get(ctx, "b"); !errors.Is(err, ErrDamaged) || e.Value.Name != "" {
			t.Errorf("%s record: %+v, %v; want ErrDamaged and no value", what, e.Value, err)
		}
		list, err := secrets.List(ctx, "")
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "/secret/b") || len(list) != 1 {
			t.Errorf("list with a %s record: %d entries, %v", what, len(list), err)
		}
	}
	s.Close()
	found := 0
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if d.Type().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil || bytes.Contains(b, []byte(marker)) {
				t.Errorf("%s: %v, holds the sealed text: %v", path, err, bytes.Contains(b, []byte(marker)))
			}
			if bytes.Contains(b, []byte("/secret/a")) {
				found++
			}
		}
		return err
	})
	if found == 0 {
		t.Error("the record's name is in no file either: the test looked in the wrong place")
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	_, err := Open(t.Context(), Config{Dir: dir, Name: "m1"})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Fatalf("second open: %v; want ErrLocked with folder and process", err)
	}
	s.Close()
	open(t, dir)
}

// TestDamagedFiles: a folder that etcd cannot read is an error, not a crash.
func TestDamagedFiles(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	vms := collection(t, s, "vm", JSON[vm](1))
	for i := range 50 {
		commit(t, s, vms.Put(fmt.Sprint(i), vm{Rev: i}))
	}
	s.Close()
	for _, what := range []string{"wal/*.wal", "snap/db"} {
		bad := t.TempDir() // a process that failed to open a folder does not get to try again
		if err := os.CopyFS(bad, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(bad, "etcd", "member", what))
		if err != nil || len(files) == 0 {
			t.Fatalf("no %s: %v", what, err)
		}
		b, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		for i := range min(len(b), 16<<10) {
			b[i] ^= 0x55
		}
		if err := os.WriteFile(files[0], b, 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := Open(t.Context(), Config{Dir: bad, Name: "m1"}); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("damaged %s: %v", what, err)
			s.Close()
		} else {
			t.Log(err)
		}
	}
	open(t, dir)
}

// writeForever is the child: it prints each key once it is acknowledged.
func writeForever(dir string) {
	ctx := context.Background()
	s, err := Open(ctx, Config{Dir: dir, Name: "m1"})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	vms, err := NewCollection(ctx, s, "vm", JSON[vm](1))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for g := range 4 {
		go func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%s-%d-%d", os.Getenv("STORE_TEST_ROUND"), g, i)
				if _, err := s.Commit(ctx, vms.Create(key, vm{Name: key})); err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				os.Stdout.WriteString(key + "\n")
			}
		}()
	}
	select {}
}

func TestKill9LosesNothing(t *testing.T) {
	dir := t.TempDir()
	acknowledged := map[string]bool{}
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "STORE_TEST_CHILD="+dir, fmt.Sprintf("STORE_TEST_ROUND=%d", round))
		cmd.Stderr = t.Output()
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines, n := bufio.NewScanner(out), 0
		for lines.Scan() {
			acknowledged[lines.Text()] = true
			if n++; n == 300+100*round {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		cmd.Wait()
		if n < 300 {
			t.Fatalf("round %d: the child acknowledged %d records only", round, n)
		}
		s := open(t, dir)
		vms := collection(t, s, "vm", JSON[vm](1))
		for key := range acknowledged {
			if e, err := vms.Get(t.Context(), key); err != nil || e.Value.Name != key {
				t.Fatalf("round %d: acknowledged record lost: %v", round, err)
			}
		}
		s.Close()
	}
	t.Logf("%d acknowledged records survived", len(acknowledged))
}

func FuzzRecord(f *testing.F) {
	codec := JSON[vm](2)
	sealer := newGCM(f)
	good, _ := codec.Encode("/vm/a", vm{Name: "a", Disks: []string{"d"}})
	sealed, _ := sealer.Seal(good, []byte("/vm/a"))
	for _, seed := range []string{string(good), string(sealed), "", "{}", `{"v":1}`, `{"v":3,"d":{}}`, `{"v":1,"d":{"New":1}}`, `{"v":1,"d":{}}x`, `{"v":1,"d":null}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stored []byte) {
		if v, err := codec.Decode("/vm/a", stored); err == nil {
			again, err := codec.Encode("/vm/a", v)
			if err != nil {
				t.Fatal(err)
			}
			v2, err := codec.Decode("/vm/a", again)
			x, _ := json.Marshal(v)
			y, _ := json.Marshal(v2)
			if err != nil || !bytes.Equal(x, y) {
				t.Fatalf("%s decodes to %s, written and read again to %s (%v)", stored, x, y, err)
			}
		}
		if _, err := Sealed(codec, sealer).Decode("/vm/b", stored); err == nil {
			t.Fatal("a record opened under another name")
		}
	})
}

func TestNewerRecordIsRefused(t *testing.T) {
	for _, stored := range []string{`{"v":2,"d":{}}`, `{"v":1,"d":{"Unknown":1}}`, `{"v":1,"d":{}} {}`, `{"v":0,"d":{}}`, `{"v":1}`} {
		if v, err := JSON[vm](1).Decode("/vm/a", []byte(stored)); err == nil {
			t.Errorf("%s decoded to %+v", stored, v)
		}
	}
}

func BenchmarkPut(b *testing.B) {
	for _, writers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			s := open(b, b.TempDir())
			vms := collection(b, s, "vm", JSON[vm](1))
			v := vm{Name: strings.Repeat("x", 560)}
			var n atomic.Int64
			b.ResetTimer()
			var wg sync.WaitGroup
			for range writers {
				wg.Go(func() {
					for {
						i := n.Add(1)
						if i > int64(b.N) {
							return
						}
						if _, err := s.Commit(b.Context(), vms.Create(fmt.Sprint(i), v)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "puts/s")
		})
	}
}

func BenchmarkGet(b *testing.B) {
	s := open(b, b.TempDir())
	vms := collection(b, s, "vm", JSON[vm](1))
	commit(b, s, vms.Create("a", vm{Name: "a"}))
	b.SetParallelism(8)
	b.ResetTimer()
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if _, err := vms.Get(b.Context(), "a"); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "gets/s")
}
