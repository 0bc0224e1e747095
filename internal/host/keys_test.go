package host

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

func kek(t *testing.T, fill byte) *secret.Key {
	t.Helper()
	k, err := secret.Take(bytes.Repeat([]byte{fill}, keysafe.KEKSize))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

var (
	keyA = keysafe.KeyID{Provider: "p", Key: "a"}
	keyB = keysafe.KeyID{Provider: "p", Key: "b"}
)

// TestNamingAKeyGivesNoRight checks design §1: a VM gets only keys that center
// pushed for it, although the host holds others.
func TestNamingAKeyGivesNoRight(t *testing.T) {
	c := newKeyCache(time.Now)
	c.put(keyA, kek(t, 1), "vm1")
	c.put(keyB, kek(t, 2), "vm2")
	if _, missing, err := c.copyFor("vm1", []keysafe.KeyID{keyA, keyB}); err != nil || !slices.Equal(missing, []keysafe.KeyID{keyB}) {
		t.Errorf("vm1 asked for a and b: missing %v, %v; want b", missing, err)
	}
	keys, missing, err := c.copyFor("vm1", []keysafe.KeyID{keyA, keyA})
	if err != nil || len(missing) > 0 || len(keys) != 1 {
		t.Fatalf("vm1 asked for a: %v, missing %v, %v", keys, missing, err)
	}
	keys[keyA].Wipe()
	if _, missing, _ := c.copyFor("vm1", []keysafe.KeyID{keyA}); len(missing) > 0 {
		t.Error("wiping the copy wiped the cache's key")
	}
}

// TestKeyGoesWithItsLastUser checks K9.
func TestKeyGoesWithItsLastUser(t *testing.T) {
	c := newKeyCache(time.Now)
	held := kek(t, 1)
	c.put(keyA, held, "vm1")
	second := kek(t, 1)
	c.put(keyA, second, "vm2")
	if second.Len() != 0 {
		t.Error("the duplicate key was not wiped")
	}
	if wiped := c.dropVM("vm1"); len(wiped) != 0 || held.Len() == 0 {
		t.Errorf("key wiped while vm2 uses it: %v", wiped)
	}
	if wiped := c.dropVM("vm2"); !slices.Equal(wiped, []keysafe.KeyID{keyA}) || held.Len() != 0 {
		t.Errorf("key stayed after its last user: wiped %v, %d bytes left", wiped, held.Len())
	}
	if len(c.list()) != 0 {
		t.Errorf("the cache still lists %v", c.list())
	}
}

func TestEvict(t *testing.T) {
	c := newKeyCache(time.Now)
	held := kek(t, 1)
	c.put(keyA, held, "vm1", "vm2")
	users := c.evict(keyA)
	slices.Sort(users)
	if !slices.Equal(users, []string{"vm1", "vm2"}) || held.Len() != 0 {
		t.Errorf("evict: users %v, %d bytes left", users, held.Len())
	}
	if missing := c.missing("vm1", []keysafe.KeyID{keyA}); len(missing) != 1 {
		t.Error("an evicted key is still held")
	}
}
