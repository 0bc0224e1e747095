package kms

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"mortise/internal/store"
)

// Destroying a key ends its use at once. Its bytes, sealed, are in the store for
// the grace time, and after they have been purged from the record they are still
// in what the store keeps of the past: old revisions, raft's log, snapshots, and
// in backups. So there are three words:
//
//	destroyed   nobody is served it any more
//	purged      the current record has no bytes of it
//	shredded    whatever old bytes there are, no key that this system has opens them
//
// Shredding is for a whole instance: a new instance key, all that survives sealed
// by it, a new CRK over it, and the old CRKs destroyed on every member. What may
// then still open old bytes is outside the system, and is listed.

// A DestroyedKey is a key that was destroyed, and how far.
type DestroyedKey struct {
	ID        string    `json:"id"`
	Destroyed time.Time `json:"destroyed"`
	Bytes     string    `json:"bytes" doc:"kept: sealed, until purgeAfter; purged: gone from its record, not from old revisions and backups; shredded: nothing in the system opens what is left of it"`
	// PurgeAfter is when the grace time ends.
	PurgeAfter time.Time `json:"purgeAfter,omitzero"`
}

// What has become of the bytes of a destroyed key.
const (
	BytesKept     = "kept"
	BytesPurged   = "purged"
	BytesShredded = "shredded"
)

// A KeyChange is a change of an instance's keys, under way or done.
type KeyChange struct {
	Kind    string    `json:"kind" doc:"rotate-key, rotate-crk or shred"`
	Stage   string    `json:"stage" doc:"what is being done; empty when all is done"`
	By      string    `json:"by"`
	Begun   time.Time `json:"begun"`
	Since   time.Time `json:"since" doc:"when the stage began"`
	Ended   time.Time `json:"ended,omitzero"`
	Total   int       `json:"total,omitempty" doc:"records to re-seal"`
	Done    int       `json:"done,omitempty"`
	Purged  int       `json:"purged,omitempty" doc:"keys that a shred purged"`
	CRK     string    `json:"crk,omitempty" doc:"the new CRK"`
	Failure string    `json:"failure,omitempty" doc:"what holds it up; it is tried again"`
}

// KeyStatus is an instance's keys: what seals, what opens, and what has become
// of destroyed ones.
type KeyStatus struct {
	Instance    string         `json:"instance"`
	CRK         string         `json:"crk"`
	Provider    string         `json:"provider"`
	Generation  uint32         `json:"generation" doc:"of the instance key, which seals"`
	Generations []uint32       `json:"generations" doc:"all that open"`
	Change      *KeyChange     `json:"change,omitempty" doc:"under way, or the last one"`
	Destroyed   []DestroyedKey `json:"destroyed"`
	// StillOpens is empty when nothing is destroyed.
	StillOpens []string `json:"stillOpens" doc:"what could still bring back the bytes of destroyed keys, a line each"`
}

// KeyStatus tells how an instance's keys stand.
func (k *KMS) KeyStatus(ctx context.Context, instance string) (KeyStatus, error) {
	i, err := k.instance(ctx, instance)
	if err != nil {
		return KeyStatus{}, err
	}
	e, err := k.records.Get(ctx, instance)
	if err != nil {
		return KeyStatus{}, fmt.Errorf("kms: %w", err)
	}
	keys := i.keys.Load()
	s := KeyStatus{
		Instance: instance, CRK: e.Value.CRK, Provider: e.Value.Provider, Generation: keys.newest.generation,
		Generations: slices.Sorted(maps.Keys(keys.seals)), Destroyed: []DestroyedKey{}, StillOpens: []string{},
	}
	var job keyJob
	if j, ok := k.jobs.Peek(instance); ok {
		job = j.Value
		s.Change = &KeyChange{Kind: job.Kind, Stage: job.Stage, By: job.By, Begun: job.Begun, Since: job.Since, Ended: job.Ended,
			Total: job.Total, Done: job.Done, Purged: job.Purged, CRK: job.CRK, Failure: job.Failure}
	}
	entries, err := i.objects.List(ctx, "")
	if err != nil && !errors.Is(err, store.ErrDamaged) {
		return s, fmt.Errorf("kms: listing objects: %w", err)
	}
	for _, o := range entries {
		if o.Value.gone() {
			s.Destroyed = append(s.Destroyed, destroyedKey(o.Key, o.Value, e.Value.Shredded))
		}
	}
	if len(s.Destroyed) > 0 {
		s.StillOpens, err = k.stillOpens(ctx, instance, e.Value, s.Destroyed)
	}
	return s, err
}

func destroyedKey(id string, o *object, shredded time.Time) DestroyedKey {
	d := DestroyedKey{ID: id, Destroyed: o.Destroyed, Bytes: BytesKept, PurgeAfter: o.Destroyed.Add(GraceTime)}
	if o.material == 0 {
		d.Bytes, d.PurgeAfter = BytesPurged, time.Time{}
		// Purging sets Last Change; what changes a purged object after the shred
		// makes us say less than we know.
		if o.LastChange.Before(shredded) {
			d.Bytes = BytesShredded
		}
	}
	return d
}

// stillOpens lists what could bring back the bytes of destroyed keys.
func (k *KMS) stillOpens(ctx context.Context, instance string, r instanceRecord, destroyed []DestroyedKey) (lines []string, err error) {
	all, err := k.crksOf(ctx, instance)
	if err != nil {
		return nil, err
	}
	count := map[string]int{}
	for _, d := range destroyed {
		count[d.Bytes]++
	}
	if n := count[BytesKept]; n > 0 {
		lines = append(lines, fmt.Sprintf("the store itself has the bytes of %d keys until their grace time ends; to purge them now: mortise kms key purge --all", n))
	}
	if n := count[BytesKept] + count[BytesPurged]; n > 0 {
		lines = append(lines, fmt.Sprintf("the store's old revisions and logs on every member have the bytes of %d keys, under CRK %s; to end that: mortise kms key shred", n, r.CRK))
	}
	old := map[string]bool{}
	for _, c := range all {
		id, rec := c.Key, c.Value
		old[id] = true
		if rec.State == CRKDestroying {
			lines = append(lines, fmt.Sprintf("CRK %s is still to be destroyed on: %s", id, strings.Join(k.unconfirmed(rec), ", ")))
		}
		if rec.State == CRKRetired {
			lines = append(lines, fmt.Sprintf("CRK %s is retired and opens what it wrapped until %s; to destroy it: mortise kms crk delete %s", id, rec.Changed.Format(time.RFC3339), id))
		}
		switch {
		case rec.State == CRKUnused:
		case rec.Imported:
			lines = append(lines, fmt.Sprintf("whoever made CRK %s (check value %s) may have kept it: with it, and a copy of the store from its time, old bytes open", id, rec.Check))
		case rec.Provider == KindFile:
			lines = append(lines, fmt.Sprintf("copies of a member's crk.sealed that have CRK %s%s, with the passphrase or the TPM of their time and a copy of the store", id, untilChanged(rec)))
		default:
			lines = append(lines, fmt.Sprintf("copies of the token that have CRK %s%s, with their PIN and a copy of the store", id, untilChanged(rec)))
		}
	}
	backups, err := k.backups.List(ctx, "")
	if err != nil {
		return lines, fmt.Errorf("kms: listing backups: %w", err)
	}
	for _, b := range backups {
		if slices.ContainsFunc(b.Value.CRKs, func(id string) bool { return old[id] }) {
			lines = append(lines, fmt.Sprintf("backup %s of %s, with its password, for keys that were destroyed after it; once all its copies are gone: mortise kms backup forget %s", b.Value.ID, b.Value.Time.Format(time.RFC3339), b.Value.ID))
		}
	}
	return lines, nil
}

func untilChanged(r crkRecord) string {
	if r.State.ended() {
		return ", made before " + r.Changed.Format(time.RFC3339)
	}
	return ""
}

// Purge drops the bytes of destroyed keys before their grace time is over; no id
// means of all of them. hash agrees to the list.
func (k *KMS) Purge(ctx context.Context, by Actor, instance string, ids []string, hash string) (purged int, err error) {
	i, err := k.instance(ctx, instance)
	if err != nil {
		return 0, err
	}
	targets, err := k.toPurge(ctx, i, ids)
	if err != nil {
		return 0, err
	}
	var lost []string
	for _, e := range targets {
		lost = append(lost, fmt.Sprintf("object %s of instance %s, destroyed at %s", e.Key, instance, e.Value.Destroyed.UTC().Format(time.RFC3339)))
	}
	if len(lost) == 0 {
		return 0, nil
	}
	if err := Confirm("purge keys of instance "+instance, lost, hash); err != nil {
		return 0, err
	}
	for chunk := range slices.Chunk(targets, 100) {
		ops := make([]store.Op, 0, len(chunk))
		for _, e := range chunk {
			o := *e.Value
			o.purgeNow(k.now().UTC())
			ops = append(ops, i.objects.Update(e.Key, e.Revision, &o))
		}
		if err := k.commitAs(ctx, by, i, "key purge", subjects(chunk), ops...); err != nil {
			return purged, fmt.Errorf("kms: purging: %w", err)
		}
		purged += len(chunk)
	}
	k.log.Warn("kms: keys purged", "instance", instance, "count", purged, "by", by.Name)
	return purged, nil
}

func subjects(list []store.Entry[*object]) string {
	var ids []string
	for _, e := range list {
		ids = append(ids, e.Key)
	}
	return strings.Join(ids, ",")
}

// toPurge returns the destroyed objects that still have bytes, of those that are
// named if any are.
func (k *KMS) toPurge(ctx context.Context, i *instance, ids []string) (list []store.Entry[*object], err error) {
	if len(ids) > 0 {
		for _, id := range ids {
			e, err := i.objects.Get(ctx, id)
			if err != nil {
				return nil, fmt.Errorf("kms: purging %s: %w", id, err)
			}
			if !e.Value.gone() {
				return nil, fmt.Errorf("kms: %w: object %s is %s; only a destroyed key is purged", ErrInvalid, id, stateName(e.Value.State))
			}
			if e.Value.material > 0 {
				list = append(list, e)
			}
		}
		return list, nil
	}
	entries, err := i.objects.List(ctx, "")
	if err != nil && !errors.Is(err, store.ErrDamaged) {
		return nil, fmt.Errorf("kms: listing objects: %w", err)
	}
	for _, e := range entries {
		if e.Value.gone() && e.Value.material > 0 {
			list = append(list, e)
		}
	}
	return list, nil
}

// purgeNow drops the material of a destroyed object.
func (o *object) purgeNow(now time.Time) {
	o.material, o.Digest, o.LastChange = 0, nil, now
}

// Shred begins to shred the purged keys of an instance, and with purgeAll first
// purges all that are destroyed. hash agrees to the list of them.
func (k *KMS) Shred(ctx context.Context, by Actor, instance string, purgeAll bool, hash string) error {
	i, err := k.instance(ctx, instance)
	if err != nil {
		return err
	}
	entries, err := i.objects.List(ctx, "")
	if err != nil && !errors.Is(err, store.ErrDamaged) {
		return fmt.Errorf("kms: listing objects: %w", err)
	}
	var lost []string
	for _, e := range entries {
		if o := e.Value; o.gone() && (purgeAll || o.material == 0 || k.due(o)) {
			lost = append(lost, fmt.Sprintf("object %s of instance %s, destroyed at %s", e.Key, instance, o.Destroyed.UTC().Format(time.RFC3339)))
		}
	}
	all, err := k.crksOf(ctx, instance)
	if err != nil {
		return err
	}
	for _, c := range all {
		if !c.Value.State.ended() && c.Value.State != CRKUnused {
			lost = append(lost, fmt.Sprintf("CRK %s: copies of the store from its time open only where a backup has kept it", c.Key))
		}
	}
	if err := Confirm("shred the destroyed keys of instance "+instance, lost, hash); err != nil {
		return err
	}
	return k.begin(ctx, by, instance, "key shred", keyJob{Kind: jobShred, PurgeAll: purgeAll})
}

// due: the grace time is over.
func (k *KMS) due(o *object) bool {
	earliest, _ := k.clock.Bounds()
	return earliest.Sub(o.Destroyed) >= GraceTime
}

// jobPurge drops the bytes that must not be sealed again with the survivors.
func (k *KMS) jobPurge(ctx context.Context, term store.Term, instance string, job *keyJob) ([]store.Op, error) {
	i, err := k.instance(ctx, instance)
	if err != nil {
		return nil, err
	}
	// Records have seconds. What this stage purges is dated the second before it,
	// and what others purge from now on is not, so that there is no doubt which
	// was first.
	job.PurgedAt = k.now().UTC().Truncate(time.Second)
	for again := true; again; {
		again = false
		targets, err := k.toPurge(ctx, i, nil)
		if err != nil {
			return nil, err
		}
		for _, e := range targets {
			if !job.PurgeAll && !k.due(e.Value) {
				continue
			}
			o := *e.Value
			o.purgeNow(job.PurgedAt.Add(-time.Second))
			_, err := k.commitByDate(ctx, i, "bytes dropped", e.Key, "key shred", i.objects.Update(e.Key, e.Revision, &o), term.Guard())
			if gone(err) {
				again = true
				continue
			}
			if err != nil {
				return nil, err
			}
			job.Purged++
			if err := k.keyStep("purged one"); err != nil {
				return nil, err
			}
		}
	}
	return nil, nil
}
