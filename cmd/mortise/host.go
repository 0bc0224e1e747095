package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mortise/internal/domain"
	"mortise/internal/host"
	"mortise/internal/secret"
)

// hostConfig is the host's configuration file; flags have the same names.
type hostConfig struct {
	StateDir      string           `toml:"state_dir"`
	RunDir        string           `toml:"run_dir"`
	Listen        string           `toml:"listen"`
	Advertise     string           `toml:"advertise"`
	Center        string           `toml:"center"`
	LibvirtSocket string           `toml:"libvirt_socket"`
	QEMUUser      string           `toml:"qemu_user"`
	DirectIO      bool             `toml:"direct_io"`
	Datastores    []host.Datastore `toml:"datastore"`
	Convert       host.Conversions `toml:"conversions"`
	logFlags
}

func hostCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "host",
		Short:   "Host agent: holds keys in memory, runs encrypted VMs through libvirt",
		GroupID: "role",
		Long: `The host agent runs on every hypervisor. It joins a center once, with a token
that center's administrator makes, and from then on obeys only that center.

  center# mortise center token create --name esx1
  host#   mortise host join --center center.example.com:8444 --advertise esx1:8446 TOKEN
  host#   mortise host datastore init --name ds1 --path /srv/ds1
  host#   mortise host serve --datastore ds1=/srv/ds1`,
	}
	cmd.AddCommand(hostServe(), hostJoin(), hostDatastore())
	return cmd
}

func hostServe() *cobra.Command {
	var cfg hostConfig
	var config, token string
	var stores []string
	var isDev bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the host agent",
		Long: `Runs the host agent until it is told to stop. Guests and the processes that
serve their disks run on when the agent ends, is killed or upgraded: the next
agent takes them over.

A configuration file (TOML) may say what the flags say:

  state_dir = "/var/lib/mortise/host"
  listen = ":8446"
  [[datastore]]
  name = "ds1"
  path = "/srv/ds1"

It also says whether disks go round the page cache (direct_io = true; the default, and
the reason for it, are in doc/operations.md), and how many disks are converted at once;
the others wait their turn:

  [conversions]
  per_host = 2
  per_datastore = 1`,
		Example: `  mortise host serve --datastore ds1=/srv/ds1
  mortise host serve --config /etc/mortise/host.toml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := loadConfig(cmd, config, &cfg); err != nil {
				return err
			}
			if err := addDatastores(&cfg, stores); err != nil {
				return err
			}
			if err := checkState(cfg.StateDir, isDev); err != nil {
				return err
			}
			return serveHost(cmd.Context(), cfg, token)
		},
	}
	f := cmd.Flags()
	f.StringVar(&config, "config", "", "configuration file (TOML)")
	f.StringVar(&cfg.StateDir, "state-dir", "/var/lib/mortise/host", "folder for this host's identity")
	f.StringVar(&cfg.RunDir, "run-dir", "/run/mortise/host", "folder for sockets; short, on tmpfs, only root's")
	f.StringVar(&cfg.Listen, "listen", ":8446", "address where center reaches this host")
	f.StringVar(&cfg.Advertise, "advertise", "", "with --join: host:port that center shall use (default: this machine's name and the port of --listen)")
	f.StringVar(&cfg.Center, "center", "", "with --join: host:port of center's join listener")
	f.StringVar(&token, "join", "", "join with this token first, if this machine has not joined yet; @FILE reads it from a file")
	f.StringVar(&cfg.LibvirtSocket, "libvirt-socket", domain.DefaultSocket, "libvirtd's socket")
	f.StringVar(&cfg.QEMUUser, "qemu-user", "libvirt-qemu", "user that libvirt runs QEMU as (user in /etc/libvirt/qemu.conf)")
	f.BoolVar(&cfg.DirectIO, "direct-io", false, "read and write disks round the page cache (O_DIRECT)")
	f.StringArrayVar(&stores, "datastore", nil, "NAME=PATH of a datastore; repeat for more")
	f.IntVar(&cfg.Convert.PerHost, "conversions-per-host", 2, "disks of VMs that are converted at once on this host")
	f.IntVar(&cfg.Convert.PerDatastore, "conversions-per-datastore", 1, "and of those, on one datastore")
	f.BoolVar(&isDev, "dev", false, "")
	_ = f.MarkHidden("dev")
	cfg.logFlags.bind(f)
	return cmd
}

func addDatastores(cfg *hostConfig, stores []string) error {
	for _, s := range stores {
		name, path, ok := strings.Cut(s, "=")
		if !ok || name == "" || !filepath.IsAbs(path) {
			return fmt.Errorf("--datastore %q: want NAME=/absolute/path", s)
		}
		cfg.Datastores = append(cfg.Datastores, host.Datastore{Name: name, Path: path})
	}
	seen := map[string]bool{}
	for _, d := range cfg.Datastores {
		if seen[d.Name] {
			return fmt.Errorf("datastore %q is configured twice", d.Name)
		}
		seen[d.Name] = true
	}
	return nil
}

func serveHost(ctx context.Context, cfg hostConfig, token string) error {
	if c := cfg.Convert; c.PerHost < 1 || c.PerDatastore < 1 {
		return fmt.Errorf("--conversions-per-host %d, --conversions-per-datastore %d: both are 1 or more, or no VM could be converted", c.PerHost, c.PerDatastore)
	}
	if err := secret.LockDown(); err != nil {
		return err
	}
	log, err := cfg.logger(os.Stderr, "host")
	if err != nil {
		return err
	}
	member, err := host.LoadMembership(cfg.StateDir)
	if errors.Is(err, fs.ErrNotExist) {
		if token == "" {
			return fmt.Errorf("this machine has not joined a center: make a token with 'mortise center token create' and run 'mortise host join'")
		}
		member, err = joinHost(ctx, cfg, token)
	}
	if err != nil {
		return err
	}
	uuid, err := host.UUID(cfg.StateDir)
	if err != nil {
		return err
	}
	uid, gid, err := qemuUser(cfg.QEMUUser)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.RunDir, 0o711); err != nil {
		return err
	}
	guests, err := domain.Connect(ctx, domain.Config{Socket: cfg.LibvirtSocket, ProbeFile: filepath.Join(cfg.RunDir, "kvm-probe"), Log: log})
	if err != nil {
		return err
	}
	defer guests.Close()
	agent, err := host.Start(ctx, host.Config{
		Name: member.Name, UUID: uuid, Version: version, RunDir: cfg.RunDir, Datastores: cfg.Datastores,
		Executable: self, VMXArgs: []string{"vmx", "--log-format", cfg.Format, "--log-level", cfg.Level}, DirectIO: cfg.DirectIO,
		QEMUUID: uid, QEMUGID: gid, Guests: guests, Convert: cfg.Convert, Logger: log, Now: time.Now,
	})
	if err != nil {
		return err
	}
	defer agent.Stop()
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return err
	}
	log.Info("host is ready", "name", member.Name, "listen", l.Addr().String())
	return host.Serve(ctx, l, member, agent)
}

// qemuUser finds the user whom a guest's sockets and files are handed to.
func qemuUser(name string) (uid, gid int, err error) {
	u, err := user.Lookup(name)
	if err != nil {
		return 0, 0, fmt.Errorf("--qemu-user: %w; install libvirt-daemon-system, or name the user in /etc/libvirt/qemu.conf", err)
	}
	uid, err = strconv.Atoi(u.Uid)
	if err != nil {
		return 0, 0, err
	}
	gid, err = strconv.Atoi(u.Gid)
	return uid, gid, err
}

func joinHost(ctx context.Context, cfg hostConfig, token string) (*host.Membership, error) {
	text, err := argument(token)
	if err != nil {
		return nil, err
	}
	if cfg.Center == "" {
		return nil, errors.New("joining needs --center HOST:PORT, the join listener of center (port 8444 by default)")
	}
	if cfg.Advertise == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, err
		}
		_, port, err := net.SplitHostPort(cfg.Listen)
		if err != nil {
			return nil, fmt.Errorf("--listen %q: %w", cfg.Listen, err)
		}
		cfg.Advertise = net.JoinHostPort(name, port)
	}
	return host.Join(ctx, cfg.StateDir, cfg.Center, cfg.Advertise, text)
}

// argument is a value, or with @ the content of a file: a secret on a command
// line is seen by every user of the machine.
func argument(s string) (string, error) {
	name, ok := strings.CutPrefix(s, "@")
	if !ok {
		return s, nil
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(text)), nil
}

func hostJoin() *cobra.Command {
	cfg := hostConfig{}
	cmd := &cobra.Command{
		Use:   "join TOKEN",
		Short: "Make this machine a host of a center",
		Long: `Makes a key, has center certify it, and keeps both in the state folder. The token
is checked before anything is sent: it names the CA that center must show.
@FILE reads the token from a file.`,
		Example: `  mortise host join --center center:8444 --advertise esx1.example.com:8446 @token`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := joinHost(cmd.Context(), cfg, args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "This machine is host %s now. Start it: mortise host serve\n", m.Name)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.StateDir, "state-dir", "/var/lib/mortise/host", "folder for this host's identity")
	f.StringVar(&cfg.Center, "center", "", "host:port of center's join listener")
	f.StringVar(&cfg.Advertise, "advertise", "", "host:port where center shall reach this host (default: this machine's name, port 8446)")
	cfg.Listen = ":8446"
	_ = cmd.MarkFlagRequired("center")
	return cmd
}
