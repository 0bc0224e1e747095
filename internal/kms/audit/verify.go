package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"mortise/internal/atomicfile"
)

// Files of an exported log beside its segments.
const (
	// AnchorsFile holds heads that were kept elsewhere, one JSON object a line.
	AnchorsFile = "anchors.jsonl"
	// KeysFile holds the public keys of members, one JSON object a line.
	KeysFile = "keys.jsonl"
)

// What a [Problem] is.
const (
	Changed    = "changed"    // an entry, a head or a header is not what was written
	Removed    = "removed"    // entries are missing, and no tombstone stands for them
	Repeated   = "repeated"   // entries are there twice, or out of order
	Truncated  = "truncated"  // the newest entries are missing
	Forged     = "forged"     // a signature is wrong, or of a key that is not trusted
	Replaced   = "replaced"   // the anchors are of another log
	Unreadable = "unreadable" // a file could not be read
)

// A Problem is something that a log that nobody touched does not have.
type Problem struct {
	Kind     string `json:"kind"`
	File     string `json:"file,omitempty"`
	Offset   int64  `json:"offset,omitempty"`
	Sequence uint64 `json:"sequence,omitempty"` // the entry, or the first of several
	Text     string `json:"text"`
}

// A Report is what [Verify] found.
type Report struct {
	Member     string      `json:"member"`
	Log        Hex         `json:"log"`
	Segments   int         `json:"segments"`
	First      uint64      `json:"first"`
	Last       uint64      `json:"last"`
	Newest     time.Time   `json:"newest"`  // the time of the last entry
	Heads      int         `json:"heads"`   // signed heads in the log that agree with it
	Anchors    int         `json:"anchors"` // kept elsewhere, that agree with it
	Signed     uint64      `json:"signed"`  // up to this entry heads and anchors vouch for it
	Keys       []Hex       `json:"keys"`    // that signed it
	Trusted    bool        `json:"trusted"` // whether these were given, not only found beside the log
	Tombstones []Tombstone `json:"tombstones,omitempty"`
	Problems   []Problem   `json:"problems,omitempty"`
}

// OK tells that nothing was found.
func (r *Report) OK() bool { return len(r.Problems) == 0 }

// VerifyOptions say what a log is held against.
type VerifyOptions struct {
	// Keys are the public keys that may have signed it. Without any, those that
	// did are listed, and whose they are is for the reader to know.
	Keys []ed25519.PublicKey
	// Anchors are heads that were kept elsewhere; those of other logs only tell
	// that this is not the log that was to be there.
	Anchors []Head
	// UpTo ends the check: what is behind that entry is still being written. 0
	// checks to the end.
	UpTo uint64
}

// maxProblems ends the search: who finds so many has found enough.
const maxProblems = 100

// Verify checks the log in a folder, one that is exported or one that no server
// has open. An error means that it could not be checked; what is wrong with it
// is in the report. Anchors and keys in the folder are used too, the keys only
// if none are given.
func Verify(dir string, o VerifyOptions) (Report, error) {
	var r Report
	anchors, err := readLines(filepath.Join(dir, AnchorsFile), ParseHead)
	if err != nil {
		return r, err
	}
	anchors = append(anchors, o.Anchors...)
	segments, err := list(dir, segmentSuffix)
	if err != nil {
		return r, fmt.Errorf("audit: verifying the log in %s: %w", dir, err)
	}
	tombstones, err := readTombstones(dir)
	if err != nil {
		return r, fmt.Errorf("audit: verifying the log in %s: %w", dir, err)
	}
	if len(segments) == 0 && len(tombstones) == 0 && len(anchors) == 0 {
		return r, fmt.Errorf("audit: %s holds no audit log", dir)
	}
	v := verifier{dir: dir, o: o, r: &r, tombstones: tombstones}
	v.w.keys = o.Keys
	for i, first := range segments {
		if len(r.Problems) >= maxProblems {
			break
		}
		if err := v.segment(first, i == len(segments)-1, anchors); err != nil {
			return r, err
		}
	}
	v.finish(anchors)
	r.Keys, r.Trusted = v.w.seen, len(o.Keys) > 0
	r.Heads, r.Anchors, r.Signed, r.Newest = v.w.heads, v.w.agreed, v.w.signed, v.w.newest
	if r.Last = v.w.next; r.Last > 0 {
		r.Last--
	}
	return r, nil
}

// ReadKeys returns the public keys in an exported folder's KeysFile; none if
// there is no such file.
func ReadKeys(dir string) ([]MemberKey, error) {
	return readLines(filepath.Join(dir, KeysFile), func(b []byte) (k MemberKey, err error) {
		if err = json.Unmarshal(b, &k); err == nil && len(k.Key) != ed25519.PublicKeySize {
			err = errors.New("audit: a public key has 32 bytes")
		}
		return k, err
	})
}

// A MemberKey is the public key with which a member signs.
type MemberKey struct {
	Member string `json:"member"`
	Key    Hex    `json:"key"`
}

// ReadAnchors reads a file of heads, one JSON object a line.
func ReadAnchors(path string) ([]Head, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	return readLines(path, ParseHead)
}

func readLines[T any](path string, parse func([]byte) (T, error)) (all []T, err error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for i, line := range bytes.Split(b, []byte{'\n'}) {
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		v, err := parse(line)
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", path, i+1, err)
		}
		all = append(all, v)
	}
	return all, nil
}

func readTombstones(dir string) (all []Tombstone, err error) {
	firsts, err := list(dir, tombstoneSuffix)
	if err != nil {
		return nil, err
	}
	for _, first := range firsts {
		b, err := atomicfile.Read(filepath.Join(dir, tombstoneName(first)), 64<<10)
		if err != nil {
			return nil, err
		}
		t, err := parseTombstone(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", tombstoneName(first), err)
		}
		all = append(all, t)
	}
	return all, nil
}

type verifier struct {
	dir        string
	o          VerifyOptions
	r          *Report
	w          walker
	tombstones []Tombstone
	begun      bool
}

func (v *verifier) problem(list ...Problem) { v.r.Problems = append(v.r.Problems, list...) }

// segment checks one file and how it follows the one before.
func (v *verifier) segment(first uint64, last bool, anchors []Head) error {
	name := segmentName(first)
	f, err := os.Open(filepath.Join(v.dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	h, n, err := readHeader(f)
	if err != nil {
		v.problem(Problem{Kind: Changed, File: name, Sequence: first, Text: err.Error()})
		return nil
	}
	v.r.Segments++
	if !v.begun {
		v.begin(h, anchors)
	}
	if string(h.id) != string(v.w.id) || h.member != v.r.Member {
		v.problem(Problem{Kind: Replaced, File: name, Sequence: first, Text: fmt.Sprintf("it is of log %x of member %q, and the segment before it of %s of %q", h.id, h.member, v.r.Log, v.r.Member)})
		return nil
	}
	if h.first != first {
		v.problem(Problem{Kind: Repeated, File: name, Sequence: h.first, Text: fmt.Sprintf("the segment begins with entry %d, and its name says %d", h.first, first)})
		return nil
	}
	v.cross(h.first)
	switch {
	case h.first > v.w.next:
		v.problem(Problem{Kind: Removed, File: name, Sequence: v.w.next, Text: fmt.Sprintf("entries %d to %d are missing", v.w.next, h.first-1)})
	case h.first < v.w.next:
		v.problem(Problem{Kind: Repeated, File: name, Sequence: h.first, Text: fmt.Sprintf("the segment begins with entry %d, and entry %d was there already", h.first, v.w.next-1)})
	case h.before != v.w.chain:
		v.problem(Problem{Kind: Changed, File: name, Sequence: h.first, Text: "the segment does not go on where the one before it ends"})
	}
	v.w.next, v.w.chain = h.first, h.before
	return v.blocks(f, h, int64(n), st.Size(), name, last)
}

func (v *verifier) blocks(f io.ReaderAt, h header, at, size int64, name string, last bool) error {
	ended := false
	for at < size && len(v.r.Problems) < maxProblems {
		var broken error
		for b, err := range blocks(f, h.id, at) {
			at = b.offset
			if errors.Is(err, errTorn) {
				broken = err
				break
			}
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if v.o.UpTo > 0 && v.w.next > v.o.UpTo && b.kind == blockEntries {
				return nil
			}
			if ended {
				v.problem(Problem{Kind: Changed, File: name, Offset: at, Text: "something follows the end of the segment"})
			}
			for _, p := range v.w.block(b, h) {
				p.File = name
				v.problem(p)
			}
			at = b.offset + b.length
			ended = ended || b.kind == blockEnd
			if len(v.r.Problems) >= maxProblems {
				return nil
			}
		}
		if v.o.UpTo > 0 && v.w.next > v.o.UpTo {
			return nil
		}
		next, dirty, err := findBlock(f, h.id, at, size)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if broken != nil || dirty {
			v.problem(Problem{Kind: Changed, File: name, Offset: at, Sequence: v.w.next, Text: fmt.Sprintf("entry %d, or others written with it, is cut off or altered", v.w.next)})
		}
		if next < 0 {
			break
		}
		at = next
	}
	if !ended && !last {
		v.problem(Problem{Kind: Truncated, File: name, Sequence: v.w.next, Text: "the end of the segment is missing"})
	}
	return nil
}

// findBlock returns where the next good block after at is, -1 for nowhere, and
// whether there is anything but zeros.
func findBlock(r io.ReaderAt, id []byte, at, size int64) (next int64, dirty bool, err error) {
	b := make([]byte, max(0, size-at))
	if _, err := r.ReadAt(b, at); err != nil && !errors.Is(err, io.EOF) {
		return 0, false, err
	}
	if allZero(b) {
		return -1, false, nil
	}
	for i := range b {
		if i > 0 && b[i] == blockMagic[0] {
			if _, err := parseBlock(b[i:], id); err == nil {
				return at + int64(i), true, nil
			}
		}
	}
	return -1, true, nil
}

// begin takes up the log that the first segment names.
func (v *verifier) begin(h header, anchors []Head) {
	v.begun = true
	v.r.Member, v.r.Log = h.member, h.id
	v.w.id, v.w.next, v.w.chain = h.id, 1, chainStart(h.id)
	for i := range anchors {
		if string(anchors[i].Log) != string(h.id) {
			continue
		}
		if p := v.w.vouch(&anchors[i]); p != "" {
			v.problem(Problem{Kind: Forged, Sequence: anchors[i].Sequence, Text: "an anchor: " + p})
			continue
		}
		v.w.anchors(&anchors[i])
	}
	v.r.First = 1
	if h.first > 1 {
		v.r.First = h.first
	}
}

// cross goes over the tombstones that lie before entry first.
func (v *verifier) cross(first uint64) {
	for _, t := range v.tombstones {
		if t.First != v.w.next || t.Last >= first || string(t.Log) != string(v.w.id) {
			continue
		}
		name := tombstoneName(t.First)
		switch {
		case !t.valid() || !v.w.trusts(t.Key):
			v.problem(Problem{Kind: Forged, File: name, Sequence: t.First, Text: "the tombstone's signature is wrong, or of a key that is not trusted"})
			continue
		case string(t.Before) != string(v.w.chain[:]):
			v.problem(Problem{Kind: Changed, File: name, Sequence: t.First, Text: "the tombstone does not go on where the segment before it ends"})
		}
		v.r.Tombstones = append(v.r.Tombstones, t)
		v.w.next, v.w.chain = t.Last+1, hash(t.After)
		v.w.skipped = append(v.w.skipped, [2]uint64{t.First, t.Last})
	}
}

// finish holds the end of the log against the anchors.
func (v *verifier) finish(anchors []Head) {
	if !v.begun {
		v.problem(Problem{Kind: Removed, Text: "there is no segment"})
		return
	}
	ours := 0
	for _, a := range anchors {
		if string(a.Log) != string(v.w.id) {
			continue
		}
		ours++
		if a.Sequence >= v.w.next && (v.o.UpTo == 0 || a.Sequence <= v.o.UpTo) {
			v.problem(Problem{Kind: Truncated, Sequence: v.w.next, Text: fmt.Sprintf("the log ends with entry %d, and the anchor of %s has %d: the newest entries are gone",
				v.w.next-1, a.Time.Format(time.RFC3339), a.Sequence)})
			break
		}
	}
	if ours == 0 && len(anchors) > 0 {
		v.problem(Problem{Kind: Replaced, Text: fmt.Sprintf("this is log %s, and the anchors are of others, such as %s", v.r.Log, anchors[0].Log)})
	}
}

// A walker goes along the chain.
type walker struct {
	id      []byte
	next    uint64 // number of the next entry
	chain   hash   // before it
	held    map[uint64][]byte
	keys    []ed25519.PublicKey // trusted; empty trusts all
	seen    []Hex
	skipped [][2]uint64
	newest  time.Time
	heads   int
	agreed  int
	signed  uint64
	scratch []byte
}

// anchors remembers a head that is kept elsewhere; nil is none.
func (w *walker) anchors(h *Head) {
	if h == nil {
		return
	}
	if w.held == nil {
		w.held = map[uint64][]byte{}
	}
	w.held[h.Sequence] = h.Hash
}

func (w *walker) trusts(key []byte) bool {
	return len(w.keys) == 0 || slices.ContainsFunc(w.keys, func(k ed25519.PublicKey) bool { return string(k) == string(key) })
}

// vouch tells what is wrong with a head's signature; empty for nothing.
func (w *walker) vouch(h *Head) string {
	switch {
	case !h.Valid():
		return "its signature is wrong"
	case !w.trusts(h.Key):
		return fmt.Sprintf("it is signed by key %s, which is not trusted", h.Key)
	}
	if !slices.ContainsFunc(w.seen, func(k Hex) bool { return string(k) == string(h.Key) }) {
		w.seen = append(w.seen, h.Key)
	}
	return ""
}

// block checks one block, and goes on behind it as if it were right.
func (w *walker) block(b block, in header) (found []Problem) {
	say := func(kind string, sequence uint64, format string, args ...any) {
		found = append(found, Problem{Kind: kind, Offset: b.offset, Sequence: sequence, Text: fmt.Sprintf(format, args...)})
	}
	switch b.kind {
	case blockEntries:
		list, after, err := entries(b.body)
		if err != nil {
			say(Changed, w.next, "entry %d, or others written with it: %v", w.next, err)
			return found
		}
		from := w.next
		for _, encoded := range list {
			e, err := Decode(encoded)
			if err != nil {
				say(Changed, w.next, "entry %d: %v", w.next, err)
				continue
			}
			switch {
			case e.Sequence > w.next:
				say(Removed, w.next, "entries %d to %d are missing", w.next, e.Sequence-1)
			case e.Sequence < w.next:
				say(Repeated, e.Sequence, "entry %d stands where %d belongs", e.Sequence, w.next)
			}
			w.chain, w.scratch = link(w.scratch, w.chain, encoded)
			w.next, w.newest = e.Sequence+1, e.Time
			if h, ok := w.held[e.Sequence]; ok && len(found) == 0 {
				if string(h) == string(w.chain[:]) {
					w.agreed++
					w.signed = max(w.signed, e.Sequence)
				} else {
					say(Changed, e.Sequence, "the chain at entry %d is not what the anchor says: an entry up to there was changed", e.Sequence)
				}
			}
		}
		if len(list) > 0 && b.sequence != from && len(found) == 0 {
			say(Repeated, b.sequence, "entries from %d stand where %d belongs", b.sequence, from)
		}
		if after != w.chain {
			if len(found) == 0 {
				say(Changed, from, "an entry from %d to %d was changed, or one before them", from, w.next-1)
			}
			w.chain = after
		}
	case blockHead, blockEnd:
		h, err := headOf(b, in)
		switch {
		case err != nil:
			say(Changed, b.sequence, "the head at entry %d: %v", b.sequence, err)
		case h.Sequence != w.next-1:
			say(Repeated, h.Sequence, "the head of entry %d stands after entry %d", h.Sequence, w.next-1)
		default:
			if p := w.vouch(&h); p != "" {
				say(Forged, h.Sequence, "the head at entry %d: %s", h.Sequence, p)
			} else if string(h.Hash) != string(w.chain[:]) {
				say(Changed, h.Sequence, "the chain at entry %d is not what the signed head says: an entry up to there was changed", h.Sequence)
			} else {
				w.heads++
				w.signed = max(w.signed, h.Sequence)
			}
		}
	default:
		say(Changed, w.next, "a block of a kind that this program does not know")
	}
	return found
}
