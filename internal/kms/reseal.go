package kms

import (
	"context"
	"errors"
	"time"

	"mortise/internal/store"
)

// Re-sealing goes on under load: it writes this many records at a time, and
// rests as long as it has worked.
const resealBatch = 64

type resealing struct {
	k     *KMS
	i     *instance
	term  store.Term
	job   *keyJob
	saved time.Time
}

// stale calls each with the records that another generation has sealed.
func (r *resealing) stale(ctx context.Context, each func(store.Record) error) error {
	names, err := r.k.store.Collections(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !r.i.ownsCollection(name) {
			continue
		}
		err := r.k.store.Scan(ctx, name, func(rec store.Record) error {
			if g, ok := generationOf(rec.Stored); ok && g != r.job.To {
				return each(rec)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *resealing) count(ctx context.Context) error {
	left := 0
	if err := r.stale(ctx, func(store.Record) error { left++; return nil }); err != nil {
		return err
	}
	r.job.Total = r.job.Done + left
	return nil
}

// pass re-seals what is stale and returns how much of it somebody else changed
// meanwhile.
func (r *resealing) pass(ctx context.Context) (left int, err error) {
	var batch []store.Record
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		begin := time.Now()
		missed, err := r.write(ctx, batch)
		if err != nil {
			return err
		}
		left += missed
		r.job.Done += len(batch) - missed
		batch = batch[:0]
		if err := r.k.keyStep("resealed some"); err != nil {
			return err
		}
		select { // leave the store to the clients
		case <-time.After(time.Since(begin)):
		case <-ctx.Done():
			return ctx.Err()
		}
		return r.save(ctx)
	}
	err = r.stale(ctx, func(rec store.Record) error {
		if batch = append(batch, rec); len(batch) == resealBatch {
			return flush()
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	return left, err
}

// write re-seals a batch in one transaction or, if somebody is changing one of
// its records, each by itself, leaving those.
func (r *resealing) write(ctx context.Context, batch []store.Record) (missed int, err error) {
	ops := make([]store.Op, 0, len(batch)+1)
	for _, rec := range batch {
		at := []byte("/" + rec.Collection + "/" + rec.Key)
		plain, err := r.i.Open(rec.Stored, at)
		if err != nil {
			// Without its old generation it will not open either, and nobody has
			// been able to use it: it stays as it is.
			r.k.log.Error("kms: a damaged record is not re-sealed", "record", string(at), "error", err)
			continue
		}
		sealed, err := r.i.Seal(plain, at)
		clear(plain)
		if err != nil {
			return 0, err
		}
		ops = append(ops, store.Rewrite(rec, sealed))
	}
	if len(ops) == 0 {
		return 0, nil
	}
	_, err = r.k.commitSealed(ctx, r.i, append(ops, r.term.Guard())...)
	if !gone(err) {
		return 0, err
	}
	for _, op := range ops {
		_, err := r.k.commitSealed(ctx, r.i, op, r.term.Guard())
		if gone(err) {
			missed++
		} else if err != nil {
			return missed, err
		}
	}
	return missed, nil
}

// gone: the record has been changed or deleted since it was read.
func gone(err error) bool {
	return errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound)
}

// save makes the progress visible, now and then.
func (r *resealing) save(ctx context.Context) error {
	if time.Since(r.saved) < time.Second {
		return nil
	}
	r.saved = time.Now()
	e, ok := r.k.jobs.Peek(r.i.id)
	if !ok {
		return nil
	}
	_, err := r.k.store.Commit(ctx, r.k.jobs.Update(r.i.id, e.Revision, *r.job), r.term.Guard())
	return err
}
