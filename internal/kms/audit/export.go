package audit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// An export of several logs is lines of JSON. Most are entries, of all logs by
// time, each log's in its own order. A line of [Marks] says where a log begins
// and ends, so that the export can be held against what the members wrote; an
// export of chosen entries has none, and proves nothing.

// Marks is a line that is no entry.
type Marks struct {
	// Begin comes before a log's first entry, and Tombstones stand for what was
	// removed before it.
	Begin      *Begin      `json:"begin,omitempty"`
	Tombstones []Tombstone `json:"tombstones,omitempty"`
	// End comes after its last one: the signed head of exactly that.
	End *Head `json:"end,omitempty"`
}

// Begin is where an export of a log begins.
type Begin struct {
	Member   string `json:"member"`
	Log      Hex    `json:"log"`
	Sequence uint64 `json:"sequence"` // of the first entry
	Before   Hex    `json:"before"`   // the chain's hash before it
}

// Begin tells where the log begins on the disk, and what was removed before.
func (l *Log) Begin() (Begin, []Tombstone, error) {
	l.removing.Lock()
	defer l.removing.Unlock()
	start := chainStart(l.id)
	b := Begin{Member: l.o.Member, Log: l.id, Sequence: 1, Before: start[:]}
	segments, err := list(l.o.Dir, segmentSuffix)
	if err != nil {
		return b, nil, fmt.Errorf("audit: reading the log in %s: %w", l.o.Dir, err)
	}
	if len(segments) > 0 {
		h, err := segmentHeader(filepath.Join(l.o.Dir, segmentName(segments[0])))
		if err != nil {
			return b, nil, err
		}
		b.Sequence, b.Before = h.first, h.before[:]
	}
	stones, err := readTombstones(l.o.Dir)
	return b, stones, err
}

func segmentHeader(path string) (header, error) {
	f, err := os.Open(path)
	if err != nil {
		return header{}, fmt.Errorf("audit: %w", err)
	}
	defer f.Close()
	h, _, err := readHeader(f)
	if err != nil {
		return h, fmt.Errorf("audit: reading %s: %w", path, err)
	}
	return h, nil
}

// Merge yields the entries of several logs by time. Of one log they stay in their
// order, whatever their times say.
func Merge(logs ...iter.Seq2[Record, error]) iter.Seq2[Record, error] {
	type source struct {
		next func() (Record, error, bool)
		head Record
	}
	return func(yield func(Record, error) bool) {
		var sources []*source
		for _, l := range logs {
			next, stop := iter.Pull2(l)
			defer stop()
			sources = append(sources, &source{next: next})
		}
		for _, s := range slices.Clone(sources) {
			r, err, ok := s.next()
			if err != nil {
				yield(r, err)
				return
			}
			if s.head = r; !ok {
				sources = slices.DeleteFunc(sources, func(x *source) bool { return x == s })
			}
		}
		for len(sources) > 0 {
			first := slices.MinFunc(sources, func(a, b *source) int { return a.head.Time.Compare(b.head.Time) })
			if !yield(first.head, nil) {
				return
			}
			r, err, ok := first.next()
			if err != nil {
				yield(r, err)
				return
			}
			if first.head = r; !ok {
				sources = slices.DeleteFunc(sources, func(x *source) bool { return x == first })
			}
		}
	}
}

// WriteJSON writes the marks as one line.
func (m *Marks) WriteJSON(w io.Writer) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// maxLine bounds a line of an export, in bytes.
const maxLine = 1 << 20

// VerifyExport checks an export of several logs, each by itself, and returns a
// report for each. An error means that it could not be checked.
func VerifyExport(r io.Reader, o VerifyOptions) ([]Report, error) {
	v := exportVerifier{o: o, logs: map[string]*exported{}}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	for n := 1; lines.Scan(); n++ {
		if line := bytes.TrimRight(lines.Bytes(), "\r"); len(line) > 0 {
			if err := v.line(n, line); err != nil {
				return nil, fmt.Errorf("audit: line %d: %w", n, err)
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("audit: reading the export: %w", err)
	}
	if len(v.order) == 0 {
		return nil, errNoMarks
	}
	return v.finish(), nil
}

// VerifyExportFile is VerifyExport of a file.
func VerifyExportFile(path string, o VerifyOptions) ([]Report, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.IsDir() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("is a folder")}
	}
	return VerifyExport(f, o)
}

var errNoMarks = errors.New("the export does not say where its logs begin: it has chosen entries, or those of one member, and proves nothing; export with --all-members and nothing chosen")

type exportVerifier struct {
	o     VerifyOptions
	logs  map[string]*exported // by id
	order []*exported
}

// exported is a log on its way through an export.
type exported struct {
	r     Report
	w     walker
	ended bool
}

func (x *exported) say(line int, kind string, sequence uint64, format string, args ...any) {
	if len(x.r.Problems) < maxProblems {
		x.r.Problems = append(x.r.Problems, Problem{Kind: kind, Sequence: sequence, Text: fmt.Sprintf("line %d: ", line) + fmt.Sprintf(format, args...)})
	}
}

func (v *exportVerifier) line(n int, line []byte) error {
	if bytes.HasPrefix(line, []byte(`{"begin":`)) || bytes.HasPrefix(line, []byte(`{"end":`)) {
		var m Marks
		d := json.NewDecoder(bytes.NewReader(line))
		d.DisallowUnknownFields()
		if err := d.Decode(&m); err != nil {
			return err
		}
		if m.Begin != nil {
			return v.begin(n, m)
		}
		return v.end(n, m.End)
	}
	var r Record
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("it is no entry: %w", err)
	}
	x := v.logs[string(r.Log)]
	if x == nil {
		if len(v.order) == 0 {
			return errNoMarks
		}
		x = v.open(r.Member, r.Log)
		x.say(n, Removed, r.Sequence, "the mark that says where the log begins is missing")
		x.w.next, x.r.First = r.Sequence, r.Sequence
	}
	x.entry(n, &r, line)
	return nil
}

func (v *exportVerifier) open(member string, log Hex) *exported {
	x := &exported{r: Report{Member: member, Log: log}, w: walker{id: log, keys: v.o.Keys}}
	v.logs[string(log)], v.order = x, append(v.order, x)
	return x
}

func (v *exportVerifier) begin(n int, m Marks) error {
	b := m.Begin
	if len(b.Log) != idLen || len(b.Before) != len(hash{}) || b.Sequence == 0 {
		return errors.New("the mark makes no sense")
	}
	if x := v.logs[string(b.Log)]; x != nil {
		x.say(n, Repeated, b.Sequence, "the log begins a second time")
		return nil
	}
	x := v.open(b.Member, b.Log)
	x.w.next, x.w.chain, x.r.First = b.Sequence, hash(b.Before), b.Sequence
	at, chain := uint64(1), chainStart(b.Log)
	for _, t := range m.Tombstones {
		if t.First != at || t.Last < at || len(t.After) != len(hash{}) || string(t.Before) != string(chain[:]) || !t.valid() || !x.w.trusts(t.Key) || string(t.Log) != string(b.Log) {
			x.say(n, Forged, t.First, "the tombstone of entries %d to %d is not what the log had there, or its signature is wrong", t.First, t.Last)
			continue
		}
		x.r.Tombstones = append(x.r.Tombstones, t)
		at, chain = t.Last+1, hash(t.After)
	}
	if at != b.Sequence || chain != x.w.chain {
		x.say(n, Removed, at, "the log begins with entry %d here, and entry %d should be there", b.Sequence, at)
	}
	for i := range v.o.Anchors {
		if a := &v.o.Anchors[i]; string(a.Log) == string(b.Log) && a.Sequence >= b.Sequence {
			if p := x.w.vouch(a); p != "" {
				x.say(n, Forged, a.Sequence, "an anchor: %s", p)
				continue
			}
			x.w.anchors(a)
		}
	}
	return nil
}

// entry checks one entry and goes on behind it as if it were right.
func (x *exported) entry(n int, r *Record, line []byte) {
	var plain bytes.Buffer
	if err := r.WriteJSON(&plain); err != nil || !bytes.Equal(bytes.TrimRight(plain.Bytes(), "\n"), line) {
		x.say(n, Changed, r.Sequence, "entry %d is not written as an export writes it", r.Sequence)
	}
	switch {
	case r.Sequence > x.w.next:
		x.say(n, Removed, x.w.next, "entries %d to %d are missing", x.w.next, r.Sequence-1)
	case r.Sequence < x.w.next:
		x.say(n, Repeated, r.Sequence, "entry %d stands where %d belongs", r.Sequence, x.w.next)
	case x.ended:
		x.say(n, Repeated, r.Sequence, "entry %d stands behind the end of its log", r.Sequence)
	default:
		var now hash
		now, x.w.scratch = link(x.w.scratch, x.w.chain, r.Append(nil))
		if string(now[:]) != string(r.Hash) {
			x.say(n, Changed, r.Sequence, "entry %d is not what the log has, or its hash is not", r.Sequence)
		}
	}
	if len(r.Hash) == len(hash{}) {
		x.w.chain = hash(r.Hash)
	}
	x.w.next, x.w.newest = r.Sequence+1, r.Time
	if h, ok := x.w.held[r.Sequence]; ok {
		if string(h) == string(r.Hash) {
			x.w.agreed++
			x.w.signed = max(x.w.signed, r.Sequence)
		} else {
			x.say(n, Changed, r.Sequence, "the chain at entry %d is not what the anchor says", r.Sequence)
		}
	}
}

func (v *exportVerifier) end(n int, h *Head) error {
	if h == nil {
		return errors.New("the mark makes no sense")
	}
	x := v.logs[string(h.Log)]
	if x == nil {
		x = v.open(h.Member, h.Log)
		x.say(n, Removed, 1, "nothing but the end of the log is there")
		return nil
	}
	switch p := x.w.vouch(h); {
	case x.ended:
		x.say(n, Repeated, h.Sequence, "the log ends a second time")
	case p != "":
		x.say(n, Forged, h.Sequence, "the end: %s", p)
	case h.Sequence >= x.w.next:
		x.say(n, Truncated, x.w.next, "the log ends with entry %d, and its signed head has %d: the newest entries are gone", x.w.next-1, h.Sequence)
	case h.Sequence+1 != x.w.next || string(h.Hash) != string(x.w.chain[:]):
		x.say(n, Changed, h.Sequence, "the signed head is not of what the log has here")
	default:
		x.w.heads++
		x.w.signed = max(x.w.signed, h.Sequence)
	}
	x.ended = true
	return nil
}

func (v *exportVerifier) finish() (all []Report) {
	for _, x := range v.order {
		if !x.ended {
			x.r.Problems = append(x.r.Problems, Problem{Kind: Truncated, Sequence: x.w.next, Text: "the end of the log is missing"})
		}
		for _, a := range v.o.Anchors {
			if string(a.Log) == string(x.w.id) && a.Sequence >= x.w.next {
				x.r.Problems = append(x.r.Problems, Problem{Kind: Truncated, Sequence: x.w.next, Text: fmt.Sprintf(
					"the log ends with entry %d, and the anchor of %s has %d: the newest entries are gone, or came after the export", x.w.next-1, a.Time.Format(time.RFC3339), a.Sequence)})
				break
			}
		}
		r := x.r
		r.Keys, r.Trusted = x.w.seen, len(v.o.Keys) > 0
		r.Heads, r.Anchors, r.Signed, r.Newest = x.w.heads, x.w.agreed, x.w.signed, x.w.newest
		r.Last = x.w.next - 1
		all = append(all, r)
	}
	told := map[string]bool{}
	for _, a := range v.o.Anchors {
		if v.logs[string(a.Log)] != nil || told[string(a.Log)] {
			continue
		}
		told[string(a.Log)] = true
		all = append(all, Report{Member: a.Member, Log: a.Log, Trusted: len(v.o.Keys) > 0, Problems: []Problem{{Kind: Removed, Sequence: 1,
			Text: fmt.Sprintf("an anchor of %s is of this log, which had %d entries, and the export has none", a.Time.Format(time.RFC3339), a.Sequence)}}})
	}
	return all
}
