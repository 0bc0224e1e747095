package kmipd

import (
	"encoding/binary"
	"time"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/ttlv"
)

// Every message has a header. It is read here as far as most clients fill it in;
// the codec, which reads by reflection, takes ten times as long.

// headerFields is the request header of KMIP 1.4 §7.1.
var headerFields = []field{
	{tag: kmip.TagProtocolVersion}, {tag: kmip.TagMaximumResponseSize}, {tag: kmip.TagClientCorrelationValue}, {tag: kmip.TagServerCorrelationValue},
	{tag: kmip.TagAsynchronousIndicator}, {tag: kmip.TagAttestationCapableIndicator}, {tag: kmip.TagAttestationType, repeats: true},
	{tag: kmip.TagAuthentication}, {tag: kmip.TagBatchErrorContinuationOption}, {tag: kmip.TagBatchOrderOption}, {tag: kmip.TagTimeStamp}, {tag: kmip.TagBatchCount},
}

// versionOf reads a protocol version: two integers, and nothing else.
func versionOf(it item) (v kmip.ProtocolVersion, ok bool) {
	const (
		major = uint32(kmip.TagProtocolVersionMajor)<<8 | uint32(ttlv.TypeInteger)
		minor = uint32(kmip.TagProtocolVersionMinor)<<8 | uint32(ttlv.TypeInteger)
		next  = headerLen + 8 // an integer is padded to 8 bytes
	)
	b := it.value
	if it.tag != kmip.TagProtocolVersion || it.typ != ttlv.TypeStructure || len(b) != 2*next ||
		binary.BigEndian.Uint32(b) != major || binary.BigEndian.Uint32(b[next:]) != minor {
		return v, false
	}
	v.ProtocolVersionMajor = int32(binary.BigEndian.Uint32(b[headerLen:]))
	v.ProtocolVersionMinor = int32(binary.BigEndian.Uint32(b[next+headerLen:]))
	return v, true
}

// usualHeader reads the fields of a header that every version has and most clients
// send; ok is false if there is another, or one of another type: that is for the
// codec.
func usualHeader(list []item) (h kmip.RequestHeader, ok bool) {
	for _, it := range list {
		switch {
		case it.tag == kmip.TagProtocolVersion && it.typ == ttlv.TypeStructure:
			if h.ProtocolVersion, ok = versionOf(it); !ok {
				return h, false
			}
		case it.tag == kmip.TagMaximumResponseSize && it.typ == ttlv.TypeInteger:
			h.MaximumResponseSize = int32(binary.BigEndian.Uint32(it.value))
		case it.tag == kmip.TagBatchErrorContinuationOption && it.typ == ttlv.TypeEnumeration:
			h.BatchErrorContinuationOption = kmip.BatchErrorContinuationOption(binary.BigEndian.Uint32(it.value))
		case it.tag == kmip.TagBatchOrderOption && it.typ == ttlv.TypeBoolean:
			inOrder := it.value[7] != 0
			h.BatchOrderOption = &inOrder
		case it.tag == kmip.TagTimeStamp && it.typ == ttlv.TypeDateTime:
			at := time.Unix(int64(binary.BigEndian.Uint64(it.value)), 0)
			h.TimeStamp = &at
		case it.tag == kmip.TagBatchCount && it.typ == ttlv.TypeInteger:
			h.BatchCount = int32(binary.BigEndian.Uint32(it.value))
		default:
			return h, false
		}
	}
	return h, len(list) > 1 && list[0].tag == kmip.TagProtocolVersion && list[len(list)-1].tag == kmip.TagBatchCount
}
