package kmipd

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
)

// call is one message's batch under way.
type call struct {
	context.Context
	s           *server
	session     *kms.Session
	reply       *reply
	placeholder string // KMIP 1.4 §3.2: the object that an item without an id means
	object      string // that the item under way is about, for the audit log
}

// An operation is a row of what this server can do.
type operation struct {
	code   kmip.Operation
	since  int     // the minor version that brought it
	fields []field // of its request payload, in order
	run    func(c *call, payload []byte) (kmip.OperationPayload, error)
}

// row makes an operation of a function over the codec's payload types.
func row[Req any](code kmip.Operation, since int, run func(*call, *Req) (kmip.OperationPayload, error), fields ...field) operation {
	return operation{code, since, fields, func(c *call, payload []byte) (kmip.OperationPayload, error) {
		var req Req
		d, err := ttlv.NewTTLVDecoder(payload)
		if err == nil {
			err = d.TagAny(kmip.TagRequestPayload, &req)
		}
		if err != nil {
			c.s.log.Debug("kmip: payload does not decode", "operation", ttlv.EnumStr(code), "from", c.reply.from, "error", err)
			return nil, kms.Refuse(kmip.ResultReasonInvalidMessage, "the request payload cannot be read")
		}
		return run(c, &req)
	}}
}

func one(tag int) field  { return field{tag: tag} }
func many(tag int) field { return field{tag: tag, repeats: true} }

// operations is everything that Query lists. Query itself reads it, hence a
// function.
func operations() []operation {
	id, params, data := one(kmip.TagUniqueIdentifier), one(kmip.TagCryptographicParameters), one(kmip.TagData)
	form := []field{one(kmip.TagKeyFormatType), one(kmip.TagKeyWrapType), one(kmip.TagKeyCompressionType), one(kmip.TagKeyWrappingSpecification)}
	part := []field{one(kmip.TagCorrelationValue), one(kmip.TagInitIndicator), one(kmip.TagFinalIndicator)}
	sealed := []field{one(kmip.TagAuthenticatedEncryptionAdditionalData), one(kmip.TagAuthenticatedEncryptionTag)}
	join := func(lists ...[]field) []field { return slices.Concat(lists...) }
	return []operation{
		row(kmip.OperationCreate, 0, create, one(kmip.TagObjectType), one(kmip.TagTemplateAttribute)),
		row(kmip.OperationRegister, 0, register, one(kmip.TagObjectType), one(kmip.TagTemplateAttribute),
			one(kmip.TagSymmetricKey), one(kmip.TagSecretData), one(kmip.TagOpaqueObject)),
		row(kmip.OperationLocate, 0, locate, one(kmip.TagMaximumItems), one(kmip.TagOffsetItems), one(kmip.TagStorageStatusMask),
			one(kmip.TagObjectGroupMember), one(kmip.TagTemplateAttribute), many(kmip.TagAttribute)),
		row(kmip.OperationGet, 0, get, join([]field{id}, form)...),
		row(kmip.OperationGetAttributes, 0, getAttributes, id, many(kmip.TagAttributeName)),
		row(kmip.OperationGetAttributeList, 0, getAttributeList, id),
		row(kmip.OperationAddAttribute, 0, addAttribute, id, one(kmip.TagAttribute)),
		row(kmip.OperationModifyAttribute, 0, modifyAttribute, id, one(kmip.TagAttribute)),
		row(kmip.OperationDeleteAttribute, 0, deleteAttribute, id, one(kmip.TagAttributeName), one(kmip.TagAttributeIndex)),
		row(kmip.OperationActivate, 0, activate, id),
		row(kmip.OperationRevoke, 0, revoke, id, one(kmip.TagRevocationReason), one(kmip.TagCompromiseOccurrenceDate)),
		row(kmip.OperationDestroy, 0, destroy, id),
		row(kmip.OperationReKey, 0, rekey, id, one(kmip.TagOffset), one(kmip.TagTemplateAttribute)),
		row(kmip.OperationDeriveKey, 0, deriveKey, one(kmip.TagObjectType), many(kmip.TagUniqueIdentifier), one(kmip.TagDerivationMethod),
			one(kmip.TagDerivationParameters), one(kmip.TagTemplateAttribute)),
		row(kmip.OperationCheck, 0, checkObject, id, one(kmip.TagUsageLimitsCount), one(kmip.TagCryptographicUsageMask), one(kmip.TagLeaseTime)),
		row(kmip.OperationObtainLease, 0, obtainLease, id),
		row(kmip.OperationGetUsageAllocation, 0, getUsageAllocation, id, one(kmip.TagUsageLimitsCount)),
		row(kmip.OperationArchive, 0, archive, id),
		row(kmip.OperationRecover, 0, recoverObject, id),
		row(kmip.OperationQuery, 0, query, many(kmip.TagQueryFunction)),
		row(kmip.OperationDiscoverVersions, 1, discoverVersions, many(kmip.TagProtocolVersion)),
		row(kmip.OperationEncrypt, 2, encrypt, join([]field{id, params, data, one(kmip.TagIVCounterNonce)}, part, sealed[:1])...),
		row(kmip.OperationDecrypt, 2, decrypt, join([]field{id, params, data, one(kmip.TagIVCounterNonce)}, part, sealed)...),
		row(kmip.OperationMAC, 2, mac, join([]field{id, params, data}, part)...),
		row(kmip.OperationMACVerify, 2, macVerify, join([]field{id, params, data, one(kmip.TagMACData)}, part)...),
		row(kmip.OperationHash, 2, hash, join([]field{params, data}, part)...),
		row(kmip.OperationRNGRetrieve, 2, rngRetrieve, one(kmip.TagDataLength)),
		row(kmip.OperationRNGSeed, 2, rngSeed, data),
		row(kmip.OperationImport, 4, importObject, id, one(kmip.TagObjectType), one(kmip.TagReplaceExisting), one(kmip.TagKeyWrapType),
			many(kmip.TagAttribute), one(kmip.TagSymmetricKey), one(kmip.TagSecretData), one(kmip.TagOpaqueObject)),
		row(kmip.OperationExport, 4, export, join([]field{id}, form)...),
	}
}

// do answers one batch item. err is why it failed, with what the client is not
// told.
func (c *call) do(it item) (answer kmip.ResponseBatchItem, err error) {
	parts := items(it.value)
	if err := inOrder(parts, itemFields); err != nil {
		return c.refused(answer, kms.Refuse(fieldReason(err), "batch item: %v", err))
	}
	var payload *item
	for i, p := range parts {
		ok := true
		switch p.tag {
		case kmip.TagOperation:
			if ok = p.typ == ttlv.TypeEnumeration; ok {
				answer.Operation = kmip.Operation(binary.BigEndian.Uint32(p.value))
			}
		case kmip.TagUniqueBatchItemID:
			answer.UniqueBatchItemID, ok = bytes.Clone(p.value), p.typ == ttlv.TypeByteString
		case kmip.TagRequestPayload:
			payload = &parts[i]
		case kmip.TagMessageExtension:
			var x kmip.MessageExtension
			d, err := ttlv.NewTTLVDecoder(p.raw)
			if err == nil {
				err = d.Any(&x)
			}
			if ok = err == nil; ok && x.CriticalityIndicator {
				return c.refused(answer, kms.Refuse(kmip.ResultReasonFeatureNotSupported, "the critical message extension is not known"))
			}
		}
		if !ok {
			return c.refused(answer, kms.Refuse(kmip.ResultReasonInvalidMessage, "the batch item cannot be read"))
		}
	}
	op, ok := c.s.operations[answer.Operation]
	if !ok || op.since > c.reply.version.Minor() {
		return c.refused(answer, kms.Refuse(kmip.ResultReasonOperationNotSupported, "the operation is not supported"))
	}
	if payload == nil || payload.typ != ttlv.TypeStructure {
		return c.refused(answer, kms.Refuse(kmip.ResultReasonInvalidMessage, "the batch item has no request payload"))
	}
	if err := inOrder(items(payload.value), op.fields); err != nil {
		return c.refused(answer, kms.Refuse(fieldReason(err), "request payload: %v", err))
	}
	c.object = ""
	err = c.session.Begin(op.code)
	var result kmip.OperationPayload
	if err == nil {
		result, err = op.run(c, payload.raw)
	}
	if err = c.session.End(op.code, c.object, err); err != nil {
		e := kms.AsError(err)
		log := c.s.log.Info
		if e.Reason == kmip.ResultReasonGeneralFailure || e.Reason == kmip.ResultReasonCryptographicFailure {
			log = c.s.log.Error
		}
		log("kmip: operation refused", "operation", ttlv.EnumStr(answer.Operation), "client", c.session.Name, "from", c.reply.from,
			"reason", ttlv.EnumStr(e.Reason), "error", err)
		return failed(answer, e), err
	}
	answer.ResponsePayload = result
	return answer, nil
}

// refused answers an item that does not come to be an operation. The audit log
// has it as any other.
func (c *call) refused(answer kmip.ResponseBatchItem, err error) (kmip.ResponseBatchItem, error) {
	err = c.session.End(answer.Operation, "", err)
	return failed(answer, err), err
}

// auditTimeout is how long a message whose time has run out may wait for its
// entries in the audit log.
const auditTimeout = 5 * time.Second

// settle waits until the audit log has the message, also one whose time has run
// out.
func (c *call) settle() error {
	ctx := c.Context
	if ctx.Err() != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), auditTimeout)
		defer cancel()
	}
	return c.session.Settle(ctx)
}

// changed logs what a client did to an object.
func (c *call) changed(what, id string, more ...any) {
	c.s.log.Info("kmip: object "+what, append([]any{"object", id, "client", c.session.Name, "from", c.reply.from}, more...)...)
}

// id is the object that an item means.
func (c *call) id(given string) string {
	c.object = given
	if given == "" {
		c.object = c.placeholder
	}
	return c.object
}

// given checks attributes that a client sends against the version it speaks.
func (c *call) given(attributes []kmip.Attribute) error {
	for _, a := range attributes {
		if !kms.Visible(a.AttributeName, c.reply.version.Minor()) {
			return kms.Refuse(kmip.ResultReasonInvalidField, "attribute %q is not known in KMIP %s", a.AttributeName, c.reply.version)
		}
	}
	return nil
}

// template returns the attributes of a template attribute. Templates by name
// are managed objects that this server has none of.
func (c *call) template(t *kmip.TemplateAttribute) ([]kmip.Attribute, error) {
	//lint:ignore SA1019 a client of an old version may send it
	if len(t.Name) > 0 {
		return nil, kms.Refuse(kmip.ResultReasonItemNotFound, "the template does not exist")
	}
	return t.Attribute, c.given(t.Attribute)
}

func create(c *call, r *payloads.CreateRequestPayload) (kmip.OperationPayload, error) {
	attributes, err := c.template(&r.TemplateAttribute)
	if err != nil {
		return nil, err
	}
	id, err := c.session.Create(c, r.ObjectType, attributes)
	if err != nil {
		return nil, err
	}
	c.placeholder, c.object = id, id
	c.changed("created", id)
	return &payloads.CreateResponsePayload{ObjectType: r.ObjectType, UniqueIdentifier: id}, nil
}

// locateRequest is the codec's, and takes filters inside a template attribute
// too, as some clients send them: a filter that is passed over would find all.
type locateRequest struct {
	MaximumItems      int32                   `ttlv:",omitempty"`
	OffsetItems       int32                   `ttlv:",omitempty"`
	StorageStatusMask kmip.StorageStatusMask  `ttlv:",omitempty"`
	ObjectGroupMember kmip.ObjectGroupMember  `ttlv:",omitempty"`
	TemplateAttribute *kmip.TemplateAttribute `ttlv:",omitempty"`
	Attribute         []kmip.Attribute
}

func locate(c *call, r *locateRequest) (kmip.OperationPayload, error) {
	c.placeholder = ""
	filters := r.Attribute
	if r.TemplateAttribute != nil {
		inside, err := c.template(r.TemplateAttribute)
		if err != nil {
			return nil, err
		}
		filters = append(inside, filters...)
	}
	if err := c.given(filters); err != nil {
		return nil, err
	}
	ids, total, err := c.session.Locate(c, kms.Query{Attributes: filters, Status: r.StorageStatusMask, Member: r.ObjectGroupMember, Offset: r.OffsetItems, Max: r.MaximumItems})
	if err != nil {
		return nil, err
	}
	if len(ids) == 1 {
		c.placeholder = ids[0]
	}
	found := &payloads.LocateResponsePayload{UniqueIdentifier: ids}
	if n := int32(total); n >= 0 {
		found.LocatedItems = &n
	}
	return found, nil
}

func activate(c *call, r *payloads.ActivateRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := c.session.Activate(c, id); err != nil {
		return nil, err
	}
	c.placeholder = id
	c.changed("activated", id)
	return &payloads.ActivateResponsePayload{UniqueIdentifier: id}, nil
}

func revoke(c *call, r *payloads.RevokeRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	var occurred time.Time
	if r.CompromiseOccurrenceDate != nil {
		occurred = *r.CompromiseOccurrenceDate
	}
	if err := c.session.Revoke(c, id, r.RevocationReason, occurred); err != nil {
		return nil, err
	}
	c.placeholder = id
	c.changed("revoked", id, "reason", ttlv.EnumStr(r.RevocationReason.RevocationReasonCode))
	return &payloads.RevokeResponsePayload{UniqueIdentifier: id}, nil
}

func destroy(c *call, r *payloads.DestroyRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := c.session.Destroy(c, id); err != nil {
		return nil, err
	}
	c.placeholder = id
	c.changed("destroyed", id)
	return &payloads.DestroyResponsePayload{UniqueIdentifier: id}, nil
}
