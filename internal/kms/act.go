package kms

import (
	"context"
	"errors"
	"fmt"

	"mortise/internal/store"
)

// maxTries bounds how often an administrator's act is begun anew because somebody
// else was faster. A change of keys gets in the way of an act once or twice.
const maxTries = 20

// act makes an administrator's act: the writes that prepare returns, in one
// transaction with their audit entry. prepare runs again, on what is there by
// then, when somebody else has changed a record that the act compares, or the
// instance's key has been rotated meanwhile.
func (k *KMS) act(ctx context.Context, by Actor, inst *instance, act, subject string, prepare func() ([]store.Op, error)) error {
	for try := 1; ; try++ {
		ops, err := prepare()
		if err != nil {
			return err
		}
		err = k.commitAs(ctx, by, inst, act, subject, ops...)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, store.ErrConflict):
			return fmt.Errorf("kms: %s %s: %w", act, subject, err)
		case try == maxTries:
			return fmt.Errorf("kms: %s %s: others were faster %d times: %w", act, subject, try, err)
		}
		if err := k.store.Sync(ctx); err != nil {
			return err
		}
	}
}
