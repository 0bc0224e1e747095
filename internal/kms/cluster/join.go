package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"mortise/internal/pki"
	"mortise/internal/store"
)

// joinRequest is what a new member sends to one that its token names, once that
// one has proven by its CA to be the right one.
type joinRequest struct {
	Secret  string `json:"secret"`
	Name    string `json:"name"`
	Address string `json:"address"`
	CSR     []byte `json:"csr"` // DER
	Format  int    `json:"format"`
	Version string `json:"version"`
}

type joinAnswer struct {
	Certificate []byte               `json:"certificate"` // DER
	Members     map[string]time.Time `json:"members"`
	URLs        map[string]string    `json:"urls"` // of all members, the new one's too
}

// joinHandler serves callers without a certificate; the token is their proof.
func (n *Node) joinHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/join", func(w http.ResponseWriter, r *http.Request) {
		var req joinRequest
		if err := decode(w, r, &req); err != nil {
			reply(w, nil, err)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), 50*time.Second)
		defer cancel()
		a, err := n.letIn(ctx, req)
		if err != nil {
			n.log.Warn("a new member was refused", "member", short(req.Name), "address", short(req.Address), "from", r.RemoteAddr, "error", err)
		}
		reply(w, a, err)
	})
	return mux
}

// letIn checks a joiner's token, makes it a learner and certifies it. It may be
// asked again by the same joiner, with the same key, when an answer was lost.
func (n *Node) letIn(ctx context.Context, req joinRequest) (*joinAnswer, error) {
	st, err := n.attached()
	if err != nil {
		return nil, err
	}
	if err := CheckAddress(req.Address); err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(req.CSR)
	if err != nil {
		return nil, fmt.Errorf("%w: the certificate request is malformed", ErrInvalid)
	}
	if f, err := st.format.Get(ctx, formatKey); err == nil && f.Value > req.Format {
		return nil, fmt.Errorf("%w: records are written in format %d, the new member knows %d; install the version that the members run", ErrTooOld, f.Value, req.Format)
	}
	ca, err := n.authority(ctx)
	if err != nil {
		return nil, err
	}
	// The token is spent before anything else happens, by compare-and-swap: two
	// joiners with one token cannot both pass.
	key := hex.EncodeToString(pki.HashJoinSecret(req.Secret))
	now := n.now()
	_, err = st.tokens.Edit(ctx, key, func(r *pki.JoinRecord) error { return r.Spend(req.Secret, req.Name, csr, now) })
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, fmt.Errorf("%w: no such token; make one: mortise kms member add %s", pki.ErrTokenRefused, short(req.Name))
	case err != nil:
		return nil, err
	}
	var learner store.Member
	var all []store.Member
	err = retry(ctx, func() (err error) {
		learner, all, err = n.store.AddLearner(ctx, peerURL(req.Address))
		return err
	})
	if err != nil {
		return nil, err
	}
	cert, err := issue(ca, csr, req.Name, n.certLife, now)
	if err != nil {
		return nil, err
	}
	record := memberRecord{ID: learner.ID, Address: req.Address, Added: now.UTC().Truncate(time.Second), Format: req.Format, Version: req.Version}
	have, err := st.members.Get(ctx, req.Name)
	switch {
	case errors.Is(err, store.ErrNotFound):
		err = n.kms.CommitAct(ctx, "member join", req.Name, st.members.Create(req.Name, record))
	case err == nil && have.Value.ID != learner.ID:
		err = fmt.Errorf("%w: %s", ErrMemberExists, req.Name)
	case err == nil:
		err = n.kms.CommitAct(ctx, "member join", req.Name, st.members.Update(req.Name, have.Revision, record))
	}
	if err != nil {
		return nil, fmt.Errorf("cluster: entering the new member in the list: %w", err)
	}
	entries, err := st.members.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	a := &joinAnswer{Certificate: cert.Raw, Members: map[string]time.Time{}, URLs: map[string]string{}}
	for _, e := range entries {
		a.Members[e.Key] = e.Value.Added
		for _, m := range all {
			if m.ID == e.Value.ID {
				a.URLs[e.Key] = m.URL
			}
		}
	}
	if len(a.URLs) != len(all) {
		return nil, fmt.Errorf("cluster: the lists of members differ; a member is being removed: try again: %w", store.ErrUnavailable)
	}
	n.log.Info("a new member is let in", "member", req.Name, "address", req.Address, "id", store.IDString(learner.ID))
	return a, nil
}

// join makes this folder a new member's, with a token. The key is on disk before
// it is certified, so that a second attempt after a lost answer passes.
func (n *Node) join(ctx context.Context) error {
	t, err := ParseToken(n.Token)
	if err != nil {
		return fmt.Errorf("cluster: joining: %w", err)
	}
	switch {
	case n.now().After(t.Expires):
		return fmt.Errorf("cluster: joining: %w at %s; make a new one: mortise kms member add %s", pki.ErrTokenExpired, t.Expires.Format(time.RFC3339), t.ID.Name)
	case n.Name != "" && n.Name != t.ID.Name:
		return fmt.Errorf("cluster: joining: the token is for %s, and this member is called %s: %w", t.ID.Name, n.Name, ErrInvalid)
	case n.address == "":
		return fmt.Errorf("cluster: joining: %w; say it: --peer-address HOST:%d", ErrNoAddress, Port)
	}
	n.Name = t.ID.Name
	key, err := pki.LoadOrMakeKey(n.path("joining.key"))
	if err != nil {
		return fmt.Errorf("cluster: joining: %w", err)
	}
	csr, err := request(key)
	if err != nil {
		return err
	}
	body, err := json.Marshal(joinRequest{t.Secret(), t.ID.Name, n.address, csr.Raw, n.Format, n.Version})
	if err != nil {
		return err
	}
	var failures []error
	for _, address := range t.Addresses {
		ca, answer, err := n.askToJoin(ctx, t, address, body)
		if err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", address, err))
			if errors.Is(err, ErrJoin) {
				break // the others would say the same
			}
			continue
		}
		cert, err := x509.ParseCertificate(answer.Certificate)
		if err != nil {
			return fmt.Errorf("cluster: joining: the certificate from %s: %w", address, err)
		}
		chain := []*x509.Certificate{cert, ca}
		n.ca, n.names, n.joined = ca, answer.Members, answer.URLs
		if n.creds, err = pki.NewCredentials(chain, key); err != nil {
			return fmt.Errorf("cluster: joining: the certificate from %s: %w", address, err)
		}
		if err := errors.Join(pki.SaveCertificates(n.path("ca.pem"), ca), pki.SaveKeyPair(n.path("peer.pem"), chain, key)); err != nil {
			return fmt.Errorf("cluster: joining: %w", err)
		}
		n.log.Info("this member was let in and catches up", "member", n.Name, "by", address)
		return n.save()
	}
	return fmt.Errorf("cluster: joining: %w", errors.Join(failures...))
}

func (n *Node) askToJoin(ctx context.Context, t Token, address string, body []byte) (*x509.Certificate, *joinAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	config := pki.JoinClient(t.CA, identity(""), n.now)
	config.NextProtos = []string{protoJoin}
	var ca *x509.Certificate
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialTLSContext: func(ctx context.Context, _, at string) (net.Conn, error) {
			c, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", at)
			if err != nil {
				return nil, err
			}
			ca, err = pki.FindCA(c.(*tls.Conn).ConnectionState().PeerCertificates, t.CA)
			return c, err
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+"/v1/join", bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return nil, nil, err
	}
	if err := refusal(resp.StatusCode, text); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrJoin, err)
	}
	a := &joinAnswer{}
	if err := json.Unmarshal(text, a); err != nil {
		return nil, nil, fmt.Errorf("reading the answer: %w", err)
	}
	return ca, a, nil
}
