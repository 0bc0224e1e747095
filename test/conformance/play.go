package main

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// A wire sends the bytes of a request and returns those of its response.
type wire interface {
	send(request []byte) (response []byte, err error)
}

// play is a case under way: what the variables of its text stand for by now.
type play struct {
	wire wire
	now  time.Time // what $NOW is, from the first message to the last

	// A case names by variables what the server will say: $UNIQUE_IDENTIFIER_0
	// is bound where it first stands in a response. Where a case has literal
	// bytes for what is random, such as a ciphertext under a made key, the
	// actual ones are sent from then on in their place.
	bound   map[string][]byte
	instead map[string][]byte // by the literal, in hexadecimal

	told map[int][][]byte // bytes in responses, by tag

	made     map[string]bool   // ids of objects that the server made the bytes of
	material map[string][]byte // key bytes by id, as first told
	dates    map[string]int64  // literal dates sent, and what they were sent as
	hurry    bool              // the case waits
	recorded time.Time         // when the exchange was recorded; zero when the case is written with $NOW

	faults []string // how the current response differs
}

// newPlay begins a case; before is the one whose objects it uses, nil for none.
func newPlay(w wire, now time.Time, before *play) *play {
	p := &play{wire: w, now: now, bound: map[string][]byte{}, told: map[int][][]byte{}}
	if before != nil {
		p.instead, p.made, p.material, p.dates = before.instead, before.made, before.material, before.dates
	} else {
		p.instead, p.made, p.material, p.dates = map[string][]byte{}, map[string]bool{}, map[string][]byte{}, map[string]int64{}
	}
	return p
}

// run plays the exchanges to the first response that differs, which it tells.
func (p *play) run(c *testCase) error {
	p.hurry = c.waits()
	for i, x := range c.exchanges {
		if wait := c.wait(i); wait > 0 {
			time.Sleep(wait/haste + time.Second)
		}
		if err := p.exchange(x); err != nil {
			return fmt.Errorf("exchange %d of %d (%s): %w", i+1, len(c.exchanges), operations(x.request), err)
		}
	}
	return nil
}

func operations(message *node) string {
	var names []string
	for _, it := range message.all(kmip.TagBatchItem) {
		if o := it.kid(kmip.TagOperation); o != nil {
			names = append(names, o.text)
		}
	}
	return strings.Join(names, ", ")
}

func (p *play) exchange(x exchange) error {
	p.recorded = recordedAt(x)
	request, err := p.resolve(nil, x.request)
	if err != nil {
		return fmt.Errorf("the request cannot be made: %w", err)
	}
	raw, err := p.wire.send(encode(request))
	if err != nil {
		return err
	}
	response, err := decode(raw)
	if err != nil {
		return fmt.Errorf("the response is no TTLV: %w", err)
	}
	p.faults = nil
	p.message(x, request, response)
	if len(p.faults) > 0 {
		return errors.New(strings.Join(p.faults, "\n"))
	}
	return nil
}

// resolve makes of a case's request one that can be encoded.
func (p *play) resolve(parent, n *node) (*node, error) {
	out := &node{tag: n.tag, typ: n.typ, text: n.text}
	if n.typ != ttlv.TypeStructure {
		v, err := p.sent(parent, n)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", ttlv.TagString(n.tag), err)
		}
		out.value = v
		return out, nil
	}
	for _, k := range n.kids {
		r, err := p.resolve(n, k)
		if err != nil {
			return nil, err
		}
		out.kids = append(out.kids, r)
	}
	return out, nil
}

func (p *play) sent(parent, n *node) ([]byte, error) {
	if t, ok := p.relative(n.text); ok {
		p.dates[n.text] = t
		return unix(t), nil
	}
	if strings.HasPrefix(n.text, "$") {
		return p.variable(n)
	}
	v, err := valueOf(n.typ, enumTag(parent, n), n.text)
	switch {
	case err != nil:
		return nil, err
	case n.typ == ttlv.TypeByteString && p.instead[hex.EncodeToString(v)] != nil:
		return p.instead[hex.EncodeToString(v)], nil
	case isIdentifier(parent, n) && p.bound[n.text] != nil:
		return p.bound[n.text], nil
	case n.typ == ttlv.TypeDateTime && !p.recorded.IsZero():
		at, ok := p.dates[n.text]
		if !ok {
			at = p.now.Unix() + p.scaled(int64(binary.BigEndian.Uint64(v))-p.recorded.Unix())
			p.dates[n.text] = at
		}
		return unix(at), nil
	}
	return v, nil
}

// A case that waits for a date some minutes ahead is played in haste: its wait,
// and how far ahead dates are for which it may wait, are a sixtieth.
const (
	haste   = 60
	maxWait = 10 * time.Minute
)

// wait is how long the client waited before an exchange when the case was
// recorded, if that is longer than answers take and shorter than a night.
func (c *testCase) wait(i int) time.Duration {
	if i == 0 {
		return 0
	}
	if d := recordedAt(c.exchanges[i]).Sub(recordedAt(c.exchanges[i-1])); d > time.Minute && d < maxWait {
		return d
	}
	return 0
}

func (c *testCase) waits() bool {
	for i := range c.exchanges {
		if c.wait(i) > 0 {
			return true
		}
	}
	return false
}

// scaled takes seconds from now as the case has them.
func (p *play) scaled(ahead int64) int64 {
	if p.hurry && ahead > 0 && ahead <= int64(maxWait/time.Second) {
		return ahead / haste
	}
	return ahead
}

// recordedAt is the literal time stamp of a response, zero if it has none.
func recordedAt(x exchange) time.Time {
	stamp := x.response.kid(kmip.TagResponseHeader).kid(kmip.TagTimeStamp)
	if stamp == nil {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, stamp.text)
	if err != nil {
		return time.Time{}
	}
	return t
}

// variable is what a variable in a request stands for. Those for bytes may not
// be in any response by their name: $DATA_1 is then the second Data of a response,
// $MAC_DATA the last MAC data.
func (p *play) variable(n *node) ([]byte, error) {
	if v, ok := p.bound[n.text]; ok {
		return v, nil
	}
	told := p.told[n.tag]
	if n.typ != ttlv.TypeByteString || len(told) == 0 {
		return nil, fmt.Errorf("nothing has told %s yet", n.text)
	}
	if at := strings.LastIndexByte(n.text, '_'); at > 0 {
		if i, err := strconv.Atoi(n.text[at+1:]); err == nil && i < len(told) {
			return told[i], nil
		}
	}
	return told[len(told)-1], nil
}

var nowText = regexp.MustCompile(`^\$NOW([+-]\d+)?$`)

// relative reads $NOW, $NOW-3600 and their like.
func (p *play) relative(text string) (int64, bool) {
	m := nowText.FindStringSubmatch(text)
	if m == nil {
		return 0, false
	}
	offset, _ := strconv.ParseInt(m[1], 10, 64)
	return p.now.Unix() + p.scaled(offset), true
}

func unix(t int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(t)) }

// isIdentifier tells of fields and attributes that name an object by an id of
// the server's.
func isIdentifier(parent, n *node) bool {
	switch n.tag {
	case kmip.TagUniqueIdentifier, kmip.TagLinkedObjectIdentifier:
		return true
	case kmip.TagAttributeValue:
		return attributeName(parent) == "Unique Identifier"
	}
	return false
}
