package kms

import (
	"context"
	"time"
)

// warnEvery is how often certificates that end soon are warned of.
const warnEvery = 24 * time.Hour

// warnForever logs, once a day, the client certificates that end within WarnAhead,
// until ctx ends.
func (k *KMS) warnForever(ctx context.Context) {
	tick := time.NewTicker(warnEvery)
	defer tick.Stop()
	for {
		k.warn(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (k *KMS) warn(ctx context.Context) {
	now := k.now()
	for _, i := range k.open() {
		entries, err := i.clients.List(ctx, "")
		if err != nil && ctx.Err() == nil {
			k.log.Error("kms: client certificates could not be looked through for their end", "instance", i.id, "error", err)
		}
		renewed := map[string]bool{}
		for _, e := range entries {
			renewed[e.Value.Replaces] = true
		}
		for _, e := range entries {
			if w := e.Value.Warning(now); w != "" && !renewed[e.Key] {
				k.log.Warn("kms: a client certificate ends; renew it with: mortise kms client renew", "instance", i.id, "client", e.Value.Name, "sha256", e.Key, "warning", w, "ends", e.Value.Ends())
			}
		}
	}
}
