package cli

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"mortise/internal/secret"
	"mortise/internal/vdisk"
)

// parseBases reads --base: the folders of other VMs that a disk may reach into. A
// folder's VM is that which its descriptors record, unless one is given.
func parseBases(values []string) (bases []vdisk.Base, err error) {
	for _, v := range values {
		folder, id, named := strings.Cut(v, "=")
		b := vdisk.Base{Folder: filepath.Clean(folder)}
		if named {
			if b.VM, err = uuid.Parse(id); err != nil || b.VM == uuid.Nil {
				return nil, fmt.Errorf("--base %s: %q is no UUID of a VM", v, id)
			}
			bases = append(bases, b)
			continue
		}
		links, err := vdisk.DescribeFolder(b.Folder)
		if err != nil {
			return nil, fmt.Errorf("--base %s: %w", v, err)
		}
		for _, l := range links {
			if l.VM != uuid.Nil && b.VM != uuid.Nil && l.VM != b.VM {
				return nil, fmt.Errorf("--base %s: the disks there belong to several VMs: say which, as --base %s=%s", v, folder, b.VM)
			}
			if l.VM != uuid.Nil {
				b.VM = l.VM
			}
		}
		bases = append(bases, b)
	}
	return bases, nil
}

// besideIt are the bases of a disk that is only described, without keys and proof:
// the folder beside it that its descriptors name.
func besideIt(path string) []vdisk.Base {
	dir := filepath.Dir(filepath.Clean(path))
	links, _ := vdisk.DescribeFolder(dir) // what cannot be read is told where it matters
	var bases []vdisk.Base
	for _, l := range links {
		if strings.Contains(l.Parent, "/") {
			bases = append(bases, vdisk.Base{Folder: filepath.Join(dir, filepath.Dir(l.Parent))})
		}
	}
	return bases
}

func diskClone(g *globals) *cobra.Command {
	var d diskFlags
	var vm string
	cmd := &cobra.Command{
		Use:   "clone BASE.vmdk CLONE.vmdk",
		Short: "Make a linked clone: a disk of another VM that stands on this one",
		Long: `Makes CLONE.vmdk, in a folder beside that of BASE.vmdk: it shows what the base shows, and
takes what is written to it, under a data key of its own that the base's KEK wraps. It is
made at once, and takes no space for what it shares.

The base is sealed by that, for ever: it is not written to any more, as long as it exists,
for nothing there says how many clones stand on it. The base of a disk that goes on is a
link that a snapshot has frozen: mortise disk snapshot create.

To open the clone, the verbs need --base with the base's folder: a descriptor that
somebody edits must not make a disk show another VM's. They change the clone's own links,
never the base.

JSON: as mortise disk info.`,
		Example: `  mortise disk clone golden/debian.vmdk web1/web1.vmdk --key-file golden.key
  mortise disk serve web1/web1.vmdk --base golden --key-file golden.key --socket /run/web1.sock`,
		Args: needs("BASE.vmdk", "CLONE.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, ctx := g.streams(cmd), cmd.Context()
			if err := secret.LockDown(); err != nil {
				return err
			}
			base, clone := args[0], args[1]
			if err := noVMs(base); err != nil {
				return err
			}
			spec := vdisk.CloneSpec{VM: uuid.New()}
			if vm != "" {
				var err error
				if spec.VM, err = uuid.Parse(vm); err != nil || spec.VM == uuid.Nil {
					return fmt.Errorf("--clone-vm %q is no UUID", vm)
				}
			}
			ring := newKeyring()
			defer ring.wipe()
			o, err := d.options(ctx, base, ring)
			if err != nil {
				return err
			}
			if o.VM == spec.VM {
				return fmt.Errorf("--clone-vm %s is the VM that %s belongs to; a clone is another VM's disk: leave the flag out, or give that one's UUID", vm, base)
			}
			if err := vdisk.LinkedClone(ctx, base, clone, o, spec); err != nil {
				return explainDisk(err, base)
			}
			return s.diskInfo(clone, "Made ")
		},
	}
	f := cmd.Flags()
	f.StringVar(&vm, "clone-vm", "", "UUID of the VM that the clone belongs to (default: a random one, which its descriptor records)")
	d.bind(f)
	return cmd
}
