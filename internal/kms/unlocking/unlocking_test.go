package unlocking

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mortise/internal/kms"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/pkcs11"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/secret"
	"mortise/internal/store"
)

func key(t testing.TB, word string) *secret.Key {
	t.Helper()
	k, err := secret.Copy([]byte(word))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

// says is where a passphrase or PIN is at hand, none where it is not.
func says(t testing.TB, word string) func() (*secret.Key, error) {
	return func() (*secret.Key, error) {
		if word == "" {
			return nil, rootkey.ErrNoPassphrase
		}
		return secret.Copy([]byte(word))
	}
}

// chip seals like a TPM: by a key that stays in it. One without is another
// machine's.
type chip struct{ key []byte }

func (c chip) Method() string { return "tpm" }
func (c chip) Seal(k *secret.Key) (sealed []byte, err error) {
	k.Use(func(b []byte) { sealed = c.xor(b) })
	return sealed, nil
}
func (c chip) Unseal(sealed []byte) (*secret.Key, error) {
	if c.key == nil {
		return nil, errors.New("this TPM did not seal it")
	}
	return secret.Take(c.xor(sealed))
}
func (c chip) xor(b []byte) []byte {
	out := bytes.Clone(b)
	for i := range out {
		out[i] ^= c.key[i%len(c.key)]
	}
	return out
}

// token is a keyring that a PIN opens.
type token struct {
	*rootkey.Keyring
	mu  sync.Mutex
	pin string
	in  bool
}

func (tok *token) Kind() string { return pkcs11.Kind }
func (tok *token) Unlock(_ context.Context, pin *secret.Key) (err error) {
	tok.mu.Lock()
	defer tok.mu.Unlock()
	pin.Use(func(b []byte) {
		if tok.in = string(b) == tok.pin; !tok.in {
			err = pkcs11.ErrPIN
		}
	})
	return err
}
func (tok *token) List(ctx context.Context) ([]string, error) {
	tok.mu.Lock()
	defer tok.mu.Unlock()
	if !tok.in {
		return nil, pkcs11.ErrLocked
	}
	return tok.Keyring.List(ctx)
}

func newToken(t testing.TB) *token {
	t.Helper()
	ring, err := rootkeytest.Keyring(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &token{Keyring: ring, pin: "1234"}
}

// TestOpen: what is at hand opens, what is missing leaves it locked, what is wrong
// is an error.
func TestOpen(t *testing.T) {
	mine := chip{[]byte("in the chip")}
	made := func(c Config) Config { // the keyring of an earlier start
		c.Keyring = filepath.Join(t.TempDir(), "crk.sealed")
		c.workFactor = 2
		ring, err := NewKeyring(c)
		if err != nil {
			t.Fatal(err)
		}
		ring.Close()
		return c
	}
	passphrase := Config{Passphrase: says(t, "right"), TPM: mine}
	sealed := Config{Passphrase: says(t, ""), TPM: mine, SealToTPM: true}
	both := Config{Passphrase: says(t, "right"), TPM: mine, SealToTPM: true}
	for name, c := range map[string]struct {
		before *Config // nil: the first start
		now    Config
		sealed string // by what the keyring is; "" for no keyring
		open   []string
		err    error
	}{
		"first start, passphrase":           {nil, passphrase, "passphrase", []string{"file"}, nil},
		"first start, TPM":                  {nil, sealed, "tpm", []string{"file"}, nil},
		"first start, both":                 {nil, both, "tpm or passphrase", []string{"file"}, nil},
		"first start, nothing":              {nil, Config{Passphrase: says(t, ""), TPM: mine}, "", nil, rootkey.ErrNoPassphrase},
		"first start, token":                {nil, Config{Passphrase: says(t, ""), Token: newToken(t), PIN: says(t, "1234")}, "", []string{"pkcs11"}, nil},
		"first start, token and passphrase": {nil, Config{Passphrase: says(t, "right"), Token: newToken(t), PIN: says(t, "1234")}, "passphrase", []string{"file", "pkcs11"}, nil},
		"wrong passphrase":                  {&passphrase, Config{Passphrase: says(t, "wrong"), TPM: mine}, "", nil, rootkey.ErrWrongPassphrase},
		"no passphrase":                     {&passphrase, Config{Passphrase: says(t, ""), TPM: mine}, "passphrase", nil, nil},
		"its TPM":                           {&sealed, Config{Passphrase: says(t, ""), TPM: mine}, "tpm", []string{"file"}, nil},
		"another TPM":                       {&sealed, Config{Passphrase: says(t, ""), TPM: chip{}}, "tpm", nil, nil},
		"another TPM, and the passphrase":   {&both, Config{Passphrase: says(t, "right"), TPM: chip{}}, "tpm or passphrase", []string{"file"}, nil},
		"wrong PIN":                         {nil, Config{Passphrase: says(t, ""), Token: newToken(t), PIN: says(t, "4321")}, "", nil, pkcs11.ErrPIN},
		"no PIN":                            {nil, Config{Passphrase: says(t, ""), Token: newToken(t), PIN: says(t, "")}, "", nil, nil},
		"a passphrase that cannot be read":  {&passphrase, Config{Passphrase: func() (*secret.Key, error) { return nil, os.ErrPermission }, TPM: mine}, "", nil, os.ErrPermission},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := c.now
			cfg.workFactor, cfg.Keyring = 2, filepath.Join(t.TempDir(), "crk.sealed")
			if c.before != nil {
				cfg.Keyring = made(*c.before).Keyring
			}
			r, err := Open(t.Context(), cfg)
			if !errors.Is(err, c.err) || (err == nil) != (c.err == nil) {
				t.Fatalf("%v, want %v", err, c.err)
			}
			if err != nil {
				return
			}
			defer r.Close()
			var open []string
			by := ""
			for _, s := range r.Status() {
				if s.Open {
					open = append(open, s.Provider)
				}
				if s.Provider == "file" {
					by = s.SealedBy
				}
			}
			slices.Sort(open)
			if !slices.Equal(open, c.open) || by != c.sealed {
				t.Errorf("open: %v, sealed by %q; want %v and %q", open, by, c.open, c.sealed)
			}
		})
	}
}

// peers has what another member would hand over.
type peers struct {
	mu    sync.Mutex
	has   *rootkey.Keyring // nil: nobody is unlocked
	alone bool
	asked int
	told  []kms.RootKeys
}

func (p *peers) FetchKeys(ctx context.Context, to kms.Sharer, ids ...string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked++
	if p.has == nil {
		return errors.New("no member is unlocked")
	}
	if len(ids) == 0 {
		ids, _ = p.has.List(ctx)
	}
	share, err := p.has.Share(ctx, ids)
	if err != nil {
		return err
	}
	defer share.Wipe()
	return to.Adopt(ctx, share)
}
func (p *peers) Alone(context.Context) bool { return p.alone }
func (p *peers) Unlocked(k ...kms.RootKeys) { p.mu.Lock(); defer p.mu.Unlock(); p.told = k }
func (p *peers) unlock(ring *rootkey.Keyring) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.has = ring
}

// server is a real KMS on a store, that can be started again.
func server(t *testing.T, dir string) (*kms.KMS, func()) {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "store"), Name: "kms-1"})
	if err != nil {
		t.Fatal(err)
	}
	k, err := kms.Open(t.Context(), s, kms.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return k, func() { k.Close(); s.Close() }
}

// TestAwait follows a member through its starts: the first, one without anything
// at hand that an administrator or a peer ends, and one whose keys are lost.
func TestAwait(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "crk.sealed")
	cfg := Config{Keyring: path, Passphrase: says(t, "right"), workFactor: 2}
	begin := func(cfg Config, p *peers) (k *kms.KMS, r *RootKeys, ended chan error, stop func()) {
		t.Helper()
		k, closeKMS := server(t, dir)
		r, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended = make(chan error, 1)
		go func() { ended <- r.Await(ctx, k, p) }()
		return k, r, ended, func() { cancel(); closeKMS(); r.Close() }
	}
	await := func(ended chan error) error {
		t.Helper()
		select {
		case err := <-ended:
			return err
		case <-time.After(20 * time.Second):
			t.Fatal("it does not end")
			return nil
		}
	}
	waits := func(ended chan error, k *kms.KMS) {
		t.Helper()
		select {
		case err := <-ended:
			t.Fatalf("it did not wait: %v", err)
		case <-k.Unlocked():
			t.Fatal("it is unlocked")
		case <-time.After(300 * time.Millisecond):
		}
	}

	p := &peers{alone: true}
	k, _, ended, stop := begin(cfg, p)
	if err := await(ended); err != nil || len(p.told) != 1 || p.asked != 0 {
		t.Fatalf("the first start: %v, told %d, asked %d", err, len(p.told), p.asked)
	}
	<-k.Unlocked()
	stop()

	// Nothing is at hand: an administrator types it, wrongly first.
	cfg.Passphrase = says(t, "")
	k, r, ended, stop := begin(cfg, &peers{alone: true})
	waits(ended, k)
	for kind, word := range map[string]string{"": "wrong", "file": "wrong", "pkcs11": "right"} {
		if err := r.Unlock(t.Context(), kind, key(t, word)); !errors.Is(err, kms.ErrInvalid) {
			t.Errorf("unlocking %q with %q: %v", kind, word, err)
		}
	}
	waits(ended, k)
	if err := r.Unlock(t.Context(), "", key(t, "right")); err != nil {
		t.Fatal(err)
	}
	if err := await(ended); err != nil {
		t.Fatal(err)
	}
	if err := r.ChangePassphrase(t.Context(), key(t, "wrong"), key(t, "new")); !errors.Is(err, kms.ErrInvalid) {
		t.Errorf("a wrong passphrase changed it: %v", err)
	}
	if err := r.ChangePassphrase(t.Context(), key(t, "right"), key(t, "new")); err != nil {
		t.Fatal(err)
	}
	stop()

	// A peer has the keys, after a while.
	whole, err := rootkey.LoadKeyring(path)
	if err == nil {
		err = whole.Unlock(rootkey.Passphrase(key(t, "new"), 2))
	}
	if err != nil {
		t.Fatal(err)
	}
	defer whole.Close()
	p = &peers{}
	k, r, ended, stop = begin(cfg, p)
	waits(ended, k)
	p.unlock(whole)
	if err := await(ended); err != nil {
		t.Fatal(err)
	}
	if s := r.Status(); !s[0].Open {
		t.Errorf("unlocked by a peer: %+v", s)
	}
	<-k.Unlocked()
	stop()

	// The keyring is another one: its passphrase is right, and opens nothing.
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	cfg.Passphrase = says(t, "another")
	_, _, ended, stop = begin(cfg, &peers{alone: true})
	if err := await(ended); err == nil {
		t.Error("another keyring unlocked it")
	}
	stop()
	// With peers it waits, and says what is missing when they have not got it either.
	strange, err := rootkeytest.Keyring(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer strange.Close()
	p = &peers{has: strange}
	k, r, ended, stop = begin(cfg, p)
	defer stop()
	waits(ended, k)
	if err := r.try(t.Context(), k, p); err == nil || !strings.Contains(err.Error(), "on no unlocked member") {
		t.Errorf("what is nowhere: %v", err)
	}
}
