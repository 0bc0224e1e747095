// Package unlocking opens a key server's root keys: at its start with what the
// machine has (a TPM, a passphrase or PIN in a file), from a peer that is unlocked,
// or with what an administrator brings (design §5, S6). Until it has succeeded the
// key server is locked.
//
// Place in the flow: level 2, between the root-key providers and the KMS. cmd/mortise
// says what is at hand and calls [Open], [RootKeys.Await] and Close; the
// administration API calls the rest. It imports kms, rootkey, rootkey/pkcs11 and
// secret; the cluster and the TPM it knows by interfaces.
package unlocking

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"mortise/internal/kms"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/pkcs11"
	"mortise/internal/secret"
)

// Config says where root keys are and what opens them.
type Config struct {
	// Keyring is the file of root keys; it is made at the first start.
	Keyring string
	// Passphrase finds the keyring's passphrase; rootkey.ErrNoPassphrase if none
	// is at hand. The key that it returns is the caller's to wipe.
	Passphrase func() (*secret.Key, error)
	// TPM opens a keyring that is sealed by it, and with SealToTPM a new one is;
	// with a passphrase too, that is a second way in.
	TPM       rootkey.Sealing
	SealToTPM bool
	// Token keeps root keys beside or instead of the keyring; nil: there is none.
	Token Token
	// TokenName is the token's label, and PIN finds what opens it, like Passphrase.
	TokenName string
	PIN       func() (*secret.Key, error)
	Logger    *slog.Logger // nil: none

	workFactor int // of scrypt, for new passphrases; 0: the usual one
}

// A Token is a root-key provider that a PIN opens; *pkcs11.Token is one.
type Token interface {
	kms.Sharer
	// Unlock fails with pkcs11.ErrPIN if the PIN is wrong.
	Unlock(ctx context.Context, pin *secret.Key) error
	Close() error
}

// RootKeys are a key server's root-key providers, and how far each is open. The
// first makes the CRKs of new instances. Its methods may be called concurrently.
type RootKeys struct {
	cfg   Config
	log   *slog.Logger
	ring  *rootkey.Keyring // nil: there is none
	token Token            // nil: there is none

	mu      sync.Mutex
	open    map[string]bool // by kind
	changed chan struct{}
}

// Open reads the keyring, or makes it, and opens the providers as far as what opens
// them is at hand. What is wrong, such as a wrong passphrase, is an error; what is
// missing leaves a provider locked.
func Open(ctx context.Context, cfg Config) (_ *RootKeys, err error) {
	r := &RootKeys{cfg: cfg, log: cfg.Logger, token: cfg.Token, open: map[string]bool{}, changed: make(chan struct{}, 1)}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	if err := r.openToken(ctx); err != nil {
		return nil, err
	}
	if err := r.openRing(); err != nil {
		return nil, err
	}
	return r, nil
}

// Close closes the providers; after the KMS.
func (r *RootKeys) Close() {
	if r.ring != nil {
		r.ring.Close()
	}
	if r.token != nil {
		r.token.Close()
	}
}

func (r *RootKeys) openToken(ctx context.Context) error {
	if r.token == nil {
		return nil
	}
	pin, err := r.cfg.PIN()
	if errors.Is(err, rootkey.ErrNoPassphrase) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pin.Wipe()
	if err := r.token.Unlock(ctx, pin); err != nil {
		return err
	}
	r.open[pkcs11.Kind] = true
	return nil
}

func (r *RootKeys) openRing() error {
	// Opening it takes 256 MiB (scrypt), which the runtime would keep.
	defer debug.FreeOSMemory()
	ring, err := rootkey.LoadKeyring(r.cfg.Keyring)
	if errors.Is(err, fs.ErrNotExist) {
		return r.makeRing()
	}
	if err != nil {
		return err
	}
	r.ring = ring
	ways := ring.SealedBy()
	if r.cfg.TPM != nil && slices.Contains(ways, r.cfg.TPM.Method()) {
		err := ring.Unlock(r.cfg.TPM)
		if err == nil {
			r.open[rootkey.KindFile] = true
			return nil
		}
		r.log.Error("the TPM does not open the root keys", "file", r.cfg.Keyring, "error", err)
	}
	if !slices.Contains(ways, rootkey.SealedByPassphrase) {
		return nil
	}
	pass, err := r.cfg.Passphrase()
	if errors.Is(err, rootkey.ErrNoPassphrase) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pass.Wipe()
	if err := ring.Unlock(rootkey.Passphrase(pass, r.cfg.workFactor)); err != nil {
		return err
	}
	r.open[rootkey.KindFile] = true
	return nil
}

// makeRing makes the keyring at the first start. Where there is a token none need be.
func (r *RootKeys) makeRing() error {
	ring, err := NewKeyring(r.cfg)
	if errors.Is(err, rootkey.ErrNoPassphrase) && r.token != nil {
		return nil
	}
	if err != nil {
		return err
	}
	r.ring = ring
	r.open[rootkey.KindFile] = true
	return nil
}

// NewKeyring makes a keyring that is sealed as cfg says: by the TPM, the passphrase
// or both.
func NewKeyring(cfg Config) (*rootkey.Keyring, error) {
	var ways []rootkey.Sealing
	if cfg.SealToTPM {
		ways = append(ways, cfg.TPM)
	}
	pass, err := cfg.Passphrase()
	switch {
	case err == nil:
		defer pass.Wipe()
		ways = append(ways, rootkey.Passphrase(pass, cfg.workFactor))
	case !errors.Is(err, rootkey.ErrNoPassphrase) || !cfg.SealToTPM:
		return nil, err
	case cfg.Logger != nil:
		cfg.Logger.Warn("the root keys are sealed by the TPM alone: if it is lost, or a PCR changes, only a peer or a backup has them; a passphrase would be a second way in")
	}
	return rootkey.CreateKeyring(cfg.Keyring, ways...)
}

// providers are all that there are, the one for new CRKs first.
func (r *RootKeys) providers() (list []kms.Sharer) {
	if r.token != nil {
		list = append(list, r.token)
	}
	if r.ring != nil {
		list = append(list, r.ring)
	}
	return list
}

func (r *RootKeys) isOpen(kind string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.open[kind]
}

func (r *RootKeys) nowOpen(kind string) {
	r.mu.Lock()
	r.open[kind] = true
	r.mu.Unlock()
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// Status tells what there is and whether it is open.
func (r *RootKeys) Status() (list []kms.RootKeyStatus) {
	if r.token != nil {
		list = append(list, kms.RootKeyStatus{Provider: pkcs11.Kind, SealedBy: "PIN", Open: r.isOpen(pkcs11.Kind), Where: "token " + r.cfg.TokenName})
	}
	if r.ring != nil {
		list = append(list, kms.RootKeyStatus{Provider: rootkey.KindFile, SealedBy: strings.Join(r.ring.SealedBy(), " or "), Open: r.isOpen(rootkey.KindFile), Where: filepath.Base(r.cfg.Keyring)})
	}
	return list
}

// Unlock opens a provider with its passphrase or PIN. An empty kind means the token
// if that is locked, and otherwise the keyring. The error matches kms.ErrInvalid if
// the word is wrong or there is no such provider.
func (r *RootKeys) Unlock(ctx context.Context, kind string, with *secret.Key) error {
	var err error
	switch {
	case r.token != nil && (kind == pkcs11.Kind || kind == "" && (r.ring == nil || !r.isOpen(pkcs11.Kind))):
		kind, err = pkcs11.Kind, r.token.Unlock(ctx, with)
	case r.ring != nil && (kind == rootkey.KindFile || kind == ""):
		defer debug.FreeOSMemory()
		kind, err = rootkey.KindFile, r.ring.Unlock(rootkey.Passphrase(with, r.cfg.workFactor))
	default:
		return fmt.Errorf("%w: there is no root-key provider %q here", kms.ErrInvalid, kind)
	}
	if err != nil {
		r.log.Warn("root keys were not unlocked", "provider", kind, "error", err)
		return asInvalid(err)
	}
	r.log.Info("root keys are unlocked by an administrator", "provider", kind)
	r.nowOpen(kind)
	return nil
}

// ChangePassphrase seals the keyring anew, and by the TPM too if it was so before.
func (r *RootKeys) ChangePassphrase(_ context.Context, old, fresh *secret.Key) error {
	if r.ring == nil {
		return fmt.Errorf("%w: there is no keyring here", kms.ErrInvalid)
	}
	defer debug.FreeOSMemory()
	ways := []rootkey.Sealing{rootkey.Passphrase(fresh, r.cfg.workFactor)}
	if r.cfg.TPM != nil && slices.Contains(r.ring.SealedBy(), r.cfg.TPM.Method()) {
		ways = append(ways, r.cfg.TPM)
	}
	if err := r.ring.Reseal(rootkey.Passphrase(old, r.cfg.workFactor), ways...); err != nil {
		return asInvalid(err)
	}
	r.log.Info("the passphrase of the keyring is changed")
	return nil
}

// asInvalid marks what is the caller's to mend.
func asInvalid(err error) error {
	for _, e := range []error{rootkey.ErrWrongPassphrase, rootkey.ErrSealedOtherwise, pkcs11.ErrPIN} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", kms.ErrInvalid, err)
		}
	}
	return err
}
