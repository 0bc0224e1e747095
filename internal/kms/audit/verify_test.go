package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A forger has a log as a list of entries and can write any list of entries as
// a log that is right in itself: numbers, checksums and chain are computed anew.
// Only the signatures are beyond it; heads go where they were.
type forger struct {
	header  header
	entries []Entry
	heads   map[uint64]Head // as they were signed, by sequence
}

func newForger(t testing.TB, dir string) *forger {
	t.Helper()
	f := &forger{heads: map[uint64]Head{}}
	segments, err := list(dir, segmentSuffix)
	if err != nil {
		t.Fatal(err)
	}
	for _, first := range segments {
		file, err := os.Open(filepath.Join(dir, segmentName(first)))
		if err != nil {
			t.Fatal(err)
		}
		h, n, err := readHeader(file)
		if err != nil {
			t.Fatal(err)
		}
		if first == 1 {
			f.header = h
		}
		for b, err := range blocks(file, h.id, int64(n)) {
			if err != nil {
				t.Fatal(err)
			}
			if b.kind != blockEntries {
				head, _ := headOf(b, h)
				f.heads[head.Sequence] = head
				continue
			}
			list, _, err := entries(b.body)
			if err != nil {
				t.Fatal(err)
			}
			for _, encoded := range list {
				e, err := Decode(encoded)
				if err != nil {
					t.Fatal(err)
				}
				f.entries = append(f.entries, e)
			}
		}
		file.Close()
	}
	return f
}

// write makes one segment of the entries. renumber gives them the numbers that
// they should have.
func (f *forger) write(t testing.TB, renumber bool) string {
	t.Helper()
	dir := t.TempDir()
	out := f.header.append(nil)
	chain := f.header.before
	for i, e := range f.entries {
		if renumber {
			e.Sequence = uint64(i + 1)
		}
		encoded := e.Append(nil)
		chain, _ = link(nil, chain, encoded)
		b := binary.AppendUvarint(make([]byte, blockHeader), uint64(len(encoded)))
		b = append(append(b, encoded...), chain[:]...)
		sealBlock(b, f.header.id, blockEntries, e.Sequence)
		out = append(out, b...)
		if h, ok := f.heads[e.Sequence]; ok && i+1 == int(e.Sequence) {
			b := appendHead(make([]byte, blockHeader), h)
			sealBlock(b, f.header.id, blockHead, h.Sequence)
			out = append(out, b...)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, segmentName(1)), out, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// realLog is a log with several segments and heads, and its newest anchor.
func realLog(t testing.TB, n int) (dir string, anchor Head) {
	t.Helper()
	dir = t.TempDir()
	l := open(t, Options{Dir: dir})
	for i := 0; i < n; i += 5 {
		add(t, l, i, min(5, n-i))
		if i%20 == 0 || i+5 >= n {
			var err error
			if anchor, err = l.Sign(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.Close()
	return dir, anchor
}

// TestEveryTamperingIsFound changes a real log in each way, with numbers and
// chain computed anew as well as without, and expects every one to be found.
func TestEveryTamperingIsFound(t *testing.T) {
	dir, anchor := realLog(t, 120)
	trusted := VerifyOptions{Keys: []ed25519.PublicKey{testKey(t).Public().(ed25519.PublicKey)}, Anchors: []Head{anchor}}
	whole := newForger(t, dir)
	if r := verified(t, whole.write(t, false), trusted); !r.OK() || r.Last != 121 || r.Anchors != 1 {
		t.Fatalf("what the forger writes without a change: %+v", r)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	tamper := map[string]func([]Entry) []Entry{
		"removed": func(e []Entry) []Entry {
			at := rng.IntN(len(e) - 1)
			return slices.Delete(e, at, min(len(e)-1, at+1+rng.IntN(3)))
		},
		"newest removed": func(e []Entry) []Entry { return e[:len(e)-1-rng.IntN(30)] },
		"changed": func(e []Entry) []Entry {
			at := rng.IntN(len(e))
			*e[at].fields()[rng.IntN(fieldCount)] += "x"
			return e
		},
		"time changed": func(e []Entry) []Entry {
			e[rng.IntN(len(e))].Time = time.Unix(1_800_000_000, 0).UTC()
			return e
		},
		"moved": func(e []Entry) []Entry {
			at := rng.IntN(len(e) - 1)
			e[at], e[at+1] = e[at+1], e[at]
			return e
		},
		"repeated": func(e []Entry) []Entry {
			at := rng.IntN(len(e) - 1) // behind the last head it would be a new entry
			return slices.Insert(e, at, e[at])
		},
		"put in":                    func(e []Entry) []Entry { return slices.Insert(e, rng.IntN(len(e)), *entry(77)) },
		"all removed but the first": func(e []Entry) []Entry { return e[:1] },
	}
	for name, change := range tamper {
		for round := range 15 {
			for _, renumber := range []bool{false, true} {
				f := &forger{header: whole.header, heads: whole.heads, entries: change(slices.Clone(whole.entries))}
				if r := verified(t, f.write(t, renumber), trusted); r.OK() {
					t.Errorf("%s, round %d, numbered anew %v: not found", name, round, renumber)
				}
			}
		}
	}
	// Without the anchor the newest entries can be cut off; with it they cannot.
	f := &forger{header: whole.header, heads: whole.heads, entries: slices.Clone(whole.entries)[:100]}
	cut := f.write(t, false)
	if r := verified(t, cut, VerifyOptions{}); !r.OK() {
		t.Errorf("a cut log without an anchor: %+v", r.Problems)
	}
	if r := verified(t, cut, trusted); len(r.Problems) != 1 || r.Problems[0].Kind != Truncated || r.Problems[0].Sequence != 101 {
		t.Errorf("a cut log with an anchor: %+v", r.Problems)
	}
}

// TestEveryAlteredByteIsFound flips bytes of the files themselves.
func TestEveryAlteredByteIsFound(t *testing.T) {
	dir, anchor := realLog(t, 1000)
	o := VerifyOptions{Anchors: []Head{anchor}}
	segments, err := list(dir, segmentSuffix)
	if err != nil || len(segments) < 3 {
		t.Fatal(segments, err)
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 60 {
		path := filepath.Join(dir, segmentName(segments[rng.IntN(len(segments))]))
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(good)
		at := rng.IntN(len(bad))
		bad[at] ^= byte(1 + rng.IntN(255))
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if r := verified(t, dir, o); r.OK() {
			t.Errorf("round %d: byte %d of %s was altered and not found", round, at, filepath.Base(path))
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r := verified(t, dir, o); !r.OK() {
		t.Fatalf("%+v", r.Problems)
	}
	rename := func(from, to uint64) func() {
		a, b := filepath.Join(dir, segmentName(from)), filepath.Join(dir, segmentName(to))
		if err := os.Rename(a, b); err != nil {
			t.Fatal(err)
		}
		return func() { os.Rename(b, a) }
	}
	hide := func(n uint64) func() {
		a := filepath.Join(dir, segmentName(n))
		if err := os.Rename(a, a+".away"); err != nil {
			t.Fatal(err)
		}
		return func() { os.Rename(a+".away", a) }
	}
	for name, c := range map[string]struct {
		do   func() func()
		kind string
	}{
		"first segment removed":  {func() func() { return hide(segments[0]) }, Removed},
		"middle segment removed": {func() func() { return hide(segments[1]) }, Removed},
		"last segment removed":   {func() func() { return hide(segments[len(segments)-1]) }, Truncated},
		"segment renamed":        {func() func() { return rename(segments[1], segments[1]+1) }, Repeated},
	} {
		undo := c.do()
		r := verified(t, dir, o)
		if r.OK() || !slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Kind == c.kind }) {
			t.Errorf("%s: %+v", name, r.Problems)
		}
		undo()
	}
}

func TestForeignKeyIsFound(t *testing.T) {
	dir, anchor := realLog(t, 5)
	other := ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)
	r := verified(t, dir, VerifyOptions{Keys: []ed25519.PublicKey{other}})
	if r.OK() || r.Problems[0].Kind != Forged {
		t.Errorf("%+v", r.Problems)
	}
	anchor.Sequence++
	if r := verified(t, dir, VerifyOptions{Anchors: []Head{anchor}}); r.OK() || r.Problems[0].Kind != Forged {
		t.Errorf("an altered anchor: %+v", r.Problems)
	}
}

func TestHeadJSON(t *testing.T) {
	_, head := realLog(t, 1)
	b, err := json.Marshal(head)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseHead(b)
	if err != nil || !got.Valid() || got.Sequence != head.Sequence {
		t.Fatalf("%s: %+v, %v", b, got, err)
	}
	for _, bad := range []string{"", "{}", `{"v":2}`, strings.Replace(string(b), `"v":1`, `"v":1,"more":1`, 1)} {
		if _, err := ParseHead([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(entry(1).Append(nil))
	f.Add((&Entry{Operation: "Revoke", Detail: "compromise", Act: "a", Revision: 7, Result: Success}).Append(nil))
	f.Add([]byte{1, 0x80, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := Decode(b)
		if err != nil {
			return
		}
		if again := e.Append(nil); !bytes.Equal(again, b) {
			t.Fatalf("%x came back as %x", b, again)
		}
	})
}

// FuzzSegment takes any bytes for a segment: nothing may panic, and who verifies
// gets an answer.
func FuzzSegment(f *testing.F) {
	dir, _ := realLog(f, 3)
	good, err := os.ReadFile(filepath.Join(dir, segmentName(1)))
	if err != nil {
		f.Fatal(err)
	}
	good = bytes.TrimRight(good, "\x00")
	f.Add(good)
	f.Add(good[:len(good)-10])
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, segmentName(1)), b, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := Verify(dir, VerifyOptions{})
		if err != nil {
			t.Fatal(err)
		}
		n := uint64(0)
		for _, err := range ReadFolder(dir) {
			if err != nil {
				if r.OK() {
					t.Fatalf("it verifies, and reading gives: %v", err)
				}
				break
			}
			n++
		}
		if r.OK() && n != r.Last {
			t.Fatalf("it verifies with %d entries, and %d were read", r.Last, n)
		}
	})
}

func TestClean(t *testing.T) {
	for in, want := range map[string]int{"": 0, "abc": 3, strings.Repeat("x", 300): maxField, "\xff": 3, strings.Repeat("é", 200): maxField, "x" + strings.Repeat("é", 200): maxField - 1} {
		got := clean(in)
		if len(got) != want {
			t.Errorf("clean(%.20q) has %d bytes, want %d", in, len(got), want)
		}
		if clean(got) != got {
			t.Errorf("clean(%.20q) is not clean", in)
		}
	}
}
