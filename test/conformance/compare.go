package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// A response must have every field of the expected one, in the same order, with
// the same type and value, and no other. What a server may say otherwise is
// below, and nothing else (KMIP Profiles 1.4, on permitted variations of its
// test cases):
//
//   - identifiers: the server's own, but the same one whenever the case names it;
//   - the message's time stamp: within tolerance of now;
//   - dates that the server sets: of what happens in the case, within tolerance
//     of now. Dates that the client set come back to the second;
//   - key bytes that the server makes, and what is computed with them: the same
//     length; told twice they are the same; a SHA-256 digest is theirs; what was
//     encrypted with them decrypts to what it was;
//   - the bytes of random numbers, of IVs that the server chooses and of what is
//     encrypted under such an IV: the same length;
//   - the text of a result message, which a failure must have;
//   - a lease's length; values of RNG parameters, capabilities, profiles,
//     extensions, application namespaces and server information;
//   - Query: operations and object types that this server has besides, and those
//     out of its scope that it lacks;
//   - attributes besides, where the request does not name those it wants;
//   - DiscoverVersions that asks for all: versions besides;
//   - the order of attributes, of attributes' names, and of identifiers that
//     Locate finds;
//   - an attribute index of 0 may be there or not (KMIP 1.4 §2.1.1);
//   - the correlation value of a stream: a new one each time, which the next
//     request carries;
//   - correlation values of messages besides, and the number of located items from 1.3 on.
const tolerance = 60 // seconds

// setting is where in a response a field stands.
type setting struct {
	path      string
	version   string // minor
	operation string
	request   *node // the request's payload, with the values that were sent
	id        string
	variable  bool // key bytes of the object are the server's making
	randomIV  bool
}

func (s setting) in(tag int) setting {
	s.path += "/" + ttlv.TagString(tag)
	return s
}

func (p *play) fault(s setting, format string, args ...any) {
	p.faults = append(p.faults, s.path+": "+fmt.Sprintf(format, args...))
}

// message compares a response, and learns from it what its variables are.
func (p *play) message(x exchange, request, actual *node) {
	if actual.tag != kmip.TagResponseMessage || actual.typ != ttlv.TypeStructure {
		p.faults = append(p.faults, "the answer is no response message")
		return
	}
	header := x.response.kid(kmip.TagResponseHeader)
	s := setting{version: header.kid(kmip.TagProtocolVersion).kid(kmip.TagProtocolVersionMinor).text}
	want, got := x.response.all(kmip.TagBatchItem), actual.all(kmip.TagBatchItem)
	h := actual.kid(kmip.TagResponseHeader)
	if h == nil || actual.kids[0] != h || len(actual.kids) != 1+len(got) {
		p.faults = append(p.faults, "the answer is not a header and batch items")
		return
	}
	if len(want) != len(got) {
		p.fault(s, "want %d batch items, got %d: %s", len(want), len(got), textOf(actual, 0))
		return
	}
	p.fields(s.in(kmip.TagResponseHeader), header, h)
	for i := range want {
		p.item(s, i, want[i], got[i], request)
	}
}

func (p *play) item(s setting, i int, want, got, request *node) {
	s.path = fmt.Sprintf("item %d", i+1)
	if list := request.all(kmip.TagBatchItem); i < len(list) {
		s.request = list[i].kid(kmip.TagRequestPayload)
	}
	if o := want.kid(kmip.TagOperation); o != nil {
		s.operation = o.text
	}
	if w, g := want.kid(kmip.TagResultStatus), got.kid(kmip.TagResultStatus); w != nil && g != nil && w.text != textOf(g, g.tag) {
		p.fault(s, "want %s, got %s", describe(want), describe(got))
		return
	}
	payload, expected := got.kid(kmip.TagResponsePayload), want.kid(kmip.TagResponsePayload)
	if id := payload.kid(kmip.TagUniqueIdentifier); id != nil {
		s.id = string(id.value)
	} else if id := s.request.kid(kmip.TagUniqueIdentifier); id != nil {
		s.id = string(id.value)
	}
	if s.operation == "Create" || s.operation == "ReKey" {
		p.made[s.id] = true
	}
	s.variable = p.made[s.id] || p.made[wrapper(s.request)]
	s.randomIV = expected.kid(kmip.TagIVCounterNonce) != nil
	p.fields(s, want, got)
}

// describe is the result of a batch item in one line.
func describe(it *node) string {
	var parts []string
	for _, tag := range []int{kmip.TagResultStatus, kmip.TagResultReason, kmip.TagResultMessage} {
		if n := it.kid(tag); n != nil && n.value != nil {
			parts = append(parts, textOf(n, tag))
		} else if n != nil {
			parts = append(parts, n.text)
		}
	}
	return strings.Join(parts, ", ")
}

// wrapper is the id of the key that a Get asks to wrap with.
func wrapper(request *node) string {
	id := request.kid(kmip.TagKeyWrappingSpecification).kid(kmip.TagEncryptionKeyInformation).kid(kmip.TagUniqueIdentifier)
	if id == nil {
		return ""
	}
	return string(id.value)
}

// fields compares the children of two structures.
func (p *play) fields(s setting, want, got *node) {
	i := 0
	for w := 0; w < len(want.kids); {
		tag := want.kids[w].tag
		from := w
		for w < len(want.kids) && want.kids[w].tag == tag {
			w++
		}
		next := i // what may be there besides is passed over only if the field follows
		for next < len(got.kids) && got.kids[next].tag != tag && p.mayBeThere(s, got.kids[next]) {
			next++
		}
		if next < len(got.kids) && got.kids[next].tag == tag {
			i = next
		}
		start := i
		for i < len(got.kids) && got.kids[i].tag == tag {
			i++
		}
		p.group(s.in(tag), want, want.kids[from:w], got, got.kids[start:i])
	}
	for ; i < len(got.kids); i++ {
		if !p.mayBeThere(s, got.kids[i]) {
			p.fault(s.in(got.kids[i].tag), "is there besides, or out of order: %s", textOf(got.kids[i], got.kids[i].tag))
		}
	}
}

// mayBeThere tells of fields that a server may add.
func (p *play) mayBeThere(s setting, n *node) bool {
	switch n.tag {
	case kmip.TagClientCorrelationValue, kmip.TagServerCorrelationValue:
		return s.version >= "4"
	case kmip.TagLocatedItems:
		return s.version >= "3"
	case kmip.TagResultMessage:
		return true
	case kmip.TagAttributeIndex:
		return len(n.value) == 4 && binary.BigEndian.Uint32(n.value) == 0
	case kmip.TagAttribute:
		return p.unnamed(s)
	case kmip.TagOperation, kmip.TagObjectType, kmip.TagServerInformation, kmip.TagExtensionInformation, kmip.TagApplicationNamespace,
		kmip.TagRNGParameters, kmip.TagProfileInformation, kmip.TagCapabilityInformation:
		return s.operation == "Query"
	}
	return false
}

// unnamed tells whether the request left the choice of attributes to the server.
func (p *play) unnamed(s setting) bool {
	return s.operation == "GetAttributes" && s.request != nil && s.request.kid(kmip.TagAttributeName) == nil
}

// group compares fields of one tag.
func (p *play) group(s setting, wantIn *node, want []*node, gotIn *node, got []*node) {
	tag := want[0].tag
	switch {
	case tag == kmip.TagAttribute:
		p.attributes(s, want, got)
	case s.operation == "Query" && (tag == kmip.TagOperation || tag == kmip.TagObjectType) && gotIn.tag == kmip.TagResponsePayload:
		for _, w := range want {
			if !inScope(tag, w.text) {
				continue
			}
			if !slices.ContainsFunc(got, func(g *node) bool { return textOf(g, tag) == w.text }) {
				p.fault(s, "%s is missing", w.text)
			}
		}
	case s.operation == "Query" && slices.Contains([]int{kmip.TagServerInformation, kmip.TagExtensionInformation, kmip.TagApplicationNamespace,
		kmip.TagProfileInformation}, tag):
	case s.operation == "Query" && (tag == kmip.TagRNGParameters || tag == kmip.TagCapabilityInformation):
		if len(got) == 0 {
			p.fault(s, "is missing")
		}
	case s.operation == "GetAttributeList" && tag == kmip.TagAttributeName:
		for _, w := range want {
			if !slices.ContainsFunc(got, func(g *node) bool { return string(g.value) == w.text }) {
				p.fault(s, "%q is missing", w.text)
			}
		}
	case s.operation == "DiscoverVersions" && tag == kmip.TagProtocolVersion && gotIn.tag == kmip.TagResponsePayload && s.request.kid(tag) == nil:
		p.preferred(s, want, got)
	case s.operation == "Locate" && tag == kmip.TagUniqueIdentifier:
		p.located(s, want, got)
	case tag == kmip.TagAttributeIndex && want[0].text == "0" && len(got) == 0:
	case tag == kmip.TagResultMessage:
		if failed := wantIn.kid(kmip.TagResultStatus); failed != nil && failed.text == "OperationFailed" && len(got) != 1 {
			p.fault(s, "is missing")
		}
	case len(want) != len(got):
		p.fault(s, "want %d, got %d", len(want), len(got))
	default:
		for i := range want {
			p.field(s, wantIn, want[i], gotIn, got[i])
		}
	}
}

// preferred compares versions in their order; a server may have more.
func (p *play) preferred(s setting, want, got []*node) {
	for _, w := range want {
		for len(got) > 0 && !p.same(s, w, got[0]) {
			got = got[1:]
		}
		if len(got) == 0 {
			p.fault(s, "a version is missing, or out of order")
			return
		}
		got = got[1:]
	}
}

// located compares sets of identifiers: first those that are known, then those
// that the case names for the first time.
func (p *play) located(s setting, want, got []*node) {
	rest := slices.Clone(got)
	var names []*node
	for _, w := range want {
		id, known := p.bound[w.text]
		i := slices.IndexFunc(rest, func(g *node) bool { return bytes.Equal(g.value, id) })
		switch {
		case !known:
			names = append(names, w)
		case i < 0:
			p.fault(s, "%s (%s) is not found", w.text, id)
		default:
			rest = slices.Delete(rest, i, i+1)
		}
	}
	if len(names) != len(rest) {
		p.fault(s, "want %d objects, got %d", len(want), len(got))
		return
	}
	for i, w := range names {
		p.bound[w.text] = rest[i].value
	}
}

// attributes compares lists in which order means nothing.
func (p *play) attributes(s setting, want, got []*node) {
	key := func(n *node) string {
		index := "0"
		if i := n.kid(kmip.TagAttributeIndex); i != nil {
			if index = i.text; i.value != nil {
				index = textOf(i, 0)
			}
		}
		return attributeName(n) + " [" + index + "]"
	}
	rest := slices.Clone(got)
	for _, w := range want {
		i := slices.IndexFunc(rest, func(g *node) bool { return key(g) == key(w) && p.same(s, w, g) })
		if i < 0 {
			i = slices.IndexFunc(rest, func(g *node) bool { return key(g) == key(w) })
		}
		if i < 0 {
			p.fault(s, "%s is missing", key(w))
			continue
		}
		in := s
		in.path += " " + attributeName(w)
		if attributeName(w) == "Random Number Generator" { // the server's own
			if rest[i].kid(kmip.TagAttributeValue).kid(kmip.TagRNGAlgorithm) == nil {
				p.fault(in, "has no RNG algorithm")
			}
		} else {
			p.fields(in, w, rest[i])
		}
		rest = slices.Delete(rest, i, i+1)
	}
	if !p.unnamed(s) {
		for _, g := range rest {
			p.fault(s, "is there besides: %s", textOf(g, 0))
		}
	}
}

// same tries a comparison, and leaves no trace of it.
func (p *play) same(s setting, want, got *node) bool {
	trial := *p
	trial.faults = nil
	trial.bound, trial.instead, trial.material = clone(p.bound), clone(p.instead), clone(p.material)
	trial.told = map[int][][]byte{}
	trial.fields(s, want, got)
	return len(trial.faults) == 0
}

func clone(m map[string][]byte) map[string][]byte {
	c := map[string][]byte{}
	for k, v := range m {
		c[k] = v
	}
	return c
}

// field compares two items of one tag.
func (p *play) field(s setting, wantIn, want, gotIn, got *node) {
	enum := enumTag(wantIn, want)
	if want.typ != got.typ {
		p.fault(s, "want type %v, got %v", want.typ, got.typ)
		return
	}
	if want.typ == ttlv.TypeStructure {
		p.fields(s, want, got)
		return
	}
	if p.anything(s, wantIn, want) {
		return
	}
	if want.typ == ttlv.TypeDateTime {
		p.date(s, want, got)
		return
	}
	name := want.text
	if name != "" && name[0] == '$' || isIdentifier(wantIn, want) {
		if old, known := p.bound[name]; known && !bytes.Equal(old, got.value) && !p.random(s, want.tag) && want.tag != kmip.TagCorrelationValue {
			p.fault(s, "want %s, which was %s, got %s", name, show(old, want.typ), textOf(got, enum))
			return
		}
		if len(got.value) == 0 {
			p.fault(s, "is empty")
		}
		p.bound[name] = got.value
		p.told[want.tag] = append(p.told[want.tag], got.value)
		p.learn(s, want.tag, got.value)
		return
	}
	value, err := valueOf(want.typ, enum, want.text)
	if err != nil {
		p.fault(s, "the case's value %q means nothing: %v", want.text, err)
		return
	}
	p.told[want.tag] = append(p.told[want.tag], got.value)
	if p.random(s, want.tag) {
		if len(value) != len(got.value) {
			p.fault(s, "want %d bytes, got %d", len(value), len(got.value))
		}
		p.instead[hex.EncodeToString(value)] = got.value
		p.learn(s, want.tag, got.value)
		return
	}
	if !bytes.Equal(value, got.value) {
		p.fault(s, "want %s, got %s", want.text, textOf(got, enum))
	}
}

func show(b []byte, typ ttlv.Type) string {
	if typ == ttlv.TypeTextString {
		return strconv.Quote(string(b))
	}
	return hex.EncodeToString(b)
}

// anything tells of fields whose value is the server's alone.
func (p *play) anything(s setting, parent, n *node) bool {
	switch n.tag {
	case kmip.TagLeaseTime, kmip.TagServerCorrelationValue, kmip.TagVendorIdentification:
		return true
	case kmip.TagAttributeValue:
		return attributeName(parent) == "Lease Time"
	}
	return false
}

// random tells of bytes that are the server's making.
func (p *play) random(s setting, tag int) bool {
	switch tag {
	case kmip.TagKeyMaterial, kmip.TagKeyValue, kmip.TagDigestValue, kmip.TagMACData, kmip.TagAuthenticatedEncryptionTag:
		return s.variable || s.randomIV && tag == kmip.TagAuthenticatedEncryptionTag
	case kmip.TagIVCounterNonce:
		return true // it is in a response only when the server chose it
	case kmip.TagData:
		switch s.operation {
		case "RNGRetrieve":
			return true
		case "Encrypt":
			return s.variable || s.randomIV
		case "Decrypt":
			return s.variable && !p.ours(s.request.kid(kmip.TagData))
		}
	}
	return false
}

// ours tells of a ciphertext that this server made: it must decrypt to what it was.
func (p *play) ours(data *node) bool {
	if data == nil {
		return false
	}
	return slices.ContainsFunc(p.told[kmip.TagData], func(b []byte) bool { return len(b) > 0 && bytes.Equal(b, data.value) })
}

// learn checks made key bytes against what was told of them before.
func (p *play) learn(s setting, tag int, value []byte) {
	if s.operation != "Get" && s.operation != "GetAttributes" || s.id == "" || wrapper(s.request) != "" {
		return
	}
	old, known := p.material[s.id]
	switch tag {
	case kmip.TagKeyMaterial:
		if known && !bytes.Equal(old, value) {
			p.fault(s, "the object had other key bytes before")
		}
		p.material[s.id] = value
	case kmip.TagDigestValue:
		if sum := sha256.Sum256(old); known && len(value) == len(sum) && !bytes.Equal(sum[:], value) {
			p.fault(s, "is not the SHA-256 of the key bytes")
		}
	}
}

// date compares instants, in whole seconds.
func (p *play) date(s setting, want, got *node) {
	at := int64(binary.BigEndian.Uint64(got.value))
	near := func(t, slack int64) bool { return at >= t-slack && at <= t+slack }
	tell := func(t int64) {
		p.fault(s, "want about %s (%s), got %s", time.Unix(t, 0).UTC().Format(time.RFC3339), want.text, textOf(got, 0))
	}
	if want.tag == kmip.TagTimeStamp {
		if now := time.Now().Unix(); !near(now, tolerance) {
			tell(now)
		}
		return
	}
	if sent, ok := p.dates[want.text]; ok && at == sent {
		return
	}
	if t, ok := p.relative(want.text); ok {
		// A date ahead is the client's, unless the server counts from now.
		_, sent := p.dates[want.text]
		late := time.Now().Unix() - p.now.Unix()
		if near(t, tolerance) && (want.text == "$NOW" || !sent) || p.hurry && near(t+late, 2) {
			return
		}
		tell(t)
		return
	}
	literal, err := time.Parse(time.RFC3339, want.text)
	if err != nil {
		p.fault(s, "the case's date %q means nothing", want.text)
		return
	}
	if sent, ok := p.dates[want.text]; ok {
		if !near(p.now.Unix(), tolerance) {
			tell(sent)
		}
		return
	}
	t := literal.Unix()
	if !p.recorded.IsZero() {
		t += p.now.Unix() - p.recorded.Unix()
	}
	// What the server dates by itself happened in this run.
	if at != t && !near(p.now.Unix(), tolerance) {
		tell(t)
	}
}
