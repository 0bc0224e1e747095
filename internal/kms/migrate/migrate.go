// Package migrate brings the objects of another KMIP server into an instance of
// a KMS (S10): under the same identifiers, with their attributes, states and
// dates, so that what was encrypted with them need not be encrypted anew.
//
// Place in the flow: level 2, over kms, which keeps what arrives, and kmipc,
// whose connections it reads through. The administration API runs it inside the
// key server, so that no key passes any other process.
//
// It only reads from the source (Locate, GetAttributes, Get). All that it knows
// is on the two servers: it may be killed at any instant and run again. An object
// that is here already with the same bytes is passed over; one with other bytes
// is a conflict, reported and never overwritten.
package migrate

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kmipc"
	"mortise/internal/kms"
)

// A Target keeps what arrives. Its methods are called concurrently.
type Target interface {
	// Sum is the SHA-256 of the material of the object called id, and its state;
	// found is false if there is no such object.
	Sum(ctx context.Context, id string) (sum [sha256.Size]byte, state kmip.State, found bool, err error)
	// Keep writes an object. It takes over m.Bytes. A refusal is a *[kms.Error].
	Keep(ctx context.Context, id string, m kms.Material, attributes []kmip.Attribute) error
}

// A Fate is what becomes of an object.
type Fate string

const (
	Comes    Fate = "comes"     // a dry run: it would be brought
	Arrived  Fate = "arrived"   // it was brought
	Here     Fate = "here"      // it is here already, with the same bytes
	Conflict Fate = "conflict"  // another object of its identifier is here
	Cannot   Fate = "cannot"    // it is of a kind that is not kept, or does not leave its server
	Failed   Fate = "failed"    // something went wrong; run it again
	Differs  Fate = "different" // found when all was compared at the end
)

// An Item is one object of the source.
type Item struct {
	ID        string   `json:"id"`
	Type      string   `json:"type,omitempty"`
	Algorithm string   `json:"algorithm,omitempty"`
	Bits      int32    `json:"bits,omitempty"`
	State     string   `json:"state,omitempty"`
	Names     []string `json:"names,omitempty"`
	Fate      Fate     `json:"fate"`
	Why       string   `json:"why,omitempty"`
	// Dropped are attributes that do not come along.
	Dropped []string `json:"dropped,omitempty"`
}

// Progress says how far a run is.
type Progress struct {
	Phase     string        `json:"phase"` // "list", "bring" or "compare"
	Done      int           `json:"done"`
	Total     int           `json:"total"`
	PerSecond float64       `json:"perSecond"`
	Left      time.Duration `json:"left"` // nanoseconds; 0 if it is not known
}

// A Report is the outcome of a run.
type Report struct {
	Source   string       `json:"source"`
	Vendor   string       `json:"vendor,omitempty"`
	Version  string       `json:"version"` // of KMIP
	Total    int          `json:"total"`
	Counts   map[Fate]int `json:"counts"`
	Compared int          `json:"compared"` // objects whose bytes and state were found the same at the end
}

// Complete tells whether everything that can come is here and the same.
func (r *Report) Complete() bool {
	return r.Counts[Conflict]+r.Counts[Failed]+r.Counts[Differs] == 0
}

// A Config says what to bring from where.
type Config struct {
	Source  kmipc.LinkConfig
	Target  Target
	DryRun  bool
	Workers int // connections to the source; 4 if 0
	// Each is called with every object whose fate is worth a line: all in a dry
	// run; in a real one all that did not simply arrive. Report is called with
	// progress, about once a second. Neither is called concurrently.
	Each   func(Item)
	Report func(Progress)
}

// maxRounds bounds how often the source is listed, when it goes on making keys.
const maxRounds = 5

// Run brings everything. An error means that it could not go on; what has
// arrived stays, and the next run goes on from there.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if cfg.Workers <= 0 {
		cfg.Workers = 4
	}
	m := &migration{cfg: cfg, seen: map[string]bool{}, report: &Report{Source: cfg.Source.Address, Counts: map[Fate]int{}}}
	first, err := m.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer first.close()
	for range maxRounds { // the source may go on making keys
		ids, err := m.list(ctx, first)
		if err != nil {
			return m.report, err
		}
		if len(ids) == 0 {
			break
		}
		m.report.Total += len(ids)
		if err := m.each(ctx, "bring", ids, m.bring); err != nil {
			return m.report, err
		}
		if cfg.DryRun {
			return m.report, nil
		}
	}
	return m.report, m.each(ctx, "compare", m.mine, m.compare)
}

// migration is a run.
type migration struct {
	cfg     Config
	version kmip.ProtocolVersion
	seen    map[string]bool // ids that were listed

	mu     sync.Mutex
	report *Report
	mine   []string // ids that arrived or were here
	meter  meter
}

// connect finds out what the source speaks.
func (m *migration) connect(ctx context.Context) (*source, error) {
	s := &source{cfg: m.cfg.Source}
	versions, vendor, err := s.greet(ctx)
	if err != nil {
		return nil, fmt.Errorf("migrate: asking %s: %w", m.cfg.Source.Address, err)
	}
	s.version, m.version = versions[0], versions[0]
	m.report.Vendor, m.report.Version = vendor, fmt.Sprintf("%d.%d", versions[0].ProtocolVersionMajor, versions[0].ProtocolVersionMinor)
	return s, nil
}

// list returns the source's identifiers that were not listed before.
func (m *migration) list(ctx context.Context, s *source) (fresh []string, err error) {
	err = s.locate(ctx, func(ids []string) (news int) {
		for _, id := range ids {
			if !m.seen[id] {
				m.seen[id] = true
				fresh = append(fresh, id)
				news++
			}
		}
		m.say(Progress{Phase: "list", Done: len(m.seen)})
		return news
	})
	if err != nil {
		return nil, fmt.Errorf("migrate: listing the keys of %s: %w", m.cfg.Source.Address, err)
	}
	return fresh, nil
}

// each runs f over ids with several connections.
func (m *migration) each(ctx context.Context, phase string, ids []string, f func(context.Context, *source, string) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	m.meter = meter{phase: phase, total: len(ids), began: time.Now()}
	queue := make(chan string)
	var workers sync.WaitGroup
	for range min(m.cfg.Workers, len(ids)) {
		workers.Go(func() {
			s := &source{cfg: m.cfg.Source, version: m.version}
			defer s.close()
			for id := range queue {
				if err := f(ctx, s, id); err != nil {
					cancel(err)
					return
				}
				m.step()
			}
		})
	}
feed:
	for _, id := range ids {
		select {
		case queue <- id:
		case <-ctx.Done():
			break feed
		}
	}
	close(queue)
	workers.Wait()
	return context.Cause(ctx)
}

// bring brings one object. Its error ends the run: a server is gone.
func (m *migration) bring(ctx context.Context, s *source, id string) error {
	i := Item{ID: id}
	err := m.decide(ctx, s, &i)
	var refused *kms.Error
	var answered *kmipc.ResultError
	switch {
	case err == nil:
	case errors.As(err, &refused) && refused.Reason != kmip.ResultReasonGeneralFailure:
		i.Fate, i.Why = Failed, "not taken here: "+refused.Message
	case errors.As(err, &answered):
		i.Fate, i.Why = Failed, "the source says: "+answered.Error()
	case errors.Is(err, errOdd):
		i.Fate, i.Why = Failed, err.Error()
	default:
		return fmt.Errorf("migrate: object %.100q: %w", id, err)
	}
	m.note(i)
	return nil
}

func (m *migration) decide(ctx context.Context, s *source, i *Item) error {
	attributes, err := s.attributes(ctx, i.ID)
	if errors.Is(err, kmipc.ErrNotFound) {
		i.Fate, i.Why = Cannot, "it is gone from the source"
		return nil
	}
	if err != nil {
		return err
	}
	i.describe(attributes)
	if why := cannot(attributes); why != "" {
		i.Fate, i.Why = Cannot, why
		return nil
	}
	have, _, found, err := m.cfg.Target.Sum(ctx, i.ID)
	if err != nil {
		return err
	}
	attributes, i.Dropped = kept(attributes)
	if m.cfg.DryRun {
		i.Fate = Comes
		if found {
			i.Fate, i.Why = Here, "an object of this identifier is here; its bytes are compared when it is brought"
		}
		return nil
	}
	material, err := s.get(ctx, i.ID, attributes)
	if why := stays(err); why != "" {
		i.Fate, i.Why = Cannot, why
		return nil
	}
	if err != nil {
		return err
	}
	if found {
		defer material.Bytes.Wipe()
		i.Fate = Here
		if sumOf(material.Bytes) != have {
			i.Fate, i.Why = Conflict, "another object of this identifier is here; it was left as it is"
		}
		return nil
	}
	return m.keep(ctx, i, material, attributes)
}

// keep writes an object. A name that another object here has already, which
// other servers allow, becomes a custom attribute: better that than no key.
func (m *migration) keep(ctx context.Context, i *Item, material kms.Material, attributes []kmip.Attribute) error {
	again, err := material.Bytes.Clone()
	if err != nil {
		material.Bytes.Wipe()
		return err
	}
	defer again.Wipe()
	i.Fate = Arrived
	err = m.cfg.Target.Keep(ctx, i.ID, material, attributes)
	var refused *kms.Error
	for _, retry := range []func([]kmip.Attribute) ([]kmip.Attribute, string){renamed, essential} {
		if err == nil || !errors.As(err, &refused) || refused.Reason == kmip.ResultReasonGeneralFailure {
			return err
		}
		less, why := retry(attributes)
		if why == "" {
			continue
		}
		if material.Bytes, err = again.Clone(); err != nil {
			return err
		}
		if err = m.cfg.Target.Keep(ctx, i.ID, material, less); err == nil {
			i.Why = why
		}
	}
	return err
}

// compare looks at both servers once more.
func (m *migration) compare(ctx context.Context, s *source, id string) error {
	attributes, err := s.attributes(ctx, id)
	if err != nil {
		return m.notCompared(id, err)
	}
	material, err := s.get(ctx, id, attributes)
	if err != nil {
		return m.notCompared(id, err)
	}
	there := sumOf(material.Bytes)
	material.Bytes.Wipe()
	here, state, found, err := m.cfg.Target.Sum(ctx, id)
	if err != nil {
		return err
	}
	i := Item{ID: id}
	i.describe(attributes)
	want := stateOf(attributes)
	switch {
	case !found:
		i.Fate, i.Why = Differs, "it is gone from here"
	case here != there:
		i.Fate, i.Why = Differs, "its bytes are not those of the source"
	case want != 0 && state != want:
		i.Fate, i.Why = Differs, fmt.Sprintf("it is %s at the source and %s here", words(ttlv.EnumStr(want)), words(ttlv.EnumStr(state)))
	default:
		m.mu.Lock()
		m.report.Compared++
		m.mu.Unlock()
		return nil
	}
	m.note(i)
	return nil
}

func (m *migration) notCompared(id string, err error) error {
	if !errors.Is(err, errOdd) && !isAnswer(err) {
		return err
	}
	m.note(Item{ID: id, Fate: Differs, Why: "the source does not give it any more: " + err.Error()})
	return nil
}

// note counts a fate and tells of it.
func (m *migration) note(i Item) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report.Counts[i.Fate]++
	if i.Fate == Arrived || i.Fate == Here {
		m.mine = append(m.mine, i.ID)
	}
	dull := (i.Fate == Arrived || i.Fate == Here) && i.Why == "" && len(i.Dropped) == 0
	if m.cfg.Each != nil && (m.cfg.DryRun || !dull) {
		m.cfg.Each(i)
	}
}

// meter measures a phase.
type meter struct {
	phase       string
	done, total int
	began, said time.Time
}

func (m *migration) step() {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := &m.meter
	t.done++
	now := time.Now()
	if t.done < t.total && now.Sub(t.said) < time.Second {
		return
	}
	t.said = now
	p := Progress{Phase: t.phase, Done: t.done, Total: t.total}
	if took := now.Sub(t.began).Seconds(); took > 0 {
		p.PerSecond = float64(t.done) / took
		p.Left = time.Duration(float64(t.total-t.done) / p.PerSecond * float64(time.Second)).Round(time.Second)
	}
	if m.cfg.Report != nil {
		m.cfg.Report(p)
	}
}

func (m *migration) say(p Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cfg.Report != nil {
		m.cfg.Report(p)
	}
}

// describe fills in what a person recognises the object by.
func (i *Item) describe(attributes []kmip.Attribute) {
	for _, a := range attributes {
		switch v := a.AttributeValue.(type) {
		case kmip.ObjectType:
			i.Type = words(ttlv.EnumStr(v))
		case kmip.CryptographicAlgorithm:
			i.Algorithm = ttlv.EnumStr(v)
		case kmip.State:
			i.State = words(ttlv.EnumStr(v))
		case kmip.Name:
			i.Names = append(i.Names, v.NameValue)
		case int32:
			if a.AttributeName == kmip.AttributeNameCryptographicLength {
				i.Bits = v
			}
		}
	}
	slices.Sort(i.Names)
}

// words puts spaces into an enumeration's name.
func words(name string) string {
	var b strings.Builder
	for i, c := range name {
		if i > 0 && c >= 'A' && c <= 'Z' {
			b.WriteByte(' ')
		}
		b.WriteRune(c)
	}
	return b.String()
}
