package main

import (
	"os"

	"github.com/spf13/cobra"

	"mortise/internal/dev"
)

func devCommand() *cobra.Command {
	var cfg dev.Config
	var log logFlags
	cmd := &cobra.Command{
		Use:     "dev",
		Short:   "Run a whole Mortise on this machine: kms, center and hosts",
		GroupID: "role",
		Long: `Starts a key server, a center and several hosts on this machine, as separate
processes with real TLS between them, each host with a libvirtd of its own. It
needs root and the packages libvirt-daemon-system, qemu-system-x86 and ovmf.

Everything is kept in the state folder: the next start goes on where this one
ended, also after kill -9. Ctrl-C powers the guests off and stops everything in
order. A role that dies is started again; to keep one down, make the file
logs/NAME.hold in the state folder first. It is for trials and tests: passphrases lie beside what they protect, and
the roles of a real installation refuse this state.`,
		Example: `  mortise dev
  mortise dev --hosts 3 --state-dir /srv/mortise-dev`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cfg.Executable, err = os.Executable(); err != nil {
				return err
			}
			if cfg.Logger, err = log.logger(os.Stderr, "dev"); err != nil {
				return err
			}
			cfg.Out = cmd.OutOrStdout()
			return dev.Run(cmd.Context(), cfg)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.StateDir, "state-dir", "/var/lib/mortise-dev", "folder for everything")
	f.IntVar(&cfg.Hosts, "hosts", 2, "number of hosts")
	f.StringVar(&cfg.API, "listen", "127.0.0.1:8443", "address of the vSphere API")
	f.StringVar(&cfg.Join, "join-listen", "127.0.0.1:8444", "address where hosts join")
	f.StringVar(&cfg.KMIP, "kmip-listen", "127.0.0.1:5696", "address of the key server")
	f.IntVar(&cfg.HostPort, "host-port", 8446, "port of the first host; the others follow")
	f.BoolVar(&cfg.KeepGuests, "keep-guests", false, "let guests run on when it stops")
	log.bind(f)
	_ = f.Lookup("log-level").Value.Set("warn")
	return cmd
}
