package main

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// mandatory says by what the names of a profile's mandatory cases begin (KMIP
// Profiles 1.3 and 1.4).
var mandatory = map[string]string{
	"TapeLibraryServer":                         "TL-M-",
	"SymmetricKeyLifecycleServer":               "SKLC-M-",
	"AsymmetricKeyLifecycleServer":              "AKLC-M-",
	"BasicCryptographicServer":                  "CS-BC-M-",
	"AdvancedCryptographicServer":               "CS-AC-M-",
	"RNGCryptographicServer":                    "CS-RNG-M-",
	"SymmetricKeyFoundryServer":                 "SKFF-M-",
	"OpaqueManagedObjectStoreServer":            "OMOS-M-",
	"StorageArrayWithSelfEncryptingDriveServer": "SASED-M-",
}

// profiles asks what the server claims to a client of KMIP 1.minor.
func (s *server) profiles(minor uint32) (list []string, err error) {
	it, err := s.ask(minor, item(kmip.OperationQuery, enumeration(kmip.TagQueryFunction, uint32(kmip.QueryFunctionProfiles))))
	if err != nil {
		return nil, fmt.Errorf("asking for the profiles: %w", err)
	}
	payload := it.kid(kmip.TagResponsePayload)
	if payload == nil {
		return nil, nil
	}
	for _, p := range payload.all(kmip.TagProfileInformation) {
		if name := p.kid(kmip.TagProfileName); name != nil && len(name.value) == 4 {
			list = append(list, ttlv.EnumStr(kmip.ProfileName(binary.BigEndian.Uint32(name.value))))
		}
	}
	return list, nil
}

// shown tells whether the cases show a profile of a version: all mandatory ones
// pass, but for those whose file is wrong. known is false if there are none.
func shown(results []result, excuses []reason, version, prefix string) (ok, known bool) {
	ok = true
	for _, r := range results {
		if r.version != version || !strings.HasPrefix(r.name, prefix) {
			continue
		}
		known = true
		if !r.passed() && (r.outside != "" || reasonFor(excuses, r.testCase) == "") {
			ok = false
		}
	}
	return ok, known
}
