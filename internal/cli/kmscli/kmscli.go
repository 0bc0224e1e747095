// Package kmscli is the administrator's verbs of the key server: mortise kms
// instance, client, apikey and so on. Every verb is a client of the key server's
// administration API (package kms/admin), over its admin socket or HTTPS.
//
// Place in the flow: level 4; cmd/mortise adds the verbs to its command kms. The
// package imports kms for its types, kms/admin for the client, and pki. One file
// holds one group of verbs.
//
// What a verb prints for people goes to standard output as text, questions to
// standard error; with --json standard output is one JSON value.
package kmscli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"mortise/internal/atomicfile"
	"mortise/internal/kms/admin"
	"mortise/internal/pki"
)

// DefaultSocket is where a key server has its admin socket unless it is told
// otherwise.
const DefaultSocket = "/run/mortise/kms.sock"

// Add adds the verbs to the command kms.
func Add(parent *cobra.Command) {
	parent.AddCommand(instanceCommand(), clientCommand(), apiKeyCommand(), auditCommand(), backupCommand(), importCommand(), memberCommand(), clockCommand(),
		crkCommand(), keyCommand(), unlockCommand(), passphraseCommand(), doctorCommand())
}

// connection is how a verb reaches the key server, and what all verbs share.
type connection struct {
	socket                string
	server, thumbprint    string
	keyFile               string
	clientCert, clientKey string
	json                  bool
}

func (g *connection) bind(f *pflag.FlagSet) {
	f.StringVar(&g.socket, "admin-socket", DefaultSocket, "the key server's admin socket, on its own machine, as root")
	f.StringVar(&g.server, "server", "", "reach the key server over HTTPS instead: https://HOST[:5697] (default: $MORTISE_KMS_SERVER)")
	f.StringVar(&g.thumbprint, "ca-thumbprint", "", "SHA-256 of its certificate, or of a CA above it (default: the machine's CAs decide)")
	f.StringVar(&g.keyFile, "api-key-file", "", "file with an API key, mode 0600 (default: $MORTISE_KMS_API_KEY_FILE)")
	f.StringVar(&g.clientCert, "client-cert", "", "client certificate to show, PEM")
	f.StringVar(&g.clientKey, "client-key", "", "its key, PEM, mode 0600 (default: in the same file)")
	f.BoolVar(&g.json, "json", false, "print JSON, for programs")
}

// dial makes a client of what the flags say.
func (g *connection) dial(cmd *cobra.Command) (*admin.Client, error) {
	server := g.server
	if server == "" && !cmd.Flags().Changed("admin-socket") {
		server = os.Getenv("MORTISE_KMS_SERVER")
	}
	if server == "" {
		if g.thumbprint != "" || g.keyFile != "" || g.clientCert != "" {
			return nil, errors.New("--ca-thumbprint, --api-key-file and --client-cert go with --server: on the admin socket nobody logs in")
		}
		return admin.DialSocket(g.socket), nil
	}
	if cmd.Flags().Changed("admin-socket") {
		return nil, errors.New("give --server or --admin-socket, not both")
	}
	r := admin.Remote{URL: server, Thumbprint: g.thumbprint}
	keyFile := g.keyFile
	if keyFile == "" && g.clientCert == "" {
		keyFile = os.Getenv("MORTISE_KMS_API_KEY_FILE")
	}
	switch {
	case keyFile != "" && g.clientCert != "":
		return nil, errors.New("give --api-key-file or --client-cert, not both")
	case keyFile != "":
		key, err := readPrivate(keyFile)
		if err != nil {
			return nil, fmt.Errorf("--api-key-file: %w", err)
		}
		r.APIKey = strings.TrimSpace(string(key))
		clear(key)
	case g.clientCert != "":
		keyPath := g.clientKey
		if keyPath == "" {
			keyPath = g.clientCert
		}
		chain, key, err := pki.LoadKeyPair(g.clientCert, keyPath)
		if err != nil {
			return nil, fmt.Errorf("--client-cert: %w", err)
		}
		c, err := pki.TLSCertificate(chain, key)
		if err != nil {
			return nil, err
		}
		r.Certificate = &c
	default:
		return nil, errors.New("--server needs to know who you are: give --api-key-file or --client-cert")
	}
	return admin.Dial(r)
}

// maxFile bounds a file that a verb reads, in bytes.
const maxFile = 1 << 20

// readPrivate reads a file that others must not be able to read.
func readPrivate(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o, so others may read it; chmod 0600 it", path, st.Mode().Perm())
	}
	return atomicfile.Read(path, maxFile)
}

// input reads a file that an argument names; - is standard input.
func (v *verb) input(path string) ([]byte, error) {
	if path != "-" {
		return atomicfile.Read(path, maxFile)
	}
	if f, ok := v.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		fmt.Fprintln(v.err, "Paste the text, then press Ctrl-D:")
	}
	text, err := io.ReadAll(io.LimitReader(v.in, maxFile+1))
	if err == nil && len(text) > maxFile {
		err = fmt.Errorf("standard input has more than %d bytes", maxFile)
	}
	return text, err
}

// A verb is one that runs.
type verb struct {
	*admin.Client
	in       io.Reader
	out, err io.Writer
	json     bool
	now      time.Time
}

// run makes a command's RunE of f.
func (g *connection) run(f func(ctx context.Context, v *verb, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := g.dial(cmd)
		if err != nil {
			return err
		}
		v := &verb{Client: c, in: cmd.InOrStdin(), out: cmd.OutOrStdout(), err: cmd.ErrOrStderr(), json: g.json, now: time.Now()}
		return f(cmd.Context(), v, args)
	}
}

// show prints what a call answered: as JSON, or as text by f.
func (v *verb) show(answer any, f func()) error {
	if v.json {
		e := json.NewEncoder(v.out)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(answer)
	}
	f()
	return nil
}

// say prints a line for people.
func (v *verb) say(format string, args ...any) { fmt.Fprintf(v.out, format+"\n", args...) }

// table prints rows under a header.
func (v *verb) table(header string, rows [][]string) {
	w := tabwriter.NewWriter(v.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, strings.ReplaceAll(header, " ", "\t"))
	for _, r := range rows {
		for i, c := range r {
			if r[i] = clean(c); r[i] == "" {
				r[i] = "-"
			}
		}
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	w.Flush()
}

// clean takes out of a text what would move a terminal's cursor or break a
// table: names come from elsewhere.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, s)
}

// confirmed makes a call that may lose keys: without a hash first, which shows
// what would be lost, then with the hash of that list if the administrator
// agrees. given is what --confirm says.
func (v *verb) confirmed(given string, act func(hash string) error) error {
	err := act(given)
	var refused *admin.Error
	if !errors.As(err, &refused) || refused.Confirm == nil {
		return err
	}
	c := refused.Confirm
	if given != "" {
		fmt.Fprintf(v.err, "What would be lost has changed since --confirm %s was shown.\n", given)
	}
	fmt.Fprintf(v.err, "%s loses for ever, %d in all:\n", clean(c.Act), c.Count)
	for _, l := range c.Lost {
		fmt.Fprintf(v.err, "  %s\n", clean(l))
	}
	if more := c.Count - len(c.Lost); more > 0 {
		fmt.Fprintf(v.err, "  … and %d more\n", more)
	}
	f, ok := v.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return fmt.Errorf("not confirmed, and nothing was changed; to go on give --confirm %s", c.Hash)
	}
	fmt.Fprint(v.err, "Type yes to lose them: ")
	if line, err := bufio.NewReader(v.in).ReadString('\n'); err != nil || strings.TrimSpace(line) != "yes" {
		return errors.New("not confirmed: nothing was changed")
	}
	return act(c.Hash)
}

// confirmFlag is the flag of verbs that lose keys.
func confirmFlag(f *pflag.FlagSet, to *string) {
	f.StringVar(to, "confirm", "", "agree to the loss of what was listed: the hash that was shown with it")
}

// group is a command that only holds others; alone it shows its help.
func group(g *connection, use, short, long, example string, verbs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
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

// date prints a day, in UTC.
func date(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.DateOnly)
}

// moment reads a date, a time (RFC 3339), or a time from now on: 2026-12-31,
// 2026-12-31T12:00:00Z, 36h, 14d.
func moment(text string, now time.Time) (time.Time, error) {
	if t, err := time.Parse(time.DateOnly, text); err == nil {
		return t, nil
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return t, nil
	}
	if days, ok := strings.CutSuffix(text, "d"); ok {
		var n int
		if _, err := fmt.Sscanf(days+" ", "%d ", &n); err == nil && n > 0 && n < 100_000 && fmt.Sprint(n) == days {
			return now.Add(time.Duration(n) * 24 * time.Hour), nil
		}
	}
	if d, err := time.ParseDuration(text); err == nil && d > 0 {
		return now.Add(d), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time: write 2026-12-31, 2026-12-31T12:00:00Z, 14d or 36h", text)
}
