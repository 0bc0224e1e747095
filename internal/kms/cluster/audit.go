package cluster

import (
	"context"
	"encoding/json"
	"net/http"

	"mortise/internal/kms"
)

// maxAuditPage bounds a page of another member's audit log, in bytes.
const maxAuditPage = 16 << 20

// auditPage serves a page of this member's audit log to another member, which
// asks for an administrator of its own.
func (n *Node) auditPage(w http.ResponseWriter, r *http.Request) {
	var q kms.AuditPageRequest
	if err := decode(w, r, &q); err != nil {
		reply(w, nil, err)
		return
	}
	if _, err := n.attached(); err != nil {
		reply(w, nil, err)
		return
	}
	p, err := n.kms.AuditPage(r.Context(), q)
	reply(w, p, err)
}

// AuditLogs returns the other members' audit logs, by pages.
func (n *Node) AuditLogs(ctx context.Context) (list []kms.AuditSource, err error) {
	peers, err := n.peers(ctx)
	if err != nil {
		return nil, err
	}
	for name, address := range peers {
		list = append(list, kms.AuditSource{Member: name, Page: func(ctx context.Context, q kms.AuditPageRequest) (p kms.AuditPage, err error) {
			body, err := json.Marshal(q)
			if err != nil {
				return p, err
			}
			text, err := n.callFor(ctx, name, address, http.MethodPost, "/v1/audit", body, maxAuditPage)
			if err == nil {
				err = json.Unmarshal(text, &p)
			}
			return p, err
		}})
	}
	return list, nil
}
