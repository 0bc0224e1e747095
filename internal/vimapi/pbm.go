package vimapi

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	pbm "github.com/vmware/govmomi/pbm/types"
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
	"mortise/internal/policy"
)

// What an encryption policy is made of, by vSphere's ids.
const (
	encryptionNamespace  = "com.vmware.storageprofile.dataservice"
	encryptionCapability = "ad5a249d-cbc2-43af-9366-694d7664fa52"
)

const profileManager = "PbmProfileProfileManager"

// pbmMethods are the storage policy service at /pbm.
func pbmMethods() []method {
	rows := []method{
		row("PbmServiceInstance", "PbmRetrieveServiceContent", "", (*call).pbmContent),
		row(profileManager, "PbmQueryProfile", "", (*call).pbmQueryProfile),
		row(profileManager, "PbmRetrieveContent", "", (*call).pbmRetrieveContent),
		row(profileManager, "PbmCreate", "", (*call).pbmCreate),
		row(profileManager, "PbmDelete", "", (*call).pbmDelete),
		row(profileManager, "PbmQueryAssociatedProfile", authz.ProfileView, (*call).pbmQueryAssociatedProfile),
		row(profileManager, "PbmQueryAssociatedProfiles", authz.ProfileView, (*call).pbmQueryAssociatedProfiles),
		row(profileManager, "PbmQueryAssociatedEntity", authz.ProfileView, (*call).pbmQueryAssociatedEntity),
		row(profileManager, "PbmQueryIOFiltersFromProfileId", authz.ProfileView, (*call).pbmQueryIOFilters),
		row(profileManager, "PbmQueryDefaultRequirementProfile", authz.ProfileView, (*call).pbmDefaultProfile),
		row("PbmComplianceManager", "PbmFetchComplianceResult", authz.ProfileView, (*call).pbmCompliance),
		row("PbmPlacementSolver", "PbmCheckRequirements", authz.ProfileView, (*call).pbmCheckRequirements),
	}
	for i := range rows {
		rows[i].namespace = "pbm"
	}
	return rows
}

func pbmSingletons() []*kind {
	return []*kind{
		newSingleton("PbmServiceInstance", "ServiceInstance", nil),
		newSingleton("PbmSessionManager", "SessionManager", nil),
		newSingleton("PbmCapabilityMetadataManager", "CapabilityMetadataManager", nil),
		newSingleton(profileManager, "ProfileManager", nil),
		newSingleton("PbmComplianceManager", "complianceManager", nil),
		newSingleton("PbmPlacementSolver", "placementSolver", nil),
	}
}

func (c *call) pbmContent(*pbm.PbmRetrieveServiceContent) (*pbm.PbmRetrieveServiceContentResponse, error) {
	return &pbm.PbmRetrieveServiceContentResponse{Returnval: pbm.PbmServiceInstanceContent{
		AboutInfo:                 pbm.PbmAboutInfo{Name: "PBM", Version: "2.0", InstanceUuid: c.s.opt.InstanceUUID},
		SessionManager:            singleton("PbmSessionManager", "SessionManager"),
		CapabilityMetadataManager: singleton("PbmCapabilityMetadataManager", "CapabilityMetadataManager"),
		ProfileManager:            singleton(profileManager, "ProfileManager"),
		ComplianceManager:         singleton("PbmComplianceManager", "complianceManager"),
		PlacementSolver:           singleton("PbmPlacementSolver", "placementSolver"),
	}}, nil
}

func profileID(id policy.ID) pbm.PbmProfileId { return pbm.PbmProfileId{UniqueId: string(id)} }

func (c *call) pbmQueryProfile(q *pbm.PbmQueryProfile) (*pbm.PbmQueryProfileResponse, error) {
	res := &pbm.PbmQueryProfileResponse{}
	if cat := q.ProfileCategory; cat != "" && cat != string(pbm.PbmProfileCategoryEnumREQUIREMENT) {
		return res, nil
	}
	list, err := c.s.center.Policies(c.ctx, c.principal())
	for _, p := range list {
		res.Returnval = append(res.Returnval, profileID(p.ID))
	}
	return res, err
}

func (c *call) pbmRetrieveContent(q *pbm.PbmRetrieveContent) (*pbm.PbmRetrieveContentResponse, error) {
	list, err := c.s.center.Policies(c.ctx, c.principal())
	if err != nil {
		return nil, err
	}
	byID := map[policy.ID]policy.Policy{}
	for _, p := range list {
		byID[p.ID] = p
	}
	res := &pbm.PbmRetrieveContentResponse{}
	for _, id := range q.ProfileIds {
		p, ok := byID[policy.ID(id.UniqueId)]
		if !ok {
			return nil, invalidArgument("profileIds", "there is no storage policy with the id %q", clip(id.UniqueId))
		}
		res.Returnval = append(res.Returnval, toProfile(p))
	}
	return res, nil
}

func toProfile(p policy.Policy) *pbm.PbmCapabilityProfile {
	epoch := time.Unix(0, 0).UTC() // when a policy was made is not recorded
	out := &pbm.PbmCapabilityProfile{
		PbmProfile: pbm.PbmProfile{
			ProfileId: profileID(p.ID), Name: p.Name, Description: p.Description, CreationTime: epoch, LastUpdatedTime: epoch, CreatedBy: "center", LastUpdatedBy: "center",
		},
		ProfileCategory: string(pbm.PbmProfileCategoryEnumREQUIREMENT), IsDefault: p.ID == policy.DatastoreDefault,
		ResourceType: pbm.PbmProfileResourceType{ResourceType: string(pbm.PbmProfileResourceTypeEnumSTORAGE)},
	}
	constraints := &pbm.PbmCapabilitySubProfileConstraints{SubProfiles: []pbm.PbmCapabilitySubProfile{}}
	if p.Encrypts {
		constraints.SubProfiles = append(constraints.SubProfiles, pbm.PbmCapabilitySubProfile{
			Name: "sp-1",
			Capability: []pbm.PbmCapabilityInstance{{
				Id: pbm.PbmCapabilityMetadataUniqueId{Namespace: encryptionNamespace, Id: encryptionCapability},
				Constraint: []pbm.PbmCapabilityConstraintInstance{{PropertyInstance: []pbm.PbmCapabilityPropertyInstance{
					{Id: encryptionCapability, Value: encryptionCapability},
				}}},
			}},
		})
	}
	out.Constraints = constraints
	return out
}

// pbmCreate makes a policy that encrypts, or one that asks nothing; other rules
// could not be kept, so they are refused.
func (c *call) pbmCreate(q *pbm.PbmCreate) (*pbm.PbmCreateResponse, error) {
	encrypts := false
	sub, ok := q.CreateSpec.Constraints.(*pbm.PbmCapabilitySubProfileConstraints)
	if !ok {
		return nil, invalidArgument("createSpec.constraints", "a storage policy is made of sub-profiles; the constraints are something else")
	}
	for _, s := range sub.SubProfiles {
		for _, capability := range s.Capability {
			if capability.Id.Namespace != encryptionNamespace || capability.Id.Id != encryptionCapability {
				return nil, invalidArgument("createSpec.constraints", "the capability %s/%s is not supported; storage policies can ask for encryption (%s)",
					clip(capability.Id.Namespace), clip(capability.Id.Id), encryptionCapability)
			}
			encrypts = true
		}
	}
	p, err := c.s.center.CreatePolicy(c.ctx, c.principal(), q.CreateSpec.Name, q.CreateSpec.Description, encrypts, false)
	return &pbm.PbmCreateResponse{Returnval: profileID(p.ID)}, err
}

func (c *call) pbmDelete(q *pbm.PbmDelete) (*pbm.PbmDeleteResponse, error) {
	res := &pbm.PbmDeleteResponse{}
	for _, id := range q.ProfileId {
		outcome := pbm.PbmProfileOperationOutcome{ProfileId: id}
		if err := c.s.center.DeletePolicy(c.ctx, c.principal(), policy.ID(id.UniqueId)); err != nil {
			outcome.Fault = ptr(localized(err))
		}
		res.Returnval = append(res.Returnval, outcome)
	}
	return res, nil
}

// associated is the policy and state of a VM's files ("vm-13") or of a disk of
// it ("vm-13:2000").
func (c *call) associated(o pbm.PbmServerObjectRef) (id policy.ID, encrypted bool, err error) {
	key, disk, isDisk := strings.Cut(o.Key, ":")
	vm, ok := inventory.Lookup[inventory.VM](c.s.view, inventory.Ref(key))
	if !ok {
		return "", false, invalidArgument("entity", "there is no VM or disk %q", clip(o.Key))
	}
	if err := c.s.auth.Check(c.principal(), authz.Read, vm.Ref); err != nil {
		return "", false, err
	}
	if !isDisk {
		return vm.Profile, vm.Encrypted, nil
	}
	n, err := strconv.ParseInt(disk, 10, 32)
	d := vm.Disk(int32(n))
	if err != nil || d == nil {
		return "", false, invalidArgument("entity", "VM %q has no disk %q", vm.Name, clip(disk))
	}
	if d.Profile == "" {
		return vm.Profile, d.Encrypted, nil // it follows the VM (E6)
	}
	return d.Profile, d.Encrypted, nil
}

func (c *call) pbmQueryAssociatedProfile(q *pbm.PbmQueryAssociatedProfile) (*pbm.PbmQueryAssociatedProfileResponse, error) {
	res := &pbm.PbmQueryAssociatedProfileResponse{}
	id, _, err := c.associated(q.Entity)
	if id != "" {
		res.Returnval = []pbm.PbmProfileId{profileID(id)}
	}
	return res, err
}

func (c *call) pbmQueryAssociatedProfiles(q *pbm.PbmQueryAssociatedProfiles) (*pbm.PbmQueryAssociatedProfilesResponse, error) {
	res := &pbm.PbmQueryAssociatedProfilesResponse{}
	for _, e := range q.Entities {
		one := pbm.PbmQueryProfileResult{Object: e}
		if id, _, err := c.associated(e); err != nil {
			one.Fault = ptr(localized(err))
		} else if id != "" {
			one.ProfileId = []pbm.PbmProfileId{profileID(id)}
		}
		res.Returnval = append(res.Returnval, one)
	}
	return res, nil
}

func (c *call) pbmQueryAssociatedEntity(q *pbm.PbmQueryAssociatedEntity) (*pbm.PbmQueryAssociatedEntityResponse, error) {
	id, r := policy.ID(q.Profile.UniqueId), c.reader()
	res := &pbm.PbmQueryAssociatedEntityResponse{}
	want := func(kind pbm.PbmObjectType) bool { return q.EntityType == "" || q.EntityType == string(kind) }
	for _, ref := range c.s.view.All(inventory.KindVM) {
		vm, ok := inventory.Lookup[inventory.VM](c.s.view, ref)
		if !ok || r.visible(ref) == nil {
			continue
		}
		if vm.Profile == id && want(pbm.PbmObjectTypeVirtualMachine) {
			res.Returnval = append(res.Returnval, pbm.PbmServerObjectRef{ObjectType: string(pbm.PbmObjectTypeVirtualMachine), Key: string(ref)})
		}
		for i := range vm.Disks {
			if vm.Disks[i].Profile == id && want(pbm.PbmObjectTypeVirtualDiskId) {
				res.Returnval = append(res.Returnval, pbm.PbmServerObjectRef{
					ObjectType: string(pbm.PbmObjectTypeVirtualDiskId), Key: fmt.Sprintf("%s:%d", ref, vm.Disks[i].Key)})
			}
		}
	}
	return res, nil
}

// pbmQueryIOFilters tells which policies encrypt; clients decide by it whether a
// policy needs a key provider.
func (c *call) pbmQueryIOFilters(q *pbm.PbmQueryIOFiltersFromProfileId) (*pbm.PbmQueryIOFiltersFromProfileIdResponse, error) {
	res := &pbm.PbmQueryIOFiltersFromProfileIdResponse{}
	for _, id := range q.ProfileIds {
		one := pbm.PbmProfileToIofilterMap{Key: id}
		p, err := c.s.center.Policy(c.ctx, policy.ID(id.UniqueId))
		switch {
		case err != nil:
			one.Fault = ptr(localized(err))
		case p.Encrypts:
			one.Iofilters = []pbm.PbmIofilterInfo{{
				VibId: "mortise", FilterType: string(pbm.PbmIofilterInfoFilterTypeENCRYPTION),
			}}
		}
		res.Returnval = append(res.Returnval, one)
	}
	return res, nil
}

func (c *call) pbmDefaultProfile(*pbm.PbmQueryDefaultRequirementProfile) (*pbm.PbmQueryDefaultRequirementProfileResponse, error) {
	return &pbm.PbmQueryDefaultRequirementProfileResponse{Returnval: ptr(profileID(policy.DatastoreDefault))}, nil
}

// pbmCompliance compares what policies ask for with what is.
func (c *call) pbmCompliance(q *pbm.PbmFetchComplianceResult) (*pbm.PbmFetchComplianceResultResponse, error) {
	res := &pbm.PbmFetchComplianceResultResponse{}
	for _, e := range q.Entities {
		id, encrypted, err := c.associated(e)
		if err != nil {
			return nil, err
		}
		one := pbm.PbmComplianceResult{CheckTime: c.s.clock().UTC(), Entity: e, ComplianceStatus: string(pbm.PbmComplianceStatusNotApplicable)}
		if id != "" {
			p, err := c.s.center.Policy(c.ctx, id)
			if err != nil {
				return nil, err
			}
			one.Profile, one.Mismatch = ptr(profileID(id)), p.Encrypts != encrypted
			one.ComplianceStatus = string(pbm.PbmComplianceStatusCompliant)
			if one.Mismatch {
				one.ComplianceStatus = string(pbm.PbmComplianceStatusNonCompliant)
			}
		}
		res.Returnval = append(res.Returnval, one)
	}
	return res, nil
}

// pbmCheckRequirements: policies ask nothing of datastores, since hosts encrypt.
// All that can be reached are compatible.
func (c *call) pbmCheckRequirements(q *pbm.PbmCheckRequirements) (*pbm.PbmCheckRequirementsResponse, error) {
	hubs := q.HubsToSearch
	if len(hubs) == 0 {
		for _, ref := range c.s.view.All(inventory.KindDatastore) {
			hubs = append(hubs, pbm.PbmPlacementHub{HubType: "Datastore", HubId: string(ref)})
		}
	}
	res := &pbm.PbmCheckRequirementsResponse{}
	for _, h := range hubs {
		one := pbm.PbmPlacementCompatibilityResult{Hub: h}
		if d, ok := inventory.Lookup[inventory.Datastore](c.s.view, inventory.Ref(h.HubId)); !ok || !d.Accessible {
			one.Error = []types.LocalizedMethodFault{localized(fault(&types.InvalidState{}, "datastore %q cannot be reached", clip(h.HubId)))}
		}
		res.Returnval = append(res.Returnval, one)
	}
	return res, nil
}
