package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"

	"filippo.io/age"

	"mortise/internal/kms"
	"mortise/internal/kms/backup"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// Backups and the quarantine after a restore: /v1/backups, /v1/restore.

func backupRows() []row {
	const list, one = "/v1/backups", "/v1/backups/{backup}"
	begin := stream(http.MethodPost, list, kms.RoleAdministrator, "Make a backup: the answer is the backup, an age file", backupMedia, makeBackup).onSocket()
	begin.request = reflect.TypeFor[MakeBackup]()
	return []row{
		begin,
		get(list, kms.RoleViewer, "List the backups that were made", func(c *call) ([]kms.Backup, error) {
			return c.KMS.Backups(c)
		}),
		act(http.MethodDelete, one, kms.RoleAdministrator, "Take a backup off the list: it and its copies are known to be gone", func(c *call) (done, error) {
			return done{}, c.KMS.ForgetBackup(c, c.actor, c.path("backup"))
		}).onSocket(),
		get("/v1/restore", kms.RoleViewer, "Show the restore that the server is quarantined after", func(c *call) (RestoreStatus, error) {
			return restoreStatus(c, c.KMS)
		}),
		act(http.MethodPost, "/v1/restore/release", kms.RoleAdministrator, "End the quarantine: clients are served", func(c *call) (done, error) {
			return done{}, c.KMS.Release(c, c.actor, c.confirmation())
		}).onSocket().needsConfirmation(),
	}
}

const backupMedia = "application/vnd.age"

// MakeBackup says whom a backup is sealed to: a passphrase or recipients.
type MakeBackup struct {
	Passphrase []byte   `json:"passphrase,omitempty" doc:"base64; at least 12 bytes"`
	Recipients []string `json:"recipients,omitempty" doc:"age recipients, age1…"`
}

func makeBackup(c *call, to io.Writer) error {
	var req MakeBackup
	if err := c.decode(&req); err != nil {
		return err
	}
	recipients, err := req.recipients()
	if err != nil {
		return fmt.Errorf("%w: %w", kms.ErrInvalid, err)
	}
	_, err = backup.Write(c, c.KMS, c.actor, to, recipients...)
	return err
}

// recipients wipes the passphrase.
func (r *MakeBackup) recipients() ([]age.Recipient, error) {
	switch {
	case len(r.Passphrase) > 0 && len(r.Recipients) > 0:
		clear(r.Passphrase)
		return nil, errors.New("a backup is sealed to a passphrase or to recipients, not to both")
	case len(r.Passphrase) > 0:
		p, err := secret.Take(r.Passphrase)
		if err != nil {
			return nil, err
		}
		defer p.Wipe()
		to, err := backup.ToPassphrase(p, 0)
		return []age.Recipient{to}, err
	}
	return backup.ToRecipients(r.Recipients)
}

// RestoreStatus is a quarantine.
type RestoreStatus struct {
	Quarantined bool            `json:"quarantined"`
	Restore     *kms.Quarantine `json:"restore,omitempty"`
	Acts        []kms.Act       `json:"acts" doc:"what was done after the backup, and whether it is done again"`
}

func restoreStatus(ctx context.Context, k *kms.KMS) (s RestoreStatus, err error) {
	s.Acts = []kms.Act{}
	q, err := k.Quarantined(ctx)
	if errors.Is(err, store.ErrNotFound) {
		return s, nil
	}
	if err != nil {
		return s, err
	}
	s.Quarantined, s.Restore = true, &q
	s.Acts, err = k.QuarantinedActs(ctx)
	return s, err
}

// MakeBackup writes a backup to w. After an error what was written is none. The
// passphrase in r is the caller's to clear.
func (c *Client) MakeBackup(ctx context.Context, r MakeBackup, w io.Writer) error {
	body, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("admin: %w", err)
	}
	defer clear(body)
	answer, err := c.send(ctx, http.MethodPost, at("backups"), nil, bytes.NewReader(body), "application/json")
	if err != nil {
		return err
	}
	defer answer.Close()
	if _, err := io.Copy(w, answer); err != nil {
		return fmt.Errorf("admin: receiving the backup (the server's log says more): %w", err)
	}
	return nil
}

// Backups lists the backups that were made.
func (c *Client) Backups(ctx context.Context) (list []kms.Backup, err error) {
	err = c.call(ctx, http.MethodGet, at("backups"), nil, nil, &list)
	return list, err
}

// ForgetBackup takes a backup off the list.
func (c *Client) ForgetBackup(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, at("backups", id), nil, nil, &done{})
}

// RestoreStatus shows the quarantine after a restore.
func (c *Client) RestoreStatus(ctx context.Context) (s RestoreStatus, err error) {
	err = c.call(ctx, http.MethodGet, at("restore"), nil, nil, &s)
	return s, err
}

// Release ends the quarantine; hash agrees to what is lost or in doubt.
func (c *Client) Release(ctx context.Context, hash string) error {
	return c.call(ctx, http.MethodPost, at("restore", "release"), confirming(hash), nil, &done{})
}
