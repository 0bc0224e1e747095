package kmscli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"mortise/internal/kms"
	"mortise/internal/kms/admin"
)

func clientIssue(g *connection, instance *string) *cobra.Command {
	var r admin.IssueClient
	var role, out, csr string
	cmd := &cobra.Command{
		Use:   "issue",
		Short: "Make a client certificate from the instance's own CA and let it in",
		Long: `Makes a key and a certificate for a client, and lets the certificate in. Both go
into --out, one PEM file of mode 0600 with the certificate, the CA's and the key.
The key is kept nowhere else: the key server does not have it.

With --csr the client has made its own key, and --out gets the certificate only.
The certificate has subject alternative names: --san, or else the name itself.

` + roleHelp,
		Example: `  mortise kms client issue --name vc1.example.com --out vc1.pem
  mortise kms client issue --name app1 --san app1.example.com --san 192.0.2.7 --rsa --out app1.pem
  mortise kms client issue --name vc1.example.com --csr vc1.csr --out vc1.pem`,
		Args: cobra.NoArgs,
		RunE: g.run(func(ctx context.Context, v *verb, _ []string) error {
			if err := v.request(csr, &r.CSR); err != nil {
				return err
			}
			if err := mayMake(out); err != nil {
				return err
			}
			r.Role = kms.Role(role)
			made, err := v.IssueClient(ctx, *instance, r)
			if err != nil {
				return err
			}
			return v.handOver(made, out, *instance)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&r.Name, "name", "", "label and common name")
	f.StringVar(&role, "role", string(kms.RoleKeyManager), "viewer, key-manager or administrator")
	f.StringArrayVar(&r.Hosts, "san", nil, "subject alternative name: DNS name or IP address of the client; repeatable (default: the name)")
	f.IntVar(&r.Days, "days", 365, "how long it lives")
	f.BoolVar(&r.RSA, "rsa", false, "an RSA-3072 key, for clients that take no ECDSA P-256")
	f.StringVar(&csr, "csr", "", "file with the client's certificate request, PEM; - is standard input")
	f.StringVar(&out, "out", "", "new file for certificate and key, mode 0600")
	_ = cmd.MarkFlagRequired("name")
	_ = cmd.MarkFlagRequired("out")
	return cmd
}

// request reads a certificate request that a flag names.
func (v *verb) request(path string, to *string) error {
	if path == "" {
		return nil
	}
	text, err := v.input(path)
	if err != nil {
		return fmt.Errorf("--csr: %w", err)
	}
	*to = string(text)
	return nil
}

// handOver writes what was issued into a file, and says so.
func (v *verb) handOver(made admin.Issued, out, instance string) error {
	if out != "" {
		if err := writeNew(out, made.Certificate+made.Key); err != nil {
			return fmt.Errorf("--out: %w; the key is lost: revoke the certificate with: mortise kms client revoke %s --instance %s", err, made.Client.Fingerprint, instance)
		}
		made.Key = ""
	}
	return v.show(made, func() {
		v.mayUse(made.Client, instance)
		if out != "" {
			v.say("Written to %s. Give it to the client and keep no copy.", out)
		}
	})
}

func clientRenew(g *connection, instance *string) *cobra.Command {
	var r admin.RenewClient
	var out, csr, overlap string
	cmd := &cobra.Command{
		Use:   "renew CLIENT [FILE]",
		Short: "Let a new certificate in for one that ends, with an overlap",
		Long: `Lets a new certificate in with the label and role of an old one. The old one stays
valid to its own end, or until --overlap, so that the client changes over in its
own time.

With FILE (- is standard input) the new certificate is the one in it, which the
client has made. Without it the instance's own CA issues one, with the names of
the old, into --out as mortise kms client issue does.`,
		Example: `  mortise kms client renew vc1.example.com --overlap 14d --out vc1-new.pem
  mortise kms client renew vcenter vcenter-new.pem`,
		Args: cobra.RangeArgs(1, 2),
		RunE: g.run(func(ctx context.Context, v *verb, args []string) error {
			if overlap != "" {
				t, err := moment(overlap, v.now)
				if err != nil {
					return fmt.Errorf("--overlap: %w", err)
				}
				r.Overlap = t
			}
			if err := v.request(csr, &r.CSR); err != nil {
				return err
			}
			switch {
			case len(args) == 2 && (out != "" || csr != ""):
				return fmt.Errorf("FILE is the new certificate; --out and --csr are for one that the key server issues")
			case len(args) == 2:
				text, err := v.input(args[1])
				if err != nil {
					return err
				}
				r.Certificate = string(text)
			case out == "":
				return fmt.Errorf("give FILE with the new certificate, or --out for one that the key server issues")
			}
			if err := mayMake(out); err != nil {
				return err
			}
			made, err := v.RenewClient(ctx, *instance, args[0], r)
			if err != nil {
				return err
			}
			return v.handOver(made, out, *instance)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&overlap, "overlap", "", "until when the old one is still accepted: a date, or 14d from now (default: its own end)")
	f.IntVar(&r.Days, "days", 0, "how long an issued one lives (default: as long as the old one)")
	f.StringArrayVar(&r.Hosts, "san", nil, "subject alternative name of an issued one; repeatable (default: those of the old one)")
	f.BoolVar(&r.RSA, "rsa", false, "an RSA-3072 key")
	f.StringVar(&csr, "csr", "", "file with the client's certificate request, PEM")
	f.StringVar(&out, "out", "", "new file for an issued certificate and its key, mode 0600")
	return cmd
}
