package authz

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"mortise/internal/inventory"
	"mortise/internal/store"
)

// Administrator is the account that every center begins with.
const Administrator = "administrator@mortise.local"

// What callers decide on.
var (
	ErrBadCredentials = errors.New("wrong user name or password")
	ErrNoUser         = errors.New("no such user")
	ErrUserExists     = errors.New("user exists")
)

// User is an account. Hash is a PHC string.
type User struct {
	Name     string    `json:"name"` // lower case
	FullName string    `json:"fullName"`
	Hash     string    `json:"hash"`
	Changed  time.Time `json:"changed"` // when the password was set
}

// Tree tells where an object is: the parent of each.
type Tree interface {
	Parent(inventory.Ref) (inventory.Ref, bool)
}

// Authority knows users, roles and permissions, and the sessions of this
// process. Its methods may be called concurrently.
type Authority struct {
	store       *store.Store
	tree        Tree
	clock       func() time.Time
	users       *store.Collection[User]
	permissions *store.Collection[Permission]
	roles       *store.Collection[Role]
	builtin     map[int32]Role
	hashing     hashing
	decoy       string // a hash to check when there is no such user
	guesses     guesses
	sessions    sessions
}

// Open loads the accounts in s. tree is where permissions propagate along.
func Open(ctx context.Context, s *store.Store, tree Tree, clock func() time.Time) (*Authority, error) {
	a := &Authority{store: s, tree: tree, clock: clock, builtin: map[int32]Role{}, hashing: make(hashing, 2)}
	a.guesses.init(clock)
	a.sessions.init(clock)
	for _, r := range BuiltinRoles() {
		a.builtin[r.ID] = r
	}
	var err, err1, err2, err3 error
	a.users, err1 = store.NewCollection(ctx, s, "user", store.JSON[User](1))
	a.permissions, err2 = store.NewCollection(ctx, s, "permission", store.JSON[Permission](1))
	a.roles, err3 = store.NewCollection(ctx, s, "role", store.JSON[Role](1))
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, fmt.Errorf("authz: %w", err)
	}
	// A permission that cannot be read may be one that forbids: fail closed.
	if _, err := a.permissions.List(ctx, ""); err != nil {
		return nil, fmt.Errorf("authz: %w", err)
	}
	a.decoy, err = hashPassword("nobody's")
	return a, err
}

// Bootstrap makes the administrator with a generated password, and returns the
// password; it returns the empty string when the account exists.
func (a *Authority) Bootstrap(ctx context.Context) (string, error) {
	_, err := a.users.Get(ctx, Administrator)
	if err == nil || !errors.Is(err, store.ErrNotFound) {
		return "", err
	}
	password, err := GeneratePassword()
	if err != nil {
		return "", err
	}
	hash, err := hashPassword(password)
	if err != nil {
		return "", err
	}
	grant := Permission{Entity: inventory.RootFolder, Principal: Administrator, Role: RoleAdmin, Propagate: true}
	_, err = a.store.Commit(ctx,
		a.users.Create(Administrator, User{Name: Administrator, FullName: "Administrator", Hash: hash, Changed: a.clock()}),
		a.permissions.Put(grant.key(), grant))
	if err != nil {
		return "", fmt.Errorf("authz: making the administrator: %w", err)
	}
	return password, a.store.Sync(ctx)
}

// CreateUser makes an account.
func (a *Authority) CreateUser(ctx context.Context, name, fullName, password string) error {
	name = canonical(name)
	if name == "" || len(name) > 128 || strings.ContainsAny(name, "/ \t\r\n\x00") {
		return fmt.Errorf("authz: user name %.130q has 1 to 128 characters without spaces and slashes", name)
	}
	hash, err := a.newHash(ctx, password)
	if err != nil {
		return err
	}
	_, err = a.store.Commit(ctx, a.users.Create(name, User{Name: name, FullName: fullName, Hash: hash, Changed: a.clock()}))
	if errors.Is(err, store.ErrExists) {
		return fmt.Errorf("authz: %w: %s", ErrUserExists, name)
	}
	return err
}

// SetPassword gives a user another password and ends the user's sessions.
func (a *Authority) SetPassword(ctx context.Context, name, password string) error {
	name = canonical(name)
	hash, err := a.newHash(ctx, password)
	if err != nil {
		return err
	}
	_, err = a.users.Edit(ctx, name, func(u *User) error {
		u.Hash, u.Changed = hash, a.clock()
		return nil
	})
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("authz: %w: %s", ErrNoUser, name)
	}
	if err != nil {
		return fmt.Errorf("authz: setting the password of %s: %w", name, err)
	}
	a.sessions.endAll(name)
	a.guesses.forget(name)
	return nil
}

func (a *Authority) newHash(ctx context.Context, password string) (hash string, err error) {
	if len(password) < minPassword || len(password) > maxPassword {
		return "", fmt.Errorf("authz: %w", ErrPassword)
	}
	if herr := a.hashing.do(ctx, func() { hash, err = hashPassword(password) }); herr != nil {
		return "", herr
	}
	return hash, err
}

// Login checks a password and opens a session. It answers ErrBadCredentials
// whatever was wrong, in the same time, and the more slowly the more often it
// failed of late.
func (a *Authority) Login(ctx context.Context, user, password, userAgent, address string) (*Session, error) {
	user = canonical(user)
	if len(user) > 128 || len(password) > maxPassword {
		return nil, fmt.Errorf("authz: %w", ErrBadCredentials)
	}
	if err := a.guesses.wait(ctx, user, address); err != nil {
		return nil, err
	}
	var u User
	e, err := a.users.Get(ctx, user)
	known := err == nil
	switch {
	case known:
		u = e.Value
	case user == "", errors.Is(err, store.ErrNotFound):
		u.Hash = a.decoy
	default:
		return nil, fmt.Errorf("authz: %w", err)
	}
	var right bool
	if herr := a.hashing.do(ctx, func() { right, err = checkPassword(u.Hash, password) }); herr != nil {
		return nil, herr
	}
	if err != nil {
		return nil, fmt.Errorf("authz: user %s: %w", user, err)
	}
	if !known || !right {
		a.guesses.failed(user, address)
		return nil, fmt.Errorf("authz: %w", ErrBadCredentials)
	}
	a.guesses.succeeded(user, address)
	return a.sessions.open(Principal{User: u.Name}, u.FullName, userAgent, address)
}

func canonical(user string) string { return strings.ToLower(strings.TrimSpace(user)) }
