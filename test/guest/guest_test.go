package guest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Equal inputs give an equal disk, with a sound partition table and file systems.
func TestBuild(t *testing.T) {
	var disks [2][]byte
	for i := range disks {
		out := t.TempDir()
		if said, err := exec.Command("./build.sh", out).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, said)
		}
		raw := filepath.Join(out, "guest.raw")
		var err error
		if disks[i], err = os.ReadFile(raw); err != nil {
			t.Fatal(err)
		}
		before, err := os.Stat(raw)
		if err != nil {
			t.Fatal(err)
		}
		if said, err := exec.Command("./build.sh", out).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, said)
		}
		if after, err := os.Stat(raw); err != nil || !os.SameFile(before, after) {
			t.Errorf("the second run made it again (%v)", err)
		}
		data := filepath.Join(out, "data")
		if err := os.WriteFile(data, disks[i][42<<20:90<<20], 0o600); err != nil {
			t.Fatal(err)
		}
		for _, check := range [][]string{
			{"sgdisk", "--verify", raw},
			{"e2fsck", "-f", "-n", data},
			{"qemu-img", "check", filepath.Join(out, "guest.vmdk")},
			{"qemu-img", "compare", raw, filepath.Join(out, "guest.vmdk")},
		} {
			cmd := exec.Command(check[0], check[1:]...)
			cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
			if said, err := cmd.CombinedOutput(); err != nil || bytes.Contains(said, []byte("Problem")) {
				t.Errorf("%v: %v\n%s", check, err, said)
			}
		}
		if n := bytes.Count(disks[i], []byte(Plaintext)); n < 32768 {
			t.Errorf("the known plaintext is there %d times", n)
		}
	}
	if !bytes.Equal(disks[0], disks[1]) {
		t.Error("two builds differ")
	}
}

func TestAnswer(t *testing.T) {
	a := parse("io run=ab written=12 errors=0 id=3")
	if a.Values["written"] != "12" || a.Words[0] != "io" || len(a.Values) != 4 {
		t.Errorf("%+v", a)
	}
}
