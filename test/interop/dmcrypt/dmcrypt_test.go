// Package dmcrypt shows that Linux's dm-crypt reads and writes the base extent of an
// encrypted disk when it is given the DEK: inside a guest with Debian's own kernel, with
// the table that doc/disk-format.md gives. So the cipher, the tweak and the layout are
// what that document says, by another implementation, and there is a way to the data
// without Mortise.
package dmcrypt

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
	"mortise/internal/vmdk"
)

//go:embed init
var initScript []byte

const (
	size = 2 << 20
	unit = vdisk.UnitSize
)

func TestDMCrypt(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	kernels, _ := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if len(kernels) == 0 {
		t.Fatal("no kernel for the guest: install linux-image-cloud-amd64")
	}
	slices.Sort(kernels)
	kernel := kernels[len(kernels)-1]
	dir := t.TempDir()

	// A disk that is full: dm-crypt shows holes as noise.
	vm, id := uuid.New(), keysafe.KeyID{Provider: "test", Key: "kek"}
	kek, err := secret.Random(nil, keysafe.KEKSize)
	if err != nil {
		t.Fatal(err)
	}
	keks := keysafe.KEKSet{id: kek}
	path := filepath.Join(dir, "vm.vmdk")
	if err := vdisk.Create(t.Context(), path, vdisk.Spec{Size: size, VM: vm, Key: id, KEKs: keks}); err != nil {
		t.Fatal(err)
	}
	o := vdisk.Options{VM: vm, KEKs: keks, Live: filepath.Join(dir, "live")}
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{7}).Read(content)
	copy(content[3*unit:], bytes.Repeat([]byte("MORTISE-KNOWN-PLAINTEXT-"), 512))
	d, err := vdisk.Open(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.WriteAt(bytes.Clone(content), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	// Units at the ends, in between, one and many; the writes are read here afterwards.
	reads := [][2]int64{{0, 1}, {3, 3}, {255, 2}, {400, 17}, {size/unit - 1, 1}, {0, size / unit}}
	const writeAt, writes = 300, 5
	work := filepath.Join(dir, "root")
	put := func(name string, mode os.FileMode, content []byte) {
		t.Helper()
		at := filepath.Join(work, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, content, mode); err != nil {
			t.Fatal(err)
		}
	}
	put("init", 0o755, initScript)
	put("table", 0o600, []byte(fmt.Sprintf("0 %d crypt aes-xts-plain64 %s 0 /dev/vda 0 2 sector_size:4096 iv_large_sectors\n", size/512, dekOf(t, path, vm, keks))))
	var list strings.Builder
	for _, r := range reads {
		fmt.Fprintf(&list, "%d %d\n", r[0], r[1])
	}
	put("reads", 0o644, []byte(list.String()))
	put("writes", 0o644, []byte(fmt.Sprintf("%d %d\n", writeAt, writes)))
	copyProgram(t, work, "busybox", "bin/busybox")
	copyProgram(t, work, "dmsetup", "sbin/dmsetup")
	copyModules(t, work, strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-"))
	initrd := filepath.Join(dir, "initrd")
	run(t, "sh", "-c", fmt.Sprintf("cd '%s' && find . | cpio --quiet -o -H newc > '%s'", work, initrd))

	serial := filepath.Join(dir, "console")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	// Without KVM: on machines that are virtual themselves it may be there and not work.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu", "Westmere", "-m", "512", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:"+serial, "-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 earlyprintk=serial loglevel=4 panic=-1",
		"-drive", "if=virtio,format=raw,cache=writeback,file="+vmdk.FlatName(path))
	out, err := cmd.CombinedOutput()
	text, _ := os.ReadFile(serial)
	console := string(out) + strings.ReplaceAll(string(text), "\r", "")
	if err != nil || !strings.Contains(console, "MORTISE end") || strings.Contains(console, "MORTISE failed") {
		t.Fatalf("%v\n%s", err, console)
	}
	t.Log(regexp.MustCompile(`(?m)^MORTISE (kernel|table).*$`).FindAllString(console, -1))
	if !strings.Contains(console, "crypt aes-xts-plain64 KEY 0 ") || !strings.Contains(console, "sector_size:4096 iv_large_sectors") {
		t.Errorf("the table is not what was asked for:\n%s", console)
	}

	d, err = vdisk.Open(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, r := range reads {
		sum := sha256.Sum256(content[r[0]*unit : (r[0]+r[1])*unit])
		if want := fmt.Sprintf("MORTISE read %d %d %s", r[0], r[1], hex.EncodeToString(sum[:])); !strings.Contains(console, want+"\n") {
			t.Errorf("%d units at %d: dm-crypt reads something else than was written\n%s", r[1], r[0], console)
		}
	}
	copy(content[writeAt*unit:], bytes.Repeat([]byte("Z"), writes*unit))
	got := make([]byte, size)
	if err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) {
		t.Error("what dm-crypt wrote is read as something else")
	}
}

// dekOf opens the key safe of a descriptor as the document says.
func dekOf(t *testing.T, path string, vm uuid.UUID, keks keysafe.KEKs) (text string) {
	desc, err := vmdk.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	enc, _ := desc.Encryption()
	dek, _, err := enc.KeySafe.Unwrap(keysafe.Binding{VM: vm, Disk: desc.UUID(), Role: keysafe.RoleDisk, Cipher: keysafe.CipherXTS, UnitSize: unit}, keks)
	if err != nil {
		t.Fatal(err)
	}
	defer dek.Wipe()
	dek.Use(func(b []byte) { text = hex.EncodeToString(b) })
	return text
}

// copyProgram copies a program and the libraries that it needs.
func copyProgram(t *testing.T, root, name, to string) {
	t.Helper()
	at, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if err != nil {
			at, err = exec.LookPath(dir + name)
		}
	}
	if err != nil {
		t.Fatalf("%v: install busybox-static and dmsetup", err)
	}
	copyFile(t, at, filepath.Join(root, to), 0o755)
	libs, _ := exec.Command("ldd", at).Output() // a static program has none
	for _, lib := range regexp.MustCompile(`/[^ )]+\.so[^ )]*`).FindAllString(string(libs), -1) {
		copyFile(t, lib, filepath.Join(root, lib), 0o755)
	}
}

// copyModules copies kernel modules in the order in which they are loaded.
func copyModules(t *testing.T, root, version string) {
	t.Helper()
	done := map[string]bool{}
	for _, m := range []string{"virtio_pci", "virtio_blk", "xts", "aesni_intel", "dm-crypt"} {
		out := run(t, "modprobe", "-S", version, "--show-depends", m)
		for line := range strings.Lines(out) {
			f := strings.Fields(line)
			if len(f) < 2 || f[0] != "insmod" || done[f[1]] {
				continue
			}
			done[f[1]] = true
			name := filepath.Join(root, "modules", fmt.Sprintf("%02d-%s", len(done), filepath.Base(f[1])))
			copyFile(t, f[1], name, 0o644)
			switch filepath.Ext(name) {
			case ".xz":
				run(t, "xz", "-d", name)
			case ".zst":
				run(t, "zstd", "-qd", "--rm", name)
			}
		}
	}
}

func copyFile(t *testing.T, from, to string, mode os.FileMode) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to), 0o755)
	}
	if err == nil {
		err = os.WriteFile(to, b, mode)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}
