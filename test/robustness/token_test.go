package robustness

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ovh/kmip-go/payloads"

	"mortise/test/kmsproc"
)

var builtHelper = sync.OnceValues(func() (string, error) { return kmsproc.BuildHelper(programs) })

const softHSM = "/usr/lib/softhsm/libsofthsm2.so" // Debian package softhsm2

// token makes a SoftHSM with one token, for this process and those that it
// starts. It returns the folder of its objects and the flags of serve.
func token(t *testing.T) (objects, pin string, args []string) {
	t.Helper()
	helper, err := builtHelper()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	objects, pin = filepath.Join(dir, "tokens"), filepath.Join(dir, "pin")
	conf := filepath.Join(dir, "softhsm2.conf")
	write(t, conf, fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", objects))
	write(t, pin, "123456\n")
	if err := os.Mkdir(objects, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	if out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "crk", "--so-pin", "so-pin-1", "--pin", "123456").CombinedOutput(); err != nil {
		t.Fatalf("making a token: %v\n%s", err, out)
	}
	return objects, pin, []string{"--pkcs11-module", softHSM, "--pkcs11-token", "crk", "--pkcs11-helper", helper}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// newServer prepares a key server that is not started yet.
func newServer(t *testing.T) *kmsproc.Server {
	t.Helper()
	bin, err := built()
	if err != nil {
		t.Fatal(err)
	}
	s, err := kmsproc.New(bin, shortDir(t), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			for line := range strings.Lines(s.Log()) {
				if !strings.Contains(line, "object created") {
					t.Log(strings.TrimSpace(line))
				}
			}
		}
	})
	return s
}

// helperOf is the process that the server reaches its token by; 0 for none.
func helperOf(t *testing.T, s *kmsproc.Server) int {
	t.Helper()
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", s.PID()))
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		for _, field := range strings.Fields(string(text)) {
			name, _ := os.ReadFile("/proc/" + field + "/comm")
			if pid, err := strconv.Atoi(field); err == nil && strings.HasPrefix(string(name), "mortise-pkcs11") {
				return pid
			}
		}
	}
	return 0
}

func until(t *testing.T, what string, limit time.Duration, f func() error) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

// TestToken runs the key server with a PKCS#11 token and does to the token's helper
// and to the token what happens to them. Clients notice nothing of it: what is
// asked of the token meanwhile gets an error that says why, and works afterwards.
func TestToken(t *testing.T) {
	ctx := t.Context()
	objects, pin, args := token(t)
	s := newServer(t)
	s.NoPassphrase, s.Args = true, append(args, "--pkcs11-pin-file", pin)
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}
	c, err := s.Client(ctx, "admin", "administrator")
	if err != nil {
		t.Fatal(err)
	}
	list, err := s.Admin(ctx, "crk", "ls")
	if err != nil || !strings.Contains(list, "pkcs11") || strings.Contains(list, "file") {
		t.Fatalf("%s%v", list, err)
	}
	if _, err := os.Stat(filepath.Join(s.StateDir, "crk.sealed")); err == nil {
		t.Error("there is a keyring beside the token")
	}

	// A client makes and fetches keys all the time.
	keys := map[string][]byte{}
	end, ended := make(chan struct{}), make(chan struct{})
	conn := dial(t, s, c)
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			default:
			}
			made, err := one[*payloads.CreateResponsePayload](conn, create())
			if err != nil {
				t.Errorf("a client in mid-traffic: %v", err)
				return
			}
			keys[made.UniqueIdentifier] = material(t, conn, made.UniqueIdentifier)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	rotate := func(what string) {
		t.Helper()
		until(t, "a rotation after "+what, 60*time.Second, func() error { _, err := s.Admin(ctx, "crk", "rotate"); return err })
	}
	first := helperOf(t, s)
	if first == 0 {
		t.Fatal("the helper's process is not found")
	}

	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	rotate("the helper was killed")
	second := helperOf(t, s)
	if second == 0 || second == first {
		t.Errorf("the helper was %d and is %d", first, second)
	}

	if err := syscall.Kill(second, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := s.Admin(ctx, "crk", "ls"); err == nil {
		t.Logf("the first call while it hung found the next helper")
	} else if !strings.Contains(err.Error(), "PKCS#11 helper does not serve") || !strings.Contains(err.Error(), "no answer within") {
		t.Errorf("while the helper hangs: %v", err)
	}
	if d := time.Since(began); d > 25*time.Second {
		t.Errorf("an answer took %v", d)
	}
	rotate("the helper hung")
	if syscall.Kill(second, 0) == nil {
		t.Error("the helper that hung is still there")
	}

	// The token is pulled out, and put in again.
	if err := os.Rename(objects, objects+".away"); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(helperOf(t, s), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Admin(ctx, "crk", "ls"); err == nil || !strings.Contains(err.Error(), "token") {
		t.Errorf("without the token: %v", err)
	}
	if err := os.Rename(objects+".away", objects); err != nil {
		t.Fatal(err)
	}
	rotate("the token was away")

	close(end)
	<-ended
	t.Logf("%d keys were made meanwhile", len(keys))
	check := func() {
		t.Helper()
		conn := dial(t, s, c)
		for id, want := range keys {
			if !bytes.Equal(material(t, conn, id), want) {
				t.Fatalf("key %s has changed", id)
			}
		}
	}
	check()
	if err := s.Stop(); err != nil {
		t.Error(err)
	}

	// Starts that cannot go well end with the reason.
	fails := func(what, says string) {
		t.Helper()
		from := len(s.Log())
		if err := s.Launch(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-s.Ended():
		case <-time.After(30 * time.Second):
			t.Errorf("%s: it goes on", what)
		}
		if s.Stop() == nil || !strings.Contains(s.Log()[from:], says) {
			t.Errorf("%s: it does not say %q:\n%s", what, says, s.Log()[from:])
		}
	}
	write(t, pin, "654321\n")
	fails("a wrong PIN", "refuses the PIN")
	write(t, pin, "123456\n")
	if err := os.Rename(objects, objects+".away"); err != nil {
		t.Fatal(err)
	}
	fails("no token", "mortise-pkcs11: initialising")
	if err := os.Rename(objects+".away", objects); err != nil {
		t.Fatal(err)
	}

	// Without a PIN it waits for one.
	s.Args = args
	if err := s.StartLocked(ctx); err != nil {
		t.Fatal(err)
	}
	wrong := filepath.Join(filepath.Dir(pin), "wrong")
	write(t, wrong, "654321\n")
	if _, err := s.Admin(ctx, "unlock", "--secret-file", wrong); err == nil || !strings.Contains(err.Error(), "refuses the PIN") {
		t.Errorf("unlocking with a wrong PIN: %v", err)
	}
	if _, err := s.Admin(ctx, "unlock", "--secret-file", pin); err != nil {
		t.Fatal(err)
	}
	if err := s.Serves(ctx); err != nil {
		t.Fatal(err)
	}
	check()
}
