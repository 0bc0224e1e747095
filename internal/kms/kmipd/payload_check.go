package kmipd

import (
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/kms"
)

// checkRequest is KMIP 1.4 §4.10; the response has the same fields: those that
// the object does not meet, with its own values.
type checkRequest struct {
	UniqueIdentifier       string `ttlv:",omitempty"`
	UsageLimitsCount       *int64
	CryptographicUsageMask *kmip.CryptographicUsageMask
	LeaseTime              *time.Duration
}

type checkResponse struct {
	UniqueIdentifier       string
	UsageLimitsCount       *int64
	CryptographicUsageMask *kmip.CryptographicUsageMask
	LeaseTime              *time.Duration
}

func (*checkRequest) Operation() kmip.Operation  { return kmip.OperationCheck }
func (*checkResponse) Operation() kmip.Operation { return kmip.OperationCheck }

func checkObject(c *call, r *checkRequest) (kmip.OperationPayload, error) {
	id := c.id(r.UniqueIdentifier)
	unmet, err := c.session.Check(c, id, kms.CheckRequest{Count: r.UsageLimitsCount, Usage: r.CryptographicUsageMask, Lease: r.LeaseTime})
	if err != nil {
		return nil, err
	}
	c.placeholder = id
	return &checkResponse{id, unmet.Count, unmet.Usage, unmet.Lease}, nil
}
