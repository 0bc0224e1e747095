package kms

import (
	"fmt"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// rank orders the roles: each may do what the lower ones may. 0 is no role.
func (r Role) rank() int {
	switch r {
	case RoleViewer:
		return 1
	case RoleKeyManager:
		return 2
	case RoleAdministrator:
		return 3
	}
	return 0
}

// Covers tells whether r may do what takes least.
func (r Role) Covers(least Role) bool { return least.rank() > 0 && r.rank() >= least.rank() }

// ParseRole reads a role; "" is a key manager's, which a new client gets unless
// it is said otherwise.
func ParseRole(text string) (Role, error) {
	if text == "" {
		return RoleKeyManager, nil
	}
	if r := Role(text); r.rank() > 0 {
		return r, nil
	}
	return "", fmt.Errorf("kms: %w: there is no role %q; there are viewer, key-manager and administrator", ErrInvalid, text)
}

// leastRole is who may call an operation of KMIP (S7). What an operation that is
// not listed here takes is an administrator: a new one is closed until somebody
// has thought about it.
func leastRole(op kmip.Operation) Role {
	switch op {
	case kmip.OperationQuery, kmip.OperationDiscoverVersions, kmip.OperationLocate, kmip.OperationCheck,
		kmip.OperationGetAttributes, kmip.OperationGetAttributeList, kmip.OperationValidate:
		return RoleViewer
	case kmip.OperationCreate, kmip.OperationRegister, kmip.OperationReKey, kmip.OperationDeriveKey, kmip.OperationGet,
		kmip.OperationAddAttribute, kmip.OperationModifyAttribute, kmip.OperationDeleteAttribute,
		kmip.OperationObtainLease, kmip.OperationGetUsageAllocation, kmip.OperationActivate,
		kmip.OperationArchive, kmip.OperationRecover, kmip.OperationImport, kmip.OperationExport,
		kmip.OperationEncrypt, kmip.OperationDecrypt, kmip.OperationSign, kmip.OperationSignatureVerify,
		kmip.OperationMAC, kmip.OperationMACVerify, kmip.OperationHash, kmip.OperationRNGRetrieve, kmip.OperationRNGSeed:
		return RoleKeyManager
	}
	return RoleAdministrator
}

// allow refuses an operation that the session's role does not reach, or that is
// over the instance's quota.
func (s *Session) allow(op kmip.Operation) error {
	least := leastRole(op)
	if s.Role.Covers(least) {
		if err := s.pace(); err != nil {
			return err
		}
		return s.roomForObject(op)
	}
	return Refuse(kmip.ResultReasonPermissionDenied, "%s takes the role %s in instance %s; %s is %s", ttlv.EnumStr(op), least, s.Instance, s.Name, s.Role)
}
