package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"mortise/internal/authz"
	"mortise/internal/vimapi/vimapitest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"mortise": runMortise})
}

// runMortise is cmd/mortise without its roles.
func runMortise() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := root().ExecuteContext(ctx)
	switch {
	case err == nil:
	case errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "mortise: interrupted")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "mortise:", err)
		os.Exit(1)
	}
}

func root() *cobra.Command {
	r := &cobra.Command{Use: "mortise", SilenceErrors: true, SilenceUsage: true}
	r.AddGroup(&cobra.Group{ID: GroupID, Title: "Client verbs:"})
	Add(r)
	return r
}

// TestOffline runs what needs no center.
func TestOffline(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/offline", RequireExplicitExec: true, Setup: setEnv, Cmds: map[string]func(*testscript.TestScript, bool, []string){"json": jsonCmd},
	})
}

// TestScripts runs verbs against a real center behind its real API, with a real
// KMS and hosts made small.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			w := vimapitest.Start(env.T().(testing.TB))
			env.Values["world"], env.Values["held"] = w, make(chan struct{})
			env.Setenv("URL", w.URL)
			env.Setenv("HOSTPORT", strings.TrimPrefix(w.URL, "https://"))
			env.Setenv("THUMB", w.Thumbprint())
			env.Setenv("MORTISE_PASSWORD", w.Password)
			env.Setenv("KMSPORT", strconv.Itoa(int(w.KMS.Port)))
			return setEnv(env)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"json": jsonCmd, "world": worldCmd, "imported": importedCmd, "chmod600": chmod600Cmd, "mode": modeCmd, "pattern": patternCmd, "until": untilCmd,
		},
	})
}

func setEnv(env *testscript.Env) error {
	mortise, err := exec.LookPath("mortise")
	if err != nil {
		return err
	}
	env.Setenv("MORTISE", mortise)
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("MORTISE_CONFIG", filepath.Join(env.WorkDir, "config"))
	return nil
}

// jsonCmd checks a value in what the last command printed:
//
//	json PATH REGEXP
//
// PATH is keys and indexes joined by dots; "len" is the length of a list.
func jsonCmd(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: json path regexp")
	}
	d := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	d.UseNumber()
	var v any
	ts.Check(d.Decode(&v))
	if d.More() {
		ts.Fatalf("more than one JSON value was printed")
	}
	for _, key := range strings.Split(args[0], ".") {
		switch at := v.(type) {
		case []any:
			if key == "len" {
				v = len(at)
				continue
			}
			n, err := strconv.Atoi(key)
			if err != nil || n >= len(at) {
				ts.Fatalf("no %s in a list of %d", key, len(at))
			}
			v = at[n]
		case map[string]any:
			v = at[key]
		default:
			ts.Fatalf("no %s in %v", key, v)
		}
	}
	if text := fmt.Sprint(v); regexp.MustCompile("^(?:"+args[1]+")$").MatchString(text) == neg {
		ts.Fatalf("%s is %q", args[0], text)
	}
}

// worldCmd changes the world of a script: see its cases.
func worldCmd(ts *testscript.TestScript, _ bool, args []string) {
	w := ts.Value("world").(*vimapitest.World)
	switch args[0] {
	case "provider": // set up, trusted both ways, and the default
		w.SetUpProvider()
		ts.Check(w.Center.SetDefaultProvider(context.Background(), vimapitest.Admin(), vimapitest.Provider, ""))
	case "kms-trust": // FILE: lets a client certificate in
		w.KMS.Trust(ts.ReadFile(args[1]))
	case "kms-stop":
		w.KMS.Stop()
	case "kms-start":
		w.KMS.Start()
	case "kms-revoke-all":
		for _, id := range w.KMS.Keys() {
			w.KMS.Revoke(id)
		}
	case "nocrypto": // NAME: a user without cryptographic privileges
		w.User(args[1], authz.RoleNoCryptoAdmin)
		ts.Setenv("USER_PASSWORD", vimapitest.UserPassword)
	case "slow": // DURATION: of each step of a conversion
		d, err := time.ParseDuration(args[1])
		ts.Check(err)
		w.Host.OnStep(func(int) { time.Sleep(d) })
	case "fail": // METHOD: the host fails calls of it
		w.Host.OnCall(func(method string) error {
			if method == args[1] {
				return errors.New("the disk has caught fire")
			}
			return nil
		})
	case "hold": // METHOD: the host does not begin calls of it before "world go"
		held := ts.Value("held").(chan struct{})
		w.Host.OnCall(func(method string) error {
			if method == args[1] {
				<-held
			}
			return nil
		})
	case "go":
		close(ts.Value("held").(chan struct{}))
	case "join":
		w.Join(args[1])
	case "power-cut":
		w.Host.Restart()
	default:
		ts.Fatalf("world %s?", args[0])
	}
}

// importedCmd compares what was imported with a file: imported VMX DISK FILE.
func importedCmd(ts *testscript.TestScript, neg bool, args []string) {
	w := ts.Value("world").(*vimapitest.World)
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	got, want := w.Datastore.Content(args[0], n), []byte(ts.ReadFile(args[2]))
	if bytes.Equal(got, want) == neg {
		ts.Fatalf("disk %d of %s has %d bytes, %s has %d; they are equal: %v", n, args[0], len(got), args[2], len(want), !neg)
	}
}

// chmod600Cmd makes files private, as verbs ask for.
func chmod600Cmd(ts *testscript.TestScript, _ bool, args []string) {
	for _, a := range args {
		ts.Check(os.Chmod(ts.MkAbs(a), 0o600))
	}
}

// modeCmd checks a file's mode: mode 0600 FILE.
func modeCmd(ts *testscript.TestScript, _ bool, args []string) {
	st, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", st.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s has mode %s", args[1], got)
	}
}

// patternCmd makes a sparse raw disk: pattern FILE SIZE-MIB OFFSET-KIB=TEXT…
func patternCmd(ts *testscript.TestScript, _ bool, args []string) {
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	mib, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	ts.Check(f.Truncate(mib << 20))
	for _, a := range args[2:] {
		at, text, _ := strings.Cut(a, "=")
		kib, err := strconv.ParseInt(at, 10, 64)
		ts.Check(err)
		_, err = f.WriteAt(bytes.Repeat([]byte(text), 1000), kib<<10)
		ts.Check(err)
	}
}

// untilCmd runs a command again until its output matches: until REGEXP CMD…
func untilCmd(ts *testscript.TestScript, _ bool, args []string) {
	re := regexp.MustCompile(args[0])
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err := ts.Exec(args[1], args[2:]...); err == nil && re.MatchString(ts.ReadFile("stdout")) {
			return
		}
	}
	ts.Fatalf("%v never printed %s", args[1:], args[0])
}
