// Package certify runs vCenter's traffic against a KMIP server of any make and
// says what works, what deviates without harm and what vCenter would fail at
// (K14). It also runs the operations that VMware's certification of key servers
// asks for.
//
// The messages are vCenter 7.0.3's as they were traced: protocol 1.1 and
// nothing of a later one, no time stamp, batch items called QLKC and a counter,
// a new connection for every action, each beginning with an empty
// DiscoverVersions.
//
// Place in the flow: level 2; the CLI runs it, without a center. It imports
// kmipc for connections and, of kmip-go, the messages.
package certify

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kmipc"
)

// A Result is how one step went.
type Result string

const (
	// Works: the server does what vCenter expects.
	Works Result = "works"
	// Deviates: it does not, and vCenter goes on all the same.
	Deviates Result = "deviates"
	// Fails: vCenter cannot use the server for this.
	Fails Result = "fails"
	// Skipped: an earlier failure left nothing to try it on.
	Skipped Result = "skipped"
)

// A Step is one thing that was tried.
type Step struct {
	Part   string        `json:"part"` // "connection", "vCenter" or "certified minimum"
	Name   string        `json:"step"`
	Result Result        `json:"result"`
	Found  string        `json:"found"`             // what the server did
	Then   string        `json:"vcenter,omitempty"` // what vCenter would do about it
	Mend   string        `json:"mend,omitempty"`
	Took   time.Duration `json:"nanoseconds"`
}

// A Report is the outcome of a run.
type Report struct {
	Server     string    `json:"server"`
	Thumbprint string    `json:"thumbprint"` // SHA-256 of the server's certificate, hexadecimal
	Subject    string    `json:"subject"`
	NotAfter   time.Time `json:"notAfter"`
	Vendor     string    `json:"vendor"`
	Versions   []string  `json:"versions"` // as the server lists them
	Verdict    Result    `json:"verdict"`  // the worst of Steps; a skipped one counts as failing
	Steps      []Step    `json:"steps"`
	// Left are the ids of test keys that are still on the server.
	Left []string `json:"left"`
}

// A Config says which server to certify.
type Config struct {
	Address     string          // host:port
	Certificate tls.Certificate // the client's
	// Trust judges the server's certificate; nil takes any, as somebody does
	// who compares the report's thumbprint.
	Trust   func([]*x509.Certificate) error
	Keep    bool             // leave the test keys
	Timeout time.Duration    // of a connection or an answer; 10 s if 0, vCenter's patience
	Now     func() time.Time // nil: time.Now
	Each    func(Step)       // called after every step; may be nil
}

// Run certifies a server. It fails only when ctx ends; everything that a server
// does wrong is in the report.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	r := &run{cfg: cfg, report: &Report{Server: cfg.Address, Versions: []string{}, Steps: []Step{}, Left: []string{}}}
	if r.connection(ctx) {
		r.vcenter(ctx)
		r.minimum(ctx)
	}
	r.cleanUp(ctx)
	if err := ctx.Err(); err != nil {
		return r.report, err
	}
	r.report.Verdict = Works
	for _, s := range r.report.Steps {
		switch {
		case s.Result == Fails, s.Result == Skipped:
			r.report.Verdict = Fails
		case s.Result == Deviates && r.report.Verdict == Works:
			r.report.Verdict = Deviates
		}
	}
	return r.report, nil
}

// run is a certification under way.
type run struct {
	cfg    Config
	report *Report
	keys   []string // made and not destroyed yet
	items  int      // for batch item ids
	best   kmip.ProtocolVersion
}

// step runs f, which fills in how it went; a step that says nothing works.
func (r *run) step(part, name string, f func(*Step)) Result {
	s := Step{Part: part, Name: name, Result: Works}
	began := time.Now()
	f(&s)
	s.Took = time.Since(began)
	r.report.Steps = append(r.report.Steps, s)
	if r.cfg.Each != nil {
		r.cfg.Each(s)
	}
	return s.Result
}

// skip records a step that cannot be tried.
func (r *run) skip(part, name, because string) {
	r.step(part, name, func(s *Step) { s.Result, s.Found = Skipped, because })
}

func (s *Step) fails(then, mend, format string, args ...any) {
	s.Result, s.Found, s.Then, s.Mend = Fails, fmt.Sprintf(format, args...), then, mend
}

func (s *Step) deviates(then, mend, format string, args ...any) {
	s.Result, s.Found, s.Then, s.Mend = Deviates, fmt.Sprintf(format, args...), then, mend
}

func (s *Step) works(format string, args ...any) { s.Found = fmt.Sprintf(format, args...) }

func (r *run) dial(ctx context.Context, maxTLS uint16) (*kmipc.Link, error) {
	return kmipc.DialLink(ctx, kmipc.LinkConfig{
		Address: r.cfg.Address, Certificate: r.cfg.Certificate, Trust: r.cfg.Trust, MaxTLS: maxTLS, Timeout: r.cfg.Timeout,
	})
}

// send sends one message of several operations as vCenter does, and checks that
// the answer has the form of one to it.
func (r *run) send(ctx context.Context, l *kmipc.Link, v kmip.ProtocolVersion, ops ...kmip.OperationPayload) ([]kmip.ResponseBatchItem, error) {
	req := &kmip.RequestMessage{Header: kmip.RequestHeader{ProtocolVersion: v, BatchCount: int32(len(ops))}}
	for _, op := range ops {
		r.items++
		req.BatchItem = append(req.BatchItem, kmip.RequestBatchItem{
			Operation: op.Operation(), UniqueBatchItemID: fmt.Appendf(nil, "QLKC%d", r.items), RequestPayload: op,
		})
	}
	resp, err := l.Send(ctx, req)
	if err != nil {
		return nil, err
	}
	if resp.Header.ProtocolVersion != v && (len(resp.BatchItem) == 0 || resp.BatchItem[0].ResultStatus == kmip.ResultStatusSuccess) {
		return resp.BatchItem, &oddError{fmt.Sprintf("the answer to a message of KMIP %s is of KMIP %s", versionName(v), versionName(resp.Header.ProtocolVersion))}
	}
	if len(resp.BatchItem) != len(ops) {
		// A message that is refused as a whole has one item and no operation.
		if len(resp.BatchItem) == 1 && resp.BatchItem[0].ResultStatus != kmip.ResultStatusSuccess {
			return nil, resultError(resp.BatchItem[0])
		}
		return nil, &oddError{fmt.Sprintf("%d items in answer to %d", len(resp.BatchItem), len(ops))}
	}
	for i, item := range resp.BatchItem {
		if item.ResultStatus == kmip.ResultStatusSuccess && item.Operation != ops[i].Operation() {
			return nil, &oddError{fmt.Sprintf("item %d answers %s, not %s", i+1, ttlv.EnumStr(item.Operation), ttlv.EnumStr(ops[i].Operation()))}
		}
	}
	return resp.BatchItem, nil
}

// oddError is an answer that decodes and is not KMIP.
type oddError struct{ text string }

func (e *oddError) Error() string { return e.text }

// resultError is the failure that an item reports; nil if it reports none.
func resultError(item kmip.ResponseBatchItem) error {
	if item.ResultStatus == kmip.ResultStatusSuccess {
		return nil
	}
	return &kmipc.ResultError{Reason: item.ResultReason, Message: item.ResultMessage}
}

// ask sends one operation and returns its payload; a failure that the server
// reports is a *kmipc.ResultError.
func ask[Answer any](ctx context.Context, r *run, l *kmipc.Link, v kmip.ProtocolVersion, op kmip.OperationPayload) (*Answer, error) {
	items, err := r.send(ctx, l, v, op)
	if err != nil {
		return nil, err
	}
	if err := resultError(items[0]); err != nil {
		return nil, err
	}
	if items[0].ResponsePayload == nil {
		return new(Answer), nil // an empty list, of versions for one
	}
	p, ok := any(items[0].ResponsePayload).(*Answer)
	if !ok {
		return nil, &oddError{"the answer has another operation's payload"}
	}
	return p, nil
}

func isReason(err error, reasons ...kmip.ResultReason) bool {
	var r *kmipc.ResultError
	return errors.As(err, &r) && slices.Contains(reasons, r.Reason)
}

// describe words an error on one line, without the package's name.
func describe(err error) string {
	text := strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return ' '
		}
		return c
	}, strings.TrimPrefix(err.Error(), "kmipc: "))
	if len(text) > 300 {
		text = text[:300] + "…"
	}
	return text
}

func versionName(v kmip.ProtocolVersion) string {
	return fmt.Sprintf("%d.%d", v.ProtocolVersionMajor, v.ProtocolVersionMinor)
}

func thumbprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}
