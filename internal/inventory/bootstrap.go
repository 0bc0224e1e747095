package inventory

import (
	"context"
	"errors"
	"fmt"

	"mortise/internal/store"
)

// The inventory of a new center.
const (
	DefaultDatacenter Ref = "datacenter-2"
	DefaultVMFolder   Ref = "group-v3"
	DefaultHostFolder Ref = "group-h4"
	DefaultDatastores Ref = "group-s5"
	DefaultNetworks   Ref = "group-n6"
	DefaultCluster    Ref = "domain-c7"
	DefaultPool       Ref = "resgroup-8"

	firstFreeNumber = 10
)

// bootstrap writes the folders, the datacenter and the cluster that a center
// begins with, in one transaction, unless they are there.
func (inv *Inventory) bootstrap(ctx context.Context) error {
	folder := func(ref Ref, name string, parent Ref, kinds ...Kind) store.Op {
		return inv.Folders.Create(string(ref), Folder{Entity: Entity{ref, name, parent}, ChildKinds: kinds})
	}
	dc := DefaultDatacenter
	err := inv.Commit(ctx,
		inv.counter.Create("ref", firstFreeNumber),
		folder(RootFolder, "Datacenters", "", KindFolder, KindDatacenter),
		inv.Datacenters.Create(string(dc), Datacenter{Entity: Entity{dc, "Datacenter", RootFolder},
			VMFolder: DefaultVMFolder, HostFolder: DefaultHostFolder, DatastoreFolder: DefaultDatastores, NetworkFolder: DefaultNetworks}),
		folder(DefaultVMFolder, "vm", dc, KindFolder, KindVM),
		folder(DefaultHostFolder, "host", dc, KindFolder, KindCluster),
		folder(DefaultDatastores, "datastore", dc, KindFolder, KindDatastore),
		folder(DefaultNetworks, "network", dc, KindFolder, KindNetwork),
		inv.Clusters.Create(string(DefaultCluster), Cluster{Entity: Entity{DefaultCluster, "Cluster", DefaultHostFolder},
			ResourcePool: DefaultPool, CryptoMode: CryptoOnDemand}),
		inv.Pools.Create(string(DefaultPool), ResourcePool{Entity: Entity{DefaultPool, "Resources", DefaultCluster}, Owner: DefaultCluster}),
	)
	if err != nil && !errors.Is(err, store.ErrExists) {
		return fmt.Errorf("inventory: writing the first inventory: %w", err)
	}
	return nil
}
