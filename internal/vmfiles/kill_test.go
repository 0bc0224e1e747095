package vmfiles

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mortise/internal/secret"
)

// helperEnv makes the test binary be a process that serves a view until killed.
const helperEnv = "VMFILES_TEST_SERVE"

func TestMain(m *testing.M) {
	if at := os.Getenv(helperEnv); at != "" {
		serveForKill(at, os.Getenv(helperEnv+"_FOLDER"))
		return
	}
	os.Exit(m.Run())
}

func fixedKey() (*secret.Key, error) {
	b := make([]byte, 64)
	for i := range b {
		b[i] = byte(i)
	}
	return secret.Take(b)
}

func serveForKill(at, folder string) {
	k, err := fixedKey()
	if err == nil {
		_, err = Mount(Options{Folder: folder, Mount: at, Keys: map[string]*secret.Key{"vm.nvram": k}})
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("mounted")
	select {}
}

// TestKilledServer kills the process that serves a view, with a file of it open:
// what was written is there after the next mount, which releases the dead one.
func TestKilledServer(t *testing.T) {
	x := newFixture(t)
	k, err := fixedKey()
	if err != nil {
		t.Fatal(err)
	}
	x.keys["vm.nvram"] = k
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), helperEnv+"="+x.at, helperEnv+"_FOLDER="+x.folder)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer c.Wait()
	defer c.Process.Kill()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "mounted\n" {
		t.Fatalf("%q, %v", line, err)
	}
	// As QEMU does with flash: whole sectors in place, no sync after each.
	f, err := os.OpenFile(x.in("vm.nvram"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, r := &model{}, rand.New(rand.NewSource(3))
	if err := f.Truncate(84 << 10); err != nil {
		t.Fatal(err)
	}
	m.truncate(84 << 10)
	for range 300 {
		p := make([]byte, 512*(1+r.Intn(8)))
		r.Read(p)
		off := 512 * r.Intn(160)
		if _, err := f.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
		m.write(p, off)
	}
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.Wait()
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("a read after the kill: %v, want ENOTCONN", err)
	}
	if _, err := os.ReadDir(x.at); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("the mount point after the kill: %v, want ENOTCONN", err)
	}
	x.mount()
	if got, err := os.ReadFile(x.in("vm.nvram")); err != nil || !bytes.Equal(got, m.data) {
		t.Errorf("after the kill the content differs (%v)", err)
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("the old open file, after the new mount: %v, want ENOTCONN", err)
	}
	x.close()
	if es, err := os.ReadDir(x.at); err != nil || len(es) != 0 {
		t.Errorf("something is still mounted: %v (%v)", es, err)
	}
}

// TestFirmware lets a real QEMU's firmware write its variables through the view.
func TestFirmware(t *testing.T) {
	const code, vars = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
	if _, err := os.Stat(code); err != nil || testing.Short() {
		t.Skip("needs OVMF, and some seconds")
	}
	x := newFixture(t)
	x.mount()
	blank, err := os.ReadFile(vars)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(x.in("vm.nvram"), blank, 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.Command("qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "128", "-nodefaults", "-display", "none", "-net", "none",
		"-drive", "if=pflash,format=raw,readonly=on,file="+code, "-drive", "if=pflash,format=raw,file="+x.in("vm.nvram"))
	if err := c.Start(); err != nil {
		t.Skipf("no QEMU: %v", err)
	}
	defer c.Wait()
	defer c.Process.Kill()
	bootOrder := "B\x00o\x00o\x00t\x00O\x00r\x00d\x00e\x00r\x00"
	var got []byte
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		if got, err = os.ReadFile(x.in("vm.nvram")); err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(got, []byte(bootOrder)) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the firmware wrote no BootOrder in a minute")
		}
	}
	c.Process.Kill()
	c.Wait()
	x.close()
	x.noPlaintext(bootOrder, "_FVH")
	x.mount()
	if again, err := os.ReadFile(x.in("vm.nvram")); err != nil || !bytes.Contains(again, []byte(bootOrder)) || len(again) != len(blank) {
		t.Errorf("after the next mount the variables are gone (%v)", err)
	}
}
