package backup

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"filippo.io/age"

	"mortise/internal/kms"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// FromPassphrase opens what ToPassphrase sealed.
func FromPassphrase(passphrase *secret.Key) (id age.Identity, err error) {
	var s *age.ScryptIdentity
	passphrase.Use(func(p []byte) { s, err = age.NewScryptIdentity(string(p)) })
	if err != nil {
		return nil, fmt.Errorf("backup: %w", err)
	}
	s.SetMaxWorkFactor(maxWorkFactor)
	return s, nil
}

// FromIdentities opens what ToRecipients sealed: text is a file of age
// identities, as age-keygen writes it.
func FromIdentities(text []byte) ([]age.Identity, error) {
	ids, err := age.ParseIdentities(bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("backup: reading age identities (AGE-SECRET-KEY-…, as age-keygen writes them): %w", err)
	}
	return ids, nil
}

// visitor is called with what a backup holds, in its order. It must not keep
// what it is given. Nil functions are passed over.
type visitor struct {
	header   func(kms.BackupHeader) error
	rootKeys func(kind string, share *secret.Key) error
	record   func(store.Record) error
}

// read reads a whole backup. What v was given is worth nothing if read fails.
func read(from io.Reader, ids []age.Identity, v visitor) (Summary, error) {
	plain, err := age.Decrypt(from, ids...)
	if err != nil {
		return Summary{}, openError(err)
	}
	return parse(plain, v)
}

// openError says what age's error means.
func openError(err error) error {
	var none *age.NoIdentityMatchError
	if !errors.As(err, &none) {
		return fmt.Errorf("%w: it is no age file, or its beginning is damaged: %w", ErrDamaged, err)
	}
	sealed := "to age recipients: give the identity of one"
	if len(none.StanzaTypes) == 1 && none.StanzaTypes[0] == "scrypt" {
		sealed = "by a passphrase"
	}
	return fmt.Errorf("%w: the backup is sealed %s", ErrWrongKey, sealed)
}

// parse reads what is inside.
func parse(plain io.Reader, v visitor) (s Summary, err error) {
	r := bufio.NewReaderSize(plain, 64<<10)
	if err := readMagic(r); err != nil {
		return s, err
	}
	s.Objects, s.Outside = map[string]int64{}, map[string][]string{}
	var seen end
	var frame []byte // reused
	defer func() { clear(frame[:cap(frame)]) }()
	for last := byte(0); ; {
		var head [5]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return s, cut(err)
		}
		n := binary.BigEndian.Uint32(head[1:])
		if !follows(last, head[0]) || n > maxFrame {
			return s, fmt.Errorf("%w: a frame %q of %d bytes after %q", ErrDamaged, head[0], n, last)
		}
		last = head[0]
		if uint32(cap(frame)) < n {
			clear(frame[:cap(frame)])
			frame = make([]byte, n)
		}
		frame = frame[:n]
		if _, err := io.ReadFull(r, frame); err != nil {
			return s, cut(err)
		}
		switch last {
		case frameHeader:
			err = readHeader(frame, &s, v)
		case frameKeys:
			seen.RootKeys++
			err = readKeys(frame, v)
		case frameRecord:
			seen.Records++
			err = readRecord(frame, &s, v)
		case frameEnd:
			return s, readEnd(r, frame, seen, &s)
		}
		if err != nil {
			return s, err
		}
	}
}

func readMagic(r *bufio.Reader) error {
	line := make([]byte, len(magic))
	if _, err := io.ReadFull(r, line); err != nil {
		return cut(err)
	}
	if string(line) == magic {
		return nil
	}
	if strings.HasPrefix(string(line), magicWord+" v") {
		return fmt.Errorf("%w: it begins with %q, this program knows %q", ErrNewer, line, magic)
	}
	return fmt.Errorf("%w: it is an age file, and no backup of a key server", ErrDamaged)
}

// cut words the end of input where there should be more; age reports damage in
// the same way.
func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it is cut off", ErrDamaged)
	}
	return fmt.Errorf("%w: %w", ErrDamaged, err)
}

func readHeader(frame []byte, s *Summary, v visitor) error {
	if err := strictJSON(frame, &s.BackupHeader); err != nil {
		return fmt.Errorf("%w: its header: %w", ErrDamaged, err)
	}
	for kind, ids := range s.CRKs {
		if kind != kms.KindFile {
			s.Outside[kind] = ids
		}
	}
	if v.header == nil {
		return nil
	}
	return v.header(s.BackupHeader)
}

func readKeys(frame []byte, v visitor) error {
	if len(frame) < 2 || len(frame) < 2+int(frame[0]) {
		return fmt.Errorf("%w: root keys that are cut off", ErrDamaged)
	}
	n := 1 + int(frame[0])
	if v.rootKeys == nil {
		return nil
	}
	if len(frame)-n > secret.MaxLen {
		return fmt.Errorf("%w: root keys of %d bytes", ErrDamaged, len(frame)-n)
	}
	share, err := secret.Take(frame[n:])
	if err != nil {
		return err
	}
	defer share.Wipe()
	return v.rootKeys(string(frame[1:n]), share)
}

func readRecord(frame []byte, s *Summary, v visitor) error {
	var r store.Record
	var lengths [2]int64
	rest := frame
	for _, to := range []*int64{&lengths[0], &lengths[1], &r.Created, &r.Modified, &r.Version} {
		n, used := binary.Uvarint(rest)
		if used <= 0 || n > 1<<62 {
			return fmt.Errorf("%w: a record without its numbers", ErrDamaged)
		}
		*to, rest = int64(n), rest[used:]
	}
	if lengths[0] > int64(len(rest)) || lengths[1] > int64(len(rest))-lengths[0] {
		return fmt.Errorf("%w: a record whose lengths do not fit", ErrDamaged)
	}
	r.Collection, rest = string(rest[:lengths[0]]), rest[lengths[0]:]
	r.Key, r.Stored = string(rest[:lengths[1]]), rest[lengths[1]:]
	if instance, is := strings.CutPrefix(r.Collection, "object-"); is {
		s.Objects[instance]++
	}
	if v.record == nil {
		return nil
	}
	return v.record(r)
}

// readEnd also makes sure that nothing follows: only then has age seen the
// whole file.
func readEnd(r io.Reader, frame []byte, seen end, s *Summary) error {
	var e end
	if err := strictJSON(frame, &e); err != nil {
		return fmt.Errorf("%w: its end: %w", ErrDamaged, err)
	}
	if e.RootKeys != seen.RootKeys || e.Records != seen.Records || e.Revision < 1 {
		return fmt.Errorf("%w: it holds %d records of %d", ErrDamaged, seen.Records, e.Records)
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		if err == nil || errors.Is(err, io.EOF) {
			err = errors.New("something follows its end")
		}
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	s.Revision, s.Records = e.Revision, e.Records
	return nil
}

func strictJSON(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("bytes after it")
	}
	return nil
}

// Verify reads the whole backup in the file at path. Its errors match
// ErrWrongKey, ErrDamaged, ErrNewer or those of the file system.
func Verify(path string, ids []age.Identity) (Summary, error) { return readFile(path, ids, visitor{}) }

func readFile(path string, ids []age.Identity, v visitor) (Summary, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO would wait for ever
	if err != nil {
		return Summary{}, fmt.Errorf("backup: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return Summary{}, fmt.Errorf("backup: %w", err)
	}
	if !st.Mode().IsRegular() {
		return Summary{}, fmt.Errorf("backup: %s is no file: it is read twice, first to see that it is whole", path)
	}
	s, err := read(f, ids, v)
	if err != nil {
		return s, fmt.Errorf("backup: %s: %w", path, err)
	}
	s.Bytes = st.Size()
	return s, nil
}
