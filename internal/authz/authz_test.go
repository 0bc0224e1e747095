package authz

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mortise/internal/inventory"
	"mortise/internal/store"
)

// tree is a small inventory: root > dc > folder > vm.
type tree map[inventory.Ref]inventory.Ref

func (t tree) Parent(r inventory.Ref) (inventory.Ref, bool) { p, ok := t[r]; return p, ok }

var small = tree{"datacenter-2": "group-d1", "group-v3": "datacenter-2", "vm-10": "group-v3", "vm-11": "group-v3"}

type testClock struct{ now atomic.Int64 }

func (c *testClock) Now() time.Time          { return time.Unix(c.now.Load(), 0) }
func (c *testClock) advance(d time.Duration) { c.now.Add(int64(d / time.Second)) }

func open(t testing.TB, dir string) (*Authority, *testClock) {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: dir, Name: "center-1", Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	clock := &testClock{}
	clock.now.Store(1_700_000_000)
	a, err := Open(t.Context(), s, small, clock.Now)
	if err != nil {
		t.Fatal(err)
	}
	return a, clock
}

func TestBuiltinRoles(t *testing.T) {
	roles := map[int32]Role{}
	for _, r := range BuiltinRoles() {
		if !slices.IsSorted(r.Privileges) {
			t.Errorf("the privileges of %s are not sorted", r.Name)
		}
		roles[r.ID] = r
	}
	if got := len(slices.Compact(Privileges())); got != len(Privileges()) {
		t.Error("a privilege is listed twice")
	}
	if n := len(Cryptographer()); n != 14 {
		t.Errorf("%d cryptographic privileges, want 14", n)
	}
	// The list is reference/vsphere-api.md's.
	missing := append(Cryptographer(), "Global.Diagnostics", "Host.Inventory.AddHostToCluster", "Host.Inventory.AddStandaloneHost",
		"Host.Local.ManageUserGroups", "VirtualMachine.Interact.GuestControl", "Host.Tpm.Read", "Host.Tpm.Unseal")
	for _, p := range Privileges() {
		if !slices.Contains(roles[RoleAdmin].Privileges, p) {
			t.Errorf("Admin lacks %s", p)
		}
		if has, want := slices.Contains(roles[RoleNoCryptoAdmin].Privileges, p), !slices.Contains(missing, p); has != want {
			t.Errorf("NoCryptoAdmin has %s: %v, want %v", p, has, want)
		}
	}
	for _, p := range missing {
		if !slices.Contains(Privileges(), p) {
			t.Errorf("%s is no privilege", p)
		}
	}
	if len(roles[RoleNoAccess].Privileges) != 0 {
		t.Error("NoAccess has privileges")
	}
}

func TestCheck(t *testing.T) {
	a, _ := open(t, t.TempDir())
	ctx := t.Context()
	if _, err := a.Bootstrap(ctx); err != nil {
		t.Fatal(err)
	}
	users := []string{"operator", "reader", "nocrypto", "encrypter", "outsider", "fenced", "flat"}
	for _, u := range users {
		if err := a.CreateUser(ctx, u, "", "long enough password"); err != nil {
			t.Fatal(err)
		}
	}
	encrypter, err := a.CreateRole(ctx, "Encrypt only", []string{CryptoEncrypt, CryptoEncryptNew, VMEditDevice})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []Permission{
		{"group-v3", "operator", RoleAdmin, true},
		{"group-d1", "reader", RoleReadOnly, true},
		{"group-d1", "nocrypto", RoleNoCryptoAdmin, true},
		{"datacenter-2", "encrypter", encrypter.ID, true},
		{"group-d1", "fenced", RoleAdmin, true},
		{"vm-11", "fenced", RoleNoAccess, true},
		{"group-v3", "flat", RoleAdmin, false},
		{"group-d1", "flat", RoleReadOnly, true},
	} {
		if err := a.SetPermission(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		user, privilege string
		entity          inventory.Ref
		want            bool
	}{
		{Administrator, CryptoDecrypt, "vm-10", true},
		{Administrator, CryptoManageKeyServers, "group-d1", true},
		{"operator", CryptoDecrypt, "vm-10", true},
		{"operator", CryptoDecrypt, "group-v3", true},
		{"operator", CryptoDecrypt, "datacenter-2", false}, // permissions go down, not up
		{"operator", CryptoManageKeyServers, "group-d1", false},
		{"reader", Read, "vm-10", true},
		{"reader", VMPowerOn, "vm-10", false},
		{"nocrypto", VMPowerOn, "vm-10", true},
		{"nocrypto", CryptoAccess, "vm-10", false},
		{"nocrypto", HostAddToCluster, "group-d1", false},
		{"encrypter", CryptoEncrypt, "vm-10", true},
		{"encrypter", CryptoDecrypt, "vm-10", false},
		{"encrypter", Read, "vm-10", true},
		{"encrypter", Read, "group-d1", false},
		{"outsider", Anonymous, "vm-10", false},
		{"fenced", VMPowerOn, "vm-10", true},
		{"fenced", Read, "vm-11", false}, // the nearest permission decides
		{"flat", VMCreate, "group-v3", true},
		{"flat", VMPowerOn, "vm-10", false}, // the one in between does not propagate
		{"flat", Read, "vm-10", true},
		{"", Anonymous, "vm-10", false},
		{"nobody", Anonymous, "vm-10", false},
		{"center", CryptoAccess, "vm-10", false}, // the name of the system principal is not the principal
		{"operator", Read, "vm-99", false},
	} {
		err := a.Check(Principal{User: c.user}, c.privilege, c.entity)
		if (err == nil) != c.want {
			t.Errorf("%s %s on %s: %v, want %v", c.user, c.privilege, c.entity, err, c.want)
		}
		var d *DeniedError
		if err != nil && (!errors.As(err, &d) || d.Privilege != c.privilege || d.Entity != c.entity || !strings.Contains(err.Error(), c.privilege)) {
			t.Errorf("the error %v does not name what is missing", err)
		}
	}
	if a.Check(System(), CryptoAccess, "vm-10") != nil || a.Check(Principal{}, Anonymous, "group-d1") == nil {
		t.Error("the system principal may not, or the zero one may")
	}
	if err := a.RemovePermission(ctx, "vm-11", "fenced"); err != nil {
		t.Fatal(err)
	}
	if err := a.Check(Principal{User: "fenced"}, Read, "vm-11"); err != nil {
		t.Errorf("after the fence is gone: %v", err)
	}
}

func TestPermissionErrors(t *testing.T) {
	a, _ := open(t, t.TempDir())
	ctx := t.Context()
	if _, err := a.Bootstrap(ctx); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct{ got, want error }{
		"unknown role":        {a.SetPermission(ctx, Permission{"vm-10", Administrator, 77, true}), ErrNoRole},
		"unknown user":        {a.SetPermission(ctx, Permission{"vm-10", "ghost", RoleAdmin, true}), ErrNoUser},
		"no such permission":  {a.RemovePermission(ctx, "vm-10", Administrator), ErrNoPermission},
		"user exists":         {a.CreateUser(ctx, "Administrator@Mortise.Local", "", "long enough password"), ErrUserExists},
		"short password":      {a.CreateUser(ctx, "new", "", "short"), ErrPassword},
		"password of nobody":  {a.SetPassword(ctx, "ghost", "long enough password"), ErrNoUser},
		"password of 2000":    {a.SetPassword(ctx, Administrator, strings.Repeat("x", 2000)), ErrPassword},
		"permission of nobod": {a.SetPermission(ctx, Permission{"vm-10", "", RoleAdmin, true}), ErrNoUser},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v", what, c.got)
		}
	}
	if _, err := a.CreateRole(ctx, "r", []string{"Cryptographer.Everything"}); !errors.Is(err, ErrNoPrivilege) {
		t.Errorf("unknown privilege: %v", err)
	}
	if _, err := a.CreateRole(ctx, "admin", nil); !errors.Is(err, store.ErrExists) {
		t.Errorf("a role named like a built-in one: %v", err)
	}
}

func TestLogin(t *testing.T) {
	dir := t.TempDir()
	a, clock := open(t, dir)
	ctx := t.Context()
	password, err := a.Bootstrap(ctx)
	if err != nil || len(password) < 20 {
		t.Fatalf("the generated password has %d characters, %v", len(password), err)
	}
	if again, err := a.Bootstrap(ctx); again != "" || err != nil {
		t.Fatalf("a second start generated another password, %v", err)
	}
	for _, c := range [][2]string{{Administrator, password + "x"}, {Administrator, ""}, {"nobody", password}, {"", ""}, {Administrator, strings.Repeat("y", 5000)}} {
		if _, err := a.Login(ctx, c[0], c[1], "test", c[0]+c[1][:min(3, len(c[1]))]); !errors.Is(err, ErrBadCredentials) {
			t.Errorf("login as %q: %v", c[0], err)
		} else if len(c[1]) > 4 && strings.Contains(err.Error(), c[1]) {
			t.Error("the error quotes the password")
		}
	}
	s, err := a.Login(ctx, "ADMINISTRATOR@mortise.local ", password, "govc", "192.0.2.1")
	if err != nil {
		t.Fatal(err)
	}
	if s.Principal.User != Administrator || s.UserAgent != "govc" || len(s.Token) < 40 || s.Key == s.Token {
		t.Errorf("the session is %+v", s)
	}
	clock.advance(20 * time.Minute)
	if _, ok := a.Session(s.Token); !ok {
		t.Error("a session of 20 minutes is gone")
	}
	clock.advance(20 * time.Minute)
	if _, ok := a.Session(s.Token); !ok {
		t.Error("a session that was used 20 minutes ago is gone")
	}
	if list := a.Sessions(); len(list) != 1 || list[0].Token != "" {
		t.Errorf("the list of sessions is %+v", list)
	}
	clock.advance(SessionIdle + time.Second)
	if _, ok := a.Session(s.Token); ok {
		t.Error("an idle session is still good")
	}
	s, _ = a.Login(ctx, Administrator, password, "", "")
	a.Logout(s.Token)
	if _, ok := a.Session(s.Token); ok {
		t.Error("a session is still good after logout")
	}
	s, _ = a.Login(ctx, Administrator, password, "", "")
	if err := a.SetPassword(ctx, Administrator, "another good password"); err != nil {
		t.Fatal(err)
	}
	if _, ok := a.Session(s.Token); ok {
		t.Error("a session outlived the password it was opened with")
	}
	if _, err := a.Login(ctx, Administrator, password, "", "a"); !errors.Is(err, ErrBadCredentials) {
		t.Errorf("the old password still works: %v", err)
	}
	if _, err := a.Login(ctx, Administrator, "another good password", "", ""); err != nil {
		t.Errorf("the new password does not work: %v", err)
	}
	for _, token := range []string{"", "x", s.Key} {
		if _, ok := a.Session(token); ok {
			t.Errorf("token %q opens a session", token)
		}
	}
}

func TestPasswordHash(t *testing.T) {
	h, err := hashPassword("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]bool{"correct horse": true, "correct hors": false, "": false} {
		if got, err := checkPassword(h, p); got != want || err != nil {
			t.Errorf("%q: %v, %v", p, got, err)
		}
	}
	if h2, _ := hashPassword("correct horse"); h2 == h {
		t.Error("two hashes of one password are equal: there is no salt")
	}
	// An Argon2id hash that another implementation made: the reference program
	// argon2 of phc-winner-argon2, test.c, version 0x13, t=2, m=2^16, p=1.
	const other = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"
	if ok, err := checkPassword(other, "password"); !ok || err != nil {
		t.Errorf("the reference hash does not match: %v", err)
	}
	for _, bad := range []string{"", "$argon2id$", "$argon2i$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
		"$argon2id$v=19$m=4294967295,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
		"$argon2id$v=19$m=65536,t=0,p=0$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"} {
		if ok, err := checkPassword(bad, "password"); ok || err == nil {
			t.Errorf("malformed hash %q: %v, %v", bad, ok, err)
		}
	}
}

// Failures slow the guesser down, and nobody else.
func TestGuessing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g guesses
		g.init(time.Now)
		wait := func(user, address string) time.Duration {
			start := time.Now()
			if err := g.wait(t.Context(), user, address); err != nil {
				t.Fatal(err)
			}
			return time.Since(start)
		}
		var waited []time.Duration
		for range 9 {
			waited = append(waited, wait("u", "a"))
			g.failed("u", "a")
		}
		want := []time.Duration{0, 0, 0, 1, 2, 4, 8, 16, 16}
		for i := range want {
			if waited[i] != want[i]*time.Second {
				t.Errorf("guess %d waited %v, want %v s", i+1, waited[i], int(want[i]))
			}
		}
		if d := wait("u", "b"); d != 0 {
			t.Errorf("the owner at another address waited %v", d)
		}
		g.succeeded("u", "a")
		if d := wait("u", "a"); d != 0 {
			t.Errorf("after a success the wait is %v", d)
		}
		for i := range 3 * maxGuessers {
			g.failed("u", string(rune(i)))
		}
		if len(g.bad) > maxGuessers {
			t.Errorf("%d guessers are remembered", len(g.bad))
		}
	})
}

func FuzzCheckPassword(f *testing.F) {
	f.Add("$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc")
	f.Add("$argon2id$v=19$m=8,t=1,p=1$$")
	f.Add("$$$$$")
	f.Fuzz(func(t *testing.T, phc string) {
		if strings.Contains(phc, "m=") && len(phc) > 40 && !strings.Contains(phc, "m=8,t=1,") {
			t.Skip("costly")
		}
		checkPassword(phc, "x")
	})
}
