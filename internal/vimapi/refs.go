package vimapi

import (
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
)

// moref is the reference to something of the inventory.
func moref(r inventory.Ref) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: string(r.Kind()), Value: string(r)}
}

// reference is moref, nil for what is no reference.
func reference(r inventory.Ref) *types.ManagedObjectReference {
	if r.Kind() == "" {
		return nil
	}
	m := moref(r)
	return &m
}

func morefs(refs []inventory.Ref) []types.ManagedObjectReference {
	all := make([]types.ManagedObjectReference, 0, len(refs))
	for _, r := range refs {
		all = append(all, moref(r))
	}
	return all
}

// ref is the inventory's reference of m; "" when m is none, or claims a type
// that it is not.
func ref(m types.ManagedObjectReference) inventory.Ref {
	r := inventory.Ref(m.Value)
	if string(r.Kind()) != m.Type {
		return ""
	}
	return r
}

// optionalRef is ref; nil gives "".
func optionalRef(m *types.ManagedObjectReference) inventory.Ref {
	if m == nil {
		return ""
	}
	return ref(*m)
}

func singleton(kind, value string) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: kind, Value: value}
}

func keyID(k inventory.KeyID) types.CryptoKeyId {
	id := types.CryptoKeyId{KeyId: k.Key}
	if k.Provider != "" {
		id.ProviderId = &types.KeyProviderId{Id: k.Provider}
	}
	return id
}

func optionalKeyID(k *inventory.KeyID) *types.CryptoKeyId {
	if k == nil {
		return nil
	}
	id := keyID(*k)
	return &id
}

func keyIDs(keys []inventory.KeyID) []types.CryptoKeyId {
	var all []types.CryptoKeyId
	for _, k := range keys {
		all = append(all, keyID(k))
	}
	return all
}

func fromKeyID(k types.CryptoKeyId) inventory.KeyID {
	id := inventory.KeyID{Key: k.KeyId}
	if k.ProviderId != nil {
		id.Provider = k.ProviderId.Id
	}
	return id
}
