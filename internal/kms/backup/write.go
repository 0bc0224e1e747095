package backup

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"

	"mortise/internal/kms"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// DefaultWorkFactor is the binary logarithm of scrypt's N: 18 takes 256 MiB
// and about a second.
const DefaultWorkFactor = 18

// maxWorkFactor bounds what a file made by somebody else may cost us: 1 GiB.
const maxWorkFactor = 20

// minPassphrase is the shortest passphrase that a backup is sealed with, in
// bytes: whoever has the file can try passphrases for as long as they like.
const minPassphrase = 12

// ToPassphrase seals to a passphrase. workFactor 0 is [DefaultWorkFactor].
func ToPassphrase(passphrase *secret.Key, workFactor int) (age.Recipient, error) {
	if passphrase.Len() < minPassphrase {
		return nil, fmt.Errorf("backup: the passphrase has %d bytes; a backup leaves the machine, and takes at least %d", passphrase.Len(), minPassphrase)
	}
	if workFactor == 0 {
		workFactor = DefaultWorkFactor
	}
	var r *age.ScryptRecipient
	var err error
	passphrase.Use(func(p []byte) { r, err = age.NewScryptRecipient(string(p)) })
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	r.SetWorkFactor(workFactor)
	return r, nil
}

// ToRecipients seals to holders of age identities, "age1…" each.
func ToRecipients(texts []string) (list []age.Recipient, err error) {
	for _, t := range texts {
		t = strings.TrimSpace(t)
		if strings.HasPrefix(strings.ToUpper(t), "AGE-SECRET-KEY-") {
			return nil, errors.New("backup: that is an age identity, the secret half; give the recipient that it says beside it (age1…)")
		}
		r, err := age.ParseX25519Recipient(t)
		if err != nil {
			return nil, fmt.Errorf("backup: %.80q is no age recipient (age1…, as age-keygen makes one): %w", t, err)
		}
		list = append(list, r)
	}
	if len(list) == 0 {
		return nil, errors.New("backup: a recipient is needed")
	}
	return list, nil
}

// A Writer writes a backup; it is a [kms.BackupSink]. Nothing of it is a backup
// until Close has returned nil.
type Writer struct {
	to         io.Writer
	recipients []age.Recipient

	age   io.WriteCloser // nil before the first frame
	buf   *bufio.Writer
	stage byte // the last frame's letter, 0 before the first
	ended end
	frame []byte // reused
}

// NewWriter makes a writer. It writes nothing before the first call.
func NewWriter(to io.Writer, recipients ...age.Recipient) *Writer {
	return &Writer{to: to, recipients: recipients}
}

func (w *Writer) begin() (err error) {
	if w.age, err = age.Encrypt(w.to, w.recipients...); err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	w.buf = bufio.NewWriterSize(w.age, 64<<10)
	if _, err := w.buf.WriteString(magic); err != nil {
		return fmt.Errorf("backup: writing: %w", err)
	}
	return nil
}

// Header is called once, first.
func (w *Writer) Header(h kms.BackupHeader) error {
	text, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	return w.put(frameHeader, text)
}

// RootKeys writes a share of root keys.
func (w *Writer) RootKeys(kind string, share *secret.Key) (err error) {
	share.Use(func(b []byte) {
		frame := make([]byte, 0, 1+len(kind)+len(b))
		frame = append(append(append(frame, byte(len(kind))), kind...), b...)
		defer clear(frame)
		err = w.put(frameKeys, frame)
	})
	w.ended.RootKeys++
	return err
}

// Record writes a record.
func (w *Writer) Record(r store.Record) error {
	b := w.frame[:0]
	for _, n := range []int64{int64(len(r.Collection)), int64(len(r.Key)), r.Created, r.Modified, r.Version} {
		b = binary.AppendUvarint(b, uint64(n))
	}
	b = append(append(append(b, r.Collection...), r.Key...), r.Stored...)
	w.frame = b
	w.ended.Records++
	return w.put(frameRecord, b)
}

// Close writes the end of a backup of that revision.
func (w *Writer) Close(revision int64) error {
	w.ended.Revision = revision
	text, err := json.Marshal(w.ended)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	if err := w.put(frameEnd, text); err != nil {
		return err
	}
	if err := errors.Join(w.buf.Flush(), w.age.Close()); err != nil {
		return fmt.Errorf("backup: writing: %w", err)
	}
	return nil
}

func (w *Writer) put(letter byte, frame []byte) error {
	if len(frame) > maxFrame {
		return fmt.Errorf("backup: a part of it has %d bytes, more than %d", len(frame), maxFrame)
	}
	if !follows(w.stage, letter) {
		return fmt.Errorf("backup: a frame %c after a frame %c", letter, w.stage)
	}
	if w.stage == 0 {
		if err := w.begin(); err != nil {
			return err
		}
	}
	w.stage = letter
	var head [5]byte
	head[0] = letter
	binary.BigEndian.PutUint32(head[1:], uint32(len(frame)))
	if _, err := w.buf.Write(head[:]); err != nil {
		return fmt.Errorf("backup: writing: %w", err)
	}
	if _, err := w.buf.Write(frame); err != nil {
		return fmt.Errorf("backup: writing: %w", err)
	}
	return nil
}

// follows tells whether a frame may come after another: H, then K, then R, then E.
func follows(last, next byte) bool {
	switch next {
	case frameHeader:
		return last == 0
	case frameKeys:
		return last == frameHeader || last == frameKeys
	case frameRecord, frameEnd:
		return last == frameHeader || last == frameKeys || last == frameRecord
	}
	return false
}

// Write writes a backup of a running KMS and returns what was recorded of it.
// After an error, what was written is no backup, and readers refuse it.
func Write(ctx context.Context, k *kms.KMS, by kms.Actor, to io.Writer, recipients ...age.Recipient) (kms.Backup, error) {
	w := NewWriter(to, recipients...)
	b, err := k.Backup(ctx, by, w)
	if err != nil {
		return b, err
	}
	return b, w.Close(b.Revision)
}
