package tpm

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"mortise/internal/secret"
)

// machine is a TPM in software, with a folder for what it keeps.
func machine(t *testing.T) Sealer {
	t.Helper()
	return boot(t, t.TempDir())
}

// boot starts swtpm with the state in dir; it ends with the test.
func boot(t *testing.T, dir string) Sealer {
	t.Helper()
	path := filepath.Join(dir, "tpm.sock")
	_ = os.Remove(path) // of a machine that was switched off
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,path="+path, "--flags", "not-need-init,startup-clear")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting swtpm (Debian package swtpm): %v", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("swtpm: %s", &out)
		}
	})
	for range 200 {
		if _, err := os.Stat(path); err == nil {
			return Sealer{Device: "unix:" + path}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("swtpm does not listen: %s", &out)
	return Sealer{}
}

func random(t *testing.T, n int) *secret.Key {
	t.Helper()
	k, err := secret.Random(nil, n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Wipe)
	return k
}

func check(t *testing.T, s Sealer, sealed []byte, want *secret.Key) error {
	t.Helper()
	got, err := s.Unseal(sealed)
	if err != nil {
		return err
	}
	defer got.Wipe()
	if !got.Equal(want) {
		return errors.New("another secret came out")
	}
	return nil
}

// extend changes a PCR as a boot stage does.
func extend(t *testing.T, s Sealer, index uint) {
	t.Helper()
	c, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(index), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{
			HashAlg: tpm2.TPMAlgSHA256, Digest: bytes.Repeat([]byte{7}, 32),
		}}},
	}.Execute(c)
	if err != nil {
		t.Fatal(err)
	}
}

func TestSealUnseal(t *testing.T) {
	s := machine(t)
	if s.Method() != "tpm" {
		t.Errorf("method %q", s.Method())
	}
	for _, n := range []int{1, 32, MaxSecret} {
		k := random(t, n)
		sealed, err := s.Seal(k)
		if err != nil {
			t.Fatal(err)
		}
		if err := check(t, s, sealed, k); err != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
		k.Use(func(b []byte) {
			if n > 8 && bytes.Contains(sealed, b[:8]) {
				t.Error("the secret is in the blob")
			}
		})
	}
	if _, err := s.Seal(random(t, MaxSecret+1)); err == nil {
		t.Error("a secret that is too long was sealed")
	}
}

// TestNothingStaysLoaded seals and unseals more often than a TPM has slots.
func TestNothingStaysLoaded(t *testing.T) {
	s := machine(t)
	s.PCRs = []uint{0}
	k := random(t, 32)
	for range 10 {
		sealed, err := s.Seal(k)
		if err == nil {
			err = check(t, s, sealed, k)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestSurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	k := random(t, 32)
	var sealed []byte
	t.Run("first", func(t *testing.T) {
		var err error
		if sealed, err = boot(t, dir).Seal(k); err != nil {
			t.Fatal(err)
		}
	})
	if sealed == nil {
		return
	}
	if err := check(t, boot(t, dir), sealed, k); err != nil {
		t.Error(err)
	}
}

func TestPCRs(t *testing.T) {
	s := machine(t)
	k := random(t, 32)
	free, err := s.Seal(k)
	if err != nil {
		t.Fatal(err)
	}
	s.PCRs = []uint{7, 0, 2, 7, 3, 4, 5, 6, 1, 8, 9}
	bound, err := s.Seal(k)
	if err != nil {
		t.Fatal(err)
	}
	extend(t, s, 11)
	if err := check(t, s, bound, k); err != nil {
		t.Errorf("a PCR that is not in the policy: %v", err)
	}
	extend(t, s, 7)
	if err := check(t, s, bound, k); !errors.Is(err, ErrPCR) || !strings.Contains(err.Error(), "PCR 7;") {
		t.Errorf("after PCR 7 changed: %v", err)
	}
	if err := check(t, s, free, k); err != nil {
		t.Errorf("without a policy: %v", err)
	}
	// Whoever alters the blob to look current is refused by the TPM itself.
	b, err := parse(bound)
	if err != nil {
		t.Fatal(err)
	}
	none := b
	none.pcrs = nil
	if err := check(t, s, none.bytes(), k); err == nil {
		t.Error("a blob without its PCRs was opened")
	}
	c, err := s.open()
	if err != nil {
		t.Fatal(err)
	}
	var indexes []uint
	for _, p := range b.pcrs {
		indexes = append(indexes, p.index)
	}
	b.pcrs, err = c.read(indexes)
	c.close()
	if err != nil {
		t.Fatal(err)
	}
	if err := check(t, s, b.bytes(), k); !errors.Is(err, ErrPCR) {
		t.Errorf("with today's values written into it: %v", err)
	}
	s.PCRs = []uint{24}
	if _, err := s.Seal(k); err == nil || !strings.Contains(err.Error(), "no PCR 24") {
		t.Errorf("PCR 24: %v", err)
	}
}

func TestOtherTPMAndDamage(t *testing.T) {
	s, other := machine(t), machine(t)
	k := random(t, 32)
	sealed, err := s.Seal(k)
	if err != nil {
		t.Fatal(err)
	}
	if err := check(t, other, sealed, k); !errors.Is(err, ErrOtherTPM) {
		t.Errorf("on another machine: %v", err)
	}
	b, err := parse(sealed)
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(*blob){
		"private": func(b *blob) { b.private[len(b.private)-1] ^= 1 },
		"public":  func(b *blob) { b.public[len(b.public)-1] ^= 1 },
		"empty":   func(b *blob) { b.private = nil },
	} {
		bad := blob{srk: b.srk, public: bytes.Clone(b.public), private: bytes.Clone(b.private)}
		edit(&bad)
		if err := check(t, s, bad.bytes(), k); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s altered: %v", name, err)
		}
	}
	if err := check(t, s, sealed[:40], k); !errors.Is(err, ErrDamaged) {
		t.Errorf("cut off: %v", err)
	}
	if err := check(t, s, sealed, k); err != nil { // none of it left a handle behind
		t.Errorf("after all that: %v", err)
	}
}

func TestNoTPM(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, device := range []string{filepath.Join(dir, "none"), plain, "unix:" + filepath.Join(dir, "none"), "tcp:127.0.0.1:1"} {
		if _, err := (Sealer{Device: device}).Seal(random(t, 32)); !errors.Is(err, ErrNoTPM) || !strings.Contains(err.Error(), device) {
			t.Errorf("%s: %v", device, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	b := blob{srk: []byte("srk"), public: []byte("public"), private: []byte("private")}
	f.Add(b.bytes())
	b.pcrs = []pcr{{index: 0}, {index: 7}}
	f.Add(b.bytes())
	f.Add(b.bytes()[:20])
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := parse(in)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(got.bytes(), in) {
			t.Fatalf("parse then print: %x, was %x", got.bytes(), in)
		}
	})
}
