package pki

import (
	"bytes"
	"context"
	"crypto/x509"
	"log/slog"
	"path/filepath"
	"testing"
	"time"
)

// TestFollow: new files are found without being told of.
func TestFollow(t *testing.T) {
	file := filepath.Join(t.TempDir(), "server.pem")
	renew := func() *x509.Certificate {
		key, err := GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		cert, err := SelfSigned(key, Grant{Server: true, Life: time.Hour}, "server", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if err := SaveKeyPair(file, []*x509.Certificate{cert}, key); err != nil {
			t.Fatal(err)
		}
		return cert
	}
	renew()
	c, err := LoadCredentials(file, file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended, replaced := make(chan struct{}), make(chan struct{}, 1)
	go func() {
		defer close(ended)
		c.follow(ctx, file, file, nil, slog.New(slog.DiscardHandler), func() { replaced <- struct{}{} }, 5*time.Millisecond)
	}()
	second := renew()
	for end := time.Now().Add(5 * time.Second); !bytes.Equal(c.Leaf().Raw, second.Raw); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the new certificate is not found")
		}
	}
	<-replaced
	cancel()
	<-ended
}
