package cli

import (
	"context"
	"errors"
	"fmt"

	"log/slog"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"mortise/internal/keysafe"
	"mortise/internal/nbd"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
)

// diskCommand is the data path alone: encrypted disks for any QEMU, on this
// machine, without center or hosts (rule A1).
func diskCommand() *cobra.Command {
	g := &globals{}
	c := group(g, "disk", "Encrypted disks for any QEMU, without center or hosts", `Makes, serves and converts encrypted disks by themselves, for QEMU under Proxmox,
OpenStack, libvirt or a shell. The keys come from files or from a KMIP key server.

A disk is a VMDK descriptor and its extent, the same files that a Mortise host has: a
VM can be registered with them later. It belongs to a VM, whose UUID its key safe is
bound to; the descriptor records which.`, `  mortise disk keygen -o vm1.key                                make a key
  mortise disk create vm1.vmdk --size 20G --key-file vm1.key    an empty encrypted disk
  mortise disk serve vm1.vmdk --key-file vm1.key --socket /run/vm1.sock
  mortise disk import old.qcow2 vm2.vmdk --key-file vm1.key     encrypt while importing
  mortise disk convert vm3.vmdk --encrypt --key-file vm1.key    encrypt in place
  mortise disk info vm1.vmdk                                    needs no key`,
		diskKeygen(g), diskCreate(g), diskInfo(g), diskServe(g), diskConvert(g), diskSnapshot(g), diskClone(g), diskCheck(g), diskImport(g), diskExport(g))
	f := c.PersistentFlags()
	_ = f.MarkHidden("url") // of center, which these verbs do without
	return c
}

// A volume is an open disk as the verbs use it.
type volume interface {
	Size() int64
	ReadAt(p []byte, off int64) error
	WriteAt(p []byte, off int64) error
	Flush(ctx context.Context) error
	Trim(off, n int64) error
	WriteZeroes(off, n int64, punch bool) error
	BlockStatus(off, n int64, emit func(n int64, s vdisk.Status) bool) error
	Info() vdisk.Info
	Convert(ctx context.Context, t vdisk.Target, report func(vdisk.Progress)) error
	Resume(ctx context.Context, report func(vdisk.Progress)) error
	Cancel(ctx context.Context, report func(vdisk.Progress)) error
	ShallowRecrypt(ctx context.Context, to keysafe.KeyID) error
	Estimate(ctx context.Context) (vdisk.Estimate, error)
	SetPace(p vdisk.Pace)
	Failed() error
	Close() error
}

// nbdDevice makes a volume one that nbd serves.
type nbdDevice struct{ volume }

func (d nbdDevice) BlockStatus(off, n int64, emit func(n int64, s nbd.Status) bool) error {
	return d.volume.BlockStatus(off, n, func(n int64, s vdisk.Status) bool { return emit(n, nbd.Status(s)) })
}

// diskFlags say which disk is opened and how.
type diskFlags struct {
	keys      diskKeys
	vm        string
	encrypted bool
	epoch     uint64
	bases     []string
	frozen    bool // a sealed link is opened to convert it
	thick     bool // of a disk that is made
	direct    bool // round the page cache
}

func (d *diskFlags) bind(f *pflag.FlagSet) {
	d.keys.bind(f)
	f.StringVar(&d.vm, "vm", "", "UUID of the VM that the disk belongs to (default: the one that its descriptor records)")
	f.StringArrayVar(&d.bases, "base", nil, "of a linked clone: folder of the disk that it stands on, FOLDER or FOLDER=VM-UUID; repeatable")
}

// bindExpect adds the flags that keep who can write to storage from putting a disk
// in clear, or an older one, in the place of an encrypted one.
func (d *diskFlags) bindExpect(f *pflag.FlagSet) {
	f.BoolVar(&d.encrypted, "require-encrypted", false, "refuse the disk unless it is encrypted, whole")
	f.Uint64Var(&d.epoch, "min-epoch", 0, "refuse a disk whose key is of an older epoch, as mortise disk info shows it")
}

// open opens a disk, with the keys that it names: the top that stands on the link at path.
func (d *diskFlags) open(ctx context.Context, path string, readOnly bool, ring *keyring, log *slog.Logger) (volume, error) {
	if err := secret.LockDown(); err != nil {
		return nil, err
	}
	path, err := topOf(path)
	if err != nil {
		return nil, err
	}
	o, err := d.options(ctx, path, ring)
	if err != nil {
		return nil, err
	}
	o.ReadOnly, o.Frozen, o.Log = readOnly, d.frozen, log
	v, err := vdisk.OpenChain(ctx, path, o)
	if err != nil {
		return nil, err
	}
	return v, nil
}

// options are those of opening a disk: its VM and keys.
func (d *diskFlags) options(ctx context.Context, path string, ring *keyring) (o vdisk.Options, err error) {
	if o.VM, err = d.parseVM(); err != nil {
		return o, err
	}
	o.KEKs, o.Expect = ring, vdisk.Expect{Encrypted: d.encrypted, Epoch: d.epoch}
	o.Live, o.Direct = liveFolder(), d.direct
	if o.Bases, err = parseBases(d.bases); err != nil {
		return o, err
	}
	info, links, err := vdisk.DescribeChain(path, o.Bases)
	if err != nil {
		// Open says what is wrong, and with the keys more than this.
		if _, ferr := d.keys.loadFiles(ring); ferr != nil {
			return o, ferr
		}
		return o, err
	}
	for _, l := range links {
		if o.VM == uuid.Nil && filepath.Dir(l.Path) == filepath.Dir(path) { // and not what it is a clone of
			o.VM = l.VM
		}
	}
	if !info.Encrypted {
		if o.VM == uuid.Nil {
			o.VM = uuid.New() // recorded if the disk is encrypted while it is open
		}
		return o, nil
	}
	if o.VM == uuid.Nil {
		return o, fmt.Errorf("%s: it is encrypted and does not record which VM it belongs to: give --vm with the UUID of that VM (uuid.bios in its VMX)", path)
	}
	var groups [][]keysafe.KeyID
	for _, l := range links {
		groups = append(groups, l.Keys, l.TargetKeys)
	}
	return o, d.keys.open(ctx, ring, path, groups...)
}

func (d *diskFlags) parseVM() (uuid.UUID, error) {
	if d.vm == "" {
		return uuid.Nil, nil
	}
	vm, err := uuid.Parse(d.vm)
	if err != nil || vm == uuid.Nil {
		return vm, fmt.Errorf("--vm %q is no UUID", d.vm)
	}
	return vm, nil
}

// explainDisk adds to an error the way out that these verbs know.
func explainDisk(err error, path string) error {
	var e *vdisk.Error
	if errors.As(err, &e) && errors.Is(e.Kind, vdisk.ErrInUse) && strings.Contains(e.Why, "mortise") {
		return fmt.Errorf("%w; if that is mortise disk serve, give the verb --socket with the control socket that it named, and it works there", err)
	}
	if errors.As(err, &e) && errors.Is(e.Kind, vdisk.ErrParent) && strings.Contains(e.Why, "linked clone") {
		return fmt.Errorf("%w; with mortise disk, give --base with the folder of the disk that it stands on", err)
	}
	return err
}

func diskCreate(g *globals) *cobra.Command {
	var d diskFlags
	var size string
	var plain bool
	cmd := &cobra.Command{
		Use:   "create DISK.vmdk --size SIZE",
		Short: "Make an empty disk",
		Long: `Makes a disk: DISK.vmdk and its extent DISK-flat.vmdk, encrypted under a new data key
(XTS-AES-256), which the KEK wraps; or in clear with --plain. It is thin: it takes space
as it is written to. With --thick all of its space is allocated now and stays so.

The disk belongs to a VM, whose UUID its key safe is bound to: --vm, or a random one,
which the descriptor records as ddb.mortise.vm. Give --vm with the VM's own UUID if it
is to be registered with Mortise later.
` + keysHelp + `

JSON: as mortise disk info.`,
		Example: `  mortise disk create vm1.vmdk --size 20G --key-file vm1.key
  mortise disk create vm1.vmdk --size 20G --kmip kmip://kms1 --client-cert me.pem \
    --ca ca.pem --key new
  mortise disk create scratch.vmdk --size 5G --plain`,
		Args: needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s := g.streams(cmd)
			n, err := parseSize(size, 1)
			if err != nil {
				return fmt.Errorf("--size: %w", err)
			}
			if err := d.create(cmd.Context(), args[0], n, plain, ""); err != nil {
				return err
			}
			return s.diskInfo(args[0], "Made ")
		},
	}
	f := cmd.Flags()
	f.StringVar(&size, "size", "", "size of the disk: 512M, 20G, 1T")
	f.BoolVar(&plain, "plain", false, "in clear: a flat VMDK that any program opens")
	f.BoolVar(&d.thick, "thick", false, "allocate all of its space now, and keep it allocated")
	d.bind(f)
	d.keys.bindNew(f, false)
	return cmd
}

// create makes a disk under the key that the flags name.
func (d *diskFlags) create(ctx context.Context, path string, size int64, plain bool, adapter string) error {
	if err := secret.LockDown(); err != nil {
		return err
	}
	if size%vdisk.SectorSize != 0 {
		return fmt.Errorf("a disk has whole sectors of %d bytes, and %d is no multiple of that", vdisk.SectorSize, size)
	}
	vm, err := d.parseVM()
	if err != nil {
		return err
	}
	spec := vdisk.Spec{Size: size, VM: vm, Adapter: adapter, Thick: d.thick}
	keyed := len(d.keys.Files) > 0 || len(d.keys.KMIP) > 0 || d.keys.KeyID != ""
	switch {
	case plain && keyed:
		return errors.New("--plain makes a disk in clear, and a key was given: leave one of them out")
	case plain:
	case !keyed:
		return errors.New("how is the disk to be encrypted? give --key-file (mortise disk keygen makes one) or --kmip; or --plain for a disk in clear")
	default:
		ring := newKeyring()
		defer ring.wipe()
		if spec.Key, err = d.keys.target(ctx, ring); err != nil {
			return err
		}
		spec.KEKs = ring
		if vm == uuid.Nil {
			spec.VM = uuid.New()
		}
	}
	return vdisk.Create(ctx, path, spec)
}

// diskState is a disk in JSON.
type diskState struct {
	Path       string          `json:"path"`
	Extent     string          `json:"extent"`
	UUID       string          `json:"uuid"`
	VM         string          `json:"vm,omitempty"`
	Size       int64           `json:"size"`
	Allocated  int64           `json:"allocated"`
	Thick      bool            `json:"thick"`
	Encrypted  bool            `json:"encrypted"`
	Cipher     string          `json:"cipher,omitempty"`
	Epoch      uint64          `json:"epoch,omitempty"`
	Keys       []keyRef        `json:"keys"`
	Conversion *diskConversion `json:"conversion,omitempty"`
}

type diskConversion struct {
	Kind       string   `json:"kind"`
	Back       bool     `json:"back"`
	Boundary   int64    `json:"boundary"`
	TargetKeys []keyRef `json:"targetKeys"`
}

func keyRefs(ids []keysafe.KeyID) []keyRef {
	refs := []keyRef{}
	for _, id := range ids {
		refs = append(refs, keyRef{Provider: id.Provider, Key: id.Key})
	}
	return refs
}

func newDiskState(i vdisk.Info) diskState {
	d := diskState{Path: i.Path, Extent: i.Extent, UUID: i.UUID.String(), Size: i.Size, Allocated: i.Allocated, Thick: i.Thick,
		Encrypted: i.Encrypted, Cipher: i.Cipher, Epoch: i.Epoch, Keys: keyRefs(i.Keys)}
	if i.VM != uuid.Nil {
		d.VM = i.VM.String()
	}
	if i.Conversion != vdisk.NotConverting {
		d.Conversion = &diskConversion{Kind: i.Conversion.String(), Back: i.Back, Boundary: i.Boundary, TargetKeys: keyRefs(i.TargetKeys)}
	}
	return d
}

func diskInfo(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "info DISK.vmdk",
		Short: "What a disk is, which keys open it, how far a conversion is; needs no key",
		Long: `Reads a disk's small files and says what they say. No key is needed, and nothing is
proven: mortise disk check does that. The disk may be in use.

JSON: {"path", "extent", "uuid", "vm", "size", "allocated", "thick", "encrypted",
"cipher", "epoch", "keys": [{"provider", "key"}], "conversion": {"kind", "back",
"boundary", "targetKeys"}}.`,
		Example: "  mortise disk info vm1.vmdk --json",
		Args:    needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.streams(cmd).diskInfo(args[0], "")
		},
	}
}

// diskInfo prints a disk, after a word about what was done to it.
func (s *streams) diskInfo(path, done string) error {
	named := path
	path, err := topOf(path)
	if err != nil {
		return err
	}
	i, links, err := vdisk.DescribeChain(path, besideIt(path))
	if err != nil {
		return err
	}
	if s.json {
		return s.printJSON(newDiskState(i))
	}
	thick := ""
	if i.Thick {
		thick = ", thick"
	}
	s.say("%s%s: %s, %s on storage%s", done, clean(path), size(i.Size), size(i.Allocated), thick)
	if path != named {
		s.say("  top         of what stands on %s", clean(named))
	}
	if n := len(links); n > 1 {
		s.say("  links       %d, from %s up", n, clean(filepath.Base(links[0].Path)))
	}
	s.say("  disk        %s", i.UUID)
	if i.VM != uuid.Nil {
		s.say("  VM          %s", i.VM)
	}
	if !i.Encrypted {
		s.say("  encryption  none: in clear")
		return nil
	}
	s.say("  encryption  %s, epoch %d", clean(i.Cipher), i.Epoch)
	for _, id := range i.Keys {
		s.say("  key         %s", clean(id.String()))
	}
	if i.Conversion == vdisk.NotConverting {
		return nil
	}
	how, at := "interrupted or under way", i.Boundary
	if i.Back {
		how, at = "cancelled: it runs back", i.Size-i.Boundary
	}
	for _, id := range i.TargetKeys {
		s.say("  new key     %s", clean(id.String()))
	}
	s.say("  conversion  %s, %s, %.0f%% of %s", i.Conversion, how, 100*float64(at)/float64(i.Size), size(i.Size))
	s.say("  go on with  mortise disk convert %s --resume, or back with --cancel", filepath.Base(path))
	return nil
}

// diskProgress shows a conversion.
func (s *streams) diskProgress(title string) (*progress, func(vdisk.Progress)) {
	p := s.progress(title)
	return p, func(v vdisk.Progress) {
		p.update(state{done: v.Done, total: v.Total, rate: v.Rate, left: v.Left})
	}
}

// logger is that of verbs that do not end by themselves.
func (s *streams) logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(s.err, &slog.HandlerOptions{Level: level}))
}
