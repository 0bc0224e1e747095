package vmx

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"mortise/internal/hostapi"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vmfiles"
	"mortise/internal/vmxfile"
)

// The process under test is this binary again: a vmx confines itself for good.
const (
	actAsVMX   = "MORTISE_TEST_VMX"
	withDirect = "MORTISE_TEST_DIRECT"
)

func TestMain(m *testing.M) {
	if os.Getenv(actAsVMX) != "" {
		cfg := Config{VMX: os.Args[1], RunDir: os.Args[2], Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), at: steps(os.Args[2]), Direct: os.Getenv(withDirect) != ""}
		if at := cfg.at; os.Getenv(alsoInDisks) != "" {
			cfg.diskStep = func(step string) { at("disk/" + step) }
		}
		if err := errors.Join(secret.LockDown(), Run(context.Background(), cfg)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A lab is a datastore with one VM's folder and the KEKs that a host would have.
type lab struct {
	*testing.T
	path string // of the VMX
	vm   uuid.UUID
	disk uuid.UUID
	keks map[string][]byte
	kill string // the step at which its processes kill themselves; see killAt

	inDisks bool // the disks' own steps count as well
}

const diskSize = 24 << 20

func newLab(t *testing.T) *lab {
	dir := filepath.Join(t.TempDir(), "web1")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return &lab{T: t, path: filepath.Join(dir, "web1.vmx"), vm: uuid.New(), disk: uuid.New(), keks: map[string][]byte{}}
}

func (l *lab) key(name string) *hostapi.KeyID {
	if l.keks[name] == nil {
		k := make([]byte, keysafe.KEKSize)
		rand.Read(k)
		l.keks[name] = k
	}
	return &hostapi.KeyID{Provider: "kms", Key: name}
}

// send copies the keys for a message, which is cleared by whoever reads it.
func (l *lab) send() (out []*hostapi.KEK) {
	for name, k := range l.keks {
		out = append(out, &hostapi.KEK{Id: l.key(name), Bytes: bytes.Clone(k)})
	}
	return out
}

func (l *lab) ref() *hostapi.VMRef { return &hostapi.VMRef{Uuid: l.vm.String()} }

type proc struct {
	hostapi.VMXClient
	cmd  *exec.Cmd
	log  *bytes.Buffer
	run  string
	done chan error
}

// start runs a vmx for the lab's VM.
func (l *lab) start() *proc {
	l.Helper()
	run, err := os.MkdirTemp("", "vmx")
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() {
		_ = syscall.Unmount(filepath.Join(run, guestDir, filesDir), syscall.MNT_DETACH)
		os.RemoveAll(run)
	})
	return l.startIn(run)
}

// startIn runs a vmx in a run folder that there is.
func (l *lab) startIn(run string) *proc {
	l.Helper()
	p := &proc{cmd: exec.Command(os.Args[0], l.path, run), log: &bytes.Buffer{}, run: run, done: make(chan error, 1)}
	_ = os.Remove(filepath.Join(run, controlSocket)) // of the process before
	p.cmd.Env = append(os.Environ(), actAsVMX+"=1", "GORACE=atexit_sleep_ms=0")
	if l.kill != "" {
		p.cmd.Env = append(p.cmd.Env, killAt+"="+l.kill)
		if l.inDisks {
			p.cmd.Env = append(p.cmd.Env, alsoInDisks+"=1")
		}
	}
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		l.Fatal(err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	l.Cleanup(func() { p.cmd.Process.Kill() })
	sock := filepath.Join(run, controlSocket)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		if c, err := net.Dial("unix", sock); err == nil {
			c.Close()
			break
		} else if time.Now().After(deadline) {
			l.Fatalf("vmx does not start: %v\n%s", err, p.log)
		}
	}
	conn, err := grpc.NewClient("unix:"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { conn.Close() })
	p.VMXClient = hostapi.NewVMXClient(conn)
	return p
}

func (l *lab) stop(p *proc) {
	l.Helper()
	if _, err := p.Close(l.Context(), &hostapi.CloseRequest{}); err != nil {
		l.Fatalf("close: %v\n%s", err, p.log)
	}
	select {
	case <-p.done:
	case <-time.After(20 * time.Second):
		l.Fatalf("vmx does not end\n%s", p.log)
	}
}

// create makes the VM with one disk; keys may be nil.
func (l *lab) create(home, disk *hostapi.KeyID) *hostapi.VMInfo {
	l.Helper()
	p := l.start()
	defer l.stop(p)
	info, err := p.Create(l.Context(), &hostapi.VMXCreateRequest{Keys: l.send(), Vm: &hostapi.CreateVMRequest{
		Uuid: l.vm.String(), Name: "web1", HomeKey: home,
		Hardware: &hostapi.Hardware{MemoryMib: 512, Cpus: 2, Firmware: "efi", Nics: []*hostapi.NIC{{Network: "default"}}},
		Disks:    []*hostapi.NewDisk{{Uuid: l.disk.String(), CapacityBytes: diskSize, KeyId: disk}},
	}})
	if err != nil {
		l.Fatalf("create: %v\n%s", err, p.log)
	}
	return info
}

// content is what the tests put on a disk: data, zeros, holes.
func content() []byte {
	data := make([]byte, diskSize)
	r := mrand.NewChaCha8([32]byte{1})
	r.Read(data[:6<<20])
	copy(data[9<<20:], bytes.Repeat([]byte("MORTISE-KNOWN-PLAINTEXT "), 4096))
	r.Read(data[20<<20 : 23<<20])
	return data
}

// fill writes the content through an import, holes left out.
func (l *lab) fill(data []byte) {
	l.Helper()
	p := l.start()
	defer l.stop(p)
	if _, err := p.Open(l.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send()}); err != nil {
		l.Fatalf("open: %v\n%s", err, p.log)
	}
	s, err := p.ImportDisk(l.Context())
	if err != nil {
		l.Fatal(err)
	}
	const chunk = 1 << 20
	if err := s.Send(&hostapi.ImportChunk{Ref: l.ref(), DiskUuid: l.disk.String()}); err != nil {
		l.Fatal(err)
	}
	for off := 0; off < len(data); off += chunk {
		if piece := data[off : off+chunk]; len(bytes.Trim(piece, "\x00")) > 0 {
			if err := s.Send(&hostapi.ImportChunk{Offset: int64(off), Data: piece}); err != nil {
				break
			}
		}
	}
	if _, err := s.CloseAndRecv(); err != nil {
		l.Fatalf("import: %v\n%s", err, p.log)
	}
}

// read serves the disk as for a guest and reads it through NBD.
func (l *lab) read() []byte {
	l.Helper()
	p := l.start()
	defer l.stop(p)
	st, err := p.Open(l.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
	if err != nil {
		l.Fatalf("open: %v\n%s", err, p.log)
	}
	out := filepath.Join(l.TempDir(), "out")
	if text, err := exec.Command("nbdcopy", "nbd+unix:///?socket="+st.Disks[0].NbdSocket, out).CombinedOutput(); err != nil {
		l.Fatalf("nbdcopy (Debian package libnbd-bin): %v\n%s\n%s", err, text, p.log)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		l.Fatal(err)
	}
	return data
}

func (l *lab) change(home hostapi.CryptoChange_Kind, disk hostapi.CryptoChange_Kind, key *hostapi.KeyID) *hostapi.ReconfigureVMRequest {
	r := &hostapi.ReconfigureVMRequest{Ref: l.ref(), Home: &hostapi.CryptoChange{Kind: home, Key: key}}
	if disk != hostapi.CryptoChange_NONE {
		r.Disks = []*hostapi.DiskCryptoChange{{DiskUuid: l.disk.String(), Change: &hostapi.CryptoChange{Kind: disk, Key: key}}}
	}
	return r
}

// reconfigure runs a change to its end or returns its error.
func (l *lab) reconfigure(p *proc, r *hostapi.ReconfigureVMRequest) (*hostapi.VMInfo, error) {
	s, err := p.Reconfigure(l.Context(), &hostapi.VMXReconfigureRequest{Change: r, Keys: l.send()})
	if err != nil {
		return nil, err
	}
	var info *hostapi.VMInfo
	for {
		u, err := s.Recv()
		if err == io.EOF {
			return info, nil
		}
		if err != nil {
			return nil, err
		}
		info = u.Result
	}
}

func (l *lab) must(r *hostapi.ReconfigureVMRequest) *hostapi.VMInfo {
	l.Helper()
	p := l.start()
	defer l.stop(p)
	info, err := l.reconfigure(p, r)
	if err != nil {
		l.Fatalf("%v\n%s", err, p.log)
	}
	return info
}

// onDatastore says whether a byte string is anywhere in the VM's folder.
func (l *lab) onDatastore(needle []byte) bool {
	found := false
	err := filepath.Walk(filepath.Dir(l.path), func(name string, st os.FileInfo, err error) error {
		if err != nil || !st.Mode().IsRegular() {
			return err
		}
		text, err := os.ReadFile(name)
		found = found || bytes.Contains(text, needle)
		return err
	})
	if err != nil {
		l.Fatal(err)
	}
	return found
}

const (
	none    = hostapi.CryptoChange_NONE
	encrypt = hostapi.CryptoChange_ENCRYPT
	decrypt = hostapi.CryptoChange_DECRYPT
	shallow = hostapi.CryptoChange_SHALLOW_RECRYPT
	deep    = hostapi.CryptoChange_DEEP_RECRYPT
)

// TestLife takes a VM through every change (E7, R1, R2): what it reads is the same
// in every form, and no plaintext or key is on the datastore while it is encrypted.
func TestLife(t *testing.T) {
	l := newLab(t)
	l.create(nil, nil)
	data := content()
	l.fill(data)
	nvram := filepath.Join(filepath.Dir(l.path), "web1.nvram")
	firmware := bytes.Repeat([]byte("FIRMWARE-VARIABLE "), 3000)
	if err := os.WriteFile(nvram, firmware, 0o600); err != nil {
		t.Fatal(err)
	}
	plain := []byte("MORTISE-KNOWN-PLAINTEXT")
	if !l.onDatastore(plain) {
		t.Fatal("the plaintext is not where the test looks for it")
	}

	check := func(step, key string, info *hostapi.VMInfo) {
		t.Helper()
		encrypted := key != ""
		if info.Encrypted != encrypted || info.Disks[0].Encrypted != encrypted || info.Disks[0].Conversion != "" {
			t.Errorf("%s: VM encrypted %v, disk %v, converting %q", step, info.Encrypted, info.Disks[0].Encrypted, info.Disks[0].Conversion)
		}
		if encrypted && (info.Key.Key != key || info.Disks[0].KeyId.Key != key) {
			t.Errorf("%s: keys %v and %v, want %s", step, info.Key, info.Disks[0].KeyId, key)
		}
		if encrypted && (l.onDatastore(plain) || l.onDatastore([]byte("FIRMWARE-VARIABLE"))) {
			t.Errorf("%s: plaintext is on the datastore", step)
		}
		for name, k := range l.keks {
			if l.onDatastore(k) {
				t.Errorf("%s: key %s is on the datastore", step, name)
			}
		}
		if got := l.read(); !bytes.Equal(got, data) {
			t.Errorf("%s: the disk reads otherwise than it was written", step)
		}
	}
	check("encrypt", "k1", l.must(l.change(encrypt, encrypt, l.key("k1"))))
	check("shallow recrypt", "k2", l.must(l.change(shallow, shallow, l.key("k2"))))
	delete(l.keks, "k1")
	check("deep recrypt", "k3", l.must(l.change(deep, deep, l.key("k3"))))
	delete(l.keks, "k2")
	check("again, without the old keys", "k3", l.must(l.change(none, none, nil)))

	// The firmware's variables in clear, for its QEMU only.
	p := l.start()
	st, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
	if err != nil {
		t.Fatalf("%v\n%s", err, p.log)
	}
	if got, err := os.ReadFile(st.NvramPath); err != nil || !bytes.Equal(got, firmware) {
		t.Errorf("the view shows %d bytes of the firmware's %d: %v", len(got), len(firmware), err)
	}
	// A shallow recrypt under the guest (R1).
	if _, err := l.reconfigure(p, l.change(shallow, shallow, l.key("k4"))); err != nil {
		t.Errorf("shallow recrypt of a served VM: %v", err)
	}
	// And the disk alone takes another key under it (R2).
	if _, err := l.reconfigure(p, l.change(none, deep, l.key("k5"))); err != nil {
		t.Errorf("deep recrypt of a served disk: %v", err)
	}
	l.stop(p)
	delete(l.keks, "k3")

	check("decrypt", "", l.must(l.change(decrypt, decrypt, nil)))
	if got, err := os.ReadFile(nvram); err != nil || !bytes.Equal(got, firmware) {
		t.Errorf("nvram is not as it was: %v", err)
	}
	raw := filepath.Join(t.TempDir(), "raw")
	if out, err := exec.Command("qemu-img", "convert", "-O", "raw", filepath.Join(filepath.Dir(l.path), "web1.vmdk"), raw).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img does not open the decrypted disk: %v\n%s", err, out)
	}
	got, err := os.ReadFile(raw)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
		t.Errorf("qemu-img reads other content: %v", err)
	}
}

// TestKilledConversions kills the process at random instants of every conversion
// and repeats the same request, as center does, until it is through (R4).
func TestKilledConversions(t *testing.T) {
	l := newLab(t)
	l.create(nil, nil)
	data := content()
	l.fill(data)
	if err := os.WriteFile(filepath.Join(filepath.Dir(l.path), "web1.nvram"), []byte("variables"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := mrand.New(mrand.NewPCG(1, 2))
	kills := 0
	for i, c := range []*hostapi.ReconfigureVMRequest{
		l.change(encrypt, encrypt, l.key("k1")), l.change(shallow, shallow, l.key("k2")),
		l.change(deep, deep, l.key("k3")), l.change(decrypt, decrypt, nil),
	} {
		for try := 0; ; try++ {
			if try > 60 {
				t.Fatalf("change %d does not end", i)
			}
			p := l.start()
			wait := time.Duration(r.IntN(40_000)) * time.Microsecond
			if try > 12 {
				wait = time.Minute // it must get through at last
			}
			timer := time.AfterFunc(wait, func() { p.cmd.Process.Kill() })
			_, err := l.reconfigure(p, c)
			killed := !timer.Stop()
			if err == nil && !killed {
				l.stop(p)
				break
			}
			if err != nil && !killed {
				t.Fatalf("change %d, try %d: %v\n%s", i, try, err, p.log)
			}
			kills++
			<-p.done
		}
		if got := l.read(); !bytes.Equal(got, data) {
			t.Fatalf("change %d: after kills the disk reads otherwise", i)
		}
	}
	if kills < 4 {
		t.Errorf("only %d kills: the test does not test", kills)
	}
	if got, err := os.ReadFile(filepath.Join(filepath.Dir(l.path), "web1.nvram")); err != nil || string(got) != "variables" {
		t.Errorf("nvram: %q, %v", got, err)
	}
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(l.path), "*.new-*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestTampering checks E8: no edit of files turns encryption off, and each is
// told apart.
func TestTampering(t *testing.T) {
	for _, c := range []struct {
		name   string
		edit   func(l *lab, dir string) error
		expect func(l *lab) *hostapi.Expect
		want   string
	}{
		{name: "bundle deleted", want: "encryption.keySafe", edit: func(l *lab, dir string) error {
			return vmxfile.Update(l.path, func(f *vmxfile.File) error { keysafe.RemoveBundle(f); return nil })
		}},
		{name: "one line of the bundle deleted", want: "encryption.data", edit: func(l *lab, dir string) error {
			return vmxfile.Update(l.path, func(f *vmxfile.File) error { f.Delete("encryption.data"); return nil })
		}},
		{name: "older bundle", want: "older", expect: func(l *lab) *hostapi.Expect {
			e := l.expect()
			e.Epoch += 5
			return e
		}},
		{name: "disk replaced by one in clear", want: "does not know", edit: func(l *lab, dir string) error {
			for _, n := range []string{"web1.vmdk", "web1-flat.vmdk", "web1-flat.vmdk.state"} {
				if err := os.Remove(filepath.Join(dir, n)); err != nil {
					return err
				}
			}
			return exec.Command("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", filepath.Join(dir, "web1.vmdk"), "24M").Run()
		}},
		{name: "descriptor's key safe deleted", want: "restore", edit: func(l *lab, dir string) error {
			return editLines(filepath.Join(dir, "web1.vmdk"), func(s string) string {
				if strings.HasPrefix(s, "encryption.") {
					return ""
				}
				return s
			})
		}},
		{name: "descriptor made to look plain", want: "encrypted", edit: func(l *lab, dir string) error {
			return editLines(filepath.Join(dir, "web1.vmdk"), func(s string) string {
				if strings.HasPrefix(s, "encryption.") {
					return ""
				}
				return strings.NewReplacer("mortiseFlat", "monolithicFlat", "XTSFLAT", "FLAT").Replace(s)
			})
		}},
		{name: "folder of another VM", want: "not of", edit: func(l *lab, dir string) error {
			l.vm = uuid.New()
			return nil
		}},
		{name: "disk taken out of the VMX", want: "which center's inventory knows", edit: func(l *lab, dir string) error {
			return vmxfile.Update(l.path, func(f *vmxfile.File) error { removeDisk(f, "scsi0:0"); return nil })
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			l.create(l.key("k1"), l.key("k1"))
			ref := l.ref()
			ref.Expect = l.expect()
			if c.expect != nil {
				ref.Expect = c.expect(l)
			}
			if c.edit != nil {
				if err := c.edit(l, filepath.Dir(l.path)); err != nil {
					t.Fatal(err)
				}
				ref.Uuid = l.vm.String()
			}
			p := l.start()
			_, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: ref, Keys: l.send(), Serve: true})
			if err == nil {
				t.Fatal("the VM was opened")
			}
			f, text := hostapi.AsFault(err)
			if f.Kind != hostapi.Fault_TAMPERED || !strings.Contains(text, c.want) {
				t.Errorf("kind %v, error %q; want TAMPERED and %q", f.Kind, text, c.want)
			}
			l.stop(p)
		})
	}
}

// expect is what center would know of the VM as it is.
func (l *lab) expect() *hostapi.Expect {
	info, err := Inspect(l.path)
	if err != nil {
		l.Fatal(err)
	}
	e := &hostapi.Expect{Encrypted: info.Encrypted, Epoch: info.Epoch}
	for _, d := range info.Disks {
		e.Disks = append(e.Disks, &hostapi.DiskExpect{Uuid: d.Uuid, Encrypted: d.Encrypted, Epoch: d.Epoch})
	}
	return e
}

func editLines(file string, edit func(string) string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var out []string
	for _, s := range strings.SplitAfter(string(text), "\n") {
		out = append(out, edit(s))
	}
	return os.WriteFile(file, []byte(strings.Join(out, "")), 0o600)
}

// TestRefused lists what is refused before anything is changed.
func TestRefused(t *testing.T) {
	l := newLab(t)
	l.create(l.key("k1"), l.key("k1"))
	before := l.tree()
	for _, c := range []struct {
		name string
		r    *hostapi.ReconfigureVMRequest
		kind hostapi.Fault_Kind
		want string
	}{
		{"VM files in clear under an encrypted disk", l.change(decrypt, none, nil), hostapi.Fault_INVALID, "E6"},
		{"encrypt what is encrypted", l.change(encrypt, none, l.key("k2")), hostapi.Fault_INVALID, "already"},
		{"key that the host lacks", l.change(shallow, none, &hostapi.KeyID{Provider: "kms", Key: "nowhere"}), hostapi.Fault_MISSING_KEYS, "nowhere"},
		{"unknown disk", &hostapi.ReconfigureVMRequest{Ref: l.ref(), Disks: []*hostapi.DiskCryptoChange{{DiskUuid: uuid.NewString(), Change: &hostapi.CryptoChange{Kind: decrypt}}}}, hostapi.Fault_NOT_FOUND, "no disk"},
		{"too much memory", &hostapi.ReconfigureVMRequest{Ref: l.ref(), Hardware: &hostapi.Hardware{MemoryMib: 1 << 50}}, hostapi.Fault_INVALID, "memory"},
	} {
		p := l.start()
		_, err := l.reconfigure(p, c.r)
		if err == nil {
			t.Fatalf("%s: allowed", c.name)
		}
		if f, text := hostapi.AsFault(err); f.Kind != c.kind || !strings.Contains(text, c.want) {
			t.Errorf("%s: kind %v, %q; want %v and %q", c.name, f.Kind, text, c.kind, c.want)
		}
		l.stop(p)
	}
	if after := l.tree(); after != before {
		t.Errorf("a refused change changed files:\n%s\nbefore:\n%s", after, before)
	}
}

// tree is every file of the VM with its hash; state files count openings.
func (l *lab) tree() string {
	var b strings.Builder
	entries, err := os.ReadDir(filepath.Dir(l.path))
	if err != nil {
		l.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".state") || strings.HasSuffix(e.Name(), vmxfile.LockSuffix) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(filepath.Dir(l.path), e.Name()))
		if err != nil {
			l.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %x\n", e.Name(), sha256.Sum256(text))
	}
	return b.String()
}

// TestAttachedDisks: a disk in clear joins and leaves a VM; one that is encrypted
// joins neither a VM in clear (E6) nor another VM (E8).
func TestAttachedDisks(t *testing.T) {
	other := newLab(t)
	other.create(other.key("k1"), other.key("k1"))
	for _, c := range []struct {
		name string
		home bool
		kind hostapi.Fault_Kind
		want string
	}{
		{"VM in clear", false, hostapi.Fault_INVALID, "E6"},
		{"another encrypted VM", true, hostapi.Fault_TAMPERED, "another disk or VM"},
	} {
		l := newLab(t)
		l.keks = other.keks
		var home *hostapi.KeyID
		if c.home {
			home = l.key("k1")
		}
		l.create(home, home)
		dir := filepath.Dir(l.path)
		text, err := os.ReadFile(filepath.Join(filepath.Dir(other.path), "web1.vmdk"))
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.ReplaceAll(text, []byte("web1-flat"), []byte("stolen-flat"))
		for name, b := range map[string][]byte{"stolen.vmdk": text} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range []string{"-flat.vmdk", "-flat.vmdk.state"} {
			b, err := os.ReadFile(filepath.Join(filepath.Dir(other.path), "web1"+s))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "stolen"+s), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p := l.start()
		_, err = l.reconfigure(p, &hostapi.ReconfigureVMRequest{Ref: l.ref(), AttachDisks: []*hostapi.AttachDisk{{Path: "web1/stolen.vmdk"}}})
		if err == nil {
			t.Fatalf("%s: the disk was attached", c.name)
		}
		if f, text := hostapi.AsFault(err); f.Kind != c.kind || !strings.Contains(text, c.want) {
			t.Errorf("%s: kind %v, %q; want %v and %q", c.name, f.Kind, text, c.kind, c.want)
		}
		l.stop(p)

		// A new disk, encrypted where the VM is, comes and goes.
		id := uuid.NewString()
		info := l.must(&hostapi.ReconfigureVMRequest{Ref: l.ref(), AddDisks: []*hostapi.NewDisk{{Uuid: id, CapacityBytes: 1 << 20, KeyId: home, Thick: c.home}}})
		if len(info.Disks) != 2 || info.Disks[1].Encrypted != c.home || info.Disks[1].Thick != c.home || info.Disks[1].AllocatedBytes >= 1<<20 != c.home {
			t.Errorf("%s: after adding a disk: %v", c.name, info.Disks)
		}
		if info = l.must(&hostapi.ReconfigureVMRequest{Ref: l.ref(), RemoveDiskUuids: []string{id}, DeleteRemoved: true}); len(info.Disks) != 1 {
			t.Errorf("%s: after removing it: %v", c.name, info.Disks)
		}
		if _, err := os.Stat(filepath.Join(dir, info.Disks[0].Path)); err != nil {
			t.Error(err)
		}
	}
}

// TestDirect: round the page cache if the host is told so, and not otherwise.
func TestDirect(t *testing.T) {
	l := newLab(t)
	l.create(l.key("k1"), l.key("k1"))
	for _, want := range []bool{true, false} {
		if want {
			t.Setenv(withDirect, "1")
		} else {
			os.Unsetenv(withDirect)
		}
		p := l.start()
		_, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
		if err != nil && strings.Contains(err.Error(), "no direct I/O") {
			t.Skipf("the folder for tests cannot: %v", err)
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, p.log)
		}
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.cmd.Process.Pid))
		found := false
		for _, fd := range fds {
			if name, _ := os.Readlink(fd); !strings.HasSuffix(name, "-flat.vmdk") {
				continue
			}
			found = true
			info, err := os.ReadFile(strings.Replace(fd, "/fd/", "/fdinfo/", 1))
			if err != nil {
				t.Fatal(err)
			}
			var flags int
			for line := range strings.Lines(string(info)) {
				_, _ = fmt.Sscanf(line, "flags: %o", &flags)
			}
			if flags&syscall.O_DIRECT != 0 != want {
				t.Errorf("direct %v: %s has flags %o", want, fd, flags)
			}
		}
		if !found {
			t.Errorf("no extent among %v", fds)
		}
		l.stop(p)
	}
}

// TestLockedOut: two processes never have one disk open.
func TestLockedOut(t *testing.T) {
	l := newLab(t)
	l.create(l.key("k1"), l.key("k1"))
	p := l.start()
	if _, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true}); err != nil {
		t.Fatal(err)
	}
	q := l.start()
	_, err := q.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
	if f, text := hostapi.AsFault(err); err == nil || f.Kind != hostapi.Fault_IN_USE {
		t.Errorf("second open: %v %q", f.Kind, text)
	}
	if _, err := Delete(l.path, l.vm.String()); err == nil {
		t.Error("a VM in use was deleted")
	}
	l.stop(q)
	l.stop(p)
	if left, err := Delete(l.path, l.vm.String()); err != nil || len(left) > 0 {
		t.Errorf("delete: %v, left %v", err, left)
	}
	if _, err := os.Stat(filepath.Dir(l.path)); !os.IsNotExist(err) {
		t.Errorf("the folder is still there: %v", err)
	}
}

// TestNVRAMIsBornEncrypted: a file that QEMU makes in the view has its key in the
// bundle before its first byte is on the datastore (E1).
func TestNVRAMIsBornEncrypted(t *testing.T) {
	l := newLab(t)
	l.create(l.key("k1"), nil)
	p := l.start()
	st, err := p.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true})
	if err != nil {
		t.Fatalf("%v\n%s", err, p.log)
	}
	want := bytes.Repeat([]byte("VARIABLES "), 1000)
	if err := os.WriteFile(st.NvramPath, want, 0o600); err != nil {
		t.Fatalf("%v\n%s", err, p.log)
	}
	p.cmd.Process.Kill()
	<-p.done
	if l.onDatastore([]byte("VARIABLES ")) {
		t.Error("the variables are on the datastore in clear")
	}
	q := l.start()
	if st, err = q.Open(t.Context(), &hostapi.OpenRequest{Ref: l.ref(), Keys: l.send(), Serve: true, Restarted: true}); err != nil {
		t.Fatalf("%v\n%s", err, q.log)
	}
	if got, err := os.ReadFile(st.NvramPath); err != nil || !bytes.Equal(got, want) {
		t.Errorf("after a kill the view shows %d bytes: %v", len(got), err)
	}
	l.stop(q)
	if !vmfiles.Encrypted("web1.nvram") {
		t.Error("nvram is not among the encrypted files")
	}
}
