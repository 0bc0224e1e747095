// Package pkcs11 keeps a KMS's CRKs in a PKCS#11 token: a hardware security
// module, or SoftHSM (S4). The keys are made in the token, marked sensitive and
// not extractable, and never leave it; the token wraps and unwraps with
// CKM_AES_GCM.
//
// A token's vendor supplies a shared library. It runs in a process of its own,
// mortise-pkcs11, so that neither its faults nor its threads are the KMS's: a
// helper that dies or does not answer is replaced.
//
// Place in the flow: level 1. kms uses a [Token] through an interface that it
// declares; cmd/mortise-pkcs11 serves a [Device] with [Serve]. It imports secret
// only.
package pkcs11

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"mortise/internal/secret"
)

// Kind is the Kind of a Token.
const Kind = "pkcs11"

// Sizes in bytes.
const (
	idLen  = 16
	keyLen = 32
)

// A blob is version 1 (1 byte) ‖ key id (16) ‖ nonce, ciphertext and tag as the
// token gives them. Additional data: blobLabel ‖ version ‖ key id ‖ the caller's.
const (
	blobVersion = 1
	blobLabel   = "mortise pkcs11 wrap v1\x00"
)

var (
	// ErrLocked: nobody has given the PIN yet.
	ErrLocked = errors.New("the token waits for its PIN")
	// ErrHelper: the helper could not be started, died or did not answer. The
	// call may be made again.
	ErrHelper = errors.New("the PKCS#11 helper does not serve")
	// ErrToken: the token answered with an error.
	ErrToken = errors.New("the token reports an error")
)

// Config says where a token is.
type Config struct {
	Helper string // path of mortise-pkcs11
	Module string // path of the vendor's shared library
	Label  string // of the token; empty means the only one there is
	// Timeout is how long one call may take; 0 means 10 seconds.
	Timeout time.Duration
	Logger  *slog.Logger // nil: none
}

// A Token is a root-key provider of kind "pkcs11". Its methods may be called
// concurrently; the token does one thing at a time.
type Token struct {
	cfg Config
	log *slog.Logger

	turn chan struct{} // holds one element while a call runs
	// What follows is for who has the turn.
	helper   *helper
	failures int       // in a row
	retry    time.Time // no new helper before
	last     error     // why

	mu     sync.Mutex
	pin    *secret.Key // one that the token has taken; nil while locked
	closed bool
}

// New returns the token, locked. It starts no process yet.
func New(cfg Config) *Token {
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	log := cfg.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Token{cfg: cfg, log: log, turn: make(chan struct{}, 1)}
}

// Kind is "pkcs11".
func (t *Token) Kind() string { return Kind }

// Unlock gives the token its PIN and keeps a copy for the helper's restarts. A
// PIN that is refused (ErrPIN) is not tried again: tokens count, and lock
// themselves.
func (t *Token) Unlock(ctx context.Context, pin *secret.Key) error {
	if err := t.take(ctx); err != nil {
		return err
	}
	defer func() { <-t.turn }()
	if t.helper != nil {
		t.helper.stop()
		t.helper = nil
	}
	c, err := pin.Clone()
	if err != nil {
		return err
	}
	t.retry = time.Time{} // a person waits
	if err := t.start(c); err != nil {
		c.Wipe()
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pin.Wipe()
	t.pin = c
	return nil
}

// Create makes a key in the token, of an id of 32 hexadecimal digits that no other
// key has or had.
func (t *Token) Create(ctx context.Context, id string) error {
	raw, err := parseID(id)
	if err != nil {
		return err
	}
	if _, err = t.call(ctx, message{opCreate, [][]byte{raw}}, 0); err != nil {
		return fmt.Errorf("pkcs11: making root key %s: %w", id, err)
	}
	return nil
}

// Import puts a key of 32 bytes into the token. Some tokens refuse keys that
// they have not made.
func (t *Token) Import(ctx context.Context, id string, key *secret.Key) error {
	if key.Len() != keyLen {
		return fmt.Errorf("pkcs11: a root key has %d bytes (AES-256), this one has %d", keyLen, key.Len())
	}
	raw, err := parseID(id)
	if err != nil {
		return err
	}
	key.Use(func(b []byte) { _, err = t.call(ctx, message{opImport, [][]byte{raw, b}}, 0) })
	if err != nil {
		return fmt.Errorf("pkcs11: importing root key %s: %w", id, err)
	}
	return nil
}

// Seal wraps a key under the CRK called id, bound to additional data.
func (t *Token) Seal(ctx context.Context, id string, key *secret.Key, additional []byte) ([]byte, error) {
	raw, err := parseID(id)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	key.Use(func(b []byte) {
		out, err = t.call(ctx, message{opEncrypt, [][]byte{raw, b, binding(raw, additional)}}, 1)
	})
	if err != nil {
		return nil, fmt.Errorf("pkcs11: wrapping with root key %s: %w", id, err)
	}
	return slices.Concat([]byte{blobVersion}, raw, out[0]), nil
}

// Open unwraps what Seal made. Its errors match ErrUnknownKey, ErrBlob,
// ErrLocked, ErrHelper or ErrToken.
func (t *Token) Open(ctx context.Context, id string, wrapped, additional []byte) (*secret.Key, error) {
	raw, err := parseID(id)
	if err != nil {
		return nil, err
	}
	if len(wrapped) < 1+idLen || wrapped[0] != blobVersion || !bytes.Equal(wrapped[1:1+idLen], raw) {
		return nil, fmt.Errorf("pkcs11: %w: it is not a blob of root key %s", ErrBlob, id)
	}
	out, err := t.call(ctx, message{opDecrypt, [][]byte{raw, wrapped[1+idLen:], binding(raw, additional)}}, 1)
	if err != nil {
		return nil, fmt.Errorf("pkcs11: unwrapping with root key %s: %w", id, err)
	}
	return secret.Take(out[0])
}

// Destroy removes the key from the token for ever.
func (t *Token) Destroy(ctx context.Context, id string) error {
	raw, err := parseID(id)
	if err != nil {
		return nil // no such key can be there
	}
	if _, err = t.call(ctx, message{opDestroy, [][]byte{raw}}, 0); err != nil {
		return fmt.Errorf("pkcs11: destroying root key %s: %w", id, err)
	}
	return nil
}

// List returns the ids of Mortise's keys in the token.
func (t *Token) List(ctx context.Context) ([]string, error) {
	out, err := t.call(ctx, message{code: opList}, -1)
	if err != nil {
		return nil, fmt.Errorf("pkcs11: listing root keys: %w", err)
	}
	ids := make([]string, 0, len(out))
	for _, raw := range out {
		if len(raw) == idLen {
			ids = append(ids, hex.EncodeToString(raw))
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// Share returns the PIN: members share one token. It is for an authenticated,
// encrypted channel only.
func (t *Token) Share(context.Context, []string) (*secret.Key, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pin == nil {
		return nil, fmt.Errorf("pkcs11: %w", ErrLocked)
	}
	return t.pin.Clone()
}

// Adopt is Unlock with what a peer shares. On an open token it does nothing.
func (t *Token) Adopt(ctx context.Context, share *secret.Key) error {
	t.mu.Lock()
	open := t.pin != nil
	t.mu.Unlock()
	if open {
		return nil
	}
	return t.Unlock(ctx, share)
}

// Close ends the helper and wipes the PIN.
func (t *Token) Close() error {
	t.turn <- struct{}{}
	defer func() { <-t.turn }()
	if t.helper != nil {
		t.helper.stop()
		t.helper = nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pin.Wipe()
	t.pin, t.closed = nil, true
	return nil
}

func (t *Token) take(ctx context.Context) error {
	select {
	case t.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("pkcs11: waiting for the token: %w", ctx.Err())
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		<-t.turn
		return errors.New("pkcs11: the token is closed")
	}
	return nil
}

// call makes one request, which ctx does not interrupt: it ends by the timeout.
// It returns the answer's fields: exactly want, or any number if
// that is negative.
func (t *Token) call(ctx context.Context, m message, want int) ([][]byte, error) {
	if err := t.take(ctx); err != nil {
		return nil, err
	}
	defer func() { <-t.turn }()
	if t.helper != nil && t.helper.ended() { // between two calls
		t.log.Warn("pkcs11: the helper ended; it is started again", "error", t.helper.why())
		t.helper.stop()
		t.helper = nil
	}
	if t.helper == nil {
		t.mu.Lock()
		pin := t.pin
		t.mu.Unlock()
		if pin == nil {
			return nil, ErrLocked
		}
		if err := t.start(pin); err != nil {
			return nil, err
		}
	}
	return t.ask(m, want)
}

// ask makes a request of the running helper. One that fails it otherwise than
// by an answer is ended; so is one whose token reports an error that is not
// about the request, because a new session mends most of those.
func (t *Token) ask(m message, want int) ([][]byte, error) {
	got, err := t.helper.exchange(t.cfg.Timeout, m)
	if err == nil && got.code == statusOK && want >= 0 && len(got.fields) != want {
		err = fmt.Errorf("%w: it answers %d fields, not %d", errMessage, len(got.fields), want)
	}
	if err != nil {
		t.fail(err)
		return nil, fmt.Errorf("%w: %w", ErrHelper, err)
	}
	if got.code == statusOK {
		t.failures, t.last = 0, nil
		return got.fields, nil
	}
	text := "no reason given"
	if len(got.fields) > 0 {
		text = fmt.Sprintf("%.1000q", got.fields[0])
	}
	switch got.code {
	case statusUnknown:
		return nil, ErrUnknownKey
	case statusExists:
		return nil, ErrKeyExists
	case statusBlob:
		return nil, fmt.Errorf("%w (%s)", ErrBlob, text)
	case statusPIN:
		return nil, fmt.Errorf("%w (%s)", ErrPIN, text)
	case statusRequest:
		return nil, fmt.Errorf("%w: %s", ErrHelper, text)
	}
	err = fmt.Errorf("%w: %s", ErrToken, text)
	t.fail(err)
	return nil, err
}

// fail ends the helper and says when the next may start.
func (t *Token) fail(err error) {
	t.helper.stop()
	t.helper = nil
	t.failures++
	wait := min(100*time.Millisecond<<min(t.failures-1, 10), 30*time.Second)
	t.retry, t.last = time.Now().Add(wait), err
	t.log.Error("pkcs11: the helper is ended", "error", err, "next_start_in", wait)
}

// start starts a helper and logs in.
func (t *Token) start(pin *secret.Key) error {
	if wait := time.Until(t.retry); wait > 0 {
		return fmt.Errorf("pkcs11: %w: it is started again in %s; it failed before: %w", ErrHelper, wait.Round(time.Millisecond), t.last)
	}
	h, err := startHelper(t.cfg, t.log)
	if err != nil {
		return fmt.Errorf("pkcs11: %w: starting %s: %w", ErrHelper, t.cfg.Helper, err)
	}
	t.helper = h
	hello, err := t.ask(message{opHello, [][]byte{[]byte(protocolVersion)}}, 2)
	if err == nil {
		pin.Use(func(b []byte) { _, err = t.ask(message{opLogin, [][]byte{b}}, 0) })
	}
	if err != nil {
		if t.helper != nil {
			t.helper.stop()
			t.helper = nil
		}
		return fmt.Errorf("pkcs11: opening the token: %w", err)
	}
	t.log.Info("pkcs11: the token is open", "token", string(hello[1]))
	return nil
}

func parseID(id string) ([]byte, error) {
	raw, err := hex.DecodeString(id)
	if err != nil || len(raw) != idLen {
		return nil, fmt.Errorf("pkcs11: %.40q: %w: an id has 32 hexadecimal digits", id, ErrUnknownKey)
	}
	return raw, nil
}

func binding(id, additional []byte) []byte {
	return slices.Concat([]byte(blobLabel), []byte{blobVersion}, id, additional)
}
