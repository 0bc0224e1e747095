package vmxfile

import (
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/google/uuid"
)

// ParseUUID reads a UUID as VMware writes it in a VMX (uuid.bios) and in a disk
// descriptor (ddb.uuid): "56 4d 01 02 03 04 05 06-07 08 09 0a 0b 0c 0d 0e", and
// in the usual form of RFC 9562 too.
func ParseUUID(s string) (u uuid.UUID, err error) {
	digits := strings.NewReplacer(" ", "", "-", "").Replace(s)
	if len(s) > 64 || len(digits) != 2*len(u) {
		return u, fmt.Errorf("%.64q is no UUID: it has 32 hexadecimal digits", s)
	}
	if _, err := hex.Decode(u[:], []byte(digits)); err != nil {
		return uuid.UUID{}, fmt.Errorf("%.64q is no UUID: it has 32 hexadecimal digits", s)
	}
	return u, nil
}

// FormatUUID writes a UUID as VMware does.
func FormatUUID(u uuid.UUID) string {
	return fmt.Sprintf("% x-% x", u[:8], u[8:])
}
