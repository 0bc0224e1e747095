package vdisk

import (
	"fmt"
	"io"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vmdk"
	"mortise/internal/xts"
)

// A dataKey is a DEK and what is derived from it. A nil one stands for data in
// clear.
type dataKey struct {
	dek        *secret.Key
	xts        *xts.Cipher
	descriptor *keysafe.MAC // of the lines of a descriptor
	state      *keysafe.MAC // of the slots of a state file
	check      keyCheck
}

// newDataKey makes a new random DEK; nil means crypto/rand.
func newDataKey(random io.Reader) (*dataKey, error) {
	dek, err := secret.Random(random, xts.KeySize)
	if err != nil {
		return nil, err
	}
	return expand(dek)
}

// expand takes over dek.
func expand(dek *secret.Key) (*dataKey, error) {
	k := &dataKey{dek: dek}
	err := func() (err error) {
		if k.xts, err = xts.New(dek); err != nil {
			return err
		}
		if k.descriptor, err = keysafe.NewMAC(dek, vmdk.MACInfo); err != nil {
			return err
		}
		k.state, err = keysafe.NewMAC(dek, macInfo)
		return err
	}()
	if err != nil {
		k.wipe()
		return nil, fmt.Errorf("preparing a disk's key: %w", err)
	}
	sum := k.state.Sum(keysafe.Line{Name: "key check"})
	copy(k.check[:], sum[:])
	return k, nil
}

func (k *dataKey) wipe() {
	if k != nil {
		k.dek.Wipe()
		k.xts.Wipe()
		k.descriptor.Wipe()
		k.state.Wipe()
	}
}

// cipher, mac and id are those of nil too: data in clear has none.
func (k *dataKey) cipher() *xts.Cipher {
	if k == nil {
		return nil
	}
	return k.xts
}

func (k *dataKey) mac() *keysafe.MAC {
	if k == nil {
		return nil
	}
	return k.state
}

func (k *dataKey) id() keyCheck {
	if k == nil {
		return keyCheck{}
	}
	return k.check
}

// binding is what the DEKs of a disk are wrapped for.
func binding(vm, disk uuid.UUID) keysafe.Binding {
	return keysafe.Binding{VM: vm, Disk: disk, Role: keysafe.RoleDisk, Cipher: keysafe.CipherXTS, UnitSize: UnitSize}
}
