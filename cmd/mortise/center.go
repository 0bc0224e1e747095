package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"mortise/internal/center"
	"mortise/internal/kmipc"
	"mortise/internal/pki"
	"mortise/internal/provider"
	"mortise/internal/provider/standard"
	"mortise/internal/secret"
	"mortise/internal/vimapi"
)

// centerConfig is center's configuration file; flags have the same names.
type centerConfig struct {
	StateDir            string `toml:"state_dir"`
	Listen              string `toml:"listen"`
	JoinListen          string `toml:"join_listen"`
	AdminSocket         string `toml:"admin_socket"`
	PassphraseFile      string `toml:"passphrase_file"`
	TLSCert             string `toml:"tls_cert"`
	TLSKey              string `toml:"tls_key"`
	InitialPasswordFile string `toml:"initial_password_file"`
	logFlags
}

const defaultCenterSocket = "/run/mortise/center.sock"

func centerCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "center",
		Short:   "Control plane: inventory, policies, tasks, key providers, the vSphere API",
		GroupID: "role",
		Long: `Center is what administrators talk to, through the vSphere API: govc, pyVmomi and
the mortise client verbs. It keeps the ids of keys, never their bytes.

  center# mortise center serve --passphrase-file /etc/mortise/center.passphrase
  center# mortise center token create --name esx1     for each host
  you$    mortise login https://center.example.com:8443`,
	}
	cmd.AddCommand(centerServe(), centerStatus(), centerToken(), centerUser(), centerPassword())
	return cmd
}

func centerServe() *cobra.Command {
	var cfg centerConfig
	var config string
	var isDev bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run center",
		Long: `Runs center until it is told to stop. At the first start it makes its root key,
sealed by the passphrase, and the account administrator@mortise.local, whose
generated password it prints once, or writes to --initial-password-file.

The passphrase comes from --passphrase-file (mode 0600), from the file that
MORTISE_PASSPHRASE_FILE names, or from the systemd credential center-passphrase.`,
		Example: `  mortise center serve --passphrase-file /etc/mortise/center.passphrase
  mortise center serve --config /etc/mortise/center.toml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := loadConfig(cmd, config, &cfg); err != nil {
				return err
			}
			return serveCenter(cmd.Context(), cfg, isDev)
		},
	}
	f := cmd.Flags()
	f.StringVar(&config, "config", "", "configuration file (TOML)")
	f.StringVar(&cfg.StateDir, "state-dir", "/var/lib/mortise/center", "folder for inventory and settings")
	f.StringVar(&cfg.Listen, "listen", ":8443", "address of the vSphere API (HTTPS)")
	f.StringVar(&cfg.JoinListen, "join-listen", ":8444", "address where hosts join")
	f.StringVar(&cfg.AdminSocket, "admin-socket", defaultCenterSocket, "unix socket for the administrator, root only")
	f.StringVar(&cfg.PassphraseFile, "passphrase-file", "", "file with the passphrase of the root key, mode 0600")
	f.StringVar(&cfg.TLSCert, "tls-cert", "", "certificate of the API, PEM (default: a self-signed one)")
	f.StringVar(&cfg.TLSKey, "tls-key", "", "its key, PEM, mode 0600")
	f.StringVar(&cfg.InitialPasswordFile, "initial-password-file", "", "write the first start's password here, mode 0600, instead of printing it")
	f.BoolVar(&isDev, "dev", false, "")
	_ = f.MarkHidden("dev")
	cfg.logFlags.bind(f)
	return cmd
}

func serveCenter(ctx context.Context, cfg centerConfig, isDev bool) (err error) {
	if err := secret.LockDown(); err != nil {
		return err
	}
	log, err := cfg.logger(os.Stderr, "center")
	if err != nil {
		return err
	}
	if err := checkState(cfg.StateDir, isDev); err != nil {
		return err
	}
	root, err := rootKey(cfg.StateDir, cfg.PassphraseFile, "center-passphrase")
	if err != nil {
		return err
	}
	defer root.Wipe()
	var creds *pki.Credentials
	if cfg.TLSCert != "" || cfg.TLSKey != "" {
		creds, err = pki.LoadCredentials(cfg.TLSCert, cfg.TLSKey)
	} else {
		creds, err = endpoint(cfg.StateDir, "api", cfg.Listen)
	}
	if err != nil {
		return err
	}
	c, err := center.Open(ctx, center.Config{
		Dir: cfg.StateDir, Name: "center-1", RootKey: root, Logger: log, AllowIncapableHosts: isDev,
		OpenProvider: func(p center.ProviderConfig) (provider.Provider, error) {
			k := kmipc.Config{Certificate: p.Certificate}
			for _, s := range p.Servers {
				k.Endpoints = append(k.Endpoints, kmipc.Endpoint{Name: s.Name, Address: s.Address, Pins: s.Pins})
			}
			return standard.New(standard.Config{ID: p.ID, Version: version, KMIP: k, Log: log})
		},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := tellPassword(c.InitialPassword(), cfg.InitialPasswordFile); err != nil {
		return err
	}
	api, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return err
	}
	join, err := net.Listen("tcp", cfg.JoinListen)
	if err != nil {
		return err
	}
	id, err := instanceUUID(cfg.StateDir)
	if err != nil {
		return err
	}
	vim := vimapi.New(c, vimapi.Options{Logger: log, Version: version, InstanceUUID: id})
	defer vim.Close()
	srv := &http.Server{
		Handler: vim, TLSConfig: pki.HTTPSServer(creds), ReadHeaderTimeout: 20 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 64 << 10,
	}
	log.Info("center is ready", "api", api.Addr().String(), "join", join.Addr().String(), "thumbprint", pki.Thumbprint(creds.Leaf()))
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.Run(ctx) })
	g.Go(func() error { return c.ServeAdmin(ctx, cfg.AdminSocket) })
	g.Go(func() error { return c.ServeJoin(ctx, join) })
	g.Go(func() error {
		if err := srv.Serve(tls.NewListener(api, srv.TLSConfig)); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if srv.Shutdown(stop) != nil {
			return srv.Close()
		}
		return nil
	})
	return g.Wait()
}

// tellPassword shows the generated password of the first start, once.
func tellPassword(password, file string) error {
	if password == "" {
		return nil
	}
	if file == "" {
		fmt.Fprintf(os.Stdout, "First start. User administrator@mortise.local, password %s (shown this once)\n", password)
		return nil
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("writing the first start's password: %w; set another one with: mortise center password reset", err)
	}
	_, err = fmt.Fprintln(f, password)
	return errors.Join(err, f.Sync(), f.Close())
}

func centerStatus() *cobra.Command {
	var socket string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell how center and its hosts do, without logging in",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := center.NewAdmin(socket).Status(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(st)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintf(w, "%d VMs, %d of them locked; %d running tasks; %d sessions\n\n", st.VMs, st.LockedVMs, st.Tasks, st.Sessions)
			fmt.Fprintln(w, "HOST\tADDRESS\tCONNECTION\tCRYPTO\tPROBLEM")
			for _, h := range st.Hosts {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", h.Name, h.Address, h.Connection, h.CryptoState, h.Problem)
			}
			return w.Flush()
		},
	}
	cmd.Flags().StringVar(&socket, "admin-socket", defaultCenterSocket, "center's admin socket")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func centerToken() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Tokens with which hosts join"}
	var socket, name string
	var life time.Duration
	create := &cobra.Command{
		Use:   "create",
		Short: "Make a token for one host",
		Long: `Prints a token that lets one machine join as the host of that name, once, while it
lives. The token also says which center is the right one. Treat it as a secret.`,
		Example: `  mortise center token create --name esx1 --ttl 1h`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			token, err := center.NewAdmin(socket).CreateJoinToken(cmd.Context(), name, life)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), token)
			return nil
		},
	}
	create.Flags().StringVar(&socket, "admin-socket", defaultCenterSocket, "center's admin socket")
	create.Flags().StringVar(&name, "name", "", "the host's name")
	create.Flags().DurationVar(&life, "ttl", time.Hour, "how long the token lives")
	_ = create.MarkFlagRequired("name")
	cmd.AddCommand(create)
	return cmd
}

func centerUser() *cobra.Command {
	cmd := &cobra.Command{Use: "user", Short: "Accounts of administrators and services"}
	var socket, fullName, role, file string
	add := &cobra.Command{
		Use:   "add NAME",
		Short: "Make a user with a role on everything",
		Long: `Makes an account. Roles: Admin (everything), NoCryptoAdmin (everything but keys and
encryption, and what would go round that), ReadOnly, NoAccess. The generated
password is printed once, unless --password-file gives one.`,
		Example: `  mortise center user add backup@mortise.local --role ReadOnly
  mortise center user add ops@mortise.local --role NoCryptoAdmin --password-file pw`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			password := ""
			if file != "" {
				var err error
				if password, err = argument("@" + file); err != nil {
					return err
				}
			}
			made, err := center.NewAdmin(socket).AddUser(cmd.Context(), args[0], fullName, password, role)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "User %s has the role %s on everything.\n", args[0], role)
			if file == "" {
				fmt.Fprintf(cmd.OutOrStdout(), "The password is %s (shown this once)\n", made)
			}
			return nil
		},
	}
	add.Flags().StringVar(&socket, "admin-socket", defaultCenterSocket, "center's admin socket")
	add.Flags().StringVar(&fullName, "full-name", "", "for people")
	add.Flags().StringVar(&role, "role", "ReadOnly", "Admin, NoCryptoAdmin, ReadOnly or NoAccess")
	add.Flags().StringVar(&file, "password-file", "", "file with the password")
	cmd.AddCommand(add)
	return cmd
}

func centerPassword() *cobra.Command {
	cmd := &cobra.Command{Use: "password", Short: "Lost passwords"}
	var socket, user, file string
	reset := &cobra.Command{
		Use:     "reset",
		Short:   "Give a user a new password",
		Long:    `Prints a generated password, or sets the one in --password-file. It needs no log-in: who reaches the admin socket is root on center.`,
		Example: `  mortise center password reset --user administrator@mortise.local`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			password := ""
			if file != "" {
				var err error
				if password, err = argument("@" + file); err != nil {
					return err
				}
			}
			made, err := center.NewAdmin(socket).ResetPassword(cmd.Context(), user, password)
			if err != nil {
				return err
			}
			if file == "" {
				fmt.Fprintf(cmd.OutOrStdout(), "The password of %s is %s\n", user, made)
			} else {
				fmt.Fprintf(cmd.OutOrStdout(), "The password of %s is the one in %s.\n", user, file)
			}
			return nil
		},
	}
	reset.Flags().StringVar(&socket, "admin-socket", defaultCenterSocket, "center's admin socket")
	reset.Flags().StringVar(&user, "user", "administrator@mortise.local", "the user")
	reset.Flags().StringVar(&file, "password-file", "", "file with the new password")
	cmd.AddCommand(reset)
	return cmd
}
