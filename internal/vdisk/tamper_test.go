package vdisk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
)

// A case here is an attack on the files of a disk, or an accident (rule E8): it
// is refused with its own error, which names the file and the way out, and
// undoing it gives the disk back as it was.
func TestTampering(t *testing.T) {
	w := newWorld(t)
	const size = 1 << 20
	full := Expect{Encrypted: true, Epoch: 1}
	edit := func(name string, change func(string) string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, name)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			now := change(string(b))
			if now == string(b) {
				t.Fatal("the attack changed nothing")
			}
			if err := os.WriteFile(path, []byte(now), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(at int) func(string) string {
		return func(s string) string { return s[:at] + string([]byte{s[at] ^ 1}) + s[at+1:] }
	}
	line := func(prefix, with string) func(string) string {
		return func(s string) string {
			var out []string
			for _, l := range strings.SplitAfter(s, "\n") {
				if strings.HasPrefix(l, prefix) {
					l = with
				}
				out = append(out, l)
			}
			return strings.Join(out, "")
		}
	}
	asClear := func(s string) string {
		var out []string
		for _, l := range strings.SplitAfter(s, "\n") {
			if !strings.HasPrefix(l, "encryption.") {
				out = append(out, l)
			}
		}
		return strings.NewReplacer("XTSFLAT", "FLAT", "mortiseFlat", "monolithicFlat").Replace(strings.Join(out, ""))
	}
	copyIn := func(from, to string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			b, err := os.ReadFile(filepath.Join(dir, from))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, to), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	both := func(fs ...func(*testing.T, string)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			for _, f := range fs {
				f(t, dir)
			}
		}
	}
	remove := func(name string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}

	// graft puts lines of another file that begin so in the place of the same lines.
	graft := func(from string, prefixes ...string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			b, err := os.ReadFile(filepath.Join(dir, from))
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range prefixes {
				for _, l := range strings.SplitAfter(string(b), "\n") {
					if strings.HasPrefix(l, p) {
						edit("vm.vmdk", line(p, l))(t, dir)
					}
				}
			}
		}
	}
	twice := func(prefix string) func(string) string {
		return func(s string) string {
			for _, l := range strings.SplitAfter(s, "\n") {
				if strings.HasPrefix(l, prefix) {
					return strings.Replace(s, l, l+l, 1)
				}
			}
			return s
		}
	}

	// The folder has vm.vmdk, and other.vmdk of the same VM and size. old.* are
	// vm.vmdk's files of one epoch earlier, mid.* and midre.* of the middle of its
	// encryption and of its deep recrypt.
	base := t.TempDir()
	path := filepath.Join(base, "vm.vmdk")
	keep := func(prefix string) {
		for _, n := range []string{".vmdk", "-flat.vmdk.state"} {
			copyIn("vm"+n, prefix+n)(t, base)
		}
	}
	create(t, path, w.spec(size, keysafe.KeyID{}))
	o := w.options()
	o.zone = 16 * UnitSize
	var d *Disk
	o.at = func(p string) {
		if p == "convert.hot" {
			keep(map[Conversion]string{Encrypting: "mid", Recrypting: "midre"}[d.kind])
		}
	}
	d = open(t, path, o)
	model := make([]byte, size)
	scribble(t, d, model, rand.New(rand.NewPCG(8, 9)), 60)
	if err := d.Convert(t.Context(), Target{Kind: Encrypting, Key: kekA}, nil); err != nil {
		t.Fatal(err)
	}
	keep("old")
	if err := d.Convert(t.Context(), Target{Kind: Recrypting, Key: kekB}, nil); err != nil {
		t.Fatal(err)
	}
	d.Close()
	create(t, filepath.Join(base, "other.vmdk"), w.spec(size, kekA))

	for _, c := range []struct {
		name   string
		attack func(t *testing.T, dir string)
		expect Expect
		vm     uuid.UUID // opens it, if not the VM it belongs to
		disk   uuid.UUID // that the VM has
		kind   error
		file   string
	}{
		{name: "key safe deleted", attack: edit("vm.vmdk", line("encryption.keySafe", "")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "key safe edited", attack: edit("vm.vmdk", func(s string) string { i := strings.Index(s, "AES-256-GCM,") + 40; return flip(i)(s) }), kind: ErrTampered, file: "vm.vmdk"},
		{name: "key safe cut", attack: edit("vm.vmdk", func(s string) string { i := strings.Index(s, "AES-256-GCM,") + 40; return s[:i] }), kind: ErrTampered, file: "vm.vmdk"},
		{name: "key safe twice", attack: edit("vm.vmdk", func(s string) string {
			return s + "encryption.keySafe = \"" + strings.Split(strings.Split(s, "encryption.keySafe = \"")[1], "\"")[0] + "\"\n"
		}), kind: ErrTampered, file: "vm.vmdk"},
		{name: "key safe of another disk", attack: graft("other.vmdk", "encryption.keySafe = "), kind: ErrTampered, file: "vm.vmdk"},
		{name: "key safe and MAC of another disk", attack: graft("other.vmdk", "encryption.keySafe = ", "encryption.mac"), kind: ErrTampered, file: "vm.vmdk"},
		{name: "all of another disk's encryption, under this one's UUID", attack: graft("other.vmdk", "encryption.keySafe = ", "encryption.mac", "encryption.epoch", "encryption.generation"), kind: ErrTampered, file: "vm.vmdk"},
		{name: "key safe of an older epoch", attack: graft("old.vmdk", "encryption.keySafe = "), kind: ErrTampered, file: "vm.vmdk"},
		{name: "key safe and MAC of an older epoch", attack: graft("old.vmdk", "encryption.keySafe = ", "encryption.mac"), kind: ErrTampered, file: "vm.vmdk"},
		{name: "the key safe that was coming, of the middle of a recrypt", attack: func(t *testing.T, dir string) {
			b, err := os.ReadFile(filepath.Join(dir, "midre.vmdk"))
			if err != nil {
				t.Fatal(err)
			}
			i := strings.Index(string(b), "encryption.keySafe.target")
			edit("vm.vmdk", func(s string) string { return s + string(b[i:][:strings.Index(string(b[i:]), "\n")+1]) })(t, dir)
		}, kind: ErrTampered, file: "vm.vmdk"},
		{name: "MAC deleted", attack: edit("vm.vmdk", line("encryption.mac", "")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "MAC emptied", attack: edit("vm.vmdk", line("encryption.mac", "encryption.mac = \"\"\n")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "generation raised", attack: edit("vm.vmdk", line("encryption.generation", "encryption.generation = \"99\"\n")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "cipher twice", attack: edit("vm.vmdk", twice("encryption.cipher")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "epoch twice", attack: edit("vm.vmdk", twice("encryption.epoch")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "extent twice", attack: edit("vm.vmdk", twice("RW ")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "UUID twice", attack: edit("vm.vmdk", twice("ddb.uuid")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "UUID changed", attack: graft("other.vmdk", "ddb.uuid"), kind: ErrTampered, file: "vm.vmdk"},
		{name: "extent type that of clear data", attack: edit("vm.vmdk", func(s string) string { return strings.Replace(s, "XTSFLAT", "FLAT", 1) }), kind: ErrTampered, file: "vm.vmdk"},
		{name: "made a snapshot link", attack: edit("vm.vmdk", func(s string) string {
			return strings.NewReplacer("XTSFLAT", "XTSDELTA", "mortiseFlat", "mortiseDelta").Replace(s)
		}), kind: ErrTampered, file: "vm.vmdk"},
		{name: "descriptor cut in the middle", attack: edit("vm.vmdk", func(s string) string { return s[:len(s)/2] }), kind: ErrTampered, file: "vm.vmdk"},
		{name: "descriptor emptied", attack: edit("vm.vmdk", func(string) string { return "" }), kind: ErrTampered, file: "vm.vmdk"},
		{name: "the VM that it is for edited, opened by that", attack: edit("vm.vmdk", line("ddb.mortise.vm", "ddb.mortise.vm = \"11111111-2222-3333-4444-555555555555\"\n")), vm: uuid.MustParse("11111111-2222-3333-4444-555555555555"), kind: ErrTampered, file: "vm.vmdk"},
		{name: "state file cut", attack: edit("vm-flat.vmdk.state", func(s string) string { return s[:100] }), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "state of the middle of its recrypt", attack: copyIn("midre-flat.vmdk.state", "vm-flat.vmdk.state"), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "state of the middle of its encryption", attack: copyIn("mid-flat.vmdk.state", "vm-flat.vmdk.state"), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "the middle of its recrypt with the boundary forged", attack: both(copyIn("midre.vmdk", "vm.vmdk"), copyIn("midre-flat.vmdk.state", "vm-flat.vmdk.state"), edit("vm-flat.vmdk.state", func(s string) string {
			for n := range int64(2) {
				if st, err := decodeSlot(strings.NewReader(s), n); err == nil {
					st.boundary, st.hot, st.hotLen, st.sums = size/2, 0, 0, nil
					h, _ := st.encode(nil, nil)
					copy(h[offMAC:], st.mac[:])
					copy(h[offTargetMAC:], st.targetMAC[:])
					putChecksum(h)
					s = s[:n*headerStride] + string(h) + s[n*headerStride+headerSize:]
				}
			}
			return s
		})), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "descriptor made that of a disk in clear", attack: edit("vm.vmdk", asClear), expect: full, kind: ErrNotEncrypted, file: "vm.vmdk"},
		{name: "the same, nothing expected", attack: edit("vm.vmdk", asClear), kind: ErrTampered, file: "vm.vmdk"},
		{name: "the same, state file deleted too", attack: both(edit("vm.vmdk", asClear), remove("vm-flat.vmdk.state")), expect: full, kind: ErrNotEncrypted, file: "vm.vmdk"},
		{name: "cipher changed", attack: edit("vm.vmdk", line("encryption.cipher", "encryption.cipher = \"NULL\"\n")), kind: ErrUnsupported, file: "vm.vmdk"},
		{name: "unit size changed", attack: edit("vm.vmdk", line("encryption.unitSize", "encryption.unitSize = \"512\"\n")), kind: ErrUnsupported, file: "vm.vmdk"},
		{name: "epoch raised", attack: edit("vm.vmdk", line("encryption.epoch", "encryption.epoch = \"9\"\n")), kind: ErrTampered, file: "vm.vmdk"},
		{name: "size changed", attack: edit("vm.vmdk", func(s string) string { return strings.Replace(s, "RW 2048 ", "RW 1024 ", 1) }), kind: ErrTampered, file: "vm.vmdk"},
		{name: "points to another disk's extent", attack: edit("vm.vmdk", func(s string) string { return strings.Replace(s, "vm-flat", "other-flat", 1) }), kind: ErrTampered, file: "vm.vmdk"},
		{name: "points out of the folder", attack: edit("vm.vmdk", func(s string) string { return strings.Replace(s, "vm-flat", "../vm-flat", 1) }), kind: ErrTampered, file: "vm.vmdk"},
		{name: "another disk's descriptor", attack: copyIn("other.vmdk", "vm.vmdk"), disk: d.desc.UUID(), kind: ErrTampered, file: "vm.vmdk"},
		{name: "another disk's state file", attack: copyIn("other-flat.vmdk.state", "vm-flat.vmdk.state"), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "opened by another VM", attack: both(), vm: uuid.New(), kind: ErrTampered, file: "vm.vmdk"},
		{name: "descriptor and state of an older epoch", attack: both(copyIn("old.vmdk", "vm.vmdk"), copyIn("old-flat.vmdk.state", "vm-flat.vmdk.state")), expect: Expect{Encrypted: true, Epoch: 2}, kind: ErrStale, file: "vm.vmdk"},
		{name: "descriptor of an older epoch", attack: copyIn("old.vmdk", "vm.vmdk"), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "state of an older epoch", attack: copyIn("old-flat.vmdk.state", "vm-flat.vmdk.state"), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "files of the middle of its encryption: writes would go out in clear", attack: both(copyIn("mid.vmdk", "vm.vmdk"), copyIn("mid-flat.vmdk.state", "vm-flat.vmdk.state")), expect: full, kind: ErrNotEncrypted, file: "vm-flat.vmdk.state"},
		{name: "files of the middle of its recrypt: writes would go out under the old key", attack: both(copyIn("midre.vmdk", "vm.vmdk"), copyIn("midre-flat.vmdk.state", "vm-flat.vmdk.state")), expect: Expect{Encrypted: true, Epoch: 2}, kind: ErrStale, file: "vm.vmdk"},
		{name: "state file deleted", attack: remove("vm-flat.vmdk.state"), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "state file emptied", attack: edit("vm-flat.vmdk.state", func(string) string { return "" }), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "state forged", attack: edit("vm-flat.vmdk.state", func(s string) string {
			for n := range int64(2) { // a boundary, with the right checksum and no MAC
				if st, err := decodeSlot(strings.NewReader(s), n); err == nil {
					st.kind, st.boundary = Decrypting, size/2
					h, _ := st.encode(nil, nil)
					s = s[:n*headerStride] + string(h) + s[n*headerStride+headerSize:]
				}
			}
			return s
		}), kind: ErrState, file: "vm-flat.vmdk.state"},
		{name: "state of a newer version", attack: edit("vm-flat.vmdk.state", func(s string) string { return reseal(s, offVersion) }), kind: ErrUnsupported, file: "vm-flat.vmdk.state"},
		{name: "state with an unknown flag", attack: edit("vm-flat.vmdk.state", func(s string) string { return reseal(s, offFlags) }), kind: ErrUnsupported, file: "vm-flat.vmdk.state"},
		{name: "extent missing", attack: remove("vm-flat.vmdk"), kind: ErrMissing, file: "vm-flat.vmdk"},
		{name: "extent short", attack: func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "vm-flat.vmdk"), size-UnitSize); err != nil {
				t.Fatal(err)
			}
		}, kind: ErrShort, file: "vm-flat.vmdk"},
		{name: "descriptor missing", attack: remove("vm.vmdk"), kind: ErrMissing, file: "vm.vmdk"},
		{name: "encrypted by VMware", attack: edit("vm.vmdk", line("encryption.keySafe", "encryption.keySafe = \"vmware:key/list/(pair/(x))\"\n")), kind: ErrTampered, file: "vm.vmdk"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			copyFolder(t, base, dir)
			c.attack(t, dir)
			before := snapshot(t, dir)
			for _, readOnly := range []bool{false, true} {
				o := w.options()
				o.Expect, o.ReadOnly, o.UUID = c.expect, readOnly, c.disk
				if c.vm != uuid.Nil {
					o.VM = c.vm
				}
				_, err := Open(t.Context(), filepath.Join(dir, "vm.vmdk"), o)
				var e *Error
				if !errors.Is(err, c.kind) || !errors.As(err, &e) {
					t.Fatalf("%v, want %v", err, c.kind)
				}
				if filepath.Base(e.File) != c.file || !strings.Contains(err.Error(), e.File) {
					t.Errorf("names %s, want %s: %v", e.File, c.file, err)
				}
				if !strings.Contains(err.Error(), "; ") && !strings.Contains(err.Error(), "restore") {
					t.Errorf("no way out: %v", err)
				}
				for _, kek := range w.keks {
					kek.Use(func(b []byte) {
						if bytes.Contains([]byte(err.Error()), b) {
							t.Error("the error has a key in it")
						}
					})
				}
			}
			if after := snapshot(t, dir); after != before {
				t.Error("the refusal changed files")
			}
		})
	}
	t.Run("unharmed", func(t *testing.T) {
		o := w.options()
		o.Expect, o.UUID = Expect{Encrypted: true, Epoch: 2}, d.desc.UUID()
		compare(t, open(t, path, o), model)
	})
}

// reseal flips a byte of both headers and gives them the right checksum.
func reseal(s string, at int) string {
	b := []byte(s)
	for n := range 2 {
		h := b[n*headerStride:][:headerSize]
		h[at] ^= 0x40
		putChecksum(h)
	}
	return string(b)
}

// snapshot is the content of a folder's files.
func snapshot(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "cd '"+dir+"' && sha256sum *").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestMissingKeys(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	o := w.options()
	o.KEKs = keysafe.KEKSet{kekB: w.keks[kekB]}
	_, err := Open(t.Context(), path, o)
	var need *keysafe.KeysRequiredError
	if !errors.Is(err, ErrKeysRequired) || !errors.As(err, &need) || need.Required[0] != kekA {
		t.Fatalf("without its KEK: %v", err)
	}
	if _, err := Open(t.Context(), path, Options{}); !errors.Is(err, ErrKeysRequired) {
		t.Fatalf("without any keys: %v", err)
	}
}

func TestLock(t *testing.T) {
	w := newWorld(t)
	for _, key := range []keysafe.KeyID{{}, kekA} {
		path := diskPath(t)
		create(t, path, w.spec(1<<20, key))
		ro := w.options()
		ro.ReadOnly = true
		d := open(t, path, w.options())
		for _, o := range []Options{w.options(), ro} {
			_, err := Open(t.Context(), path, o)
			var e *Error
			if !errors.Is(err, ErrInUse) || !errors.As(err, &e) || !strings.HasSuffix(e.File, "vm-flat.vmdk") || !strings.Contains(e.Why, "this process") {
				t.Fatalf("a second open: %v", err)
			}
		}
		if err := Delete(t.Context(), path); !errors.Is(err, ErrInUse) {
			t.Fatalf("deleting an open disk: %v", err)
		}
		d.Close()
		r1, r2 := open(t, path, ro), open(t, path, ro)
		if _, err := Open(t.Context(), path, w.options()); !errors.Is(err, ErrInUse) {
			t.Fatalf("writing while others read: %v", err)
		}
		for verb, err := range map[string]error{
			"write": r1.WriteAt(make([]byte, 512), 0), "trim": r1.Trim(0, 512), "zero": r1.WriteZeroes(0, 512, true),
			"convert": r1.Convert(t.Context(), Target{Kind: Decrypting}, nil), "recrypt": r1.ShallowRecrypt(t.Context(), kekB),
		} {
			if !errors.Is(err, ErrReadOnly) {
				t.Errorf("%s on a disk open for reading: %v", verb, err)
			}
		}
		compare(t, r2, make([]byte, 1<<20))
		r1.Close()
		r2.Close()
		open(t, path, w.options())
	}
}
