package kmipd

import (
	"slices"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/kms"
)

func getAttributes(c *call, r *payloads.GetAttributesRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	list, err := c.attributes(id, r.AttributeName...)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	return &payloads.GetAttributesResponsePayload{UniqueIdentifier: id, Attribute: list}, nil
}

func getAttributeList(c *call, r *payloads.GetAttributeListRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	list, err := c.attributes(id)
	if err != nil {
		return nil, err
	}
	var names []kmip.AttributeName
	for _, a := range list {
		if !slices.Contains(names, a.AttributeName) {
			names = append(names, a.AttributeName)
		}
	}
	c.placeholder = id
	return &payloads.GetAttributeListResponsePayload{UniqueIdentifier: id, AttributeName: names}, nil
}

// attributes are those that the client's version knows.
func (c *call) attributes(id string, names ...kmip.AttributeName) ([]kmip.Attribute, error) {
	list, err := c.session.Attributes(c, id, names...)
	return c.seen(list), err
}

// seen leaves out what the client's version does not know.
func (c *call) seen(list []kmip.Attribute) []kmip.Attribute {
	for i, a := range list {
		if p, ok := a.AttributeValue.(kmip.RNGParameters); ok && c.reply.version.Minor() < 4 && p.CryptographicAlgorithm >= kmip.CryptographicAlgorithmChaCha20 {
			list[i].AttributeValue = kmip.RNGParameters{RNGAlgorithm: p.RNGAlgorithm} // KMIP 1.4 brought the algorithm
		}
	}
	return slices.DeleteFunc(list, func(a kmip.Attribute) bool {
		return !kms.Visible(a.AttributeName, c.reply.version.Minor())
	})
}

func addAttribute(c *call, r *payloads.AddAttributeRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := c.given([]kmip.Attribute{r.Attribute}); err != nil {
		return nil, err
	}
	a, err := c.session.AddAttribute(c, id, r.Attribute)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	return &payloads.AddAttributeResponsePayload{UniqueIdentifier: id, Attribute: a}, nil
}

func modifyAttribute(c *call, r *payloads.ModifyAttributeRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	if err := c.given([]kmip.Attribute{r.Attribute}); err != nil {
		return nil, err
	}
	a, err := c.session.ModifyAttribute(c, id, r.Attribute)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	return &payloads.ModifyAttributeResponsePayload{UniqueIdentifier: id, Attribute: a}, nil
}

func deleteAttribute(c *call, r *payloads.DeleteAttributeRequestPayload) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	a, err := c.session.DeleteAttribute(c, id, r.AttributeName, r.AttributeIndex)
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	return &payloads.DeleteAttributeResponsePayload{UniqueIdentifier: id, Attribute: a}, nil
}
