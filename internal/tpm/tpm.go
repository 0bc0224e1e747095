// Package tpm seals small secrets to this machine's TPM 2.0 (TCG TPM 2.0
// Library, part 3): nobody opens them on another machine, and, with a PCR
// policy, nobody opens them after the machine has started something else.
//
// Place in the flow: level 1; rootkey seals a keyring with it through an
// interface of its own. It imports secret only.
//
// Nothing stays in the TPM: every object is transient and flushed. The parent is
// the storage primary key (SRK) of the TCG's ECC P-256 template under the owner
// hierarchy with an empty password; a TPM makes the same one each time. Secrets
// pass to and from the TPM encrypted, by a session salted to the SRK, so that
// who listens on the bus learns nothing.
package tpm

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"mortise/internal/secret"
)

// DefaultDevice is the kernel's TPM with its resource manager.
const DefaultDevice = "/dev/tpmrm0"

// MaxSecret is the longest secret that is sealed, in bytes: TPM 2.0 part 2,
// MAX_SYM_DATA.
const MaxSecret = 128

// timeout bounds one exchange with a TPM behind a socket.
const timeout = 30 * time.Second

var (
	// ErrNoTPM: there is no TPM, or it may not be used.
	ErrNoTPM = errors.New("no usable TPM")
	// ErrOtherTPM: the secret was sealed by another TPM, or this one was cleared
	// since.
	ErrOtherTPM = errors.New("sealed by another TPM, or the TPM was cleared")
	// ErrPCR: the machine was started otherwise than when the secret was sealed.
	ErrPCR = errors.New("the machine's measurements have changed")
	// ErrDamaged: the blob was altered.
	ErrDamaged = errors.New("damaged TPM blob")
)

// A Sealer seals to the TPM at Device; empty means DefaultDevice. For a TPM in
// software Device may be "unix:PATH" or "tcp:HOST:PORT". PCRs are the platform
// configuration registers, of the SHA-256 bank, that must not change; Unseal
// follows the blob's own.
type Sealer struct {
	Device string
	PCRs   []uint // 0 to 23
}

// Method is "tpm".
func (Sealer) Method() string { return "tpm" }

// Seal returns a blob that only this TPM opens.
func (s Sealer) Seal(k *secret.Key) ([]byte, error) {
	if k.Len() > MaxSecret {
		return nil, fmt.Errorf("tpm: a secret of at most %d bytes is sealed, not %d", MaxSecret, k.Len())
	}
	pcrs := slices.Clone(s.PCRs)
	slices.Sort(pcrs)
	pcrs = slices.Compact(pcrs)
	if len(pcrs) > 0 && pcrs[len(pcrs)-1] >= pcrCount {
		return nil, fmt.Errorf("tpm: PCRs are 0 to %d; there is no PCR %d", pcrCount-1, pcrs[len(pcrs)-1])
	}
	t, err := s.open()
	if err != nil {
		return nil, err
	}
	defer t.close()
	b := blob{srk: t.srk.Name.Buffer}
	template := tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgKeyedHash,
		NameAlg: tpm2.TPMAlgSHA256,
		// Without PCRs the empty password opens it, with them only the policy.
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, UserWithAuth: len(pcrs) == 0},
	}
	if len(pcrs) > 0 {
		if b.pcrs, err = t.read(pcrs); err != nil {
			return nil, err
		}
		if template.AuthPolicy.Buffer, err = policy(b.pcrs); err != nil {
			return nil, err
		}
	}
	var made *tpm2.CreateResponse
	k.Use(func(bytes []byte) {
		made, err = tpm2.Create{
			ParentHandle: t.parent(),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: bytes}),
			}},
			InPublic: tpm2.New2B(template),
		}.Execute(t)
	})
	if err != nil {
		return nil, fmt.Errorf("tpm: sealing: %w", err)
	}
	b.public, b.private = made.OutPublic.Bytes(), made.OutPrivate.Buffer
	return b.bytes(), nil
}

// Unseal opens what Seal made. Its errors match ErrNoTPM, ErrOtherTPM, ErrPCR or
// ErrDamaged.
func (s Sealer) Unseal(sealed []byte) (*secret.Key, error) {
	b, err := parse(sealed)
	if err != nil {
		return nil, fmt.Errorf("tpm: %w", err)
	}
	t, err := s.open()
	if err != nil {
		return nil, err
	}
	defer t.close()
	if !bytes.Equal(t.srk.Name.Buffer, b.srk) {
		return nil, fmt.Errorf("tpm: %w: open it with what else it is sealed to, or get its keys from another member", ErrOtherTPM)
	}
	if err := t.compare(b.pcrs); err != nil {
		return nil, err
	}
	item, err := tpm2.Load{
		ParentHandle: t.parent(),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: b.private},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](b.public),
	}.Execute(t)
	if err != nil { // the parent is the right one, so the blob is not
		return nil, fmt.Errorf("tpm: %w: %w", ErrDamaged, err)
	}
	defer t.flush(item.ObjectHandle)
	options := []tpm2.AuthOption{t.salted(), tpm2.AESEncryption(128, tpm2.EncryptOut)}
	auth := tpm2.HMAC(tpm2.TPMAlgSHA256, 16, options...)
	if len(b.pcrs) > 0 {
		auth = tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(tr transport.TPM, handle tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			_, err := tpm2.PolicyPCR{PolicySession: handle, Pcrs: selection(b.pcrs)}.Execute(tr)
			return err
		}, options...)
	}
	out, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: item.ObjectHandle, Name: item.Name, Auth: auth}}.Execute(t)
	if errors.Is(err, tpm2.TPMRCPolicyFail) {
		return nil, fmt.Errorf("tpm: %w between reading and using them, or the blob's list of PCRs was altered", ErrPCR)
	}
	if err != nil {
		return nil, fmt.Errorf("tpm: unsealing: %w", err)
	}
	return secret.Take(out.OutData.Buffer)
}

// conn is an open TPM with its SRK loaded.
type conn struct {
	transport.TPMCloser
	srk    *tpm2.CreatePrimaryResponse
	public tpm2.TPMTPublic // of the SRK
}

func (s Sealer) open() (*conn, error) {
	device := s.Device
	if device == "" {
		device = DefaultDevice
	}
	t, err := dial(device)
	if err != nil {
		return nil, fmt.Errorf("tpm: %w: %s: %w", ErrNoTPM, device, err)
	}
	c := &conn{TPMCloser: t}
	c.srk, err = tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(t)
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("tpm: %w: %s: making the storage key (is the owner's password set?): %w", ErrNoTPM, device, err)
	}
	public, err := c.srk.OutPublic.Contents()
	if err != nil {
		c.close()
		return nil, fmt.Errorf("tpm: %w: %s: reading the storage key: %w", ErrNoTPM, device, err)
	}
	c.public = *public
	return c, nil
}

func (t *conn) close() {
	t.flush(t.srk.ObjectHandle)
	t.Close()
}

func (t *conn) flush(h tpm2.TPMHandle) { _, _ = tpm2.FlushContext{FlushHandle: h}.Execute(t) }

func (t *conn) salted() tpm2.AuthOption { return tpm2.Salted(t.srk.ObjectHandle, t.public) }

// parent authorises the use of the SRK, with the first parameter encrypted.
func (t *conn) parent() tpm2.AuthHandle {
	return tpm2.AuthHandle{
		Handle: t.srk.ObjectHandle,
		Name:   t.srk.Name,
		Auth:   tpm2.HMAC(tpm2.TPMAlgSHA256, 16, t.salted(), tpm2.AESEncryption(128, tpm2.EncryptIn)),
	}
}

func dial(device string) (transport.TPMCloser, error) {
	for _, network := range []string{"unix", "tcp"} {
		if address, ok := strings.CutPrefix(device, network+":"); ok {
			c, err := net.DialTimeout(network, address, timeout)
			if err != nil {
				return nil, err
			}
			return transport.FromReadWriteCloser(limited{c}), nil
		}
	}
	st, err := os.Stat(device)
	if err != nil {
		return nil, err
	}
	if st.Mode().Type()&fs.ModeDevice == 0 {
		return nil, errors.New("it is not a device")
	}
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return transport.FromReadWriteCloser(f), nil
}

// limited gives each exchange a deadline.
type limited struct{ net.Conn }

func (l limited) Write(b []byte) (int, error) {
	if err := l.SetDeadline(time.Now().Add(timeout)); err != nil {
		return 0, err
	}
	return l.Conn.Write(b)
}

const pcrCount = 24

// A pcr is a register and its value.
type pcr struct {
	index uint
	value [sha256.Size]byte
}

// read returns the values of PCRs, one by one: a TPM need not give more than
// eight at once.
func (t *conn) read(indexes []uint) (list []pcr, err error) {
	for _, i := range indexes {
		answer, err := tpm2.PCRRead{PCRSelectionIn: selection([]pcr{{index: i}})}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("tpm: reading PCR %d: %w", i, err)
		}
		if len(answer.PCRValues.Digests) != 1 || len(answer.PCRValues.Digests[0].Buffer) != sha256.Size {
			return nil, fmt.Errorf("tpm: this TPM has no SHA-256 bank with PCR %d", i)
		}
		list = append(list, pcr{i, [sha256.Size]byte(answer.PCRValues.Digests[0].Buffer)})
	}
	return list, nil
}

// compare tells which PCRs have changed. It is for the message; the TPM decides.
func (t *conn) compare(was []pcr) error {
	var indexes []uint
	for _, p := range was {
		indexes = append(indexes, p.index)
	}
	now, err := t.read(indexes)
	if err != nil {
		return err
	}
	var changed []string
	for i, p := range was {
		if now[i] != p {
			changed = append(changed, fmt.Sprint(p.index))
		}
	}
	if len(changed) > 0 {
		return fmt.Errorf("tpm: %w: PCR %s; if the change was meant (firmware, boot loader, kernel), open it another way and seal it again", ErrPCR, strings.Join(changed, ", "))
	}
	return nil
}

func selection(list []pcr) tpm2.TPMLPCRSelection {
	var indexes []uint
	for _, p := range list {
		indexes = append(indexes, p.index)
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(indexes...),
	}}}
}

// policy is the digest of a policy of one TPM2_PolicyPCR (part 3, §23.7).
func policy(list []pcr) ([]byte, error) {
	values := sha256.New()
	for _, p := range list {
		values.Write(p.value[:])
	}
	calc, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err == nil {
		err = tpm2.PolicyPCR{PcrDigest: tpm2.TPM2BDigest{Buffer: values.Sum(nil)}, Pcrs: selection(list)}.Update(calc)
	}
	if err != nil {
		return nil, fmt.Errorf("tpm: making the PCR policy: %w", err)
	}
	return calc.Hash().Digest, nil
}
