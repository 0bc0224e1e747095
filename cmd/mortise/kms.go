package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"mortise/internal/atomicfile"
	"mortise/internal/cli/kmscli"
	"mortise/internal/kms"
	"mortise/internal/kms/admin"
	"mortise/internal/kms/audit"
	"mortise/internal/kms/backup"
	"mortise/internal/kms/cluster"
	"mortise/internal/kms/kmipd"
	"mortise/internal/kms/metrics"
	"mortise/internal/kms/unlocking"
	"mortise/internal/pki"
	"mortise/internal/secret"
	"mortise/internal/store"
	"mortise/internal/tpm"
)

// kmsConfig is the KMS's configuration file; flags have the same names.
type kmsConfig struct {
	StateDir    string   `toml:"state_dir"`
	Listen      string   `toml:"listen"`
	Advertise   []string `toml:"advertise"`
	AdminSocket string   `toml:"admin_socket"`
	AdminListen string   `toml:"admin_listen"`
	rootKeysConfig
	TLSCert       string   `toml:"tls_cert"`
	TLSKey        string   `toml:"tls_key"`
	Name          string   `toml:"name"`
	PeerAddress   string   `toml:"peer_address"`
	PeerListen    string   `toml:"peer_listen"`
	QuotaGiB      int64    `toml:"quota_gib"`
	MetricsListen string   `toml:"metrics_listen"`
	AuditDir      string   `toml:"audit_dir"`
	AuditAnchors  []string `toml:"audit_anchor"`
	AuditSegment  int64    `toml:"audit_segment_mib"`
	join          string
	single        bool
	clockFile     string // of a test
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
same files is used within seconds, or at once on SIGHUP; open connections go on.

Three members are one highly available key server. A new one joins with a token of
mortise kms member add; from then on it starts without it, and gets its root keys
from the others, so that nobody need be there when it restarts.`,
		Example: `  mortise kms serve --passphrase-file /etc/mortise/kms.passphrase
  mortise kms serve --advertise kms1.example.com,kms.example.com:15696 --passphrase-file …
  mortise kms serve --join TOKEN --peer-address 10.0.0.2:5698 --passphrase-file …
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
	f.StringSliceVar(&cfg.Advertise, "advertise", nil, "names or IP addresses by which clients reach this member, NAME or NAME:PORT, the first one first (default: the address of --listen, or the machine's name)")
	f.StringVar(&cfg.AdminSocket, "admin-socket", kmscli.DefaultSocket, "unix socket for the administrator, root only")
	f.StringVar(&cfg.AdminListen, "admin-listen", fmt.Sprintf(":%d", admin.Port), "address of the administration API over HTTPS; \"\" for none")
	f.StringVar(&cfg.PassphraseFile, "passphrase-file", "", "file with the passphrase of the root keys, mode 0600")
	f.BoolVar(&cfg.TPM, "tpm", false, "at the first start seal the root keys to this machine's TPM 2.0; with a passphrase too, that is a second way in")
	f.StringVar(&cfg.TPMDevice, "tpm-device", "", "the TPM (default "+tpm.DefaultDevice+")")
	f.UintSliceVar(&cfg.TPMPCRs, "tpm-pcrs", nil, "PCRs that must stay as they are, e.g. 0,2,4,7 (default: none)")
	f.StringVar(&cfg.PKCS11Module, "pkcs11-module", "", "library of a PKCS#11 token that keeps the root keys")
	f.StringVar(&cfg.PKCS11Token, "pkcs11-token", "", "label of the token (default: the only one)")
	f.StringVar(&cfg.PKCS11PINFile, "pkcs11-pin-file", "", "file with the token's PIN, mode 0600")
	f.StringVar(&cfg.PKCS11Helper, "pkcs11-helper", "", "program that loads the library (default: mortise-pkcs11 beside this one)")
	f.StringVar(&cfg.TLSCert, "tls-cert", "", "certificate of one's own, PEM (default: a self-signed one)")
	f.StringVar(&cfg.TLSKey, "tls-key", "", "its key, PEM, mode 0600")
	f.StringVar(&cfg.join, "join", "", "join a cluster with this token (first start only), or @FILE that holds it")
	f.StringVar(&cfg.Name, "name", "", "this member's name (default: the token's, or "+cluster.DefaultName+")")
	f.StringVar(&cfg.PeerAddress, "peer-address", "", fmt.Sprintf("where other members reach this one, host:port (usually port %d)", cluster.Port))
	f.StringVar(&cfg.PeerListen, "peer-listen", "", "what to listen on for them (default: every interface, that port)")
	f.Int64Var(&cfg.QuotaGiB, "quota-gib", store.DefaultQuota>>30, "size of the database at which writes are refused, GiB")
	f.StringVar(&cfg.MetricsListen, "metrics-listen", defaultMetrics, "address of /metrics, /healthz and /readyz, over HTTP without log-in; \"\" for none")
	f.StringVar(&cfg.AuditDir, "audit-dir", "", "folder of the audit log, best on a disk of its own (default: audit in the state folder)")
	f.StringArrayVar(&cfg.AuditAnchors, "audit-anchor", nil, "keep the audit log's signed heads there too: /path/on/another/machine, tcp://loghost:514 or tls://loghost:6514?ca=FILE (may be repeated)")
	f.Int64Var(&cfg.AuditSegment, "audit-segment-mib", 16, "size of the pieces of the audit log, MiB")
	f.BoolVar(&cfg.single, "go-on-alone", false, "the other members are lost for good: make this one a cluster of its own")
	f.BoolVar(&isDev, "dev", false, "")
	f.StringVar(&cfg.clockFile, "clock-offset-file", "", "")
	_, _ = f.MarkHidden("dev"), f.MarkHidden("clock-offset-file")
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
	boundMemory(log)
	if err := checkState(cfg.StateDir, isDev); err != nil {
		return err
	}
	if backup.Interrupted(cfg.StateDir) {
		return fmt.Errorf("a restore to %s was interrupted: run it again", cfg.StateDir)
	}
	options := kms.Options{Logger: log}
	if options.Audit, err = auditOptions(cfg); err != nil {
		return err
	}
	if cfg.clockFile != "" {
		if !isDev {
			return errors.New("--clock-offset-file is for tests")
		}
		start := time.Now()
		options.Now, options.Elapsed = testClock(cfg.clockFile), func() time.Duration { return time.Since(start) }
	}
	if cfg.QuotaGiB < 1 {
		return errors.New("--quota-gib must be at least 1")
	}
	reached, err := addressesForClients(cfg)
	if err != nil {
		return err
	}
	token := cfg.join
	if file, is := strings.CutPrefix(token, "@"); is {
		text, err := atomicfile.Read(file, 1<<16)
		if err != nil {
			return fmt.Errorf("--join: %w", err)
		}
		token = string(text)
	}
	keys, err := cfg.unlocking(filepath.Join(cfg.StateDir, kmsKeyring), log)
	if err != nil {
		return err
	}
	roots, err := unlocking.Open(ctx, keys)
	if err != nil {
		return err
	}
	defer roots.Close()
	creds, certificate, key, err := kmsCredentials(cfg, reached)
	if err != nil {
		return err
	}
	replaced := make(chan struct{}, 1)
	measured := metrics.New(metrics.Options{Version: version, Logger: log, ServerCertificate: func() time.Time { return creds.Leaf().NotAfter }})
	options.Audit.Synced = measured.AuditSynced
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	node, err := cluster.New(ctx, cluster.Options{Dir: cfg.StateDir, Name: cfg.Name, Address: cfg.PeerAddress, Listen: cfg.PeerListen,
		Token: token, Version: version, Format: kms.RecordFormat, Logger: log})
	if err != nil {
		return err
	}
	defer node.Close()
	s, err := store.Open(ctx, store.Config{Dir: filepath.Join(cfg.StateDir, "store"), Name: node.Name, Logger: log,
		Quota: cfg.QuotaGiB << 30, Peers: node.Peers(), Single: cfg.single})
	if err != nil {
		return err
	}
	defer s.Close()
	options.FetchKeys = func(ctx context.Context, to kms.Sharer, ids ...string) error { return node.FetchKeys(ctx, to, ids...) }
	k, err := kms.Open(ctx, s, options)
	if err != nil {
		return err
	}
	defer k.Close()
	if err := node.Attach(ctx, s, k); err != nil {
		return err
	}
	defer node.Detach()
	if err := os.MkdirAll(filepath.Dir(cfg.AdminSocket), 0o755); err != nil {
		return err
	}
	socket, err := admin.Listen(cfg.AdminSocket)
	if err != nil {
		return err
	}
	defer os.Remove(cfg.AdminSocket)
	api := admin.New(admin.Options{KMS: k, Cluster: node, RootKeys: roots, Logger: log, Version: version})
	var https net.Listener
	if cfg.AdminListen != "" {
		if https, err = net.Listen("tcp", cfg.AdminListen); err != nil {
			return fmt.Errorf("--admin-listen: %w", err)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	if cfg.MetricsListen != "" {
		l, err := net.Listen("tcp", cfg.MetricsListen)
		switch {
		case err == nil:
			g.Go(func() error { return measured.Serve(ctx, l, k) })
		case cfg.MetricsListen == defaultMetrics && errors.Is(err, syscall.EADDRINUSE):
			log.Warn("metrics and health are not served: somebody else has the address; choose one with --metrics-listen", "address", defaultMetrics)
		default:
			return fmt.Errorf("--metrics-listen: %w", err)
		}
	}
	g.Go(func() error {
		creds.Follow(ctx, certificate, key, reload, log, func() {
			select {
			case replaced <- struct{}{}:
			default:
			}
		})
		return nil
	})
	g.Go(func() error { return api.ServeSocket(ctx, socket) })
	if https != nil {
		g.Go(func() error { return api.ServeHTTPS(ctx, https, creds) })
	}
	g.Go(func() error {
		select {
		case <-s.Stopped():
			return store.ErrRemoved
		case <-ctx.Done():
			return nil
		}
	})
	g.Go(func() error {
		err := roots.Await(ctx, k, node)
		if err == nil {
			err = awaitRelease(ctx, k, log)
		}
		if ctx.Err() != nil {
			return nil // it is told to stop, locked or quarantined as it is
		}
		if err != nil {
			return err
		}
		l, err := net.Listen("tcp", cfg.Listen) // not before: a locked server serves nobody
		if err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
		g.Go(func() error {
			announce(ctx, k, node.Name, reached, l.Addr(), creds, replaced, log)
			return nil
		})
		log.Info("kms is ready", "kmip", l.Addr().String(), "admin", cfg.AdminListen, "thumbprint", pki.Thumbprint(creds.Leaf()), "admin_socket", cfg.AdminSocket)
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			log.Warn("systemd could not be told that the server is ready", "error", err)
		}
		return kmipd.Serve(ctx, l, k, kmipd.Options{Credentials: creds, Logger: log, Watcher: measured})
	})
	return g.Wait()
}

// defaultMetrics is for the machine itself. Of several key servers on one, the
// first gets it.
const defaultMetrics = "127.0.0.1:9696"

// auditOptions says where the audit log and its anchors go.
func auditOptions(cfg kmsConfig) (o kms.AuditOptions, err error) {
	o.Dir, o.SegmentSize = cmp.Or(cfg.AuditDir, filepath.Join(cfg.StateDir, "audit")), cfg.AuditSegment<<20
	if cfg.AuditSegment < 1 || cfg.AuditSegment > 4096 {
		return o, errors.New("--audit-segment-mib must be 1 to 4096")
	}
	for _, text := range cfg.AuditAnchors {
		sink, err := audit.ParseSink(text)
		if err != nil {
			return o, fmt.Errorf("--audit-anchor: %w", err)
		}
		o.Sinks = append(o.Sinks, sink)
	}
	return o, nil
}
