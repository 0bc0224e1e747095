package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// node is one TTLV item. One that was read from a test case has its value as
// the text that the case gives, which may be a variable; one that came from the
// wire has bytes.
type node struct {
	tag   int
	typ   ttlv.Type
	text  string
	value []byte
	kids  []*node
}

// kid returns the first child of that tag, nil when n is nil or has none.
func (n *node) kid(tag int) *node {
	if n == nil {
		return nil
	}
	for _, k := range n.kids {
		if k.tag == tag {
			return k
		}
	}
	return nil
}

// all returns the children of a tag.
func (n *node) all(tag int) (list []*node) {
	for _, k := range n.kids {
		if k.tag == tag {
			list = append(list, k)
		}
	}
	return list
}

// walk calls f for n and everything under it.
func (n *node) walk(f func(*node)) {
	f(n)
	for _, k := range n.kids {
		k.walk(f)
	}
}

// exchange is a request and the response that the case expects.
type exchange struct{ request, response *node }

// testCase is one OASIS test case: a file.
type testCase struct {
	version   string // "1.4"
	name      string // the file's name without .xml
	exchanges []exchange
}

func (c *testCase) id() string { return c.version + "/" + c.name }

// load reads the cases of one version, in the order of their names with numbers
// by value, since some build on the objects of those before.
func load(dir, version string) ([]*testCase, error) {
	files, err := filepath.Glob(filepath.Join(dir, "v"+version, "*.xml"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s has no test cases of KMIP %s", dir, version)
	}
	var list []*testCase
	for _, f := range files {
		text, err := os.Open(f)
		if err != nil {
			return nil, err
		}
		c := &testCase{version: version, name: strings.TrimSuffix(filepath.Base(f), ".xml")}
		c.exchanges, err = parse(text)
		text.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *testCase) int { return strings.Compare(sortable(a.name), sortable(b.name)) })
	return list, nil
}

var number = regexp.MustCompile(`\d+`)

func sortable(name string) string {
	return number.ReplaceAllStringFunc(name, func(d string) string { return fmt.Sprintf("%08s", d) })
}

// parse reads the KMIP XML encoding (KMIP Additional Message Encodings 1.0 §5)
// of requests and responses by turns.
func parse(r io.Reader) ([]exchange, error) {
	d := xml.NewDecoder(r)
	var root []*node
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if s, ok := t.(xml.StartElement); ok && s.Name.Local != "KMIP" {
			n, err := element(d, s)
			if err != nil {
				return nil, err
			}
			root = append(root, n)
		}
	}
	var list []exchange
	for len(root) > 0 {
		if len(root) < 2 || root[0].tag != kmip.TagRequestMessage || root[1].tag != kmip.TagResponseMessage {
			return nil, errors.New("requests and responses do not alternate")
		}
		list = append(list, exchange{root[0], root[1]})
		root = root[2:]
	}
	if len(list) == 0 {
		return nil, errors.New("the file has no messages")
	}
	return list, nil
}

func element(d *xml.Decoder, s xml.StartElement) (*node, error) {
	n := &node{typ: ttlv.TypeStructure}
	for _, a := range s.Attr {
		switch a.Name.Local {
		case "type":
			n.typ = typeByName[a.Value]
			if n.typ == 0 {
				return nil, fmt.Errorf("unknown type %q", a.Value)
			}
		case "value":
			n.text = a.Value
		case "tag":
			tag, err := strconv.ParseInt(a.Value, 0, 32)
			if err != nil {
				return nil, err
			}
			n.tag = int(tag)
		}
	}
	if n.tag == 0 {
		n.tag = tagByName[s.Name.Local]
	}
	if n.tag == 0 {
		return nil, fmt.Errorf("unknown tag %q", s.Name.Local)
	}
	for {
		t, err := d.Token()
		if err != nil {
			return nil, err
		}
		switch t := t.(type) {
		case xml.StartElement:
			k, err := element(d, t)
			if err != nil {
				return nil, err
			}
			n.kids = append(n.kids, k)
		case xml.EndElement:
			if n.tag == kmip.TagAttributeName { // some files break their lines inside
				n.text = strings.Join(strings.Fields(n.text), " ")
			}
			return n, nil
		}
	}
}

var typeByName = map[string]ttlv.Type{
	"Structure": ttlv.TypeStructure, "Integer": ttlv.TypeInteger, "LongInteger": ttlv.TypeLongInteger, "BigInteger": ttlv.TypeBigInteger,
	"Enumeration": ttlv.TypeEnumeration, "Boolean": ttlv.TypeBoolean, "TextString": ttlv.TypeTextString, "ByteString": ttlv.TypeByteString,
	"DateTime": ttlv.TypeDateTime, "Interval": ttlv.TypeInterval,
}

// tagByName turns the codec's names of tags round; the XML encoding uses the
// same. What the codec has no name for is added.
var tagByName = func() map[string]int {
	m := map[string]int{}
	for tag := 0x420000; tag < 0x420400; tag++ {
		if name := ttlv.TagString(tag); !strings.HasPrefix(name, "0x") {
			m[name] = tag
		}
	}
	return m
}()
