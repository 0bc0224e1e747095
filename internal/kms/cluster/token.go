package cluster

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"mortise/internal/pki"
)

// A Token lets one new member join, once, for a short time. Its text is a
// [pki.JoinToken]'s, "@", and the addresses of members that take it, separated by
// commas: the whole thing is what an administrator carries to the new machine.
// The addresses prove nothing; that the server there is the right one is proven
// by the CA's hash in the token.
type Token struct {
	*pki.JoinToken
	Addresses []string // host:port, one to maxAddresses
}

const (
	maxAddresses = 8
	maxTokenText = 4096
)

// Text is the token as it is carried. It is a secret until used.
func (t Token) Text() string { return t.JoinToken.Text() + "@" + strings.Join(t.Addresses, ",") }

// ParseToken reads a token's text. Its errors match pki.ErrToken and quote
// nothing of the secret.
func ParseToken(text string) (Token, error) {
	bad := func(why string) (Token, error) { return Token{}, fmt.Errorf("%w: %s", pki.ErrToken, why) }
	text = strings.TrimSpace(text)
	if len(text) > maxTokenText {
		return bad("too long")
	}
	head, tail, found := strings.Cut(text, "@")
	if !found {
		return bad("its addresses are missing; copy it whole")
	}
	join, err := pki.ParseJoinToken(head)
	if err != nil {
		return Token{}, err
	}
	if join.ID.Role != pki.RoleKMS {
		return bad("it lets a " + join.ID.Role + " join, not a member of a key server")
	}
	t := Token{JoinToken: join, Addresses: strings.Split(tail, ",")}
	if len(t.Addresses) > maxAddresses {
		return bad("too many addresses")
	}
	for _, a := range t.Addresses {
		if err := CheckAddress(a); err != nil {
			return bad("one of its addresses is malformed; copy it whole")
		}
	}
	return t, nil
}

// CheckAddress tells whether a is a host name or IP address and a port at which
// other members can reach one.
func CheckAddress(a string) error {
	host, port, err := net.SplitHostPort(a)
	if err != nil {
		return fmt.Errorf("%w: address %q: want host:port", ErrInvalid, short(a))
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%w: address %q: its port is not 1 to 65535", ErrInvalid, short(a))
	}
	if ip := net.ParseIP(host); ip != nil {
		if ip.IsUnspecified() {
			return fmt.Errorf("%w: address %q means every interface; give one that the other members can reach", ErrInvalid, short(a))
		}
		return nil
	}
	if host == "" || len(host) > 253 || strings.Trim(strings.ToLower(host), "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" {
		return fmt.Errorf("%w: address %q: %q is no host name", ErrInvalid, short(a), short(host))
	}
	return nil
}

// short keeps what somebody else wrote from flooding an error.
func short(s string) string {
	if len(s) > 100 {
		return s[:100] + "…"
	}
	return s
}
