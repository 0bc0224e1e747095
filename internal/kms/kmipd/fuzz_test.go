package kmipd

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"
	"github.com/ovh/kmip-go/ttlv"

	"mortise/internal/kms"
	"mortise/internal/pki"
)

// oasisRequests are the requests of the OASIS test cases that come with the
// codec, one of each shape.
func oasisRequests(t testing.TB) (list [][]byte) {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/ovh/kmip-go").Output()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), "kmiptest/testdata/v*/*.xml"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text = variable.ReplaceAllFunc(text, func(v []byte) []byte {
			if bytes.HasPrefix(v, []byte(`"$NOW`)) {
				return []byte(`"2026-01-01T00:00:00Z"`)
			}
			return []byte(`"DEADBEEFCAFE"`)
		})
		for d := xml.NewDecoder(bytes.NewReader(text)); ; {
			token, err := d.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			if s, ok := token.(xml.StartElement); !ok || s.Name.Local != "KMIP" {
				continue
			}
			// Messages come in pairs; some the codec does not know, and the rest
			// of that file goes with them.
			x, err := ttlv.NewXMLFromDecoder(d)
			for err == nil && x.Tag() == kmip.TagRequestMessage {
				var request kmip.RequestMessage
				var response kmip.ResponseMessage
				if err = x.TagAny(kmip.TagRequestMessage, &request); err == nil {
					wire := ttlv.MarshalTTLV(&request)
					if shape := shapeOf(wire[headerLen:], ""); !seen[shape] {
						seen[shape] = true
						list = append(list, wire)
					}
					err = x.TagAny(kmip.TagResponseMessage, &response)
				}
			}
			break
		}
	}
	if len(list) < 200 {
		t.Fatalf("the OASIS test cases have only %d kinds of requests", len(list))
	}
	return list
}

var variable = regexp.MustCompile(`"\$[^"]*"`)

// shapeOf is a message without its values, but for enumerations.
func shapeOf(b []byte, shape string) string {
	for _, it := range items(b) {
		switch it.typ {
		case ttlv.TypeStructure:
			shape = shapeOf(it.value, fmt.Sprintf("%s%x{", shape, it.tag)) + "}"
		case ttlv.TypeEnumeration:
			shape = fmt.Sprintf("%s%x=%x ", shape, it.tag, it.value)
		default:
			shape = fmt.Sprintf("%s%x ", shape, it.tag)
		}
	}
	return shape
}

// FuzzAnswer is the whole path from the bytes of a request to those of its
// response. Whatever comes in, a well-formed response goes out.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte{})
	for _, wire := range badMessages() {
		f.Add(wire)
	}
	for minor := int32(0); minor <= 4; minor += 2 {
		for _, p := range []kmip.OperationPayload{
			createAES(named("n"), custom("x-a", "b")), &payloads.DiscoverVersionsRequestPayload{}, &payloads.GetRequestPayload{UniqueIdentifier: "a"},
			&payloads.GetAttributesRequestPayload{AttributeName: []kmip.AttributeName{"State"}}, &payloads.LocateRequestPayload{Attribute: []kmip.Attribute{named("n")}},
			&payloads.RevokeRequestPayload{UniqueIdentifier: "a", RevocationReason: kmip.RevocationReason{RevocationReasonCode: 1}},
			&payloads.QueryRequestPayload{QueryFunction: []kmip.QueryFunction{1, 2, 3, 11}}, &payloads.AddAttributeRequestPayload{UniqueIdentifier: "a", Attribute: custom("x-a", "b")},
		} {
			m := request(minor, p)
			f.Add(ttlv.MarshalTTLV(&m))
		}
	}
	value := bytes.Repeat([]byte{7}, 32)
	m := request(1, registration(kmip.KeyBlock{KeyFormatType: kmip.KeyFormatTypeRaw, KeyValue: &kmip.KeyValue{Plain: &kmip.PlainKeyValue{KeyMaterial: kmip.KeyMaterial{Bytes: &value}}}}))
	f.Add(ttlv.MarshalTTLV(&m))
	m = request(4, createAES(), &payloads.ActivateRequestPayload{}, &payloads.GetRequestPayload{}, &payloads.DestroyRequestPayload{})
	f.Add(ttlv.MarshalTTLV(&m))

	for _, wire := range oasisRequests(f) {
		f.Add(wire)
	}

	k := openKMS(f)
	pin := newClient(f, time.Now(), time.Hour)
	if _, err := k.AddClient(f.Context(), kms.Actor{}, kms.DefaultInstance, kms.NewClient{Name: "fuzz", Certificate: pin.Leaf, Role: kms.RoleAdministrator}); err != nil {
		f.Fatal(err)
	}
	key, err := pki.GenerateKey()
	if err != nil {
		f.Fatal(err)
	}
	cert, err := pki.SelfSigned(key, pki.Grant{Server: true, Life: time.Hour}, "kms", time.Now())
	if err != nil {
		f.Fatal(err)
	}
	credentials, err := pki.NewCredentials([]*x509.Certificate{cert}, key)
	if err != nil {
		f.Fatal(err)
	}
	log := &syncBuffer{}
	s, err := newServer(k, Options{Credentials: credentials, Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelError}))})
	if err != nil {
		f.Fatal(err)
	}
	open := func(ctx context.Context) (*kms.Session, error) {
		return k.Session(ctx, kms.DefaultInstance, pin.Leaf, "")
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		response, _ := s.answer(t.Context(), "fuzz", open, bytes.Clone(msg))
		defer s.release(response)
		if err := check(response.Bytes(), 0); err != nil {
			t.Fatalf("the response is no TTLV: %v", err)
		}
		var m kmip.ResponseMessage
		if err := ttlv.UnmarshalTTLV(response.Bytes(), &m); err != nil || len(m.BatchItem) == 0 {
			t.Fatalf("the response does not decode: %v", err)
		}
		for _, it := range m.BatchItem {
			if it.ResultReason == kmip.ResultReasonGeneralFailure {
				t.Fatalf("internal error: %s", log)
			}
		}
	})
}
