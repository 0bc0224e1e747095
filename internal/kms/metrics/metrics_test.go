package metrics

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortise/internal/kms"
	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/store"
)

// scrape reads a path of a running listener.
func scrape(t *testing.T, base, path string) (int, string) {
	t.Helper()
	resp, err := http.Get(base + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// TestScrape measures a real KMS: restored, locked, quarantined, serving, and with
// a full disk.
func TestScrape(t *testing.T) {
	dir := t.TempDir()
	s, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "store"), Name: "kms-1"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	restored, err := store.NewCollection(t.Context(), s, "quarantine", store.JSON[kms.Quarantine](1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), restored.Create("restore", kms.Quarantine{Backup: "a-backup", Restored: time.Now()})); err != nil {
		t.Fatal(err)
	}
	restored.Close()
	ends := time.Unix(2_000_000_000, 0)
	m := New(Options{Version: "1.2.3", ServerCertificate: func() time.Time { return ends }})
	var full atomic.Bool
	k, err := kms.Open(t.Context(), s, kms.Options{Audit: kms.AuditOptions{SegmentSize: 64 << 10, Synced: m.AuditSynced, Step: func(name string) error {
		if full.Load() && (name == "write" || name == "spare" || name == "repair") {
			return unix.ENOSPC
		}
		return nil
	}}})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go m.Serve(t.Context(), l, k)
	base := "http://" + l.Addr().String()
	ready := func(want int, checks ...string) {
		t.Helper()
		status, text := scrape(t, base, "/readyz")
		var r Readiness
		if err := json.Unmarshal([]byte(text), &r); err != nil {
			t.Fatal(text, err)
		}
		got := []string{}
		for _, x := range r.Reasons {
			got = append(got, x.Check)
			if x.Reason == "" {
				t.Errorf("%s has no reason", x.Check)
			}
		}
		if status != want || strings.Join(got, " ") != strings.Join(checks, " ") {
			t.Errorf("/readyz: %d, %s; want %d, %v", status, text, want, checks)
		}
	}
	has := func(lines ...string) {
		t.Helper()
		status, text := scrape(t, base, "/metrics")
		if status != http.StatusOK {
			t.Fatalf("/metrics: %d, %s", status, text)
		}
		for _, line := range lines {
			if !strings.Contains(text, line) {
				t.Errorf("/metrics has no %q", line)
			}
		}
	}
	alive := func() {
		t.Helper()
		if status, text := scrape(t, base, "/healthz"); status != http.StatusOK || !strings.Contains(text, "alive") {
			t.Errorf("/healthz: %d, %s", status, text)
		}
	}
	alive()
	ready(http.StatusServiceUnavailable, "lock", "quarantine")
	has("mortise_kms_locked 1", "mortise_kms_quarantined 1", "mortise_kms_ready 0", `mortise_kms_build_info{version="1.2.3"} 1`, "mortise_kms_server_certificate_expiry_seconds 2e+09")

	root, err := rootkeytest.Keyring(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := k.Unlock(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	alive()
	ready(http.StatusServiceUnavailable, "quarantine")
	has("mortise_kms_locked 0", "mortise_kms_quarantined 1", "mortise_kms_ready 0")
	err = k.Release(t.Context(), kms.Actor{Kind: "socket", Name: "root"}, "")
	if doubt := (*kms.Confirmation)(nil); errors.As(err, &doubt) {
		err = k.Release(t.Context(), kms.Actor{Kind: "socket", Name: "root"}, doubt.Hash)
	}
	if err != nil {
		t.Fatal(err)
	}
	ready(http.StatusOK)
	if err := k.Act(t.Context(), kms.Actor{Kind: "socket", Name: "root"}, "", "test", ""); err != nil {
		t.Fatal(err)
	}
	m.Opened()
	m.Answered("Get", "default", "Success", 3*time.Millisecond)
	m.Answered("Get", "default", "ItemNotFound", time.Millisecond)
	m.Shed()
	m.HandshakeFailed()
	has("mortise_kms_locked 0", "mortise_kms_quarantined 0", "mortise_kms_ready 1",
		`mortise_kms_requests_total{instance="default",operation="Get",result="Success"} 1`,
		`mortise_kms_requests_total{instance="default",operation="Get",result="ItemNotFound"} 1`,
		`mortise_kms_request_seconds_bucket{instance="default",operation="Get",le="0.005"} 2`,
		"mortise_kms_connections 1", "mortise_kms_connections_opened_total 1", "mortise_kms_connections_refused_total 1", "mortise_kms_handshake_failures_total 1",
		`mortise_kms_keys{instance="default",state="Pre-Active"} 0`,
		"mortise_kms_audit_entries ", "mortise_kms_audit_sync_seconds_count ", "mortise_kms_audit_refusing 0",
		"mortise_kms_etcd_leader 1", "mortise_kms_etcd_has_leader 1", "mortise_kms_etcd_members 1", "mortise_kms_etcd_db_bytes ", "mortise_kms_etcd_quota_bytes 8.589934592e+09",
		"etcd_disk_wal_fsync_duration_seconds_bucket", "go_goroutines")
	m.Closed()
	has("mortise_kms_connections 0")

	full.Store(true)
	if err := k.Act(t.Context(), kms.Actor{Kind: "socket", Name: "root"}, "", "test", ""); !errors.Is(err, kms.ErrAudit) {
		t.Errorf("act with a full disk: %v", err)
	}
	alive()
	ready(http.StatusServiceUnavailable, "audit")
	has("mortise_kms_audit_refusing 1")
	full.Store(false)
	for deadline := time.Now().Add(10 * time.Second); k.AuditReady() != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(k.AuditReady())
		}
	}
	ready(http.StatusOK)
	if status, _ := scrape(t, base, "/"); status != http.StatusNotFound {
		t.Errorf("/: %d", status)
	}
}
