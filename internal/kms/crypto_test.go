package kms

import (
	"bytes"
	"crypto/aes"
	"encoding/hex"
	"testing"

	"github.com/ovh/kmip-go"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestKeyWrapVectors(t *testing.T) {
	for _, v := range []struct{ name, kek, key, want string }{
		// RFC 3394 §4.1, §4.3, §4.4, §4.5, §4.6
		{"128 with 128", "000102030405060708090A0B0C0D0E0F", "00112233445566778899AABBCCDDEEFF", "1FA68B0A8112B447AEF34BD8FB5A7B829D3E862371D2CFE5"},
		{"128 with 256", "000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F", "00112233445566778899AABBCCDDEEFF", "64E8C3F9CE0F5BA263E9777905818A2A93C8191E7D6E8AE7"},
		{"192 with 192", "000102030405060708090A0B0C0D0E0F1011121314151617", "00112233445566778899AABBCCDDEEFF0001020304050607", "031D33264E15D33268F24EC260743EDCE1C6C7DDEE725A936BA814915C6762D2"},
		{"256 with 256", "000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F", "00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F", "28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21"},
	} {
		block, _ := aes.NewCipher(unhex(t, v.kek))
		got, err := wrapKey(block, unhex(t, v.key))
		if err != nil || !bytes.Equal(got, unhex(t, v.want)) {
			t.Errorf("%s: %x, %v", v.name, got, err)
		}
		back, err := unwrapKey(block, got)
		if err != nil || !bytes.Equal(back, unhex(t, v.key)) {
			t.Errorf("%s: back %x, %v", v.name, back, err)
		}
		for i := range got {
			got[i] ^= 1
			if _, err := unwrapKey(block, got); err == nil {
				t.Errorf("%s: byte %d altered, and it opened", v.name, i)
			}
			got[i] ^= 1
		}
	}
}

// RFC 5649 §6.
func TestPaddedKeyWrapVectors(t *testing.T) {
	block, _ := aes.NewCipher(unhex(t, "5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8"))
	for _, v := range []struct{ key, want string }{
		{"c37b7e6492584340bed12207808941155068f738", "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a"},
		{"466f7250617369", "afbeb0f07dfbf5419200f2ccb50bb24f"},
	} {
		got, err := wrapPadded(block, unhex(t, v.key))
		if err != nil || !bytes.Equal(got, unhex(t, v.want)) {
			t.Errorf("%x, %v", got, err)
		}
		back, err := unwrapPadded(block, got)
		if err != nil || !bytes.Equal(back, unhex(t, v.key)) {
			t.Errorf("back %x, %v", back, err)
		}
		got[3] ^= 4
		if _, err := unwrapPadded(block, got); err == nil {
			t.Error("altered, and it opened")
		}
	}
	for n := 1; n < 70; n++ {
		w, err := wrapPadded(block, bytes.Repeat([]byte{7}, n))
		if err != nil {
			t.Fatal(err)
		}
		if back, err := unwrapPadded(block, w); err != nil || len(back) != n {
			t.Errorf("%d bytes: %x, %v", n, back, err)
		}
	}
}

func FuzzUnwrap(f *testing.F) {
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{1}, 16))
	f.Add(unhex(f, "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a"))
	block, _ := aes.NewCipher(unhex(f, "5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8"))
	f.Fuzz(func(t *testing.T, wrapped []byte) {
		_, _ = unwrapKey(block, wrapped)
		if plain, err := unwrapPadded(block, wrapped); err == nil {
			again, err := wrapPadded(block, plain)
			if err != nil || !bytes.Equal(again, wrapped) {
				t.Errorf("%x opens, and wraps to %x", wrapped, again)
			}
		}
	})
}

// NIST SP 800-38B appendix D, AES-128 and three-key TDEA.
func TestCMACVectors(t *testing.T) {
	message := unhex(t, "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710")
	for _, v := range []struct {
		alg  kmip.CryptographicAlgorithm
		key  string
		n    int
		want string
	}{
		{kmip.CryptographicAlgorithmAES, "2b7e151628aed2a6abf7158809cf4f3c", 0, "bb1d6929e95937287fa37d129b756746"},
		{kmip.CryptographicAlgorithmAES, "2b7e151628aed2a6abf7158809cf4f3c", 16, "070a16b46b4d4144f79bdd9dd04a287c"},
		{kmip.CryptographicAlgorithmAES, "2b7e151628aed2a6abf7158809cf4f3c", 40, "dfa66747de9ae63030ca32611497c827"},
		{kmip.CryptographicAlgorithmAES, "2b7e151628aed2a6abf7158809cf4f3c", 64, "51f0bebf7e3b9d92fc49741779363cfe"},
		{kmip.CryptographicAlgorithm3DES, "8aa83bf8cbda10620bc1bf19fbb6cd58bc313d4a371ca8b5", 0, "b7a688e122ffaf95"},
		{kmip.CryptographicAlgorithm3DES, "8aa83bf8cbda10620bc1bf19fbb6cd58bc313d4a371ca8b5", 20, "743ddbe0ce2dc2ed"},
	} {
		m, err := newMAC(unhex(t, v.key), v.alg, kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeCMAC})
		if err != nil {
			t.Fatal(err)
		}
		m.Write(message[:v.n])
		if got := hex.EncodeToString(m.Sum(nil)); got != v.want {
			t.Errorf("%d bytes: %s, want %s", v.n, got, v.want)
		}
	}
}

// RFC 4231 test case 2 and RFC 2202's for SHA-1.
func TestHMACVectors(t *testing.T) {
	for alg, want := range map[kmip.CryptographicAlgorithm]string{
		kmip.CryptographicAlgorithmHMACSHA1:   "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79",
		kmip.CryptographicAlgorithmHMACSHA224: "a30e01098bc6dbbf45690f3a7e9e6d0f8bbea2a39e6148008fd05e44",
		kmip.CryptographicAlgorithmHMACSHA256: "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
		kmip.CryptographicAlgorithmHMACSHA384: "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649",
		kmip.CryptographicAlgorithmHMACSHA512: "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea2505549758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
	} {
		m, err := newMAC([]byte("Jefe"), alg, kmip.CryptographicParameters{})
		if err != nil {
			t.Fatal(err)
		}
		m.Write([]byte("what do ya want for nothing?"))
		if got := hex.EncodeToString(m.Sum(nil)); got != want {
			t.Errorf("%v: %s, want %s", alg, got, want)
		}
	}
}

// NIST SP 800-38A appendix F, AES-128, the first two blocks.
func TestBlockCipherModeVectors(t *testing.T) {
	key := unhex(t, "2b7e151628aed2a6abf7158809cf4f3c")
	plain := unhex(t, "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
	iv := unhex(t, "000102030405060708090a0b0c0d0e0f")
	for _, v := range []struct {
		mode     kmip.BlockCipherMode
		iv       []byte
		want     string
		roundOff bool // takes data of any length
	}{
		{kmip.BlockCipherModeECB, nil, "3ad77bb40d7a3660a89ecaf32466ef97f5d3d58503b9699de785895a96fdbaaf", false},
		{kmip.BlockCipherModeCBC, iv, "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2", false},
		{kmip.BlockCipherModeCFB, iv, "3b3fd92eb72dad20333449f8e83cfb4ac8a64537a0b3a93fcde3cdad9f1ce58b", true},
		{kmip.BlockCipherModeOFB, iv, "3b3fd92eb72dad20333449f8e83cfb4a7789508d16918f03f53c52dac54ed825", true},
		{kmip.BlockCipherModeCTR, unhex(t, "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff", true},
	} {
		c, err := newSymmetric(kmip.CryptographicAlgorithmAES, key, kmip.CryptographicParameters{BlockCipherMode: v.mode})
		if err != nil {
			t.Fatal(err)
		}
		got, _, err := c.encrypt(v.iv, nil, plain)
		if err != nil || hex.EncodeToString(got) != v.want {
			t.Errorf("mode %d: %x, %v", v.mode, got, err)
		}
		if back, err := c.decrypt(v.iv, nil, got, nil); err != nil || !bytes.Equal(back, plain) {
			t.Errorf("mode %d: back %x, %v", v.mode, back, err)
		}
		if odd, _, err := c.encrypt(v.iv, nil, plain[:19]); (err == nil) != v.roundOff || err == nil && !bytes.Equal(odd, got[:19]) {
			t.Errorf("mode %d: 19 bytes: %x, %v", v.mode, odd, err)
		}
	}
	for _, pad := range []kmip.PaddingMethod{kmip.PaddingMethodPKCS5, kmip.PaddingMethodANSIX9_23, kmip.PaddingMethodISO10126} {
		c, err := newSymmetric(kmip.CryptographicAlgorithmAES, key, kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeCBC, PaddingMethod: pad})
		if err != nil {
			t.Fatal(err)
		}
		for n := range 33 {
			out, _, err := c.encrypt(iv, nil, plain[:min(n, 32)])
			if err != nil {
				t.Fatal(err)
			}
			if back, err := c.decrypt(iv, nil, out, nil); err != nil || !bytes.Equal(back, plain[:n]) {
				t.Errorf("padding %d, %d bytes: %x, %v", pad, n, back, err)
			}
		}
		if _, err := c.decrypt(iv, nil, bytes.Repeat([]byte{3}, 32), nil); err == nil && pad == kmip.PaddingMethodPKCS5 {
			t.Error("wrong padding is not noticed")
		}
	}
}

// The GCM specification's test cases 4 to 6 (McGrew and Viega, appendix B).
func TestGCMVectors(t *testing.T) {
	key := unhex(t, "feffe9928665731c6d6a8f9467308308")
	plain := unhex(t, "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39")
	aad := unhex(t, "feedfacedeadbeeffeedfacedeadbeefabaddad2")
	for _, v := range []struct{ iv, want, tag string }{
		{"cafebabefacedbaddecaf888", "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091", "5bc94fbc3221a5db94fae95ae7121a47"},
		{"cafebabefacedbad", "61353b4c2806934a777ff51fa22a4755699b2a714fcdc6f83766e5f97b6c742373806900e49f24b22b097544d4896b424989b5e1ebac0f07c23f4598", "3612d2e79e3b0785561be14aaca2fccb"},
	} {
		for _, n := range []int32{0, 12, 16} {
			c, err := newSymmetric(kmip.CryptographicAlgorithmAES, key, kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeGCM, TagLength: n})
			if err != nil {
				t.Fatal(err)
			}
			out, tag, err := c.encrypt(unhex(t, v.iv), aad, plain)
			if err != nil || hex.EncodeToString(out) != v.want || hex.EncodeToString(tag) != v.tag[:2*c.tag] {
				t.Errorf("%s: %x %x %v", v.iv, out, tag, err)
			}
			if back, err := c.decrypt(unhex(t, v.iv), aad, out, tag); err != nil || !bytes.Equal(back, plain) {
				t.Errorf("%s: back %x %v", v.iv, back, err)
			}
			tag[c.tag-1] ^= 1
			if _, err := c.decrypt(unhex(t, v.iv), aad, out, tag); AsError(err).Reason != kmip.ResultReasonCryptographicFailure {
				t.Errorf("a wrong tag gives %v", err)
			}
		}
	}
}

// PBKDF2: RFC 7914 §11. HASH: OASIS case TC-DERIVEKEY-1-10. HMAC: RFC 4231.
// SP 800-108: counter and feedback from OpenSSL 3's KBKDF, double pipeline by
// Python's hmac from the standard's definition.
func TestDerivationVectors(t *testing.T) {
	sha := func(h kmip.HashingAlgorithm) kmip.CryptographicParameters {
		return kmip.CryptographicParameters{HashingAlgorithm: h}
	}
	for _, v := range []struct {
		name   string
		method DerivationMethod
		key    []byte
		d      Derivation
		want   string
	}{
		{"PBKDF2", DerivePBKDF2, []byte("passwd"), Derivation{Parameters: sha(kmip.HashingAlgorithmSHA_256), Salt: []byte("salt"), Iterations: 1},
			"55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"},
		{"HASH of the key", DeriveHash, unhex(t, "00112233445566778899aabbccddeeff"), Derivation{Parameters: sha(kmip.HashingAlgorithmSHA_256)},
			"a8faed6abbf35c12a4b26e40f6feb19d"},
		{"HMAC", DeriveHMAC, []byte("Jefe"), Derivation{Parameters: sha(kmip.HashingAlgorithmSHA_256), Data: []byte("what do ya want for nothing?")},
			"5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
		{"ENCRYPT", DeriveEncrypt, unhex(t, "2b7e151628aed2a6abf7158809cf4f3c"), Derivation{Parameters: kmip.CryptographicParameters{BlockCipherMode: kmip.BlockCipherModeECB},
			Data: unhex(t, "6bc1bee22e409f96e93d7e117393172a")}, "3ad77bb40d7a3660a89ecaf32466ef97"},
		{"NIST800-108-C", DeriveNISTCounter, unhex(t, "000102030405060708090a0b0c0d0e0f"), Derivation{Parameters: sha(kmip.HashingAlgorithmSHA_256),
			Data: []byte("label\x00context")}, "c54e1eb4dc54b9cdcf41b7bed4f738e7eb284c2a1edec68bf0a77577a3d1560154b3423dd761d75c378317bf0ef9384f0159c91878abd079e016bc44b3bcf4470a74f1f90a10"},
		{"NIST800-108-F", DeriveNISTFeed, unhex(t, "000102030405060708090a0b0c0d0e0f"), Derivation{Parameters: sha(kmip.HashingAlgorithmSHA_256),
			IV: bytes.Repeat([]byte{5}, 32), Data: []byte("label\x00context")}, "d0f3b6917dd94d92ae594d49e88076b1329062fbcabd23c3804dd1231eb2e8b6de124192ff45b102d4da4d44138de848fc6fda62327a6f6291c7e756620020a2f57a514c4f69"},
		{"NIST800-108-DPI", DeriveNISTDouble, unhex(t, "000102030405060708090a0b0c0d0e0f"), Derivation{Parameters: sha(kmip.HashingAlgorithmSHA_256),
			Data: []byte("label\x00context")}, "89ff340db85a56477c9a02c872859441084653ad437cdf71684b7e79dc6424dd494077a435a184ca6993c08860bec6528b5ba321f783c50d59d56df378ec484594d1edd82f97"},
	} {
		got, err := derive(v.method, v.key, kmip.CryptographicAlgorithmAES, v.d, len(v.want)/2)
		if err != nil || hex.EncodeToString(got) != v.want {
			t.Errorf("%s: %x, %v", v.name, got, err)
		}
	}
	if _, err := derive(DeriveHMAC, []byte("k"), 0, Derivation{Parameters: sha(kmip.HashingAlgorithmSHA_256), Data: []byte("d")}, 33); AsError(err).Reason != kmip.ResultReasonInvalidField {
		t.Errorf("33 bytes of SHA-256: %v", err)
	}
}
