package cli

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// importing is one run of vm import.
type importing struct {
	newVMFlags
	name, format, tmp string
	newIdentity       bool
}

func vmImport(g *globals) *cobra.Command {
	var i importing
	cmd := &cobra.Command{
		Use:   "import DISK...|VMX|FOLDER",
		Short: "Make a VM of disks or of a VMware VM's folder",
		Long: `Makes a VM of disks of any format that qemu-img reads (VMDK of every kind, qcow2, raw,
VHDX, …), or of a VMware VM's folder: then it keeps name, UUID, MAC addresses,
firmware, memory, CPUs and all disks, and you are told what it does not keep.

With a storage policy that encrypts, the disks are encrypted in the one pass in which
they are written: nothing of them is on the datastore in clear at any time. Only data
travels to center, over TLS; holes and zeros are left out. The source is not changed;
what happens to it afterwards, in clear as it is, is up to you.

Raw images and flat VMDKs are read where they are. Other formats are first converted to
a sparse temporary file beside the source, or in --tmp. That file has no name, so it is
gone when this verb ends, even if it is killed; choose --tmp where the guest's plaintext
may lie, with room for it.

An image that comes from a stranger is safe to import: files that it refers to are
refused unless they lie beside it, and a *.raw file is raw whatever is in it.

When something fails, or at Ctrl-C, the half-made VM is removed. VMs that a VMware
product encrypted are refused with the way in.

JSON: {"vm" (reference), "name", "policy", "notes", "disks": [{"disk", "source",
"format", "capacityBytes", "writtenBytes"}]}.`,
		Example: `  mortise vm import disk.qcow2 --name web1 --policy "VM Encryption Policy"
  mortise vm import root.vmdk data.raw --name db1 --memory 8G --cpus 4 --firmware efi
  mortise vm import /exports/web2 --policy "VM Encryption Policy" --network default`,
		Args: cobra.MinimumNArgs(1),
		RunE: g.verb(func(ctx context.Context, c *client, args []string) error {
			return c.importVM(ctx, args, &i)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&i.name, "name", "", "name of the VM (default: the folder's own, or the first file's)")
	f.StringVar(&i.format, "format", "", "format of the disks, if it is not to be detected: raw, qcow2, vmdk, …")
	f.StringVar(&i.tmp, "tmp", "", "folder for temporary files (default: the source's)")
	f.BoolVar(&i.newIdentity, "new-identity", false, "give the VM a new UUID and new MAC addresses: it is a copy")
	i.bind(cmd)
	return cmd
}

// importJSON is what vm import did, in JSON.
type importJSON struct {
	VM     string           `json:"vm"`
	Name   string           `json:"name"`
	Policy string           `json:"policy,omitempty"`
	Notes  []string         `json:"notes"`
	Disks  []importDiskJSON `json:"disks"`
}

type importDiskJSON struct {
	Disk          string `json:"disk"`
	Source        string `json:"source"`
	Format        string `json:"format"`
	CapacityBytes int64  `json:"capacityBytes"`
	WrittenBytes  int64  `json:"writtenBytes"`
}

func (c *client) importVM(ctx context.Context, paths []string, i *importing) error {
	v, files, err := i.read(paths)
	if err != nil {
		return err
	}
	if err := i.apply(&v.machine); err != nil {
		return err
	}
	if i.name != "" {
		v.name = i.name
	}
	// Policy, provider, host and the rest are checked before much is read.
	if i.policy != "" {
		p, err := c.policy(ctx, i.policy)
		if err != nil {
			return err
		}
		i.policy = p.Name
	}
	for _, n := range v.notes {
		fmt.Fprintf(c.err, "note: %s\n", clean(n))
	}
	sources, err := c.openSources(ctx, files, i)
	defer func() {
		for _, s := range sources {
			s.close()
		}
	}()
	if err != nil {
		return err
	}
	for n, s := range sources {
		v.disks[n].capacity = s.size
	}
	vm, err := c.makeForImport(ctx, v, i)
	if err != nil {
		return err
	}
	report := importJSON{VM: vm.Value, Name: v.name, Policy: i.policy, Notes: append([]string{}, v.notes...)}
	if err := c.fillDisks(ctx, vm, v, sources, &report); err != nil {
		c.removeHalf(ctx, vm, v.name)
		return err
	}
	if c.json {
		return c.printJSON(report)
	}
	how := "in clear"
	if i.policy != "" {
		how = fmt.Sprintf("by storage policy %q", i.policy)
	}
	c.say("%s is there, %s. Next: mortise vm power on %[1]s", v.name, how)
	return nil
}

// read tells what the arguments are: disks, or one VM's folder.
func (i *importing) read(paths []string) (*vmxFolder, []string, error) {
	st, err := os.Stat(paths[0])
	if err != nil {
		return nil, nil, err
	}
	if st.IsDir() || strings.EqualFold(filepath.Ext(paths[0]), ".vmx") {
		if len(paths) > 1 {
			return nil, nil, fmt.Errorf("%s is a VM with disks of its own: import it alone", paths[0])
		}
		vmx, err := findVMX(paths[0])
		if err != nil {
			return nil, nil, err
		}
		v, err := readVMX(vmx)
		if err != nil {
			return nil, nil, err
		}
		if i.newIdentity {
			v.newIdentity()
		}
		var files []string
		for _, f := range v.files {
			files = append(files, filepath.Join(filepath.Dir(vmx), f))
		}
		return v, files, nil
	}
	if strings.EqualFold(filepath.Ext(paths[0]), ".ova") || strings.EqualFold(filepath.Ext(paths[0]), ".ovf") {
		return nil, nil, fmt.Errorf("%s: unpack the OVA (tar xf) and import its disks: mortise vm import *.vmdk --name NAME", paths[0])
	}
	v := &vmxFolder{}
	v.name = strings.TrimSuffix(filepath.Base(paths[0]), filepath.Ext(paths[0]))
	for n := range paths {
		v.disks = append(v.disks, machineDisk{place: nextPlace(n)})
	}
	return v, paths, nil
}

// openSources opens every disk, before anything is made at center.
func (c *client) openSources(ctx context.Context, files []string, i *importing) (all []*source, err error) {
	for _, f := range files {
		p := c.progress("reading " + filepath.Base(f))
		s, err := openSource(ctx, f, i.format, i.tmp, p.update)
		p.end(err == nil)
		if err != nil {
			return all, err
		}
		all = append(all, s)
	}
	return all, nil
}

// cleanupTime is how long an import that failed tries to remove what it made.
const cleanupTime = 2 * time.Minute

// makeForImport has center make the VM. When ctx ends meanwhile, the task is
// cancelled, and what it made removed.
func (c *client) makeForImport(ctx context.Context, v *vmxFolder, i *importing) (types.ManagedObjectReference, error) {
	var none types.ManagedObjectReference
	task, err := c.create(ctx, &v.machine, &i.newVMFlags)
	if err != nil {
		return none, err
	}
	title := "creating " + v.name
	p := c.progress(title)
	info, err := c.follow(ctx, task, p.update)
	p.end(err == nil && info.State == types.TaskInfoStateSuccess)
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		_, _ = methods.CancelTask(end, c.vim, &types.CancelTask{This: task})
		late, lerr := c.follow(end, task, func(state) {})
		if lerr != nil {
			fmt.Fprintf(c.err, "%s may have made the VM still: look with mortise task watch %[1]s\n", task.Value)
		} else if vm, ok := late.Result.(types.ManagedObjectReference); ok && late.State == types.TaskInfoStateSuccess {
			c.removeHalf(ctx, vm, v.name)
		}
		return none, fmt.Errorf("%s: %w", title, err)
	}
	if info.State == types.TaskInfoStateError {
		return none, taskFailed(title, info)
	}
	vm, ok := info.Result.(types.ManagedObjectReference)
	if !ok {
		return none, fmt.Errorf("%s: center did not say which VM it made", title)
	}
	return vm, nil
}

// fillDisks uploads the sources into the disks of the new VM.
func (c *client) fillDisks(ctx context.Context, ref types.ManagedObjectReference, v *vmxFolder, sources []*source, report *importJSON) error {
	var vm mo.VirtualMachine
	if err := c.properties(ctx, ref, []string{"config.hardware.device"}, &vm); err != nil {
		return err
	}
	made := map[string]*types.VirtualDisk{}
	for _, d := range disksOf(vm.Config.Hardware.Device) {
		made[diskName(d)] = d
	}
	for n, s := range sources {
		at := v.disks[n].place.String()
		d := made[at]
		if d == nil {
			return fmt.Errorf("center made no disk at %s: %s cannot be imported", at, s.name)
		}
		written, err := c.fillDisk(ctx, ref, d.Key, s)
		if err != nil {
			return fmt.Errorf("importing %s: %w", s.name, err)
		}
		report.Disks = append(report.Disks, importDiskJSON{Disk: at, Source: s.name, Format: s.format, CapacityBytes: s.size, WrittenBytes: written})
	}
	return nil
}

// fillDisk uploads one source and shows how it goes.
func (c *client) fillDisk(ctx context.Context, vm types.ManagedObjectReference, key int32, s *source) (int64, error) {
	total, err := s.dataBytes()
	if err != nil {
		return 0, err
	}
	p := c.progress("importing " + filepath.Base(s.name))
	stream := &countedStream{sparseReader: newSparseReader(s), tell: func(seen int64) { p.update(state{done: min(seen, total), total: total, percent: 100}) }}
	stream.tell(0)
	written, err := c.ext.ImportDisk(ctx, vm, key, stream)
	if err == nil && written != stream.sent {
		err = fmt.Errorf("center wrote %d bytes of the %d that were sent", written, stream.sent)
	}
	p.end(err == nil)
	if err != nil && ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return written, err
}

// A countedStream tells how much of a source was looked at.
type countedStream struct {
	*sparseReader
	sent int64
	tell func(seen int64)
}

func (s *countedStream) Next() (int64, []byte, error) {
	offset, data, err := s.sparseReader.Next()
	s.sent += int64(len(data))
	s.tell(s.seen)
	return offset, data, err
}

// removeHalf deletes a VM whose import failed.
func (c *client) removeHalf(ctx context.Context, vm types.ManagedObjectReference, name string) {
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	// The import that was broken off may still be ending at center.
	err := c.destroy(end, vm)
	for busy(err) && end.Err() == nil {
		select {
		case <-time.After(busyPause):
			err = c.destroy(end, vm)
		case <-end.Done():
		}
	}
	if err != nil {
		fmt.Fprintf(c.err, "The half-made VM %s could not be removed (%s): mortise vm delete %s\n", clean(name), message(err), cmp.Or(vm.Value, name))
		return
	}
	fmt.Fprintf(c.err, "The half-made VM %s is removed.\n", clean(name))
}

// busyPause is how long to wait before asking again for what a task is in the
// way of.
const busyPause = 300 * time.Millisecond

// busy tells whether an error is that another task works on the same thing.
func busy(err error) bool {
	switch vimFault(err).(type) {
	case types.TaskInProgress, *types.TaskInProgress:
		return true
	}
	return false
}

// destroy deletes a VM and waits until it is gone.
func (c *client) destroy(ctx context.Context, vm types.ManagedObjectReference) error {
	res, err := methods.Destroy_Task(ctx, c.vim, &types.Destroy_Task{This: vm})
	if err != nil {
		return err
	}
	info, err := c.follow(ctx, res.Returnval, func(state) {})
	if err == nil && info.State == types.TaskInfoStateError {
		err = taskFailed("deleting", info)
	}
	return err
}
