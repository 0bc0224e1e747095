package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"mortise/internal/kms/admin"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"mortise": func() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		os.Exit(run(ctx, os.Args[1:]))
	}})
}

// TestScripts runs the roles as an administrator starts them.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			// Sockets have short paths; ports must be free.
			dir, err := os.MkdirTemp("", "mtss")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			env.Setenv("SOCK", dir)
			for _, name := range []string{"PORT1", "PORT2", "PORT3", "PORT4", "PORT5"} {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					return err
				}
				env.Setenv(name, fmt.Sprint(l.Addr().(*net.TCPAddr).Port))
				l.Close()
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// waitfor FILE waits until it is there.
			"waitfor": func(ts *testscript.TestScript, _ bool, args []string) {
				for range 300 {
					if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
						return
					}
					time.Sleep(100 * time.Millisecond)
				}
				ts.Fatalf("%s does not appear", args[0])
			},
			// waitopen PORT waits until something listens there.
			"waitopen": func(ts *testscript.TestScript, _ bool, args []string) {
				for range 300 {
					if c, err := net.Dial("tcp", "127.0.0.1:"+args[0]); err == nil {
						c.Close()
						return
					}
					time.Sleep(100 * time.Millisecond)
				}
				ts.Fatalf("nothing listens on port %s", args[0])
			},
			// waitkms SOCKET waits until the key server behind it is unlocked.
			"waitkms": func(ts *testscript.TestScript, _ bool, args []string) {
				for range 300 {
					list, err := admin.DialSocket(ts.MkAbs(args[0])).Instances(context.Background())
					if err == nil && len(list) > 0 && len(list[0].Endpoints) > 0 {
						return
					}
					time.Sleep(100 * time.Millisecond)
				}
				ts.Fatalf("the key server is not unlocked")
			},
			// get PATH [STATUS] is a GET of http://127.0.0.1PATH, whose body becomes stdout.
			"get": func(ts *testscript.TestScript, _ bool, args []string) {
				resp, err := http.Get("http://127.0.0.1" + args[0])
				ts.Check(err)
				defer resp.Body.Close()
				body, err := io.ReadAll(resp.Body)
				ts.Check(err)
				fmt.Fprint(ts.Stdout(), string(body))
				if len(args) > 1 && fmt.Sprint(resp.StatusCode) != args[1] {
					ts.Fatalf("GET %s: %s\n%s", args[0], resp.Status, body)
				}
			},
			// json PATH[=VALUE]... looks into the JSON value that stdout is: exactly one,
			// with that path (a.0.b), and what is there prints as VALUE.
			"json": func(ts *testscript.TestScript, neg bool, args []string) {
				text := ts.ReadFile("stdout")
				d := json.NewDecoder(strings.NewReader(text))
				var whole any
				ts.Check(d.Decode(&whole))
				if _, err := d.Token(); err != io.EOF {
					ts.Fatalf("more than one JSON value:\n%s", text)
				}
				for _, arg := range args {
					path, want, compare := strings.Cut(arg, "=")
					v, there := whole, true
					for _, step := range strings.FieldsFunc(path, func(r rune) bool { return r == '.' }) {
						switch at := v.(type) {
						case map[string]any:
							v, there = at[step]
						case []any:
							i, err := strconv.Atoi(step)
							if there = err == nil && i < len(at); there {
								v = at[i]
							}
						default:
							there = false
						}
						if !there {
							break
						}
					}
					if ok := there && (!compare || fmt.Sprint(v) == want); ok == neg {
						ts.Fatalf("%s: there %v, value %v, in\n%s", arg, there, v, text)
					}
				}
			},
			"chmod600": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(os.Chmod(ts.MkAbs(args[0]), 0o600))
			},
		},
	})
}
