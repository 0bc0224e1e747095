package audit

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// FuzzParseHead: heads come from places outside the machine.
func FuzzParseHead(f *testing.F) {
	_, head := realLog(f, 2)
	good, err := json.Marshal(head)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-2])
	f.Add([]byte(strings.Replace(string(good), `"v":1`, `"v":2`, 1)))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHead(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(h)
		if err != nil {
			return // a time out of JSON's range
		}
		if h.Valid() && !bytes.Equal(again, good) {
			t.Fatalf("a signature over something else is valid: %s", b)
		}
	})
}

// FuzzTombstone: they lie in the log's folder.
func FuzzTombstone(f *testing.F) {
	hash := Hex(bytes.Repeat([]byte{7}, 32))
	good, err := json.Marshal(Tombstone{Version: headVersion, Member: "kms-1", Log: make(Hex, idLen), First: 1, Last: 9, Before: hash, After: hash, Time: time.Unix(1, 0), By: "root", Reason: "old"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"last":9`), []byte(`"last":0`), 1))
	f.Add(good[:len(good)-9])
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseTombstone(b)
		if err != nil {
			return
		}
		if s.valid() {
			t.Fatalf("an unsigned tombstone is valid: %s", b)
		}
		if s.Last < s.First || len(s.After) != len(hash) {
			t.Fatalf("%s is read as %+v", b, s)
		}
	})
}

func FuzzParseSink(f *testing.F) {
	for _, text := range []string{"/mnt/anchors.jsonl", "tcp://loghost:514", "tls://loghost:6514", "tls://[::1]:1", "udp://a:1", "", "tcp://:514", "tcp://a"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "?") {
			return // would read files
		}
		s, err := ParseSink(text)
		if err == nil && s.String() != text {
			t.Fatalf("%q became %q", text, s)
		}
	})
}
