package pki

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"time"
)

// followEvery is how often files are looked at.
const followEvery = 10 * time.Second

// Follow keeps c as the files are that [LoadCredentials] read it from, until ctx
// ends: it looks at them every few seconds, and when reload says so. New
// handshakes use the new certificate; open connections go on with the old one.
// A chain and a key that do not belong together, as in the moment between the
// writing of one and of the other, are logged, and the old ones stay. After each
// replacement it calls replaced.
func (c *Credentials) Follow(ctx context.Context, certPath, keyPath string, reload <-chan os.Signal, log *slog.Logger, replaced func()) {
	c.follow(ctx, certPath, keyPath, reload, log, replaced, followEvery)
}

func (c *Credentials) follow(ctx context.Context, certPath, keyPath string, reload <-chan os.Signal, log *slog.Logger, replaced func(), every time.Duration) {
	look := time.NewTicker(every)
	defer look.Stop()
	var refused string // what was logged of files that are no good
	for {
		asked := false
		select {
		case <-ctx.Done():
			return
		case <-reload:
			asked = true
		case <-look.C:
		}
		old := Thumbprint(c.Leaf())
		changed, err := c.reload(certPath, keyPath)
		switch {
		case err != nil:
			if text := err.Error(); asked || text != refused {
				refused = text
				log.Error("the certificate's files are no good; the old certificate stays", "certificate", certPath, "key", keyPath, "error", err)
			}
			continue
		case changed:
			leaf := c.Leaf()
			log.Info("certificate replaced", "certificate", certPath, "was", old, "thumbprint", Thumbprint(leaf), "expires", leaf.NotAfter)
			replaced()
		case asked:
			log.Info("certificate unchanged", "certificate", certPath, "thumbprint", old, "expires", c.Leaf().NotAfter)
		}
		refused = ""
	}
}

// reload reads the files again; changed tells whether they hold another chain.
func (c *Credentials) reload(certPath, keyPath string) (changed bool, err error) {
	chain, key, err := LoadKeyPair(certPath, keyPath)
	if err != nil {
		return false, err
	}
	fresh, err := TLSCertificate(chain, key)
	if err != nil {
		return false, err
	}
	now := c.current.Load()
	same := len(fresh.Certificate) == len(now.Certificate)
	for i := 0; same && i < len(fresh.Certificate); i++ {
		same = bytes.Equal(fresh.Certificate[i], now.Certificate[i])
	}
	if same {
		return false, nil
	}
	c.current.Store(&fresh)
	return true, nil
}
