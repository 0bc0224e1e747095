// Package pykmip runs PyKMIP's client, which is not ours and not changed, against
// the built program: each operation it has, at each version of KMIP it speaks
// that the server speaks too.
package pykmip

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"mortise/test/kmsproc"
)

const python = "/usr/bin/python3"

var versions = []string{"1.0", "1.1", "1.2", "1.3", "1.4"}

// A row says what an operation is to do in each version. since is the version
// that brought it ("" for 1.0; "2.0" is never): before it is refused as not
// supported, like what the server is not for. Of the client's methods
// set_attribute is missing, which it has for KMIP 2.0 only.
type row struct {
	use   string
	since string
}

const never = "2.0"

var table = []row{
	{"create", ""}, {"create: a taken name", ""}, {"create: an unknown operation policy", ""},
	{"register", ""}, {"register: secret data", ""}, {"register: an opaque object", ""}, {"register: a MAC key", ""},
	{"create_key_pair", never},
	{"get", ""}, {"get: wrapped", ""}, {"get: a guess", ""}, {"get: deactivated", ""},
	{"get_attributes", ""}, {"get_attributes: all", ""}, {"get_attribute_list", ""},
	{"locate: by name", ""}, {"locate: by state and algorithm", ""}, {"locate: by object type", ""}, {"locate: by length", ""},
	{"locate: by identifier", ""}, {"locate: by dates", ""}, {"locate: before its time", ""}, {"locate: nothing", ""},
	{"locate: at most two", ""}, {"locate: with an offset", ""}, {"locate: archived", ""},
	{"check", ""}, {"check: another use", ""},
	{"modify_attribute", ""}, {"modify_attribute: State", ""}, {"delete_attribute", ""}, {"delete_attribute: State", ""},
	{"rekey", ""}, {"derive_key: no mask", ""}, {"derive_key: HMAC", ""}, {"derive_key: PBKDF2", ""}, {"derive_key: encryption", ""},
	{"encrypt, decrypt: ECB", "1.2"}, {"encrypt, decrypt: CBC", "1.2"}, {"encrypt, decrypt: CTR", "1.2"}, {"encrypt, decrypt: padded", "1.2"},
	{"mac", "1.2"}, {"sign", never}, {"signature_verify", never},
	{"activate", ""}, {"activate: again", ""}, {"revoke", ""}, {"revoke: compromised", ""}, {"destroy", ""}, {"destroy: while active", ""},
	{"query", ""}, {"discover_versions", "1.1"}, {"rekey_key_pair", never},
}

func (r row) want(version string) string {
	if version < r.since {
		return "refused OPERATION_NOT_SUPPORTED"
	}
	return "ok"
}

func TestPyKMIP(t *testing.T) {
	if err := exec.Command(python, "-c", "import kmip").Run(); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("python3-pykmip is needed")
		}
		t.Skip("python3-pykmip is not installed")
	}
	dir, err := os.MkdirTemp("", "mtsp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin, err := kmsproc.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range versions {
		t.Run(version, func(t *testing.T) { drive(t, bin, version) })
	}
}

// drive runs the script against a server of its own, so that it finds what it
// made and nothing else.
func drive(t *testing.T, bin, version string) {
	dir, err := os.MkdirTemp("", "mtsp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := kmsproc.New(bin, dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if strings.Contains(s.Log(), "panic") {
			t.Error(s.Log())
		}
	})
	client, err := s.Client(t.Context(), "pykmip", "administrator")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(s.Address)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), python, "drive.py", port, client.File, s.CA(), version).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	var seen []string
	for line := range strings.Lines(string(out)) {
		use, got, ok := strings.Cut(strings.TrimSpace(line), "\t")
		if !ok {
			continue
		}
		seen = append(seen, use)
		i := slices.IndexFunc(table, func(r row) bool { return r.use == use })
		if i < 0 {
			t.Errorf("%q is not in the table", use)
			continue
		}
		if want := table[i].want(version); got != want {
			t.Errorf("%-32s %s, want %s", use, got, want)
		}
	}
	for _, r := range table {
		if !slices.Contains(seen, r.use) {
			t.Errorf("%q was not tried", r.use)
		}
	}
	fmt.Printf("PYKMIP %s tried=%d\n", version, len(seen))
}
