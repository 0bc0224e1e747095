package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"time"

	"mortise/internal/kms"
	"mortise/internal/pki"
	"mortise/internal/secret"
	"mortise/internal/store"
)

// status is how one member is doing, for the others.
type status struct {
	Name     string `json:"name"`
	Time     int64  `json:"time"` // of its clock, nanoseconds since 1970
	Unlocked bool   `json:"unlocked"`
}

// shareRequest asks for root keys of a kind; no ids means all there are.
type shareRequest struct {
	Kind string   `json:"kind"`
	IDs  []string `json:"ids,omitempty"`
}

// callHandler serves members. Who calls was checked when the connection came,
// and connections of removed members are cut.
func (n *Node) callHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		n.mu.Lock()
		defer n.mu.Unlock()
		s := status{Name: n.Name, Unlocked: len(n.keys) > 0}
		if n.kms != nil {
			s.Time = n.kms.Clock().Wall().UnixNano()
		}
		reply(w, s, nil)
	})
	mux.HandleFunc("POST /v1/keyids", func(w http.ResponseWriter, r *http.Request) {
		var req shareRequest
		err := decode(w, r, &req)
		var ids []string
		if err == nil {
			ids, err = n.listKeys(r.Context(), req.Kind)
		}
		reply(w, ids, err)
	})
	mux.HandleFunc("POST /v1/keys", func(w http.ResponseWriter, r *http.Request) {
		var req shareRequest
		if err := decode(w, r, &req); err != nil {
			reply(w, nil, err)
			return
		}
		share, err := n.share(r.Context(), req)
		if err != nil {
			reply(w, nil, err)
			return
		}
		defer share.Wipe()
		n.log.Info("root keys were handed to a member", "kind", req.Kind, "from", r.RemoteAddr)
		w.Header().Set("Content-Type", "application/octet-stream")
		share.Use(func(b []byte) { w.Write(b) })
	})
	mux.HandleFunc("POST /v1/audit", n.auditPage)
	return mux
}

// sharer is this member's open provider of a kind.
func (n *Node) sharer(kind string) (kms.Sharer, error) {
	n.mu.Lock()
	keys := n.keys
	n.mu.Unlock()
	if len(keys) == 0 {
		return nil, ErrLocked
	}
	for _, k := range keys {
		if s, can := k.(kms.Sharer); can && k.Kind() == kind {
			return s, nil
		}
	}
	return nil, fmt.Errorf("%w: no root keys of kind %q are here", ErrInvalid, short(kind))
}

func (n *Node) listKeys(ctx context.Context, kind string) ([]string, error) {
	s, err := n.sharer(kind)
	if err != nil {
		return nil, err
	}
	return s.List(ctx)
}

func (n *Node) share(ctx context.Context, req shareRequest) (*secret.Key, error) {
	s, err := n.sharer(req.Kind)
	if err != nil {
		return nil, err
	}
	ids := req.IDs
	if len(ids) == 0 {
		if ids, err = s.List(ctx); err != nil {
			return nil, err
		}
	}
	return s.Share(ctx, ids)
}

// Unlocked gives the node the open root-key providers: from now on it certifies
// new members and hands keys to peers that lack them.
func (n *Node) Unlocked(keys ...kms.RootKeys) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.keys = keys
}

// maxShare is how many root keys are asked for at once.
const maxShare = 64

// FetchKeys asks the other members for root keys, all that they have when no ids
// are given, until all that are asked for are there, and gives them to the
// provider. It is no error if some are nowhere. ErrNoPeer tells that no other
// member is there or unlocked.
func (n *Node) FetchKeys(ctx context.Context, to kms.Sharer, ids ...string) error {
	peers, err := n.peers(ctx)
	if err != nil {
		return err
	}
	failures, answered := []error{ErrNoPeer}, false
	for name, address := range peers {
		complete, err := n.fetchFrom(ctx, name, address, to, ids)
		if err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", name, err))
			continue
		}
		answered = true
		n.log.Info("root keys came from a peer", "peer", name)
		if complete {
			return nil
		}
	}
	if answered {
		return nil
	}
	return fmt.Errorf("cluster: asking for root keys: %w", errors.Join(failures...))
}

// fetchFrom gets root keys from one member, and tells whether those that were
// asked for are all there then.
func (n *Node) fetchFrom(ctx context.Context, name, address string, to kms.Sharer, ids []string) (complete bool, err error) {
	wanted := ids
	if len(wanted) == 0 {
		if wanted, err = n.askIDs(ctx, name, address, to.Kind()); err != nil {
			return false, err
		}
	}
	if len(wanted) == 0 { // a token without keys still has what opens it
		return len(ids) == 0, n.adoptFrom(ctx, name, address, to, nil)
	}
	for chunk := range slices.Chunk(wanted, maxShare) {
		if err := n.adoptFrom(ctx, name, address, to, chunk); err != nil {
			return false, err
		}
	}
	here, err := to.List(ctx)
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(ids, func(id string) bool { return !slices.Contains(here, id) }), nil
}

// askIDs asks a member which root keys of a kind it has. One of an earlier release
// does not tell: it hands over all that fit into one answer when none are named.
func (n *Node) askIDs(ctx context.Context, name, address, kind string) (ids []string, err error) {
	body, err := json.Marshal(shareRequest{Kind: kind})
	if err != nil {
		return nil, err
	}
	text, err := n.call(ctx, name, address, http.MethodPost, "/v1/keyids", body)
	if errors.Is(err, errNoCall) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &ids)
	}
	return ids, err
}

func (n *Node) adoptFrom(ctx context.Context, name, address string, to kms.Sharer, ids []string) error {
	body, err := json.Marshal(shareRequest{to.Kind(), ids})
	if err != nil {
		return err
	}
	text, err := n.call(ctx, name, address, http.MethodPost, "/v1/keys", body)
	if err != nil {
		return err
	}
	share, err := secret.Take(text)
	if err != nil {
		return err
	}
	defer share.Wipe()
	if err := to.Adopt(ctx, share); err != nil {
		return fmt.Errorf("keeping its root keys: %w", err)
	}
	return nil
}

// compareClocks tells the KMS how far the other members' clocks are from this
// one's, as far as the way there and back lets it see.
func (n *Node) compareClocks() {
	for n.run.Err() == nil {
		ctx, cancel := context.WithTimeout(n.run, n.every)
		peers, err := n.peers(ctx)
		if err == nil {
			clocks := map[string]kms.Offset{}
			for name, address := range peers {
				sent := n.kms.Clock().Wall()
				began := time.Now()
				text, err := n.call(ctx, name, address, http.MethodGet, "/v1/status", nil)
				if err != nil {
					continue
				}
				took := time.Since(began)
				var s status
				if json.Unmarshal(text, &s) != nil || s.Time == 0 {
					continue
				}
				clocks[name] = kms.Offset{By: time.Unix(0, s.Time).Sub(sent.Add(took / 2)), Within: took / 2}
			}
			n.kms.Clock().Compare(clocks)
		}
		cancel()
		n.pause(n.every)
	}
}

// farewell tells a caller whose certificate is of this cluster that it is no
// member, and nothing else.
func farewell() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { reply(w, nil, store.ErrRemoved) })
}

// removed asks the others whether they have removed this member: most must say
// so and none deny it, for one alone may lag behind and not know a member that
// has just joined.
func (n *Node) removed(ctx context.Context, others map[string]string) bool {
	said := 0
	for name, at := range others {
		u, err := url.Parse(at)
		if err != nil {
			continue
		}
		_, err = n.call(ctx, name, u.Host, http.MethodGet, "/v1/status", nil)
		switch {
		case errors.Is(err, store.ErrRemoved):
			said++
		case err == nil:
			return false
		}
	}
	return said > len(others)/2
}

// call asks one member.
func (n *Node) call(ctx context.Context, name, address, method, path string, body []byte) ([]byte, error) {
	return n.callFor(ctx, name, address, method, path, body, maxBody)
}

// callFor is call for an answer of at most so many bytes.
func (n *Node) callFor(ctx context.Context, name, address, method, path string, body []byte, most int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	m := pki.Mutual{Credentials: n.creds, CAs: []*x509.Certificate{n.ca}, Now: n.now}
	config := m.Client(identity(name))
	config.NextProtos = []string{protoCalls}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialTLSContext: func(ctx context.Context, _, at string) (net.Conn, error) {
			return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", at)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+address+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	// A share of keys is in this buffer and in the one it becomes, no third.
	text := make([]byte, 0, min(max(resp.ContentLength, 512), most))
	for {
		k, err := resp.Body.Read(text[len(text):cap(text)])
		text = text[:len(text)+k]
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil && len(text) == cap(text) {
			if int64(len(text)) >= most {
				err = errors.New("the answer is too long")
			} else {
				old := text
				text = append(make([]byte, 0, 2*cap(old)), old...)
				clear(old)
			}
		}
		if err != nil {
			clear(text)
			return nil, err
		}
	}
	return text, refusal(resp.StatusCode, text)
}

func decode(w http.ResponseWriter, r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return nil
}

func reply(w http.ResponseWriter, v any, err error) {
	code := http.StatusOK
	switch {
	case err == nil:
	case errors.Is(err, ErrInvalid), errors.Is(err, ErrTooOld):
		code = http.StatusBadRequest
	case errors.Is(err, pki.ErrTokenRefused), errors.Is(err, pki.ErrTokenExpired), errors.Is(err, pki.ErrTokenSpent):
		code = http.StatusForbidden
	case errors.Is(err, ErrMemberExists), errors.Is(err, store.ErrMemberExists), errors.Is(err, store.ErrOneAtATime):
		code = http.StatusConflict
	case errors.Is(err, store.ErrRemoved):
		code = http.StatusGone
	case errors.Is(err, ErrLocked), errors.Is(err, store.ErrUnavailable), errors.Is(err, store.ErrUnhealthy):
		code = http.StatusServiceUnavailable
	default:
		code = http.StatusInternalServerError
	}
	if err != nil {
		v = map[string]string{"error": err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v)
}

// errNoCall: the member's program is older than the call.
var errNoCall = errors.New("the member does not know the call")

// refusal is the error in an answer, nil for a good one.
func refusal(code int, text []byte) error {
	if code == http.StatusOK {
		return nil
	}
	var e struct{ Error string }
	if json.Unmarshal(text, &e) != nil || e.Error == "" {
		e.Error = http.StatusText(code)
	}
	switch code {
	case http.StatusServiceUnavailable:
		return fmt.Errorf("%w: %s", store.ErrUnavailable, e.Error)
	case http.StatusGone:
		return store.ErrRemoved
	case http.StatusNotFound:
		return errNoCall
	}
	return errors.New(e.Error)
}
