package kms

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/ovh/kmip-go"
)

// Encrypt and Decrypt in several parts (KMIP 1.3 and later, §4.29): a stream is
// known by its correlation value, belongs to the client that began it, and is in
// the memory of the member that it was begun at: with another one it must begin
// anew. The key is opened for each part, so that a key that is revoked ends its
// streams.
//
// All input of a stream is kept until it ends, and the answer to a part is what
// the whole so far gives beyond what was told. Decrypting with GCM tells nothing
// until the tag has been checked.

const (
	maxStreams  = 256     // of one KMS
	maxEach     = 16      // of one client
	streamBytes = 1 << 20 // of one stream
	streamIdle  = 5 * time.Minute
)

type stream struct {
	owner   string // instance and client
	id      string
	encrypt bool
	params  *kmip.CryptographicParameters
	iv      []byte
	aad     []byte
	in      []byte
	told    int // bytes of output
	used    time.Time
}

// streams are those under way. A stream that is being answered is not in open.
type streams struct {
	mu   sync.Mutex
	open map[string]*stream
}

// put keeps a stream; false when there are too many.
func (s *streams) put(correlation []byte, x *stream, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = map[string]*stream{}
	}
	own := 0
	for k, old := range s.open {
		switch {
		case now.Sub(old.used) > streamIdle:
			clear(old.in)
			delete(s.open, k)
		case old.owner == x.owner:
			own++
		}
	}
	if len(s.open) >= maxStreams || own >= maxEach {
		return false
	}
	x.used = now
	s.open[string(correlation)] = x
	return true
}

// take hands a stream to the one request that answers it.
func (s *streams) take(correlation []byte, owner string, now time.Time) *stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.open[string(correlation)]
	if x == nil || x.owner != owner {
		return nil
	}
	delete(s.open, string(correlation))
	if now.Sub(x.used) > streamIdle {
		clear(x.in)
		return nil
	}
	return x
}

func (s *Session) stream(ctx context.Context, id string, o *object, r CipherRequest, encrypt bool) (result CipherResult, err error) {
	owner := fmt.Sprintf("%s\x00%s", s.Instance, s.Fingerprint)
	now := s.k.now()
	var x *stream
	switch {
	case r.Init && len(r.Correlation) > 0:
		return result, Refuse(kmip.ResultReasonInvalidField, "a part is the first of a stream or has a correlation value, not both")
	case r.Init:
		r.Correlation = make([]byte, 16)
		if _, err := rand.Read(r.Correlation); err != nil {
			return result, &Error{kmip.ResultReasonCryptographicFailure, "no correlation value could be made", err}
		}
		x = &stream{owner: owner, id: id, encrypt: encrypt, params: r.Parameters, iv: r.IV, aad: r.Additional}
		c, p, err := s.symmetric(ctx, o, x.params)
		if err != nil {
			return result, err
		}
		if !encrypt {
			x.iv, err = c.checkIV(x.iv, p)
		} else {
			var made bool
			if x.iv, made, err = c.ivFor(x.iv, p); made {
				result.IV = x.iv
			}
		}
		if err != nil {
			return result, err
		}
		x.iv, x.aad = bytes.Clone(x.iv), bytes.Clone(x.aad)
	case len(r.Correlation) == 0:
		return result, Refuse(kmip.ResultReasonInvalidField, "the last part of a stream needs its correlation value")
	default:
		x = s.k.streams.take(r.Correlation, owner, now)
		if x == nil || x.id != id || x.encrypt != encrypt {
			return result, Refuse(kmip.ResultReasonInvalidField, "no such stream is under way for this client and key at this server")
		}
	}
	done := func(err error) (CipherResult, error) {
		clear(x.in)
		return CipherResult{}, err
	}
	if len(x.in)+len(r.Data) > streamBytes {
		return done(Refuse(kmip.ResultReasonInvalidField, "a stream has at most %d bytes", streamBytes))
	}
	grown := append(bytes.Clone(x.in), r.Data...)
	clear(x.in)
	x.in = grown
	c, _, err := s.symmetric(ctx, o, x.params)
	if err != nil {
		return done(err)
	}
	out, tag, err := c.part(x, r.Tag, r.Final)
	if err != nil {
		return done(err)
	}
	if len(out) > x.told {
		result.Data = out[x.told:]
	}
	result.Tag, x.told = tag, len(out)
	if r.Final {
		clear(x.in)
		return result, nil
	}
	result.Correlation = r.Correlation
	if !s.k.streams.put(r.Correlation, x, now) {
		return done(Refuse(kmip.ResultReasonPermissionDenied, "too many streams are under way; a client has at most %d", maxEach))
	}
	return result, nil
}

// part is the output for all input of a stream so far.
func (c *symmetric) part(x *stream, tag []byte, final bool) (out, sum []byte, err error) {
	in, size := x.in, c.block.BlockSize()
	whole := c.mode == kmip.BlockCipherModeECB || c.mode == kmip.BlockCipherModeCBC
	switch {
	case final && x.encrypt:
		return c.encrypt(x.iv, x.aad, in)
	case final && (len(in) > 0 || c.mode == kmip.BlockCipherModeGCM):
		out, err = c.decrypt(x.iv, x.aad, in, tag)
		return out, nil, err
	case final, !x.encrypt && c.mode == kmip.BlockCipherModeGCM:
		return nil, nil, nil
	}
	if whole {
		n := len(in)
		if !x.encrypt && c.pad != kmip.PaddingMethodNone && n > 0 {
			n-- // the last block may be padding
		}
		in = in[:n/size*size]
		if len(in) == 0 {
			return nil, nil, nil
		}
	}
	bare := *c
	if whole {
		bare.pad = kmip.PaddingMethodNone
	}
	if x.encrypt {
		out, _, err = bare.encrypt(x.iv, x.aad, in)
	} else {
		out, err = bare.decrypt(x.iv, x.aad, in, nil)
	}
	return out, nil, err
}
