package keysafe

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"mortise/internal/secret"
	"mortise/internal/vmxfile"
)

// The VMX entries that make up a bundle.
const (
	KeySafeEntry    = "encryption.keySafe"    // the configuration key, wrapped
	GenerationEntry = "encryption.generation" // counts changes of the bundle, from 1
	DataEntry       = "encryption.data"       // base64 of nonce, ciphertext, tag
)

// ErrNotEncrypted says that a VMX has no bundle and none was expected.
var ErrNotEncrypted = errors.New("keysafe: the VM is not encrypted")

// A Bundle is what an encrypted VM's VMX holds in secret (rule E3). A VM's
// configuration key, AES-256, is wrapped in a safe with RoleVMConfig; everything
// below is sealed under it with AES-256-GCM. The additional data is the VM's
// UUID, the generation and the text of the safe, so the three entries belong
// together.
//
// The maps' keys belong to the bundle: Wipe wipes them. It is not safe for
// concurrent use.
type Bundle struct {
	Files   map[string]*secret.Key // XTS keys of the VM's files, 64 bytes, by file name
	Disks   map[uuid.UUID]DiskRecord
	Secrets map[string]*secret.Key // whatever else the VM needs, by name

	vm         uuid.UUID
	config     *secret.Key
	safe       Safe
	generation uint64 // as read; 0 when never saved
}

// A DiskRecord is what the VMX knows of a disk of its VM, by the disk's UUID. It
// is what keeps an edited descriptor from turning encryption off.
type DiskRecord struct {
	Encrypted bool   // the disk must be encrypted
	Epoch     uint64 // least epoch that its descriptor may have
}

// An Expectation is what the inventory knows of a VM: it has the last word, since
// whoever can edit the VMX can delete the bundle or bring back an older one.
type Expectation struct {
	Encrypted  bool
	Generation uint64 // the least acceptable
}

// A StaleError says that a VMX is older than the inventory knows: restored from a
// backup, or brought back by somebody.
type StaleError struct {
	File       string
	Have, Want uint64 // generations
}

func (e *StaleError) Error() string {
	return fmt.Sprintf("%s: its encryption bundle is of generation %d, but %d was already in use: an older copy was put in its place; put the newer back, or register the VM again to accept this one", e.File, e.Have, e.Want)
}

// NewBundle makes an empty bundle with a fresh configuration key, wrapped under
// kek. random nil means crypto/rand.
func NewBundle(random io.Reader, vm uuid.UUID, id KeyID, kek *secret.Key) (*Bundle, error) {
	config, err := secret.Random(random, DEKSize(CipherGCM))
	if err != nil {
		return nil, err
	}
	b := &Bundle{vm: vm, config: config, Files: map[string]*secret.Key{}, Disks: map[uuid.UUID]DiskRecord{}, Secrets: map[string]*secret.Key{}}
	if b.safe, err = Wrap(random, b.Binding(), id, kek, config); err != nil {
		config.Wipe()
		return nil, err
	}
	return b, nil
}

// Binding is what the configuration key is bound to.
func (b *Bundle) Binding() Binding {
	return Binding{VM: b.vm, Role: RoleVMConfig, Cipher: CipherGCM}
}

// Safe is the safe of the configuration key.
func (b *Bundle) Safe() Safe { return b.safe }

// Generation is that of the VMX when the bundle was opened or last sealed.
func (b *Bundle) Generation() uint64 { return b.generation }

// Rewrap adds a pair of to, see Safe.Rewrap; Keep then drops the others. Between
// the two the caller seals, saves, and opens again what it saved.
func (b *Bundle) Rewrap(random io.Reader, keks KEKs, to KeyID) error {
	s, err := b.safe.Rewrap(random, b.Binding(), keks, to)
	if err != nil {
		return err
	}
	b.safe = s
	return nil
}

// Keep drops every pair but that of id.
func (b *Bundle) Keep(id KeyID) error {
	s, err := b.safe.Only(id)
	if err != nil {
		return err
	}
	b.safe = s
	return nil
}

// Succeed lets a fresh bundle take the place of old, which it was made from, as a
// deep recrypt of the VM's files needs: Seal then wants f at old's generation.
func (b *Bundle) Succeed(old *Bundle) { b.generation = old.generation }

// Wipe zeroes every key in the bundle; a nil Bundle is fine.
func (b *Bundle) Wipe() {
	if b == nil {
		return
	}
	b.config.Wipe()
	for _, k := range b.Files {
		k.Wipe()
	}
	for _, k := range b.Secrets {
		k.Wipe()
	}
}

// IsEncrypted says whether a VMX has any entry of a bundle, ours or VMware's.
func IsEncrypted(f *vmxfile.File) bool {
	for key := range f.All() {
		if k := strings.ToLower(key); strings.HasPrefix(k, "encryption.") || k == "encryptedvm.guid" {
			return true
		}
	}
	return false
}

// ReadSafe returns the safe of a VMX without opening it: its key ids say which
// KEKs the VM needs. Errors: ErrNotEncrypted, *MissingError, *ForeignError,
// *TamperedError.
func ReadSafe(f *vmxfile.File) (Safe, error) {
	if !IsEncrypted(f) {
		return Safe{}, ErrNotEncrypted
	}
	for key, value := range f.All() {
		if k := strings.ToLower(key); k == "encryption.bundle" || k == "encryptedvm.guid" || strings.HasPrefix(k, "encryption.") && strings.HasPrefix(strings.ToLower(value), foreign) {
			return Safe{}, fmt.Errorf("%s: entry %s: %w", f.Name(), key, &ForeignError{})
		}
	}
	for _, key := range [...]string{KeySafeEntry, GenerationEntry, DataEntry} {
		if v, ok := f.Get(key); !ok || v == "" {
			return Safe{}, &MissingError{File: f.Name(), What: key}
		}
	}
	text, _ := f.Get(KeySafeEntry)
	s, err := Parse(text)
	if err != nil {
		return Safe{}, &TamperedError{KeySafeEntry + " in " + f.Name(), err.Error()}
	}
	return s, nil
}

// OpenBundle opens the bundle of vm's VMX. Errors: ErrNotEncrypted when there is
// none and want does not expect one; *MissingError, *ForeignError,
// *TamperedError, *StaleError, *KeysRequiredError.
func OpenBundle(f *vmxfile.File, vm uuid.UUID, keks KEKs, want Expectation) (*Bundle, error) {
	safe, err := ReadSafe(f)
	if errors.Is(err, ErrNotEncrypted) && want.Encrypted {
		return nil, &MissingError{File: f.Name(), What: KeySafeEntry}
	}
	if err != nil {
		return nil, err
	}
	generation, err := readGeneration(f)
	if err != nil {
		return nil, err
	}
	b := &Bundle{vm: vm, safe: safe, generation: generation}
	if b.config, _, err = safe.Unwrap(b.Binding(), keks); err != nil {
		var t *TamperedError
		if errors.As(err, &t) {
			return nil, &TamperedError{KeySafeEntry + " in " + f.Name(), t.Why}
		}
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if err := b.open(f); err != nil {
		b.Wipe()
		return nil, err
	}
	// Only an authentic generation is worth comparing.
	if generation < want.Generation {
		b.Wipe()
		return nil, &StaleError{f.Name(), generation, want.Generation}
	}
	return b, nil
}

func readGeneration(f *vmxfile.File) (uint64, error) {
	text, _ := f.Get(GenerationEntry)
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil || n == 0 {
		return 0, &TamperedError{GenerationEntry + " in " + f.Name(), "it is no count from 1"}
	}
	return n, nil
}

func (b *Bundle) open(f *vmxfile.File) error {
	tampered := func(why string) error { return &TamperedError{DataEntry + " in " + f.Name(), why} }
	text, _ := f.Get(DataEntry)
	sealed, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(sealed) < overhead {
		return tampered("it is cut, or no base64")
	}
	plain := make([]byte, 0, len(sealed))
	defer func() { clear(plain[:cap(plain)]) }()
	b.config.Use(func(k []byte) {
		aead, gerr := newGCM(k)
		if err = gerr; err == nil {
			plain, err = aead.Open(plain, sealed[:nonceSize], sealed[nonceSize:], b.additionalData(b.generation))
		}
	})
	if err != nil {
		return tampered("it does not belong to this VM's key safe and generation")
	}
	return b.decode(plain)
}

func (b *Bundle) additionalData(generation uint64) []byte {
	var out []byte
	for _, field := range [][]byte{[]byte("mortise bundle v1"), b.vm[:], binary.BigEndian.AppendUint64(nil, generation), []byte(b.safe.String())} {
		out = binary.BigEndian.AppendUint32(out, uint32(len(field)))
		out = append(out, field...)
	}
	return out
}

// Seal writes the bundle into f, in place of the one it was opened from: f must
// still be of the generation that was read (compare and swap), ErrConflict
// otherwise. The caller saves f; between loading and saving it holds the VMX as
// vmxfile.Update does.
func (b *Bundle) Seal(random io.Reader, f *vmxfile.File) error {
	switch _, err := ReadSafe(f); {
	case errors.Is(err, ErrNotEncrypted) && b.generation == 0:
	case errors.Is(err, ErrNotEncrypted):
		return &MissingError{File: f.Name(), What: KeySafeEntry}
	case err != nil:
		return err
	default:
		now, err := readGeneration(f)
		if err != nil {
			return err
		}
		if now != b.generation {
			return fmt.Errorf("%s: %w (generation %d, opened at %d)", f.Name(), ErrConflict, now, b.generation)
		}
	}
	if random == nil {
		random = rand.Reader
	}
	plain, err := b.encode()
	if err != nil {
		return err
	}
	defer clear(plain)
	sealed := make([]byte, nonceSize, overhead+len(plain))
	if _, err := io.ReadFull(random, sealed); err != nil {
		return fmt.Errorf("keysafe: reading a nonce: %w", err)
	}
	b.config.Use(func(k []byte) {
		aead, gerr := newGCM(k)
		if err = gerr; err == nil {
			sealed = aead.Seal(sealed, sealed[:nonceSize], plain, b.additionalData(b.generation+1))
		}
	})
	if err != nil {
		return err
	}
	if err := errors.Join(
		f.Set(KeySafeEntry, b.safe.String()),
		f.Set(GenerationEntry, strconv.FormatUint(b.generation+1, 10)),
		f.Set(DataEntry, base64.StdEncoding.EncodeToString(sealed)),
	); err != nil {
		return err
	}
	b.generation++
	return nil
}

// UpdateBundle opens the bundle in the VMX at path, lets edit change it, and
// saves it durably, while no other update of that VMX runs anywhere. When edit
// fails nothing is written. edit must not keep the bundle or its keys.
func UpdateBundle(path string, vm uuid.UUID, keks KEKs, want Expectation, edit func(*Bundle) error) error {
	return vmxfile.Update(path, func(f *vmxfile.File) error {
		b, err := OpenBundle(f, vm, keks, want)
		if err != nil {
			return err
		}
		defer b.Wipe()
		if err := edit(b); err != nil {
			return err
		}
		return b.Seal(nil, f)
	})
}

// RemoveBundle takes the bundle's entries out of f: the last step of decrypting a
// VM, when nothing of it is encrypted any more.
func RemoveBundle(f *vmxfile.File) {
	for _, key := range [...]string{KeySafeEntry, GenerationEntry, DataEntry} {
		f.Delete(key)
	}
}
