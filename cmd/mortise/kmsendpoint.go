package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// addressesForClients are by what clients reach this member: what the
// administrator says, or else the address that it listens at, or the machine's
// own name.
func addressesForClients(cfg kmsConfig) (list []kms.Address, err error) {
	for _, text := range cfg.Advertise {
		a, err := kms.ParseAddress(text)
		if err != nil {
			return nil, fmt.Errorf("--advertise: %w", err)
		}
		list = append(list, a)
	}
	if len(list) > 0 {
		return list, nil
	}
	host, _, err := net.SplitHostPort(cfg.Listen)
	if ip := net.ParseIP(host); err == nil && host != "" && (ip == nil || !ip.IsUnspecified()) {
		return []kms.Address{{Host: host}}, nil
	}
	if name, err := os.Hostname(); err == nil {
		return []kms.Address{{Host: name}}, nil
	}
	return []kms.Address{{Host: "localhost"}}, nil
}

// announce tells all members, and through them the administrators of instances,
// where clients reach this one and by which certificate they trust it: now, and
// whenever the certificate is replaced, until ctx ends.
func announce(ctx context.Context, k *kms.KMS, member string, reached []kms.Address, l net.Addr, creds *pki.Credentials, replaced <-chan struct{}, log *slog.Logger) {
	for {
		leaf := creds.Leaf()
		for _, a := range reached {
			if err := leaf.VerifyHostname(a.Host); err != nil {
				log.Warn("the server's certificate is not for an address that clients are told: those that compare names refuse it; vCenter, which trusts the thumbprint, does not mind", "address", a.Host, "error", err)
			}
		}
		if err := k.Publish(ctx, member, reached, l, pki.Thumbprint(leaf)); err != nil {
			log.Warn("instances will not show this member's endpoint", "error", err)
		}
		select {
		case <-replaced:
		case <-ctx.Done():
			return
		}
	}
}

// kmsCredentials are the server's own, and the files they are in.
func kmsCredentials(cfg kmsConfig, reached []kms.Address) (c *pki.Credentials, certificate, key string, err error) {
	if cfg.TLSCert != "" || cfg.TLSKey != "" {
		c, err = pki.LoadCredentials(cfg.TLSCert, cfg.TLSKey)
		return c, cfg.TLSCert, cfg.TLSKey, err
	}
	var names []string
	for _, a := range reached {
		names = append(names, a.Host)
	}
	c, err = endpoint(cfg.StateDir, "kmip", cfg.Listen, names...)
	own := filepath.Join(cfg.StateDir, "kmip.pem")
	return c, own, own, err
}
