package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"mortise/internal/hostapi"
	"mortise/internal/storage"
	"mortise/internal/vdisk"
)

// probeLimit is how long a datastore's storage may take to answer.
const probeLimit = 20 * time.Second

// storageChecks remembers what was found out about the storage of datastores, by
// path. One is probed again when something else is mounted there.
type storageChecks struct {
	mu    sync.Mutex
	known map[string]*storageCheck
}

type storageCheck struct {
	mu     sync.Mutex // held while probing: a second caller waits for the first's result
	mount  uint64     // storage.Identity when it was probed
	report *storage.Report
}

func (c *storageChecks) of(path string) *storageCheck {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil {
		c.known = map[string]*storageCheck{}
	}
	if c.known[path] == nil {
		c.known[path] = &storageCheck{}
	}
	return c.known[path]
}

// storageFor returns an error unless the storage of a datastore may hold disks (E5),
// and new ones of these sizes in a VM's folder. It is asked before a disk is made
// there and before a guest is started, and not before one is stopped: it can be moved
// away.
func (a *Agent) storageFor(ctx context.Context, name, folder string, disks []*hostapi.NewDisk) error {
	d, err := a.datastore(name)
	if err != nil {
		return err
	}
	report, err := a.storageOf(ctx, d)
	switch {
	case err != nil:
		return fmt.Errorf("datastore %s: %w", name, err)
	case report.Err() != nil:
		return hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "datastore %s: %w", name, report.Err())
	}
	if o := report.Direct.Offset; a.cfg.DirectIO && (o == 0 || o > vdisk.SectorSize) {
		return hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "datastore %s (%s) has no direct I/O with sectors of %d bytes, and host %s is told to use it: take direct_io out of the host's configuration, or choose another datastore", name, report.Type, vdisk.SectorSize, a.cfg.Name)
	}
	for _, disk := range disks {
		if disk.CapacityBytes > report.MaxFile {
			return hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "a disk of %d bytes: files of datastore %s (%s) have at most %d: make it smaller, or choose a datastore on XFS", disk.CapacityBytes, name, report.Type, report.MaxFile)
		}
	}
	return spaceFor(d, report, folder, disks)
}

// spaceFor refuses thick disks for which there is no space, before anything is made.
// Those that an earlier call made have theirs.
func spaceFor(d Datastore, report *storage.Report, folder string, disks []*hostapi.NewDisk) error {
	disks = slices.DeleteFunc(slices.Clone(disks), func(n *hostapi.NewDisk) bool { return !n.Thick })
	if len(disks) == 0 {
		return nil
	}
	if !report.Reserve {
		return hostapi.Faultf(hostapi.Fault_NOT_SUPPORTED, "datastore %s (%s) cannot reserve the space of a thick disk: make it thin, or choose a datastore on ext4, XFS or NFS 4.2", d.Name, report.Type)
	}
	made, err := vdisk.DescribeFolder(folder)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("datastore %s: %w", d.Name, err)
	}
	free := d.info().FreeBytes
	left := free
	for _, n := range disks {
		if slices.ContainsFunc(made, func(i vdisk.Info) bool { return i.UUID.String() == n.Uuid }) {
			continue
		}
		if left -= n.CapacityBytes; left < 0 {
			return hostapi.Faultf(hostapi.Fault_NO_SPACE, "datastore %s has %d bytes free, and the thick disks take more: free space, choose another datastore, or make them thin", d.Name, free)
		}
	}
	return nil
}

// storageOf probes a datastore's storage, or remembers.
func (a *Agent) storageOf(ctx context.Context, d Datastore) (*storage.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	check := a.storage.of(d.Path)
	check.mu.Lock()
	defer check.mu.Unlock()
	mount, err := storage.Identity(ctx, d.Path)
	if err != nil {
		return nil, err
	}
	if check.report != nil && check.mount == mount {
		return check.report, nil
	}
	report, err := storage.Probe(ctx, d.Path)
	if err != nil {
		return nil, err
	}
	for _, f := range report.Unsafe {
		a.log.Error("a datastore's storage is unsafe: no disk is created and no guest started there", "datastore", d.Name, "path", d.Path, "finding", f.String())
	}
	for _, f := range report.Warnings {
		a.log.Warn("a datastore's storage", "datastore", d.Name, "path", d.Path, "finding", f.String())
	}
	a.log.Info("probed a datastore's storage", "datastore", d.Name, "path", d.Path, "type", report.Type, "source", report.Source,
		"direct", report.Direct.Offset, "punch", report.Punch, "dsync", report.DSync, "maxfile", report.MaxFile)
	check.mount, check.report = mount, report
	return report, nil
}

// probeDatastores tells an administrator at the start what he would learn too late.
func (a *Agent) probeDatastores(ctx context.Context) {
	for _, d := range a.cfg.Datastores {
		if _, err := a.storageOf(ctx, d); err != nil && ctx.Err() == nil {
			a.log.Error("a datastore cannot be probed", "datastore", d.Name, "path", d.Path, "error", err)
		}
	}
}
