package cluster

import (
	"context"
	"errors"
	"fmt"

	"mortise/internal/store"
)

const formatKey = "records"

// raiseFormat, on one member at a time, raises the format of records that the
// members write to the highest that every one of them knows (design §1). It never
// goes down: records of that format may exist. So members are upgraded one by
// one, old and new side by side, and only after the last does a new format show.
func (n *Node) raiseFormat(ctx context.Context, term store.Term) error {
	st, err := n.attached()
	if err != nil {
		return err
	}
	w := n.store.Watch("member")
	defer w.Close()
	for {
		if err := n.raiseOnce(ctx, st, term); err != nil {
			return err
		}
		if _, err := w.Next(ctx); err != nil {
			return err
		}
	}
}

func (n *Node) raiseOnce(ctx context.Context, st *state, term store.Term) error {
	entries, err := st.members.List(ctx, "")
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	// Whoever joins between this look and the write knows the format that is
	// written then, or is refused: joining compares, and so does each start.
	// Update of the own record guards against a list that has changed since.
	lowest := 0
	ops := []store.Op{term.Guard()}
	for _, e := range entries {
		if lowest == 0 || e.Value.Format < lowest {
			lowest = e.Value.Format
		}
		ops = append(ops, st.members.Unchanged(e.Key, e.Revision))
	}
	now, err := st.format.Get(ctx, formatKey)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("cluster: %w", err)
	}
	if lowest <= now.Value {
		return nil
	}
	if _, err := n.store.Commit(ctx, append(ops, st.format.Put(formatKey, lowest))...); err != nil {
		return fmt.Errorf("cluster: raising the record format: %w", err)
	}
	n.log.Info("every member knows this record format; it is written from now on", "format", lowest)
	return nil
}
