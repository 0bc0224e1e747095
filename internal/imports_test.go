package internal

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// level orders the packages as ARCHITECTURE.md does: a package imports only
// lower levels, and a listed subpackage may import its parent.
var level = map[string]int{
	"secret": 0, "xts": 0, "atomicfile": 0, "vmxfile": 0, "storage": 0,
	"keysafe": 1, "vmdk": 1, "vmsd": 1, "vdisk": 1, "nbd": 1, "vmfiles": 1, "domain": 1, "rootkey": 1, "rootkey/pkcs11": 1, "tpm": 1, "store": 1, "kmipc": 1, "pki": 1,
	"kms/audit": 1, "kms": 2, "kms/kmipd": 2, "kms/admin": 2, "kms/metrics": 2, "kms/cluster": 2, "provider": 2, "provider/standard": 2, "provider/certify": 2, "kms/backup": 2, "kms/migrate": 2, "kms/unlocking": 2, "inventory": 2, "policy": 2, "authz": 2, "task": 2, "event": 2, "hostapi": 2,
	"vmx": 3, "host": 3, "center": 3, "vimapi/vimext": 3,
	"vimapi": 4, "cli": 4, "cli/kmscli": 4, "dev": 4,
}

// allowed lists the imports inside one level that the design names: the data
// path of level 1 is built from the formats beside it, and level 2's records
// are shared by the packages that work on them.
var allowed = map[string][]string{
	"vmxfile":           {"atomicfile"},
	"xts":               {"secret"},
	"vdisk":             {"keysafe", "vmdk"},
	"vmdk":              {"keysafe"},
	"vmfiles":           {"keysafe"},
	"store":             {"rootkey"},
	"provider/standard": {"provider"},
	"authz":             {"inventory"},
	"policy":            {"inventory"},
	"task":              {"inventory", "event"},
	"event":             {"inventory"},
	"host":              {"vmx"},
	"kms/admin":         {"kms/backup", "kms/cluster", "kms/migrate"},
}

// forbidden is what a package must not reach even through others: the data
// path knows nothing of key servers, databases or the web.
var forbidden = map[string][]string{
	"xts":    {"net/http", "go.etcd.io/", "github.com/ovh/kmip-go", "google.golang.org/grpc"},
	"vdisk":  {"net/http", "go.etcd.io/", "github.com/ovh/kmip-go", "google.golang.org/grpc"},
	"nbd":    {"net/http", "go.etcd.io/", "github.com/ovh/kmip-go", "google.golang.org/grpc"},
	"center": {"github.com/vmware/govmomi"},
	"kms":    {"mortise/internal/inventory", "mortise/internal/hostapi"},
	"cli":    {"mortise/internal/center", "mortise/internal/host"},
}

func TestImportDirection(t *testing.T) {
	imports := map[string][]string{} // package, relative to internal/ → what its non-test files import
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "testdata" || d.Name() == "_asm") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg := filepath.ToSlash(filepath.Dir(path))
		for _, i := range f.Imports {
			p, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			imports[pkg] = append(imports[pkg], p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(imports) < 5 {
		t.Fatalf("only %d packages found: the test looks in the wrong place", len(imports))
	}
	for pkg, list := range imports {
		from, known := level[owner(pkg)]
		if !known {
			t.Errorf("package internal/%s has no level: add it to design and to this test", pkg)
			continue
		}
		for _, imp := range list {
			rel, ours := strings.CutPrefix(imp, "mortise/internal/")
			if !ours {
				continue
			}
			to := level[owner(rel)]
			if to < from || owner(pkg) == owner(rel) || strings.HasPrefix(owner(pkg), owner(rel)+"/") || contains(allowed[owner(pkg)], owner(rel)) {
				continue
			}
			t.Errorf("internal/%s (level %d) imports internal/%s (level %d)", pkg, from, rel, to)
		}
	}
	for pkg, bad := range forbidden {
		for _, imp := range reach(imports, pkg, map[string]bool{}) {
			for _, b := range bad {
				if strings.HasPrefix(imp, b) {
					t.Errorf("internal/%s reaches %s", pkg, imp)
				}
			}
		}
	}
}

// owner is the listed package that pkg belongs to: itself or the nearest
// listed parent.
func owner(pkg string) string {
	for p := pkg; p != "." && p != ""; p = filepath.ToSlash(filepath.Dir(p)) {
		if _, ok := level[p]; ok {
			return p
		}
	}
	return pkg
}

// reach lists every import of pkg, through our own packages.
func reach(imports map[string][]string, pkg string, seen map[string]bool) (all []string) {
	if seen[pkg] {
		return nil
	}
	seen[pkg] = true
	for _, imp := range imports[pkg] {
		all = append(all, imp)
		if rel, ours := strings.CutPrefix(imp, "mortise/internal/"); ours {
			all = append(all, reach(imports, rel, seen)...)
		}
	}
	return all
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}
