package kms

// A Role is what a client certificate, an API key or an administrator may do
// with an instance (S7).
type Role string

const (
	// RoleViewer sees objects and their attributes, and no key.
	RoleViewer Role = "viewer"
	// RoleKeyManager makes, changes and uses objects. It cannot revoke or
	// destroy: what loses keys is for an administrator (design §5).
	RoleKeyManager Role = "key-manager"
	// RoleAdministrator may do everything.
	RoleAdministrator Role = "administrator"
)

// An Actor is who does something, as the audit log names it.
type Actor struct {
	Kind        string // "certificate", "api-key", "socket" or "server"
	Name        string // the administrator's label, or the user of the socket
	Fingerprint string // SHA-256 of the certificate, hexadecimal, if there is one
	From        string // network address
	Instance    string // empty for what concerns the whole server
	Role        Role
}
