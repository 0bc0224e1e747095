package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"mortise/internal/kms"
	"mortise/internal/kms/audit"
)

// The audit log: /v1/audit, and what concerns an instance in
// /v1/instances/{instance}/audit.

func auditRows() []row {
	const all, of = "/v1/audit", "/v1/instances/{instance}/audit"
	entries := stream(http.MethodGet, all, kms.RoleAdministrator, "Export the audit log of this member: an entry a line", recordsMedia, exportAudit).
		takes("instance", "entries of this instance").takes("members", "\"all\": of every member's log, by time; without a choice of entries, with marks by which the export can be verified")
	return []row{
		chosen(entries),
		chosen(stream(http.MethodGet, of, kms.RoleAdministrator, "Export what the audit log of this member has on an instance", recordsMedia, exportAudit)).takes("members", "\"all\": of every member's log, by time"),
		stream(http.MethodGet, all+"/archive", kms.RoleAdministrator, "Export the whole audit log of this member, to be verified elsewhere: a tar archive", archiveMedia,
			func(c *call, w io.Writer) error { return c.KMS.AuditArchive(c, w) }),
		get(all+"/verify", kms.RoleAdministrator, "Check the audit log of this member for changes, against its anchors in the store", func(c *call) (audit.Report, error) {
			return c.KMS.AuditVerify(c)
		}).lasting(15 * time.Minute),
		get(all+"/keys", kms.RoleViewer, "List the public keys with which members sign their audit logs", func(c *call) ([]audit.MemberKey, error) {
			return c.KMS.AuditKeys(c)
		}),
		get(all+"/status", kms.RoleViewer, "Show how the audit log of this member stands", func(c *call) (kms.AuditStatus, error) {
			return c.KMS.AuditStatus()
		}),
		send(http.MethodPost, all+"/removal", kms.RoleAdministrator, "Remove old closed segments of this member's audit log, leaving a signed tombstone", func(c *call, r RemoveAudit) (audit.Tombstone, error) {
			if r.Reason == "" || r.Before.IsZero() {
				return audit.Tombstone{}, fmt.Errorf("%w: before and reason are needed", kms.ErrInvalid)
			}
			return c.KMS.AuditRemove(c, c.actor, r.Before, r.Reason)
		}).onSocket(),
		act(http.MethodDelete, all+"/gone/{log}", kms.RoleAdministrator, "Take note that a log of this member's is gone for good", func(c *call) (done, error) {
			return done{}, c.KMS.AuditForget(c, c.actor, c.path("log"), c.query("reason"))
		}).onSocket().takes("reason", "why it is gone"),
	}
}

const (
	recordsMedia = "application/x-ndjson"
	archiveMedia = "application/x-tar"
)

// chosen adds the fields that choose entries.
func chosen(r row) row {
	return r.takes("since", "entries from this time on, RFC 3339").takes("until", "entries before this time, RFC 3339").
		takes("object", "entries about this object").takes("client", "entries of this client: its name or fingerprint").
		takes("operation", "entries of this operation").takes("after", "entries with a higher number")
}

// RemoveAudit is the request to remove old segments.
type RemoveAudit struct {
	Before time.Time `json:"before" doc:"segments that were written before then"`
	Reason string    `json:"reason" doc:"for those who find the tombstone"`
}

func exportAudit(c *call, w io.Writer) error {
	f := kms.AuditFilter{Object: c.query("object"), Client: c.query("client"), Operation: c.query("operation"), Instance: c.query("instance")}
	if instance := c.path("instance"); instance != "" {
		f.Instance = instance // an instance's administrator sees nothing else
	}
	var err error
	for name, to := range map[string]*time.Time{"since": &f.Since, "until": &f.Until} {
		if text := c.query(name); text != "" {
			if *to, err = time.Parse(time.RFC3339Nano, text); err != nil {
				return fmt.Errorf("%w: %s: %q is no time of RFC 3339", kms.ErrInvalid, name, text)
			}
		}
	}
	if text := c.query("after"); text != "" {
		if f.After, err = strconv.ParseUint(text, 10, 63); err != nil {
			return fmt.Errorf("%w: after: %q is no number of an entry", kms.ErrInvalid, text)
		}
	}
	each := func(r *audit.Record) error { return r.WriteJSON(w) }
	switch c.query("members") {
	case "":
		return c.KMS.AuditExport(c, f, each)
	case "all":
		var others []kms.AuditSource
		if c.Cluster != nil {
			if others, err = c.Cluster.AuditLogs(c); err != nil {
				return err
			}
		}
		return c.KMS.AuditExportAll(c, f, others, each, func(m *audit.Marks) error { return m.WriteJSON(w) })
	}
	return fmt.Errorf("%w: members: %q; it is \"all\", or is left out for the log of this member alone", kms.ErrInvalid, c.query("members"))
}

// ExportAudit calls each with the chosen entries of the member that is asked. With
// an instance it asks as that instance's administrator would.
func (c *Client) ExportAudit(ctx context.Context, f kms.AuditFilter, each func(audit.Record) error) error {
	body, err := c.exportAudit(ctx, f, url.Values{})
	if err != nil {
		return err
	}
	defer body.Close()
	d := json.NewDecoder(body)
	for {
		var r audit.Record
		if err := d.Decode(&r); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("admin: the export of %s was cut off: %w", c.where, err)
		}
		if err := each(r); err != nil {
			return err
		}
	}
}

// ExportAuditOfAll copies the chosen entries of all members to w, as lines of
// JSON by time. If none are chosen there are marks among them, by which
// [audit.VerifyExport] checks them.
func (c *Client) ExportAuditOfAll(ctx context.Context, f kms.AuditFilter, w io.Writer) error {
	body, err := c.exportAudit(ctx, f, url.Values{"members": {"all"}})
	if err != nil {
		return err
	}
	defer body.Close()
	if _, err := io.Copy(w, body); err != nil {
		return fmt.Errorf("admin: the export of %s was cut off: %w", c.where, err)
	}
	return nil
}

func (c *Client) exportAudit(ctx context.Context, f kms.AuditFilter, query url.Values) (io.ReadCloser, error) {
	path := "/v1/audit"
	if f.Instance != "" {
		path = "/v1/instances/" + url.PathEscape(f.Instance) + "/audit"
	}
	for name, text := range map[string]string{"object": f.Object, "client": f.Client, "operation": f.Operation} {
		if text != "" {
			query.Set(name, text)
		}
	}
	for name, t := range map[string]time.Time{"since": f.Since, "until": f.Until} {
		if !t.IsZero() {
			query.Set(name, t.UTC().Format(time.RFC3339Nano))
		}
	}
	if f.After > 0 {
		query.Set("after", strconv.FormatUint(f.After, 10))
	}
	return c.send(ctx, http.MethodGet, path, query, http.NoBody, "")
}

// ArchiveAudit copies the whole log, a tar archive, to w.
func (c *Client) ArchiveAudit(ctx context.Context, w io.Writer) error {
	body, err := c.send(ctx, http.MethodGet, "/v1/audit/archive", nil, http.NoBody, "")
	if err != nil {
		return err
	}
	defer body.Close()
	if _, err := io.Copy(w, body); err != nil {
		return fmt.Errorf("admin: the archive of %s was cut off: %w", c.where, err)
	}
	return nil
}

// VerifyAudit lets the server check its log.
func (c *Client) VerifyAudit(ctx context.Context) (r audit.Report, err error) {
	body, err := c.send(ctx, http.MethodGet, "/v1/audit/verify", nil, http.NoBody, "")
	if err != nil {
		return r, err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(&r); err != nil {
		return r, fmt.Errorf("admin: reading the answer of %s: %w", c.where, err)
	}
	return r, nil
}

// AuditKeys lists the members' public keys.
func (c *Client) AuditKeys(ctx context.Context) (list []audit.MemberKey, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/audit/keys", nil, nil, &list)
	return list, err
}

// AuditStatus tells how the log stands.
func (c *Client) AuditStatus(ctx context.Context) (s kms.AuditStatus, err error) {
	err = c.call(ctx, http.MethodGet, "/v1/audit/status", nil, nil, &s)
	return s, err
}

// RemoveAudit removes old segments.
func (c *Client) RemoveAudit(ctx context.Context, r RemoveAudit) (t audit.Tombstone, err error) {
	err = c.call(ctx, http.MethodPost, "/v1/audit/removal", nil, r, &t)
	return t, err
}

// ForgetAudit takes note that a log is gone for good.
func (c *Client) ForgetAudit(ctx context.Context, log, reason string) error {
	return c.call(ctx, http.MethodDelete, "/v1/audit/gone/"+url.PathEscape(log), url.Values{"reason": {reason}}, nil, &done{})
}
