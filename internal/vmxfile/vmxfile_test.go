package vmxfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
)

const sample = "#!/usr/bin/vmware\n" +
	".encoding = \"UTF-8\"\n" +
	"config.version = \"8\"\n" +
	"\n" +
	"  # disks\n" +
	"scsi0:0.fileName = \"vm.vmdk\" # the first\n" +
	"memSize=2048\n" +
	"displayName = \"日本 |22x|22 |7C y\"\r\n" +
	"uefi.secureBoot.enabled = \"TRUE\"\n" +
	"empty = \"\"\n" +
	"annotation = \"a|0Ab\""

func parse(t testing.TB, text string) *File {
	t.Helper()
	f, err := Parse("vm.vmx", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestReadAndPrint(t *testing.T) {
	f := parse(t, sample)
	if got := string(f.Bytes()); got != sample {
		t.Errorf("prints\n%q\nwant\n%q", got, sample)
	}
	for key, want := range map[string]string{
		"SCSI0:0.FILENAME": "vm.vmdk", "memsize": "2048", "displayName": `日本 "x" | y`, "empty": "", "annotation": "a\nb", ".Encoding": "UTF-8",
	} {
		if got, ok := f.Get(key); !ok || got != want {
			t.Errorf("%s = %q, %v; want %q", key, got, ok, want)
		}
	}
	if _, ok := f.Get("absent"); ok || f.String("absent", "def") != "def" || f.String("empty", "def") != "" {
		t.Error("absent and empty are confused")
	}
	if n, err := f.Int("memSize", 1); n != 2048 || err != nil {
		t.Errorf("memSize %d, %v", n, err)
	}
	if n, err := f.Int("absent", 7); n != 7 || err != nil {
		t.Errorf("absent number %d, %v", n, err)
	}
	if v, err := f.Bool("uefi.secureBoot.enabled", false); !v || err != nil {
		t.Errorf("secureBoot %v, %v", v, err)
	}
	var e *Error
	if _, err := f.Int("displayName", 1); !errors.As(err, &e) || e.Line != 8 || e.Key != "displayName" || !errors.Is(err, ErrValue) {
		t.Errorf("a name as number: %v", err)
	}
	if _, err := f.Bool("memSize", true); !errors.Is(err, ErrValue) {
		t.Errorf("2048 as truth: %v", err)
	}
	var keys []string
	for k := range f.All() {
		keys = append(keys, k)
	}
	if got := strings.Join(keys, " "); got != ".encoding config.version scsi0:0.fileName memSize displayName uefi.secureBoot.enabled empty annotation" {
		t.Errorf("keys %s", got)
	}
}

func TestEditKeepsTheRest(t *testing.T) {
	f := parse(t, sample)
	for key, value := range map[string]string{"SCSI0:0.fileName": "a \"b\"|#\n", "memSize": "4096"} {
		if err := f.Set(key, value); err != nil {
			t.Fatal(err)
		}
	}
	if !f.Delete("EMPTY") || f.Delete("empty") {
		t.Error("Delete is wrong about what was there")
	}
	if err := f.Set("new.key", "v"); err != nil {
		t.Fatal(err)
	}
	want := strings.NewReplacer(
		`scsi0:0.fileName = "vm.vmdk" # the first`, `scsi0:0.fileName = "a |22b|22|7C|23|0A" # the first`,
		"memSize=2048", `memSize="4096"`,
		"empty = \"\"\n", "",
		"annotation = \"a|0Ab\"", "annotation = \"a|0Ab\"\nnew.key = \"v\"\n").Replace(sample)
	if got := string(f.Bytes()); got != want {
		t.Errorf("edited\n%s\nwant\n%s", got, want)
	}
	g := parse(t, want)
	if v, _ := g.Get("scsi0:0.fileName"); v != "a \"b\"|#\n" {
		t.Errorf("read back %q", v)
	}
	if v, _ := f.Get("annotation"); v != "a\nb" {
		t.Errorf("after Delete the index is off: annotation = %q", v)
	}
}

func TestLineEndsAndBOM(t *testing.T) {
	f := parse(t, "\ufeff.encoding = \"UTF-8\"\r\na = \"1\"\r\n")
	if err := errors.Join(f.Set("a", "2"), f.Set("b", "3")); err != nil {
		t.Fatal(err)
	}
	if got, want := string(f.Bytes()), "\ufeff.encoding = \"UTF-8\"\r\na = \"2\"\r\nb = \"3\"\r\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestEncodings reads a name as an old Japanese and an old German Workstation
// wrote it; 表 and ソ have a byte in Shift_JIS that is \ or | alone in ASCII.
func TestEncodings(t *testing.T) {
	for enc, name := range map[string]struct{ raw, text string }{
		"Shift_JIS":    {"\x95\x5c\x83\x5c|22", `表ソ"`},
		"windows-1252": {"B\xfcro \x80", "Büro €"},
		"EUC-JP":       {"\xc6\xfc\xcb\xdc", "日本"},
		"GBK":          {"\xd6\xd0\xce\xc4", "中文"},
	} {
		text := fmt.Sprintf(".encoding = %q\ndisplayName = \"%s\"\n", enc, name.raw)
		f := parse(t, text)
		if got, _ := f.Get("displayName"); got != name.text {
			t.Errorf("%s: %q, want %q", enc, got, name.text)
		}
		if string(f.Bytes()) != text {
			t.Errorf("%s: prints %q", enc, f.Bytes())
		}
		if err := f.Set("copy", name.text); err != nil {
			t.Errorf("%s: %v", enc, err)
		}
		if v, _ := parse(t, string(f.Bytes())).Get("copy"); v != name.text {
			t.Errorf("%s: copy reads %q", enc, v)
		}
		if err := f.Set("x", "\U0001f512"); !errors.Is(err, ErrEncoding) && enc != "GBK" {
			t.Errorf("%s: a character it has not: %v", enc, err)
		}
		if err := f.Set(".encoding", "UTF-8"); !errors.Is(err, ErrEncoding) {
			t.Errorf("%s: changing the encoding: %v", enc, err)
		}
	}
}

func TestRefuses(t *testing.T) {
	for _, c := range []struct {
		text  string
		cause error
		line  int
	}{
		{"a = \"1\"\nA = \"2\"\n", ErrDuplicate, 2},
		{"a = \"1\"\nb\n", ErrSyntax, 2},
		{"a = \"1", ErrSyntax, 1},
		{"a = \"1\" b", ErrSyntax, 1},
		{"a = b\"c", ErrSyntax, 1},
		{" = \"1\"", ErrSyntax, 1},
		{"a b = \"1\"", ErrSyntax, 1},
		{"a = \"1\"\n\nb = \"\x00\"", ErrSyntax, 3},
		{"a = \"\x07\"", ErrSyntax, 1},
		{"a = \"|00\"", ErrValue, 1},
		{"a = \"|FF\"", ErrValue, 1},
		{"a = \"\xff\"", ErrEncoding, 1},
		{".encoding = \"klingon\"", ErrEncoding, 1},
		{".encoding = \"UTF-16\"", ErrEncoding, 1},
		{"a = \"" + strings.Repeat("x", MaxLine) + "\"", ErrTooLarge, 1},
		{strings.Repeat("\n", MaxLines+1), ErrTooLarge, MaxLines + 1},
		{strings.Repeat("x", MaxSize+1), ErrTooLarge, 0},
		{strings.Repeat("k", MaxKey+1) + " = \"1\"", ErrSyntax, 1},
	} {
		_, err := Parse("/ds/vm.vmx", []byte(c.text))
		var e *Error
		if !errors.As(err, &e) || !errors.Is(err, c.cause) || e.Line != c.line || !strings.HasPrefix(err.Error(), "/ds/vm.vmx:") {
			t.Errorf("%.40q: %v, want %v on line %d", c.text, err, c.cause, c.line)
		}
	}
	f := New()
	for _, kv := range [][2]string{{"", "x"}, {"a b", "x"}, {"a", "\x00"}, {"a", "\xff"}, {"a", strings.Repeat("x", MaxLine)}, {"a\nb", "x"}} {
		if err := f.Set(kv[0], kv[1]); err == nil {
			t.Errorf("Set(%.20q, %.20q) succeeded", kv[0], kv[1])
		}
	}
	if got := string(f.Bytes()); got != ".encoding = \"UTF-8\"\n" {
		t.Errorf("refused values left %q", got)
	}
}

func TestSaveLoadUpdate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.vmx")
	f := parse(t, sample)
	if err := errors.Join(f.Set("n", "0"), f.Save(path)); err != nil {
		t.Fatal(err)
	}
	// Every update reads what the one before wrote.
	const workers, each = 8, 10
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				err := Update(path, func(f *File) error {
					n, err := f.Int("n", -1)
					return errors.Join(err, f.Set("n", fmt.Sprint(n+1)))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	g, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := g.Int("n", -1); n != workers*each || err != nil {
		t.Errorf("n = %d after %d updates (%v)", n, workers*each, err)
	}
	if g.Name() != path {
		t.Errorf("name %q", g.Name())
	}
	before, _ := os.Stat(path)
	no := errors.New("no")
	if err := Update(path, func(f *File) error { f.Delete("n"); return no }); !errors.Is(err, no) {
		t.Error(err)
	}
	if err := Update(path, func(*File) error { return nil }); err != nil {
		t.Error(err)
	}
	if after, _ := os.Stat(path); !os.SameFile(before, after) {
		t.Error("an update that failed or changed nothing wrote the file")
	}
	if err := os.WriteFile(path, make([]byte, MaxSize+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a huge file: %v", err)
	}
	if err := Update(path+"/none", func(*File) error { return nil }); err == nil {
		t.Error("updated a file that cannot be")
	}
}

func TestUUID(t *testing.T) {
	want := uuid.MustParse("564d0102-0304-0506-0708-090a0b0c0d0e")
	const text = "56 4d 01 02 03 04 05 06-07 08 09 0a 0b 0c 0d 0e"
	for _, s := range []string{text, want.String(), strings.ToUpper(text)} {
		if got, err := ParseUUID(s); err != nil || got != want {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	if FormatUUID(want) != text {
		t.Errorf("%q", FormatUUID(want))
	}
	for _, s := range []string{"", "56", text + "0", strings.Replace(text, "5", "g", 1), strings.Repeat(" ", 100)} {
		if _, err := ParseUUID(s); err == nil {
			t.Errorf("%q is a UUID", s)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte(".encoding = \"Shift_JIS\"\ndisplayName = \"\x95\x5c\x83\x5c\"\n"))
	f.Add([]byte("a = b # c\nd=\"e|2\"#f"))
	f.Add([]byte("\ufeff# x\r\n\r\na=\r\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := Parse("f", text)
		if err != nil {
			return
		}
		if string(d.Bytes()) != string(text) {
			t.Fatalf("%q prints as %q", text, d.Bytes())
		}
		// Setting each value to itself changes no meaning.
		want := map[string]string{}
		for k, v := range d.All() {
			want[k] = v
		}
		for k, v := range want {
			if err := d.Set(k, v); err != nil {
				if errors.Is(err, ErrTooLarge) || errors.Is(err, ErrEncoding) {
					return // escapes grew it, or the encoding is not one-to-one
				}
				t.Fatal(err)
			}
		}
		e, err := Parse("f", d.Bytes())
		if err != nil {
			if d.enc != nil || errors.Is(err, ErrTooLarge) {
				return
			}
			t.Fatalf("%q does not parse: %v", d.Bytes(), err)
		}
		for k, v := range e.All() {
			if want[k] != v && d.enc == nil {
				t.Fatalf("%s: %q became %q in %q", k, want[k], v, d.Bytes())
			}
			delete(want, k)
		}
		if len(want) != 0 {
			t.Fatalf("lost %v in %q", want, d.Bytes())
		}
	})
}
