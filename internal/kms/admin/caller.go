package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/user"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mortise/internal/kms"
)

type peerKey struct{}

// withPeer notes who is at the other end of a unix socket (SO_PEERCRED).
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			ctx = context.WithValue(ctx, peerKey{}, cred)
		}
	})
	return ctx
}

// onSocket is who calls through the socket. The file's mode has let it in.
func onSocket(ctx context.Context) kms.Actor {
	a := kms.Actor{Kind: "socket", Name: "root", From: "socket", Role: kms.RoleAdministrator}
	if cred, ok := ctx.Value(peerKey{}).(*unix.Ucred); ok {
		a.Name = "uid " + strconv.FormatUint(uint64(cred.Uid), 10)
		if u, err := user.LookupId(strconv.FormatUint(uint64(cred.Uid), 10)); err == nil {
			a.Name = u.Username
		}
		a.From = fmt.Sprintf("socket, process %d", cred.Pid)
	}
	return a
}

// authenticate says who calls a row, and refuses who may not.
func (s *Server) authenticate(c *call, r row, socket bool) (kms.Actor, error) {
	instance := c.path("instance")
	if socket {
		a := onSocket(c.r.Context())
		a.Instance = instance
		return a, nil
	}
	a, err := s.identify(c, instance)
	if err != nil {
		return a, err
	}
	switch {
	case a.Instance != "" && instance != "" && a.Instance != instance:
		return a, fmt.Errorf("%w: %q", kms.ErrUnknownInstance, instance)
	case a.Instance != "" && (instance == "" || r.wholeServer):
		return a, fmt.Errorf("%w: this concerns the whole server, and %s belongs to instance %s; use an API key made with --server-wide, or the admin socket", kms.ErrForbidden, a.Name, a.Instance)
	}
	if !a.Role.Covers(r.least) {
		return a, fmt.Errorf("%w: %s is %s, and this takes a %s", kms.ErrForbidden, a.Name, a.Role, r.least)
	}
	return a, nil
}

// identify finds out who calls from the network: the holder of an API key, or of
// a client certificate's key.
func (s *Server) identify(c *call, instance string) (kms.Actor, error) {
	if h := c.r.Header.Get("Authorization"); h != "" {
		scheme, token, _ := strings.Cut(h, " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return kms.Actor{}, fmt.Errorf("%w: the Authorization header has the scheme %.20q; Bearer is wanted", errUnauthenticated, scheme)
		}
		a, err := s.KMS.APIKeyActor(c, strings.TrimSpace(token), c.r.RemoteAddr)
		if errors.Is(err, kms.ErrUnknownAPIKey) || errors.Is(err, kms.ErrExpired) {
			err = fmt.Errorf("%w: %w", errUnauthenticated, err)
		}
		return a, err
	}
	if c.r.TLS == nil || len(c.r.TLS.PeerCertificates) == 0 {
		return kms.Actor{}, fmt.Errorf("%w: show a client certificate or send an API key: Authorization: Bearer KEY", errUnauthenticated)
	}
	if instance == "" {
		return kms.Actor{}, fmt.Errorf("%w: this concerns the whole server, and a client certificate belongs to one instance; use an API key made with --server-wide, or the admin socket", kms.ErrForbidden)
	}
	session, err := s.KMS.Session(c, instance, c.r.TLS.PeerCertificates[0], c.r.RemoteAddr)
	switch {
	case errors.Is(err, kms.ErrUnknownInstance), errors.Is(err, kms.ErrUnknownClient), errors.Is(err, kms.ErrExpired):
		// The same words for all: whether the instance exists is not for strangers.
		s.Logger.Warn("admin: client certificate refused", "from", c.r.RemoteAddr, "error", err)
		return kms.Actor{}, fmt.Errorf("%w: the client certificate is not accepted for instance %q", errUnauthenticated, instance)
	case err != nil:
		return kms.Actor{}, err
	}
	return session.Actor, nil
}
