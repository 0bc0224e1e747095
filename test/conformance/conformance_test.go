package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/test/kmsproc"
)

// The program is built and its key server started as an administrator would.
// The number of cases that pass must not fall, and the document must list the
// others as they are.
func TestConformance(t *testing.T) {
	root := repository()
	bin, err := kmsproc.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	server, err := openServer(t.Context(), options{binary: bin})
	if err != nil {
		t.Fatal(err)
	}
	defer server.close()
	results, err := server.play(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	claims(t, server, results)
	t.Log("\n" + strings.Join(summary(results), "\n"))
	floor, err := readFloor(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range versions {
		if n := count(results, v).passed; n < floor[v] {
			t.Errorf("KMIP %s: %d cases pass, %d did before", v, n, floor[v])
		}
	}
	known := reasons()
	for _, r := range results {
		switch why := reasonFor(known, r.testCase); {
		case r.outside == "" && r.err != nil && why == "":
			t.Errorf("%s is in scope, does not pass, and test/conformance/reasons does not say why:\n%v", r.id(), r.err)
		case r.err == nil && r.outside == "" && why != "":
			t.Errorf("%s passes; take the reason why it does not out of test/conformance/reasons", r.id())
		}
	}
	doc, err := os.ReadFile(filepath.Join(root, docFile))
	if err != nil {
		t.Fatal(err)
	}
	_, part, _, err := sectionOf(string(doc))
	if err != nil {
		t.Fatal(err)
	}
	if part != section(results) {
		t.Errorf("%s lists other cases than this run finds; `make conformance WRITE=1` brings it up to date", docFile)
	}
}

// claims holds what Query says of profiles against the cases: it claims those that
// they show, and no other.
func claims(t *testing.T, s *server, results []result) {
	t.Helper()
	for _, version := range versions {
		minor := uint32(version[2] - '0')
		list, err := s.profiles(minor)
		if err != nil {
			t.Fatal(err)
		}
		if minor < 3 { // that have no Query Profiles
			if len(list) > 0 {
				t.Errorf("KMIP %s: a client is told of profiles: %v", version, list)
			}
			continue
		}
		suffix := fmt.Sprintf("KMIPV1_%d", minor)
		for _, p := range list {
			family := strings.TrimSuffix(p, suffix)
			if prefix := mandatory[family]; family == p || prefix == "" && !strings.HasPrefix(family, "BaselineServer") {
				t.Errorf("KMIP %s: %s is claimed, and no case shows it", version, p)
			}
		}
		for family, prefix := range mandatory {
			ok, known := shown(results, reasons(), version, prefix)
			if claimed := slices.Contains(list, family+suffix); claimed != (ok && known) {
				t.Errorf("KMIP %s: %s%s: claimed %v, shown by the cases %s*: %v", version, family, suffix, claimed, prefix, ok && known)
			}
		}
	}
}

var timeOfTest = time.Now()

// A wire that answers what it was told to.
type canned struct{ answer func(request *node) *node }

func (c canned) send(request []byte) ([]byte, error) {
	n, err := decode(request)
	if err != nil {
		return nil, err
	}
	return encode(c.answer(n)), nil
}

// The runner must find what differs: the expected answer itself passes, and each
// of its fields changed, left out or added does not.
func TestRunnerFindsDifferences(t *testing.T) {
	dir, err := casesDir()
	if err != nil {
		t.Fatal(err)
	}
	cases, err := load(dir, "1.4")
	if err != nil {
		t.Fatal(err)
	}
	var c *testCase
	for _, each := range cases {
		if each.name == "CS-BC-M-4-14" { // registers a key and encrypts with it
			c = each
		}
	}
	if c == nil {
		t.Fatal("the case is gone")
	}
	play := func(change func(exchange int, answer *node)) error {
		at := -1
		p := newPlay(nil, timeOfTest, nil)
		p.wire = canned{func(*node) *node {
			at++
			answer := expected(t, p, c.exchanges[at].response)
			if change != nil {
				change(at, answer)
			}
			return answer
		}}
		return p.run(c)
	}
	if err := play(nil); err != nil {
		t.Fatalf("what is expected does not pass: %v", err)
	}
	changed := 0
	for i, x := range c.exchanges {
		number := 0
		x.response.walk(func(n *node) {
			mine := number
			number++
			if n.typ == ttlv.TypeStructure {
				return
			}
			for what, change := range map[string]func(*node){
				"changed": func(n *node) { n.value = append([]byte(nil), n.value...); n.value[len(n.value)/2] ^= 0x40 },
				"retyped": func(n *node) { n.typ = ttlv.TypeInterval },
			} {
				if what == "changed" && (n.tag == kmip.TagUniqueIdentifier && i == 0) {
					continue // the first time, any will do
				}
				changed++
				err := play(func(exchange int, answer *node) {
					if exchange != i {
						return
					}
					at := 0
					answer.walk(func(n *node) {
						if at == mine {
							change(n)
						}
						at++
					})
				})
				if err == nil {
					t.Errorf("exchange %d: %s %s, and the case passes", i+1, ttlv.TagString(n.tag), what)
				}
			}
		})
		for _, add := range []bool{true, false} {
			err := play(func(exchange int, answer *node) {
				if exchange != i {
					return
				}
				payload := answer.kid(kmip.TagBatchItem).kid(kmip.TagResponsePayload)
				if add {
					payload.kids = append(payload.kids, &node{tag: kmip.TagData, typ: ttlv.TypeByteString, value: []byte("more")})
				} else {
					payload.kids = payload.kids[1:]
				}
			})
			if err == nil {
				t.Errorf("exchange %d: a field more (%v) or less, and the case passes", i+1, add)
			}
		}
	}
	if changed < 20 {
		t.Errorf("only %d changes were tried", changed)
	}
}

// expected is an answer that is all that a case expects.
func expected(t *testing.T, p *play, want *node) *node {
	t.Helper()
	out := &node{tag: want.tag, typ: want.typ}
	for _, k := range want.kids {
		if k.typ == ttlv.TypeStructure {
			out.kids = append(out.kids, expected(t, p, k))
			continue
		}
		v := []byte("id of " + k.text)
		if at, ok := p.relative(k.text); ok {
			v = unix(at)
		} else if k.text == "" || k.text[0] != '$' {
			var err error
			if v, err = valueOf(k.typ, enumTag(want, k), k.text); err != nil {
				t.Fatal(err)
			}
		}
		out.kids = append(out.kids, &node{tag: k.tag, typ: k.typ, value: v})
	}
	return out
}

func FuzzDecode(f *testing.F) {
	dir, err := casesDir()
	if err != nil {
		f.Fatal(err)
	}
	cases, err := load(dir, "1.0")
	if err != nil {
		f.Fatal(err)
	}
	for _, c := range cases[:10] {
		if m, err := newPlay(nil, timeOfTest, nil).resolve(nil, c.exchanges[0].request); err == nil {
			f.Add(encode(m))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := decode(b)
		if err != nil {
			return
		}
		if again := encode(n); string(again) != string(b) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}
