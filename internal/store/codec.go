package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// A Codec turns values into the bytes of a record and back. at names the record
// ("/collection/key"); sealed records bind themselves to it. Decode may
// keep stored, which nobody changes, and must answer any bytes with a value or an
// error.
type Codec[T any] interface {
	Encode(at string, v T) ([]byte, error)
	Decode(at string, stored []byte) (T, error)
}

// A Sealer encrypts and authenticates records. Additional data is authenticated
// and not stored. A Sealer is used concurrently.
type Sealer interface {
	Seal(plain, additional []byte) ([]byte, error)
	Open(sealed, additional []byte) ([]byte, error)
}

// JSON stores T as {"v":version,"d":T}. A record of a higher version, or with
// fields that T lacks, was written by a newer Mortise and is refused: writing
// it back would drop what this one does not know.
func JSON[T any](version int) Codec[T] { return jsonCodec[T]{version} }

type jsonCodec[T any] struct{ version int }

type envelope struct {
	Version int             `json:"v"`
	Data    json.RawMessage `json:"d"`
}

func (c jsonCodec[T]) Encode(at string, v T) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encoding %s: %w", at, err)
	}
	return json.Marshal(envelope{c.version, data})
}

func (c jsonCodec[T]) Decode(at string, stored []byte) (v T, err error) {
	var e envelope
	if err := strictJSON(stored, &e); err != nil {
		return v, fmt.Errorf("decoding %s: %w", at, err)
	}
	if e.Version < 1 || e.Version > c.version {
		return v, fmt.Errorf("decoding %s: record version %d, this program reads 1 to %d", at, e.Version, c.version)
	}
	if err := strictJSON(e.Data, &v); err != nil {
		return v, fmt.Errorf("decoding %s: %w", at, err)
	}
	return v, nil
}

func strictJSON(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("bytes after the record")
	}
	return nil
}

// Sealed encrypts what inner encodes, bound to the record's name, so that a
// record cannot be read, altered or moved to another place in the database.
func Sealed[T any](inner Codec[T], s Sealer) Codec[T] { return sealedCodec[T]{inner, s} }

type sealedCodec[T any] struct {
	inner  Codec[T]
	sealer Sealer
}

func (c sealedCodec[T]) Encode(at string, v T) ([]byte, error) {
	plain, err := c.inner.Encode(at, v)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	return c.sealer.Seal(plain, []byte(at))
}

func (c sealedCodec[T]) Decode(at string, stored []byte) (v T, err error) {
	plain, err := c.sealer.Open(stored, []byte(at))
	if err != nil {
		return v, fmt.Errorf("opening %s: %w", at, err)
	}
	defer clear(plain)
	return c.inner.Decode(at, plain)
}
