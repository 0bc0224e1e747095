package keysafe

import (
	"encoding/base64"
	"fmt"
	"strings"
)

const (
	scheme  = "mortise:key/"
	version = "v1"
	foreign = "vmware:key/"

	wrapAlgorithm = "AES-256-GCM"

	// MaxPairs is how many pairs a safe may hold: one, two during a shallow
	// recrypt, a few more after interrupted ones.
	MaxPairs = 8
	// MaxText bounds the text of a safe in bytes.
	MaxText = 16 << 10
)

var blobEncoding = base64.RawURLEncoding.Strict()

// Parse reads the text of a safe. Errors: *ForeignError for VMware's,
// *SyntaxError for anything else that String would not have written.
func Parse(text string) (Safe, error) {
	if len(text) >= len(foreign) && strings.EqualFold(text[:len(foreign)], foreign) {
		return Safe{}, &ForeignError{}
	}
	if len(text) > MaxText {
		return Safe{}, &SyntaxError{MaxText, fmt.Sprintf("%d bytes, at most %d", len(text), MaxText)}
	}
	p := parser{rest: text, size: len(text)}
	if !p.skip(scheme) {
		return Safe{}, p.errorf("it does not begin with %q", scheme)
	}
	if v := p.until("/"); v != version {
		return Safe{}, p.errorf("version %.16q is unknown: a newer Mortise wrote it; this one reads %s", v, version)
	}
	if !p.skip("/list/(") {
		return Safe{}, p.errorf("no list")
	}
	var s Safe
	for {
		pr, err := p.pair()
		if err != nil {
			return Safe{}, err
		}
		if s.find(pr.id) >= 0 {
			return Safe{}, p.errorf("key %s is there twice", pr.id)
		}
		if len(s.pairs) == MaxPairs {
			return Safe{}, p.errorf("more than %d pairs", MaxPairs)
		}
		s.pairs = append(s.pairs, pr)
		if p.skip(",") {
			continue
		}
		if p.rest != ")" {
			return Safe{}, p.errorf("the list does not end where the text does: it is cut or has something behind it")
		}
		return s, nil
	}
}

// String is the text of the safe; "" for the zero Safe.
func (s Safe) String() string {
	if len(s.pairs) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString(scheme + version + "/list/(")
	for i, p := range s.pairs {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "pair/(fqid/%s/%s,%s,%s)", escape(p.id.Provider), escape(p.id.Key), wrapAlgorithm, blobEncoding.EncodeToString(p.blob))
	}
	b.WriteByte(')')
	return b.String()
}

type parser struct {
	rest string
	size int
}

func (p *parser) errorf(format string, args ...any) error {
	return &SyntaxError{p.size - len(p.rest), fmt.Sprintf(format, args...)}
}

func (p *parser) skip(s string) (ok bool) {
	p.rest, ok = strings.CutPrefix(p.rest, s)
	return ok
}

// until takes the text before the first of the bytes in stop.
func (p *parser) until(stop string) string {
	i := strings.IndexAny(p.rest, stop)
	if i < 0 {
		i = len(p.rest)
	}
	s := p.rest[:i]
	p.rest = p.rest[i:]
	return s
}

func (p *parser) pair() (pair, error) {
	var pr pair
	if !p.skip("pair/(fqid/") {
		return pr, p.errorf("no pair of a key id")
	}
	var err error
	if pr.id.Provider, err = unescape(p.until("/,()")); err != nil || !p.skip("/") {
		return pr, p.errorf("bad provider name")
	}
	if pr.id.Key, err = unescape(p.until("/,()")); err != nil || !p.skip(",") {
		return pr, p.errorf("bad key id")
	}
	if err := pr.id.check(); err != nil {
		return pr, p.errorf("%v", err)
	}
	if alg := p.until(",()"); alg != wrapAlgorithm {
		return pr, p.errorf("wrap algorithm %.32q is unknown, only %s is known", alg, wrapAlgorithm)
	}
	if !p.skip(",") {
		return pr, p.errorf("no wrapped key")
	}
	text := p.until(",()")
	if pr.blob, err = blobEncoding.DecodeString(text); err != nil || strings.ContainsAny(text, "\r\n") {
		return pr, p.errorf("the wrapped key is no base64url")
	}
	if n := len(pr.blob); n != overhead+DEKSize(CipherXTS) && n != overhead+DEKSize(CipherGCM) {
		return pr, p.errorf("a wrapped key of %d bytes: it is cut", n)
	}
	if !p.skip(")") {
		return pr, p.errorf("the pair is not closed")
	}
	return pr, nil
}

const upperHex = "0123456789ABCDEF"

func unreserved(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~'
}

func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; unreserved(c) {
			b.WriteByte(c)
		} else {
			b.WriteByte('%')
			b.WriteByte(upperHex[c>>4])
			b.WriteByte(upperHex[c&15])
		}
	}
	return b.String()
}

// unescape accepts only what escape writes.
func unescape(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '%' && i+2 < len(s) {
			hi, lo := strings.IndexByte(upperHex, s[i+1]), strings.IndexByte(upperHex, s[i+2])
			if hi < 0 || lo < 0 || unreserved(byte(hi<<4|lo)) {
				return "", fmt.Errorf("bad escape")
			}
			b.WriteByte(byte(hi<<4 | lo))
			i += 2
			continue
		}
		if !unreserved(c) {
			return "", fmt.Errorf("bad byte")
		}
		b.WriteByte(c)
	}
	return b.String(), nil
}
