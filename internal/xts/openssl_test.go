package xts

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"
)

// TestAgainstOpenSSL encrypts random units with random keys and numbers, one by
// one with OpenSSL and as runs with each implementation.
func TestAgainstOpenSSL(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Debian's python3-cryptography")
	}
	const runs, units = 40, 3
	type job struct {
		key, plain []byte
		unit       uint64
	}
	r := rand.New(rand.NewPCG(5, 6))
	var jobs []job
	var input strings.Builder
	for i := range runs {
		j := job{key: randomBytes(r.Uint64(), KeySize), plain: randomBytes(r.Uint64(), units*UnitSize), unit: r.Uint64()}
		if i%2 == 0 {
			j.unit >>= r.IntN(64) // numbers of every size
		}
		j.unit = min(j.unit, 1<<64-units)
		jobs = append(jobs, j)
		for u := range units {
			tweak := binary.LittleEndian.AppendUint64(nil, j.unit+uint64(u))
			tweak = append(tweak, make([]byte, 8)...)
			fmt.Fprintf(&input, "%x %x %x\n", j.key, tweak, j.plain[u*UnitSize:][:UnitSize])
		}
	}
	cmd := exec.Command("/usr/bin/python3", "testdata/openssl_xts.py")
	cmd.Stdin = strings.NewReader(input.String())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("OpenSSL by way of python3: %v (apt-get install python3-cryptography, or go test -short)\n%s", err, stderr.Bytes())
	}
	want, err := hex.DecodeString(strings.ReplaceAll(string(out), "\n", ""))
	if err != nil || len(want) != runs*units*UnitSize {
		t.Fatalf("OpenSSL made %d bytes, %v", len(want), err)
	}
	everywhere(t, func(t *testing.T, impl implementation) {
		for i, j := range jobs {
			c := makeCipher(t, j.key, impl)
			want := want[i*units*UnitSize:][:units*UnitSize]
			got := make([]byte, len(want))
			c.Encrypt(got, j.plain, j.unit)
			if !bytes.Equal(got, want) {
				t.Fatalf("run %d at unit %d: differs from OpenSSL", i, j.unit)
			}
			c.Decrypt(got, got, j.unit)
			if !bytes.Equal(got, j.plain) {
				t.Fatalf("run %d at unit %d: does not decrypt", i, j.unit)
			}
			// A sector from the middle, as a small write needs it.
			at := UnitSize + (i%8)*SectorSize
			c.EncryptAt(got[:SectorSize], j.plain[at:][:SectorSize], j.unit+1, at-UnitSize)
			if !bytes.Equal(got[:SectorSize], want[at:][:SectorSize]) {
				t.Fatalf("run %d at unit %d: the sector at %d differs", i, j.unit, at)
			}
		}
	})
}
