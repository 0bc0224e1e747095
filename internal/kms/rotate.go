package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"mortise/internal/store"
)

// A change of an instance's keys takes several steps, each durable by itself. The
// job that leads through them is a record: the member that holds the office
// "keys" works on it, and whoever holds the office next goes on where it stands.
//
//	rotate the instance key (S5):  prepare → activate → reseal → retire
//	rotate the CRK (S4, S5):       crk → spread → rewrap
//	shred (S6):                    purge → prepare → activate → reseal → crk → spread → rewrap → destroy
//
// An instance has one job at a time; the record of the last one stays, to be
// shown.
type keyJob struct {
	Kind  string
	Stage string // of stagesOf(Kind); "" once it is done
	By    string // who began it
	Begun time.Time
	Since time.Time // of the stage
	Ended time.Time

	PurgeAll bool      // shred: also keys whose grace time is not over
	Purged   int       // shred: how many keys were purged by it
	PurgedAt time.Time // shred: what had no bytes then is shredded in the end
	To       uint32    // generation that records are sealed with, once prepared
	Total    int       // records to re-seal, and how many are
	Done     int
	Provider string   // of the new CRK
	CRK      string   // the new one, once made
	Old      []string // CRKs that it took out of use
	Failure  string   // what holds it up
}

const (
	jobRotateKey = "rotate-key"
	jobRotateCRK = "rotate-crk"
	jobShred     = "shred"
)

func (j keyJob) finished() bool { return j.Stage == "" }

// A stage does its work, which may be done again from its beginning, and returns
// what is to be committed together with the step to the next stage.
type stage struct {
	name string
	run  func(*KMS, context.Context, store.Term, string, *keyJob) ([]store.Op, error)
}

func stagesOf(kind string) []stage {
	var (
		purge    = stage{"purge", (*KMS).jobPurge}
		prepare  = stage{"prepare", (*KMS).jobPrepare}
		activate = stage{"activate", (*KMS).jobActivate}
		reseal   = stage{"reseal", (*KMS).jobReseal}
		retire   = stage{"retire", (*KMS).jobRetire}
		crk      = stage{"crk", (*KMS).jobCRK}
		spread   = stage{"spread", (*KMS).jobSpread}
		rewrap   = stage{"rewrap", (*KMS).jobRewrap}
		destroy  = stage{"destroy", (*KMS).jobDestroy}
	)
	switch kind {
	case jobRotateKey:
		return []stage{prepare, activate, reseal, retire}
	case jobRotateCRK:
		return []stage{crk, spread, rewrap}
	case jobShred:
		return []stage{purge, prepare, activate, reseal, crk, spread, rewrap, destroy}
	}
	return nil
}

// ErrJobRunning: the instance's keys are being changed already.
var ErrJobRunning = errors.New("the instance's keys are being changed")

// RotateKey begins to replace an instance's key: new records are sealed with the
// new one at once, the others are re-sealed in the background (S5).
func (k *KMS) RotateKey(ctx context.Context, by Actor, instance string) error {
	return k.begin(ctx, by, instance, "key rotate", keyJob{Kind: jobRotateKey})
}

// RotateCRK begins to put an instance under another CRK: the one called crk,
// which was imported, or a new one at the provider of that kind; "" is the
// instance's present one. The old CRK is kept, for backups, until it is deleted.
func (k *KMS) RotateCRK(ctx context.Context, by Actor, instance, crk, kind string) error {
	job := keyJob{Kind: jobRotateCRK, CRK: crk, Provider: kind}
	if crk != "" {
		e, err := k.crks.Get(ctx, crk)
		if errors.Is(err, store.ErrNotFound) {
			return fmt.Errorf("kms: %w: %q", ErrUnknownCRK, crk)
		}
		if err != nil {
			return fmt.Errorf("kms: %w", err)
		}
		if e.Value.State != CRKUnused || !e.Value.Imported {
			return fmt.Errorf("kms: %w: CRK %s is %s; one CRK serves one instance, once", ErrCRKInUse, crk, e.Value.State)
		}
		job.Provider = e.Value.Provider
	}
	if job.Provider != "" {
		if _, err := k.provider(job.Provider); err != nil {
			return err
		}
	}
	return k.begin(ctx, by, instance, "crk rotate", job)
}

func (k *KMS) begin(ctx context.Context, by Actor, instance, act string, job keyJob) error {
	if _, err := k.instance(ctx, instance); err != nil {
		return err
	}
	now := k.now().UTC()
	job.By, job.Begun, job.Since, job.Stage = by.Name, now, now, stagesOf(job.Kind)[0].name
	e, err := k.jobs.Get(ctx, instance)
	op := k.jobs.Update(instance, e.Revision, job)
	switch {
	case errors.Is(err, store.ErrNotFound):
		op = k.jobs.Create(instance, job)
	case err != nil:
		return fmt.Errorf("kms: %w", err)
	case !e.Value.finished():
		return fmt.Errorf("kms: %w: %s of instance %s, begun at %s, is at %q", ErrJobRunning, e.Value.Kind, instance, e.Value.Begun.Format(time.RFC3339), e.Value.Stage)
	}
	if err := k.commitAs(ctx, by, nil, act, instance, op); err != nil {
		return fmt.Errorf("kms: %s of instance %s: %w", act, instance, err)
	}
	k.log.Info("kms: change of keys begun", "instance", instance, "change", job.Kind, "by", by.Name)
	return nil
}

// runJobs works on the jobs whenever this member holds the office.
func (k *KMS) runJobs(ctx context.Context) {
	k.store.Lead(ctx, "keys", func(ctx context.Context, term store.Term) error {
		w := k.store.Watch("keyjob")
		defer w.Close()
		for {
			entries, err := k.jobs.List(ctx, "")
			if err != nil {
				return err
			}
			for _, e := range entries {
				if err := k.runJob(ctx, term, e.Key); err != nil && ctx.Err() == nil {
					k.log.Warn("kms: a change of keys is held up; it is tried again", "instance", e.Key, "change", e.Value.Kind, "error", err)
					k.noteFailure(ctx, term, e.Key, err)
				}
			}
			wait, cancel := context.WithTimeout(ctx, keepUpEvery)
			_, _ = w.Next(wait)
			cancel()
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	})
}

// runJob takes a job from stage to stage until it is done.
func (k *KMS) runJob(ctx context.Context, term store.Term, instance string) error {
	for {
		e, err := k.jobs.Get(ctx, instance)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err != nil || e.Value.finished() {
			return err
		}
		job := e.Value
		all := stagesOf(job.Kind)
		at := slices.IndexFunc(all, func(s stage) bool { return s.name == job.Stage })
		if at < 0 {
			return fmt.Errorf("a job %q at stage %q: this program does not know it", job.Kind, job.Stage)
		}
		ops, err := all[at].run(k, ctx, term, instance, &job)
		now := k.now().UTC()
		switch {
		case errors.Is(err, errAgain):
			job.Stage, job.Failure = "crk", ""
		case errors.Is(err, errHopeless):
			job.Stage, job.Ended, job.Failure = "", now, err.Error()
		case err != nil:
			return fmt.Errorf("%s: %w", job.Stage, err)
		case at+1 < len(all):
			job.Stage, job.Failure = all[at+1].name, ""
		default:
			job.Stage, job.Ended, job.Failure = "", now, ""
		}
		job.Since = now
		// A stage may have saved its progress.
		last, ok := k.jobs.Peek(instance)
		if !ok {
			return nil // its instance is gone
		}
		_, err = k.store.Commit(ctx, append(ops, k.jobs.Update(instance, last.Revision, job), term.Guard())...)
		if errors.Is(err, store.ErrConflict) { // some record has changed meanwhile: the stage again
			if err := k.store.Sync(ctx); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", all[at].name, err)
		}
		k.log.Info("kms: change of keys", "instance", instance, "change", job.Kind, "done", all[at].name)
		if err := k.keyStep(all[at].name + " done"); err != nil {
			return err
		}
	}
}

// noteFailure shows what holds a job up.
func (k *KMS) noteFailure(ctx context.Context, term store.Term, instance string, failure error) {
	e, err := k.jobs.Get(ctx, instance)
	if err != nil || e.Value.finished() || e.Value.Failure == failure.Error() {
		return
	}
	e.Value.Failure = failure.Error()
	_, _ = k.store.Commit(ctx, k.jobs.Update(instance, e.Revision, e.Value), term.Guard())
}

// jobPrepare makes a new generation of the instance key. Nothing is sealed with
// it yet.
func (k *KMS) jobPrepare(ctx context.Context, _ store.Term, instance string, job *keyJob) ([]store.Op, error) {
	e, err := k.records.Get(ctx, instance)
	if err != nil {
		return nil, err
	}
	root, err := k.provider(e.Value.Provider)
	if err != nil {
		return nil, err
	}
	r := e.Value
	for _, w := range r.Keys {
		job.To = max(job.To, w.Generation+1)
	}
	wrapped, err := wrapNew(ctx, root, r.CRK, keyBinding(instance, job.To))
	if err != nil {
		return nil, err
	}
	r.Keys = append(slices.Clone(r.Keys), wrappedKey{job.To, wrapped})
	return []store.Op{k.records.Update(instance, e.Revision, r)}, nil
}

// jobActivate lets the new generation seal, once the members can open what it
// seals.
func (k *KMS) jobActivate(ctx context.Context, _ store.Term, instance string, job *keyJob) ([]store.Op, error) {
	err := k.spread(ctx, fmt.Sprintf("generation %d of the instance key", job.To), func(h holdings) bool { return h.Generations[instance] >= job.To })
	if err != nil {
		return nil, err
	}
	if e, ok := k.sealing.Peek(instance); ok {
		return []store.Op{k.sealing.Update(instance, e.Revision, sealingRecord{job.To})}, nil
	}
	return []store.Op{k.sealing.Create(instance, sealingRecord{job.To})}, nil
}

// jobReseal re-seals every record of the instance, whatever it is, until none is
// left that another generation has sealed: none comes back (see commitSealed).
func (k *KMS) jobReseal(ctx context.Context, term store.Term, instance string, job *keyJob) ([]store.Op, error) {
	i, err := k.instance(ctx, instance)
	if err != nil {
		return nil, err
	}
	if err := k.refresh(ctx, i); err != nil {
		return nil, err
	}
	if g := i.keys.Load().newest.generation; g != job.To {
		return nil, fmt.Errorf("generation %d seals, not %d", g, job.To)
	}
	r := &resealing{k: k, i: i, term: term, job: job}
	if err := r.count(ctx); err != nil {
		return nil, err
	}
	for {
		left, err := r.pass(ctx)
		if err == nil && left == 0 {
			err = k.resealAuditKeys(ctx, i, term.Guard())
		}
		if err != nil || left == 0 {
			job.Done = job.Total
			return nil, err
		}
	}
}

// jobRetire drops the generations before the new one.
func (k *KMS) jobRetire(ctx context.Context, _ store.Term, instance string, job *keyJob) ([]store.Op, error) {
	e, err := k.records.Get(ctx, instance)
	if err != nil {
		return nil, err
	}
	r := e.Value
	r.Keys = slices.DeleteFunc(slices.Clone(r.Keys), func(w wrappedKey) bool { return w.Generation < job.To })
	return []store.Op{k.records.Update(instance, e.Revision, r)}, nil
}

// jobCRK makes the new CRK. In one transaction it is made and the job's.
func (k *KMS) jobCRK(ctx context.Context, term store.Term, instance string, job *keyJob) ([]store.Op, error) {
	if job.CRK != "" {
		return nil, nil
	}
	if job.Provider == "" {
		e, err := k.records.Get(ctx, instance)
		if err != nil {
			return nil, err
		}
		job.Provider = e.Value.Provider
	}
	root, err := k.provider(job.Provider)
	if err != nil {
		return nil, err
	}
	_, done, err := k.mint(ctx, crkRecord{Provider: job.Provider, Instance: instance, State: CRKUnused},
		func(id string) error { return root.Create(ctx, id) },
		func(id string, op store.Op) error {
			last, err := k.jobs.Get(ctx, instance)
			if err != nil {
				return err
			}
			job.CRK = id
			_, err = k.store.Commit(ctx, op, k.jobs.Update(instance, last.Revision, *job), term.Guard())
			return err
		})
	done()
	return nil, err
}

// Ends of a stage that are neither done nor to be tried as they are.
var (
	errAgain    = errors.New("the new CRK is lost; another is made")
	errHopeless = errors.New("the change of keys has ended, nothing is changed")
)

// jobSpread waits until the new CRK is not on one member only. One that no member
// has any more, because its maker is gone for good, is given up.
func (k *KMS) jobSpread(ctx context.Context, _ store.Term, _ string, job *keyJob) ([]store.Op, error) {
	err := k.spread(ctx, "CRK "+job.CRK, func(h holdings) bool { return slices.Contains(h.CRKs, job.CRK) })
	if !errors.Is(err, errNowhere) {
		return nil, err
	}
	e, gerr := k.crks.Get(ctx, job.CRK)
	if gerr != nil {
		return nil, gerr
	}
	e.Value.State, e.Value.Changed = CRKDestroying, k.now().UTC()
	ops := []store.Op{k.crks.Update(e.Key, e.Revision, e.Value)}
	if e.Value.Imported && job.Kind == jobRotateCRK {
		return ops, fmt.Errorf("%w: %w; import it again", errHopeless, err)
	}
	job.CRK = ""
	return ops, errAgain
}

// jobRewrap wraps the instance's keys under the new CRK. A shred leaves the old
// generations behind and has the old CRKs destroyed.
func (k *KMS) jobRewrap(ctx context.Context, _ store.Term, instance string, job *keyJob) ([]store.Op, error) {
	e, err := k.records.Get(ctx, instance)
	if err != nil {
		return nil, err
	}
	from, err := k.provider(e.Value.Provider)
	if err != nil {
		return nil, err
	}
	to, err := k.provider(job.Provider)
	if err != nil {
		return nil, err
	}
	move := func(wrapped, binding []byte) ([]byte, error) {
		key, err := from.Open(ctx, e.Value.CRK, wrapped, binding)
		if err != nil {
			return nil, err
		}
		defer key.Wipe()
		return wrapProven(ctx, to, job.CRK, key, binding)
	}
	r := e.Value
	r.CRK, r.Provider, r.Keys = job.CRK, job.Provider, nil
	for _, w := range e.Value.Keys {
		if w.Generation < job.To {
			continue
		}
		if w.Wrapped, err = move(w.Wrapped, keyBinding(instance, w.Generation)); err != nil {
			return nil, err
		}
		r.Keys = append(r.Keys, w)
	}
	if r.NameKey, err = move(e.Value.NameKey, nameBinding(instance)); err != nil {
		return nil, err
	}
	if err := k.keyStep("keys wrapped"); err != nil {
		return nil, err
	}
	used, err := k.inUse(ctx, job.CRK, instance)
	if err != nil {
		return nil, err
	}
	now := k.now().UTC()
	ops := []store.Op{k.records.Update(instance, e.Revision, r), used}
	old, err := k.crksOf(ctx, instance)
	if err != nil {
		return nil, err
	}
	job.Old = nil
	for _, c := range old {
		next := CRKRetired
		if job.Kind == jobShred || c.Value.State == CRKUnused || c.Value.State == CRKMaking {
			next = CRKDestroying
		}
		if c.Key == job.CRK || c.Value.State.ended() || c.Value.State == next {
			continue
		}
		c.Value.State, c.Value.Changed = next, now
		ops = append(ops, k.crks.Update(c.Key, c.Revision, c.Value))
		job.Old = append(job.Old, c.Key)
	}
	return ops, nil
}

// jobDestroy waits until every member has destroyed the old CRKs: then what was
// purged before is shredded.
func (k *KMS) jobDestroy(ctx context.Context, _ store.Term, instance string, job *keyJob) ([]store.Op, error) {
	if err := k.keepUp(ctx); err != nil {
		return nil, err
	}
	for begin := time.Now(); ; {
		all, err := k.crksOf(ctx, instance)
		if err != nil {
			return nil, err
		}
		var waiting error
		for _, c := range all {
			if c.Value.State == CRKDestroying {
				waiting = fmt.Errorf("CRK %s is still to be destroyed on %v", c.Key, k.unconfirmed(c.Value))
			}
		}
		if waiting == nil {
			e, err := k.records.Get(ctx, instance)
			if err != nil {
				return nil, err
			}
			r := e.Value
			r.Shredded = job.PurgedAt
			return []store.Op{k.records.Update(instance, e.Revision, r)}, nil
		}
		if time.Since(begin) > k.patience {
			return nil, waiting
		}
		select {
		case <-time.After(spreadPoll):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
