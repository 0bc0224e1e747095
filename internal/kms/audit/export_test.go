package audit

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// twoLogs is an export of the logs of two members, line by line, and heads of them.
func twoLogs(t testing.TB) (lines []string, anchors []Head) {
	t.Helper()
	var out bytes.Buffer
	var logs []*Log
	soon := time.Now().Add(time.Hour).Truncate(time.Second).UTC() // each log begins with an entry of now
	for n, member := range []string{"kms-1", "kms-2"} {
		l := open(t, Options{Dir: filepath.Join(t.TempDir(), member), Member: member})
		for i := range 12 {
			e := entry(i)
			e.Member, e.Time = member, soon.Add(time.Duration(2*i+n)*time.Second)
			ticket, err := l.Append(e, false)
			if err == nil {
				err = ticket.Wait(t.Context())
			}
			if err != nil {
				t.Fatal(err)
			}
			if i == 5 {
				h, err := l.Sign(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				anchors = append(anchors, h)
			}
		}
		b, stones, err := l.Begin()
		if err != nil {
			t.Fatal(err)
		}
		if err := (&Marks{Begin: &b, Tombstones: stones}).WriteJSON(&out); err != nil {
			t.Fatal(err)
		}
		logs = append(logs, l)
	}
	for r, err := range Merge(logs[0].Records(1), logs[1].Records(1)) {
		if err == nil {
			err = r.WriteJSON(&out)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range logs {
		h, err := l.Sign(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := (&Marks{End: &h}).WriteJSON(&out); err != nil {
			t.Fatal(err)
		}
	}
	return strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n"), anchors
}

func TestExportOfAllMembers(t *testing.T) {
	lines, anchors := twoLogs(t)
	if len(lines) != 2+26+2 {
		t.Fatalf("%d lines", len(lines))
	}
	for i, line := range lines[2:28] { // by time, the members take turns
		if !strings.Contains(line, fmt.Sprintf(`"member":"kms-%d"`, 1+i%2)) {
			t.Errorf("line %d: %s", i+3, line)
		}
	}
	verify := func(lines []string, o VerifyOptions) []Report {
		t.Helper()
		list, err := VerifyExport(strings.NewReader(strings.Join(lines, "\n")+"\n"), o)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	for _, r := range verify(lines, VerifyOptions{Anchors: anchors}) {
		if !r.OK() || r.First != 1 || r.Last != 13 || r.Signed != 13 || r.Heads != 1 || r.Anchors != 1 || len(r.Keys) != 1 {
			t.Errorf("%+v", r)
		}
	}
	replace := func(at int, old, with string) []string {
		changed := slices.Clone(lines)
		if changed[at] = strings.Replace(changed[at], old, with, 1); changed[at] == lines[at] {
			t.Fatalf("line %d has no %s: %s", at, old, lines[at])
		}
		return changed
	}
	swapped := slices.Clone(lines)
	swapped[6], swapped[8] = swapped[8], swapped[6]
	otherEnd, _ := twoLogs(t)
	of := func(member string) (list []string) {
		return slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return strings.Contains(l, `"member":"`+member+`"`) })
	}
	for _, x := range []struct {
		what    string
		lines   []string
		anchors []Head
		problem string // of kms-1
	}{
		{"removed", slices.Delete(slices.Clone(lines), 10, 11), nil, Removed},
		{"the first removed", slices.Delete(slices.Clone(lines), 2, 3), nil, Removed},
		{"the newest removed", slices.Delete(slices.Clone(lines), 26, 27), nil, Truncated},
		{"the newest and the end removed", slices.Delete(slices.Delete(slices.Clone(lines), 28, 29), 26, 27), nil, Truncated},
		{"the end removed", slices.Delete(slices.Clone(lines), 28, 29), nil, Truncated},
		{"the beginning removed", slices.Delete(slices.Clone(lines), 0, 1), nil, Removed},
		{"changed", replace(8, `"result":"Success"`, `"result":"Item Not Found"`), nil, Changed},
		{"a hash changed", replace(8, `"hash":"`, `"hash":"00`), nil, Changed},
		{"a field put in", replace(8, `"result":`, `"detail":"x","result":`), nil, Changed},
		{"a field that is not read put in", replace(8, `"result":`, `"note":"x","result":`), nil, Changed},
		{"a field in other letters put in", replace(8, `"result":`, `"Result":"x","result":`), nil, Changed},
		{"reordered", swapped, nil, Repeated},
		{"repeated", slices.Insert(slices.Clone(lines), 10, lines[8]), nil, Repeated},
		{"behind the end", slices.Insert(slices.Clone(lines), 30, lines[26]), nil, Repeated},
		{"begun twice", slices.Insert(slices.Clone(lines), 3, lines[0]), nil, Repeated},
		{"the beginning moved", slices.Delete(replace(0, `"sequence":1`, `"sequence":2`), 2, 3), nil, Removed},
		{"the end's signature changed", replace(28, `"signature":"`, `"signature":"00`), nil, Forged},
		{"the end of another log", slices.Replace(slices.Clone(lines), 28, 29, otherEnd[28]), nil, Truncated},
		{"not up to an anchor", slices.Delete(slices.Delete(slices.Clone(lines), 28, 29), 12, 13), anchors[:1], Truncated},
		{"the whole log removed", of("kms-1"), anchors, Removed},
	} {
		found := false
		for _, r := range verify(x.lines, VerifyOptions{Anchors: x.anchors}) {
			if r.Member == "kms-2" && !r.OK() {
				t.Errorf("%s: the log of the other member is accused: %+v", x.what, r.Problems)
			}
			found = found || r.Member == "kms-1" && len(r.Problems) > 0 && slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Kind == x.problem })
		}
		if !found {
			t.Errorf("%s: not found to be %s", x.what, x.problem)
		}
	}
	// A chain that is made anew: the signature is not of it.
	forged := slices.Clone(lines)
	forged[26] = lines[24]
	if r := verify(forged, VerifyOptions{})[0]; r.OK() {
		t.Error("an entry in another's place was not found")
	}
	for what, text := range map[string]string{"chosen entries": strings.Join(lines[2:28], "\n"), "nothing": "", "no JSON": "{", "another mark": `{"begin":{"x":1}}`, "a mark of nothing": `{"end":null}`} {
		if list, err := VerifyExport(strings.NewReader(text), VerifyOptions{}); err == nil {
			t.Errorf("%s is verified: %+v", what, list)
		}
	}
}

// TestExportAfterRemoval: what an administrator removed is accounted for.
func TestExportAfterRemoval(t *testing.T) {
	l := open(t, Options{Dir: t.TempDir(), SegmentSize: 64 << 10})
	add(t, l, 0, 1200)
	if _, err := l.Remove(t.Context(), 700, "admin", "old"); err != nil {
		t.Fatal(err)
	}
	b, stones, err := l.Begin()
	if err != nil || b.Sequence == 1 || len(stones) != 1 {
		t.Fatalf("%+v, %+v, %v", b, stones, err)
	}
	export := func(m Marks) []Report {
		t.Helper()
		var out bytes.Buffer
		if err := m.WriteJSON(&out); err != nil {
			t.Fatal(err)
		}
		for r, err := range l.Records(1) {
			if err == nil {
				err = r.WriteJSON(&out)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		h, err := l.Sign(t.Context())
		if err == nil {
			err = (&Marks{End: &h}).WriteJSON(&out)
		}
		if err != nil {
			t.Fatal(err)
		}
		list, err := VerifyExport(&out, VerifyOptions{})
		if err != nil || len(list) != 1 {
			t.Fatalf("%+v, %v", list, err)
		}
		return list
	}
	if r := export(Marks{Begin: &b, Tombstones: stones})[0]; !r.OK() || r.First != b.Sequence || r.Last != 1201 || len(r.Tombstones) != 1 {
		t.Errorf("%+v", r)
	}
	if r := export(Marks{Begin: &b})[0]; r.OK() {
		t.Error("without its tombstone the removal is not found")
	}
	other := slices.Clone(stones)
	other[0].Reason = "another"
	if r := export(Marks{Begin: &b, Tombstones: other})[0]; r.OK() {
		t.Error("a changed tombstone is not found")
	}
	other = slices.Clone(stones)
	other[0].After = other[0].After[:5]
	other[0].sign(testKey(t))
	if r := export(Marks{Begin: &b, Tombstones: other})[0]; r.OK() {
		t.Error("a tombstone that makes no sense is not found")
	}
}

func FuzzVerifyExport(f *testing.F) {
	lines, _ := twoLogs(f)
	f.Add([]byte(strings.Join(lines, "\n")))
	f.Add([]byte(lines[0] + "\n" + lines[28]))
	f.Add([]byte(lines[2]))
	f.Add([]byte(`{"begin":null}`))
	good := strings.Join(lines[:28], "\n")
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := VerifyExport(bytes.NewReader(b), VerifyOptions{})
		if err == nil && len(list) == 0 {
			t.Error("neither a report nor an error")
		}
		if bytes.Contains(b, []byte(`{"end"`)) {
			return
		}
		// What is not signed is never called whole.
		if list, err := VerifyExport(strings.NewReader(good+"\n"+string(b)), VerifyOptions{}); err == nil && list[0].OK() {
			t.Error("a log without an end is called whole")
		}
	})
}
