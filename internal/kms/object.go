package kms

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/secret"
)

// MaxMaterial is the longest key, secret or opaque value that can be kept, in
// bytes.
const MaxMaterial = secret.MaxLen

// object is a managed object as its record has it. A decoded object is shared
// by its readers and does not change; a change works on a copy.
type object struct {
	Version     int
	Type        kmip.ObjectType
	Subtype     uint32                      `json:",omitempty"` // SecretDataType or OpaqueDataType
	Algorithm   kmip.CryptographicAlgorithm `json:",omitempty"`
	Length      int32                       `json:",omitempty"` // bits
	Usage       int32                       `json:",omitempty"` // kmip.CryptographicUsageMask
	State       kmip.State
	Reason      *revocation `json:",omitempty"`
	Digest      []byte      `json:",omitempty"` // SHA-256 of the material
	Initial     time.Time
	Activation  time.Time `json:",omitzero"`
	Deactivated time.Time `json:",omitzero"` // Deactivation Date, may be in the future
	Destroyed   time.Time `json:",omitzero"`
	Compromised time.Time `json:",omitzero"`
	Occurred    time.Time `json:",omitzero"` // Compromise Occurrence Date
	LastChange  time.Time
	Original    time.Time          `json:",omitzero"`  // Original Creation Date, of an imported object
	ProcessFrom time.Time          `json:",omitzero"`  // Process Start Date
	ProtectTo   time.Time          `json:",omitzero"`  // Protect Stop Date
	Archived    time.Time          `json:",omitzero"`  // Archive Date; zero: online
	Format      kmip.KeyFormatType `json:",omitempty"` // as registered; 0 means Raw
	Flags       objectFlags        `json:",omitempty"`
	Limits      *usageLimits       `json:",omitempty"`
	Wrapping    []byte             `json:",omitempty"` // TTLV of the Key Wrapping Data of material that is kept as it came, wrapped
	Attributes  []attribute        `json:",omitempty"` // what clients set, in order of addition

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
)

// usageLimits is the attribute Usage Limits, KMIP 1.4 §3.21.
type usageLimits struct {
	Total, Count int64
	Unit         kmip.UsageLimitsUnit
}

type revocation struct {
	Code    kmip.RevocationReasonCode
	Message string `json:",omitempty"`
}

// sealedFrom is enough to open a record again: the material of a key is in
// clear only while somebody uses it.
type sealedFrom struct {
	at     string
	stored []byte
	opener interface {
		Open(sealed, at []byte) ([]byte, error)
	}
	fresh *secret.Key // instead of the above, for an object not yet written
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

// objectVersion is written into records; a higher one is refused.
const objectVersion = 1

// objectCodec stores an object as the length of its JSON (4 bytes, big-endian),
// that JSON, and the material as it is, all sealed together. The material stays
// out of the JSON so that no encoder keeps a copy of it.
type objectCodec struct{ *instance }

func (c objectCodec) Encode(at string, o *object) ([]byte, error) {
	meta, err := json.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("encoding %s: %w", at, err)
	}
	plain := make([]byte, 4, 4+len(meta)+o.material)
	binary.BigEndian.PutUint32(plain, uint32(len(meta)))
	plain = append(plain, meta...)
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
	plain, err := c.Open(stored, []byte(at))
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", at, err)
	}
	defer clear(plain)
	o, err := parseObject(plain)
	if err != nil {
		return nil, fmt.Errorf("decoding %s: %w", at, err)
	}
	o.sealed = sealedFrom{at: at, stored: bytes.Clone(stored), opener: c.instance}
	return o, nil
}

func parseObject(plain []byte) (*object, error) {
	meta, material, err := split(plain)
	if err != nil {
		return nil, err
	}
	var o object
	d := json.NewDecoder(bytes.NewReader(meta))
	d.DisallowUnknownFields()
	if err := d.Decode(&o); err != nil {
		return nil, err
	}
	if o.Version != objectVersion {
		return nil, fmt.Errorf("record version %d, this program reads %d", o.Version, objectVersion)
	}
	o.material = len(material)
	return &o, nil
}

func split(plain []byte) (meta, material []byte, err error) {
	if len(plain) < 4 {
		return nil, nil, errors.New("a record has at least 4 bytes")
	}
	n := binary.BigEndian.Uint32(plain)
	if uint64(n) > uint64(len(plain)-4) || len(plain)-4-int(n) > MaxMaterial {
		return nil, nil, errors.New("a record's lengths do not fit")
	}
	return plain[4 : 4+n], plain[4+n:], nil
}
