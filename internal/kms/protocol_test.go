package kms

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ovh/kmip-go"

	"mortise/internal/secret"
)

// raw registers an AES key of known bytes that is Active.
func raw(t testing.TB, s *Session, key []byte, usage kmip.CryptographicUsageMask, more ...kmip.Attribute) string {
	t.Helper()
	b, err := secret.Copy(key)
	if err != nil {
		t.Fatal(err)
	}
	id, err := s.Register(t.Context(), Material{Type: kmip.ObjectTypeSymmetricKey, Format: kmip.KeyFormatTypeRaw, Algorithm: kmip.CryptographicAlgorithmAES, Bytes: b},
		append([]kmip.Attribute{attr(kmip.AttributeNameCryptographicUsageMask, usage), attr(kmip.AttributeNameActivationDate, s.now().Add(-time.Hour))}, more...))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func values(t testing.TB, s *Session, id string, name kmip.AttributeName) (list []any) {
	t.Helper()
	all, err := s.Attributes(t.Context(), id, name)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		list = append(list, a.AttributeValue)
	}
	return list
}

func clearOf(t testing.TB, m Material) []byte {
	t.Helper()
	defer m.Bytes.Wipe()
	var b []byte
	m.Bytes.Use(func(k []byte) { b = bytes.Clone(k) })
	return b
}

func TestReKey(t *testing.T) {
	f := start(t, t.TempDir())
	s, ctx := f.session(), t.Context()
	now := s.now()
	old := create(t, s, named("a"), named("b"), attr(kmip.AttributeNameActivationDate, now.Add(-time.Hour)),
		attr(kmip.AttributeNameDeactivationDate, now.Add(2*time.Hour)), attr(kmip.AttributeNameContactInformation, "ops"),
		attr(kmip.AttributeNameUsageLimits, kmip.UsageLimits{UsageLimitsTotal: 9, UsageLimitsUnit: kmip.UsageLimitsUnitObject}))
	if err := s.GetUsageAllocation(ctx, old, 4); err != nil {
		t.Fatal(err)
	}
	before := keyBytes(t, s, old)
	offset := 30 * time.Minute
	id, err := s.ReKey(ctx, old, &offset, []kmip.Attribute{named("c")})
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(keyBytes(t, s, id), before) {
		t.Error("the new key has the old bytes")
	}
	if n := values(t, s, id, kmip.AttributeNameName); len(n) != 3 {
		t.Errorf("the new key has names %v", n)
	}
	if n := values(t, s, old, kmip.AttributeNameName); len(n) != 0 {
		t.Errorf("the old key kept names %v", n)
	}
	for _, n := range []string{"a", "b", "c"} {
		if ids, _, err := s.Locate(ctx, Query{Attributes: []kmip.Attribute{named(n)}}); err != nil || !slices.Equal(ids, []string{id}) {
			t.Errorf("name %s finds %v, %v", n, ids, err)
		}
	}
	if got := values(t, s, id, kmip.AttributeNameLink); len(got) != 1 || got[0] != (kmip.Link{LinkType: kmip.LinkTypeReplacedObjectLink, LinkedObjectIdentifier: old}) {
		t.Errorf("the new key's links: %v", got)
	}
	if got := values(t, s, old, kmip.AttributeNameLink); len(got) != 1 || got[0] != (kmip.Link{LinkType: kmip.LinkTypeReplacementObjectLink, LinkedObjectIdentifier: id}) {
		t.Errorf("the old key's links: %v", got)
	}
	for name, want := range map[kmip.AttributeName]time.Time{
		kmip.AttributeNameActivationDate: now.Add(offset), kmip.AttributeNameDeactivationDate: now.Add(offset + 3*time.Hour),
	} {
		if got := values(t, s, id, name); len(got) != 1 || !got[0].(time.Time).Equal(want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if got := values(t, s, id, kmip.AttributeNameUsageLimits); *got[0].(kmip.UsageLimits).UsageLimitsCount != 9 {
		t.Errorf("usage limits: %v", got)
	}
	if got := values(t, s, id, kmip.AttributeNameContactInformation); len(got) != 1 || got[0] != "ops" {
		t.Errorf("contact information: %v", got)
	}
	if st := state(t, s, id); st != kmip.StatePreActive {
		t.Errorf("state %v before its activation", st)
	}
	if _, err := s.ReKey(ctx, id, &offset, []kmip.Attribute{attr(kmip.AttributeNameActivationDate, now)}); reason(err) != kmip.ResultReasonInvalidMessage {
		t.Errorf("offset and date: %v", err)
	}
	taken := create(t, s, named("taken"))
	if _, err := s.ReKey(ctx, id, nil, []kmip.Attribute{named("taken")}); err == nil {
		t.Error("a taken name was given to a new key")
	}
	if err := s.Destroy(ctx, taken); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ReKey(ctx, taken, nil, nil); reason(err) != kmip.ResultReasonItemNotFound {
		t.Errorf("a destroyed key: %v", err)
	}
}

func TestDeriveKey(t *testing.T) {
	f := start(t, t.TempDir())
	s, ctx := f.session(), t.Context()
	base := raw(t, s, []byte("0123456789abcdef"), kmip.CryptographicUsageDeriveKey)
	d := Derivation{Parameters: kmip.CryptographicParameters{HashingAlgorithm: kmip.HashingAlgorithmSHA_256}, Data: []byte("label\x00context")}
	id, err := s.DeriveKey(ctx, kmip.ObjectTypeSymmetricKey, []string{base}, DeriveNISTCounter, d, aes256(named("derived")))
	if err != nil {
		t.Fatal(err)
	}
	want, err := derive(DeriveNISTCounter, []byte("0123456789abcdef"), kmip.CryptographicAlgorithmAES, d, 32)
	if err != nil || !bytes.Equal(keyBytes(t, s, id), want) {
		t.Errorf("the derived key is not what the method gives: %v", err)
	}
	if got := values(t, s, id, kmip.AttributeNameLink); len(got) != 1 || got[0] != (kmip.Link{LinkType: kmip.LinkTypeDerivationBaseObjectLink, LinkedObjectIdentifier: base}) {
		t.Errorf("links of the derived key: %v", got)
	}
	if got := values(t, s, base, kmip.AttributeNameLink); len(got) != 1 || got[0] != (kmip.Link{LinkType: kmip.LinkTypeDerivedKeyLink, LinkedObjectIdentifier: id}) {
		t.Errorf("links of the base: %v", got)
	}
	if _, err := s.DeriveKey(ctx, kmip.ObjectTypeSymmetricKey, []string{id}, DeriveNISTCounter, d, aes256()); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("of a key without the usage: %v", err)
	}
	if _, err := s.DeriveKey(ctx, kmip.ObjectTypeSymmetricKey, []string{base}, DeriveHash, d, nil); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("without a length: %v", err)
	}
	if _, err := s.DeriveKey(ctx, kmip.ObjectTypeSymmetricKey, []string{base, base}, DeriveHash, d, aes256()); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("of one object twice: %v", err)
	}
	if err := s.Revoke(ctx, base, kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeUnspecified}, time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.DeriveKey(ctx, kmip.ObjectTypeSymmetricKey, []string{base}, DeriveNISTCounter, d, aes256()); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("of a deactivated key: %v", err)
	}
}

// TestWrappedKeys wraps in every mode and encoding, brings the wrapped key back,
// and opens it there.
func TestWrappedKeys(t *testing.T) {
	f := start(t, t.TempDir())
	s, ctx := f.session(), t.Context()
	kek := raw(t, s, unhex(t, "000102030405060708090a0b0c0d0e0f"), kmip.CryptographicUsageWrapKey|kmip.CryptographicUsageUnwrapKey)
	plain := unhex(t, "00112233445566778899aabbccddeeff")
	id := raw(t, s, plain, kmip.CryptographicUsageEncrypt, named("n"))
	spec := func(mode kmip.BlockCipherMode, encoding kmip.EncodingOption, names ...kmip.AttributeName) *kmip.KeyWrappingSpecification {
		return &kmip.KeyWrappingSpecification{WrappingMethod: kmip.WrappingMethodEncrypt, AttributeName: names, EncodingOption: encoding,
			EncryptionKeyInformation: &kmip.EncryptionKeyInformation{UniqueIdentifier: kek, CryptographicParameters: &kmip.CryptographicParameters{BlockCipherMode: mode}}}
	}
	for _, mode := range []kmip.BlockCipherMode{kmip.BlockCipherModeNISTKeyWrap, kmip.BlockCipherModeAESKeyWrapPadding, kmip.BlockCipherModeGCM} {
		for _, encoding := range []kmip.EncodingOption{kmip.EncodingOptionNoEncoding, kmip.EncodingOptionTTLVEncoding, 0} {
			w := spec(mode, encoding)
			if encoding != kmip.EncodingOptionNoEncoding {
				w.AttributeName = []kmip.AttributeName{kmip.AttributeNameName, kmip.AttributeNameCryptographicUsageMask}
			}
			m, err := s.GetAs(ctx, id, Form{Wrap: w})
			if err != nil {
				t.Fatalf("mode %d, encoding %d: %v", mode, encoding, err)
			}
			if mode == kmip.BlockCipherModeNISTKeyWrap && encoding == kmip.EncodingOptionNoEncoding {
				m.Bytes.Use(func(b []byte) { // RFC 3394 §4.1
					if !bytes.Equal(b, unhex(t, "1fa68b0a8112b447aef34bd8fb5a7b829d3e862371d2cfe5")) {
						t.Errorf("wrapped: %x", b)
					}
				})
			}
			wrapped := clearOf(t, m)
			if bytes.Contains(wrapped, plain[:8]) {
				t.Errorf("mode %d: key bytes in clear", mode)
			}
			m.Bytes, _ = secret.Copy(wrapped)
			back, err := s.Register(ctx, m, []kmip.Attribute{attr(kmip.AttributeNameCryptographicUsageMask, kmip.CryptographicUsageEncrypt),
				attr(kmip.AttributeNameActivationDate, s.now())})
			if err != nil {
				t.Fatal(err)
			}
			as, err := s.GetAs(ctx, back, Form{Type: kmip.AsRegistered})
			if err != nil || !bytes.Equal(clearOf(t, as), wrapped) || as.Wrapping == nil {
				t.Errorf("mode %d, encoding %d: as registered: %v", mode, encoding, err)
			}
			open, err := s.GetAs(ctx, back, Form{Type: kmip.NotWrapped})
			if err != nil || !bytes.Equal(clearOf(t, open), plain) || open.Wrapping != nil {
				t.Errorf("mode %d, encoding %d: not wrapped: %v", mode, encoding, err)
			}
			r := CipherRequest{Parameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeECB}, Data: make([]byte, 16)}
			a, err := s.Encrypt(ctx, back, r)
			b, err2 := s.Encrypt(ctx, id, r)
			if err != nil || err2 != nil || !bytes.Equal(a.Data, b.Data) {
				t.Errorf("mode %d: a wrapped key encrypts otherwise: %v, %v", mode, err, err2)
			}
		}
	}
	noUse := raw(t, s, plain, kmip.CryptographicUsageEncrypt)
	w := spec(kmip.BlockCipherModeNISTKeyWrap, 0)
	w.EncryptionKeyInformation.UniqueIdentifier = noUse
	for want, form := range map[kmip.ResultReason]Form{
		kmip.ResultReasonPermissionDenied:          {Wrap: w},
		kmip.ResultReasonEncodingOptionError:       {Wrap: spec(0, kmip.EncodingOptionNoEncoding, kmip.AttributeNameName)},
		kmip.ResultReasonFeatureNotSupported:       {Wrap: spec(kmip.BlockCipherModeCBC, 0)},
		kmip.ResultReasonKeyFormatTypeNotSupported: {Format: kmip.KeyFormatTypePKCS_8},
	} {
		if _, err := s.GetAs(ctx, id, form); reason(err) != want {
			t.Errorf("%+v: %v, want reason %d", form, err, want)
		}
	}
	if _, err := s.GetAs(ctx, kek, Form{Wrap: spec(0, 0)}); reason(err) != kmip.ResultReasonIllegalOperation {
		t.Errorf("a key that wraps itself: %v", err)
	}
	if err := s.Revoke(ctx, kek, kmip.RevocationReason{RevocationReasonCode: kmip.RevocationReasonCodeUnspecified}, time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetAs(ctx, id, Form{Wrap: spec(0, 0)}); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("by a deactivated key: %v", err)
	}
}

func FuzzUnwrappedMaterial(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("\x42\x00\x45\x01\x00\x00\x00\x10\x42\x00\x43\x08\x00\x00\x00\x01a\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x42\x00\x45\x01\xff\xff\xff\xff\x42\x00\x43\x08\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := unwrappedMaterial(b); err == nil && (len(m) == 0 || len(m)+16 > len(b)) {
			t.Errorf("%d bytes of material in %d bytes", len(m), len(b))
		}
	})
}

// TestGuardedKeys: Sensitive and Extractable, KMIP 1.4 §3.48 to §3.51.
func TestGuardedKeys(t *testing.T) {
	f := start(t, t.TempDir())
	s, ctx := f.session(), t.Context()
	kek := raw(t, s, make([]byte, 32), kmip.CryptographicUsageWrapKey)
	wrap := &kmip.KeyWrappingSpecification{WrappingMethod: kmip.WrappingMethodEncrypt, EncryptionKeyInformation: &kmip.EncryptionKeyInformation{UniqueIdentifier: kek}}
	id := create(t, s, attr(kmip.AttributeNameSensitive, true))
	if _, err := s.Get(ctx, id); reason(err) != kmip.ResultReasonSensitive {
		t.Errorf("sensitive, in clear: %v", err)
	}
	m, err := s.GetAs(ctx, id, Form{Wrap: wrap})
	if err != nil {
		t.Errorf("sensitive, wrapped: %v", err)
	}
	m.Bytes.Wipe()
	if v := values(t, s, id, kmip.AttributeNameAlwaysSensitive); v[0] != true {
		t.Errorf("always sensitive: %v", v)
	}
	if _, err := s.ModifyAttribute(ctx, id, attr(kmip.AttributeNameSensitive, false)); err != nil {
		t.Fatal(err)
	}
	if v := values(t, s, id, kmip.AttributeNameAlwaysSensitive); v[0] != false {
		t.Errorf("always sensitive after it was not: %v", v)
	}
	keyBytes(t, s, id)
	if _, err := s.ModifyAttribute(ctx, id, attr(kmip.AttributeNameExtractable, false)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetAs(ctx, id, Form{Wrap: wrap}); reason(err) != kmip.ResultReasonNotExtractable {
		t.Errorf("not extractable, wrapped: %v", err)
	}
	if v := values(t, s, id, kmip.AttributeNameNeverExtractable); v[0] != false {
		t.Errorf("never extractable, and it was: %v", v)
	}
}

// TestUsageAllocation: many that take from one key at once get no more than there
// is, and the limits are fixed once something is taken.
func TestUsageAllocation(t *testing.T) {
	f := start(t, t.TempDir())
	s, ctx := f.session(), t.Context()
	limits := func(n int64) kmip.Attribute {
		return attr(kmip.AttributeNameUsageLimits, kmip.UsageLimits{UsageLimitsTotal: n, UsageLimitsUnit: kmip.UsageLimitsUnitByte})
	}
	id := raw(t, s, make([]byte, 16), kmip.CryptographicUsageEncrypt, limits(10))
	if _, err := s.ModifyAttribute(ctx, id, limits(100)); err != nil {
		t.Fatal(err)
	}
	var got sync.Map
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			n := int64(0)
			for s := f.session(); s.GetUsageAllocation(ctx, id, 3) == nil; n += 3 {
			}
			got.Store(g, n)
		})
	}
	wg.Wait()
	total := int64(0)
	got.Range(func(_, n any) bool { total += n.(int64); return true })
	if total != 99 {
		t.Errorf("%d units of 100 were given in threes", total)
	}
	if _, err := s.ModifyAttribute(ctx, id, limits(200)); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("limits in use were changed: %v", err)
	}
	if _, err := s.Encrypt(ctx, id, CipherRequest{Parameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeCTR}, Data: make([]byte, 2), IV: make([]byte, 16)}); reason(err) != kmip.ResultReasonPermissionDenied {
		t.Errorf("2 bytes with 1 left: %v", err)
	}
	two := int64(2)
	if unmet, err := s.Check(ctx, id, CheckRequest{Count: &two}); err != nil || unmet.Count == nil || *unmet.Count != 1 {
		t.Errorf("Check: %+v, %v", unmet, err)
	}
}

// TestStream encrypts in parts of every length and decrypts in others.
func TestStream(t *testing.T) {
	f := start(t, t.TempDir())
	s, ctx := f.session(), t.Context()
	id := raw(t, s, []byte("0123456789abcdef"), kmip.CryptographicUsageEncrypt|kmip.CryptographicUsageDecrypt)
	data := bytes.Repeat([]byte("streams of data "), 5)[:71]
	parts := func(n int, data []byte, tag []byte, p *kmip.CryptographicParameters, iv []byte, do func(context.Context, string, CipherRequest) (CipherResult, error)) (out, sum []byte) {
		t.Helper()
		var correlation []byte
		for first := true; ; first = false {
			part := data[:min(n, len(data))]
			data = data[len(part):]
			r := CipherRequest{Parameters: p, Data: part, Correlation: correlation, Init: first, Final: len(data) == 0}
			if first {
				r.IV = iv
			}
			if r.Final {
				r.Tag = tag
			}
			got, err := do(ctx, id, r)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, got.Data...)
			if r.Final {
				return out, got.Tag
			}
			correlation = got.Correlation
		}
	}
	for _, p := range []kmip.CryptographicParameters{
		{BlockCipherMode: kmip.BlockCipherModeECB, PaddingMethod: kmip.PaddingMethodPKCS5}, {BlockCipherMode: kmip.BlockCipherModeCBC, PaddingMethod: kmip.PaddingMethodPKCS5},
		{BlockCipherMode: kmip.BlockCipherModeCTR}, {BlockCipherMode: kmip.BlockCipherModeGCM},
	} {
		iv := make([]byte, 16)
		if p.BlockCipherMode == kmip.BlockCipherModeGCM {
			iv = iv[:12]
		}
		whole, err := s.Encrypt(ctx, id, CipherRequest{Parameters: &p, Data: data, IV: iv})
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{1, 15, 16, 17, 64, 100} {
			out, tag := parts(n, data, nil, &p, iv, s.Encrypt)
			if !bytes.Equal(out, whole.Data) || !bytes.Equal(tag, whole.Tag) {
				t.Errorf("mode %d in parts of %d: %x", p.BlockCipherMode, n, out)
			}
			if back, _ := parts(n, out, tag, &p, iv, s.Decrypt); !bytes.Equal(back, data) {
				t.Errorf("mode %d decrypted in parts of %d: %q", p.BlockCipherMode, n, back)
			}
		}
	}
	begun, err := s.Encrypt(ctx, id, CipherRequest{Parameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeECB}, Init: true})
	if err != nil {
		t.Fatal(err)
	}
	other := f.session()
	other.Fingerprint = "another"
	next := CipherRequest{Correlation: begun.Correlation, Data: make([]byte, 16)}
	if _, err := other.Encrypt(ctx, id, next); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("another client's stream: %v", err)
	}
	f.clock.pass(streamIdle + time.Minute)
	if _, err := s.Encrypt(ctx, id, next); reason(err) != kmip.ResultReasonInvalidField {
		t.Errorf("a stream that was left: %v", err)
	}
	for i := range maxEach + 1 {
		_, err := s.Encrypt(ctx, id, CipherRequest{Parameters: &kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeECB}, Init: true})
		if want := i == maxEach; (reason(err) == kmip.ResultReasonPermissionDenied) != want {
			t.Errorf("stream %d: %v", i+1, err)
		}
	}
}
