package center

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// The admin socket is for what comes before or below the API: a first token, a
// lost password. It is a unix socket that only root, and the account center runs
// as, can reach; who reaches it needs no password. It speaks HTTP with JSON.

// AdminStatus is how a center does.
type AdminStatus struct {
	Name      string            `json:"name"`
	PID       int               `json:"pid"`
	Term      int64             `json:"term"`
	Revision  int64             `json:"revision"`
	Hosts     []AdminHostStatus `json:"hosts"`
	VMs       int               `json:"vms"`
	LockedVMs int               `json:"lockedVMs"`
	Tasks     int               `json:"runningTasks"`
	Sessions  int               `json:"sessions"`
}

// AdminHostStatus is how a host does.
type AdminHostStatus struct {
	Ref         Ref    `json:"ref"`
	Name        string `json:"name"`
	Address     string `json:"address"`
	Connection  string `json:"connection"`
	CryptoState string `json:"cryptoState"`
	Problem     string `json:"problem,omitempty"`
}

type adminToken struct {
	Name string `json:"name"`
	TTL  string `json:"ttl,omitempty"`
}

type adminTokenReply struct {
	Token string `json:"token"`
}

type adminUser struct {
	Name     string `json:"name"`
	FullName string `json:"fullName,omitempty"`
	Password string `json:"password,omitempty"` // empty: generated
	Role     string `json:"role,omitempty"`     // of a new user, on everything
}

type adminPasswordReply struct {
	Password string `json:"password"`
}

type adminError struct {
	Error string `json:"error"`
}

// ServeAdmin answers on a unix socket at path until ctx ends. A socket that a
// former process left there is replaced.
func (c *Center) ServeAdmin(ctx context.Context, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("center: admin socket: %w", err)
	}
	switch info, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return fmt.Errorf("center: admin socket: %w", err)
	case info.Mode()&os.ModeSocket == 0:
		return fmt.Errorf("center: admin socket: %s is there and is no socket; choose another path", path)
	default:
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("center: admin socket: %w", err)
		}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("center: admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("center: admin socket: %w", err)
	}
	s := &http.Server{
		Handler: c.adminHandler(), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: time.Minute,
		MaxHeaderBytes: 16 << 10,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, mayAdminister(conn))
		},
	}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("center: admin socket: %w", err)
	}
	return nil
}

type peerKey struct{}

// mayAdminister tells whether root or our own account is at the other end: the
// socket's mode says the same, but a mode is easily changed.
func mayAdminister(conn net.Conn) bool {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return err == nil && cerr == nil && (cred.Uid == 0 || int(cred.Uid) == os.Getuid())
}

func (c *Center) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /v1/status", admin(func(ctx context.Context, _ *struct{}) (*AdminStatus, error) { return c.adminStatus(), nil }))
	mux.Handle("POST /v1/join-tokens", admin(func(ctx context.Context, r *adminToken) (*adminTokenReply, error) {
		var ttl time.Duration
		if r.TTL != "" {
			var err error
			if ttl, err = time.ParseDuration(r.TTL); err != nil {
				return nil, invalid("ttl", "%.50q is no duration; write 30m or 2h", r.TTL)
			}
		}
		text, err := c.CreateJoinToken(ctx, authz.System(), r.Name, ttl)
		return &adminTokenReply{text}, err
	}))
	mux.Handle("POST /v1/password", admin(func(ctx context.Context, r *adminUser) (*adminPasswordReply, error) {
		password, err := c.ResetPassword(ctx, r.Name, r.Password)
		return &adminPasswordReply{password}, err
	}))
	mux.Handle("POST /v1/users", admin(func(ctx context.Context, r *adminUser) (*adminPasswordReply, error) {
		password, err := c.addUser(ctx, *r)
		return &adminPasswordReply{password}, err
	}))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ok, _ := r.Context().Value(peerKey{}).(bool); !ok {
			http.Error(w, "only root may use this socket", http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// admin makes a handler of a function from one JSON object to another.
func admin[In, Out any](f func(context.Context, *In) (*Out, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		in := new(In)
		if r.Method != http.MethodGet {
			d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10))
			d.DisallowUnknownFields()
			if err := d.Decode(in); err != nil {
				answer(w, http.StatusBadRequest, adminError{"the request is no JSON object of the expected form: " + err.Error()})
				return
			}
		}
		out, err := f(r.Context(), in)
		if err != nil {
			code := http.StatusInternalServerError
			if errors.As(err, new(*Fault)) {
				code = http.StatusBadRequest
			}
			answer(w, code, adminError{err.Error()})
			return
		}
		answer(w, http.StatusOK, out)
	})
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v) // the caller may be gone; there is nobody to tell
}

func (c *Center) adminStatus() *AdminStatus {
	s := &AdminStatus{Name: c.cfg.Name, PID: os.Getpid(), Term: c.term, Revision: c.view.Revision(), Sessions: len(c.authz.Sessions()), Hosts: []AdminHostStatus{}}
	for _, ref := range c.view.All(inventory.KindHost) {
		if h, ok := inventory.Lookup[inventory.Host](c.view, ref); ok {
			s.Hosts = append(s.Hosts, AdminHostStatus{Ref: ref, Name: h.Name, Address: h.Address, Connection: h.Connection, CryptoState: h.CryptoState, Problem: h.Problem})
		}
	}
	inventory.Each(c.view, func(vm *inventory.VM) bool {
		s.VMs++
		if vm.CryptoState == inventory.Locked {
			s.LockedVMs++
		}
		return true
	})
	inventory.Each(c.view, func(r *task.Record) bool {
		if !r.Done() {
			s.Tasks++
		}
		return true
	})
	return s
}

// ResetPassword gives a user another password, a generated one when password is
// empty, and returns it. It is for the admin socket, which asks for none.
func (c *Center) ResetPassword(ctx context.Context, user, password string) (string, error) {
	if user == "" {
		user = authz.Administrator
	}
	if password == "" {
		var err error
		if password, err = authz.GeneratePassword(); err != nil {
			return "", err
		}
	}
	err := c.authz.SetPassword(ctx, user, password)
	switch {
	case errors.Is(err, authz.ErrNoUser):
		return "", fault(task.NotFound, "there is no user %.130q", user)
	case errors.Is(err, authz.ErrPassword):
		return "", invalid("password", "%v", err)
	case err != nil:
		return "", err
	}
	c.events.Post(ctx, Event{Type: event.PasswordReset, Severity: event.Warning, Entity: inventory.RootFolder, Message: "The password of " + user + " was reset through the admin socket"})
	return password, nil
}

// addUser makes a user with a role on everything.
func (c *Center) addUser(ctx context.Context, u adminUser) (string, error) {
	roles, err := c.authz.Roles(ctx)
	if err != nil {
		return "", err
	}
	grant := authz.Permission{Entity: inventory.RootFolder, Principal: u.Name, Propagate: true}
	for _, r := range roles {
		if r.Name == u.Role {
			grant.Role = r.ID
		}
	}
	if grant.Role == 0 {
		return "", invalid("role", "there is no role %.100q; Admin, NoCryptoAdmin and ReadOnly are built in", u.Role)
	}
	if u.Password == "" {
		if u.Password, err = authz.GeneratePassword(); err != nil {
			return "", err
		}
	}
	if err := c.authz.CreateUser(ctx, u.Name, u.FullName, u.Password); err != nil {
		return "", invalid("user", "%v", err).Because(err)
	}
	if err := c.authz.SetPermission(ctx, grant); err != nil {
		return "", err
	}
	return u.Password, nil
}

// Admin is a client of a center's admin socket.
type Admin struct {
	http   http.Client
	socket string
}

// NewAdmin makes a client of the socket at path.
func NewAdmin(path string) *Admin {
	a := &Admin{socket: path}
	a.http = http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}}}
	return a
}

// CreateJoinToken makes a token for the host called name; ttl 0 means an hour.
func (a *Admin) CreateJoinToken(ctx context.Context, name string, ttl time.Duration) (string, error) {
	r := adminToken{Name: name}
	if ttl != 0 {
		r.TTL = ttl.String()
	}
	var reply adminTokenReply
	err := a.call(ctx, http.MethodPost, "/v1/join-tokens", r, &reply)
	return reply.Token, err
}

// ResetPassword gives a user another password, a generated one when password is
// empty, and returns it. An empty user is the administrator.
func (a *Admin) ResetPassword(ctx context.Context, user, password string) (string, error) {
	var reply adminPasswordReply
	err := a.call(ctx, http.MethodPost, "/v1/password", adminUser{Name: user, Password: password}, &reply)
	return reply.Password, err
}

// AddUser makes a user with a role, by its name, on everything, and returns the
// password.
func (a *Admin) AddUser(ctx context.Context, name, fullName, password, role string) (string, error) {
	var reply adminPasswordReply
	err := a.call(ctx, http.MethodPost, "/v1/users", adminUser{Name: name, FullName: fullName, Password: password, Role: role}, &reply)
	return reply.Password, err
}

// Status asks how the center does.
func (a *Admin) Status(ctx context.Context) (*AdminStatus, error) {
	var s AdminStatus
	return &s, a.call(ctx, http.MethodGet, "/v1/status", nil, &s)
}

func (a *Admin) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader = http.NoBody
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://center"+path, body)
	if err != nil {
		return err
	}
	reply, err := a.http.Do(r)
	if err != nil {
		return fmt.Errorf("center's admin socket %s does not answer; is center running, and are you root on its machine? %w", a.socket, err)
	}
	defer reply.Body.Close()
	d := json.NewDecoder(io.LimitReader(reply.Body, 4<<20))
	if reply.StatusCode == http.StatusOK {
		return d.Decode(out)
	}
	var failed adminError
	if d.Decode(&failed) != nil || failed.Error == "" {
		failed.Error = "center answered " + reply.Status
	}
	return errors.New(failed.Error)
}
