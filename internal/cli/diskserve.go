package cli

import (
	"context"
	"crypto/tls"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"mortise/internal/nbd"
	"mortise/internal/pki"
	"mortise/internal/vdisk"
)

// serveFlags are those of mortise disk serve.
type serveFlags struct {
	diskFlags
	socket, control, owner string
	name                   string
	readOnly               bool
	convert, limit         string
	listen                 string
	tlsCert, tlsKey, tlsCA string
	tlsClients             []string
	bitmaps                bitmapFlags
}

func diskServe(g *globals) *cobra.Command {
	var d serveFlags
	cmd := &cobra.Command{
		Use:   "serve DISK.vmdk --socket PATH",
		Short: "Serve a disk to QEMU over NBD",
		Long: `Opens a disk and serves it over NBD, until Ctrl-C or SIGTERM: on a unix socket that only
its owner reaches, or with --listen over TLS 1.3 to clients that show a certificate. QEMU,
libvirt, nbdcopy and qemu-img are such clients. Any number of connections see one disk;
a flush on one covers all.

What to give to QEMU and libvirt is printed when the disk is served. reconnect makes a
guest wait while this is restarted; and what a guest was told to be flushed survives
Ctrl-C, kill and power cut alike.

--convert encrypts, decrypts or recrypts the disk in the background while it is served,
or goes on with what was interrupted ("resume"), or runs it back ("cancel"). So does
mortise disk convert --socket from elsewhere, with the control socket that is named.

--new-bitmap NAME remembers from now on which parts of the disk change, for incremental
backup: clients see it as the NBD metadata context qemu:dirty-bitmap:NAME. It is kept in
a file beside the extent whenever the disk is served, until --drop-bitmap NAME; what a
crash leaves unclear counts as changed. A bitmap is not offered any more when the disk
was changed without it: then the next backup must be a full one.

At the first Ctrl-C requests that were read are answered, then everything is flushed; a
second one cuts the connections and flushes. Neither loses what was acknowledged.
` + keysHelp + `

JSON: {"disk", "uuid", "size", "socket", "control", "uri", "qemu", "device", "libvirt"},
printed when the disk is served.`,
		Example: `  mortise disk serve vm1.vmdk --key-file vm1.key --socket /run/vm1.sock
  mortise disk serve vm1.vmdk --key-file vm1.key --socket /run/vm1.sock --owner libvirt-qemu:kvm
  mortise disk serve vm1.vmdk --key-file vm1.key --socket /run/vm1.sock \
    --convert encrypt --limit 100M
  mortise disk serve vm1.vmdk --kmip kmip://kms1 --client-cert me.pem --ca ca.pem \
      --listen 0.0.0.0:10809 --tls-cert server.pem --tls-key server.key --tls-ca clients.pem`,
		Args: needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return explainDisk(g.streams(cmd).serveDisk(cmd.Context(), args[0], &d), args[0])
		},
	}
	f := cmd.Flags()
	f.StringVar(&d.socket, "socket", "", "unix socket to make, in a folder that only QEMU's user and you may enter")
	f.StringVar(&d.control, "control", "", "control socket to make (default: SOCKET.control beside the other)")
	f.StringVar(&d.owner, "owner", "", "USER[:GROUP] that the socket is given to: whom QEMU runs as")
	f.StringVar(&d.name, "export", "", "name of the export (default: none)")
	f.BoolVar(&d.readOnly, "read-only", false, "refuse writes; others may read the disk at the same time")
	f.BoolVar(&d.direct, "direct", false, "read and write round this machine's page cache (O_DIRECT)")
	f.StringVar(&d.convert, "convert", "", "in the background: encrypt, decrypt, recrypt, resume or cancel")
	f.StringVar(&d.limit, "limit", "", "rate of that, bytes per second: 50M")
	f.StringVar(&d.listen, "listen", "", "HOST:PORT to serve over TLS, e.g. 0.0.0.0:10809")
	f.StringVar(&d.tlsCert, "tls-cert", "", "server certificate for --listen (PEM)")
	f.StringVar(&d.tlsKey, "tls-key", "", "its key (PEM, mode 0600; default: in the same file)")
	f.StringVar(&d.tlsCA, "tls-ca", "", "CA whose client certificates may use the disk (PEM)")
	f.StringArrayVar(&d.tlsClients, "tls-client", nil, "common name or DNS name of a client that may; repeat for more (default: every one of that CA)")
	f.StringArrayVar(&d.bitmaps.make, "new-bitmap", nil, "remember under this name what changes from now on")
	f.StringArrayVar(&d.bitmaps.drop, "drop-bitmap", nil, "forget what was remembered under this name")
	d.bind(f)
	d.bindExpect(f)
	d.keys.bindNew(f, true)
	return cmd
}

// serveDisk runs until ctx ends.
func (s *streams) serveDisk(ctx context.Context, path string, d *serveFlags) (err error) {
	limit, err := parseLimit(d.limit)
	if err != nil {
		return err
	}
	if d.socket == "" && d.listen == "" {
		return errors.New("--socket is missing: the unix socket that QEMU is to connect to (or --listen, for TLS)")
	}
	if d.readOnly && d.convert != "" {
		return errors.New("--convert writes to the disk, and --read-only was given: leave one of them out")
	}
	kind := conversionKind("")
	if d.convert != "" {
		if kind, err = parseConversion(d.convert); err != nil {
			return fmt.Errorf("--convert: %w", err)
		}
	}
	secure, err := d.tlsConfig()
	if err != nil {
		return err
	}
	log := s.logger(slog.LevelInfo)
	// A second signal must not end the process before what was acknowledged is durable.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)

	ring := newKeyring()
	defer ring.wipe()
	keyed := len(d.keys.Files) > 0 || len(d.keys.KMIP) > 0
	top, err := topOf(path)
	if err != nil {
		return err
	}
	// The bitmaps are closed after the disk, which then shows what it will show next
	// time. What cannot be sealed now is not trusted then.
	found, _, _ := diskSeal(top)
	var bitmaps *keptBitmaps
	defer func() { err = errors.Join(err, bitmaps.close()) }()
	v, err := d.open(ctx, path, d.readOnly, ring, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if keyed && !v.Info().Encrypted && kind == "" {
		return fmt.Errorf("%s: a key was given, and the disk is in clear: if that is right, leave the key out; if not, restore its descriptor, or encrypt it with --convert encrypt", path)
	}
	job := &diskJob{path: path, volume: v, ring: ring, log: log, readOnly: d.readOnly, flags: &d.diskFlags}
	job.pace(limit)

	srv := nbd.New(nbd.Options{Logger: log})
	exp, err := srv.Add(d.name, nbdDevice{v}, d.readOnly)
	if err != nil {
		return err
	}
	if bitmaps, err = d.bitmaps.keep(exp, top, found, v.Size(), log); err != nil {
		return err
	}
	serving, cut := context.WithCancel(context.Background())
	defer cut()
	var running sync.WaitGroup
	ended := make(chan error, 3)
	if d.socket != "" {
		if d.control == "" {
			d.control = d.socket + ".control"
		}
		l, err := nbd.Listen(d.socket)
		if err != nil {
			return err
		}
		if err := chown(d.socket, d.owner); err != nil {
			return errors.Join(err, l.Close())
		}
		running.Go(func() { ended <- srv.Serve(serving, l) })
	}
	if d.listen != "" {
		l, err := net.Listen("tcp", d.listen)
		if err != nil {
			return fmt.Errorf("--listen: %w", err)
		}
		d.listen = l.Addr().String()
		running.Go(func() { ended <- srv.ServeTLS(serving, l, secure) })
	}
	if d.control != "" {
		l, err := nbd.Listen(d.control)
		if err != nil {
			return err
		}
		running.Go(func() { job.listen(serving, l) })
	}
	if err := s.announceDisk(v.Info(), v.Size(), d); err != nil {
		return err
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // for a unit of Type=notify; without systemd it does nothing
	working, stopWork := context.WithCancel(ctx)
	defer stopWork()
	if kind != "" {
		running.Go(func() { job.background(working, s, convertRequest{Kind: kind, Keys: d.keys, Limit: limit}) })
	} else if c := v.Info().Conversion; c != vdisk.NotConverting {
		log.Warn("a conversion is unfinished; the disk works, part of it in the old form", "kind", c.String(), "resume", "serve --convert resume, or mortise disk convert --socket "+d.control+" --resume")
	}

	var failed error
	select {
	case <-ctx.Done():
	case failed = <-ended: // a listener broke
	}
	log.Info("closing the disk: answering what was asked, then flushing", "disk", path)
	stopWork()
	draining, hurry := context.WithTimeout(context.Background(), drainTime)
	defer hurry()
	go func() {
		for n := 0; ; n++ { // the first is the one that ended ctx
			select {
			case <-signals:
				if n > 0 || failed != nil {
					hurry()
				}
			case <-draining.Done():
				return
			}
		}
	}()
	if err := srv.Shutdown(draining); err != nil {
		log.Warn("connections were cut", "error", err)
	}
	cut()
	running.Wait()
	if !d.readOnly {
		if err := v.Flush(context.Background()); err != nil {
			return errors.Join(failed, fmt.Errorf("flushing %s: %w", path, err))
		}
	}
	if dead := v.Failed(); dead != nil {
		return errors.Join(failed, dead)
	}
	log.Info("the disk is closed, everything is durable", "disk", path)
	return failed
}

// drainTime is how long clients get to have what they asked for answered.
const drainTime = 10 * time.Second

// tlsConfig is that of --listen; nil without it.
func (d *serveFlags) tlsConfig() (*tls.Config, error) {
	if d.listen == "" {
		if d.tlsCert != "" || d.tlsCA != "" || d.tlsKey != "" || len(d.tlsClients) > 0 {
			return nil, errors.New("--tls-cert, --tls-key, --tls-ca and --tls-client are for --listen, which is missing")
		}
		return nil, nil
	}
	if d.tlsCert == "" || d.tlsCA == "" {
		return nil, errors.New("--listen serves over TLS only: give --tls-cert (and --tls-key) for this server, and --tls-ca for the clients that may use the disk")
	}
	key := d.tlsKey
	if key == "" {
		key = d.tlsCert
	}
	cert, err := pki.LoadCredentials(d.tlsCert, key)
	if err != nil {
		return nil, err
	}
	cas, err := pki.LoadCertificates(d.tlsCA)
	if err != nil {
		return nil, err
	}
	return pki.DiskServer(cert, cas, d.tlsClients, nil), nil
}

// chown gives a socket to USER[:GROUP], names or numbers.
func chown(path, owner string) error {
	if owner == "" {
		return nil
	}
	name, group, grouped := strings.Cut(owner, ":")
	uid, gid := -1, -1
	number := func(text string, look func(string) (string, error)) (int, error) {
		if n, err := strconv.Atoi(text); err == nil {
			return n, nil
		}
		id, err := look(text)
		if err != nil {
			return 0, fmt.Errorf("--owner: %w", err)
		}
		return strconv.Atoi(id)
	}
	var err error
	if name != "" {
		uid, err = number(name, func(n string) (string, error) {
			u, err := user.Lookup(n)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		})
		if err != nil {
			return err
		}
	}
	if grouped {
		gid, err = number(group, func(n string) (string, error) {
			g, err := user.LookupGroup(n)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		})
		if err != nil {
			return err
		}
	}
	return os.Chown(path, uid, gid)
}

// servedDisk is what a client must know, in JSON.
type servedDisk struct {
	Disk    string `json:"disk"`
	UUID    string `json:"uuid"`
	Size    int64  `json:"size"`
	Socket  string `json:"socket,omitempty"`
	Listen  string `json:"listen,omitempty"`
	Control string `json:"control,omitempty"`
	URI     string `json:"uri"`
	QEMU    string `json:"qemu"`   // of -blockdev
	Device  string `json:"device"` // of -device
	Libvirt string `json:"libvirt"`
}

func (s *streams) announceDisk(i vdisk.Info, length int64, d *serveFlags) error {
	v, err := describeServed(i, length, d)
	if err != nil {
		return err
	}
	if s.json {
		return s.printJSON(v)
	}
	s.say("Serving %s, %s.", clean(v.Disk), size(v.Size))
	s.say("")
	s.say("NBD:      %s", v.URI)
	if v.Control != "" {
		s.say("Control:  %s", v.Control)
	}
	s.say("QEMU:     %s-blockdev '%s' \\\n          -device '%s'", tlsObject(d.socket), v.QEMU, v.Device)
	s.say("libvirt:")
	s.say("%s", v.Libvirt)
	s.say("")
	s.say("Ctrl-C flushes and closes it.")
	return nil
}

// tlsObject is QEMU's description of its own credentials; only TLS needs it.
func tlsObject(socket string) string {
	if socket != "" {
		return ""
	}
	return "-object tls-creds-x509,id=mortise,dir=/etc/pki/qemu,endpoint=client,verify-peer=yes \\\n          "
}

// reconnect is how long, in seconds, a guest's requests wait for a server that is
// being restarted.
const reconnect = 300

func describeServed(i vdisk.Info, length int64, d *serveFlags) (v servedDisk, err error) {
	v = servedDisk{Disk: i.Path, UUID: i.UUID.String(), Size: length, Control: d.control}
	// In QEMU's key=value syntax a comma in a value is written twice.
	quote := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
	export := ""
	if d.name != "" {
		export = ",export=" + quote(d.name)
	}
	read := ""
	if d.readOnly {
		read = ",read-only=on"
	}
	dom := libvirtDisk{Type: "network", Device: "disk"}
	dom.Driver.Name, dom.Driver.Type, dom.Driver.Cache, dom.Driver.Discard = "qemu", "raw", "none", "unmap"
	dom.Driver.ErrorPolicy, dom.Driver.RErrorPolicy = "stop", "stop"
	dom.Source.Protocol, dom.Source.Name = "nbd", d.name
	dom.Source.Reconnect.Delay = reconnect
	dom.Target.Dev, dom.Target.Bus = "vda", "virtio"
	dom.Block.Logical, dom.Block.Physical = vdisk.SectorSize, vdisk.UnitSize
	if d.readOnly {
		dom.ReadOnly = &struct{}{}
	}
	if d.socket != "" {
		if v.Socket, err = filepath.Abs(d.socket); err != nil {
			return v, err
		}
		u := url.URL{Scheme: "nbd+unix", Path: "/" + d.name, RawQuery: url.Values{"socket": {v.Socket}}.Encode()}
		u.RawQuery = strings.ReplaceAll(u.RawQuery, "%2F", "/")
		v.URI = u.String()
		v.QEMU = fmt.Sprintf("driver=nbd,node-name=disk0,server.type=unix,server.path=%s%s,reconnect-delay=%d,discard=unmap%s", quote(v.Socket), export, reconnect, read)
		dom.Source.Host.Transport, dom.Source.Host.Socket = "unix", v.Socket
	} else {
		host, port, err := net.SplitHostPort(d.listen)
		if err != nil {
			return v, err
		}
		if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
			if host, err = os.Hostname(); err != nil {
				return v, err
			}
		}
		v.URI = (&url.URL{Scheme: "nbds", Host: net.JoinHostPort(host, port), Path: "/" + d.name}).String()
		v.QEMU = fmt.Sprintf("driver=nbd,node-name=disk0,server.type=inet,server.host=%s,server.port=%s,tls-creds=mortise%s,reconnect-delay=%d,discard=unmap%s", quote(host), port, export, reconnect, read)
		dom.Source.TLS = "yes"
		dom.Source.Host.Name, dom.Source.Host.Port = host, port
	}
	v.Listen = d.listen
	v.Device = fmt.Sprintf("virtio-blk-pci,drive=disk0,logical_block_size=%d,physical_block_size=%d,werror=stop,rerror=stop", vdisk.SectorSize, vdisk.UnitSize)
	text, err := xml.MarshalIndent(dom, "  ", "  ")
	v.Libvirt = string(text)
	return v, err
}

// libvirtDisk is a disk element of libvirt's domain format.
type libvirtDisk struct {
	XMLName struct{} `xml:"disk"`
	Type    string   `xml:"type,attr"`
	Device  string   `xml:"device,attr"`
	Driver  struct {
		Name         string `xml:"name,attr"`
		Type         string `xml:"type,attr"`
		Cache        string `xml:"cache,attr"`
		ErrorPolicy  string `xml:"error_policy,attr"`
		RErrorPolicy string `xml:"rerror_policy,attr"`
		Discard      string `xml:"discard,attr"`
	} `xml:"driver"`
	Source struct {
		Protocol string `xml:"protocol,attr"`
		Name     string `xml:"name,attr,omitempty"`
		TLS      string `xml:"tls,attr,omitempty"`
		Host     struct {
			Name      string `xml:"name,attr,omitempty"`
			Port      string `xml:"port,attr,omitempty"`
			Transport string `xml:"transport,attr,omitempty"`
			Socket    string `xml:"socket,attr,omitempty"`
		} `xml:"host"`
		Reconnect struct {
			Delay int `xml:"delay,attr"`
		} `xml:"reconnect"`
	} `xml:"source"`
	Target struct {
		Dev string `xml:"dev,attr"`
		Bus string `xml:"bus,attr"`
	} `xml:"target"`
	Block struct {
		Logical  int `xml:"logical_block_size,attr"`
		Physical int `xml:"physical_block_size,attr"`
	} `xml:"blockio"`
	ReadOnly *struct{} `xml:"readonly"`
}

// serveQuietly serves a volume on a socket that only this process's children are
// told of, until the returned function is called.
func serveQuietly(v volume, readOnly bool) (uri string, stop func() error, err error) {
	dir, err := os.MkdirTemp("", "mortise-disk-")
	if err != nil {
		return "", nil, err
	}
	socket := filepath.Join(dir, "nbd")
	l, err := nbd.Listen(socket)
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	srv := nbd.New(nbd.Options{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if _, err := srv.Add("", nbdDevice{v}, readOnly); err != nil {
		return "", nil, errors.Join(err, l.Close(), os.RemoveAll(dir))
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(context.Background(), l) }()
	return "nbd+unix:///?socket=" + socket, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), drainTime)
		defer cancel()
		return errors.Join(srv.Shutdown(ctx), <-done, os.RemoveAll(dir))
	}, nil
}
