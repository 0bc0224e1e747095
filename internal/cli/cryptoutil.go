package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"mortise/internal/secret"
	"mortise/internal/vdisk"
)

// cryptoUtilCommand is what the host's rescue tool does with disks (rules E8, F4); it
// needs no center.
func cryptoUtilCommand() *cobra.Command {
	g := &globals{}
	disk := &cobra.Command{
		Use: "disk", Short: "Describe, check and repair the encryption of a disk's files",
		Long: `For the files of a disk that does not open, on the machine that has them. The disk must
not be in use.

Beside the descriptor of an encrypted disk stands a copy of it, DISK.vmdk.kept, which is
written behind every change and which repair uses.`,
		Example: `  mortise crypto-util disk describe vm1.vmdk
  mortise crypto-util disk check vm1.vmdk --key-file vm1.key
  mortise crypto-util disk repair vm1.vmdk --key-file vm1.key --dry-run`,
		Args: cobra.NoArgs, RunE: showHelp,
	}
	check := diskCheck(g)
	check.Example = "  mortise crypto-util disk check vm1.vmdk --key-file vm1.key"
	disk.AddCommand(diskDescribe(g), check, diskRepair(g))
	c := group(g, "crypto-util", "Look at and repair encrypted files on this machine", "The host's rescue tool: it works on the files of a disk that does not open, and needs neither center nor\nthe host's agent.", "  mortise crypto-util disk describe vm1.vmdk", disk)
	_ = c.PersistentFlags().MarkHidden("url")
	return c
}

func diskDescribe(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "describe DISK.vmdk",
		Short: "What the small files of a disk say of its encryption; needs no key",
		Long: `Prints what the descriptor, its kept copy and the state file say, each by itself, and
also if one of them is damaged. No key is needed, and nothing is proven.

JSON: {"path", "descriptor", "kept": {"error"; "uuid", "vm", "cipher", "unitSize",
"epoch", "generation", "keys", "targetKeys"; kept: "steady"}, "state": {"error"; "uuid",
"size", "sequence", "epoch", "targetEpoch", "conversion", "back", "boundary", "hotZone",
"opened"}}.`,
		Example: "  mortise crypto-util disk describe vm1.vmdk --json",
		Args:    needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.streams(cmd).describeFiles(args[0])
		},
	}
}

type cryptoFiles struct {
	Path       string         `json:"path"`
	Descriptor describedText  `json:"descriptor"`
	Kept       describedText  `json:"kept"`
	State      describedState `json:"state"`
}

type describedText struct {
	Error      string   `json:"error,omitempty"`
	Encrypted  bool     `json:"encrypted"`
	UUID       string   `json:"uuid,omitempty"`
	VM         string   `json:"vm,omitempty"`
	Cipher     string   `json:"cipher,omitempty"`
	UnitSize   uint32   `json:"unitSize,omitempty"`
	Epoch      uint64   `json:"epoch,omitempty"`
	Generation uint64   `json:"generation,omitempty"`
	Keys       []keyRef `json:"keys,omitempty"`
	TargetKeys []keyRef `json:"targetKeys,omitempty"`
	Steady     bool     `json:"steady,omitempty"`
}

type describedState struct {
	Error       string `json:"error,omitempty"`
	UUID        string `json:"uuid,omitempty"`
	Size        int64  `json:"size,omitempty"`
	Sequence    uint64 `json:"sequence,omitempty"`
	Epoch       uint64 `json:"epoch"`
	TargetEpoch uint64 `json:"targetEpoch,omitempty"`
	Conversion  string `json:"conversion,omitempty"`
	Back        bool   `json:"back,omitempty"`
	Boundary    int64  `json:"boundary,omitempty"`
	HotZone     int64  `json:"hotZone,omitempty"` // bytes
	Opened      uint64 `json:"opened"`
}

func newDescribedText(t vdisk.DescriptorInfo) describedText {
	if t.Err != nil {
		return describedText{Error: t.Err.Error()}
	}
	d := describedText{Encrypted: t.Encrypted, UUID: t.UUID.String(), Steady: t.Steady}
	if t.VM != [16]byte{} {
		d.VM = t.VM.String()
	}
	if t.Encrypted {
		d.Cipher, d.UnitSize, d.Epoch, d.Generation = t.Encryption.Cipher, t.Encryption.UnitSize, t.Encryption.Epoch, t.Encryption.Generation
		d.Keys, d.TargetKeys = keyRefs(t.Encryption.KeySafe.KeyIDs()), keyRefs(t.Encryption.Target.KeyIDs())
	}
	return d
}

func (s *streams) describeFiles(path string) error {
	f, err := vdisk.DescribeFiles(path)
	if err != nil {
		return err
	}
	c := cryptoFiles{Path: path, Descriptor: newDescribedText(f.Descriptor), Kept: newDescribedText(f.Kept)}
	if f.State.Err != nil {
		c.State.Error = f.State.Err.Error()
	} else {
		c.State = describedState{UUID: f.State.UUID.String(), Size: f.State.Size, Sequence: f.State.Sequence, Epoch: f.State.Epoch, TargetEpoch: f.State.TargetEpoch,
			Conversion: f.State.Conversion.String(), Back: f.State.Back, Boundary: f.State.Boundary, HotZone: f.State.HotZone, Opened: f.State.Opened}
	}
	if s.json {
		return s.printJSON(c)
	}
	text := func(name string, d describedText) {
		switch {
		case d.Error != "":
			s.say("%s\n  %s", name, clean(d.Error))
			return
		case !d.Encrypted:
			s.say("%s\n  in clear, disk %s", name, d.UUID)
			return
		}
		s.say("%s\n  disk        %s\n  VM          %s\n  encryption  %s in units of %d bytes, epoch %d, generation %d", name, d.UUID, d.VM, clean(d.Cipher), d.UnitSize, d.Epoch, d.Generation)
		for _, k := range d.Keys {
			s.say("  key safe    wrapped by %s", clean(k.String()))
		}
		for _, k := range d.TargetKeys {
			s.say("  new key     wrapped by %s", clean(k.String()))
		}
	}
	text("descriptor "+clean(path), c.Descriptor)
	text("its kept copy", c.Kept)
	if c.Kept.Error == "" && c.Kept.Encrypted {
		s.say("  extent      %s", map[bool]string{true: "of one form when it was written", false: "was being converted"}[c.Kept.Steady])
	}
	if c.State.Error != "" {
		s.say("state file\n  %s", clean(c.State.Error))
		return nil
	}
	s.say("state file\n  disk        %s, %s, opened for writing %d times, sequence %d", c.State.UUID, size(c.State.Size), c.State.Opened, c.State.Sequence)
	form := func(epoch uint64) string {
		if epoch == 0 {
			return "in clear"
		}
		return fmt.Sprintf("epoch %d", epoch)
	}
	if c.State.Conversion == "" {
		s.say("  extent      %s", form(c.State.Epoch))
		return nil
	}
	back := ""
	if c.State.Back {
		back = ", running back"
	}
	s.say("  conversion  %s%s: %s below byte %d, %s above", c.State.Conversion, back, form(c.State.TargetEpoch), c.State.Boundary, form(c.State.Epoch))
	if c.State.HotZone > 0 {
		s.say("  hot zone    %d bytes there", c.State.HotZone)
	}
	return nil
}

func diskRepair(g *globals) *cobra.Command {
	var d diskFlags
	var o vdisk.RepairOptions
	cmd := &cobra.Command{
		Use:   "repair DISK.vmdk",
		Short: "Restore a damaged descriptor or key safe from the kept copy",
		Long: `Restores the descriptor of an encrypted disk, with its key safe, from its kept copy. The
key must be given: the copy is believed only if the key opens it for this VM and disk,
if its MACs are right, and if the state file is of the same data key. So neither a copy
of another disk or VM nor an older one gets in. The extent is never touched. What is
replaced is kept as FILE.damaged.

A state file that is lost or damaged says something that nothing else does: how far a
conversion has come. It is made anew only with --rebuild-state, and only if the copy says
that no conversion was under way; you must know that the extent is of the same time as the
copy, and not restored from elsewhere. How far a conversion has come is never made up.
` + keysHelp + `

JSON: {"disk", "done": [what was, or would be, restored]}.`,
		Example: `  mortise crypto-util disk repair vm1.vmdk --key-file vm1.key --dry-run
  mortise crypto-util disk repair vm1.vmdk --kmip kmip://kms1 --client-cert me.pem --ca ca.pem`,
		Args: needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return explainDisk(g.streams(cmd).repairDisk(cmd.Context(), args[0], &d, o), args[0])
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.DryRun, "dry-run", false, "say what would be done, and change nothing")
	f.BoolVar(&o.State, "rebuild-state", false, "also make a lost state file anew, if no conversion was under way")
	d.bind(f)
	d.bindExpect(f)
	return cmd
}

func (s *streams) repairDisk(ctx context.Context, path string, d *diskFlags, o vdisk.RepairOptions) error {
	if err := secret.LockDown(); err != nil {
		return err
	}
	ring := newKeyring()
	defer ring.wipe()
	f, err := vdisk.DescribeFiles(path)
	if err != nil {
		return err
	}
	opts, err := d.options(ctx, path, ring)
	if err != nil && !errors.As(err, new(*vdisk.Error)) && !errors.As(err, new(*missingKey)) {
		return err
	}
	dry, state := o.DryRun, o.State
	o = vdisk.RepairOptions{Options: opts, DryRun: dry, State: state}
	if f.Kept.Err == nil && f.Kept.Encrypted { // its keys may be others than a damaged descriptor names
		if o.VM == [16]byte{} || d.vm == "" {
			o.VM = f.Kept.VM
		}
		if err := d.keys.open(ctx, ring, path, f.Kept.Encryption.KeySafe.KeyIDs(), f.Kept.Encryption.Target.KeyIDs()); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	done, err := vdisk.Repair(ctx, path, o)
	if err != nil {
		return err
	}
	if s.json {
		return s.printJSON(map[string]any{"disk": path, "done": append([]string{}, done...)})
	}
	for _, line := range done {
		s.say("%s", clean(line))
	}
	switch {
	case len(done) == 0:
		s.say("%s opens: there is nothing to repair.", clean(path))
	case dry:
		s.say("Nothing was changed: leave --dry-run out to do it.")
	default:
		s.say("What was replaced is beside it, as FILE.damaged.")
	}
	return nil
}
