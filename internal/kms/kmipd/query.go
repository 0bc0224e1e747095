package kmipd

import (
	"slices"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"mortise/internal/kms"
)

func discoverVersions(_ *call, r *payloads.DiscoverVersionsRequestPayload) (kmip.OperationPayload, error) {
	var list []kmip.ProtocolVersion
	for minor := highest.ProtocolVersionMinor; minor >= 0; minor-- { // most preferred first
		v := kmip.ProtocolVersion{ProtocolVersionMajor: 1, ProtocolVersionMinor: minor}
		if len(r.ProtocolVersion) == 0 || slices.Contains(r.ProtocolVersion, v) {
			list = append(list, v)
		}
	}
	return &payloads.DiscoverVersionsResponsePayload{ProtocolVersion: list}, nil
}

// query tells what works, and no more (KMIP 1.4 §4.25). Functions that a
// version does not have, and those with nothing to tell, add nothing.
func query(c *call, r *payloads.QueryRequestPayload) (kmip.OperationPayload, error) {
	if len(r.QueryFunction) == 0 {
		return nil, kms.Refuse(kmip.ResultReasonInvalidMessage, "a Query Function is needed")
	}
	var answer payloads.QueryResponsePayload
	for _, f := range r.QueryFunction {
		switch f {
		case kmip.QueryFunctionOperations:
			answer.Operations = nil
			for _, o := range operations() {
				if o.since <= c.reply.version.Minor() {
					answer.Operations = append(answer.Operations, o.code)
				}
			}
		case kmip.QueryFunctionObjects:
			answer.ObjectType = []kmip.ObjectType{kmip.ObjectTypeSymmetricKey, kmip.ObjectTypeSecretData, kmip.ObjectTypeOpaqueObject}
		case kmip.QueryFunctionServerInformation:
			answer.VendorIdentification = "Mortise"
		case kmip.QueryFunctionRNGs:
			answer.RNGParameters = []kmip.RNGParameters{{RNGAlgorithm: kmip.RNGAlgorithmUnspecified}}
		case kmip.QueryFunctionCapabilities:
			no, yes := false, true
			answer.CapabilityInformation = []kmip.CapabilityInformation{{
				StreamingCapability: &yes, AsynchronousCapability: &no, AttestationCapability: &no,
				BatchUndoCapability: &yes, BatchContinueCapability: &yes,
				UnwrapMode: kmip.UnwrapModeNotProcessed, DestroyAction: kmip.DestroyActionKeyMaterialDeleted,
				ShreddingAlgorithm: kmip.ShreddingAlgorithmCryptographic, RNGMode: kmip.RNGModeSharedInstantiation,
			}}
		case kmip.QueryFunctionProfiles:
			for _, p := range profiles(c.reply.version.Minor()) {
				answer.ProfileInformation = append(answer.ProfileInformation, kmip.ProfileInformation{ProfileName: p})
			}
		}
	}
	return &answer, nil
}

// profiles are those of the client's version whose OASIS cases this server
// passes, as `make conformance` shows.
func profiles(minor int) []kmip.ProfileName {
	switch minor {
	case 3:
		return []kmip.ProfileName{
			kmip.ProfileNameBaselineServerBasicKMIPV1_3, kmip.ProfileNameBaselineServerTLSV1_2KMIPV1_3,
			kmip.ProfileNameTapeLibraryServerKMIPV1_3, kmip.ProfileNameSymmetricKeyLifecycleServerKMIPV1_3,
			kmip.ProfileNameBasicCryptographicServerKMIPV1_3, kmip.ProfileNameRNGCryptographicServerKMIPV1_3,
			kmip.ProfileNameSymmetricKeyFoundryServerKMIPV1_3, kmip.ProfileNameOpaqueManagedObjectStoreServerKMIPV1_3,
		}
	case 4:
		return []kmip.ProfileName{
			kmip.ProfileNameBaselineServerBasicKMIPV1_4, kmip.ProfileNameBaselineServerTLSV1_2KMIPV1_4,
			kmip.ProfileNameTapeLibraryServerKMIPV1_4, kmip.ProfileNameSymmetricKeyLifecycleServerKMIPV1_4,
			kmip.ProfileNameBasicCryptographicServerKMIPV1_4, kmip.ProfileNameRNGCryptographicServerKMIPV1_4,
			kmip.ProfileNameSymmetricKeyFoundryServerKMIPV1_4, kmip.ProfileNameOpaqueManagedObjectStoreServerKMIPV1_4,
			kmip.ProfileNameStorageArrayWithSelfEncryptingDriveServerKMIPV1_4,
		}
	}
	return nil
}
