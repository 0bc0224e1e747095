package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mortise/internal/kmipc"
	"mortise/internal/pki"
)

// A machine is a whole Mortise that `mortise dev` runs, and a client of it: the
// tests below type what an administrator types.
type machine struct {
	*testing.T            // of the subtest that runs
	whole      *testing.T // of which it is one
	bin, state string
	base       int // of the ports
	dev        *exec.Cmd
	out        *bytes.Buffer
	password   string
}

func startMachine(t *testing.T, base int) *machine {
	dir := shortDir(t)
	m := &machine{T: t, whole: t, bin: binary(t), state: filepath.Join(dir, "s"), base: base}
	m.start()
	m.login()
	m.must("provider", "add", "kms1", fmt.Sprintf("127.0.0.1:%d", base+2))
	m.must("provider", "trust", "kms1", "--yes", "--kms-admin-socket", m.socket("kms"))
	m.must("provider", "default", "kms1")
	return m
}

func (m *machine) start() {
	m.Helper()
	m.out = &bytes.Buffer{}
	m.dev = exec.Command(m.bin, "dev", "--hosts", "1", "--state-dir", m.state,
		"--listen", fmt.Sprintf("127.0.0.1:%d", m.base), "--join-listen", fmt.Sprintf("127.0.0.1:%d", m.base+1),
		"--kmip-listen", fmt.Sprintf("127.0.0.1:%d", m.base+2), "--host-port", strconv.Itoa(m.base+3))
	m.dev.Stdout, m.dev.Stderr = m.out, m.out
	if err := m.dev.Start(); err != nil {
		m.Fatal(err)
	}
	cmd := m.dev
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	m.whole.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
		case <-time.After(90 * time.Second):
			m.whole.Error("mortise dev does not end on Ctrl-C")
			_ = cmd.Process.Kill()
		}
		if m.whole.Failed() {
			logs, _ := filepath.Glob(filepath.Join(m.state, "logs", "*.log"))
			for _, l := range logs {
				text, _ := os.ReadFile(l)
				m.whole.Logf("%s:\n%s", filepath.Base(l), text[max(0, len(text)-3000):])
			}
		}
	})
	for deadline := time.Now().Add(3 * time.Minute); !strings.Contains(m.out.String(), "Ctrl-C stops everything"); time.Sleep(100 * time.Millisecond) {
		select {
		case err := <-ended:
			m.Fatalf("mortise dev ended: %v\n%s", err, m.out)
		default:
		}
		if time.Now().After(deadline) {
			m.Fatalf("mortise dev does not start\n%s", m.out)
		}
	}
	if p := regexp.MustCompile(`password +(\S+) +\(shown`).FindStringSubmatch(m.out.String()); p != nil {
		m.password = p[1]
	}
}

// stop is Ctrl-C.
func (m *machine) stop() {
	m.Helper()
	if err := m.dev.Process.Signal(os.Interrupt); err != nil {
		m.Fatal(err)
	}
	for deadline := time.Now().Add(90 * time.Second); m.dev.ProcessState == nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.Fatal("mortise dev does not end on Ctrl-C")
		}
	}
}

func (m *machine) login() {
	m.Helper()
	m.must("login", fmt.Sprintf("https://127.0.0.1:%d", m.base), "--thumbprint", m.thumbprint())
}

func (m *machine) thumbprint() string {
	return regexp.MustCompile(`thumbprint +(\S+)`).FindStringSubmatch(m.out.String())[1]
}

func (m *machine) socket(role string) string {
	s := regexp.MustCompile(`\S+/` + role + `\.sock`).FindString(m.out.String())
	if s == "" {
		m.Fatalf("no admin socket of %s in\n%s", role, m.out)
	}
	return s
}

// run is a client verb.
func (m *machine) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(m.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, m.bin, args...)
	cmd.Env = append(os.Environ(), "MORTISE_CONFIG="+filepath.Join(filepath.Dir(m.state), "client"), "MORTISE_PASSWORD="+m.password)
	text, err := cmd.CombinedOutput()
	return string(text), err
}

func (m *machine) must(args ...string) string {
	m.Helper()
	out, err := m.run(args...)
	if err != nil {
		m.Fatalf("mortise %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// refused runs a verb that must fail with an error that says want.
func (m *machine) refused(want string, args ...string) {
	m.Helper()
	out, err := m.run(args...)
	if err == nil {
		m.Errorf("mortise %s was allowed:\n%s", strings.Join(args, " "), out)
	} else if !regexp.MustCompile("(?i)" + want).MatchString(out) {
		m.Errorf("mortise %s: the error does not say %q:\n%s", strings.Join(args, " "), want, out)
	}
}

func (m *machine) pid(role string) int {
	m.Helper()
	text, err := os.ReadFile(filepath.Join(m.state, "logs", role+".pid"))
	if err != nil {
		m.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		m.Fatal(err)
	}
	return pid
}

// kill is kill -9, and waits until the role is another process and back.
func (m *machine) kill(role string) {
	m.Helper()
	old := m.pid(role)
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		m.Fatal(err)
	}
	m.eventually(role+" is back", func() error {
		if m.pid(role) == old {
			return errors.New("not started again")
		}
		return nil
	})
}

// hold stops a role and keeps it down until release.
func (m *machine) hold(role string) (release func()) {
	m.Helper()
	file := filepath.Join(m.state, "logs", role+".hold")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		m.Fatal(err)
	}
	if err := syscall.Kill(m.pid(role), syscall.SIGKILL); err != nil {
		m.Fatal(err)
	}
	return func() {
		old := m.pid(role)
		if err := os.Remove(file); err != nil {
			m.Fatal(err)
		}
		m.eventually(role+" is back", func() error {
			if m.pid(role) == old {
				return errors.New("not started again")
			}
			return nil
		})
	}
}

func (m *machine) eventually(what string, f func() error) {
	m.Helper()
	deadline := time.Now().Add(45 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			m.Fatalf("%s: %v", what, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// image makes a raw file of random data, zeros and holes.
func (m *machine) image(mib int) (path, sum string) {
	m.Helper()
	path = filepath.Join(filepath.Dir(m.state), fmt.Sprintf("disk%d.raw", mib))
	data := make([]byte, mib<<20)
	rand.Read(data[:mib<<20*3/4])
	copy(data[1<<20:], bytes.Repeat([]byte("KNOWN-PLAINTEXT-OF-A-SYSTEM-TEST"), 1000))
	if err := os.WriteFile(path, data, 0o600); err != nil {
		m.Fatal(err)
	}
	s := sha256.Sum256(data)
	return path, hex.EncodeToString(s[:])
}

// content is the hash of a VM's decrypted disk as qemu-img reads it.
func (m *machine) content(vm string) string {
	m.Helper()
	raw := filepath.Join(filepath.Dir(m.state), "back.raw")
	if out, err := exec.Command("qemu-img", "convert", "-O", "raw", filepath.Join(m.state, "datastore1", vm, vm+".vmdk"), raw).CombinedOutput(); err != nil {
		m.Fatalf("qemu-img: %v\n%s", err, out)
	}
	data, err := os.ReadFile(raw)
	if err != nil {
		m.Fatal(err)
	}
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

func (m *machine) leaks(needle []byte) (where []string) {
	m.Helper()
	err := filepath.WalkDir(m.state, func(name string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // sockets, and files that went away meanwhile
		}
		text, rerr := os.ReadFile(name)
		if rerr == nil && bytes.Contains(text, needle) {
			where = append(where, name)
		}
		return nil
	})
	if err != nil {
		m.Fatal(err)
	}
	return where
}

// keyServer makes the test a client of the key server of its own: it must know
// the bytes that it looks for, and revoke what center may not.
func (m *machine) keyServer() *kmipc.Client {
	m.Helper()
	cert, key, err := pki.NewKMIPClient(time.Hour, time.Now())
	if err != nil {
		m.Fatal(err)
	}
	file := filepath.Join(filepath.Dir(m.state), "tester.pem")
	if err := pki.SaveCertificates(file, cert); err != nil {
		m.Fatal(err)
	}
	m.must("kms", "client", "add", file, "--name", "tester", "--role", "administrator", "--admin-socket", m.socket("kms"))
	address := fmt.Sprintf("127.0.0.1:%d", m.base+2)
	chain, _, err := kmipc.FetchServerCertificate(m.Context(), address)
	if err != nil {
		m.Fatal(err)
	}
	c, err := kmipc.New(kmipc.Config{
		Endpoints:   []kmipc.Endpoint{{Name: "kms", Address: address, Pins: [][32]byte{pki.Fingerprint(chain[0])}}},
		Certificate: tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert},
	})
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(c.Close)
	return c
}

// TestSystem drives a whole Mortise through its main job and the faults that the
// main job must survive, as its administrator would see them.
func TestSystem(t *testing.T) {
	t.Parallel()
	m := startMachine(t, 19443)
	raw, want := m.image(256)

	// Helpers fail the test that they are called in.
	run := func(name string, f func(t *testing.T)) {
		ok := m.whole.Run(name, func(t *testing.T) { m.T = t; f(t) })
		if m.T = m.whole; !ok {
			m.FailNow() // what follows builds on it
		}
	}

	run("wrong password", func(t *testing.T) {
		good := m.password
		m.password = "wrong"
		defer func() { m.password = good }()
		m.refused("password|user name", "login", fmt.Sprintf("https://127.0.0.1:%d", m.base), "--thumbprint", m.thumbprint())
	})
	m.must("vm", "import", raw, "--name", "data")
	if len(m.leaks([]byte("KNOWN-PLAINTEXT-OF-A-SYSTEM-TEST"))) == 0 {
		t.Fatal("the plaintext is not where the test looks for it")
	}

	run("KMS down at encrypt", func(t *testing.T) {
		release := m.hold("kms")
		m.refused("kms1|key server|reach", "vm", "encrypt", "data")
		release()
		m.eventually("the key server answers", func() error {
			out, err := m.run("provider", "status", "kms1")
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		if got := m.content("data"); got != want {
			t.Error("a refused encryption changed the disk")
		}
	})

	run("killed while encrypting", func(t *testing.T) {
		m.must("vm", "encrypt", "data", "--detach")
		for _, role := range []string{"center", "esx1", "vmx", "center"} {
			time.Sleep(150 * time.Millisecond)
			if role == "vmx" {
				m.killVMX()
			} else {
				m.kill(role)
			}
		}
		// Sessions end with the process that holds them.
		m.eventually("center answers", func() error {
			out, err := m.run("login", fmt.Sprintf("https://127.0.0.1:%d", m.base), "--thumbprint", m.thumbprint())
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		m.eventually("the encryption is finished by whoever took over", func() error { return m.encrypted("data", true) })
		if where := m.leaks([]byte("KNOWN-PLAINTEXT-OF-A-SYSTEM-TEST")); len(where) > 0 {
			t.Errorf("plaintext is still in %v", where)
		}
	})

	run("no key on any disk", func(t *testing.T) {
		kms := m.keyServer()
		k, err := kms.Get(m.Context(), m.keyOf("data"))
		if err != nil {
			t.Fatal(err)
		}
		defer k.Wipe()
		k.Use(func(b []byte) {
			for _, form := range [][]byte{b, []byte(hex.EncodeToString(b)), []byte(base64.StdEncoding.EncodeToString(b)), []byte(base64.RawURLEncoding.EncodeToString(b))} {
				if where := m.leaks(form); len(where) > 0 {
					t.Errorf("the KEK is in %v", where)
				}
			}
		})
	})

	run("power on", func(t *testing.T) {
		m.must("vm", "power", "on", "data")
		m.refused("powered on|already", "vm", "power", "on", "data")
		m.must("vm", "power", "off", "data")
	})

	run("second start resumes the same state", func(t *testing.T) {
		m.stop()
		m.start()
		m.login()
		if err := m.encrypted("data", true); err != nil {
			t.Fatal(err)
		}
		m.must("vm", "power", "on", "data")
		m.must("vm", "power", "off", "data")
	})

	run("key revoked before power-on", func(t *testing.T) {
		m.must("vm", "create", "victim", "--disk", "16M", "--policy", "VM Encryption Policy")
		id := m.keyOf("victim")
		kms := m.keyServer()
		if err := kms.Revoke(m.Context(), id, true); err != nil {
			t.Fatal(err)
		}
		// The host that held the key forgets it with its process.
		m.kill("esx1")
		m.eventually("the VM is locked and says why", func() error {
			out, err := m.run("vm", "power", "on", "victim")
			if err == nil {
				_, _ = m.run("vm", "power", "off", "victim")
				return errors.New("it was powered on with a revoked key")
			}
			if !strings.Contains(strings.ToLower(out), "compromised") {
				return fmt.Errorf("the error does not name the key's state: %s", out)
			}
			return nil
		})
		if out := m.must("vm", "info", "victim"); !strings.Contains(strings.ToLower(out), "locked") {
			t.Errorf("vm info does not say that it is locked:\n%s", out)
		}
	})

	run("snapshots of a running VM, and back", func(t *testing.T) {
		m.must("vm", "power", "on", "data")
		m.must("vm", "snapshot", "create", "data", "before")
		m.must("vm", "recrypt", "data")
		m.must("vm", "snapshot", "create", "data", "after")
		if out := m.must("vm", "snapshot", "ls", "data"); !strings.Contains(out, "before") || !strings.Contains(out, "after") {
			t.Errorf("snapshots:\n%s", out)
		}
		m.must("vm", "snapshot", "revert", "data", "before", "--yes")
		m.refused("powered off|already", "vm", "power", "off", "data")
		m.must("vm", "snapshot", "create", "data", "another way")
		m.must("vm", "power", "on", "data")
		m.must("vm", "snapshot", "delete", "data", "--all")
		if out := m.must("vm", "info", "data"); strings.Contains(strings.ToLower(out), "consolidat") {
			t.Errorf("links are left:\n%s", out)
		}
		m.must("vm", "power", "off", "data")
	})

	run("decrypt, and every byte is there", func(t *testing.T) {
		m.must("vm", "recrypt", "data", "--deep")
		m.must("vm", "decrypt", "data")
		if got := m.content("data"); got != want {
			t.Error("the content is another")
		}
	})
}

// killVMX kills the process that holds the VM's keys, if there is one now.
func (m *machine) killVMX() {
	m.Helper()
	entries, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, e := range entries {
		text, err := os.ReadFile(e)
		if err == nil && bytes.HasPrefix(text, []byte(m.bin+"\x00vmx\x00")) && bytes.Contains(text, []byte(m.state)) {
			if pid, err := strconv.Atoi(strings.Split(e, "/")[2]); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

func (m *machine) encrypted(vm string, want bool) error {
	out, err := m.run("vm", "info", vm, "--json")
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	type crypto struct {
		Encrypted  bool `json:"encrypted"`
		Converting any  `json:"converting"`
	}
	var info struct {
		Files crypto `json:"files"`
		Disks []struct {
			Crypto crypto `json:"crypto"`
		} `json:"disks"`
	}
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if info.Files.Encrypted != want || len(info.Disks) == 0 {
		return fmt.Errorf("encrypted %v: %s", info.Files.Encrypted, out)
	}
	for _, d := range info.Disks {
		if d.Crypto.Encrypted != want || d.Crypto.Converting != nil {
			return fmt.Errorf("disk: %s", out)
		}
	}
	return nil
}

// keyOf is the id of the KEK that a VM's descriptor names.
func (m *machine) keyOf(vm string) string {
	m.Helper()
	text, err := os.ReadFile(filepath.Join(m.state, "datastore1", vm, vm+".vmdk"))
	if err != nil {
		m.Fatal(err)
	}
	id := regexp.MustCompile(`fqid/kms1/([^,]+),`).FindSubmatch(text)
	if id == nil {
		m.Fatalf("no key in\n%s", text)
	}
	return string(id[1])
}
