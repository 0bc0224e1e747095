package vimapi

import (
	"bytes"
	stdxml "encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
)

const openEnvelope = `<?xml version="1.0"?><e:Envelope xmlns:e="http://schemas.xmlsoap.org/soap/envelope/" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><e:Body>`

const closeEnvelope = `</e:Body></e:Envelope>`

func envelope(inner string) string { return openEnvelope + inner + closeEnvelope }

// post sends a body as it is, in a session when token is not empty.
func (w *world) post(t testing.TB, token, body string) (status int, answer string) {
	t.Helper()
	req := httptest.NewRequest(http.MethodPost, "/sdk", strings.NewReader(body))
	if token != "" {
		req.AddCookie(&http.Cookie{Name: cookieName, Value: token})
	}
	rec := httptest.NewRecorder()
	w.server.ServeHTTP(rec, req)
	return rec.Code, rec.Body.String()
}

// token logs the administrator in.
func (w *world) token(t testing.TB) string {
	t.Helper()
	s, err := w.Authority.Login(t.Context(), authz.Administrator, w.password, "test", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return s.Token
}

// What no client sends is answered with a fault that says what is wrong, before
// and after log-in, and the server goes on.
func TestHostileRequests(t *testing.T) {
	w := newWorld(t)
	w.fill(t, 1)
	retrieve := func(inner string) string {
		return envelope(`<RetrieveProperties xmlns="urn:vim25"><_this type="PropertyCollector">propertyCollector</_this>` + inner + `</RetrieveProperties>`)
	}
	cases := []struct{ name, body, want string }{
		{"empty", "", "no XML element"},
		{"garbage", "\x00\x01\x02 GET / HTTP/1.1", "not well-formed"},
		{"not UTF-8", "<a>\xff\xfe</a>", "UTF-8"},
		{"cut short", openEnvelope + "<Login", "not well-formed"},
		{"no envelope", "<Login xmlns='urn:vim25'/>", "SOAP Envelope was expected"},
		{"no body", `<e:Envelope xmlns:e="http://schemas.xmlsoap.org/soap/envelope/"/>`, "no SOAP envelope with a method"},
		{"empty body", envelope(""), "no SOAP envelope with a method"},
		{"entity bomb", `<!DOCTYPE lolz [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>` + envelope("<x>&b;</x>"), "document type"},
		{"external entity", `<!DOCTYPE x SYSTEM "file:///etc/passwd">` + envelope("<x/>"), "document type"},
		{"unknown entity", envelope("<x>&boom;</x>"), "not well-formed"},
		{"processing instruction", `<?php evil ?>` + envelope("<x/>"), "processing instruction"},
		{"depth bomb", envelope(strings.Repeat("<a>", 5000) + strings.Repeat("</a>", 5000)), "deeper than"},
		{"attributes", envelope("<a " + manyAttributes(200) + "/>"), "attributes"},
		{"unknown method", envelope(`<EvilMethod xmlns="urn:vim25"><_this type="Folder">group-d1</_this></EvilMethod>`), "not part of this server"},
		{"wrong namespace", envelope(`<Login xmlns="urn:evil"><_this type="SessionManager">SessionManager</_this></Login>`), "not part of this server"},
		{"method of another object", envelope(`<Login xmlns="urn:vim25"><_this type="Folder">group-d1</_this></Login>`), "has no method"},
		{"a type that does not fit", retrieve(`<specSet><objectSet><obj type="Folder">group-d1</obj><selectSet xsi:type="VirtualDisk"><key>1</key></selectSet></objectSet></specSet>`), ""},
		{"a scalar that does not fit", retrieve(`<specSet><objectSet><obj type="Folder">group-d1</obj><selectSet xsi:type="xsd:int">1</selectSet></objectSet></specSet>`), ""},
		{"no number", envelope(`<WaitForUpdatesEx xmlns="urn:vim25"><_this type="PropertyCollector">propertyCollector</_this><options><maxWaitSeconds>many</maxWaitSeconds></options></WaitForUpdatesEx>`), ""},
	}
	token := w.token(t)
	for _, c := range cases {
		for _, token := range []string{"", "no such token", token} {
			status, answer := w.post(t, token, c.body)
			if status != http.StatusInternalServerError || !strings.Contains(answer, "<faultstring>") || !strings.Contains(answer, c.want) {
				t.Errorf("%s: %d, no fault saying %q: %.500s", c.name, status, c.want, answer)
			}
			checkAnswer(t, c.name, answer)
		}
	}
	if status, answer := w.post(t, "", envelope(`<RetrieveServiceContent xmlns="urn:vim25"><_this type="ServiceInstance">ServiceInstance</_this></RetrieveServiceContent>`)); status != http.StatusOK {
		t.Errorf("after all that: %d %s", status, answer)
	}
}

func manyAttributes(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `a%d="x" `, i)
	}
	return b.String()
}

func checkAnswer(t testing.TB, name, answer string) {
	t.Helper()
	d := stdxml.NewDecoder(strings.NewReader(answer))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Errorf("%s: the answer is not XML: %v: %.300s", name, err, answer)
			return
		}
	}
}

// Before log-in a request may have 64 KiB, after it more, unless its method
// needs little.
func TestBodyLimits(t *testing.T) {
	w := newWorld(t)
	big := func(method, object string, n int) string {
		return envelope(fmt.Sprintf(`<%s xmlns="urn:vim25"><_this type="%s">%[2]s</_this><x>%s</x></%[1]s>`, method, object, strings.Repeat("x", n)))
	}
	token := w.token(t)
	for _, c := range []struct {
		name, token, body string
		want              string
	}{
		{"large log-in", "", big("Login", "SessionManager", 70<<10), "larger than 65536 bytes"},
		{"large call without a session", "", big("RetrieveProperties", "PropertyCollector", 70<<10), "larger than 65536 bytes"},
		{"large for its method", token, big("SetLocale", "SessionManager", 70<<10), "larger than the 65536 bytes that SetLocale takes"},
		{"too large for all", token, big("RetrieveProperties", "PropertyCollector", 5<<20), "larger than 4194304 bytes"},
	} {
		if _, answer := w.post(t, c.token, c.body); !strings.Contains(answer, c.want) {
			t.Errorf("%s is not refused with %q: %.300s", c.name, c.want, answer)
		}
	}
}

// Everything but what the table says needs a session.
func TestEveryMethodNeedsASession(t *testing.T) {
	w := newWorld(t)
	public := 0
	for key, m := range w.server.methods {
		if m.anonymous {
			public++
			continue
		}
		object := m.object
		if object == "" {
			object = "View"
		}
		for _, token := range []string{"", "guess"} {
			_, answer := w.post(t, token, envelope(fmt.Sprintf(`<%s xmlns="urn:%s"><_this type="%s">x</_this></%[1]s>`, m.name, m.namespace, object)))
			if !strings.Contains(answer, "NotAuthenticatedFault") {
				t.Errorf("%s without a session: %.300s", key, answer)
			}
		}
	}
	if public != 5 {
		t.Errorf("%d methods can be called without a session; a sixth needs a reason, and this test to know", public)
	}
	// What can be called shows nothing of the inventory.
	for _, body := range []string{
		`<Fetch xmlns="urn:vim25"><_this type="Folder">group-d1</_this><prop>name</prop></Fetch>`,
		`<Fetch xmlns="urn:vim25"><_this type="Folder">group-d999</_this><prop>name</prop></Fetch>`,
		`<RetrieveProperties xmlns="urn:vim25"><_this type="PropertyCollector">propertyCollector</_this><specSet><propSet><type>Folder</type><all>true</all></propSet><objectSet><obj type="Folder">group-d1</obj></objectSet></specSet></RetrieveProperties>`,
	} {
		if _, answer := w.post(t, "", envelope(body)); !strings.Contains(answer, "NotAuthenticatedFault") || strings.Contains(answer, "Datacenters") {
			t.Errorf("without a session: %s", answer)
		}
	}
}

func TestLogin(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	c := w.raw()
	login := types.Login{This: singleton("SessionManager", "SessionManager"), UserName: authz.Administrator, Password: "wrong"}
	_, err := methods.Login(ctx, c, &login)
	if !soap.IsSoapFault(err) {
		t.Fatalf("a wrong password: %v", err)
	}
	if _, ok := soap.ToSoapFault(err).VimFault().(types.InvalidLogin); !ok {
		t.Fatalf("a wrong password gives %T", soap.ToSoapFault(err).VimFault())
	}
	login.Password = w.password
	_, answer := w.post(t, "", envelope(`<Login xmlns="urn:vim25"><_this type="SessionManager">SessionManager</_this><userName>`+authz.Administrator+`</userName><password>`+w.password+`</password></Login>`))
	if !strings.Contains(answer, "LoginResponse") || strings.Contains(answer, w.password) {
		t.Fatalf("log-in answers %s", answer)
	}
	res, err := methods.Login(ctx, c, &login)
	if err != nil {
		t.Fatal(err)
	}
	if res.Returnval.UserName != authz.Administrator || res.Returnval.Key == "" {
		t.Errorf("the session is %+v", res.Returnval)
	}
	if _, err := methods.GetCurrentTime(ctx, c); err != nil {
		t.Errorf("in the session: %v", err)
	}
	u := c.URL()
	for _, k := range c.Jar.Cookies(u) {
		if k.Value == res.Returnval.Key {
			t.Error("the session's key is its token")
		}
	}
	if _, err := methods.Logout(ctx, c, &types.Logout{This: login.This}); err != nil {
		t.Fatal(err)
	}
	if _, err := methods.GetCurrentTime(ctx, c); err == nil {
		t.Error("the session is still good")
	}
}

func TestSessionCookie(t *testing.T) {
	w := newWorld(t)
	body := envelope(`<Login xmlns="urn:vim25"><_this type="SessionManager">SessionManager</_this><userName>` + authz.Administrator + `</userName><password>` + w.password + `</password></Login>`)
	rec := httptest.NewRecorder()
	w.server.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/sdk", strings.NewReader(body)))
	cookies := rec.Result().Cookies()
	if len(cookies) != 1 {
		t.Fatalf("%d cookies", len(cookies))
	}
	k := cookies[0]
	if k.Name != "vmware_soap_session" || !k.Secure || !k.HttpOnly || k.Path != "/" || k.SameSite != http.SameSiteStrictMode || len(k.Value) < 32 {
		t.Errorf("the cookie is %s", rec.Header().Get("Set-Cookie"))
	}
	// A second log-in on top of it ends the first session.
	req := httptest.NewRequest(http.MethodPost, "/sdk", strings.NewReader(body))
	req.AddCookie(k)
	w.server.ServeHTTP(httptest.NewRecorder(), req)
	if _, ok := w.Session(k.Value); ok {
		t.Error("the first session lives on")
	}
}

func TestServiceVersions(t *testing.T) {
	w := newWorld(t)
	rec := httptest.NewRecorder()
	w.server.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/sdk/vimServiceVersions.xml", nil))
	for _, v := range []string{"urn:vim25", "<version>8.0.3.0</version>", "<version>7.0</version>", "<version>6.7.1</version>"} {
		if !strings.Contains(rec.Body.String(), v) {
			t.Errorf("%s is missing in %s", v, rec.Body)
		}
	}
}

// FuzzSOAP sends anything as a logged-in administrator: every answer is XML, a
// result or a fault.
func FuzzSOAP(f *testing.F) {
	w := newWorld(f)
	w.fill(f, 2)
	token := w.token(f)
	for _, seed := range []string{
		`<RetrieveServiceContent xmlns="urn:vim25"><_this type="ServiceInstance">ServiceInstance</_this></RetrieveServiceContent>`,
		`<Fetch xmlns="urn:vim25"><_this type="VirtualMachine">vm-100</_this><prop>config.hardware.device[2000].backing</prop></Fetch>`,
		`<RetrieveProperties xmlns="urn:vim25"><_this type="PropertyCollector">propertyCollector</_this><specSet><propSet><type>VirtualMachine</type><all>true</all></propSet><objectSet><obj type="Folder">group-v3</obj><skip>true</skip><selectSet xsi:type="TraversalSpec"><name>a</name><type>Folder</type><path>childEntity</path><selectSet xsi:type="SelectionSpec"><name>a</name></selectSet></selectSet></objectSet></specSet></RetrieveProperties>`,
		`<CreateContainerView xmlns="urn:vim25"><_this type="ViewManager">ViewManager</_this><container type="Folder">group-d1</container><type>VirtualMachine</type><recursive>true</recursive></CreateContainerView>`,
		`<ReconfigVM_Task xmlns="urn:vim25"><_this type="VirtualMachine">vm-100</_this><spec><deviceChange xsi:type="VirtualDeviceConfigSpec"><operation>edit</operation><device xsi:type="VirtualDisk"><key>2000</key></device><backing><crypto xsi:type="CryptoSpecEncrypt"><cryptoKeyId><keyId></keyId></cryptoKeyId></crypto></backing></deviceChange></spec></ReconfigVM_Task>`,
		`<FindByInventoryPath xmlns="urn:vim25"><_this type="SearchIndex">SearchIndex</_this><inventoryPath>/Datacenter/vm/web0</inventoryPath></FindByInventoryPath>`,
		`<CheckForUpdates xmlns="urn:vim25"><_this type="PropertyCollector">propertyCollector</_this><version>1</version></CheckForUpdates>`,
		`<PbmRetrieveServiceContent xmlns="urn:pbm"><_this type="PbmServiceInstance">ServiceInstance</_this></PbmRetrieveServiceContent>`,
	} {
		f.Add(envelope(seed))
	}
	f.Fuzz(func(t *testing.T, body string) {
		if strings.Contains(body, "WaitFor") {
			return // may wait for ever, as it should
		}
		if !strings.Contains(body, "Logout") {
			status, answer := w.post(t, token, body)
			if status != http.StatusOK && status != http.StatusInternalServerError {
				t.Errorf("status %d", status)
			}
			checkAnswer(t, "fuzzed", answer)
		}
	})
}

func FuzzCheckXML(f *testing.F) {
	f.Add([]byte(envelope("<a/>")))
	f.Add([]byte(`<!DOCTYPE a><a/>`))
	f.Add(bytes.Repeat([]byte("<a>"), 100))
	f.Fuzz(func(t *testing.T, body []byte) {
		if checkXML(body) != nil {
			return
		}
		depth, most := 0, 0
		d := stdxml.NewDecoder(bytes.NewReader(body))
		for {
			tok, err := d.Token()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					t.Fatalf("what passed is not XML: %v", err)
				}
				break
			}
			switch tok.(type) {
			case stdxml.StartElement:
				depth++
				most = max(most, depth)
			case stdxml.EndElement:
				depth--
			case stdxml.Directive:
				t.Fatal("a document type passed")
			}
		}
		if most > maxDepth {
			t.Fatalf("depth %d passed", most)
		}
	})
}
