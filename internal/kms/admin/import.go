package admin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"sync"
	"time"

	"mortise/internal/kmipc"
	"mortise/internal/kms"
	"mortise/internal/kms/migrate"
	"mortise/internal/pki"
)

// Migration in: /v1/instances/{instance}/import. The key server fetches the keys
// itself, so that none passes the caller.

func importRows() []row {
	r := stream(http.MethodPost, "/v1/instances/{instance}/import", kms.RoleAdministrator,
		"Bring the keys of another KMIP server into an instance: the answer is a stream of JSON lines", linesMedia, importKeys).onSocket()
	r.request = reflect.TypeFor[Import]()
	return []row{r}
}

const linesMedia = "application/x-ndjson"

// Import says where keys come from.
type Import struct {
	From       string `json:"from" doc:"kmip://HOST[:5696]"`
	Thumbprint string `json:"thumbprint,omitempty" doc:"SHA-256 of the source's certificate; this or ca is needed"`
	CA         string `json:"ca,omitempty" doc:"CA of the source's certificate, PEM"`
	// Certificate and Key are what the source knows us by.
	Certificate string `json:"certificate" doc:"client certificate, PEM"`
	Key         []byte `json:"key" doc:"its key, PEM, in base64"`
	DryRun      bool   `json:"dryRun,omitempty" doc:"only tell what would come"`
	Workers     int    `json:"workers,omitempty" doc:"connections to the source; 4 if it is missing, at most 32"`
}

// ImportLine is a line of the answer; one of its fields is set. The last line has
// the report, or what ended the import early.
type ImportLine struct {
	Object   *migrate.Item     `json:"object,omitempty"`
	Progress *migrate.Progress `json:"progress,omitempty"`
	Report   *migrate.Report   `json:"report,omitempty"`
	Error    string            `json:"error,omitempty"`
}

func importKeys(c *call, to io.Writer) error {
	var req Import
	if err := c.decode(&req); err != nil {
		return err
	}
	source, err := req.source()
	if err != nil {
		return fmt.Errorf("%w: %w", kms.ErrInvalid, err)
	}
	target, err := c.KMS.Arrivals(c, c.actor, c.path("instance"))
	if err != nil {
		return err
	}
	lines := &lineWriter{to: to, flush: http.NewResponseController(c.w).Flush}
	stop := lines.keepAlive()
	report, err := migrate.Run(c, migrate.Config{
		Source: source, Target: target, DryRun: req.DryRun, Workers: min(req.Workers, 32),
		Each:   func(i migrate.Item) { lines.put(ImportLine{Object: &i}) },
		Report: func(p migrate.Progress) { lines.put(ImportLine{Progress: &p}) },
	})
	stop()
	last := ImportLine{Report: report}
	if err != nil {
		if !lines.begun {
			return fmt.Errorf("%w: %w", kms.ErrInvalid, err)
		}
		last.Error = err.Error()
	}
	lines.put(last)
	return lines.err
}

// source wipes the key.
func (r *Import) source() (s kmipc.LinkConfig, err error) {
	defer clear(r.Key)
	if s.Address, err = kmipc.ParseAddress(r.From); err != nil {
		return s, err
	}
	chain, key, err := pki.ParseKeyPair([]byte(r.Certificate), r.Key)
	if err != nil {
		return s, fmt.Errorf("the client certificate: %w", err)
	}
	if s.Certificate, err = pki.TLSCertificate(chain, key); err != nil {
		return s, err
	}
	switch {
	case r.Thumbprint != "" && r.CA != "":
		return s, errors.New("the source is trusted by its thumbprint or by a CA, not by both")
	case r.Thumbprint != "":
		pin, err := pki.ParseThumbprint(r.Thumbprint)
		if err != nil {
			return s, err
		}
		s.Trust = kmipc.TrustPin(pin)
	case r.CA != "":
		cas, err := pki.ParseCertificates([]byte(r.CA))
		if err != nil {
			return s, err
		}
		s.Trust = kmipc.TrustCA(cas, s.Address)
	default: // refuses, and tells the thumbprint
		s.Trust = kmipc.TrustPin([32]byte{})
	}
	return s, nil
}

// lineWriter writes JSON lines as they come.
type lineWriter struct {
	mu    sync.Mutex
	to    io.Writer
	flush func() error
	begun bool
	err   error
}

func (l *lineWriter) put(line ImportLine) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	text, err := json.Marshal(line)
	if err == nil {
		_, err = l.to.Write(append(text, '\n'))
		l.begun = true
	}
	if err == nil {
		err = l.flush()
	}
	l.err = err
}

// keepAlive writes an empty line now and then: a caller that went away is
// noticed, and ends the import, also when the source is slow.
func (l *lineWriter) keepAlive() (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(15 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				l.put(ImportLine{})
			case <-done:
				return
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// Import brings keys, calling each with every line but the last, whose report it
// returns. A key server that is interrupted goes on with the next Import.
func (c *Client) Import(ctx context.Context, instance string, r Import, each func(ImportLine)) (*migrate.Report, error) {
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("admin: %w", err)
	}
	defer clear(body)
	answer, err := c.send(ctx, http.MethodPost, at("instances", instance, "import"), nil, bytes.NewReader(body), "application/json")
	if err != nil {
		return nil, err
	}
	defer answer.Close()
	lines := bufio.NewScanner(answer)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line ImportLine
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return nil, fmt.Errorf("admin: the answer of %s is not what this version expects: %w", c.where, err)
		}
		switch {
		case line.Error != "":
			return line.Report, fmt.Errorf("%s; what has arrived stays: run it again to go on", line.Error)
		case line.Report != nil:
			return line.Report, nil
		}
		each(line)
	}
	err = lines.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("admin: the import was cut off (%w); what has arrived stays: run it again to go on", err)
}
