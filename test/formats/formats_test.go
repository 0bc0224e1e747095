package formats

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/vdisk"
	"mortise/internal/vmfiles"
	"mortise/internal/vmxfile"
)

// versions are those of released formats; each stays.
var versions = []string{"v1"}

func TestFrozen(t *testing.T) {
	for _, v := range versions {
		t.Run(v, func(t *testing.T) { testVersion(t, filepath.Join("testdata", v)) })
	}
}

func testVersion(t *testing.T, name string) {
	text, err := os.ReadFile(name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	var want Expected
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	if len(want.Disks) < 19 || len(want.Files) < 3 {
		t.Fatalf("%d disks and %d files are expected: the archive is not whole", len(want.Disks), len(want.Files))
	}
	keks, err := KEKs()
	if err != nil {
		t.Fatal(err)
	}
	unpack := func(t *testing.T) string {
		dir := t.TempDir()
		f, err := os.Open(name + ".tar.gz")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := Unpack(f, dir); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	options := func(t *testing.T) vdisk.Options {
		return vdisk.Options{VM: VM, KEKs: keks, Live: filepath.Join(t.TempDir(), "live")}
	}
	for artefact, d := range want.Disks {
		open := func(t *testing.T, dir string, o vdisk.Options) *vdisk.Chain {
			c, err := vdisk.OpenChain(t.Context(), filepath.Join(dir, artefact, d.Top), o)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			sum, err := vdisk.Hash(t.Context(), c, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%x", sum); got != d.SHA256 || c.Size() != d.Size {
				t.Fatalf("content %s of %d bytes, want %s of %d", got, c.Size(), d.SHA256, d.Size)
			}
			return c
		}
		t.Run(artefact, func(t *testing.T) {
			dir := unpack(t)
			i, links, err := vdisk.DescribeChain(filepath.Join(dir, artefact, d.Top), nil)
			if err != nil {
				t.Fatal(err)
			}
			if i.Encrypted != d.Encrypted || i.Epoch != d.Epoch || len(links) != d.Links || i.Conversion.String() != d.Conversion || i.Back != d.Back || i.Boundary != d.Boundary {
				t.Fatalf("described as %+v, want %+v", i, d)
			}
			o := options(t)
			if !d.Hot && d.Conversion == "" {
				o.Expect = vdisk.Expect{Encrypted: d.Encrypted, Epoch: d.Epoch}
				ro := o
				ro.ReadOnly = true
				open(t, dir, ro).Close()
			}
			c := open(t, dir, o)
			if d.Conversion == "" {
				return
			}
			if err := c.Resume(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			c.Close()
			open(t, dir, o).Close()

			// And the other way round, from the same files.
			dir = unpack(t)
			c = open(t, dir, o)
			if err := c.Cancel(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			c.Close()
			c = open(t, dir, o)
			if i := c.Links()[0]; d.Links == 1 && (i.Conversion != vdisk.NotConverting || i.Encrypted == (strings.HasPrefix(artefact, "encrypt"))) {
				t.Fatalf("after it ran back: %+v", i)
			}
		})
	}
	t.Run("bundle", func(t *testing.T) {
		dir := filepath.Join(unpack(t), "vm")
		f, err := vmxfile.Load(filepath.Join(dir, "vm.vmx"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := keysafe.OpenBundle(f, VM, keks, keysafe.Expectation{Encrypted: true, Generation: want.Bundle.Generation})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Wipe()
		disk := uuid.MustParse(want.Bundle.Disk)
		if r := b.Disks[disk]; len(b.Disks) != 1 || !r.Encrypted || r.Epoch != want.Bundle.Epoch {
			t.Errorf("disks %+v", b.Disks)
		}
		if len(b.Files) != len(want.Bundle.Files) || len(b.Secrets) != len(want.Bundle.Secrets) {
			t.Errorf("%d files, %d secrets", len(b.Files), len(b.Secrets))
		}
		for n, sum := range want.Bundle.Secrets {
			if Digest(b.Secrets[n]) != sum {
				t.Errorf("secret %s is another", n)
			}
		}
		for n, sum := range want.Bundle.Files {
			key := b.Files[n]
			if Digest(key) != sum {
				t.Fatalf("the key of %s is another", n)
			}
			path := filepath.Join(dir, n)
			if err := vmfiles.Verify(path, key); err != nil {
				t.Fatal(err)
			}
			file, err := vmfiles.Open(path, key, true)
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, file.Size())
			if _, err := file.ReadAt(p, 0); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			w := want.Files[n]
			if got := fmt.Sprintf("%x", sha256.Sum256(p)); got != w.SHA256 || file.Size() != w.Size {
				t.Errorf("%s: content %s of %d bytes, want %s of %d", n, got, file.Size(), w.SHA256, w.Size)
			}
			file.Close()
		}
		o := options(t)
		o.UUID, o.Expect = disk, vdisk.Expect{Encrypted: true, Epoch: want.Bundle.Epoch}
		c, err := vdisk.OpenChain(t.Context(), filepath.Join(dir, f.String("scsi0:0.fileName", "")), o)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

// An archive in git is small.
func TestSmall(t *testing.T) {
	for _, v := range versions {
		st, err := os.Stat(filepath.Join("testdata", v+".tar.gz"))
		if err != nil || st.Size() > 200<<10 {
			t.Errorf("%s: %v, %v", v, st, err)
		}
	}
}
