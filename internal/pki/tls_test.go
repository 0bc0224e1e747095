package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"testing"
	"time"
)

// handshake runs one over a loopback connection and sends a byte each way, so
// that a TLS 1.3 refusal by the server reaches the client too.
func handshake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(10 * time.Second))
		c := tls.Server(raw, server)
		err = c.Handshake()
		if err == nil {
			_, err = c.Write([]byte{1})
		}
		done <- err
	}()
	raw := must(net.Dial("tcp", l.Addr().String()))(t)
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(10 * time.Second))
	c := tls.Client(raw, client)
	clientErr = c.Handshake()
	if clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	}
	raw.Close()
	return <-done, clientErr
}

func admitAll(Identity, *x509.Certificate) error { return nil }

func TestMutual(t *testing.T) {
	ca, otherCA := authority(t), authority(t)
	at := func() time.Time { return now }
	center := Identity{RoleCenter, "center"}
	side := func(a *Authority, id Identity, server bool, trusts *Authority, clock func() time.Time) Mutual {
		return Mutual{issue(t, a, Grant{Identity: id, Server: server, Client: !server, Life: 30 * day}), []*x509.Certificate{trusts.Certificate()}, clock}
	}
	host := Identity{RoleHost, "h1"}
	good := func() Mutual { return side(ca, center, true, ca, at) }
	errRemoved := errors.New("host was removed")
	for _, c := range []struct {
		name           string
		server, client Mutual
		want           Identity
		admit          func(Identity, *x509.Certificate) error
		serverErr      error
		clientErr      error
	}{
		{"good", good(), side(ca, host, false, ca, at), center, func(id Identity, c *x509.Certificate) error {
			if id != host || c.Subject.CommonName != "h1" {
				t.Errorf("admit saw %v %v", id, c.Subject)
			}
			return nil
		}, nil, nil},
		{"removed host", good(), side(ca, host, false, ca, at), center, func(Identity, *x509.Certificate) error { return errRemoved }, errRemoved, nil},
		{"client of another CA", good(), side(otherCA, host, false, ca, at), center, admitAll, ErrUntrusted, nil},
		{"server of another CA", side(otherCA, center, true, ca, at), side(ca, host, false, ca, at), center, admitAll, nil, ErrUntrusted},
		{"server is another role", side(ca, Identity{RoleHost, "h2"}, true, ca, at), side(ca, host, false, ca, at), center, admitAll, nil, ErrOtherIdentity},
		{"server has another name", side(ca, Identity{RoleCenter, "other"}, true, ca, at), side(ca, host, false, ca, at), center, admitAll, nil, ErrOtherIdentity},
		{"a client's certificate on a server", side(ca, center, false, ca, at), side(ca, host, false, ca, at), center, admitAll, nil, ErrUntrusted},
		{"a server's certificate on a client", good(), side(ca, host, true, ca, at), center, admitAll, ErrUntrusted, nil},
		{"client expired", side(ca, center, true, ca, func() time.Time { return now.Add(31 * day) }), side(ca, host, false, ca, at), center, admitAll, ErrExpired, nil},
		{"server expired", good(), side(ca, host, false, ca, func() time.Time { return now.Add(31 * day) }), center, admitAll, nil, ErrExpired},
		{"no role in the client", good(), Mutual{issue(t, ca, Grant{Hosts: []string{"x"}, Client: true, Life: day}), []*x509.Certificate{ca.Certificate()}, at}, center, admitAll, ErrNoIdentity, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			sErr, cErr := handshake(t, c.server.Server(c.admit), c.client.Client(c.want))
			if c.serverErr == nil && c.clientErr == nil {
				if sErr != nil || cErr != nil {
					t.Errorf("server %v, client %v", sErr, cErr)
				}
				return
			}
			if sErr == nil || cErr == nil {
				t.Errorf("one side is content: server %v, client %v", sErr, cErr)
			}
			if c.serverErr != nil && !errors.Is(sErr, c.serverErr) {
				t.Errorf("server %v, want %v", sErr, c.serverErr)
			}
			if c.clientErr != nil && !errors.Is(cErr, c.clientErr) {
				t.Errorf("client %v, want %v", cErr, c.clientErr)
			}
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		sErr, cErr := handshake(t, good().Server(admitAll), &tls.Config{InsecureSkipVerify: true})
		if sErr == nil || cErr == nil {
			t.Errorf("server %v, client %v", sErr, cErr)
		}
	})
	t.Run("renewed while in use", func(t *testing.T) {
		server := good()
		cfg := server.Server(admitAll)
		before := server.Credentials.Leaf()
		key := must(GenerateKey())(t)
		fresh := must(ca.Issue(request(t, key), Grant{Identity: center, Server: true, Life: day}, now))(t)
		if err := server.Credentials.Replace([]*x509.Certificate{before}, key); err == nil {
			t.Error("took a key that is not the certificate's")
		}
		if err := server.Credentials.Replace([]*x509.Certificate{fresh}, key); err != nil {
			t.Fatal(err)
		}
		var seen *x509.Certificate
		client := side(ca, host, false, ca, at).Client(center)
		check := client.VerifyConnection
		client.VerifyConnection = func(s tls.ConnectionState) error { seen = s.PeerCertificates[0]; return check(s) }
		if sErr, cErr := handshake(t, cfg, client); sErr != nil || cErr != nil {
			t.Fatal(sErr, cErr)
		}
		if !seen.Equal(fresh) {
			t.Error("the old certificate was shown")
		}
	})
}

func TestDiskServer(t *testing.T) {
	ca, otherCA := authority(t), authority(t)
	at := func() time.Time { return now }
	server := issue(t, ca, Grant{Name: "disks", Hosts: []string{"localhost"}, Server: true, Life: 30 * day})
	host := Grant{Identity: Identity{RoleHost, "h1"}, Client: true, Life: day}
	backup := Grant{Name: "backup", Hosts: []string{"backup.example"}, Client: true, Life: day}
	for _, c := range []struct {
		name   string
		client *Credentials
		names  []string
		want   error
	}{
		{"anybody of the CA", issue(t, ca, backup), nil, nil},
		{"by common name", issue(t, ca, backup), []string{"other", "backup"}, nil},
		{"by DNS name", issue(t, ca, backup), []string{"backup.example"}, nil},
		{"by identity", issue(t, ca, host), []string{"mortise://host/h1"}, nil},
		{"not named", issue(t, ca, backup), []string{"other"}, ErrOtherIdentity},
		{"of another CA", issue(t, otherCA, backup), nil, ErrUntrusted},
		{"of another CA by name", issue(t, otherCA, backup), []string{"backup"}, ErrUntrusted},
		{"server certificate", server, nil, ErrUntrusted},
		{"expired", issue(t, ca, Grant{Name: "backup", Client: true, Life: time.Minute}), nil, ErrUntrusted},
	} {
		t.Run(c.name, func(t *testing.T) {
			clock := at
			if c.name == "expired" {
				clock = func() time.Time { return now.Add(day) }
			}
			serverErr, clientErr := handshake(t, DiskServer(server, []*x509.Certificate{ca.Certificate()}, c.names, clock),
				&tls.Config{InsecureSkipVerify: true, GetClientCertificate: c.client.forClient})
			if c.name == "expired" {
				if serverErr == nil || clientErr == nil {
					t.Error("an expired certificate was taken")
				}
				return
			}
			if !errors.Is(serverErr, c.want) || (clientErr == nil) != (c.want == nil) {
				t.Errorf("server: %v, client: %v; want %v", serverErr, clientErr, c.want)
			}
		})
	}
	serverErr, clientErr := handshake(t, DiskServer(server, []*x509.Certificate{ca.Certificate()}, nil, at),
		&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, GetClientCertificate: issue(t, ca, backup).forClient})
	if serverErr == nil || clientErr == nil {
		t.Error("TLS 1.2 was taken")
	}
}

func TestKMIPServer(t *testing.T) {
	key := must(GenerateKey())(t)
	cert := must(SelfSigned(key, Grant{Server: true, Life: day, Hosts: []string{"localhost"}}, "kms", now))(t)
	server := must(NewCredentials([]*x509.Certificate{cert}, key))(t)
	ck := must(GenerateKey())(t)
	noEKU := must(SelfSigned(ck, Grant{Life: day}, KMIPClientName(now), now))(t)
	client := must(NewCredentials([]*x509.Certificate{noEKU}, ck))(t)
	errUnknown := errors.New("unknown certificate")
	admit := func(c *x509.Certificate) error {
		if c.Equal(noEKU) {
			return nil
		}
		return errUnknown
	}
	dial := func(c *Credentials, max uint16) *tls.Config {
		cfg := &tls.Config{InsecureSkipVerify: true, MaxVersion: max}
		if c != nil {
			cfg.GetClientCertificate = c.forClient
		}
		return cfg
	}
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cfg := KMIPServer(server, func() time.Time { return now }, admit)
		if s, c := handshake(t, cfg, dial(client, v)); s != nil || c != nil {
			t.Errorf("%x: self-signed without EKU: %v, %v", v, s, c)
		}
		if s, c := handshake(t, cfg, dial(server, v)); !errors.Is(s, errUnknown) || c == nil {
			t.Errorf("%x: unknown certificate: %v, %v", v, s, c)
		}
		if s, c := handshake(t, cfg, dial(nil, v)); s == nil || c == nil {
			t.Errorf("%x: no certificate: %v, %v", v, s, c)
		}
		late := KMIPServer(server, func() time.Time { return now.Add(2 * day) }, admit)
		if s, c := handshake(t, late, dial(client, v)); !errors.Is(s, ErrExpired) || c == nil {
			t.Errorf("%x: expired: %v, %v", v, s, c)
		}
	}
	if s, c := handshake(t, KMIPServer(server, nil, admit), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}); s == nil || c == nil {
		t.Errorf("TLS 1.1: %v, %v", s, c)
	}
}

func TestHTTPSServer(t *testing.T) {
	ca := authority(t)
	c := issue(t, ca, Grant{Hosts: []string{"center.example"}, Server: true, Life: day})
	roots := x509.NewCertPool()
	roots.AddCert(ca.Certificate())
	at := func() time.Time { return now }
	if s, cl := handshake(t, HTTPSServer(c), &tls.Config{RootCAs: roots, ServerName: "center.example", Time: at}); s != nil || cl != nil {
		t.Error(s, cl)
	}
	if _, cl := handshake(t, HTTPSServer(c), &tls.Config{RootCAs: roots, ServerName: "evil.example", Time: at}); cl == nil {
		t.Error("another host name was accepted")
	}
}

func TestJoinClient(t *testing.T) {
	ca, otherCA := authority(t), authority(t)
	center := Identity{RoleCenter, "center"}
	at := func() time.Time { return now }
	grant := Grant{Identity: center, Server: true, Life: day}
	token := must(NewJoinToken(Identity{RoleHost, "h1"}, ca.Certificate(), time.Hour, now))(t)
	cfg := JoinClient(token.CA, center, at)
	if s, c := handshake(t, HTTPSServer(issue(t, ca, grant)), cfg); s != nil || c != nil {
		t.Error(s, c)
	}
	if _, c := handshake(t, HTTPSServer(issue(t, otherCA, grant)), cfg); !errors.Is(c, ErrUntrusted) {
		t.Errorf("another center: %v", c)
	}
	host := Grant{Identity: Identity{RoleHost, "h9"}, Server: true, Life: day}
	if _, c := handshake(t, HTTPSServer(issue(t, ca, host)), cfg); !errors.Is(c, ErrOtherIdentity) {
		t.Errorf("a host that plays center: %v", c)
	}
	// The right CA's certificate, shown by somebody whom it never certified.
	key := must(GenerateKey())(t)
	leaf := must(otherCA.Issue(request(t, key), grant, now))(t)
	liar := must(NewCredentials([]*x509.Certificate{leaf, ca.Certificate()}, key))(t)
	if _, c := handshake(t, HTTPSServer(liar), cfg); !errors.Is(c, ErrUntrusted) {
		t.Errorf("a borrowed CA certificate: %v", c)
	}
}
