package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"mortise/internal/kmipc"
	"mortise/internal/pki"
	"mortise/internal/provider/certify"
)

// providerCertify needs no center: it talks to the key server itself.
func providerCertify(g *globals) *cobra.Command {
	var cert, key, ca, thumbprint string
	var keep bool
	cmd := &cobra.Command{
		Use:   "certify kmip://HOST[:5696]",
		Short: "Try a key server of any make with vCenter's own messages",
		Long: `Plays to a KMIP server what vCenter sends: the health poll, adding the provider,
creating, tagging, fetching and activating keys, a small boot of vSAN hosts; then the
operations that certified key servers offer. A line for each step says whether it
works, deviates in a way that vCenter bears, or fails, what vCenter would do about it,
and how to mend it. No center is needed.

It makes three test keys and destroys them, where the server lets it; --keep leaves
them. The client certificate must be registered at the server. Its own certificate is
checked against --thumbprint or --ca; with neither it is shown for you to compare.

It exits with an error when a step fails.

JSON: {"server", "thumbprint", "subject", "notAfter", "vendor", "versions", "verdict"
(works, deviates, fails), "left" (test keys that stay), "steps": [{"part", "step",
"result" (works, deviates, fails, skipped), "found", "vcenter", "mend",
"nanoseconds"}]}.`,
		Example: `  mortise provider certify kmip://kms.example.com --client-cert client.pem --client-key client.key
  mortise provider certify kms.example.com:5696 --client-cert both.pem --thumbprint 3A:…:9F --json`,
		Args: needs("ADDRESS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := certifyConfig(args[0], cert, key, ca, thumbprint)
			if err != nil {
				return err
			}
			cfg.Keep = keep
			return g.streams(cmd).certify(cmd.Context(), cfg)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cert, "client-cert", "", "client certificate that the server knows (PEM)")
	f.StringVar(&key, "client-key", "", "its key (PEM, mode 0600; default: in the same file)")
	f.StringVar(&ca, "ca", "", "trust a server certificate issued by this CA (PEM)")
	f.StringVar(&thumbprint, "thumbprint", "", "trust the server certificate with this SHA-256 thumbprint")
	f.BoolVar(&keep, "keep", false, "leave the test keys at the server")
	cmd.MarkFlagsMutuallyExclusive("ca", "thumbprint")
	return cmd
}

// certifyConfig reads what the flags of a verb that talks to a key server name.
func certifyConfig(address, cert, key, ca, thumbprint string) (cfg certify.Config, err error) {
	if cfg.Address, err = kmipc.ParseAddress(address); err != nil {
		return cfg, err
	}
	if cert == "" {
		return cfg, errors.New("--client-cert is missing: key servers know their clients by a certificate")
	}
	if key == "" {
		key = cert
	}
	chain, signer, err := pki.LoadKeyPair(cert, key)
	if err != nil {
		return cfg, err
	}
	if cfg.Certificate, err = pki.TLSCertificate(chain, signer); err != nil {
		return cfg, err
	}
	switch {
	case thumbprint != "":
		pin, err := pki.ParseThumbprint(thumbprint)
		if err != nil {
			return cfg, err
		}
		cfg.Trust = kmipc.TrustPin(pin)
	case ca != "":
		cas, err := pki.LoadCertificates(ca)
		if err != nil {
			return cfg, err
		}
		cfg.Trust = kmipc.TrustCA(cas, cfg.Address)
	}
	return cfg, nil
}

func (s *streams) certify(ctx context.Context, cfg certify.Config) error {
	part := ""
	if !s.json {
		cfg.Each = func(step certify.Step) {
			if step.Part != part {
				part = step.Part
				s.say("%s", part)
			}
			s.say("  %-9s %s: %s", step.Result, clean(step.Name), clean(step.Found))
			if step.Result == certify.Works || step.Result == certify.Skipped {
				return
			}
			if step.Then != "" {
				s.say("            vCenter: %s", step.Then)
			}
			if step.Mend != "" {
				s.say("            to mend: %s", step.Mend)
			}
		}
	}
	r, err := certify.Run(ctx, cfg)
	if err != nil {
		return err
	}
	if s.json {
		if err := s.printJSON(r); err != nil {
			return err
		}
	} else {
		s.verdict(r, cfg.Trust == nil)
	}
	if r.Verdict == certify.Fails {
		return fmt.Errorf("%s cannot serve vCenter as it is", r.Server)
	}
	return nil
}

func (s *streams) verdict(r *certify.Report, unchecked bool) {
	count := map[certify.Result]int{}
	for _, step := range r.Steps {
		count[step.Result]++
	}
	s.say("%d work, %d deviate harmlessly, %d fail, %d were not tried.", count[certify.Works], count[certify.Deviates], count[certify.Fails], count[certify.Skipped])
	if r.Thumbprint != "" && unchecked {
		s.say("The server's certificate was not checked. Compare its SHA-256 thumbprint with the server's own:\n  %s", r.Thumbprint)
	}
	for _, id := range r.Left {
		s.say("Test key %s stays at the server.", clean(id))
	}
	switch r.Verdict {
	case certify.Works:
		s.say("vCenter can use %s.", r.Server)
	case certify.Deviates:
		s.say("vCenter can use %s, with what is said above.", r.Server)
	}
}
