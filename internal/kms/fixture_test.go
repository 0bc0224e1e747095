package kms

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("KMS_TEST_CHILD"); dir != "" {
		createForever(dir)
	}
	os.Exit(m.Run())
}

type fixture struct {
	*KMS
	s     *store.Store
	clock *clock
}

type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.at }

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func start(t testing.TB, dir string) *fixture {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "state"), Name: "kms"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := &clock{at: time.Now()}
	k, err := Open(t.Context(), s, Options{Logger: log, Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Unlock(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close(); s.Close(); r.Close() })
	return &fixture{k, s, c}
}

func (f *fixture) session() *Session {
	return &Session{k: f.KMS, inst: f.instances[DefaultInstance], Actor: Actor{Kind: "certificate", Name: "test", Instance: DefaultInstance, Role: RoleAdministrator}}
}

func attr(name kmip.AttributeName, v any) kmip.Attribute {
	return kmip.Attribute{AttributeName: name, AttributeValue: v}
}

func custom(name, v string) kmip.Attribute {
	return attr(kmip.AttributeName(name), ttlv.Value{Tag: kmip.TagAttributeValue, Value: v})
}

func named(name string) kmip.Attribute {
	return attr(kmip.AttributeNameName, kmip.Name{NameValue: name, NameType: kmip.NameTypeUninterpretedTextString})
}

func aes256(more ...kmip.Attribute) []kmip.Attribute {
	return append([]kmip.Attribute{
		attr(kmip.AttributeNameCryptographicAlgorithm, kmip.CryptographicAlgorithmAES),
		attr(kmip.AttributeNameCryptographicUsageMask, kmip.CryptographicUsageEncrypt|kmip.CryptographicUsageDecrypt),
		attr(kmip.AttributeNameCryptographicLength, int32(256)),
	}, more...)
}

func create(t testing.TB, s *Session, more ...kmip.Attribute) string {
	t.Helper()
	id, err := s.Create(t.Context(), kmip.ObjectTypeSymmetricKey, aes256(more...))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func reason(err error) kmip.ResultReason {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return 0
}

func state(t testing.TB, s *Session, id string) kmip.State {
	t.Helper()
	a, err := s.Attributes(t.Context(), id, kmip.AttributeNameState)
	if err != nil || len(a) != 1 {
		t.Fatalf("State of %s: %v, %v", id, a, err)
	}
	return a[0].AttributeValue.(kmip.State)
}

func keyBytes(t testing.TB, s *Session, id string) []byte {
	t.Helper()
	m, err := s.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Bytes.Wipe()
	var b []byte
	m.Bytes.Use(func(k []byte) { b = bytes.Clone(k) })
	return b
}
