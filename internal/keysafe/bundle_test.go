package keysafe

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/secret"
	"mortise/internal/vmxfile"
)

var vmID = uuid.MustParse("564d0102-0304-0506-0708-090a0b0c0d0e")

func encryptedVMX(t testing.TB, set KEKSet) (*vmxfile.File, *Bundle) {
	t.Helper()
	f := vmxfile.New()
	if err := f.Set("displayName", "vm"); err != nil {
		t.Fatal(err)
	}
	b, err := NewBundle(nil, vmID, idA, set[idA])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Wipe)
	b.Files["vm.nvram"] = key(t, 64)
	b.Files["vm-1.vmem"] = key(t, 64)
	b.Disks[uuid.MustParse("6000c293-7ba0-3a03-9f22-56c52993b727")] = DiskRecord{true, 3}
	b.Disks[uuid.MustParse("6000c293-7ba0-3a03-9f22-56c52993b728")] = DiskRecord{}
	b.Secrets["vtpm"] = key(t, 1000)
	if err := b.Seal(nil, f); err != nil {
		t.Fatal(err)
	}
	return f, b
}

func TestBundleRoundTrip(t *testing.T) {
	set := KEKSet{idA: key(t, 32)}
	f, b := encryptedVMX(t, set)
	g, err := vmxfile.Parse("vm.vmx", f.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	got, err := OpenBundle(g, vmID, set, Expectation{Encrypted: true, Generation: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if len(got.Files) != 2 || !got.Files["vm.nvram"].Equal(b.Files["vm.nvram"]) || !got.Files["vm-1.vmem"].Equal(b.Files["vm-1.vmem"]) {
		t.Error("file keys differ")
	}
	if fmt.Sprint(got.Disks) != fmt.Sprint(b.Disks) || !got.Secrets["vtpm"].Equal(b.Secrets["vtpm"]) || got.Generation() != 1 {
		t.Errorf("bundle %v generation %d", got.Disks, got.Generation())
	}
	for _, k := range []*secret.Key{b.Files["vm.nvram"], b.Secrets["vtpm"], b.config} {
		k.Use(func(raw []byte) {
			if bytes.Contains(f.Bytes(), raw[:16]) {
				t.Error("key bytes in the VMX")
			}
		})
	}
}

// TestBundleFaults edits the VMX as people and attackers do.
func TestBundleFaults(t *testing.T) {
	set := KEKSet{idA: key(t, 32), idB: key(t, 32)}
	f, b := encryptedVMX(t, set)
	text := string(f.Bytes())
	other, _ := encryptedVMX(t, set)
	otherData, _ := other.Get(DataEntry)
	data, _ := f.Get(DataEntry)
	must := Expectation{Encrypted: true}
	vmware := strings.Replace(text, "mortise:key/v1/", "vmware:key/", 1)
	drop := func(keys ...string) string {
		g, _ := vmxfile.Parse("vm.vmx", []byte(text))
		for _, k := range keys {
			g.Delete(k)
		}
		return string(g.Bytes())
	}
	var (
		tampered *TamperedError
		missing  *MissingError
		stale    *StaleError
		locked   *KeysRequiredError
		foreign  *ForeignError
	)
	flip := func(s string, i int) string { c := []byte(s); c[i] ^= 1; return string(c) }
	for _, c := range []struct {
		name, text string
		vm         uuid.UUID
		keks       KEKSet
		want       Expectation
		as         any
	}{
		{"safe deleted", drop(KeySafeEntry), vmID, set, must, &missing},
		{"data deleted", drop(DataEntry), vmID, set, Expectation{}, &missing},
		{"generation deleted", drop(GenerationEntry), vmID, set, must, &missing},
		{"all deleted, inventory knows", drop(KeySafeEntry, DataEntry, GenerationEntry), vmID, set, must, &missing},
		{"data edited", strings.Replace(text, data, flip(data, 40), 1), vmID, set, must, &tampered},
		{"data cut", strings.Replace(text, data, data[:len(data)/2], 1), vmID, set, must, &tampered},
		{"data nearly empty", strings.Replace(text, data, "AAAA", 1), vmID, set, must, &tampered},
		{"data of another VMX", strings.Replace(text, data, otherData, 1), vmID, set, must, &tampered},
		{"safe edited", flip(text, strings.Index(text, "AES-256-GCM,")+30), vmID, set, must, &tampered},
		{"safe cut", strings.Replace(text, "AES-256-GCM,", "", 1), vmID, set, must, &tampered},
		{"generation edited", strings.Replace(text, `generation = "1"`, `generation = "2"`, 1), vmID, set, must, &tampered},
		{"generation nonsense", strings.Replace(text, `generation = "1"`, `generation = "x"`, 1), vmID, set, must, &tampered},
		{"moved to another VM", text, uuid.MustParse("564d0102-0304-0506-0708-090a0b0c0d0f"), set, must, &tampered},
		{"wrong KEK under the id", text, vmID, KEKSet{idA: set[idB]}, must, &tampered},
		{"older than the inventory knows", text, vmID, set, Expectation{true, 2}, &stale},
		{"no key", text, vmID, KEKSet{idB: set[idB]}, must, &locked},
		{"VMware's", vmware, vmID, set, must, &foreign},
		{"vSphere's", drop(KeySafeEntry, DataEntry, GenerationEntry) + "encryption.bundle = \"vmware:key/list/(x)\"\n", vmID, set, Expectation{}, &foreign},
	} {
		g, err := vmxfile.Parse("/ds/vm/vm.vmx", []byte(c.text))
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		got, err := OpenBundle(g, c.vm, c.keks, c.want)
		if got != nil || !errors.As(err, c.as) {
			t.Errorf("%s: %T %v, want %T", c.name, err, err, c.as)
		}
		if err != nil && !strings.Contains(err.Error(), "/ds/vm/vm.vmx") {
			t.Errorf("%s: %q does not name the file", c.name, err)
		}
	}
	g, _ := vmxfile.Parse("vm.vmx", []byte(drop(KeySafeEntry, DataEntry, GenerationEntry)))
	if _, err := OpenBundle(g, vmID, set, Expectation{}); !errors.Is(err, ErrNotEncrypted) {
		t.Errorf("a VM in clear: %v", err)
	}
	if err := b.Seal(nil, g); !errors.As(err, &missing) {
		t.Errorf("sealing into a VMX that lost its bundle: %v", err)
	}
	RemoveBundle(f)
	if IsEncrypted(f) {
		t.Error("RemoveBundle left entries")
	}
}

// TestBundleCompareAndSwap: of two who opened the same generation, one saves.
func TestBundleCompareAndSwap(t *testing.T) {
	set := KEKSet{idA: key(t, 32)}
	f, a := encryptedVMX(t, set)
	b, err := OpenBundle(f, vmID, set, Expectation{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	if err := a.Seal(nil, f); err != nil {
		t.Fatal(err)
	}
	before := string(f.Bytes())
	if err := b.Seal(nil, f); !errors.Is(err, ErrConflict) {
		t.Errorf("second: %v, want ErrConflict", err)
	}
	if string(f.Bytes()) != before {
		t.Error("the loser changed the file")
	}
	fresh, err := NewBundle(nil, vmID, idA, set[idA])
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Wipe()
	if err := fresh.Seal(nil, f); !errors.Is(err, ErrConflict) {
		t.Errorf("a new bundle over an old one: %v, want ErrConflict", err)
	}
}

// TestUpdateBundle adds a file key from each of many goroutines: none is lost.
func TestUpdateBundle(t *testing.T) {
	set := KEKSet{idA: key(t, 32)}
	f, b := encryptedVMX(t, set)
	path := filepath.Join(t.TempDir(), "vm.vmx")
	if err := f.Save(path); err != nil {
		t.Fatal(err)
	}
	const n = 16
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := UpdateBundle(path, vmID, set, Expectation{}, func(b *Bundle) error {
				k, err := secret.Random(nil, 64)
				b.Files[fmt.Sprintf("f%d", i)] = k
				return err
			}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	failed := errors.New("no")
	if err := UpdateBundle(path, vmID, set, Expectation{}, func(b *Bundle) error { b.Files = nil; return failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
	g, err := vmxfile.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := OpenBundle(g, vmID, set, Expectation{})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if len(got.Files) != 2+n || got.Generation() != 1+n || !got.Files["vm.nvram"].Equal(b.Files["vm.nvram"]) {
		t.Errorf("%d file keys, generation %d", len(got.Files), got.Generation())
	}
}

// TestBundleShallowRecrypt: the VM opens with either KEK between the two steps,
// and with the new one alone after.
func TestBundleShallowRecrypt(t *testing.T) {
	set := KEKSet{idA: key(t, 32), idB: key(t, 32)}
	f, b := encryptedVMX(t, set)
	open := func(keks KEKSet) error {
		got, err := OpenBundle(f, vmID, keks, Expectation{})
		got.Wipe()
		return err
	}
	if err := errors.Join(b.Rewrap(nil, set, idB), b.Seal(nil, f)); err != nil {
		t.Fatal(err)
	}
	for _, id := range []KeyID{idA, idB} {
		if err := open(KEKSet{id: set[id]}); err != nil {
			t.Errorf("between, with %s: %v", id, err)
		}
	}
	if err := errors.Join(b.Keep(idB), b.Seal(nil, f)); err != nil {
		t.Fatal(err)
	}
	if err := open(KEKSet{idB: set[idB]}); err != nil {
		t.Error(err)
	}
	var locked *KeysRequiredError
	if err := open(KEKSet{idA: set[idA]}); !errors.As(err, &locked) {
		t.Errorf("with the old key after: %v", err)
	}
}

func FuzzBundleDecode(f *testing.F) {
	b := Bundle{Files: map[string]*secret.Key{"a": key(f, 64)}, Secrets: map[string]*secret.Key{"s": key(f, 3)}, Disks: map[uuid.UUID]DiskRecord{vmID: {true, 7}}}
	plain, err := b.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(plain)
	f.Add([]byte(bundleMagic))
	f.Add(append([]byte(bundleMagic), 2, 0, 1, 'x', 0, 0))
	f.Fuzz(func(t *testing.T, in []byte) {
		var b Bundle
		defer b.Wipe()
		if b.decode(in) != nil {
			return
		}
		out, err := b.encode()
		if err != nil || !bytes.Equal(out, in) {
			t.Fatalf("%x encodes again as %x (%v)", in, out, err)
		}
	})
}
