//go:build cgo

package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	cryptoki "github.com/miekg/pkcs11"

	"mortise/internal/rootkey/pkcs11"
)

// objectLabel marks our keys among others in the token.
const objectLabel = "mortise-crk"

const (
	nonceLen = 12
	tagBits  = 128
)

// token is a PKCS#11 token with one session (PKCS#11 v2.40).
type token struct {
	lib     *cryptoki.Ctx
	slot    uint
	name    string
	session cryptoki.SessionHandle
	open    bool
}

// open loads the library and finds the token.
func open(module, label string) (*token, error) {
	lib := cryptoki.New(module)
	if lib == nil {
		return nil, fmt.Errorf("%s is not there or is no PKCS#11 library", module)
	}
	if err := lib.Initialize(); err != nil {
		return nil, fmt.Errorf("initialising %s: %w", module, err)
	}
	slots, err := lib.GetSlotList(true)
	if err != nil {
		return nil, fmt.Errorf("listing the slots: %w", err)
	}
	var found []uint
	var names []string
	for _, s := range slots {
		info, err := lib.GetTokenInfo(s)
		if err != nil || info.Flags&cryptoki.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		name := strings.TrimRight(info.Label, " \x00")
		if label == "" || name == label {
			found, names = append(found, s), append(names, name)
		}
	}
	switch {
	case len(found) == 1:
		return &token{lib: lib, slot: found[0], name: names[0]}, nil
	case len(found) == 0 && label == "":
		return nil, errors.New("no initialised token is there")
	case len(found) == 0:
		return nil, fmt.Errorf("no initialised token has the label %q", label)
	}
	return nil, fmt.Errorf("several tokens are there (%s); say which by its label", strings.Join(names, ", "))
}

func (t *token) close() {
	if t.open {
		_ = t.lib.CloseSession(t.session)
	}
	_ = t.lib.Finalize()
	t.lib.Destroy()
}

func (t *token) Name() string { return t.name }

func (t *token) Login(pin []byte) error {
	if t.open {
		return errors.New("the session is open already")
	}
	session, err := t.lib.OpenSession(t.slot, cryptoki.CKF_SERIAL_SESSION|cryptoki.CKF_RW_SESSION)
	if err != nil {
		return fmt.Errorf("opening a session: %w", err)
	}
	// The binding wants a string, which stays in this process's memory.
	if err := t.lib.Login(session, cryptoki.CKU_USER, string(pin)); err != nil {
		_ = t.lib.CloseSession(session)
		return fmt.Errorf("%w: %w", pkcs11.ErrPIN, err)
	}
	t.session, t.open = session, true
	return nil
}

var errNoSession = errors.New("log in first")

func (t *token) Create(id []byte) error {
	if !t.open {
		return errNoSession
	}
	if err := t.unused(id); err != nil {
		return err
	}
	mech := []*cryptoki.Mechanism{cryptoki.NewMechanism(cryptoki.CKM_AES_KEY_GEN, nil)}
	_, err := t.lib.GenerateKey(t.session, mech, append(template(id), cryptoki.NewAttribute(cryptoki.CKA_VALUE_LEN, 32)))
	if err != nil {
		return fmt.Errorf("making a key: %w", err)
	}
	return nil
}

func (t *token) Import(id, key []byte) error {
	if !t.open {
		return errNoSession
	}
	if err := t.unused(id); err != nil {
		return err
	}
	if _, err := t.lib.CreateObject(t.session, append(template(id), cryptoki.NewAttribute(cryptoki.CKA_VALUE, key))); err != nil {
		return fmt.Errorf("importing a key (a token may refuse keys that it has not made): %w", err)
	}
	return nil
}

// unused refuses an id that a key has: a token takes several of one CKA_ID.
func (t *token) unused(id []byte) error {
	_, err := t.find(id)
	switch {
	case err == nil:
		return pkcs11.ErrKeyExists
	case errors.Is(err, pkcs11.ErrUnknownKey):
		return nil
	}
	return err
}

// template is of a key that encrypts and decrypts and does nothing else.
func template(id []byte) []*cryptoki.Attribute {
	return []*cryptoki.Attribute{
		cryptoki.NewAttribute(cryptoki.CKA_CLASS, cryptoki.CKO_SECRET_KEY),
		cryptoki.NewAttribute(cryptoki.CKA_KEY_TYPE, cryptoki.CKK_AES),
		cryptoki.NewAttribute(cryptoki.CKA_ID, id),
		cryptoki.NewAttribute(cryptoki.CKA_LABEL, objectLabel),
		cryptoki.NewAttribute(cryptoki.CKA_TOKEN, true),
		cryptoki.NewAttribute(cryptoki.CKA_PRIVATE, true),
		cryptoki.NewAttribute(cryptoki.CKA_SENSITIVE, true),
		cryptoki.NewAttribute(cryptoki.CKA_EXTRACTABLE, false),
		cryptoki.NewAttribute(cryptoki.CKA_ENCRYPT, true),
		cryptoki.NewAttribute(cryptoki.CKA_DECRYPT, true),
		cryptoki.NewAttribute(cryptoki.CKA_WRAP, false),
		cryptoki.NewAttribute(cryptoki.CKA_UNWRAP, false),
	}
}

func (t *token) Encrypt(id, plaintext, additional []byte) ([]byte, error) {
	key, err := t.find(id)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, nonceLen)
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	params := cryptoki.NewGCMParams(nonce, additional, tagBits)
	defer params.Free()
	if err := t.lib.EncryptInit(t.session, []*cryptoki.Mechanism{cryptoki.NewMechanism(cryptoki.CKM_AES_GCM, params)}, key); err != nil {
		return nil, fmt.Errorf("encrypting (CKM_AES_GCM): %w", err)
	}
	sealed, err := t.lib.Encrypt(t.session, plaintext)
	if err != nil {
		return nil, fmt.Errorf("encrypting (CKM_AES_GCM): %w", err)
	}
	// A token in FIPS mode makes the nonce itself.
	if used := params.IV(); len(used) == nonceLen {
		nonce = used
	}
	return append(nonce, sealed...), nil
}

func (t *token) Decrypt(id, sealed, additional []byte) ([]byte, error) {
	key, err := t.find(id)
	if err != nil {
		return nil, err
	}
	if len(sealed) < nonceLen+tagBits/8 {
		return nil, fmt.Errorf("%w: %d bytes", pkcs11.ErrBlob, len(sealed))
	}
	params := cryptoki.NewGCMParams(sealed[:nonceLen], additional, tagBits)
	defer params.Free()
	if err := t.lib.DecryptInit(t.session, []*cryptoki.Mechanism{cryptoki.NewMechanism(cryptoki.CKM_AES_GCM, params)}, key); err != nil {
		return nil, fmt.Errorf("decrypting (CKM_AES_GCM): %w", err)
	}
	plain, err := t.lib.Decrypt(t.session, sealed[nonceLen:])
	if err != nil { // tokens differ in the code that they give for a wrong tag
		return nil, fmt.Errorf("%w: %w", pkcs11.ErrBlob, err)
	}
	return plain, nil
}

func (t *token) Destroy(id []byte) error {
	keys, err := t.search(cryptoki.NewAttribute(cryptoki.CKA_ID, id))
	if err != nil {
		return err
	}
	for _, k := range keys {
		if err := t.lib.DestroyObject(t.session, k); err != nil {
			return fmt.Errorf("destroying the key: %w", err)
		}
	}
	return nil
}

func (t *token) List() (ids [][]byte, err error) {
	keys, err := t.search()
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		a, err := t.lib.GetAttributeValue(t.session, k, []*cryptoki.Attribute{cryptoki.NewAttribute(cryptoki.CKA_ID, nil)})
		if err != nil {
			return nil, fmt.Errorf("reading a key's id: %w", err)
		}
		ids = append(ids, a[0].Value)
	}
	return ids, nil
}

func (t *token) find(id []byte) (cryptoki.ObjectHandle, error) {
	keys, err := t.search(cryptoki.NewAttribute(cryptoki.CKA_ID, id))
	if err != nil {
		return 0, err
	}
	switch len(keys) {
	case 0:
		return 0, pkcs11.ErrUnknownKey
	case 1:
		return keys[0], nil
	}
	return 0, fmt.Errorf("%d keys have the id %x", len(keys), id)
}

// search finds our keys.
func (t *token) search(more ...*cryptoki.Attribute) ([]cryptoki.ObjectHandle, error) {
	if !t.open {
		return nil, errNoSession
	}
	ours := append([]*cryptoki.Attribute{
		cryptoki.NewAttribute(cryptoki.CKA_CLASS, cryptoki.CKO_SECRET_KEY),
		cryptoki.NewAttribute(cryptoki.CKA_LABEL, objectLabel),
	}, more...)
	if err := t.lib.FindObjectsInit(t.session, ours); err != nil {
		return nil, fmt.Errorf("searching keys: %w", err)
	}
	var all []cryptoki.ObjectHandle
	for {
		some, _, err := t.lib.FindObjects(t.session, 100)
		if err != nil {
			_ = t.lib.FindObjectsFinal(t.session)
			return nil, fmt.Errorf("searching keys: %w", err)
		}
		all = append(all, some...)
		if len(some) == 0 {
			break
		}
	}
	if err := t.lib.FindObjectsFinal(t.session); err != nil {
		return nil, fmt.Errorf("searching keys: %w", err)
	}
	return all, nil
}
