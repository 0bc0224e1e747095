package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"mortise/internal/rootkey/rootkeytest"
	"mortise/internal/secret"
)

// helpers builds the helper once for all tests: the one that is shipped, and one
// with faults.
var helpers = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "mortise-pkcs11-test-")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-tags", "fault", "-o", filepath.Join(dir, "mortise-pkcs11"), "mortise/cmd/mortise-pkcs11")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return dir, fmt.Errorf("building the helper (Debian packages gcc, libc6-dev): %w\n%s", err, out)
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, _ := helpers(); dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// soft makes a SoftHSM token called "crk" with PIN 1234.
func soft(t *testing.T) Config {
	t.Helper()
	dir, err := helpers()
	if err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	conf := filepath.Join(state, "softhsm2.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", state), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	addToken(t, "crk")
	return Config{
		Helper: filepath.Join(dir, "mortise-pkcs11"), Module: "/usr/lib/softhsm/libsofthsm2.so",
		Label: "crk", Timeout: 5 * time.Second,
	}
}

func addToken(t *testing.T, label string) {
	t.Helper()
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", "so-pin-1", "--pin", "1234").CombinedOutput()
	if err != nil {
		t.Fatalf("making a token (Debian package softhsm2): %v\n%s", err, out)
	}
}

func key(t testing.TB, text string) *secret.Key {
	t.Helper()
	k, err := secret.Copy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func unlocked(t *testing.T, cfg Config) *Token {
	t.Helper()
	tok := New(cfg)
	t.Cleanup(func() { tok.Close() })
	if err := tok.Unlock(t.Context(), key(t, "1234")); err != nil {
		t.Fatal(err)
	}
	return tok
}

func opens(tok *Token, id string, blob []byte, additional string, want *secret.Key) error {
	got, err := tok.Open(context.Background(), id, blob, []byte(additional))
	if err != nil {
		return err
	}
	defer got.Wipe()
	if !got.Equal(want) {
		return errors.New("it opens to something else")
	}
	return nil
}

// TestToken follows CRKs in a real SoftHSM.
func TestToken(t *testing.T) {
	ctx := t.Context()
	cfg := soft(t)
	tok := unlocked(t, cfg)
	if tok.Kind() != "pkcs11" {
		t.Errorf("kind %s", tok.Kind())
	}
	a, b := rootkeytest.NewID(), rootkeytest.NewID()
	if err := tok.Create(ctx, a); err != nil {
		t.Fatal(err)
	}
	imported, err := secret.Random(nil, 32)
	if err != nil {
		t.Fatal(err)
	}
	if err := tok.Import(ctx, b, imported); err != nil {
		t.Fatal(err)
	}
	if err := tok.Import(ctx, rootkeytest.NewID(), key(t, "short")); err == nil {
		t.Error("a key of 5 bytes was imported")
	}
	for _, id := range []string{a, b} { // an id is used once
		if err := tok.Create(ctx, id); !errors.Is(err, ErrKeyExists) {
			t.Errorf("a second key %s: %v", id, err)
		}
		if err := tok.Import(ctx, id, imported); !errors.Is(err, ErrKeyExists) {
			t.Errorf("a second key %s: %v", id, err)
		}
	}
	if list, err := tok.List(ctx); err != nil || !slices.Equal(list, []string{min(a, b), max(a, b)}) {
		t.Errorf("list %v, %v", list, err)
	}
	inst := key(t, "an instance key of 32 bytes.....")
	blob, err := tok.Seal(ctx, a, inst, []byte("for"))
	if err != nil {
		t.Fatal(err)
	}
	inst.Use(func(p []byte) {
		if bytes.Contains(blob, p[:8]) {
			t.Error("the key is in the blob")
		}
	})
	if err := opens(tok, a, blob, "for", inst); err != nil {
		t.Error(err)
	}
	if err := opens(tok, a, blob, "other", inst); !errors.Is(err, ErrBlob) {
		t.Errorf("other additional data: %v", err)
	}
	bad := bytes.Clone(blob)
	bad[len(bad)-1] ^= 1
	moved := bytes.Clone(blob)
	other, _ := parseID(b)
	copy(moved[1:], other)
	for name, c := range map[string]struct {
		id   string
		blob []byte
		want error
	}{
		"altered": {a, bad, ErrBlob}, "cut": {a, blob[:30], ErrBlob}, "empty": {a, nil, ErrBlob}, "of another CRK": {b, blob, ErrBlob},
		"moved to another CRK": {b, moved, ErrBlob}, "no id": {"x", blob, ErrUnknownKey},
	} {
		if err := opens(tok, c.id, c.blob, "for", inst); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	for _, id := range []string{b, b, "x"} {
		if err := tok.Destroy(ctx, id); err != nil {
			t.Errorf("destroying %q: %v", id, err)
		}
	}
	if _, err := tok.Seal(ctx, b, inst, nil); !errors.Is(err, ErrUnknownKey) {
		t.Errorf("after Destroy: %v", err)
	}
	// Another member, with the PIN of this one.
	share, err := tok.Share(ctx, []string{a})
	if err != nil {
		t.Fatal(err)
	}
	defer share.Wipe()
	peer := New(cfg)
	defer peer.Close()
	if err := opens(peer, a, blob, "for", inst); !errors.Is(err, ErrLocked) {
		t.Errorf("before Adopt: %v", err)
	}
	for range 2 {
		if err := peer.Adopt(ctx, share); err != nil {
			t.Fatal(err)
		}
	}
	if err := opens(peer, a, blob, "for", inst); err != nil {
		t.Errorf("another member: %v", err)
	}
	if err := peer.Close(); err != nil {
		t.Error(err)
	}
	if err := peer.Create(ctx, rootkeytest.NewID()); err == nil {
		t.Error("a closed token made a key")
	}
}

// TestNotExtractable asks the token itself, by OpenSC's tool, about a CRK.
func TestNotExtractable(t *testing.T) {
	cfg := soft(t)
	if err := unlocked(t, cfg).Create(t.Context(), rootkeytest.NewID()); err != nil {
		t.Fatal(err)
	}
	tool, err := exec.LookPath("pkcs11-tool")
	if err != nil {
		t.Skip("pkcs11-tool (Debian package opensc) is not installed")
	}
	out, err := exec.Command(tool, "--module", cfg.Module, "--token-label", "crk", "--login", "--pin", "1234", "--list-objects", "--type", "secrkey").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"mortise-crk", "sensitive", "never extractable", "AES length 32"} {
		if !bytes.Contains(out, []byte(want)) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

// TestPINIsNowhere looks at the helper from outside, as ps does.
func TestPINIsNowhere(t *testing.T) {
	cfg := soft(t)
	tok := New(cfg)
	defer tok.Close()
	pin := "1234"
	if err := tok.Unlock(t.Context(), key(t, pin)); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"cmdline", "environ"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", tok.helper.cmd.Process.Pid, file))
		if err != nil {
			t.Logf("%s: %v (the helper is not dumpable)", file, err)
			continue
		}
		for _, word := range bytes.Split(text, []byte{0}) {
			if _, value, _ := bytes.Cut(word, []byte("=")); string(word) == pin || string(value) == pin {
				t.Errorf("the PIN is in the helper's %s", file)
			}
		}
	}
}

func TestWrongPIN(t *testing.T) {
	tok := New(soft(t))
	defer tok.Close()
	ctx := t.Context()
	if _, err := tok.Share(ctx, nil); !errors.Is(err, ErrLocked) {
		t.Errorf("sharing without a PIN: %v", err)
	}
	if err := tok.Unlock(ctx, key(t, "4321")); !errors.Is(err, ErrPIN) {
		t.Errorf("wrong PIN: %v", err)
	}
	if err := tok.Create(ctx, rootkeytest.NewID()); !errors.Is(err, ErrLocked) { // it is not tried again
		t.Errorf("after a wrong PIN: %v", err)
	}
	if err := tok.Unlock(ctx, key(t, "1234")); err != nil {
		t.Errorf("right PIN: %v", err)
	}
	if err := tok.Create(ctx, rootkeytest.NewID()); err != nil {
		t.Error(err)
	}
}

func TestNoToken(t *testing.T) {
	good := soft(t)
	addToken(t, "second")
	for _, c := range []struct {
		name string
		edit func(*Config)
		says string
	}{
		{"no helper", func(c *Config) { c.Helper += ".none" }, "no such file"},
		{"no library", func(c *Config) { c.Module += ".none" }, "no PKCS#11 library"},
		{"no token", func(c *Config) { c.Label = "other" }, `no initialised token has the label`},
		{"several", func(c *Config) { c.Label = "" }, "several tokens"},
	} {
		var log locked
		cfg := good
		cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
		c.edit(&cfg)
		tok := New(cfg)
		err := tok.Unlock(t.Context(), key(t, "1234"))
		if !errors.Is(err, ErrHelper) || !strings.Contains(fmt.Sprint(err)+log.String(), c.says) {
			t.Errorf("%s: %v; log %s", c.name, err, log.String())
		}
		tok.Close()
	}
}

// locked is a log that the helper's reader writes while the test reads.
type locked struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *locked) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestFaults: a helper that hangs, dies or prints is replaced; calls meanwhile
// say so.
func TestFaults(t *testing.T) {
	ctx := t.Context()
	cfg := soft(t)
	cfg.Timeout = time.Second
	tok := unlocked(t, cfg)
	id := rootkeytest.NewID()
	if err := tok.Create(ctx, id); err != nil {
		t.Fatal(err)
	}
	inst := key(t, "an instance key of 32 bytes.....")
	blob, err := tok.Seal(ctx, id, inst, []byte("for"))
	if err != nil {
		t.Fatal(err)
	}
	again := func(what string) {
		t.Helper()
		for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			err := opens(tok, id, blob, "for", inst)
			if err == nil {
				return
			}
			if !errors.Is(err, ErrHelper) || !strings.Contains(err.Error(), "started again in") || time.Since(start) > 20*time.Second {
				t.Fatalf("after a helper that %s: %v", what, err)
			}
		}
	}
	for what, says := range map[string]string{"hang": "no answer within 1s", "crash": "exit status 3"} {
		start := time.Now()
		pid := tok.helper.cmd.Process.Pid
		if _, err := tok.Seal(ctx, id, inst, []byte(what)); !errors.Is(err, ErrHelper) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", what, err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s took %s", what, took)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			t.Errorf("%s: process %d is still there", what, pid)
		}
		again(what)
	}
	if _, err := tok.Seal(ctx, id, inst, []byte("print")); err != nil {
		t.Errorf("a library that prints: %v", err)
	}
	// Killed while nobody calls: nobody notices.
	if err := tok.helper.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-tok.helper.exited
	if err := opens(tok, id, blob, "for", inst); err != nil {
		t.Errorf("after a kill between calls: %v", err)
	}
	// Backoff grows: three crashes in a row.
	for range 3 {
		if _, err := tok.Seal(ctx, id, inst, []byte("crash")); err == nil {
			t.Fatal("no crash")
		}
		time.Sleep(time.Until(tok.retry))
	}
	if tok.failures < 1 {
		t.Errorf("%d failures are remembered", tok.failures)
	}
	again("crashed three times")
	if tok.failures != 0 {
		t.Errorf("%d failures are remembered after a success", tok.failures)
	}
}

// TestOrphan: a helper whose library hangs ends when the KMS is gone.
func TestOrphan(t *testing.T) {
	cfg := soft(t)
	cfg.Timeout = 200 * time.Millisecond
	h, err := startHelper(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer h.stop()
	id := make([]byte, idLen)
	for _, m := range []message{{opHello, [][]byte{[]byte(protocolVersion)}}, {opLogin, [][]byte{[]byte("1234")}}, {opCreate, [][]byte{id}}} {
		if got, err := h.exchange(5*time.Second, m); err != nil || got.code != statusOK {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	if _, err := h.exchange(cfg.Timeout, message{opEncrypt, [][]byte{id, id, []byte("hang")}}); err == nil {
		t.Fatal("it does not hang")
	}
	h.stdin.Close()
	select {
	case <-h.exited:
	case <-time.After(5 * time.Second):
		t.Error("the hanging helper stays")
	}
}

// TestRace calls from many goroutines while the helper is killed now and then.
func TestRace(t *testing.T) {
	ctx := t.Context()
	tok := unlocked(t, soft(t))
	id := rootkeytest.NewID()
	if err := tok.Create(ctx, id); err != nil {
		t.Fatal(err)
	}
	inst := key(t, "an instance key of 32 bytes.....")
	var all sync.WaitGroup
	for g := range 4 {
		all.Go(func() {
			for i := range 30 {
				what := "for"
				if g == 0 && i%10 == 9 {
					what = "crash"
				}
				blob, err := tok.Seal(ctx, id, inst, []byte(what))
				if err == nil {
					err = opens(tok, id, blob, what, inst)
				}
				if err != nil && !errors.Is(err, ErrHelper) {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

// memory is a Device without a token.
type memory struct{ keys map[string]bool }

func (m memory) Name() string { return "memory" }
func (m memory) Login(pin []byte) error {
	if string(pin) != "1234" {
		return ErrPIN
	}
	return nil
}
func (m memory) Create(id []byte) error    { m.keys[string(id)] = true; return nil }
func (m memory) Import(id, _ []byte) error { return m.Create(id) }
func (m memory) Encrypt(id, plain, additional []byte) ([]byte, error) {
	if !m.keys[string(id)] {
		return nil, ErrUnknownKey
	}
	return bytes.Clone(plain), nil
}
func (m memory) Decrypt(id, sealed, additional []byte) ([]byte, error) {
	if len(sealed) == 0 {
		return nil, ErrBlob
	}
	return m.Encrypt(id, sealed, additional)
}
func (m memory) Destroy(id []byte) error { delete(m.keys, string(id)); return nil }
func (m memory) List() (ids [][]byte, err error) {
	for id := range m.keys {
		ids = append(ids, []byte(id))
	}
	return ids, nil
}

func frames(t testing.TB, list ...message) (all []byte) {
	for _, m := range list {
		b, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	return all
}

func TestServeStatus(t *testing.T) {
	in := frames(t,
		message{opHello, [][]byte{[]byte("mortise-pkcs11 9")}}, message{opHello, [][]byte{[]byte(protocolVersion)}},
		message{opLogin, [][]byte{[]byte("no")}}, message{opLogin, [][]byte{[]byte("1234")}},
		message{opEncrypt, [][]byte{{1}, {2}, {3}}}, message{opCreate, [][]byte{{1}}}, message{opEncrypt, [][]byte{{1}, {2}, {3}}},
		message{opDecrypt, [][]byte{{1}, nil, nil}}, message{opCreate, nil}, message{99, nil}, message{opList, nil})
	var out bytes.Buffer
	if err := Serve(bytes.NewReader(in), &out, memory{map[string]bool{}}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []byte{statusRequest, statusOK, statusPIN, statusOK, statusUnknown, statusOK, statusOK, statusBlob, statusRequest, statusRequest, statusOK} {
		got, _, err := readMessage(&out)
		if err != nil || got.code != want {
			t.Errorf("answer %d: %d, %v; want %d", i, got.code, err, want)
		}
	}
}

// FuzzServe is the helper's side: any bytes come in.
func FuzzServe(f *testing.F) {
	f.Add(frames(f, message{opHello, [][]byte{[]byte(protocolVersion)}}, message{opCreate, [][]byte{{1}}}, message{opEncrypt, [][]byte{{1}, {2}, {3}}}))
	f.Add([]byte{0, 0, 0, 2, opList, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0, 0, 5, opLogin, 1, 0, 9, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		var out bytes.Buffer
		err := Serve(bytes.NewReader(in), &out, memory{map[string]bool{}})
		if err != nil && !errors.Is(err, errMessage) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(err)
		}
		for {
			m, _, err := readMessage(&out)
			if err == io.EOF {
				return
			}
			if err != nil || m.code > statusRequest {
				t.Fatalf("it answers %+v, %v", m, err)
			}
		}
	})
}

// FuzzReadMessage is the KMS's side: a helper answers any bytes.
func FuzzReadMessage(f *testing.F) {
	f.Add(frames(f, message{statusOK, [][]byte{[]byte("ciphertext")}}))
	f.Add(frames(f, message{statusToken, [][]byte{[]byte("CKR_DEVICE_ERROR")}}, message{statusOK, nil}))
	f.Add([]byte{0, 0, 0, 1, 0})
	f.Add([]byte{0, 0, 0, 4, 0, 1, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, in []byte) {
		m, _, err := readMessage(bytes.NewReader(in))
		if err != nil {
			return
		}
		out, err := m.encode()
		if err != nil || !bytes.HasPrefix(in, out) {
			t.Fatalf("read then written: %x, was %x (%v)", out, in, err)
		}
	})
}
