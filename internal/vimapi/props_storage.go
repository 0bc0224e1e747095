package vimapi

import (
	"math"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
)

func datastoreProps() map[string]prop {
	return map[string]prop{
		"info":          on(func(_ *reader, d *inventory.Datastore) any { return datastoreInfo(d) }),
		"summary":       on(func(_ *reader, d *inventory.Datastore) any { return datastoreSummary(d) }),
		"host":          on(func(_ *reader, d *inventory.Datastore) any { return datastoreMounts(d) }),
		"vm":            on(func(r *reader, d *inventory.Datastore) any { return morefs(r.relations().vms[d.Ref]) }),
		"overallStatus": on(func(_ *reader, d *inventory.Datastore) any { return datastoreStatus(d) }),
		"capability": on(func(*reader, *inventory.Datastore) any {
			return types.DatastoreCapability{
				DirectoryHierarchySupported: true, PerFileThinProvisioningSupported: true,
				TopLevelDirectoryCreateSupported: ptr(true), VmdkExpandSupported: ptr(true),
			}
		}),
	}
}

func datastoreStatus(d *inventory.Datastore) types.ManagedEntityStatus {
	switch {
	case !d.Accessible:
		return types.ManagedEntityStatusRed
	case d.Capacity > 0 && d.Free < d.Capacity/20:
		return types.ManagedEntityStatusYellow
	}
	return types.ManagedEntityStatusGreen
}

// datastoreURL names a datastore by the id in its marker file.
func datastoreURL(d *inventory.Datastore) string { return "ds:///mortise/volumes/" + d.UUID + "/" }

func datastoreInfo(d *inventory.Datastore) *types.LocalDatastoreInfo {
	info := &types.LocalDatastoreInfo{}
	info.Name, info.Url, info.FreeSpace = d.Name, datastoreURL(d), d.Free
	info.MaxFileSize, info.MaxVirtualDiskCapacity, info.MaxMemoryFileSize = math.MaxInt64>>13, 62<<40, math.MaxInt64>>13
	if len(d.Mounts) > 0 {
		info.Path = d.Mounts[0].Path
	}
	return info
}

func datastoreSummary(d *inventory.Datastore) types.DatastoreSummary {
	return types.DatastoreSummary{
		Datastore: reference(d.Ref), Name: d.Name, Url: datastoreURL(d), Capacity: d.Capacity, FreeSpace: d.Free, Accessible: d.Accessible,
		MultipleHostAccess: ptr(len(d.Mounts) > 1), Type: d.Type, MaintenanceMode: "normal",
	}
}

func datastoreMounts(d *inventory.Datastore) []types.DatastoreHostMount {
	all := []types.DatastoreHostMount{}
	for _, m := range d.Mounts {
		info := types.HostMountInfo{Path: m.Path, AccessMode: string(types.HostMountModeReadWrite), Mounted: ptr(true), Accessible: ptr(m.Problem == "")}
		if m.Problem != "" {
			info.InaccessibleReason = string(types.HostMountInfoInaccessibleReasonAllPathsDown_Timeout)
		}
		all = append(all, types.DatastoreHostMount{Key: moref(m.Host), MountInfo: info})
	}
	return all
}

func networkProps() map[string]prop {
	return map[string]prop{
		"host": on(func(r *reader, n *inventory.Network) any { return r.existing(n.Hosts) }),
		"vm":   on(func(r *reader, n *inventory.Network) any { return morefs(r.relations().vms[n.Ref]) }),
		"summary": on(func(_ *reader, n *inventory.Network) any {
			return &types.NetworkSummary{Network: reference(n.Ref), Name: n.Name, Accessible: len(n.Hosts) > 0}
		}),
	}
}
