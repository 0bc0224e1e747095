package cli

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25/soap"
	"golang.org/x/term"

	"mortise/internal/pki"
)

// defaultUser is the administrator that every center has.
const defaultUser = "administrator@mortise.local"

func loginCommand() *cobra.Command {
	var user, passwordFile, thumbprint string
	g := &globals{}
	cmd := &cobra.Command{
		Use:   "login URL",
		Short: "Log in to a center; the other verbs use the session",
		Long: `Opens a session at a center and keeps it in $XDG_CONFIG_HOME/mortise/session.json
(mode 0600; MORTISE_CONFIG names another folder). The password is not kept. It
comes from --password-file (mode 0600), from MORTISE_PASSWORD, or is asked for.

A center that no public authority vouches for is trusted by the SHA-256
thumbprint of its certificate: you are shown it and asked once, or you give it.
Its administrator reads it in center's log. A center that shows another
certificate later is refused.

You may be logged in to several centers; verbs talk to the last one, or to the
one that --url or MORTISE_URL names.

JSON: {"url", "user", "fullName", "thumbprint"}.`,
		Example: `  mortise login https://center.example.com:8443
  mortise login center.example.com --user kate@mortise.local --thumbprint 5A:…:9F
  MORTISE_PASSWORD=… mortise login https://127.0.0.1:8443 --thumbprint "$THUMB" --json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			where := os.Getenv("MORTISE_URL")
			if len(args) == 1 {
				where = args[0]
			}
			l := login{streams: g.streams(cmd), user: user, passwordFile: passwordFile, thumbprint: thumbprint}
			return explain(l.run(cmd.Context(), where))
		},
	}
	f := cmd.Flags()
	f.StringVar(&user, "user", defaultUser, "who logs in")
	f.StringVar(&passwordFile, "password-file", "", "file with the password, mode 0600")
	f.StringVar(&thumbprint, "thumbprint", "", "SHA-256 thumbprint that center's certificate must have")
	f.BoolVar(&g.json, "json", false, "print JSON, for programs")
	return cmd
}

type login struct {
	*streams
	user, passwordFile, thumbprint string
}

func (l *login) run(ctx context.Context, where string) error {
	u, err := parseURL(where)
	if err != nil {
		return err
	}
	conf, err := loadConfig()
	if err != nil {
		return err
	}
	known := conf.of(u.String())
	pin, err := l.trust(ctx, u, known.Thumbprint)
	if err != nil {
		return err
	}
	vim, err := dial(ctx, u, pin, "")
	if err != nil {
		return err
	}
	password, err := l.password(u)
	if err != nil {
		return err
	}
	m := session.NewManager(vim)
	if err := m.Login(ctx, url.UserPassword(l.user, password)); err != nil {
		return fmt.Errorf("logging in to %s as %s: %w", u, l.user, err)
	}
	who, err := m.UserSession(ctx)
	if err != nil {
		return fmt.Errorf("reading the new session: %w", err)
	}
	token := sessionToken(vim.Client)
	if who == nil || token == "" {
		return fmt.Errorf("%s let %s in but opened no session: is it a Mortise center?", u, l.user)
	}
	*known = center{User: who.UserName, Thumbprint: pin, Session: token}
	conf.Current = u.String()
	if err := conf.save(); err != nil {
		return errors.Join(err, m.Logout(ctx))
	}
	if l.json {
		return l.printJSON(struct {
			URL        string `json:"url"`
			User       string `json:"user"`
			FullName   string `json:"fullName,omitempty"`
			Thumbprint string `json:"thumbprint,omitempty"`
		}{u.String(), who.UserName, who.FullName, pin})
	}
	l.say("Logged in to %s as %s.", u, who.UserName)
	return nil
}

func sessionToken(s *soap.Client) string {
	if k := s.SessionCookie(); k != nil {
		return k.Value
	}
	return ""
}

// trust decides which certificate is center's: the one that was asked for, the
// one known from before, one that the system's roots vouch for, or the one that
// a person confirms. It returns the thumbprint to pin, or "" for the roots.
func (l *login) trust(ctx context.Context, u *url.URL, before string) (string, error) {
	cert, err := fetchCertificate(ctx, u)
	if err != nil {
		return "", err
	}
	shown := sha256.Sum256(cert.Raw)
	if l.thumbprint != "" {
		want, err := pki.ParseThumbprint(l.thumbprint)
		if err != nil {
			return "", fmt.Errorf("--thumbprint: %w", err)
		}
		if want != shown {
			return "", fmt.Errorf("%s: %w", u, &pinError{want: pki.FormatThumbprint(want), got: pki.FormatThumbprint(shown)})
		}
		return pki.FormatThumbprint(shown), nil
	}
	if before != "" {
		if before != pki.FormatThumbprint(shown) {
			return "", fmt.Errorf("%s: %w", u, &pinError{want: before, got: pki.FormatThumbprint(shown)})
		}
		return before, nil
	}
	if vouched(ctx, u) {
		return "", nil
	}
	fmt.Fprintf(l.err, "No authority that this machine knows vouches for %s. Its certificate:\n", u)
	printCertificate(l.err, cert)
	question := fmt.Sprintf("Is this the thumbprint that center's administrator gave you for %s?", u.Host)
	if err := l.confirm(question, "--thumbprint with the one that center's log shows"); err != nil {
		return "", err
	}
	return pki.FormatThumbprint(shown), nil
}

// vouched tells whether the system's roots vouch for a server.
func vouched(ctx context.Context, u *url.URL) bool {
	dial, err := dialTLS("")
	if err != nil {
		return false
	}
	conn, err := dial(ctx, "tcp", hostPort(u))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

func printCertificate(w interface{ Write([]byte) (int, error) }, cert *x509.Certificate) {
	fmt.Fprintf(w, "  subject     %s\n  issuer      %s\n  valid       %s to %s\n  SHA-256     %s\n",
		clean(cert.Subject.String()), clean(cert.Issuer.String()),
		cert.NotBefore.UTC().Format(time.DateOnly), cert.NotAfter.UTC().Format(time.DateOnly), pki.Thumbprint(cert))
}

// password reads the password from where it was said to be, or asks.
func (l *login) password(u *url.URL) (string, error) {
	if l.passwordFile != "" {
		st, err := os.Stat(l.passwordFile)
		if err != nil {
			return "", fmt.Errorf("--password-file: %w", err)
		}
		if st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
			return "", fmt.Errorf("--password-file: %s can be read by others (mode %04o): run chmod 600 on it", l.passwordFile, st.Mode().Perm())
		}
		f, err := os.Open(l.passwordFile)
		if err != nil {
			return "", fmt.Errorf("--password-file: %w", err)
		}
		defer f.Close()
		line, err := readLine(f)
		if err != nil || line == "" {
			return "", fmt.Errorf("--password-file: %s has no password in its first line", l.passwordFile)
		}
		return line, nil
	}
	if p, ok := os.LookupEnv("MORTISE_PASSWORD"); ok && p != "" {
		return p, nil
	}
	fd, ok := terminal(l.in)
	if !ok {
		return "", errors.New("no password: standard input is no terminal to ask at; give --password-file or set MORTISE_PASSWORD")
	}
	fmt.Fprintf(l.err, "Password of %s at %s: ", l.user, u.Host)
	p, err := term.ReadPassword(fd)
	fmt.Fprintln(l.err)
	if err != nil {
		return "", fmt.Errorf("reading the password: %w", err)
	}
	if len(p) == 0 {
		return "", errors.New("no password was given")
	}
	return string(p), nil
}

func logoutCommand() *cobra.Command {
	g := &globals{}
	cmd := &cobra.Command{
		Use:   "logout",
		Short: "End the session",
		Long: `Ends the session at center and forgets it here. That center's certificate is
trusted stays remembered. Tasks that were started go on.

JSON: {"url"}.`,
		Example: `  mortise logout
  mortise logout --url https://center.example.com:8443`,
		Args: needs(),
		RunE: func(cmd *cobra.Command, _ []string) error { return explain(g.logout(cmd.Context(), cmd)) },
	}
	g.bind(cmd.Flags())
	return cmd
}

func (g *globals) logout(ctx context.Context, cmd *cobra.Command) error {
	c, err := g.connect(ctx, cmd)
	told := false
	if err == nil {
		err = session.NewManager(c.vim).Logout(ctx)
		told = err == nil
	}
	conf, cerr := loadConfig()
	if cerr != nil {
		return cerr
	}
	where := g.url
	if where == "" {
		where = os.Getenv("MORTISE_URL")
	}
	if where == "" {
		where = conf.Current
	}
	u, perr := parseURL(where)
	if perr != nil || conf.Centers[u.String()] == nil || conf.Centers[u.String()].Session == "" {
		return err // it says that there is no session
	}
	conf.Centers[u.String()].Session = ""
	if err := conf.save(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	s := g.streams(cmd)
	if !told {
		fmt.Fprintf(s.err, "The session is forgotten here, but center was not told: %s\n", message(err))
	}
	if s.json {
		return s.printJSON(struct {
			URL string `json:"url"`
		}{u.String()})
	}
	s.say("Logged out of %s.", u)
	return nil
}
