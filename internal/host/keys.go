package host

import (
	"slices"
	"sync"
	"time"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

// keyCache is the host's only copy of KEKs (K2): locked memory, never a disk.
// A key is kept for the VMs that use it and wiped when the last one goes (K9).
type keyCache struct {
	now func() time.Time

	mu   sync.Mutex // protects held and the counts in it
	held map[keysafe.KeyID]*heldKey
}

type heldKey struct {
	key   *secret.Key
	vms   map[string]bool // UUIDs of the VMs that it is for
	since time.Time
}

func newKeyCache(now func() time.Time) *keyCache {
	return &keyCache{now: now, held: map[keysafe.KeyID]*heldKey{}}
}

// put takes over k for the VMs. A key that is held already only gains users;
// k is then wiped.
func (c *keyCache) put(id keysafe.KeyID, k *secret.Key, vms ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.held[id]
	if h == nil {
		h = &heldKey{key: k, vms: map[string]bool{}, since: c.now()}
		c.held[id] = h
	} else {
		k.Wipe()
	}
	for _, vm := range vms {
		h.vms[vm] = true
	}
}

// copyFor returns copies of the wanted keys, which the caller wipes, and the
// ids that the cache lacks. With any missing there are no copies. Only keys
// that center pushed for this VM count: naming a key gives no right to it.
func (c *keyCache) copyFor(vm string, want []keysafe.KeyID) (keys map[keysafe.KeyID]*secret.Key, missing []keysafe.KeyID, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range want {
		if h := c.held[id]; (h == nil || !h.vms[vm]) && !slices.Contains(missing, id) {
			missing = append(missing, id)
		}
	}
	if len(missing) > 0 {
		return nil, missing, nil
	}
	keys = map[keysafe.KeyID]*secret.Key{}
	for _, id := range want {
		if keys[id] != nil {
			continue
		}
		k, err := c.held[id].key.Clone()
		if err != nil {
			wipeAll(keys)
			return nil, nil, err
		}
		keys[id] = k
	}
	return keys, nil, nil
}

// holds tells whether the key is here, for whatever VM.
func (c *keyCache) holds(id keysafe.KeyID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.held[id] != nil
}

// missing lists the wanted keys that are not here for the VM.
func (c *keyCache) missing(vm string, want []keysafe.KeyID) (missing []keysafe.KeyID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range want {
		if h := c.held[id]; h == nil || !h.vms[vm] {
			missing = append(missing, id)
		}
	}
	return missing
}

// dropVM ends the VM's use of every key, or of the given ones, and wipes those
// that nobody uses any more. It returns the wiped ids.
func (c *keyCache) dropVM(vm string, only ...keysafe.KeyID) (wiped []keysafe.KeyID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, h := range c.held {
		if !h.vms[vm] || (len(only) > 0 && !slices.Contains(only, id)) {
			continue
		}
		delete(h.vms, vm)
		if len(h.vms) == 0 {
			h.key.Wipe()
			delete(c.held, id)
			wiped = append(wiped, id)
		}
	}
	return wiped
}

// evict wipes a key whoever uses it. Running vmx processes keep their DEKs.
func (c *keyCache) evict(id keysafe.KeyID) (users []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.held[id]; h != nil {
		for vm := range h.vms {
			users = append(users, vm)
		}
		h.key.Wipe()
		delete(c.held, id)
	}
	return users
}

// keyUse is one line of what the cache holds.
type keyUse struct {
	ID    keysafe.KeyID
	VMs   []string
	Since time.Time
}

func (c *keyCache) list() (all []keyUse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, h := range c.held {
		u := keyUse{ID: id, Since: h.since}
		for vm := range h.vms {
			u.VMs = append(u.VMs, vm)
		}
		slices.Sort(u.VMs)
		all = append(all, u)
	}
	return all
}

func (c *keyCache) wipe() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, h := range c.held {
		h.key.Wipe()
		delete(c.held, id)
	}
}

func wipeAll(keys map[keysafe.KeyID]*secret.Key) {
	for _, k := range keys {
		k.Wipe()
	}
}
