// Command conformance executes the OASIS test cases of KMIP 1.0 to 1.4 against a
// live server over TLS, compares every field of every response, and prints a
// line a version:
//
//	CONFORMANCE kmip-1.4 passed=70 all=137
//
// The cases are those that github.com/ovh/kmip-go carries for its codec. By
// itself it starts a key server of its own (bin/mortise); -server names another,
// of whatever make. What a server may answer otherwise than a case has it is
// written over compare.go.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

var versions = []string{"1.0", "1.1", "1.2", "1.3", "1.4"}

type options struct {
	binary             string
	address            string
	cert, key, ca      string
	only               string
	verbose, writeDocs bool
}

func main() {
	var o options
	flag.StringVar(&o.binary, "mortise", "bin/mortise", "the program whose key server is tested")
	flag.StringVar(&o.address, "server", "", "address of another server to test, with an empty store; needs -cert, -key and -ca")
	flag.StringVar(&o.cert, "cert", "", "client certificate for -server (PEM)")
	flag.StringVar(&o.key, "key", "", "its key (PEM)")
	flag.StringVar(&o.ca, "ca", "", "certificate that -server is to show, or its issuer's (PEM)")
	flag.StringVar(&o.only, "run", "", "run only cases whose name has this in it, such as 1.4/SASED")
	flag.BoolVar(&o.verbose, "v", false, "tell of each case, and how the failing ones differ")
	flag.BoolVar(&o.writeDocs, "write", false, "write the list of cases not passed into doc/kmip-profile.md, and the floor")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	results, err := execute(ctx, o)
	if err != nil {
		return err
	}
	for _, r := range results {
		switch {
		case r.passed() && o.verbose:
			fmt.Printf("pass %s\n", r.id())
		case r.outside != "" && o.verbose:
			fmt.Printf("skip %s: not in scope: %s\n", r.id(), r.outside)
		case r.err != nil && (o.verbose || o.only != ""):
			fmt.Printf("FAIL %s: %s\n", r.id(), strings.ReplaceAll(r.err.Error(), "\n", "\n     "))
		}
	}
	for _, line := range summary(results) {
		fmt.Println(line)
	}
	if !o.writeDocs {
		return nil
	}
	if o.only != "" {
		return fmt.Errorf("-write needs all cases")
	}
	return writeDocs(repository(), results)
}

// A result tells how one case went.
type result struct {
	*testCase
	outside string // what of it is out of scope
	err     error  // nil: passed
}

func (r result) passed() bool { return r.err == nil && r.outside == "" }

// A tally of one version's cases.
type tally struct{ passed, scope, all int }

func count(results []result, version string) (c tally) {
	for _, r := range results {
		if r.version != version {
			continue
		}
		c.all++
		if r.outside == "" {
			c.scope++
		}
		if r.passed() {
			c.passed++
		}
	}
	return c
}

func summary(results []result) (lines []string) {
	for _, v := range versions {
		if c := count(results, v); c.all > 0 {
			lines = append(lines, fmt.Sprintf("CONFORMANCE kmip-%s passed=%d all=%d scope=%d", v, c.passed, c.all, c.scope))
		}
	}
	return lines
}

// execute runs the cases. Those of one series share an instance, since the
// later ones use what the earlier ones made; any other has one of its own.
func execute(ctx context.Context, o options) ([]result, error) {
	server, err := openServer(ctx, o)
	if err != nil {
		return nil, err
	}
	defer server.close()
	return server.play(ctx, o.only)
}

// play runs the cases whose name has only in it.
func (s *server) play(ctx context.Context, only string) ([]result, error) {
	dir, err := casesDir()
	if err != nil {
		return nil, err
	}
	var results []result
	for _, v := range versions {
		cases, err := load(dir, v)
		if err != nil {
			return nil, err
		}
		series, missing := "", ""
		var before *play
		for _, c := range cases {
			if !strings.Contains(c.id(), only) {
				continue
			}
			if in := seriesOf(c); in == "" || in != series {
				series, missing, before = in, "", nil
				if err := s.clear(ctx); err != nil {
					return nil, err
				}
			}
			r := result{testCase: c, outside: outOfScope(c)}
			if r.outside == "" && missing != "" {
				r.outside = "objects of " + missing
			}
			if r.outside == "" {
				before = newPlay(s, time.Now(), before)
				r.err = before.run(c)
			} else {
				missing = c.name
			}
			results = append(results, r)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
		}
	}
	return results, nil
}

// seriesOf names the series that a case is one of: the storage array and the
// tape library write keys in one case and read them in the next.
func seriesOf(c *testCase) string {
	for _, s := range []string{"SASED", "TL-", "TL_"} {
		if strings.HasPrefix(c.name, s) {
			return c.version + s
		}
	}
	return ""
}

func repository() string {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "."
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}

// casesDir is where the codec's module has the cases.
func casesDir() (string, error) {
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/ovh/kmip-go")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("finding the OASIS test cases: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "kmiptest", "testdata"), nil
}
