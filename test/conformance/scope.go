package main

import (
	"slices"
	"strings"

	"github.com/ovh/kmip-go"
)

// What Mortise's KMS is for: every operation and object type here must work, and
// nothing else is claimed (doc/kmip-profile.md).
var (
	scopeOperations = strings.Fields(`Create Register ReKey DeriveKey Locate Check Get GetAttributes GetAttributeList AddAttribute
		ModifyAttribute DeleteAttribute ObtainLease GetUsageAllocation Activate Revoke Destroy Archive Recover Query DiscoverVersions
		Import Export Encrypt Decrypt MAC MACVerify Hash RNGRetrieve RNGSeed`)
	scopeObjects = []string{"SymmetricKey", "SecretData", "OpaqueObject"}
)

func inScope(tag int, name string) bool {
	if tag == kmip.TagObjectType {
		return slices.Contains(scopeObjects, name)
	}
	return slices.Contains(scopeOperations, name)
}

// outOfScope says what a case needs that the KMS is not for, "" when there is
// no such thing.
func outOfScope(c *testCase) string {
	var reasons []string
	add := func(r string) {
		if !slices.Contains(reasons, r) {
			reasons = append(reasons, r)
		}
	}
	for _, form := range []string{"HTTPS", "JSON", "XML"} {
		if strings.HasPrefix(c.name, "MSGENC-"+form) {
			add("messages over " + form)
		}
	}
	for _, x := range c.exchanges {
		for _, it := range x.request.all(kmip.TagBatchItem) {
			if o := it.kid(kmip.TagOperation); o != nil && !inScope(kmip.TagOperation, o.text) {
				add("operation " + o.text)
			}
			payload := it.kid(kmip.TagRequestPayload)
			if payload == nil {
				continue
			}
			if o := payload.kid(kmip.TagObjectType); o != nil && !inScope(kmip.TagObjectType, o.text) {
				add("object type " + o.text)
			}
		}
	}
	slices.Sort(reasons)
	return strings.Join(reasons, ", ")
}
