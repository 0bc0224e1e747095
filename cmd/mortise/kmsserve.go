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
	"strings"
	"sync"
	"time"

	"mortise/internal/kms"
	"mortise/internal/kms/cluster"
	"mortise/internal/rootkey"
)

// openKeyring reads the file of root keys in a state folder, or makes an empty
// one, and opens it if the passphrase is at hand. A member that has peers can do
// without: they give it the keys.
func openKeyring(dir, passphraseFile string) (ring *rootkey.Keyring, open bool, err error) {
	path := filepath.Join(dir, kmsKeyring)
	pass, err := rootkey.FindPassphrase(rootkey.PassphraseSource{File: passphraseFile, Env: "MORTISE_PASSPHRASE_FILE", Credential: "kms-passphrase"}, os.Getenv)
	ring, missing := rootkey.LoadKeyring(path)
	if err != nil {
		if errors.Is(missing, fs.ErrNotExist) || !errors.Is(err, rootkey.ErrNoPassphrase) {
			return nil, false, fmt.Errorf("%w (--passphrase-file)", err)
		}
		return ring, false, missing
	}
	defer pass.Wipe()
	// Opening it takes 256 MiB (scrypt), which the runtime would keep.
	defer debug.FreeOSMemory()
	if errors.Is(missing, fs.ErrNotExist) {
		if ring, err = rootkey.CreateKeyring(path, rootkey.Passphrase(pass, 0)); err != nil {
			return nil, false, err
		}
	} else if missing != nil {
		return nil, false, missing
	}
	if err := ring.Unlock(rootkey.Passphrase(pass, 0)); err != nil {
		ring.Close()
		return nil, false, err
	}
	return ring, true, nil
}

// unlockKMS gives the KMS its root keys: from the keyring if it is open, from a
// peer what is missing there (S6). It tries until it has them, or ctx ends.
func unlockKMS(ctx context.Context, k *kms.KMS, n *cluster.Node, ring *rootkey.Keyring, open bool, log *slog.Logger) error {
	said := false
	for {
		var err error
		if open {
			if err = k.Unlock(ctx, ring); err == nil {
				break
			}
		}
		fetched := n.FetchKeys(ctx, ring)
		if fetched == nil {
			if err = k.Unlock(ctx, ring); err == nil {
				break
			}
		}
		if list, lerr := n.Members(ctx); open && lerr == nil && len(list) == 1 {
			return err // nobody else has what is missing
		}
		if !said {
			said = true
			log.Warn("kms is locked: it waits for root keys from a peer, or for its passphrase", "error", errors.Join(err, fetched))
		}
		select {
		case <-k.Unlocked(): // in another way
		case <-time.After(time.Second):
			continue
		case <-ctx.Done():
			return ctx.Err()
		}
		break
	}
	n.Unlocked(ring)
	return nil
}

// testClock is a clock that a test sets wrong through a file that holds a
// duration. Only state of 'mortise dev' takes it.
func testClock(path string) func() time.Time {
	var mu sync.Mutex
	var read time.Time
	var off time.Duration
	return func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		if now.Sub(read) > 100*time.Millisecond {
			read = now
			if text, err := os.ReadFile(path); err == nil {
				off, _ = time.ParseDuration(strings.TrimSpace(string(text)))
			}
		}
		return now.Add(off)
	}
}
