package vmdk

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
)

// esxi is a descriptor as ESXi writes it, with entries of its own.
const esxi = `# Disk DescriptorFile
version=4
encoding="UTF-8"
CID=fffffffe
parentCID=ffffffff
isNativeSnapshot="no"
createType="vmfs"

# Extent description
RW 83886080 VMFS "test-flat.vmdk"

# Change Tracking File
changeTrackPath="test-ctk.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "pvscsi"
ddb.geometry.cylinders = "5221"
ddb.longContentID = "f6a9b4d2c3e1a0b9d8c7e6f5fffffffe"
ddb.toolsVersion = "11360"
ddb.uuid = "60 00 C2 93 7b a0 3a 03-9f 22 56 c5 29 93 b7 27"
ddb.virtualHWVersion = "14"
`

func TestReadsVMwares(t *testing.T) {
	text := strings.Replace(esxi, "version=4", "version=1", 1)
	for _, text := range []string{text, strings.ReplaceAll(text, "\n", "\r\n"), strings.TrimSuffix(text, "\n")} {
		d, err := Parse("test.vmdk", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if d.Size() != 40<<30 || d.UUID() != diskUUID || d.CID() != 0xfffffffe || d.CreateType() != VMFS || d.Extents()[0].File != "test-flat.vmdk" {
			t.Errorf("reads %d %v %x", d.Size(), d.UUID(), d.CID())
		}
		if string(d.Bytes()) != text {
			t.Errorf("prints %q", d.Bytes())
		}
	}
	if _, err := Parse("test.vmdk", []byte(esxi)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a newer version: %v", err)
	}
}

// TestEveryEditIsFound edits every byte of a sealed descriptor that could matter,
// cuts it everywhere, and doubles and drops each line: what still parses as an
// encrypted disk must not verify, and nothing may pass for a disk in clear.
func TestEveryEditIsFound(t *testing.T) {
	d, k := sealed(t)
	text := string(d.Bytes())
	free := 0
	try := func(what, edited string) {
		p, err := Parse("/ds/vm/vm.vmdk", []byte(edited))
		if err != nil {
			if !strings.HasPrefix(err.Error(), "/ds/vm/vm.vmdk:") {
				t.Errorf("%s: %q does not name the file", what, err)
			}
			return
		}
		e, ok := p.Encryption()
		if !ok {
			t.Errorf("%s: passes for a disk in clear:\n%s", what, edited)
			return
		}
		if err := p.Verify(k.mac); err == nil {
			// Comments, spaces and the disk data base but its uuid are free.
			if p.Size() != d.Size() || p.UUID() != d.UUID() || p.CID() != d.CID() || p.Extents()[0] != d.Extents()[0] || e.KeySafe.String() != k.safe.String() || e.Epoch != 1 || e.UnitSize != 4096 {
				t.Errorf("%s: verifies as another disk:\n%s", what, edited)
			}
			free++
		} else if !errors.Is(err, ErrEdited) || !strings.Contains(err.Error(), "restore") {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range len(text) {
		c := []byte(text)
		c[i] ^= 1
		try("flipped bit", string(c))
		try("cut", text[:i])
	}
	lines := strings.SplitAfter(text, "\n")
	for i, l := range lines {
		try("doubled "+l, strings.Join(lines[:i+1], "")+l+strings.Join(lines[i+1:], ""))
		try("dropped "+l, strings.Join(lines[:i], "")+strings.Join(lines[i+1:], ""))
		if i > 1 {
			moved := append([]string{lines[0], l}, lines[1:i]...)
			try("moved "+l, strings.Join(append(moved, lines[i+1:]...), ""))
		}
	}
	if free == 0 {
		t.Error("no harmless edit verified: the test does not do what it says")
	}
}

func TestTypedErrors(t *testing.T) {
	d, _ := sealed(t)
	text := string(d.Bytes())
	clearText := string(plain(t).Bytes())
	rep := func(s, old, new string) string {
		if !strings.Contains(s, old) {
			t.Fatalf("%q is not in the descriptor", old)
		}
		return strings.Replace(s, old, new, 1)
	}
	line := func(s, key string) string {
		i := strings.Index(s, key)
		return s[i : i+strings.IndexByte(s[i:], '\n')+1]
	}
	for _, c := range []struct {
		name, text string
		cause      error
	}{
		{"empty", "", ErrTruncated},
		{"a sparse VMDK", "KDMV\x01\x00", ErrUnsupported},
		{"no descriptor", "hello", ErrSyntax},
		{"zero byte", clearText + "\x00\n", ErrSyntax},
		{"not UTF-8", clearText + "# \xff", ErrSyntax},
		{"control character", clearText + "x=\x07\n", ErrSyntax},
		{"huge", clearText + strings.Repeat("#\n", MaxText), ErrTooLarge},
		{"long line", clearText + "#" + strings.Repeat("x", MaxLine), ErrTooLarge},
		{"many entries", clearText + many(MaxEntries), ErrTooLarge},
		{"duplicate", clearText + "cid=1\n", ErrDuplicate},
		{"no key", clearText + "=1\n", ErrSyntax},
		{"no entry", clearText + "foo\n#\n", ErrSyntax},
		{"cut in an entry", clearText + "foo", ErrTruncated},
		{"cut in a value", clearText + `foo = "ba`, ErrTruncated},
		{"open quote", clearText + "foo = \"ba\n#\n", ErrSyntax},
		{"text after value", clearText + "foo = \"ba\" r\n", ErrSyntax},
		{"quote in value", clearText + "foo = b\"a\n", ErrSyntax},
		{"no createType", rep(clearText, line(clearText, "createType"), ""), ErrTruncated},
		{"no extents", rep(clearText, line(clearText, "RW "), ""), ErrTruncated},
		{"no CID", rep(clearText, line(clearText, "CID"), ""), ErrTruncated},
		{"bad CID", rep(clearText, "CID=1234abcd", "CID=x"), ErrValue},
		{"bad uuid", rep(clearText, "60 00", "60"), ErrValue},
		{"sparse extents", rep(clearText, "FLAT", "SPARSE"), ErrUnsupported},
		{"sparse createType", rep(clearText, "monolithicFlat", "streamOptimized"), ErrUnsupported},
		{"extent in another folder", rep(clearText, `"vm-flat`, `"../other/vm-flat`), ErrPath},
		{"absolute extent", rep(clearText, `"vm-flat`, `"/etc/passwd`), ErrPath},
		{"extent ..", rep(clearText, `"vm-flat.vmdk"`, `".."`), ErrPath},
		{"no sectors", rep(clearText, "RW 6144", "RW 0"), ErrValue},
		{"too many sectors", rep(clearText, "RW 6144", "RW 18446744073709551615"), ErrValue},
		{"sum too large", rep(clearText, line(clearText, "RW "), strings.Repeat("RW 133143986176 FLAT \"a\" 0\n", 2)), ErrTooLarge},
		{"bad offset", rep(clearText, `" 0`, `" -1`), ErrValue},
		{"short extent", rep(clearText, line(clearText, "RW "), "RW 1\n"), ErrSyntax},
		{"cut extent", clearText + "RW 1", ErrTruncated},
		{"cut extent name", clearText + `RW 1 FLAT "vm`, ErrTruncated},
		{"foreign snapshot", rep(clearText, "parentCID=ffffffff", "parentCID=00000001\nparentFileNameHint=\"p.vmdk\""), ErrUnsupported},
		{"FLAT in an encrypted disk", rep(text, "XTSFLAT", "FLAT"), ErrEdited},
		{"XTSFLAT in a disk in clear", rep(clearText, "FLAT", "XTSFLAT"), ErrEdited},
		{"createType turned", rep(text, MortiseFlat, MonolithicFlat), ErrEdited},
		{"both turned", rep(rep(text, MortiseFlat, MonolithicFlat), "XTSFLAT", "FLAT"), ErrEdited},
		{"second extent", rep(text, line(text, "RW "), line(text, "RW ")+line(text, "RW ")), ErrEdited},
		{"key safe deleted", rep(text, line(text, keySafeKey+" "), ""), ErrTruncated},
		{"mac deleted", rep(text, line(text, macKey), ""), ErrTruncated},
		{"uuid deleted", rep(text, line(text, "ddb.uuid"), ""), ErrTruncated},
		{"key safe damaged", rep(text, "list/(", "list("), ErrEdited},
		{"unit size", rep(text, `"4096"`, `"4095"`), ErrEdited},
		{"unit size cut", rep(text, `"4096"`, `"4"`), ErrEdited},
		{"epoch", rep(text, epochKey+` = "1"`, epochKey+` = "0"`), ErrEdited},
		{"another cipher", rep(text, "XTS-AES-256", "XTS-AES-128"), ErrUnsupported},
		{"mac cut", rep(text, macKey+` = "`, macKey+` = "0`), ErrEdited},
	} {
		got, err := Parse("/ds/vm/vm.vmdk", []byte(c.text))
		var e *Error
		if got != nil || !errors.As(err, &e) || !errors.Is(err, c.cause) || e.File != "/ds/vm/vm.vmdk" {
			t.Errorf("%s: %v, want %v", c.name, err, c.cause)
		}
	}
	for _, entry := range []string{
		"encryption.keySafe = \"vmware:key/list/(pair/(fqid/x))\"\n", "encryptionKeys=\"vmware:key/list/(x)\"\n", "ddb.iofilters = \"vmwarevmcrypt\"\n", "iofilters=\"VMW_spm_1.0.0,vmwarevmcrypt\"\n",
	} {
		var foreign *keysafe.ForeignError
		if _, err := Parse("vm.vmdk", []byte(clearText+entry)); !errors.As(err, &foreign) || !strings.Contains(err.Error(), "decrypt the VM there") {
			t.Errorf("%s: %v, want the way in", entry, err)
		}
	}
}

func many(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteString("k" + strings.Repeat("i", i%50) + string(rune('a'+i%26)) + strings.Repeat("j", i/50) + "=1\n")
	}
	return b.String()
}

func TestNewRefuses(t *testing.T) {
	ok := Spec{Size: 1 << 20, UUID: diskUUID, CID: 1, Extent: "a-flat.vmdk"}
	for name, edit := range map[string]func(*Spec){
		"no size": func(s *Spec) { s.Size = 0 }, "odd size": func(s *Spec) { s.Size = 513 }, "huge": func(s *Spec) { s.Size = MaxSize + 512 }, "negative": func(s *Spec) { s.Size = -512 },
		"no uuid": func(s *Spec) { s.UUID = uuid.Nil }, "no parent's CID": func(s *Spec) { s.CID = NoParent },
		"extent path": func(s *Spec) { s.Extent = "a/b" }, "parent path": func(s *Spec) { s.Parent = "../b.vmdk" }, "quote": func(s *Spec) { s.Extent = `a"b` },
		"parent without CID": func(s *Spec) { s.Parent, s.ParentCID = "b.vmdk", NoParent },
	} {
		s := ok
		edit(&s)
		if _, err := New("a.vmdk", s); err == nil {
			t.Errorf("%s: made", name)
		}
	}
}

func TestEdits(t *testing.T) {
	d := plain(t)
	if err := d.SetSize(20 << 30); err != nil {
		t.Fatal(err)
	}
	d.SetCID(9)
	if err := d.SetDDB("ddb.adapterType", "ide"); err != nil {
		t.Fatal(err)
	}
	for _, kv := range [][2]string{{"CID", "1"}, {"ddb.uuid", "1"}, {"ddb.x y", "1"}, {"ddb.x", "1\""}, {"ddb.x", "1\n2"}} {
		if err := d.SetDDB(kv[0], kv[1]); !errors.Is(err, ErrValue) {
			t.Errorf("SetDDB(%q, %q): %v", kv[0], kv[1], err)
		}
	}
	if err := d.SetParent("x.vmdk", 1); !errors.Is(err, ErrValue) {
		t.Errorf("a base disk got a parent: %v", err)
	}
	p, err := Parse("vm.vmdk", d.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if v, _ := p.Get("ddb.adapterType"); p.Size() != 20<<30 || p.CID() != 9 || v != "ide" {
		t.Errorf("reads back %d, %x, %s", p.Size(), p.CID(), v)
	}
	link, err := New("vm-000001.vmdk", Spec{Size: 1 << 20, UUID: diskUUID, CID: 1, Extent: DeltaName(LinkName("vm.vmdk", 1)), Parent: "vm.vmdk", ParentCID: 2})
	if err != nil {
		t.Fatal(err)
	}
	if err := link.SetParent("other.vmdk", 3); err != nil {
		t.Fatal(err)
	}
	if err := link.SetParent("../other.vmdk", 3); !errors.Is(err, ErrPath) {
		t.Errorf("parent outside the folder: %v", err)
	}
	if l, err := Parse("x", link.Bytes()); err != nil || l.Parent() != "other.vmdk" || l.ParentCID() != 3 || l.Extents()[0].File != "vm-000001-delta.vmdk" {
		t.Errorf("link reads back wrong: %v", err)
	}
	if FlatName("vm.vmdk") != "vm-flat.vmdk" || !IsExtentName("vm-flat.vmdk") || !IsExtentName("vm-000001-delta.vmdk") || IsExtentName("vm-000001.vmdk") {
		t.Error("names")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(plain(f).Bytes())
	d, _ := sealed(f)
	f.Add(d.Bytes())
	f.Add([]byte(strings.Replace(esxi, "version=4", "version=1", 1)))
	f.Add([]byte("# Disk DescriptorFile\r\nversion = 3\nCID=0\ncreateType=twoGbMaxExtentFlat\nRW 1 FLAT \"a b\" 7\n RDONLY\t2 FLAT \"c\""))
	f.Add([]byte("# Disk DescriptorFile\n\u0085\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := Parse("f", text)
		if err != nil {
			return
		}
		if !bytes.Equal(d.Bytes(), bytes.TrimRight(text, "\x00")) {
			t.Fatalf("%q prints as %q", text, d.Bytes())
		}
		if d.Size() <= 0 || d.Size() > MaxSize {
			t.Fatalf("size %d", d.Size())
		}
		d.SetCID(d.CID() ^ 1)
		size := d.Size()
		if _, enc := d.Encryption(); enc {
			if err := d.Unseal(); err != nil {
				t.Fatal(err)
			}
		}
		again, err := Parse("f", d.Bytes())
		if err != nil {
			t.Fatalf("edited it does not parse: %v\n%s", err, d.Bytes())
		}
		if again.CID() != d.CID() || again.Size() != size || again.UUID() != d.UUID() {
			t.Fatalf("edited it reads otherwise:\n%s", d.Bytes())
		}
	})
}
