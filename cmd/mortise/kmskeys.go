package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/kms/cluster"
	"mortise/internal/rootkey"
	"mortise/internal/rootkey/pkcs11"
	"mortise/internal/secret"
	"mortise/internal/tpm"
)

// rootKeysConfig says where root keys are and what opens them.
type rootKeysConfig struct {
	PassphraseFile string `toml:"passphrase_file"`
	TPM            bool   `toml:"tpm"`
	TPMDevice      string `toml:"tpm_device"`
	TPMPCRs        []uint `toml:"tpm_pcrs"`
	PKCS11Module   string `toml:"pkcs11_module"`
	PKCS11Token    string `toml:"pkcs11_token"`
	PKCS11PINFile  string `toml:"pkcs11_pin_file"`
	PKCS11Helper   string `toml:"pkcs11_helper"`
}

// rootKeys are a key server's providers of root keys, and how each is opened: at
// the start, by an administrator, or by a peer (design §5). The first makes the
// CRKs of new instances.
type rootKeys struct {
	cfg   rootKeysConfig
	log   *slog.Logger
	ring  *rootkey.Keyring // nil: there is none
	token *pkcs11.Token    // nil: there is none

	mu      sync.Mutex
	open    map[string]bool // by kind
	changed chan struct{}
}

// openRootKeys reads the keyring in a state folder, or makes it, and opens the
// providers as far as what opens them is at hand. What is wrong, such as a wrong
// passphrase, is an error; what is missing leaves a provider locked.
func openRootKeys(ctx context.Context, dir string, cfg rootKeysConfig, log *slog.Logger) (_ *rootKeys, err error) {
	r := &rootKeys{cfg: cfg, log: log, open: map[string]bool{}, changed: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if err := r.openToken(ctx); err != nil {
		return nil, err
	}
	if err := r.openRing(filepath.Join(dir, kmsKeyring)); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *rootKeys) passphrase() (*secret.Key, error) {
	p, err := rootkey.FindPassphrase(rootkey.PassphraseSource{File: r.cfg.PassphraseFile, Env: "MORTISE_PASSPHRASE_FILE", Credential: "kms-passphrase"}, os.Getenv)
	if err != nil {
		return nil, fmt.Errorf("%w (--passphrase-file)", err)
	}
	return p, nil
}

func (r *rootKeys) sealer() tpm.Sealer {
	return tpm.Sealer{Device: r.cfg.TPMDevice, PCRs: r.cfg.TPMPCRs}
}

func (r *rootKeys) openRing(path string) error {
	// Opening it takes 256 MiB (scrypt), which the runtime would keep.
	defer debug.FreeOSMemory()
	ring, err := rootkey.LoadKeyring(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r.makeRing(path)
	}
	if err != nil {
		return err
	}
	r.ring = ring
	ways := ring.SealedBy()
	if slices.Contains(ways, tpm.Sealer{}.Method()) {
		err := ring.Unlock(r.sealer())
		if err == nil {
			r.open[rootkey.KindFile] = true
			return nil
		}
		r.log.Error("the TPM does not open the root keys", "file", path, "error", err)
	}
	if !slices.Contains(ways, rootkey.SealedByPassphrase) {
		return nil
	}
	pass, err := r.passphrase()
	if errors.Is(err, rootkey.ErrNoPassphrase) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pass.Wipe()
	if err := ring.Unlock(rootkey.Passphrase(pass, 0)); err != nil {
		return err
	}
	r.open[rootkey.KindFile] = true
	return nil
}

// makeRing makes the keyring at the first start.
func (r *rootKeys) makeRing(path string) error {
	var ways []rootkey.Sealing
	if r.cfg.TPM {
		ways = append(ways, r.sealer())
	}
	pass, err := r.passphrase()
	switch {
	case err == nil:
		defer pass.Wipe()
		ways = append(ways, rootkey.Passphrase(pass, 0))
	case !errors.Is(err, rootkey.ErrNoPassphrase):
		return err
	case r.cfg.TPM:
		r.log.Warn("the root keys are sealed by the TPM alone: if it is lost, or a PCR changes, only a peer or a backup has them; a passphrase would be a second way in")
	case r.token != nil:
		return nil // no keyring is wanted
	default:
		return err
	}
	if r.ring, err = rootkey.CreateKeyring(path, ways...); err != nil {
		return err
	}
	r.open[rootkey.KindFile] = true
	return nil
}

func (r *rootKeys) openToken(ctx context.Context) error {
	if r.cfg.PKCS11Module == "" {
		return nil
	}
	helper := r.cfg.PKCS11Helper
	if helper == "" {
		own, err := os.Executable()
		if err != nil {
			return fmt.Errorf("finding mortise-pkcs11: %w", err)
		}
		helper = filepath.Join(filepath.Dir(own), "mortise-pkcs11")
	}
	if _, err := os.Stat(helper); err != nil {
		return fmt.Errorf("the helper for PKCS#11 tokens (--pkcs11-helper): %w", err)
	}
	r.token = pkcs11.New(pkcs11.Config{Helper: helper, Module: r.cfg.PKCS11Module, Label: r.cfg.PKCS11Token, Logger: r.log})
	pin, err := rootkey.FindPassphrase(rootkey.PassphraseSource{File: r.cfg.PKCS11PINFile, Env: "MORTISE_PKCS11_PIN_FILE", Credential: "kms-pkcs11-pin"}, os.Getenv)
	if errors.Is(err, rootkey.ErrNoPassphrase) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w (--pkcs11-pin-file)", err)
	}
	defer pin.Wipe()
	if err := r.token.Unlock(ctx, pin); err != nil {
		return err
	}
	r.open[pkcs11.Kind] = true
	return nil
}

func (r *rootKeys) close() {
	if r.ring != nil {
		r.ring.Close()
	}
	if r.token != nil {
		r.token.Close()
	}
}

// providers are all that there are, the one for new CRKs first.
func (r *rootKeys) providers() (list []kms.Sharer) {
	if r.token != nil {
		list = append(list, r.token)
	}
	if r.ring != nil {
		list = append(list, r.ring)
	}
	return list
}

func (r *rootKeys) isOpen(kind string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.open[kind]
}

func (r *rootKeys) nowOpen(kind string) {
	r.mu.Lock()
	r.open[kind] = true
	r.mu.Unlock()
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// Status, Unlock and ChangePassphrase are for the administration API.
func (r *rootKeys) Status() (list []admin.RootKeyStatus) {
	if r.token != nil {
		list = append(list, admin.RootKeyStatus{Provider: pkcs11.Kind, SealedBy: "PIN", Open: r.isOpen(pkcs11.Kind), Where: "token " + r.cfg.PKCS11Token})
	}
	if r.ring != nil {
		list = append(list, admin.RootKeyStatus{Provider: rootkey.KindFile, SealedBy: strings.Join(r.ring.SealedBy(), " or "), Open: r.isOpen(rootkey.KindFile), Where: kmsKeyring})
	}
	return list
}

func (r *rootKeys) Unlock(ctx context.Context, kind string, with *secret.Key) error {
	var err error
	switch {
	case r.token != nil && (kind == pkcs11.Kind || kind == "" && !r.isOpen(pkcs11.Kind)):
		kind, err = pkcs11.Kind, r.token.Unlock(ctx, with)
	case r.ring != nil && (kind == rootkey.KindFile || kind == ""):
		defer debug.FreeOSMemory()
		kind, err = rootkey.KindFile, r.ring.Unlock(rootkey.Passphrase(with, 0))
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

func (r *rootKeys) ChangePassphrase(_ context.Context, old, fresh *secret.Key) error {
	if r.ring == nil {
		return fmt.Errorf("%w: there is no keyring here", kms.ErrInvalid)
	}
	defer debug.FreeOSMemory()
	ways := []rootkey.Sealing{rootkey.Passphrase(fresh, 0)}
	if slices.Contains(r.ring.SealedBy(), tpm.Sealer{}.Method()) {
		ways = append(ways, r.sealer())
	}
	if err := r.ring.Reseal(rootkey.Passphrase(old, 0), ways...); err != nil {
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

// unlock gives the KMS its root keys: from providers that are open, and from a
// peer what is missing there (S6). It tries until it has them, or ctx ends.
func (r *rootKeys) unlock(ctx context.Context, k *kms.KMS, n *cluster.Node) error {
	for said := false; ; {
		// Asked first: what is opened during an attempt is for the next one.
		locked := slices.ContainsFunc(r.providers(), func(p kms.Sharer) bool { return !r.isOpen(p.Kind()) })
		err := r.tryUnlock(ctx, k, n)
		if err == nil {
			var keys []kms.RootKeys
			for _, p := range r.providers() {
				keys = append(keys, p)
			}
			n.Unlocked(keys...)
			return nil
		}
		if list, lerr := n.Members(ctx); !locked && lerr == nil && len(list) == 1 {
			return err // nobody else has what is missing
		}
		if !said {
			said = true
			r.log.Warn("kms is locked: it waits for root keys from a peer, or for mortise kms unlock", "error", err)
		}
		select {
		case <-r.changed:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (r *rootKeys) tryUnlock(ctx context.Context, k *kms.KMS, n *cluster.Node) error {
	fresh, err := k.New(ctx)
	if err != nil {
		return err
	}
	var keys []kms.RootKeys
	for _, p := range r.providers() {
		if err := r.complete(ctx, k, n, p); err != nil {
			return err
		}
		if !r.isOpen(p.Kind()) && fresh {
			return fmt.Errorf("the first start needs what opens the %s root keys", p.Kind())
		}
		keys = append(keys, p)
	}
	return k.Unlock(ctx, keys...)
}

// complete gets from peers what a provider lacks of the CRKs that it should have.
func (r *rootKeys) complete(ctx context.Context, k *kms.KMS, n *cluster.Node, p kms.Sharer) error {
	missing := func() ([]string, error) {
		need, err := k.NeededCRKs(ctx, p.Kind())
		if err != nil {
			return nil, err
		}
		have, err := p.List(ctx)
		if errors.Is(err, pkcs11.ErrLocked) {
			return need, nil
		}
		return slices.DeleteFunc(need, func(id string) bool { return slices.Contains(have, id) }), err
	}
	need, err := missing()
	if err != nil || len(need) == 0 && r.isOpen(p.Kind()) {
		return err
	}
	for chunk := range slices.Chunk(need, rootkey.MaxShare) {
		if err := n.FetchKeys(ctx, p, chunk...); err != nil {
			return err
		}
	}
	if err := n.FetchKeys(ctx, p); err != nil && len(need) == 0 { // what is not an instance's
		return err
	}
	if need, err = missing(); err == nil && len(need) > 0 {
		err = fmt.Errorf("%d root keys of kind %s are on no unlocked member, %s among them", len(need), p.Kind(), need[0])
	}
	return err
}
