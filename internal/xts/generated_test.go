package xts

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestAssemblyIsGenerated runs the generator and checks that what it makes is
// what is here. The first line of each file names the command and differs.
func TestAssemblyIsGenerated(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the generator")
	}
	dir := t.TempDir()
	asm, stubs := filepath.Join(dir, "kernels_amd64.s"), filepath.Join(dir, "kernels_amd64.go")
	cmd := exec.Command("go", "-C", "_asm", "run", ".", "-out", asm, "-stubs", stubs, "-pkg", "xts")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("running the generator (it needs the modules of _asm/go.mod; see go test -short): %v\n%s", err, out)
	}
	for _, path := range []string{asm, stubs} {
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Base(path))
		if err != nil {
			t.Fatal(err)
		}
		_, want, _ = bytes.Cut(want, []byte("\n"))
		_, got, _ = bytes.Cut(got, []byte("\n"))
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the generator makes; run go generate", filepath.Base(path))
		}
	}
}
