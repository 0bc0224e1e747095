package kms

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"mortise/internal/store"
)

// An Endpoint is where clients reach an instance at one member.
type Endpoint struct {
	Member     string `json:"member"`
	Host       string `json:"host" doc:"name or address of the member"`
	Port       int    `json:"port" doc:"TCP port for KMIP over TLS"`
	ServerName string `json:"serverName,omitempty" doc:"TLS server name (SNI) that clients must send to reach this instance; none if the port is the instance's own"`
	Thumbprint string `json:"thumbprint" doc:"SHA-256 of the member's server certificate, by which clients trust it"`
}

// An Address is by what clients reach a member: a DNS name or an IP address, and
// the TCP port if that is not the one that the member listens at, as behind a
// load balancer or a router that translates addresses.
type Address struct {
	Host string
	Port int `json:",omitempty"`
}

// ParseAddress reads NAME or NAME:PORT. An IPv6 address with a port is in
// brackets.
func ParseAddress(text string) (a Address, err error) {
	a.Host = strings.TrimSuffix(strings.TrimPrefix(text, "["), "]")
	if host, port, err := net.SplitHostPort(text); err == nil {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return a, fmt.Errorf("kms: %w: %.300q: a port is 1 to 65535", ErrInvalid, text)
		}
		a.Host, a.Port = host, int(n)
	}
	if ip, err := netip.ParseAddr(a.Host); err == nil {
		if ip.IsUnspecified() || ip.Zone() != "" {
			return a, fmt.Errorf("kms: %w: no other machine connects to %.300q", ErrInvalid, text)
		}
		return a, nil
	}
	a.Host = strings.ToLower(a.Host)
	if !dnsName.MatchString(a.Host) || len(a.Host) > 253 {
		return a, fmt.Errorf("kms: %w: %.300q is no DNS name or IP address, with or without a port", ErrInvalid, text)
	}
	return a, nil
}

// dnsName is a host name (RFC 1123 §2.1).
var dnsName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)

// memberEndpoint is what a member tells the others of itself.
type memberEndpoint struct {
	Host       string
	Port       int // the shared one
	Thumbprint string
	Also       []Address `json:",omitempty"` // other addresses of it
}

// Publish tells all members where this one is reached: its name, the addresses
// that clients use, of which there must be one, where its shared KMIP listener
// is, and its certificate's thumbprint.
func (k *KMS) Publish(ctx context.Context, member string, at []Address, l net.Addr, thumbprint string) error {
	_, text, err := net.SplitHostPort(l.String())
	if err != nil {
		return fmt.Errorf("kms: publishing the endpoint: %w", err)
	}
	port, err := strconv.Atoi(text)
	if err != nil {
		return fmt.Errorf("kms: publishing the endpoint: %w", err)
	}
	if len(at) == 0 {
		return fmt.Errorf("kms: publishing the endpoint: %w: it has no address", ErrInvalid)
	}
	fresh := memberEndpoint{Host: at[0].Host, Port: cmp.Or(at[0].Port, port), Thumbprint: thumbprint}
	for _, a := range at[1:] {
		fresh.Also = append(fresh.Also, Address{a.Host, cmp.Or(a.Port, port)})
	}
	if e, ok := k.endpoints.Peek(member); ok && e.Value.equal(fresh) {
		return nil
	}
	if _, err := k.store.Commit(ctx, k.endpoints.Put(member, fresh)); err != nil {
		return fmt.Errorf("kms: publishing the endpoint: %w", err)
	}
	return nil
}

func (m memberEndpoint) equal(o memberEndpoint) bool {
	return m.Host == o.Host && m.Port == o.Port && m.Thumbprint == o.Thumbprint && slices.Equal(m.Also, o.Also)
}

// endpointsOf are those of the members that there are; one that was removed may
// have left its record.
func (k *KMS) endpointsOf(ctx context.Context, id string, s Settings) []Endpoint {
	list := []Endpoint{}
	entries, _ := k.endpoints.List(ctx, "") // what is damaged is logged
	for _, e := range entries {
		if !slices.ContainsFunc(k.store.LocalMembers(), func(m store.Member) bool { return m.Name == e.Key }) {
			continue
		}
		for _, a := range append([]Address{{e.Value.Host, e.Value.Port}}, e.Value.Also...) {
			p := Endpoint{Member: e.Key, Host: a.Host, Port: a.Port, ServerName: s.ServerName, Thumbprint: e.Value.Thumbprint}
			switch {
			case s.Port != 0:
				p.Port, p.ServerName = s.Port, ""
			case id == DefaultInstance && !s.Strict:
				p.ServerName = ""
			}
			list = append(list, p)
		}
	}
	return list
}

// routeAge is how old what Route knows of names may be.
const routeAge = 250 * time.Millisecond

// Route says which instance a client of the shared port means by a TLS server
// name; "" is no name. A name that is no instance's is [DefaultInstance]'s, and
// so is none at all, unless that is strict. A name that another member has given
// within routeAge may be unknown still.
func (k *KMS) Route(ctx context.Context, name string) (string, error) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	id, ok := k.named(name)
	// Made on another member just now? Clients that name the host, and no instance,
	// must not make the cluster talk for each of their connections.
	now := time.Now().UnixNano()
	if last := k.routed.Load(); !ok && name != "" && now-last > int64(routeAge) && k.routed.CompareAndSwap(last, now) {
		if err := k.store.Sync(ctx); err != nil {
			return "", fmt.Errorf("kms: finding the instance of server name %q: %w", name, err)
		}
		id, ok = k.named(name)
	}
	if ok {
		return id, nil
	}
	if r, ok := k.records.Peek(DefaultInstance); ok && r.Value.Settings.Strict {
		return "", fmt.Errorf("kms: %w of server name %.100q, and connections that name none are refused", ErrUnknownInstance, name)
	}
	return DefaultInstance, nil
}

// named looks a name up, then its first label.
func (k *KMS) named(name string) (string, bool) {
	if name == "" {
		return "", false
	}
	if e, ok := k.claims.Peek("name/" + name); ok {
		return e.Value, true
	}
	label, _, dotted := strings.Cut(name, ".")
	if e, ok := k.claims.Peek("name/" + label); ok && dotted {
		return e.Value, true
	}
	return "", false
}

// FollowPorts calls f with the TCP ports that instances have of their own, now
// and whenever they change, until ctx ends.
func (k *KMS) FollowPorts(ctx context.Context, f func(byPort map[int]string)) {
	w := k.store.Watch("instance-claim")
	defer w.Close()
	var last map[int]string
	for {
		now := map[int]string{}
		entries, err := k.claims.List(ctx, "port/")
		for _, e := range entries {
			if n, err := strconv.Atoi(strings.TrimPrefix(e.Key, "port/")); err == nil {
				now[n] = e.Value
			}
		}
		if (err == nil || len(now) > 0) && (last == nil || !maps.Equal(last, now)) {
			last = now
			f(maps.Clone(now))
		}
		if _, err := w.Next(ctx); err != nil {
			return
		}
	}
}
