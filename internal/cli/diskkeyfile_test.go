package cli

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A key is the same whatever form its file has, and its id says nothing of it.
func TestKeyFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.key")
	id, err := makeKeyFile(path, time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	again, kek, err := readKeyFile(path)
	if err != nil || again != id || kek.Len() != 32 {
		t.Fatal(again, id, err)
	}
	raw := make([]byte, 32)
	kek.Use(func(b []byte) { copy(raw, b) })
	for name, text := range map[string][]byte{"raw": raw, "hex": []byte(hex.EncodeToString(raw)), "HEX": []byte(strings.ToUpper(hex.EncodeToString(raw)) + "\r\n")} {
		got, other, err := parseKeyFile(text)
		if err != nil || got != id || !other.Equal(kek) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if st, _ := os.Stat(path); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	text, _ := os.ReadFile(path)
	line := text[bytes.LastIndex(text, []byte(keyFilePrefix)):]
	for name, bad := range map[string][]byte{
		"empty": nil, "comments": []byte("# no key\n"), "31 bytes": raw[:31], "no hex": bytes.Repeat([]byte("g"), 64),
		"two keys": append(bytes.Clone(text), line...), "cut": text[:len(text)-5], "id changed": bytes.Replace(text, []byte(keyFilePrefix+id.Key[:1]), []byte(keyFilePrefix+"z"), 1),
		"newer": bytes.Replace(text, []byte(":v1:"), []byte(":v2:"), 1),
	} {
		if _, _, err := parseKeyFile(bad); err == nil {
			t.Errorf("%s passes for a key", name)
		} else if strings.Contains(err.Error(), hex.EncodeToString(raw)) || bytes.Contains([]byte(err.Error()), line[len(line)-20:]) {
			t.Errorf("%s: the error has the key in it", name)
		}
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, _, err := readKeyFile(path); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
}

func FuzzKeyFile(f *testing.F) {
	f.Add([]byte("# a comment\nmortise-kek:v1:00:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n"))
	f.Add(bytes.Repeat([]byte("0f"), 32))
	f.Add(bytes.Repeat([]byte{7}, 32))
	f.Add([]byte(keyFilePrefix))
	f.Fuzz(func(t *testing.T, text []byte) {
		id, kek, err := parseKeyFile(text)
		if err != nil {
			if kek != nil {
				t.Fatal("an error, and a key")
			}
			return
		}
		defer kek.Wipe()
		if kek.Len() != 32 || id != keyFileID(kek) {
			t.Fatal(id)
		}
	})
}
