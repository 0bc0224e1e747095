package kmscli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"mortise/internal/atomicfile"
	"mortise/internal/kms/admin"
	"mortise/internal/kms/migrate"
	"mortise/internal/pki"
)

func importCommand() *cobra.Command {
	var g struct {
		socket string
		json   bool
	}
	var instance, ca string
	var req admin.Import
	var cert, key string
	cmd := &cobra.Command{
		Use:   "import --from kmip://HOST[:5696]",
		Short: "Bring the keys of another KMIP server in",
		Long: `Brings every key, secret and opaque object that a client certificate sees at another
KMIP server into an instance: under the same identifiers, with attributes, states and
dates. What was encrypted with them opens as before; nothing is encrypted anew. The
other server is only read from.

The key server fetches the keys itself, so it must reach the other server. That one is
trusted by --thumbprint or --ca; with neither nothing is brought, and the thumbprint
that it shows is told.

Begin with --dry-run: it lists what would come, and what cannot and why. An import
that was interrupted is run again: what is here already with the same bytes is passed
over. An object of the same identifier with other bytes is a conflict: it is reported
and never overwritten. At the end everything is compared with the other server.

It exits with an error when something conflicts, failed, or differs.

JSON: lines of {"object": {"id", "type", "algorithm", "bits", "state", "names", "fate"
(comes, arrived, here, conflict, cannot, failed, different), "why", "dropped"}},
{"progress": {"phase", "done", "total", "perSecond", "left"}}, and last {"report":
{"source", "vendor", "version", "total", "counts", "compared"}}.`,
		Example: `  mortise kms import --from kmip://old.example.com --client-cert client.pem --client-key client.key \
      --thumbprint 3A:…:9F --dry-run
  mortise kms import --from kmip://old.example.com --client-cert client.pem --client-key client.key \
      --thumbprint 3A:…:9F --instance production`,
		Args: needs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if req.From == "" {
				return errors.New("--from is missing: the KMIP server that the keys come from, e.g. kmip://kms.example.com")
			}
			if err := readSourceFiles(&req, cert, key, ca); err != nil {
				return err
			}
			defer clear(req.Key)
			v := &verb{Client: admin.DialSocket(g.socket), in: cmd.InOrStdin(), out: cmd.OutOrStdout(), err: cmd.ErrOrStderr(), json: g.json}
			return v.importKeys(cmd.Context(), instance, req)
		},
	}
	f := cmd.Flags()
	f.StringVar(&g.socket, "admin-socket", DefaultSocket, "the key server's admin socket, on its own machine, as root")
	f.BoolVar(&g.json, "json", false, "print JSON lines, for programs")
	f.StringVar(&req.From, "from", "", "the KMIP server that the keys come from: kmip://HOST[:5696]")
	f.StringVar(&cert, "client-cert", "", "client certificate that it knows, PEM")
	f.StringVar(&key, "client-key", "", "its key, PEM, mode 0600 (default: in the same file)")
	f.StringVar(&req.Thumbprint, "thumbprint", "", "trust its certificate with this SHA-256 thumbprint")
	f.StringVar(&ca, "ca", "", "trust a certificate issued by this CA, PEM")
	f.BoolVar(&req.DryRun, "dry-run", false, "only tell what would come and what cannot")
	f.IntVar(&req.Workers, "connections", 4, "how many connections to read with, at most 32")
	cmd.MarkFlagsMutuallyExclusive("thumbprint", "ca")
	instanceFlag(cmd, &instance)
	return cmd
}

func readSourceFiles(req *admin.Import, cert, key, ca string) error {
	if cert == "" {
		return errors.New("--client-cert is missing: key servers know their clients by a certificate")
	}
	if key == "" {
		key = cert
	}
	chain, _, err := pki.LoadKeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("--client-cert: %w", err)
	}
	req.Certificate = string(pki.EncodeCertificates(chain...))
	if req.Key, err = readPrivate(key); err != nil {
		return fmt.Errorf("--client-key: %w", err)
	}
	if ca != "" {
		text, err := atomicfile.Read(ca, maxFile)
		if err != nil {
			return fmt.Errorf("--ca: %w", err)
		}
		req.CA = string(text)
	}
	return nil
}

func (v *verb) importKeys(ctx context.Context, instance string, req admin.Import) error {
	p := &importPrinter{verb: v}
	if f, ok := v.err.(*os.File); ok {
		p.live = term.IsTerminal(int(f.Fd()))
	}
	r, err := v.Import(ctx, instance, req, p.line)
	p.clear()
	if err != nil {
		return err
	}
	if v.json {
		if err := p.json(admin.ImportLine{Report: r}); err != nil {
			return err
		}
	} else {
		p.report(r, req.DryRun)
	}
	if !r.Complete() {
		return errors.New("not everything came over as it is there")
	}
	return nil
}

// importPrinter shows an import as it goes.
type importPrinter struct {
	*verb
	live   bool // standard error is a terminal
	shown  int  // width of the progress that is shown
	header bool
}

// json prints a line for programs.
func (p *importPrinter) json(l admin.ImportLine) error {
	e := json.NewEncoder(p.out)
	e.SetEscapeHTML(false)
	return e.Encode(l)
}

func (p *importPrinter) line(l admin.ImportLine) {
	switch {
	case l == (admin.ImportLine{}):
	case p.verb.json:
		_ = p.json(l)
	case l.Object != nil:
		p.clear()
		p.object(l.Object)
	case l.Progress != nil && p.live:
		p.progress(l.Progress)
	}
}

func (p *importPrinter) object(i *migrate.Item) {
	const form = "%-9s  %-36s  %-14s  %-9s  %-12s  %s\n"
	if !p.header {
		p.header = true
		fmt.Fprintf(p.out, form, "FATE", "ID", "TYPE", "ALGORITHM", "STATE", "NAME, REASON")
	}
	algorithm := i.Algorithm
	if i.Bits > 0 {
		algorithm += "-" + strconv.Itoa(int(i.Bits))
	}
	why := i.Why
	if len(i.Dropped) > 0 {
		why = strings.Trim(why+"; without: "+strings.Join(i.Dropped, ", "), "; ")
	}
	note := strings.Join(i.Names, ", ")
	if why != "" {
		note = strings.TrimSpace(note + " (" + why + ")")
	}
	fmt.Fprintf(p.out, form, i.Fate, clean(i.ID), clean(i.Type), clean(algorithm), clean(i.State), clean(note))
}

func (p *importPrinter) progress(m *migrate.Progress) {
	text := fmt.Sprintf("%s: %d", m.Phase, m.Done)
	if m.Total > 0 {
		text += fmt.Sprintf(" of %d, %.0f/s", m.Total, m.PerSecond)
	}
	if m.Left >= time.Second {
		text += ", " + m.Left.Round(time.Second).String() + " left"
	}
	p.clear()
	fmt.Fprint(p.err, text)
	p.shown = len(text)
}

// clear takes the progress off the terminal.
func (p *importPrinter) clear() {
	if p.shown > 0 {
		fmt.Fprintf(p.err, "\r%s\r", strings.Repeat(" ", p.shown))
		p.shown = 0
	}
}

func (p *importPrinter) report(r *migrate.Report, dry bool) {
	who := r.Source
	if r.Vendor != "" {
		who += " (" + clean(r.Vendor) + ")"
	}
	if dry {
		p.say("%s, KMIP %s: %d objects; %d would come, %d are here, %d cannot come. Nothing was changed.", who, r.Version, r.Total, r.Counts[migrate.Comes], r.Counts[migrate.Here], r.Counts[migrate.Cannot])
		return
	}
	p.say("%s, KMIP %s: %d objects; %d arrived, %d were here, %d cannot come, %d conflict, %d failed.", who, r.Version, r.Total,
		r.Counts[migrate.Arrived], r.Counts[migrate.Here], r.Counts[migrate.Cannot], r.Counts[migrate.Conflict], r.Counts[migrate.Failed])
	p.say("Compared with the source at the end: %d are the same, %d differ.", r.Compared, r.Counts[migrate.Differs])
}
