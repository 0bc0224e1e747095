package audit

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// A Head says that the chain of a log has Hash after the entry Sequence; signed
// by the member, it is what the log is held against.
type Head struct {
	Version   int       `json:"v"`
	Member    string    `json:"member"`
	Log       Hex       `json:"log"` // the log's id, 16 bytes
	Sequence  uint64    `json:"sequence"`
	Hash      Hex       `json:"hash"`
	Time      time.Time `json:"time"`
	Key       Hex       `json:"key"` // Ed25519 public key
	Signature Hex       `json:"signature"`
}

const headVersion = 1

// Hex is bytes that are hexadecimal in JSON.
type Hex []byte

func (h Hex) String() string               { return hex.EncodeToString(h) }
func (h Hex) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }

func (h *Hex) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

// ParseHead reads the JSON of a head. Its signature is not looked at.
func ParseHead(b []byte) (h Head, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&h); err != nil {
		return h, fmt.Errorf("audit: reading a head: %w", err)
	}
	switch {
	case h.Version != headVersion:
		return h, fmt.Errorf("audit: a head of version %d; this program reads %d", h.Version, headVersion)
	case len(h.Log) != idLen || len(h.Hash) != sha256.Size || len(h.Key) != ed25519.PublicKeySize || len(h.Signature) != ed25519.SignatureSize:
		return h, errors.New("audit: a head whose parts have the wrong lengths")
	}
	return h, nil
}

func (h *Head) sign(key ed25519.PrivateKey) {
	h.Version, h.Key = headVersion, Hex(key.Public().(ed25519.PublicKey))
	h.Signature = ed25519.Sign(key, h.signed())
}

// Valid tells whether the signature is that of h.Key. Whose key that is, is
// another question.
func (h *Head) Valid() bool {
	return len(h.Key) == ed25519.PublicKeySize && ed25519.Verify(ed25519.PublicKey(h.Key), h.signed(), h.Signature)
}

// signed is what the signature is over: every part has a fixed length but the
// member's name, which ends it.
func (h *Head) signed() []byte {
	b := append([]byte("mortise audit head 1\x00"), h.Log...)
	b = binary.BigEndian.AppendUint64(b, h.Sequence)
	b = append(b, h.Hash...)
	b = binary.BigEndian.AppendUint64(b, uint64(h.Time.UnixNano()))
	return append(b, h.Member...)
}

// A Tombstone stands where segments were removed by an administrator, and
// carries the chain over them. It is the file FIRST.removed.
type Tombstone struct {
	Version   int       `json:"v"`
	Member    string    `json:"member"`
	Log       Hex       `json:"log"`
	First     uint64    `json:"first"`  // the first entry that is gone
	Last      uint64    `json:"last"`   // and the last
	Before    Hex       `json:"before"` // the chain's hash before First
	After     Hex       `json:"after"`  // and after Last
	Time      time.Time `json:"time"`
	By        string    `json:"by"` // the administrator
	Reason    string    `json:"reason"`
	Key       Hex       `json:"key"`
	Signature Hex       `json:"signature"`
}

func parseTombstone(b []byte) (t Tombstone, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&t); err != nil {
		return t, fmt.Errorf("reading a tombstone: %w", err)
	}
	if t.Version != headVersion || len(t.Log) != idLen || len(t.Before) != sha256.Size || len(t.After) != sha256.Size || t.First == 0 || t.Last < t.First {
		return t, errors.New("a tombstone that makes no sense")
	}
	return t, nil
}

func (t *Tombstone) sign(key ed25519.PrivateKey) {
	t.Version, t.Key = headVersion, Hex(key.Public().(ed25519.PublicKey))
	t.Signature = ed25519.Sign(key, t.signed())
}

func (t *Tombstone) valid() bool {
	return len(t.Key) == ed25519.PublicKeySize && ed25519.Verify(ed25519.PublicKey(t.Key), t.signed(), t.Signature)
}

func (t *Tombstone) signed() []byte {
	b := append([]byte("mortise audit tombstone 1\x00"), t.Log...)
	b = binary.BigEndian.AppendUint64(b, t.First)
	b = binary.BigEndian.AppendUint64(b, t.Last)
	b = append(append(b, t.Before...), t.After...)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Time.UnixNano()))
	for _, s := range []string{t.Member, t.By, t.Reason} {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	return b
}
