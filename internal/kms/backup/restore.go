package backup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"mortise/internal/kms"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// Names in a state folder.
const (
	storeName = "store" // the store's folder
	// restoring is where a restore builds. While it is there the folder belongs
	// to the restore, and the store's folder tells whether that is complete.
	restoring = "restoring"
)

// An Adopter keeps root keys that are shared with it; a keyring is one.
type Adopter interface {
	Adopt(ctx context.Context, share *secret.Key) error
	Close() error
}

// Options of a restore.
type Options struct {
	File       string
	Identities []age.Identity
	StateDir   string // where the KMS is to live; empty but for what is in Allowed
	Member     string // name of the one member
	// KeyringName is the file in the state folder that holds root keys, and
	// NewKeyring makes one at a path.
	KeyringName string
	NewKeyring  func(path string) (Adopter, error)
	// Allowed are other names that the state folder may have before.
	Allowed   []string
	Aftermath Aftermath
	Logger    *slog.Logger     // nil: none
	Now       func() time.Time // nil: time.Now

	step func(string) error // a test's failpoint, before each step
}

// A Result is what a restore has done.
type Result struct {
	Summary
	Quarantine kms.Quarantine `json:"quarantine"`
	Acts       []kms.Act      `json:"acts"` // that the KMS does again when it is unlocked
}

// ErrNotEmpty: the state folder holds something.
var ErrNotEmpty = errors.New("the state folder is not empty")

// Restore makes the state folder of a KMS of one member out of a backup. The KMS
// starts quarantined. Nothing is written before the whole file was read and
// found good. A restore that was interrupted is begun again by the next; what it
// left is no state folder, and Interrupted tells so.
func Restore(ctx context.Context, o Options) (*Result, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.step == nil {
		o.step = func(string) error { return nil }
	}
	if err := o.checkFolder(); err != nil {
		return nil, err
	}
	has := map[object]bool{}
	keys := 0
	s, err := readFile(o.File, o.Identities, visitor{
		rootKeys: func(kind string, _ *secret.Key) error {
			keys++
			return o.knows(kind)
		},
		record: func(r store.Record) error {
			if kms.LeftOutOfBackup(r.Collection) {
				return fmt.Errorf("%w: it has records of collection %s, which is in no backup", ErrDamaged, r.Collection)
			}
			if instance, is := strings.CutPrefix(r.Collection, "object-"); is {
				has[object{instance, r.Key}], has[object{"", r.Key}] = true, true
			}
			return nil
		},
	})
	if err != nil {
		return nil, err
	}
	now := o.Now()
	if now.Before(s.Created.Add(-clockSlack)) {
		return nil, fmt.Errorf("backup: this machine's clock says %s, and the backup was made later, at %s: set the clock", now.UTC().Format(time.RFC3339), s.Created.UTC().Format(time.RFC3339))
	}
	q, acts := o.Aftermath.quarantine(s, func(x object) bool { return has[x] })
	q.Restored = now.UTC().Truncate(time.Second)
	marks, err := kms.QuarantineRecords(q, acts, s.Revision+1)
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	if err := o.build(ctx, s, keys > 0, marks); err != nil {
		return nil, err
	}
	if err := o.moveIn(keys > 0); err != nil {
		return nil, err
	}
	q.Acts = len(acts)
	return &Result{Summary: s, Quarantine: q, Acts: acts}, nil
}

func (o *Options) knows(kind string) error {
	if kind != kms.KindFile {
		return fmt.Errorf("%w: it holds root keys of a provider of kind %.20q", ErrNewer, kind)
	}
	return nil
}

func (o *Options) path(parts ...string) string {
	return filepath.Join(append([]string{o.StateDir}, parts...)...)
}

// checkFolder makes sure that a restore destroys nothing, and clears away what
// an interrupted one has left.
func (o *Options) checkFolder() error {
	entries, err := os.ReadDir(o.StateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	var names []string
	for _, e := range entries {
		if !slices.Contains(o.Allowed, e.Name()) {
			names = append(names, e.Name())
		}
	}
	if len(names) == 0 {
		return nil
	}
	if !slices.Contains(names, restoring) {
		return fmt.Errorf("backup: %w: %s holds %s; restore to another folder, or move it away", ErrNotEmpty, o.StateDir, strings.Join(names, ", "))
	}
	if slices.Contains(names, storeName) {
		// The last rename was made, and only the tidying up is missing.
		if err := o.tidy(); err != nil {
			return err
		}
		return fmt.Errorf("backup: %w: an earlier restore to %s is complete; start the key server there", ErrNotEmpty, o.StateDir)
	}
	for _, name := range names {
		if name != restoring && name != o.KeyringName {
			return fmt.Errorf("backup: %w: %s holds %s beside what an interrupted restore left; move it away", ErrNotEmpty, o.StateDir, name)
		}
	}
	// The keyring goes first: without the mark beside it, it would look like
	// somebody's.
	if err := os.RemoveAll(o.path(o.KeyringName)); err != nil {
		return fmt.Errorf("backup: clearing away an interrupted restore: %w", err)
	}
	return o.tidy()
}

func (o *Options) tidy() error {
	if err := os.RemoveAll(o.path(restoring)); err != nil {
		return fmt.Errorf("backup: clearing away %s: %w", o.path(restoring), err)
	}
	return syncDir(o.StateDir)
}

// build makes the parts of the state folder in the restoring folder.
func (o *Options) build(ctx context.Context, s Summary, keyring bool, marks []store.Record) error {
	for _, dir := range []string{o.StateDir, o.path(restoring)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("backup: %w", err)
		}
	}
	if err := errors.Join(syncDir(filepath.Dir(o.StateDir)), syncDir(o.StateDir)); err != nil {
		return err
	}
	if err := o.step("build"); err != nil {
		return err
	}
	var ring Adopter
	if keyring {
		var err error
		if ring, err = o.NewKeyring(o.path(restoring, o.KeyringName)); err != nil {
			return fmt.Errorf("backup: making the file of root keys: %w", err)
		}
		defer ring.Close()
	}
	cfg := store.Config{Dir: o.path(restoring, storeName), Name: o.Member, Logger: o.Logger}
	return store.Restore(ctx, cfg, s.Revision+1, func(each func(store.Record) error) error {
		again, err := readFile(o.File, o.Identities, visitor{
			rootKeys: func(kind string, share *secret.Key) error {
				if err := o.step("root keys"); err != nil {
					return err
				}
				return ring.Adopt(ctx, share)
			},
			record: each,
		})
		if err != nil {
			return err
		}
		if again.ID != s.ID || again.Revision != s.Revision || again.Records != s.Records {
			return fmt.Errorf("backup: %s was changed while it was read", o.File)
		}
		for _, r := range marks {
			if err := each(r); err != nil {
				return err
			}
		}
		return o.step("records")
	})
}

// moveIn makes the parts a state folder. The store's folder comes last: with it
// the restore is complete.
func (o *Options) moveIn(keyring bool) error {
	names := []string{storeName}
	if keyring {
		names = []string{o.KeyringName, storeName}
	}
	for _, name := range names {
		if err := o.step("move " + name); err != nil {
			return err
		}
		if err := os.Rename(o.path(restoring, name), o.path(name)); err != nil {
			return fmt.Errorf("backup: %w", err)
		}
		if err := syncDir(o.StateDir); err != nil {
			return err
		}
	}
	if err := o.step("tidy"); err != nil {
		return err
	}
	return o.tidy()
}

// Interrupted tells whether a restore to a state folder was begun and is not
// complete: nobody may start a key server there.
func Interrupted(stateDir string) bool {
	_, err := os.Stat(filepath.Join(stateDir, restoring))
	_, there := os.Stat(filepath.Join(stateDir, storeName))
	return err == nil && there != nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("backup: syncing %s: %w", dir, err)
	}
	return nil
}
