package kms

import (
	"fmt"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/secret"
)

// MaxMaterial is the longest key, secret or opaque value that can be kept, in
// bytes.
const MaxMaterial = secret.MaxLen

// object is a managed object as its record has it ([object.fields]). Every read
// decodes one anew.
type object struct {
	Type        kmip.ObjectType
	Subtype     uint32 // SecretDataType or OpaqueDataType
	Algorithm   kmip.CryptographicAlgorithm
	Length      int32 // bits
	Usage       int32 // kmip.CryptographicUsageMask
	State       kmip.State
	Reason      *revocation
	Digest      []byte // SHA-256 of the material
	Initial     time.Time
	Activation  time.Time
	Deactivated time.Time // Deactivation Date, may be in the future
	Destroyed   time.Time
	Compromised time.Time
	Occurred    time.Time // Compromise Occurrence Date
	LastChange  time.Time
	Original    time.Time          // Original Creation Date, of an imported object
	ProcessFrom time.Time          // Process Start Date
	ProtectTo   time.Time          // Protect Stop Date
	Archived    time.Time          // Archive Date; zero: online
	Format      kmip.KeyFormatType // as registered; 0 means Raw
	Flags       objectFlags
	Limits      *usageLimits
	Wrapping    []byte      // TTLV of the Key Wrapping Data of material that is kept as it came, wrapped
	Attributes  []attribute // what clients set, in order of addition

	material int        // length in bytes; 0 once purged
	sealed   sealedFrom // where the material is
}

// objectFlags are attributes of one bit; 0 is how a new object begins.
type objectFlags uint32

const (
	flagServed           objectFlags = 1 << iota // not Fresh: a client has got the material
	flagGenerated                                // the material was made here
	flagKeyless                                  // registered without a key value: not Key Value Present
	flagSensitive                                // Sensitive
	flagAlwaysSensitive                          // Always Sensitive
	flagInextractable                            // not Extractable
	flagNeverExtractable                         // Never Extractable
	flagStructured                               // wrapped material that was given inside a Key Value structure
)

// usageLimits is the attribute Usage Limits, KMIP 1.4 §3.21.
type usageLimits struct {
	Total, Count int64
	Unit         kmip.UsageLimitsUnit
}

type revocation struct {
	Code    kmip.RevocationReasonCode
	Message string
}

// sealedFrom is enough to open a record again: the material of a key is in
// clear only while somebody uses it.
type sealedFrom struct {
	at     string
	stored []byte
	opener *seal       // of its generation, which may be retired meanwhile
	fresh  *secret.Key // instead of the above, for an object not yet written
}

// open returns the object's material, the caller's to wipe.
func (o *object) open() (*secret.Key, error) {
	if o.sealed.fresh != nil {
		return o.sealed.fresh.Clone()
	}
	plain, err := o.sealed.opener.Open(o.sealed.stored, []byte(o.sealed.at))
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", o.sealed.at, err)
	}
	defer clear(plain)
	_, material, err := split(plain)
	if err != nil {
		return nil, err
	}
	return secret.Copy(material)
}

// objectCodec seals an object's record.
type objectCodec struct{ *instance }

func (c objectCodec) Encode(at string, o *object) ([]byte, error) {
	plain := appendObject(make([]byte, 0, 256+o.material), o)
	if cap(plain)-len(plain) < o.material { // so that no copy of the material is left behind
		plain = append(make([]byte, 0, len(plain)+o.material), plain...)
	}
	if o.material > 0 {
		key, err := o.open()
		if err != nil {
			return nil, err
		}
		defer key.Wipe()
		key.Use(func(b []byte) { plain = append(plain, b...) })
	}
	defer clear(plain)
	return c.Seal(plain, []byte(at))
}

func (c objectCodec) Decode(at string, stored []byte) (*object, error) {
	opener, err := c.sealOf(stored)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", at, err)
	}
	plain, err := opener.Open(stored, []byte(at))
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", at, err)
	}
	o, err := parseObject(plain)
	if err != nil {
		clear(plain)
		return nil, fmt.Errorf("decoding %s: %w", at, err)
	}
	clear(plain[len(plain)-o.material:]) // the rest of plain is the object's
	o.sealed = sealedFrom{at: at, stored: stored, opener: opener}
	return o, nil
}
