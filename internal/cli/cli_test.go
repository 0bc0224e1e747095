package cli

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// TestHelp: every verb has a short text, a long one that says what its JSON is,
// and an example that begins like the verb.
func TestHelp(t *testing.T) {
	verbs := 0
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			walk(sub)
		}
		if c.HasSubCommands() || c.Parent() == nil {
			return
		}
		verbs++
		path := c.CommandPath()
		if c.Short == "" || c.Long == "" || !strings.Contains(c.Example, path) {
			t.Errorf("%s: short %q, %d bytes of text, example %q", path, c.Short, len(c.Long), c.Example)
		}
		if c.Flags().Lookup("json") == nil && c.InheritedFlags().Lookup("json") == nil {
			t.Errorf("%s has no --json", path)
		}
		if !strings.Contains(c.Long, "JSON:") && !strings.Contains(c.Long, "JSON, when") && path != "mortise vm console" {
			t.Errorf("%s does not say what its JSON is", path)
		}
		for _, line := range strings.Split(c.Long+"\n"+c.Example, "\n") {
			if len([]rune(line)) > 100 {
				t.Errorf("%s: a line of %d characters: %s", path, len([]rune(line)), line)
			}
		}
	}
	walk(root())
	if verbs < 25 {
		t.Errorf("only %d verbs", verbs)
	}
}

func TestAddToExistingHost(t *testing.T) {
	r := &cobra.Command{Use: "mortise"}
	r.AddGroup(&cobra.Group{ID: GroupID})
	host := &cobra.Command{Use: "host", Run: func(*cobra.Command, []string) {}}
	r.AddCommand(host)
	Add(r)
	if ls, _, err := r.Find([]string{"host", "ls"}); err != nil || ls.Parent() != host {
		t.Errorf("host ls is under %v, %v", ls.Parent(), err)
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"20G": 20 << 30, "20g": 20 << 30, "20GiB": 20 << 30, "20 GB": 20 << 30, "512M": 512 << 20, "1T": 1 << 40, "4K": 4096, "7": 7 << 20, " 7 ": 7 << 20,
	} {
		if got, err := parseSize(text, 1<<20); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "G", "-1G", "0", "1.5G", "1X", "G1", "9999999999999999999", "999999999999T", "0x10", "1 2G"} {
		if n, err := parseSize(text, 1<<20); err == nil {
			t.Errorf("%q is %d bytes", text, n)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1<<20 - 1: "1.0 MiB", 1536 << 20: "1.5 GiB", 1 << 62: "4.0 EiB"} {
		if got := size(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

func TestParseURL(t *testing.T) {
	for text, want := range map[string]string{
		"https://C.example.com:8443": "https://c.example.com:8443", "center": "https://center", "center:8443": "https://center:8443",
		"https://center/sdk": "https://center", "https://[::1]:8443/": "https://[::1]:8443", "127.0.0.1:8443": "https://127.0.0.1:8443",
	} {
		if u, err := parseURL(text); err != nil || u.String() != want {
			t.Errorf("%q: %v, %v; want %s", text, u, err, want)
		}
	}
	for _, text := range []string{"", "http://c", "https://", "https://a:b@c", "https://c/x", "https://c?x", "https://c#x", "ftp://c", "https://c:port", "\x00"} {
		if u, err := parseURL(text); err == nil {
			t.Errorf("%q is %s", text, u)
		}
	}
}

func TestParseAddress(t *testing.T) {
	for text, want := range map[string]struct {
		host string
		port int32
	}{
		"kms": {"kms", 5696}, "kms:1": {"kms", 1}, "192.0.2.7": {"192.0.2.7", 5696}, "[::1]:7": {"::1", 7}, "::1": {"::1", 5696}, "[::1]": {"::1", 5696},
	} {
		if host, port, err := parseAddress(text); err != nil || host != want.host || port != want.port {
			t.Errorf("%q: %s %d, %v", text, host, port, err)
		}
	}
	for _, text := range []string{"", ":5696", "kms:", "kms:0", "kms:65536", "kms:x", "a b", "https://kms", "a:b:c"} {
		if host, port, err := parseAddress(text); err == nil {
			t.Errorf("%q is %s %d", text, host, port)
		}
	}
}

func TestParseKey(t *testing.T) {
	if k, err := parseKey("kms1/a/b"); err != nil || keyName(&k) != "kms1/a/b" || k.ProviderId.Id != "kms1" {
		t.Errorf("%+v, %v", k, err)
	}
	for _, text := range []string{"", "kms1", "/a", "kms1/"} {
		if k, err := parseKey(text); err == nil {
			t.Errorf("%q is %+v", text, k)
		}
	}
}

// TestExplain: the message of a fault reaches the user without SOAP's words, what
// was being done before it, and the way out after it.
func TestExplain(t *testing.T) {
	f := &soap.Fault{String: "the VM is on fire"}
	f.Detail.Fault = types.InvalidState{}
	soapErr := soap.WrapSoapFault(f)
	out := &soap.Fault{String: "not authenticated"}
	out.Detail.Fault = types.NotAuthenticated{}
	noText := &soap.Fault{}
	noText.Detail.Fault = types.SystemError{}
	key := &types.LocalizedMethodFault{LocalizedMessage: "a key is missing", Fault: &types.EncryptionKeyRequired{
		RequiredKey: []types.CryptoKeyId{{KeyId: "1", ProviderId: &types.KeyProviderId{Id: "kms1"}}},
	}}
	for _, c := range []struct {
		err  error
		want string
	}{
		{soapErr, "the VM is on fire"},
		{wrap("encrypting web1: %w", soapErr), "encrypting web1: the VM is on fire"},
		{wrap("a: %w", wrap("b: %w", soapErr)), "a: b: the VM is on fire"},
		{wrap("%w, alas", soapErr), "the VM is on fire"},
		{wrap("listing: %w", soap.WrapSoapFault(out)), "listing: not authenticated: the session has ended; run mortise login again"},
		{wrap("x: %w", soap.WrapSoapFault(noText)), "x: center answered SystemError without saying more"},
		{wrap("x: %w", soap.WrapVimFault(&types.ManagedObjectNotFound{})), "x: center answered ManagedObjectNotFound"},
		{wrap("powering on: %w", task.Error{LocalizedMethodFault: key}), "powering on: a key is missing: mortise key status kms1/1 tells what is the matter with the key"},
		{errors.New("plain"), "plain"},
	} {
		got := explain(c.err)
		if got.Error() != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
		if !errors.Is(got, c.err) && got.Error() != c.err.Error() {
			t.Errorf("%q lost its cause", got)
		}
	}
	if explain(nil) != nil || !errors.Is(explain(wrap("x: %w", context.Canceled)), context.Canceled) {
		t.Error("nil and Ctrl-C are no failures")
	}
}

func wrap(format string, err error) error {
	return &wrapped{strings.ReplaceAll(format, "%w", err.Error()), err}
}

type wrapped struct {
	text string
	err  error
}

func (w *wrapped) Error() string { return w.text }
func (w *wrapped) Unwrap() error { return w.err }

// TestTable: what others named cannot break a table or move the cursor.
func TestTable(t *testing.T) {
	var out bytes.Buffer
	table := newTable(&out, "A", "B")
	table.row("x\x1b[31m\ny", "")
	table.row("日本", "z\tz")
	if err := table.flush(); err != nil {
		t.Fatal(err)
	}
	if want := "A        B\nx[31m y  -\n日本       z z\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}

func TestReadLine(t *testing.T) {
	r := strings.NewReader("yes\r\nrest")
	if line, err := readLine(r); line != "yes" || err != nil || r.Len() != 4 {
		t.Errorf("%q, %v, %d left", line, err, r.Len())
	}
	if line, err := readLine(r); line != "rest" || err != nil {
		t.Errorf("%q, %v", line, err)
	}
	if _, err := readLine(r); err == nil {
		t.Error("no error at the end")
	}
	if line, _ := readLine(strings.NewReader(strings.Repeat("x", 10_000))); len(line) != maxAnswer {
		t.Errorf("%d bytes of an endless line", len(line))
	}
}

func TestConfig(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "dir")
	t.Setenv("MORTISE_CONFIG", dir)
	c, err := loadConfig()
	if err != nil {
		t.Fatal(err)
	}
	*c.of("https://a") = center{User: "u", Thumbprint: "T", Session: "S"}
	c.Current = "https://a"
	if err := c.save(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "session.json"): 0o600} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	again, err := loadConfig()
	if err != nil || again.Current != "https://a" || *again.Centers["https://a"] != *c.Centers["https://a"] {
		t.Errorf("%+v, %v", again, err)
	}
	if err := os.WriteFile(c.path, []byte(`{"centers": {"x": null}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := loadConfig(); err != nil || len(c.Centers) != 0 {
		t.Errorf("a null center: %+v, %v", c, err)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"current": "https://a", "centers": {"https://a": {"user": "u", "thumbprint": "AA", "session": "s"}}}`))
	f.Add([]byte(`{"centers": {"x": null}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		t.Setenv("MORTISE_CONFIG", dir)
		if err := os.WriteFile(filepath.Join(dir, "session.json"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := loadConfig(); err == nil {
			_ = c.of("https://a").Session // no nil center, no nil map
		}
	})
}

func TestAgo(t *testing.T) {
	now := time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		-time.Minute: "0s ago", 5 * time.Second: "5s ago", 5 * time.Minute: "5m ago", 30 * time.Hour: "30h ago", 100 * time.Hour: "2026-05-02",
	} {
		if got := ago(now.Add(-d), now); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}
