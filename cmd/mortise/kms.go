package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"mortise/internal/cli/kmscli"
	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/kms/backup"
	"mortise/internal/kms/kmipd"
	"mortise/internal/pki"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// kmsConfig is the KMS's configuration file; flags have the same names.
type kmsConfig struct {
	StateDir       string `toml:"state_dir"`
	Listen         string `toml:"listen"`
	AdminSocket    string `toml:"admin_socket"`
	AdminListen    string `toml:"admin_listen"`
	PassphraseFile string `toml:"passphrase_file"`
	TLSCert        string `toml:"tls_cert"`
	TLSKey         string `toml:"tls_key"`
	logFlags
}

func kmsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "kms",
		Short:   "Key server: makes and keeps KEKs, speaks KMIP",
		GroupID: "role",
		Long: `The key server runs alone: a real vCenter, Mortise's center, or any other KMIP
client uses it. It keeps every key wrapped; the root key that wraps them all is a
file that only the passphrase opens.

  kms# mortise kms serve --passphrase-file /etc/mortise/kms.passphrase
  kms# mortise kms client add center.pem      let a client certificate in`,
	}
	cmd.AddCommand(kmsServe())
	kmscli.Add(cmd)
	kmscli.AddRestore(cmd, kmsRestorer())
	return cmd
}

func kmsServe() *cobra.Command {
	var cfg kmsConfig
	var config string
	var isDev bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the key server",
		Long: `Runs the key server until it is told to stop. At the first start it makes its
root key, sealed by the passphrase: without the passphrase nobody reads a key
again, so keep a copy of it, and of the state folder, in a safe place.

The passphrase comes from --passphrase-file (mode 0600), from the file that
MORTISE_PASSPHRASE_FILE names, or from the systemd credential kms-passphrase.

Clients are known by their certificates, which are pinned one by one; see
mortise kms client. The server's own certificate is made at the first start;
clients trust it by its thumbprint, which the log tells. A new certificate in the
same files is used within seconds, or at once on SIGHUP; open connections go on.`,
		Example: `  mortise kms serve --passphrase-file /etc/mortise/kms.passphrase
  mortise kms serve --config /etc/mortise/kms.toml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := loadConfig(cmd, config, &cfg); err != nil {
				return err
			}
			return serveKMS(cmd.Context(), cfg, isDev)
		},
	}
	f := cmd.Flags()
	f.StringVar(&config, "config", "", "configuration file (TOML)")
	f.StringVar(&cfg.StateDir, "state-dir", "/var/lib/mortise/kms", "folder for keys and settings")
	f.StringVar(&cfg.Listen, "listen", fmt.Sprintf(":%d", kmipd.Port), "address for KMIP over TLS")
	f.StringVar(&cfg.AdminSocket, "admin-socket", kmscli.DefaultSocket, "unix socket for the administrator, root only")
	f.StringVar(&cfg.AdminListen, "admin-listen", fmt.Sprintf(":%d", admin.Port), "address of the administration API over HTTPS; \"\" for none")
	f.StringVar(&cfg.PassphraseFile, "passphrase-file", "", "file with the passphrase of the root key, mode 0600")
	f.StringVar(&cfg.TLSCert, "tls-cert", "", "certificate of one's own, PEM (default: a self-signed one)")
	f.StringVar(&cfg.TLSKey, "tls-key", "", "its key, PEM, mode 0600")
	f.BoolVar(&isDev, "dev", false, "")
	_ = f.MarkHidden("dev")
	cfg.logFlags.bind(f)
	return cmd
}

func serveKMS(ctx context.Context, cfg kmsConfig, isDev bool) error {
	if err := secret.LockDown(); err != nil {
		return err
	}
	log, err := cfg.logger(os.Stderr, "kms")
	if err != nil {
		return err
	}
	if err := checkState(cfg.StateDir, isDev); err != nil {
		return err
	}
	if backup.Interrupted(cfg.StateDir) {
		return fmt.Errorf("a restore to %s was interrupted: run it again", cfg.StateDir)
	}
	root, err := rootKey(cfg.StateDir, cfg.PassphraseFile, "kms-passphrase")
	if err != nil {
		return err
	}
	defer root.Wipe()
	creds, certificate, key, err := kmsCredentials(cfg)
	if err != nil {
		return err
	}
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	s, err := store.Open(ctx, store.Config{Dir: filepath.Join(cfg.StateDir, "store"), Name: "kms-1", Logger: log})
	if err != nil {
		return err
	}
	defer s.Close()
	k, err := kms.Open(ctx, s, kms.Options{Logger: log})
	if err != nil {
		return err
	}
	defer k.Close()
	if err := k.Unlock(ctx, kms.SingleCRK(root)); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.AdminSocket), 0o755); err != nil {
		return err
	}
	socket, err := admin.Listen(cfg.AdminSocket)
	if err != nil {
		return err
	}
	defer os.Remove(cfg.AdminSocket)
	api := admin.New(admin.Options{KMS: k, Logger: log, Version: version})
	var https net.Listener
	if cfg.AdminListen != "" {
		if https, err = net.Listen("tcp", cfg.AdminListen); err != nil {
			return fmt.Errorf("--admin-listen: %w", err)
		}
	}
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	log.Info("kms is ready", "kmip", l.Addr().String(), "admin", cfg.AdminListen, "thumbprint", pki.Thumbprint(creds.Leaf()), "admin_socket", cfg.AdminSocket)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.Warn("systemd could not be told that the server is ready", "error", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		creds.Follow(ctx, certificate, key, reload, log)
		return nil
	})
	g.Go(func() error { return api.ServeSocket(ctx, socket) })
	if https != nil {
		g.Go(func() error { return api.ServeHTTPS(ctx, https, creds) })
	}
	g.Go(func() error { return kmipd.Serve(ctx, l, k, kmipd.Options{Credentials: creds, Logger: log}) })
	return g.Wait()
}

// kmsCredentials are the server's own, and the files they are in.
func kmsCredentials(cfg kmsConfig) (c *pki.Credentials, certificate, key string, err error) {
	if cfg.TLSCert != "" || cfg.TLSKey != "" {
		c, err = pki.LoadCredentials(cfg.TLSCert, cfg.TLSKey)
		return c, cfg.TLSCert, cfg.TLSKey, err
	}
	c, err = endpoint(cfg.StateDir, "kmip", cfg.Listen)
	own := filepath.Join(cfg.StateDir, "kmip.pem")
	return c, own, own, err
}
