package cli

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"mortise/internal/atomicfile"
	"mortise/internal/keysafe"
	"mortise/internal/secret"
)

// A key file holds one KEK, for who has no key server. It is text:
//
//	# a comment
//	mortise-kek:v1:<key id>:<base64url of the 32 bytes, without padding>
//
// or the 32 bytes alone, or their 64 hexadecimal digits, as other programs make
// them. The key's id is made from the key, so the same key has the same id in any
// of the three, and a disk tells which file it needs: the first 16 bytes, in
// hexadecimal, of HMAC-SHA-256 of the text keyFileInfo under the key.
const (
	keyFilePrefix = "mortise-kek:v1:"
	keyFileInfo   = "mortise key file id v1"
	maxKeyFile    = 4096 // bytes
)

func keyFileID(kek *secret.Key) (id keysafe.KeyID) {
	kek.Use(func(b []byte) {
		h := hmac.New(sha256.New, b)
		io.WriteString(h, keyFileInfo)
		id = keysafe.KeyID{Provider: fileProvider, Key: hex.EncodeToString(h.Sum(nil)[:16])}
	})
	return id
}

// readKeyFile reads a key that nobody but the file's owner, who is this user or
// root, may reach.
func readKeyFile(path string) (id keysafe.KeyID, kek *secret.Key, err error) {
	st, err := os.Stat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("key file %s is not there: mount what has it, or restore it; without it no disk of that key opens", path)
		}
		return id, nil, err
	}
	if mode := st.Mode().Perm(); mode&0o077 != 0 {
		return id, nil, fmt.Errorf("key file %s has mode %04o, so others may reach the key: chmod 0600 it, and consider a new key", path, mode)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && sys.Uid != 0 && int(sys.Uid) != os.Geteuid() {
		return id, nil, fmt.Errorf("key file %s belongs to user %d, who can change it: chown it to yourself or root", path, sys.Uid)
	}
	text, err := atomicfile.Read(path, maxKeyFile)
	if err != nil {
		return id, nil, fmt.Errorf("key file: %w", err)
	}
	defer clear(text)
	if id, kek, err = parseKeyFile(text); err != nil {
		return id, nil, fmt.Errorf("key file %s: %w", path, err)
	}
	return id, kek, nil
}

func parseKeyFile(text []byte) (id keysafe.KeyID, kek *secret.Key, err error) {
	if len(text) == keysafe.KEKSize {
		kek, err = secret.Copy(text)
		if err != nil {
			return id, nil, err
		}
		return keyFileID(kek), kek, nil
	}
	var found []byte
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		if found != nil {
			return id, nil, errors.New("it has more than one line that is no comment: a key file holds one key")
		}
		found = line
	}
	raw := make([]byte, keysafe.KEKSize)
	defer clear(raw)
	rest, ours := bytes.CutPrefix(found, []byte(keyFilePrefix))
	if !ours {
		if len(found) != 2*keysafe.KEKSize {
			return id, nil, fmt.Errorf("it holds no key: 32 bytes, 64 hexadecimal digits, or a line %s… as mortise disk keygen writes it", keyFilePrefix)
		}
		if _, err := hex.Decode(raw, found); err != nil {
			return id, nil, errors.New("it has 64 characters that are not all hexadecimal digits")
		}
		if kek, err = secret.Copy(raw); err != nil {
			return id, nil, err
		}
		return keyFileID(kek), kek, nil
	}
	name, body, _ := bytes.Cut(rest, []byte(":"))
	if base64.RawURLEncoding.DecodedLen(len(body)) != keysafe.KEKSize {
		return id, nil, errors.New("it was cut off or edited: its key has not 32 bytes; restore it from a copy")
	}
	if _, err := base64.RawURLEncoding.Strict().Decode(raw, body); err != nil {
		return id, nil, errors.New("it was edited: its key is not base64; restore it from a copy")
	}
	if kek, err = secret.Copy(raw); err != nil {
		return id, nil, err
	}
	if id = keyFileID(kek); id.Key != string(name) {
		kek.Wipe()
		return id, nil, errors.New("it was edited or damaged: the key in it has not the id that stands beside it; restore it from a copy")
	}
	return id, kek, nil
}

func diskKeygen(g *globals) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "keygen -o FILE",
		Short: "Make a key file",
		Long: `Makes a random KEK (AES-256) and writes it to a new file of mode 0600. Whoever has
the file opens every disk of that key, and without it nobody does: keep a copy where
the disks are not, such as a safe or a password manager.

The file is text of one line and comments; a disk names the key by an id that is made
from it and tells nothing of it. A file of 32 random bytes, or of their 64 hexadecimal
digits, is a key file too: head -c 32 /dev/urandom > key.

JSON: {"file", "key"}.`,
		Example: `  mortise disk keygen -o /root/keys/vm1.key
  mortise disk create vm1.vmdk --size 20G --key-file /root/keys/vm1.key`,
		Args: needs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return errors.New("-o is missing: the file to write the key to")
			}
			id, err := makeKeyFile(out, time.Now())
			if err != nil {
				return err
			}
			s := g.streams(cmd)
			if s.json {
				return s.printJSON(map[string]string{"file": out, "key": id.String()})
			}
			s.say("Wrote key %s to %s.", id, out)
			s.say("Keep a copy of the file elsewhere: without it the disks of this key are lost.")
			return nil
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write, which must not exist")
	return cmd
}

// makeKeyFile makes a key durable; it never writes over a file.
func makeKeyFile(path string, now time.Time) (id keysafe.KeyID, err error) {
	kek, err := secret.Random(nil, keysafe.KEKSize)
	if err != nil {
		return id, err
	}
	defer kek.Wipe()
	id = keyFileID(kek)
	text := fmt.Appendf(make([]byte, 0, maxKeyFile), "# Mortise key file: whoever has it opens the disks of this key, without it nobody does.\n# key %s, made %s\n%s%s:",
		id, now.UTC().Format(time.DateOnly), keyFilePrefix, id.Key)
	kek.Use(func(b []byte) { text = base64.RawURLEncoding.AppendEncode(text, b) })
	text = append(text, '\n')
	defer clear(text)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return id, fmt.Errorf("%s is there already, and a key is never written over: choose another name", path)
	}
	if err != nil {
		return id, err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return id, errors.Join(err, os.Remove(path))
	}
	return id, atomicfile.SyncDir(filepath.Dir(path))
}
