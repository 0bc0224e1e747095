package vdisk

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
)

// What a damaged small file takes is given back from the kept copy, and nothing else is
// changed; a copy that is not of this disk, VM, key and time is refused.
func TestRepair(t *testing.T) {
	w := newWorld(t)
	const size = 1 << 20
	base := t.TempDir()
	path := filepath.Join(base, "vm.vmdk")
	create(t, path, w.spec(size, kekA))
	d := open(t, path, w.options())
	model := make([]byte, size)
	scribble(t, d, model, rand.New(rand.NewPCG(3, 4)), 60)
	old := map[string][]byte{} // of the first epoch
	for _, n := range []string{"vm.vmdk", "vm.vmdk.kept", "vm-flat.vmdk.state"} {
		old[n] = readFile(t, filepath.Join(base, n))
	}
	if err := d.Convert(t.Context(), Target{Kind: Recrypting, Key: kekB}, nil); err != nil {
		t.Fatal(err)
	}
	disk := d.desc.UUID()
	d.Close()
	create(t, filepath.Join(base, "other.vmdk"), w.spec(size, kekA))
	open(t, filepath.Join(base, "other.vmdk"), w.options()).Close()
	if _, err := Repair(t.Context(), path, RepairOptions{Options: w.options()}); err != nil {
		t.Fatalf("a whole disk: %v", err)
	}

	put := func(name string, b []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if b == nil {
				b = readFile(t, filepath.Join(dir, name))
				b = bytes.Replace(b, []byte("AES-256-GCM,"), []byte("AES-256-GCM,A"), 1)
			}
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(names ...string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			for _, n := range names {
				if err := os.Remove(filepath.Join(dir, n)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	all := func(fs ...func(*testing.T, string)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			for _, f := range fs {
				f(t, dir)
			}
		}
	}
	clearText := func(t *testing.T, dir string) {
		text := string(readFile(t, filepath.Join(dir, "vm.vmdk")))
		var lines []string
		for _, l := range strings.SplitAfter(text, "\n") {
			if !strings.HasPrefix(l, "encryption.") {
				lines = append(lines, l)
			}
		}
		put("vm.vmdk", []byte(strings.NewReplacer("XTSFLAT", "FLAT", "mortiseFlat", "monolithicFlat").Replace(strings.Join(lines, ""))))(t, dir)
	}
	otherKept := readFile(t, filepath.Join(base, "other.vmdk.kept"))
	full := Expect{Encrypted: true, Epoch: 2}
	for _, c := range []struct {
		name   string
		damage func(*testing.T, string)
		expect Expect
		vm     uuid.UUID
		disk   uuid.UUID // that the VM has
		state  bool      // may be made anew
		kind   error
	}{
		{name: "key safe damaged", damage: put("vm.vmdk", nil)},
		{name: "descriptor emptied", damage: put("vm.vmdk", []byte{})},
		{name: "descriptor deleted", damage: remove("vm.vmdk")},
		{name: "made that of a disk in clear", damage: clearText},
		{name: "made that of a disk in clear, the state file deleted", damage: all(clearText, remove("vm-flat.vmdk.state")), state: true},
		{name: "the same, and the state may not be made anew", damage: all(clearText, remove("vm-flat.vmdk.state")), kind: ErrState},
		{name: "descriptor of an older epoch", damage: put("vm.vmdk", old["vm.vmdk"]), expect: full},
		{name: "another disk's descriptor", damage: put("vm.vmdk", readFile(t, filepath.Join(base, "other.vmdk"))), disk: disk},
		{name: "state file deleted", damage: remove("vm-flat.vmdk.state"), state: true},
		{name: "state file deleted, and may not be made anew", damage: remove("vm-flat.vmdk.state"), kind: ErrState},
		{name: "state of an older epoch", damage: put("vm-flat.vmdk.state", old["vm-flat.vmdk.state"]), state: true, kind: ErrStale},
		{name: "all of an older epoch, and the extent is not", damage: all(put("vm.vmdk", old["vm.vmdk"]), put("vm.vmdk.kept", old["vm.vmdk.kept"]), put("vm-flat.vmdk.state", old["vm-flat.vmdk.state"])), expect: full, kind: ErrStale},
		{name: "an older copy beside the damage", damage: all(put("vm.vmdk", nil), put("vm.vmdk.kept", old["vm.vmdk.kept"])), state: true, kind: ErrStale},
		{name: "an older copy, and the state deleted", damage: all(put("vm.vmdk", nil), put("vm.vmdk.kept", old["vm.vmdk.kept"]), remove("vm-flat.vmdk.state")), expect: full, state: true, kind: ErrStale},
		{name: "another disk's copy", damage: all(put("vm.vmdk", nil), put("vm.vmdk.kept", otherKept)), kind: ErrTampered},
		{name: "the copy edited", damage: all(put("vm.vmdk", nil), put("vm.vmdk.kept", nil)), kind: ErrTampered},
		{name: "the copy's status edited", damage: func(t *testing.T, dir string) {
			put("vm.vmdk", nil)(t, dir)
			b := readFile(t, filepath.Join(dir, "vm.vmdk.kept"))
			put("vm.vmdk.kept", bytes.Replace(b, []byte(keptSteady), []byte(keptConverting), 1))(t, dir)
		}, kind: ErrTampered},
		{name: "no copy", damage: all(put("vm.vmdk", nil), remove("vm.vmdk.kept")), kind: ErrMissing},
		{name: "by another VM", damage: put("vm.vmdk", nil), vm: uuid.New(), kind: ErrTampered},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			copyFolder(t, base, dir)
			c.damage(t, dir)
			before := snapshot(t, dir)
			o := RepairOptions{Options: w.options(), State: c.state}
			o.Expect, o.UUID = c.expect, c.disk
			if c.vm != uuid.Nil {
				o.VM = c.vm
			}
			at := filepath.Join(dir, "vm.vmdk")
			o.DryRun = true
			if _, err := Repair(t.Context(), at, o); !errors.Is(err, c.kind) {
				t.Fatalf("%v, want %v", err, c.kind)
			}
			if snapshot(t, dir) != before {
				t.Fatal("a dry run changed files")
			}
			o.DryRun = false
			done, err := Repair(t.Context(), at, o)
			if c.kind != nil {
				var e *Error
				if !errors.Is(err, c.kind) || !errors.As(err, &e) || e.Fix == "" {
					t.Fatalf("%v, want %v and a way out", err, c.kind)
				}
				if snapshot(t, dir) != before {
					t.Fatal("the refusal changed files")
				}
				return
			}
			if err != nil || len(done) == 0 {
				t.Fatal(done, err)
			}
			oo := w.options()
			oo.Expect, oo.UUID = full, disk
			compare(t, open(t, at, oo), model)
		})
	}
}

// In the middle of a conversion a descriptor is repaired, and a state file never: only it
// says which form a sector has.
func TestRepairConversion(t *testing.T) {
	for _, kind := range []Conversion{Encrypting, Decrypting, Recrypting} {
		t.Run(kind.String(), func(t *testing.T) {
			w := newWorld(t)
			path := diskPath(t)
			const size = 1 << 20
			key := kekA
			if kind == Encrypting {
				key = keysafe.KeyID{}
			}
			create(t, path, w.spec(size, key))
			o := w.options()
			o.zone = 16 * UnitSize
			d := open(t, path, o)
			model := make([]byte, size)
			scribble(t, d, model, rand.New(rand.NewPCG(5, 6)), 60)
			stop := errors.New("stopped")
			n := 0
			mid := t.TempDir()
			d.opts.at = func(p string) { // the files of an instant in the middle
				if n++; p == "convert.hot" && d.state.cur.Load().boundary > size/4 {
					if entries, _ := os.ReadDir(mid); len(entries) == 0 {
						copyFolder(t, filepath.Dir(path), mid)
					}
				}
			}
			if err := d.Convert(t.Context(), Target{Kind: kind, Key: kekB}, nil); err != nil && !errors.Is(err, stop) {
				t.Fatal(err)
			}
			at := filepath.Join(mid, filepath.Base(path))
			text := readFile(t, at)
			if err := os.WriteFile(at, text[:len(text)/2], 0o600); err != nil {
				t.Fatal(err)
			}
			if done, err := Repair(t.Context(), at, RepairOptions{Options: w.options()}); err != nil || len(done) != 1 {
				t.Fatal(done, err)
			}
			if !bytes.Equal(readFile(t, at), text) {
				t.Fatal("another descriptor was restored")
			}
			state := filepath.Join(mid, "vm-flat.vmdk.state")
			saved := readFile(t, state)
			if err := os.Remove(state); err != nil {
				t.Fatal(err)
			}
			_, err := Repair(t.Context(), at, RepairOptions{Options: w.options(), State: true})
			if !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "a conversion was under way") {
				t.Fatalf("a boundary was made up: %v", err)
			}
			if err := os.WriteFile(state, saved, 0o600); err != nil {
				t.Fatal(err)
			}
			m := open(t, at, w.options())
			compare(t, m, model)
			if err := m.Resume(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			compare(t, m, model)
		})
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func FuzzKept(f *testing.F) {
	key, err := newDataKey(nil)
	if err != nil {
		f.Fatal(err)
	}
	defer key.wipe()
	text := []byte("# Disk DescriptorFile\nversion=1\nCID=3ec7fe3c\nparentCID=ffffffff\ncreateType=\"mortiseFlat\"\nRW 16384 XTSFLAT \"d-flat.vmdk\" 0\nddb.uuid = \"53 11 d7 d0 70 1b 46 2d-93 b7 a4 3e 3d fe c7 3e\"\nencryption.keySafe = \"mortise:key/v1/list/(pair/(fqid/file/01,AES-256-GCM,Ip_4_lzWp2QrVIkqm2yH_m6K1n7dnnF7N6xhdaumPwweZ0FOSq7avd7ZSH3KdXZA5kbTBBo53Ml8ezi2sMvLut-MpONoCR9LdG2o_HcVOzSlcQKa6OtBDWUzdJ4))\"\nencryption.cipher = \"XTS-AES-256\"\nencryption.unitSize = \"4096\"\nencryption.epoch = \"1\"\nencryption.generation = \"1\"\nencryption.mac = \"488422e6b376058b363ec9e5972524e420cbe25d3dd289d66aa3cafd089cfef0\"\n")
	whole, err := encodeKept(keptSteady, text, key)
	if err != nil {
		f.Fatal(err)
	}
	if k, err := parseKept("x", whole); err != nil || !k.steady {
		f.Fatal("the seed is none", err)
	}
	f.Add(whole)
	f.Add(whole[:60])
	f.Add([]byte(keptMagic + "\nsteady\n\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := parseKept("x", b)
		if err != nil {
			return
		}
		if ok, err := k.verify(key); err != nil || ok && !bytes.Equal(b, whole) {
			t.Fatal("something else passes for the copy", err)
		}
	})
}

// After a shallow recrypt no file beside the disk opens with the old KEK, whatever
// becomes of the kept copy (rule R1).
func TestKeptCopyOfOldKey(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	d := open(t, path, w.options())
	copyKeys := func() []keysafe.KeyID {
		t.Helper()
		k, err := loadKept(osFS{}, path)
		if err != nil {
			t.Fatal(err)
		}
		enc, _ := k.desc.Encryption()
		return enc.KeySafe.KeyIDs()
	}
	old := readFile(t, keptName(path))
	recrypt := func() error { return d.ShallowRecrypt(t.Context(), kekB) }
	if err := recrypt(); err != nil {
		t.Fatal(err)
	}
	if ids := copyKeys(); len(ids) != 1 || ids[0] != kekB {
		t.Fatalf("the copy is under %v", ids)
	}

	// As if the copy had not been written before a crash.
	if err := os.WriteFile(keptName(path), old, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := recrypt(); err != nil {
		t.Fatal(err)
	}
	if ids := copyKeys(); len(ids) != 1 || ids[0] != kekB {
		t.Fatalf("run again, the copy is under %v", ids)
	}

	// One that cannot be replaced goes; if it stays, that is no success.
	if err := os.Remove(keptName(path)); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(keptName(path), "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := recrypt(); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Fatalf("with a copy that cannot be replaced: %v", err)
	}
	if err := os.Remove(filepath.Join(keptName(path), "in the way")); err != nil {
		t.Fatal(err)
	}
	if err := recrypt(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(keptName(path)); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("what was in the copy's place: %v", err)
	}
}

// A live bitmap goes into a folder that only this user writes in.
func TestFolderOfOthers(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.Mkdir(at("mine"), 0o700),
		os.Mkdir(at("shared"), 0o700),
		os.Chmod(at("shared"), 0o770),
		os.Symlink(at("mine"), at("link")),
		os.WriteFile(at("file"), nil, 0o600),
		os.Mkdir(at("other"), 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := map[string]string{"shared": "others may write", "link": "not a folder of its own", "file": "not a directory"}
	if os.Geteuid() == 0 {
		if err := os.Chown(at("other"), 1234, -1); err != nil {
			t.Fatal(err)
		}
		refused["other"] = "another user"
	}
	for name, why := range refused {
		if err := (osFS{}).Mkdir(at(name)); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, not %q", name, err, why)
		}
	}
	for _, name := range []string{"mine", "new"} {
		if err := (osFS{}).Mkdir(at(name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
