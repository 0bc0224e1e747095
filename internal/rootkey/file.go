package rootkey

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"filippo.io/age"
	"filippo.io/age/armor"

	"mortise/internal/secret"
)

// A sealed file is text of three lines, an empty line, and an armored age file
// (age-encryption.org/v1) with one scrypt recipient, which holds the key id
// (16 bytes) and the key (32):
//
//	mortise-rootkey v1
//	key 0123456789abcdef0123456789abcdef
//	sha256 (64 hexadecimal digits: of the armored age file)
//
//	-----BEGIN AGE ENCRYPTED FILE-----
//	…
//
// The sum tells damage from a wrong passphrase, which age alone cannot. It
// authenticates nothing; age does.
const (
	fileMagic = "mortise-rootkey"
	fileV1    = "v1"
	maxFile   = 64 << 10
)

// DefaultWorkFactor is the binary logarithm of scrypt's N: 18 takes 256 MiB
// and about a second.
const DefaultWorkFactor = 18

// maxWorkFactor bounds what a file made by somebody else may cost us: 1 GiB.
const maxWorkFactor = 20

var (
	// ErrWrongPassphrase means that the file is whole and the passphrase is
	// not its own.
	ErrWrongPassphrase = errors.New("wrong passphrase")
	// ErrDamaged means that the file is not what Create wrote.
	ErrDamaged = errors.New("damaged root key file")
	// ErrNewer means that a later version of Mortise wrote the file.
	ErrNewer = errors.New("root key file of a newer version")
)

// Create makes a random root key, seals it in a new file at path (mode 0600)
// and returns it open. workFactor is the binary logarithm of scrypt's cost, 0
// for DefaultWorkFactor. The file appears whole and durable or not at all. If
// path exists, Create leaves it alone and fails with fs.ErrExist: overwriting
// a root key destroys all that it wraps.
func Create(path string, passphrase *secret.Key, workFactor int) (*Key, error) {
	if workFactor == 0 {
		workFactor = DefaultWorkFactor
	}
	if workFactor < 1 || workFactor > maxWorkFactor {
		return nil, fmt.Errorf("rootkey: scrypt work factor %d is not within 1 to %d", workFactor, maxWorkFactor)
	}
	if _, err := os.Lstat(path); err == nil { // a friendlier, earlier answer; the link in writeNew is what guards
		return nil, existsError(path)
	}
	k := &Key{}
	if _, err := rand.Read(k.id[:]); err != nil {
		return nil, fmt.Errorf("rootkey: making a key id: %w", err)
	}
	var err error
	if k.key, err = secret.Random(nil, keyLen); err != nil {
		return nil, err
	}
	text, err := k.seal(passphrase, workFactor)
	if err == nil {
		err = writeNew(path, text)
	}
	if err != nil {
		k.Wipe()
		return nil, err
	}
	return k, nil
}

// Open opens the root key in the file at path. Its errors match
// ErrWrongPassphrase, ErrDamaged, ErrNewer or those of the file system.
func Open(path string, passphrase *secret.Key) (*Key, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO would wait for ever
	if err != nil {
		return nil, fmt.Errorf("rootkey: opening the sealed root key: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("rootkey: reading %s: %w", path, err)
	}
	k, err := unseal(text, passphrase)
	switch {
	case errors.Is(err, ErrDamaged):
		return nil, fmt.Errorf("rootkey: %s: %w; restore the file from a backup", path, err)
	case err != nil:
		return nil, fmt.Errorf("rootkey: %s: %w", path, err)
	}
	return k, nil
}

func (k *Key) seal(passphrase *secret.Key, workFactor int) ([]byte, error) {
	var sealed bytes.Buffer
	var err error
	passphrase.Use(func(p []byte) {
		err = k.encrypt(&sealed, string(p), workFactor)
	})
	if err != nil {
		return nil, fmt.Errorf("rootkey: sealing the root key: %w", err)
	}
	return file{id: k.id, sealed: sealed.Bytes()}.text(), nil
}

func (k *Key) encrypt(to io.Writer, passphrase string, workFactor int) error {
	recipient, err := age.NewScryptRecipient(passphrase)
	if err != nil {
		return err
	}
	recipient.SetWorkFactor(workFactor)
	armored := armor.NewWriter(to)
	w, err := age.Encrypt(armored, recipient)
	if err != nil {
		return err
	}
	if _, err := w.Write(k.id[:]); err != nil {
		return err
	}
	k.key.Use(func(b []byte) { _, err = w.Write(b) })
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return armored.Close()
}

func unseal(text []byte, passphrase *secret.Key) (k *Key, err error) {
	f, err := parse(text)
	if err != nil {
		return nil, err
	}
	plain := make([]byte, idLen+keyLen)
	defer clear(plain)
	passphrase.Use(func(p []byte) { err = decrypt(plain, armor.NewReader(bytes.NewReader(f.sealed)), string(p)) })
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(plain[:idLen], f.id[:]) {
		return nil, fmt.Errorf("%w: its key id line was changed", ErrDamaged)
	}
	k = &Key{id: f.id}
	if k.key, err = secret.Take(plain[idLen:]); err != nil {
		return nil, err
	}
	return k, nil
}

// decrypt fills plain, exactly, from an age file.
func decrypt(plain []byte, sealed io.Reader, passphrase string) error {
	scrypt, err := age.NewScryptIdentity(passphrase)
	if err != nil {
		return err
	}
	scrypt.SetMaxWorkFactor(maxWorkFactor)
	r, err := age.Decrypt(sealed, scryptOnly{scrypt})
	if errors.Is(err, age.ErrIncorrectIdentity) {
		return ErrWrongPassphrase
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if _, err := io.ReadFull(r, plain); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("%w: more than a key inside", ErrDamaged)
	}
	return nil
}

// scryptOnly reports a file that is sealed to something other than a
// passphrase as damage; age would call it a wrong passphrase.
type scryptOnly struct{ *age.ScryptIdentity }

func (s scryptOnly) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	if len(stanzas) != 1 || stanzas[0].Type != "scrypt" {
		return nil, errors.New("not sealed by a passphrase")
	}
	return s.ScryptIdentity.Unwrap(stanzas)
}

// file is a sealed file taken apart.
type file struct {
	id     [idLen]byte
	sealed []byte // armored age
}

func (f file) text() []byte {
	head := fmt.Sprintf("%s %s\nkey %x\nsha256 %x\n\n", fileMagic, fileV1, f.id, sha256.Sum256(f.sealed))
	return append([]byte(head), f.sealed...)
}

// parse accepts exactly what text prints.
func parse(text []byte) (file, error) {
	damaged := func(format string, args ...any) (file, error) {
		return file{}, fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
	}
	if len(text) > maxFile {
		return damaged("longer than %d bytes", maxFile)
	}
	head, sealed, whole := strings.Cut(string(text), "\n\n")
	line := strings.Split(head, "\n")
	magic, version, _ := strings.Cut(line[0], " ")
	if magic != fileMagic {
		return damaged("it does not begin with %q", fileMagic)
	}
	if version != fileV1 {
		if strings.HasPrefix(version, "v") && len(version) < 8 {
			return file{}, fmt.Errorf("%w: %q, this program knows %s", ErrNewer, version, fileV1)
		}
		return damaged("no version in its first line")
	}
	if !whole || len(line) != 3 {
		return damaged("cut off, or not three lines and an empty one")
	}
	f := file{sealed: []byte(sealed)}
	var sum [sha256.Size]byte
	if !hexLine(f.id[:], line[1], "key ") {
		return damaged("no key id in its second line")
	}
	if !hexLine(sum[:], line[2], "sha256 ") {
		return damaged("no checksum in its third line")
	}
	if sum != sha256.Sum256(f.sealed) {
		return damaged("its checksum does not match")
	}
	return f, nil
}

// hexLine fills dst from a line of a label and lower-case hexadecimal digits.
func hexLine(dst []byte, line, label string) bool {
	digits, ok := strings.CutPrefix(line, label)
	if !ok || len(digits) != hex.EncodedLen(len(dst)) || digits != strings.ToLower(digits) {
		return false
	}
	_, err := hex.Decode(dst, []byte(digits))
	return err == nil
}

func existsError(path string) error {
	return fmt.Errorf("rootkey: %s exists and is not overwritten, because what it wraps would be lost; move it away to start afresh: %w", path, fs.ErrExist)
}

// writeNew makes a durable file at path, which must not exist: a whole
// temporary file is linked to its name, which fails when the name is taken.
func writeNew(path string, data []byte) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("rootkey: creating %s: %w", path, err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Link(tmp.Name(), path)
	}
	if errors.Is(err, fs.ErrExist) {
		return existsError(path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("rootkey: writing %s: %w", path, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
