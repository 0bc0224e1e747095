package kms

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// What callers of administrative acts decide on.
var (
	// ErrForbidden: the caller's role is too low.
	ErrForbidden = errors.New("not allowed")
	// ErrInvalid: what was given cannot be used; the text says why.
	ErrInvalid = errors.New("bad request")
	// ErrQuota: the instance has as many as it may have.
	ErrQuota = errors.New("quota reached")
)

// maxListed is how many of the lost keys a Confirmation names; its hash covers
// all of them.
const maxListed = 1000

// A Confirmation is the refusal of an act that loses keys, until it is repeated
// with the hash of what is lost (S6). A list that has changed in the meantime
// has another hash, and so is refused and shown again.
type Confirmation struct {
	Act   string   `json:"act" doc:"what would be done"`
	Lost  []string `json:"lost" doc:"what would be lost for ever, a line each; at most 1000 lines"`
	Count int      `json:"count" doc:"how many lines there are in all"`
	Hash  string   `json:"hash" doc:"SHA-256 over the act and all lines, hexadecimal"`
}

func (c *Confirmation) Error() string {
	return fmt.Sprintf("%s loses %d things for ever; confirm it with the hash %s of the list of what is lost", c.Act, c.Count, c.Hash)
}

// Confirm returns nil if hash agrees to an act that loses exactly these things,
// and the Confirmation to show otherwise.
func Confirm(act string, lost []string, hash string) error {
	lost = slices.Sorted(slices.Values(lost))
	h := sha256.New()
	for _, line := range append([]string{act}, lost...) {
		fmt.Fprintf(h, "%d:%s\n", len(line), line)
	}
	sum := hex.EncodeToString(h.Sum(nil))
	if strings.EqualFold(hash, sum) {
		return nil
	}
	return &Confirmation{Act: act, Lost: lost[:min(len(lost), maxListed)], Count: len(lost), Hash: sum}
}
