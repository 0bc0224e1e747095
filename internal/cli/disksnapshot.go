package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"mortise/internal/vdisk"
	"mortise/internal/vmdk"
	"mortise/internal/vmxfile"
)

// A folder's links of disks say by themselves what stands on what. There is no VMX that
// records which link is the top: it is the one that nothing stands on.

// diskLinks reads the links in the folder of path, by path.
func diskLinks(path string) (map[string]vdisk.Info, error) {
	names, err := filepath.Glob(filepath.Join(escapeGlob(filepath.Dir(path)), "*.vmdk"))
	if err != nil {
		return nil, err
	}
	links := map[string]vdisk.Info{}
	for _, n := range names {
		if i, err := vdisk.Describe(n); err == nil {
			links[filepath.Clean(n)] = i
		}
	}
	return links, nil
}

// noVMs refuses a disk whose links a VMX in its folder names: that would go on naming the
// old top, and the VM could not be opened any more.
func noVMs(path string) error {
	dir := filepath.Dir(path)
	files, err := filepath.Glob(filepath.Join(escapeGlob(dir), "*.vmx"))
	if err != nil || len(files) == 0 {
		return err
	}
	disk := func(file string) string { // that a link belongs to, by its name
		if base, _, ok := vmdk.ParseLinkName(file); ok {
			return base
		}
		return file
	}
	for _, name := range files {
		f, err := vmxfile.Load(name)
		if err != nil {
			return fmt.Errorf("whether %s names this disk: %w", name, err)
		}
		for key, value := range f.All() {
			if strings.HasSuffix(strings.ToLower(key), ".filename") && disk(value) == disk(filepath.Base(path)) {
				return fmt.Errorf("%s names this disk, and would not know of the change: make snapshots of the VM instead (mortise vm snapshot), or take the disk out of that file if it is no VM's any more", name)
			}
		}
	}
	return nil
}

func escapeGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(s)
}

// childrenOf are the links that stand on path, in order.
func childrenOf(links map[string]vdisk.Info, path string) (kids []string) {
	for p, i := range links {
		if i.Parent == filepath.Base(path) && filepath.Dir(p) == filepath.Dir(filepath.Clean(path)) {
			kids = append(kids, p)
		}
	}
	slices.Sort(kids)
	return kids
}

// topOf finds the link that shows the disk as it is now: path, or what stands on it. After
// a revert there are several, and path must name the one.
func topOf(path string) (string, error) {
	links, err := diskLinks(path)
	if err != nil {
		return "", err
	}
	var tops []string
	var walk func(p string, depth int)
	walk = func(p string, depth int) {
		kids := childrenOf(links, p)
		if len(kids) == 0 || depth > len(links) {
			tops = append(tops, p)
		}
		for _, k := range kids {
			if depth <= len(links) {
				walk(k, depth+1)
			}
		}
	}
	walk(filepath.Clean(path), 0)
	if len(tops) > 1 {
		return "", fmt.Errorf("%s: several branches stand on it, and nothing says which one is meant: name one of %s", path, strings.Join(tops, ", "))
	}
	if len(tops) == 1 && tops[0] != filepath.Clean(path) {
		return tops[0], nil
	}
	return path, nil
}

func diskSnapshot(g *globals) *cobra.Command {
	c := &cobra.Command{
		Use: "snapshot", Short: "Make, list, go back to and delete snapshots of a disk",
		Long: `A snapshot freezes a disk's link as it is; what is written from then on goes to a new link,
DISK-000001.vmdk and so on, with a data key of its own. All verbs of disk take any link's
name, and work on the top that stands on it; after a revert, when several branches do, the
top must be named.`,
		Example: `  mortise disk snapshot create vm1.vmdk --key-file vm1.key
  mortise disk snapshot create vm1.vmdk --socket /run/vm1.sock.control      under a guest
  mortise disk snapshot ls vm1.vmdk
  mortise disk snapshot revert vm1.vmdk --key-file vm1.key
  mortise disk snapshot delete vm1.vmdk --key-file vm1.key`,
		Args: cobra.NoArgs, RunE: showHelp,
	}
	c.AddCommand(snapshotCreate(g), snapshotList(g), snapshotRevert(g), snapshotDelete(g))
	return c
}

func snapshotCreate(g *globals) *cobra.Command {
	var d diskFlags
	var socket string
	cmd := &cobra.Command{
		Use:   "create DISK.vmdk",
		Short: "Freeze the disk as it is, and go on in a new link",
		Long: `Freezes the disk's top link and puts a new one on it. Of a disk that mortise disk serve
has open, give --socket with its control socket: the guest's requests wait for a moment.
What the guest has not flushed may be missing in the snapshot, as after a power cut; have it
sync or freeze its file systems first (qemu-guest-agent).

JSON: {"snapshot": the frozen link, "top": the new one}.`,
		Example: "  mortise disk snapshot create vm1.vmdk --key-file vm1.key",
		Args:    needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s := g.streams(cmd)
			if err := noVMs(args[0]); err != nil {
				return err
			}
			top, err := topOf(args[0])
			if err != nil {
				return err
			}
			made := ""
			if socket != "" {
				a, err := s.askServed(cmd.Context(), top, socket, controlRequest{Snapshot: true}, nil)
				if err != nil {
					return err
				}
				made = a.Top
			} else if err := d.withChain(cmd.Context(), s, top, func(c *vdisk.Chain) (err error) {
				made, err = c.Snapshot(cmd.Context(), vdisk.LinkSpec{})
				return err
			}); err != nil {
				return explainDisk(err, top)
			}
			if s.json {
				return s.printJSON(map[string]string{"snapshot": top, "top": made})
			}
			s.say("Frozen: %s", clean(top))
			s.say("The disk goes on in %s.", clean(made))
			return nil
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "control socket of the mortise disk serve that has the disk open")
	d.bind(cmd.Flags())
	return cmd
}

// withChain opens a disk for writing, and closes it durably.
func (d *diskFlags) withChain(ctx context.Context, s *streams, path string, do func(*vdisk.Chain) error) (err error) {
	ring := newKeyring()
	defer ring.wipe()
	v, err := d.open(ctx, path, false, ring, s.logger(slog.LevelError))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	if err := do(v.(*vdisk.Chain)); err != nil {
		return err
	}
	return v.Flush(ctx)
}

type linkState struct {
	diskState
	Parent string `json:"parent,omitempty"`
	Top    bool   `json:"top"`
}

func snapshotList(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "ls DISK.vmdk",
		Short: "The links of a disk, and what stands on what; needs no key",
		Long: `Lists the disk's links from the base on. Those that others stand on are frozen; a top
shows the disk as it goes on.

JSON: a list of what mortise disk info prints, with "parent" and "top".`,
		Example: "  mortise disk snapshot ls vm1.vmdk",
		Args:    needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s := g.streams(cmd)
			links, err := diskLinks(args[0])
			if err != nil {
				return err
			}
			at := filepath.Clean(args[0])
			if _, ok := links[at]; !ok {
				_, err := vdisk.Describe(at)
				return err
			}
			for n := 0; links[at].Parent != "" && n < len(links); n++ { // to the base
				up := filepath.Join(filepath.Dir(at), links[at].Parent)
				if _, ok := links[up]; !ok {
					break
				}
				at = up
			}
			var all []linkState
			t := newTable(s.out, "LINK", "STATE", "ON STORAGE", "EPOCH", "STANDS ON")
			var walk func(p string, depth int)
			walk = func(p string, depth int) {
				i := links[p]
				kids := childrenOf(links, p)
				all = append(all, linkState{newDiskState(i), i.Parent, len(kids) == 0})
				what := "frozen"
				if len(kids) == 0 {
					what = "top"
				}
				epoch := "in clear"
				if i.Encrypted {
					epoch = fmt.Sprint(i.Epoch)
				}
				t.row(strings.Repeat("  ", depth)+filepath.Base(p), what, size(i.Allocated), epoch, i.Parent)
				for _, k := range kids {
					if depth < len(links) {
						walk(k, depth+1)
					}
				}
			}
			walk(at, 0)
			if s.json {
				return s.printJSON(all)
			}
			return t.flush()
		},
	}
}

func snapshotRevert(g *globals) *cobra.Command {
	var d diskFlags
	var discard bool
	cmd := &cobra.Command{
		Use:   "revert LINK.vmdk",
		Short: "Go back to what a frozen link shows",
		Long: `Makes a new top on a frozen link: opening that shows the disk as it was frozen. The disk
must not be in use. What stood on the link stays, as another branch, unless --discard: then
the links that only the former top stood on are deleted, with what was written to them.

JSON: {"snapshot", "top", "deleted"}.`,
		Example: "  mortise disk snapshot revert vm1.vmdk --discard --key-file vm1.key",
		Args:    needs("LINK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s := g.streams(cmd)
			at, ctx := args[0], cmd.Context()
			if err := noVMs(at); err != nil {
				return err
			}
			old := ""
			if discard {
				var err error
				if old, err = topOf(at); err != nil {
					return err
				}
				if old == at {
					return fmt.Errorf("%s is a top: nothing was written since, and there is nothing to discard", at)
				}
			}
			ring := newKeyring()
			defer ring.wipe()
			o, err := d.options(ctx, at, ring)
			if err != nil {
				return err
			}
			made, err := vdisk.Revert(ctx, at, o, vdisk.LinkSpec{})
			if err != nil {
				return explainDisk(err, at)
			}
			gone := []string{}
			for old != "" && filepath.Clean(old) != filepath.Clean(at) {
				i, err := vdisk.Describe(old)
				if err == nil {
					err = vdisk.Delete(ctx, old)
				}
				if err != nil {
					return fmt.Errorf("reverted to %s, the disk goes on in %s; but what was to be discarded is still there: %w", at, made, err)
				}
				gone = append(gone, old)
				old = filepath.Join(filepath.Dir(old), i.Parent)
			}
			if s.json {
				return s.printJSON(map[string]any{"snapshot": at, "top": made, "deleted": gone})
			}
			s.say("Back to %s; the disk goes on in %s.", clean(at), clean(made))
			for _, p := range gone {
				s.say("Deleted %s.", clean(p))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&discard, "discard", false, "delete what was written since")
	d.bind(cmd.Flags())
	return cmd
}

func snapshotDelete(g *globals) *cobra.Command {
	var d diskFlags
	var socket string
	cmd := &cobra.Command{
		Use:   "delete LINK.vmdk",
		Short: "Delete a snapshot: merge a frozen link with the one that stands on it",
		Long: `Merges a frozen link with the link that stands on it, in whichever direction is possible
and has less to copy. The disk shows the same as before; what was frozen can no longer be
gone back to. Of a disk that is served, give --socket: the guest goes on meanwhile.

Ctrl-C stops it at a durable point; the same command goes on.

JSON: {"deleted", "top"}.`,
		Example: "  mortise disk snapshot delete vm1.vmdk --key-file vm1.key",
		Args:    needs("LINK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s := g.streams(cmd)
			at := filepath.Clean(args[0])
			if err := noVMs(at); err != nil {
				return err
			}
			top, err := topOf(at)
			if err != nil {
				return err
			}
			if filepath.Clean(top) == at {
				return fmt.Errorf("%s is a top, and no snapshot: nothing stands on it", at)
			}
			links, err := diskLinks(at)
			if err != nil {
				return err
			}
			child := childrenOf(links, at)[0] // topOf has seen that there is one
			now := ""
			if socket != "" {
				a, err := s.askServed(cmd.Context(), top, socket, controlRequest{Merge: child}, nil)
				if err != nil {
					return err
				}
				now = a.Top
			} else {
				p := s.progress("merging " + filepath.Base(child))
				err := d.withChain(cmd.Context(), s, top, func(c *vdisk.Chain) error {
					err := c.Consolidate(cmd.Context(), vdisk.MergeSpec{Link: filepath.Base(child), Commit: func(string) error { return nil },
						Report: func(done, total int64) { p.update(state{done: done, total: total}) }})
					now = c.Path()
					return err
				})
				p.end(err == nil)
				if err != nil {
					return explainDisk(err, top)
				}
			}
			if s.json {
				return s.printJSON(map[string]string{"deleted": at, "top": now})
			}
			s.say("The snapshot in %s is gone; the disk's top is %s.", clean(at), clean(now))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&socket, "socket", "", "control socket of the mortise disk serve that has the disk open")
	d.bind(f)
	return cmd
}

// liveFolder is where live bitmaps of links are, for who is not root; "": the default.
func liveFolder() string {
	if os.Geteuid() == 0 {
		return ""
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "mortise-live")
	}
	return fmt.Sprintf("/dev/shm/mortise-%d", os.Geteuid())
}
