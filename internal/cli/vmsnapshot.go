package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

func vmSnapshot(g *globals) *cobra.Command {
	c := &cobra.Command{
		Use:   "snapshot",
		Short: "Keep a VM's disks as they are now, and go back to them",
		Long: `A snapshot keeps a VM's disks as they are at an instant, encrypted as they are. What the
guest writes from then on goes to a new file beside each disk, with a key of its own. A
VM may have many, in a tree: going back to one and working on begins another branch.

A snapshot has the disks, not the guest's memory. It costs what the guest writes after
it, and is no backup: it lies beside the disks, and needs them.

A snapshot is named by its name, or by its id where several have the same name.`,
		Example: `  mortise vm snapshot create web1 "before the update"
  mortise vm snapshot ls web1
  mortise vm snapshot revert web1 "before the update"
  mortise vm snapshot delete web1 "before the update"`,
		Args: cobra.NoArgs, RunE: showHelp,
	}
	c.AddCommand(snapshotVMCreate(g), snapshotVMLs(g), snapshotVMRevert(g), snapshotVMRename(g), snapshotVMDelete(g), snapshotVMConsolidate(g))
	return c
}

func snapshotVMCreate(g *globals) *cobra.Command {
	var detach bool
	var description string
	cmd := &cobra.Command{
		Use:   "create VM NAME",
		Short: "Keep a VM's disks as they are now",
		Long: `Keeps a VM's disks as they are now, all at the same instant. The VM may run: its disks
are then kept as a power cut would leave them, which file systems and databases with a
journal survive. For more, have the guest flush what it holds (sync, fsfreeze) or power
it off first.

JSON: the task as of mortise task watch; "result" is the snapshot's reference.`,
		Example: `  mortise vm snapshot create web1 "before the update"
  mortise vm snapshot create web1 nightly --description "made by cron" --json | jq -r .result`,
		Args: needs("VM", "NAME"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			return c.vmTask(ctx, args[0], "creating a snapshot of", "%s has a new snapshot.", detach, func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error) {
				res, err := methods.CreateSnapshot_Task(ctx, c.vim, &types.CreateSnapshot_Task{This: vm, Name: args[1], Description: description})
				return result(res, err, func(r *types.CreateSnapshot_TaskResponse) types.ManagedObjectReference { return r.Returnval })
			})
		}),
	}
	cmd.Flags().StringVar(&description, "description", "", "what it is for")
	return detachFlag(cmd, &detach)
}

// snapshotsJSON is a VM's snapshots in JSON.
type snapshotsJSON struct {
	VM                  string         `json:"vm"`
	Snapshots           []snapshotJSON `json:"snapshots"` // parents before their children
	ConsolidationNeeded bool           `json:"consolidationNeeded"`
}

type snapshotJSON struct {
	Snapshot    string    `json:"snapshot"`
	ID          int32     `json:"id"`
	Parent      int32     `json:"parent,omitempty"`
	Name        string    `json:"name"`
	Description string    `json:"description,omitempty"`
	Created     time.Time `json:"created"`
	Power       string    `json:"power"`
	Current     bool      `json:"current"`

	depth int
}

func snapshotVMLs(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "ls VM",
		Short: "Show a VM's snapshots as a tree",
		Long: `Shows a VM's snapshots: what stands on what, and which one the disks stand on now
(current). POWER tells whether the guest ran when a snapshot was made.

JSON: {"vm", "snapshots": [{"snapshot" (reference), "id", "parent" (id; none of a root),
"name", "description", "created", "power" (poweredOn, poweredOff), "current"}],
"consolidationNeeded"}.`,
		Example: `  mortise vm snapshot ls web1
  mortise vm snapshot ls web1 --json | jq -r '.snapshots[] | select(.current) | .name'`,
		Args: needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			list, _, err := c.snapshots(ctx, args[0])
			if err != nil {
				return err
			}
			if c.json {
				return c.printJSON(list)
			}
			if len(list.Snapshots) == 0 {
				c.say("%s has no snapshots.", args[0])
			} else {
				t := newTable(c.out, "SNAPSHOT", "ID", "CREATED", "POWER", "DESCRIPTION")
				for _, s := range list.Snapshots {
					name := strings.Repeat("  ", s.depth) + s.Name
					if s.Current {
						name += " (current)"
					}
					t.row(name, fmt.Sprint(s.ID), s.Created.UTC().Format(time.DateTime), powerWord(s.Power), s.Description)
				}
				if err := t.flush(); err != nil {
					return err
				}
			}
			if list.ConsolidationNeeded {
				c.say("Its disks have links that no snapshot needs: mortise vm snapshot consolidate %s merges them.", args[0])
			}
			return nil
		}),
	}
}

// snapshots reads a VM's snapshots.
func (c *client) snapshots(ctx context.Context, name string) (*snapshotsJSON, types.ManagedObjectReference, error) {
	ref, err := c.find(ctx, kindVM, name)
	if err != nil {
		return nil, ref, err
	}
	var vm mo.VirtualMachine
	if err := c.properties(ctx, ref, []string{"snapshot", "runtime.consolidationNeeded"}, &vm); err != nil {
		return nil, ref, err
	}
	list := &snapshotsJSON{VM: ref.Value, Snapshots: []snapshotJSON{}, ConsolidationNeeded: vm.Runtime.ConsolidationNeeded}
	if vm.Snapshot != nil {
		list.add(vm.Snapshot, vm.Snapshot.RootSnapshotList, 0, 0)
	}
	return list, ref, nil
}

func (l *snapshotsJSON) add(info *types.VirtualMachineSnapshotInfo, tree []types.VirtualMachineSnapshotTree, parent int32, depth int) {
	for i := range tree {
		s := &tree[i]
		l.Snapshots = append(l.Snapshots, snapshotJSON{
			Snapshot: s.Snapshot.Value, ID: s.Id, Parent: parent, Name: s.Name, Description: s.Description, Created: s.CreateTime, Power: string(s.State),
			Current: info.CurrentSnapshot != nil && *info.CurrentSnapshot == s.Snapshot, depth: depth,
		})
		l.add(info, s.ChildSnapshotList, s.Id, depth+1)
	}
}

// find finds a snapshot by its name, or by its id or reference.
func (l *snapshotsJSON) find(vm, name string) (*snapshotJSON, error) {
	var found, byID []*snapshotJSON
	for i := range l.Snapshots {
		s := &l.Snapshots[i]
		switch {
		case s.Name == name:
			found = append(found, s)
		case fmt.Sprint(s.ID) == name || s.Snapshot == name:
			byID = append(byID, s)
		}
	}
	if len(found) == 0 {
		found = byID
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("%s has no snapshot %q: mortise vm snapshot ls %s lists them", vm, name, vm)
	case 1:
		return found[0], nil
	}
	var ids []int
	for _, s := range found {
		ids = append(ids, int(s.ID))
	}
	slices.Sort(ids)
	var words []string
	for _, id := range ids {
		words = append(words, strconv.Itoa(id))
	}
	return nil, fmt.Errorf("%d of the snapshots of %s are called %q: name one by its id, %s", len(found), vm, name, strings.Join(words, " or "))
}

// snapshot finds a VM's snapshot.
func (c *client) snapshot(ctx context.Context, vm, name string) (*snapshotJSON, types.ManagedObjectReference, error) {
	list, _, err := c.snapshots(ctx, vm)
	if err != nil {
		return nil, types.ManagedObjectReference{}, err
	}
	s, err := list.find(vm, name)
	if err != nil {
		return nil, types.ManagedObjectReference{}, err
	}
	return s, types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: s.Snapshot}, nil
}

func snapshotVMRevert(g *globals) *cobra.Command {
	var detach, yes bool
	cmd := &cobra.Command{
		Use:   "revert VM SNAPSHOT",
		Short: "Make a VM's disks what they were at a snapshot",
		Long: `Makes a VM's disks what they were at a snapshot. What was written since is lost, unless
another snapshot has it. The tree of snapshots stays. A VM that runs is powered off
first, as if its plug were pulled, and stays off.

JSON: the task as of mortise task watch.`,
		Example: `  mortise vm snapshot revert web1 "before the update"
  mortise vm snapshot revert web1 2 --yes`,
		Args: needs("VM", "SNAPSHOT"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			s, ref, err := c.snapshot(ctx, args[0], args[1])
			if err != nil {
				return err
			}
			if !yes {
				question := fmt.Sprintf("Go back to snapshot %s of %s, and lose what was written since?", s.Name, args[0])
				if err := c.confirm(clean(question), "--yes"); err != nil {
					return err
				}
			}
			res, err := methods.RevertToSnapshot_Task(ctx, c.vim, &types.RevertToSnapshot_Task{This: ref})
			if err != nil {
				return fmt.Errorf("reverting %s: %w", args[0], err)
			}
			return c.finish(ctx, res.Returnval, waiting{title: "reverting " + args[0], detach: detach,
				done: clean(fmt.Sprintf("%s is as it was at snapshot %s, and off.", args[0], s.Name))})
		}),
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return detachFlag(cmd, &detach)
}

func snapshotVMRename(g *globals) *cobra.Command {
	var description string
	cmd := &cobra.Command{
		Use:   "rename VM SNAPSHOT NAME",
		Short: "Give a snapshot another name or description",
		Long: `Gives a snapshot another name, and with --description another description.

JSON: {"vm", "snapshot", "name"}.`,
		Example: `  mortise vm snapshot rename web1 nightly "last good one"
  mortise vm snapshot rename web1 2 nightly --description "of Tuesday"`,
		Args: needs("VM", "SNAPSHOT", "NAME"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			if args[2] == "" {
				return errors.New("NAME is empty: a snapshot needs a name")
			}
			s, ref, err := c.snapshot(ctx, args[0], args[1])
			if err != nil {
				return err
			}
			if _, err := methods.RenameSnapshot(ctx, c.vim, &types.RenameSnapshot{This: ref, Name: args[2], Description: description}); err != nil {
				return fmt.Errorf("renaming snapshot %s of %s: %w", args[1], args[0], err)
			}
			return c.sayOrJSON(struct {
				VM       string `json:"vm"`
				Snapshot string `json:"snapshot"`
				Name     string `json:"name"`
			}{args[0], s.Snapshot, args[2]}, "Snapshot %d of %s is called %s.", s.ID, args[0], clean(args[2]))
		}),
	}
	cmd.Flags().StringVar(&description, "description", "", "what it is for (default: as it is)")
	return cmd
}

func snapshotVMDelete(g *globals) *cobra.Command {
	var detach, children, all bool
	cmd := &cobra.Command{
		Use:   "delete VM SNAPSHOT | delete VM --all",
		Short: "Forget snapshots; the VM's disks stay as they are",
		Long: `Forgets a snapshot, with --children also those that stand on it, or --all. The VM's disks
stay as they are now; nobody can go back to what is deleted. The files are merged, under
a running guest too, which may take a while and some space. If that is cancelled or
fails, the snapshot is gone and the VM works; mortise vm snapshot consolidate goes on.

JSON: the task as of mortise task watch.`,
		Example: `  mortise vm snapshot delete web1 "before the update"
  mortise vm snapshot delete web1 2 --children
  mortise vm snapshot delete web1 --all --detach`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case all && len(args) == 2:
				return fmt.Errorf("%s: a SNAPSHOT and --all exclude each other", cmd.CommandPath())
			case all:
				return needs("VM")(cmd, args)
			case len(args) == 1:
				return fmt.Errorf("%s: SNAPSHOT is missing, or --all; see %[1]s --help", cmd.CommandPath())
			}
			return needs("VM", "SNAPSHOT")(cmd, args)
		},
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			if all {
				return c.vmTask(ctx, args[0], "deleting all snapshots of", "%s has no snapshots any more.", detach, func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error) {
					res, err := methods.RemoveAllSnapshots_Task(ctx, c.vim, &types.RemoveAllSnapshots_Task{This: vm})
					return result(res, err, func(r *types.RemoveAllSnapshots_TaskResponse) types.ManagedObjectReference { return r.Returnval })
				})
			}
			s, ref, err := c.snapshot(ctx, args[0], args[1])
			if err != nil {
				return err
			}
			title := clean(fmt.Sprintf("deleting snapshot %s of %s", s.Name, args[0]))
			res, err := methods.RemoveSnapshot_Task(ctx, c.vim, &types.RemoveSnapshot_Task{This: ref, RemoveChildren: children})
			if err != nil {
				return fmt.Errorf("%s: %w", title, err)
			}
			return c.finish(ctx, res.Returnval, waiting{title: title, detach: detach, done: clean(fmt.Sprintf("Snapshot %s of %s is deleted.", s.Name, args[0]))})
		}),
	}
	cmd.Flags().BoolVar(&children, "children", false, "with the snapshots that stand on it")
	cmd.Flags().BoolVar(&all, "all", false, "all snapshots of the VM")
	cmd.MarkFlagsMutuallyExclusive("children", "all")
	return detachFlag(cmd, &detach)
}

func snapshotVMConsolidate(g *globals) *cobra.Command {
	var detach bool
	cmd := &cobra.Command{
		Use:   "consolidate VM",
		Short: "Merge what deleting snapshots has left",
		Long: `Merges the files of a VM's disks that no snapshot needs any more, when deleting
snapshots was cancelled or failed, such as for want of space. The VM may run. Without
anything to merge it does nothing.

JSON: the task as of mortise task watch.`,
		Example: `  mortise vm snapshot consolidate web1`,
		Args:    needs("VM"),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			return c.vmTask(ctx, args[0], "consolidating the disks of", "The disks of %s are consolidated.", detach, func(vm types.ManagedObjectReference) (types.ManagedObjectReference, error) {
				res, err := methods.ConsolidateVMDisks_Task(ctx, c.vim, &types.ConsolidateVMDisks_Task{This: vm})
				return result(res, err, func(r *types.ConsolidateVMDisks_TaskResponse) types.ManagedObjectReference { return r.Returnval })
			})
		}),
	}
	return detachFlag(cmd, &detach)
}
