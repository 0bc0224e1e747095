package kms

import (
	"context"
	"fmt"
	"maps"
	"net"
	"strconv"
	"strings"
)

// An Endpoint is where clients reach an instance at one member.
type Endpoint struct {
	Member     string `json:"member"`
	Host       string `json:"host" doc:"name or address of the member"`
	Port       int    `json:"port" doc:"TCP port for KMIP over TLS"`
	ServerName string `json:"serverName,omitempty" doc:"TLS server name (SNI) that clients must send to reach this instance; none if the port is the instance's own"`
	Thumbprint string `json:"thumbprint" doc:"SHA-256 of the member's server certificate, by which clients trust it"`
}

// memberEndpoint is what a member tells the others of itself.
type memberEndpoint struct {
	Host       string
	Port       int // the shared one
	Thumbprint string
}

// Publish tells all members where this one is reached: its name, the host by
// which clients reach it, the address of its shared KMIP listener, and its
// certificate's thumbprint.
func (k *KMS) Publish(ctx context.Context, member, host string, l net.Addr, thumbprint string) error {
	_, port, err := net.SplitHostPort(l.String())
	if err != nil {
		return fmt.Errorf("kms: publishing the endpoint: %w", err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return fmt.Errorf("kms: publishing the endpoint: %w", err)
	}
	fresh := memberEndpoint{Host: host, Port: n, Thumbprint: thumbprint}
	if e, ok := k.endpoints.Peek(member); ok && e.Value == fresh {
		return nil
	}
	if _, err := k.store.Commit(ctx, k.endpoints.Put(member, fresh)); err != nil {
		return fmt.Errorf("kms: publishing the endpoint: %w", err)
	}
	return nil
}

func (k *KMS) endpointsOf(ctx context.Context, id string, s Settings) []Endpoint {
	list := []Endpoint{}
	entries, _ := k.endpoints.List(ctx, "") // what is damaged is logged
	for _, e := range entries {
		p := Endpoint{Member: e.Key, Host: e.Value.Host, Port: e.Value.Port, ServerName: s.ServerName, Thumbprint: e.Value.Thumbprint}
		switch {
		case s.Port != 0:
			p.Port, p.ServerName = s.Port, ""
		case id == DefaultInstance && !s.Strict:
			p.ServerName = ""
		}
		list = append(list, p)
	}
	return list
}

// Route says which instance a client of the shared port means by a TLS server
// name; "" is no name. A name that is no instance's is [DefaultInstance]'s, and
// so is none at all, unless that is strict.
func (k *KMS) Route(ctx context.Context, name string) (string, error) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	id, ok := k.named(name)
	if !ok && name != "" { // made on another member just now?
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
