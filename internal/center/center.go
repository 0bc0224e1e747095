package center

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/pki"
	"mortise/internal/policy"
	"mortise/internal/store"
	"mortise/internal/task"
)

// Config says where a center keeps its state and what it works with.
type Config struct {
	Dir  string // state folder, made with mode 0700
	Name string // of this member, "center-1"

	// RootKey seals center's own secrets: its CA's key and the client keys
	// towards key servers. It stays the caller's.
	RootKey pki.Sealer
	// OpenProvider makes the client of a configured key provider.
	OpenProvider OpenProvider

	Logger *slog.Logger
	Clock  func() time.Time // nil: time.Now

	// AllowIncapableHosts lets hosts that cannot become safe (E1: unencrypted
	// swap) take encrypted VMs all the same; for development machines.
	AllowIncapableHosts bool
	// HostWait is how long a task waits for a host that went away; 0 means two
	// minutes.
	HostWait time.Duration
	// Failpoint is for crash tests; see task.Config.
	Failpoint func(ctx context.Context, run *task.Run, step string)
}

// Center is an open center. Its methods may be called concurrently.
type Center struct {
	cfg  Config
	log  *slog.Logger
	now  func() time.Time
	term int64 // of this process; hosts refuse a lower one

	store    *store.Store
	inv      *inventory.Inventory
	view     *inventory.View
	events   *event.Log
	authz    *authz.Authority
	policies *policy.Policies
	tasks    *task.Engine

	ca        *authority
	tokens    *store.Collection[pki.JoinRecord]
	known     *store.Collection[knownVM]
	providers *providers
	links     *links

	failedLogins failedLogins

	password string // the generated one, in the process that generated it
}

// Open opens the state folder, or makes a new one. Nothing runs before
// [Center.Run]. [store.ErrLocked] tells that another process has it open.
func Open(ctx context.Context, cfg Config) (c *Center, err error) {
	if cfg.RootKey == nil || cfg.OpenProvider == nil {
		return nil, errors.New("center: a root key and a way to open key providers are needed")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.HostWait == 0 {
		cfg.HostWait = 2 * time.Minute
	}
	c = &Center{cfg: cfg, log: cfg.Logger, now: cfg.Clock}
	c.store, err = store.Open(ctx, store.Config{Dir: filepath.Join(cfg.Dir, "store"), Name: cfg.Name, Logger: cfg.Logger})
	if err != nil {
		return nil, fmt.Errorf("center: %w", err)
	}
	if err := c.load(ctx); err != nil {
		c.store.Close()
		return nil, fmt.Errorf("center: opening the state in %s: %w", cfg.Dir, err)
	}
	return c, nil
}

// load opens everything in the store, what is needed by the others first.
func (c *Center) load(ctx context.Context) (err error) {
	if c.term, err = c.nextTerm(ctx); err != nil {
		return err
	}
	if c.inv, err = inventory.Open(ctx, c.store); err != nil {
		return err
	}
	c.view = c.inv.View()
	if c.events, err = event.Open(ctx, c.store, c.log, c.now); err != nil {
		return err
	}
	if c.authz, err = authz.Open(ctx, c.store, c.view, c.now); err != nil {
		return err
	}
	if c.policies, err = policy.Open(ctx, c.store); err != nil {
		return err
	}
	if c.ca, err = openAuthority(ctx, c.store, c.cfg.RootKey, c.now); err != nil {
		return err
	}
	if c.tokens, err = store.NewCollection(ctx, c.store, "join-token", store.JSON[pki.JoinRecord](1)); err != nil {
		return err
	}
	if c.known, err = store.NewCollection(ctx, c.store, "known-vm", store.JSON[knownVM](1)); err != nil {
		return err
	}
	if c.providers, err = openProviders(ctx, c); err != nil {
		return err
	}
	c.links = newLinks(c)
	if err := c.unreached(ctx); err != nil {
		return err
	}
	c.tasks, err = task.NewEngine(ctx, task.Config{Inventory: c.inv, Logger: c.log, Clock: c.now, Failpoint: c.cfg.Failpoint}, c.handlers())
	if err != nil {
		return err
	}
	c.password, err = c.authz.Bootstrap(ctx)
	return err
}

// handlers lists the tasks that are resumed after a restart.
func (c *Center) handlers() map[string]task.Handler {
	return map[string]task.Handler{
		taskCreate:      c.createVM,
		taskRegister:    c.registerVM,
		taskReconfigure: c.reconfigureVM,
		taskPower:       c.powerVM,
		taskDestroy:     c.destroyVM,
		taskUnlock:      c.unlockVM,
		taskSnapshot:    c.snapshotVM,
	}
}

// nextTerm counts the processes that have had this state open: a host refuses
// commands of an earlier one, should it still be alive somewhere.
func (c *Center) nextTerm(ctx context.Context) (int64, error) {
	terms, err := store.NewCollection(ctx, c.store, "term", store.JSON[int64](1))
	if err != nil {
		return 0, err
	}
	if _, err := c.store.Commit(ctx, terms.Create("term", 0)); err != nil && !errors.Is(err, store.ErrExists) {
		return 0, err
	}
	e, err := terms.Edit(ctx, "term", func(t *int64) error { *t++; return nil })
	return e.Value, err
}

// Run connects to the hosts, resumes tasks and serves the use cases until ctx
// ends.
func (c *Center) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return c.inv.Run(ctx) })
	g.Go(func() error { return c.ca.renew(ctx) })
	g.Go(func() error { return c.links.run(ctx) })
	g.Go(func() error { return c.tasks.Run(ctx) })
	err := g.Wait()
	if err != nil {
		return fmt.Errorf("center: %w", err)
	}
	return nil
}

// Close closes the state folder. Run must have returned.
func (c *Center) Close() error {
	c.providers.close()
	return c.store.Close()
}

// View is the live inventory.
func (c *Center) View() *inventory.View { return c.view }

// InitialPassword is the administrator's generated password, in the process
// that has made the account; empty in all others. It is kept nowhere.
func (c *Center) InitialPassword() string { return c.password }
