// Package authz says who may do what: privileges by their vSphere ids, roles
// that group them, permissions that give a user a role on an object and below
// it, users with hashed passwords, and sessions.
//
// Place in the flow: every use case of center checks here before it acts; the
// vSphere API checks once more by its table. The package imports inventory (for
// ids) and store.
package authz

import (
	"time"

	"mortise/internal/inventory"
)

// Principal is who acts, as a session has proven. The zero Principal may
// nothing.
type Principal struct {
	User   string // "administrator@mortise.local"
	system bool
}

// System is center itself, when it acts for nobody: it may everything and
// cannot log in.
func System() Principal { return Principal{User: "center", system: true} }

// Role is a named set of privileges.
type Role struct {
	ID         int32    `json:"id"` // negative: built in
	Name       string   `json:"name"`
	Label      string   `json:"label"`
	Privileges []string `json:"privileges"` // sorted
}

// Permission gives a user a role on an entity and, with Propagate, on
// everything below it that has no permission of its own for that user.
type Permission struct {
	Entity    inventory.Ref `json:"entity"`
	Principal string        `json:"principal"`
	Role      int32         `json:"role"`
	Propagate bool          `json:"propagate"`
}

// Session is a logged-in user. Values of it are copies.
type Session struct {
	Token      string // secret: whoever has it is the user
	Key        string // names the session without giving it away
	Principal  Principal
	FullName   string
	LoginTime  time.Time
	LastActive time.Time
	UserAgent  string
	Address    string
}
