package inventory

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"mortise/internal/store"
)

// Inventory is the records in the store, and the view of them. Its methods may
// be called concurrently.
type Inventory struct {
	Folders     *store.Collection[Folder]
	Datacenters *store.Collection[Datacenter]
	Clusters    *store.Collection[Cluster]
	Pools       *store.Collection[ResourcePool]
	Hosts       *store.Collection[Host]
	Datastores  *store.Collection[Datastore]
	Networks    *store.Collection[Network]
	VMs         *store.Collection[VM]

	store   *store.Store
	claims  *store.Collection[Ref]
	counter *store.Collection[int64]
	view    *View

	following sync.Mutex // held while the view is brought up to date; guards what follows
	sources   map[string]func(key string) (Record, int64, bool)
	changes   *store.Watcher
}

// Open loads the inventory from s. [Inventory.Run] must run for as long as the
// view is used.
func Open(ctx context.Context, s *store.Store) (*Inventory, error) {
	inv := &Inventory{store: s, view: newView(), sources: map[string]func(string) (Record, int64, bool){}}
	inv.changes = s.Watch()
	var err error
	if inv.claims, err = store.NewCollection(ctx, s, "claim", store.JSON[Ref](1)); err != nil {
		return nil, err
	}
	if inv.counter, err = store.NewCollection(ctx, s, "counter", store.JSON[int64](1)); err != nil {
		return nil, err
	}
	err = errors.Join(
		Track(ctx, inv, "folder", &inv.Folders),
		Track(ctx, inv, "datacenter", &inv.Datacenters),
		Track(ctx, inv, "cluster", &inv.Clusters),
		Track(ctx, inv, "pool", &inv.Pools),
		Track(ctx, inv, "host", &inv.Hosts),
		Track(ctx, inv, "datastore", &inv.Datastores),
		Track(ctx, inv, "network", &inv.Networks),
		Track(ctx, inv, "vm", &inv.VMs),
	)
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	if err := inv.bootstrap(ctx); err != nil {
		return nil, err
	}
	return inv, nil
}

// Track opens the collection called name, whose keys are Refs, and makes its
// records part of inv's view. Damaged records make it fail: what center does not
// know it must not act on.
func Track[T Record](ctx context.Context, inv *Inventory, name string, c **store.Collection[T]) error {
	opened, err := store.NewCollection(ctx, inv.store, name, store.JSON[T](1))
	if err != nil {
		return err
	}
	entries, err := opened.List(ctx, "")
	if err != nil {
		return err
	}
	*c = opened
	inv.following.Lock()
	defer inv.following.Unlock()
	inv.sources[name] = func(key string) (Record, int64, bool) {
		e, ok := opened.Peek(key)
		if !ok {
			return nil, 0, false
		}
		return any(&e.Value).(Record), e.Revision, true
	}
	batch := make([]update, 0, len(entries))
	for i := range entries {
		batch = append(batch, update{Ref(entries[i].Key), any(&entries[i].Value).(Record), entries[i].Revision})
	}
	inv.view.apply(batch)
	return nil
}

// View is the live view of all records.
func (inv *Inventory) View() *View { return inv.view }

// Run keeps the view current with what others write, until ctx ends.
func (inv *Inventory) Run(ctx context.Context) error {
	signal := inv.store.Watch()
	defer signal.Close()
	for {
		inv.follow()
		if _, err := signal.Next(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("inventory: %w", err)
		}
	}
}

// follow brings the view to where the store's cache is. Taking the changes and
// reading the records happen under one lock, so the view never goes back.
func (inv *Inventory) follow() {
	inv.following.Lock()
	defer inv.following.Unlock()
	ended, cancel := context.WithCancel(context.Background())
	cancel() // take what is there, do not wait
	list, err := inv.changes.Next(ended)
	if err != nil {
		return
	}
	batch := make([]update, 0, len(list))
	for _, ch := range list {
		source, ours := inv.sources[ch.Collection]
		if !ours {
			continue
		}
		record, revision, _ := source(ch.Key)
		batch = append(batch, update{Ref(ch.Key), record, revision})
	}
	inv.view.apply(batch)
}

// Commit writes ops as one transaction and returns when the view shows them.
func (inv *Inventory) Commit(ctx context.Context, ops ...store.Op) error {
	_, err := inv.CommitAt(ctx, ops...)
	return err
}

// CommitAt is Commit, and tells the revision of the store.
func (inv *Inventory) CommitAt(ctx context.Context, ops ...store.Op) (int64, error) {
	revision, err := inv.store.Commit(ctx, ops...)
	if err != nil {
		return 0, err
	}
	inv.CatchUp(ctx)
	return revision, nil
}

// CatchUp returns when the view shows everything that was committed before the
// call. It fails only when the store is closing or ctx ends; the view is then
// behind, no worse.
func (inv *Inventory) CatchUp(ctx context.Context) {
	if err := inv.store.Sync(ctx); err != nil {
		return
	}
	inv.follow()
}

// Edit lets change alter the record of ref in c, until nobody else was faster,
// and returns it when the view shows it. An error of change ends it.
func Edit[T any](ctx context.Context, inv *Inventory, c *store.Collection[T], ref Ref, change func(*T) error) (*T, error) {
	e, err := c.Edit(ctx, string(ref), change)
	if err != nil {
		return nil, err
	}
	inv.CatchUp(ctx)
	return &e.Value, nil
}

// EditVM is Edit for a VM.
func (inv *Inventory) EditVM(ctx context.Context, ref Ref, change func(*VM) error) (*VM, error) {
	return Edit(ctx, inv, inv.VMs, ref, change)
}

// EditHost is Edit for a host.
func (inv *Inventory) EditHost(ctx context.Context, ref Ref, change func(*Host) error) (*Host, error) {
	return Edit(ctx, inv, inv.Hosts, ref, change)
}

// NextRef gives a Ref that was never given before; prefix is as in [NewRef].
func (inv *Inventory) NextRef(ctx context.Context, prefix string) (Ref, error) {
	var n int64
	_, err := inv.counter.Edit(ctx, "ref", func(next *int64) error {
		n = *next
		*next++
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("inventory: taking a number for a new %s: %w", prefix, err)
	}
	return NewRef(prefix, n), nil
}

// A Claim is something that only one record may have at a time: a name in a
// folder, a VM's UUID, a VMX's path.
type Claim string

// ClaimName is the claim on name among the children of parent.
func ClaimName(parent Ref, name string) Claim { return Claim("name/" + string(parent) + "/" + name) }

// ClaimUUID is the claim on a VM's uuid.bios.
func ClaimUUID(uuid string) Claim { return Claim("vm-uuid/" + uuid) }

// ClaimPath is the claim on a VM's folder in a datastore.
func ClaimPath(datastore Ref, folder string) Claim {
	return Claim("vm-path/" + string(datastore) + "/" + strconv.Quote(folder))
}

// Take claims what for owner; the transaction fails with store.ErrExists when
// somebody has it.
func (inv *Inventory) Take(what Claim, owner Ref) store.Op {
	return inv.claims.Create(string(what), owner)
}

// Release gives a claim back.
func (inv *Inventory) Release(what Claim) store.Op { return inv.claims.Delete(string(what), 0) }

// Owner tells who has a claim; ok is false when nobody has.
func (inv *Inventory) Owner(ctx context.Context, what Claim) (owner Ref, ok bool, err error) {
	e, err := inv.claims.Get(ctx, string(what))
	if errors.Is(err, store.ErrNotFound) {
		return "", false, nil
	}
	return e.Value, err == nil, err
}

// PeekOwner is Owner as the view knows it, without asking the store.
func (inv *Inventory) PeekOwner(what Claim) (owner Ref, ok bool) {
	e, ok := inv.claims.Peek(string(what))
	return e.Value, ok
}
