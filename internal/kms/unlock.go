package kms

import (
	"context"
	"errors"
	"fmt"

	"mortise/internal/store"
)

// NeededCRKs lists the CRKs of a kind that the instances need, locked or not: a
// member without them cannot open its instances.
func (k *KMS) NeededCRKs(ctx context.Context, kind string) (ids []string, err error) {
	entries, err := k.records.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("kms: reading the instances: %w", err)
	}
	for _, e := range entries {
		if e.Value.Provider == kind && !k.crkEnded(e.Value.CRK) {
			ids = append(ids, e.Value.CRK)
		}
	}
	return ids, nil
}

// New tells whether nobody has ever unlocked this KMS: then there is no CRK yet,
// and the first Unlock makes one.
func (k *KMS) New(ctx context.Context) (bool, error) {
	_, err := k.records.List(ctx, "")
	if err != nil && !errors.Is(err, store.ErrDamaged) {
		return false, fmt.Errorf("kms: reading the instances: %w", err)
	}
	return k.records.Count() == 0, nil
}

// RootKeyStatus is one provider of root keys on one member.
type RootKeyStatus struct {
	Provider string `json:"provider" doc:"file or pkcs11"`
	SealedBy string `json:"sealedBy" doc:"what opens it: passphrase, tpm or PIN"`
	Open     bool   `json:"open"`
	Where    string `json:"where" doc:"the file, or the token"`
}
