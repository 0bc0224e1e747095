package center

import (
	"context"
	"fmt"

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

// were begins a sentence about n things: "1 key was", "2 keys were".
func were(n int, what string) string {
	if n == 1 {
		return "1 " + what + " was"
	}
	return fmt.Sprintf("%d %ss were", n, what)
}
