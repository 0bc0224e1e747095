// Package cli is Mortise's client verbs: login, provider, policy, host, vm, task
// and key; and disk, which needs no center. Every other verb is a client of the vSphere API that center serves (package
// vimapi), through govmomi, as any other client of it is; what vSphere has no
// call for goes through the types of vimapi/vimext.
//
// Place in the flow: level 4; cmd/mortise adds the verbs to its root command.
// The package imports govmomi, vimapi/vimext, the readers of formats that an
// import meets (vmxfile, vmdk, keysafe) and the client of a KMS's admin socket;
// never center or a host. The verbs of disk, in the files disk*.go, are the data path
// alone (vdisk, nbd) with keys from files or a KMIP server (provider/standard). One file holds one group of verbs.
//
// What a verb prints for people goes to standard output as text, progress and
// questions to standard error; with --json standard output is one JSON value.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"
)

// GroupID is the help group of the verbs; the root command must have it.
const GroupID = "client"

// Add adds the client verbs to root. Where root has a command host already, with
// the verbs of that role, the client's are added to it.
func Add(root *cobra.Command) {
	all := []*cobra.Command{
		loginCommand(), logoutCommand(), providerCommand(), policyCommand(), vmCommand(), taskCommand(), keyCommand(), diskCommand(), cryptoUtilCommand(),
	}
	hosts := hostVerbs()
	host := child(root, "host")
	if host == nil {
		host = &cobra.Command{Use: "host", Short: "Hosts of a center", Args: cobra.NoArgs, RunE: showHelp}
		all = append(all, host)
	}
	host.AddCommand(hosts...)
	for _, c := range all {
		c.GroupID = GroupID
	}
	root.AddCommand(all...)
}

func child(parent *cobra.Command, name string) *cobra.Command {
	for _, c := range parent.Commands() {
		if c.Name() == name {
			return c
		}
	}
	return nil
}

func showHelp(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// globals are the flags that every verb has.
type globals struct {
	url  string
	json bool
}

func (g *globals) bind(f *pflag.FlagSet) {
	f.StringVar(&g.url, "url", "", "center to talk to, of those logged in to (default: $MORTISE_URL, else the last one)")
	f.BoolVar(&g.json, "json", false, "print JSON, for programs")
}

// A streams is where a running verb reads and prints.
type streams struct {
	in       io.Reader
	out, err io.Writer
	json     bool
}

func (g *globals) streams(cmd *cobra.Command) *streams {
	return &streams{in: cmd.InOrStdin(), out: cmd.OutOrStdout(), err: cmd.ErrOrStderr(), json: g.json}
}

// say prints a line about what goes on, for people only.
func (s *streams) say(format string, args ...any) {
	w := s.out
	if s.json {
		w = s.err
	}
	fmt.Fprintf(w, format+"\n", args...)
}

// terminal tells whether x is a terminal, and its descriptor.
func terminal(x any) (fd int, ok bool) {
	f, ok := x.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	return int(f.Fd()), true
}

// confirm asks a question that only "yes" answers. Without a terminal there is
// nobody to ask, and flag names the way out.
func (s *streams) confirm(question, flag string) error {
	if _, ok := terminal(s.in); !ok {
		return fmt.Errorf("%s: standard input is no terminal to ask at; give %s", question, flag)
	}
	fmt.Fprintf(s.err, "%s Type yes: ", question)
	line, err := readLine(s.in)
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if line != "yes" {
		return errors.New("not confirmed: nothing was changed")
	}
	return nil
}

// maxAnswer bounds a line that a person or a file gives, in bytes.
const maxAnswer = 1024

// readLine reads up to a line's end, byte by byte, so that nothing of what
// follows is swallowed.
func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); len(line) < maxAnswer; {
		n, err := r.Read(b)
		if n == 1 {
			if b[0] == '\n' {
				break
			}
			line = append(line, b[0])
			continue
		}
		if err == io.EOF && len(line) > 0 {
			break
		}
		if err != nil {
			return "", err
		}
	}
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	}
	return string(line), nil
}

// verb makes a command's RunE: it connects, runs f, and words its error.
func (g *globals) verb(f func(ctx context.Context, c *client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := g.connect(cmd.Context(), cmd)
		if err != nil {
			return explain(err)
		}
		return explain(f(cmd.Context(), c, args))
	}
}

// group is a command that only holds others; alone it shows its help.
func group(g *globals, use, short, long, example string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example, Args: cobra.NoArgs,
		RunE: showHelp,
	}
	g.bind(c.PersistentFlags())
	c.AddCommand(verbs...)
	return c
}

// needs checks the number of arguments and names the missing ones.
func needs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return fmt.Errorf("%s: %s is missing; see %[1]s --help", cmd.CommandPath(), names[len(args)])
		}
		if len(args) > len(names) {
			return fmt.Errorf("%s: %q is one argument too many; see %[1]s --help", cmd.CommandPath(), args[len(names)])
		}
		return nil
	}
}
