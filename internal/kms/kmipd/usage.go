package kmipd

import (
	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/kms"
)

// Operations that use a key where it is, and those on how much of it is used.

func encrypt(c *call, r *payloads.EncryptRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	out, err := c.session.Encrypt(c, id, kms.CipherRequest{
		Parameters: r.CryptographicParameters, Data: r.Data, IV: r.IVCounterNonce, Additional: r.AuthenticatedEncryptionAdditionalData,
		Correlation: r.CorrelationValue, Init: isSet(r.InitIndicator), Final: isSet(r.FinalIndicator),
	})
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	return &payloads.EncryptResponsePayload{
		UniqueIdentifier: id, Data: out.Data, IVCounterNonce: out.IV, CorrelationValue: out.Correlation, AuthenticatedEncryptionTag: out.Tag,
	}, nil
}

func decrypt(c *call, r *payloads.DecryptRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	out, err := c.session.Decrypt(c, id, kms.CipherRequest{
		Parameters: r.CryptographicParameters, Data: r.Data, IV: r.IVCounterNonce, Additional: r.AuthenticatedEncryptionAdditionalData,
		Tag: r.AuthenticatedEncryptionTag, Correlation: r.CorrelationValue, Init: isSet(r.InitIndicator), Final: isSet(r.FinalIndicator),
	})
	if err != nil {
		return nil, err
	}
	c.reply.secrets = append(c.reply.secrets, out.Data) // as like as not a key
	c.placeholder = id
	return &payloads.DecryptResponsePayload{UniqueIdentifier: id, Data: out.Data, CorrelationValue: out.Correlation}, nil
}

func obtainLease(c *call, r *payloads.ObtainLeaseRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	lease, changed, err := c.session.ObtainLease(c, id)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	return &payloads.ObtainLeaseResponsePayload{UniqueIdentifier: id, LeaseTime: lease, LastChangeDate: changed}, nil
}

func getUsageAllocation(c *call, r *payloads.GetUsageAllocationRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := c.session.GetUsageAllocation(c, id, r.UsageLimitsCount); err != nil {
		return nil, err
	}
	c.placeholder = id
	return &payloads.GetUsageAllocationResponsePayload{UniqueIdentifier: id}, nil
}

func archive(c *call, r *payloads.ArchiveRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := c.session.Archive(c, id); err != nil {
		return nil, err
	}
	c.placeholder = id
	c.changed("archived", id)
	return &payloads.ArchiveResponsePayload{UniqueIdentifier: id}, nil
}

func recoverObject(c *call, r *payloads.RecoverRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := c.session.Recover(c, id); err != nil {
		return nil, err
	}
	c.placeholder = id
	c.changed("recovered", id)
	return &payloads.RecoverResponsePayload{UniqueIdentifier: id}, nil
}

func rekey(c *call, r *payloads.RekeyRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	var attributes []kmip.Attribute
	if r.TemplateAttribute != nil {
		var err error
		if attributes, err = c.template(r.TemplateAttribute); err != nil {
			return nil, err
		}
	}
	made, err := c.session.ReKey(c, id, r.Offset, attributes)
	if err != nil {
		return nil, err
	}
	c.placeholder = made
	c.changed("replaced", id, "by", made)
	return &payloads.RekeyResponsePayload{UniqueIdentifier: made}, nil
}
