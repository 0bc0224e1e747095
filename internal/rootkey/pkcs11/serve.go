package pkcs11

import (
	"errors"
	"fmt"
	"io"
)

// A Device is a token as the helper serves it. Keys are AES-256 keys of the
// token, named by their id (CKA_ID); they never leave it. Serve calls one method
// at a time.
type Device interface {
	Name() string
	// Login opens a session; ErrPIN when the token refuses the PIN.
	Login(pin []byte) error
	Create(id []byte) error
	Import(id, key []byte) error
	// Encrypt is AES-GCM; it returns nonce, ciphertext and tag in one.
	Encrypt(id, plaintext, additional []byte) ([]byte, error)
	Decrypt(id, sealed, additional []byte) ([]byte, error)
	// Destroy returns nil when there is no such key.
	Destroy(id []byte) error
	List() ([][]byte, error)
}

// What a Device and, with more words, a Token answer.
var (
	ErrUnknownKey = errors.New("no such key in the token")
	ErrKeyExists  = errors.New("the token has a key of that id")
	ErrBlob       = errors.New("the token does not decrypt it: damaged, or wrapped for something else")
	ErrPIN        = errors.New("the token refuses the PIN")
)

var errRequest = errors.New("the helper does not understand the request")

// Serve answers requests until r ends.
func Serve(r io.Reader, w io.Writer, d Device) error {
	for {
		ask, wipe, err := readMessage(r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		fields, err := answer(d, ask)
		wipe()
		m := message{statusOK, fields}
		if err != nil {
			m = message{statusOf(err), [][]byte{[]byte(fmt.Sprintf("%.1000s", err))}}
		}
		err = writeMessage(w, m)
		for _, f := range fields {
			clear(f)
		}
		if err != nil {
			return fmt.Errorf("answering: %w", err)
		}
	}
}

func statusOf(err error) byte {
	switch {
	case errors.Is(err, ErrUnknownKey):
		return statusUnknown
	case errors.Is(err, ErrKeyExists):
		return statusExists
	case errors.Is(err, ErrBlob):
		return statusBlob
	case errors.Is(err, ErrPIN):
		return statusPIN
	case errors.Is(err, errRequest):
		return statusRequest
	}
	return statusToken
}

func answer(d Device, m message) ([][]byte, error) {
	want, known := map[byte]int{opHello: 1, opLogin: 1, opCreate: 1, opImport: 2, opEncrypt: 3, opDecrypt: 3, opDestroy: 1, opList: 0}[m.code]
	if !known || len(m.fields) != want {
		return nil, fmt.Errorf("%w: operation %d with %d fields", errRequest, m.code, len(m.fields))
	}
	f := m.fields
	one := func(b []byte, err error) ([][]byte, error) { return [][]byte{b}, err }
	switch m.code {
	case opHello:
		if string(f[0]) != protocolVersion {
			return nil, fmt.Errorf("%w: the KMS speaks %.40q, the helper %q: both must be of one release", errRequest, f[0], protocolVersion)
		}
		return [][]byte{[]byte(protocolVersion), []byte(d.Name())}, nil
	case opLogin:
		return nil, d.Login(f[0])
	case opCreate:
		return nil, d.Create(f[0])
	case opImport:
		return nil, d.Import(f[0], f[1])
	case opEncrypt:
		return one(d.Encrypt(f[0], f[1], f[2]))
	case opDecrypt:
		return one(d.Decrypt(f[0], f[1], f[2]))
	case opDestroy:
		return nil, d.Destroy(f[0])
	default:
		return d.List()
	}
}
