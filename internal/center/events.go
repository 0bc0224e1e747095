package center

import (
	"context"

	"mortise/internal/authz"
	"mortise/internal/inventory"
)

// Events returns the events after id, oldest first, the newest max of them.
func (c *Center) Events(ctx context.Context, p Principal, after int64, max int) ([]Event, error) {
	if err := c.Check(p, authz.View, inventory.RootFolder); err != nil {
		return nil, err
	}
	list, err := c.events.After(ctx, after, max)
	return list, storeFault("reading the events", err)
}
