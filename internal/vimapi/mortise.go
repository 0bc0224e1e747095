package vimapi

import (
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/inventory"
	"mortise/internal/policy"
	"mortise/internal/task"
	"mortise/internal/vimapi/vimext"
)

// mortiseMethods are MortiseManager: what vSphere has no call for.
func mortiseMethods() []method {
	rows := []method{
		row(vimext.ManagerType, "RetrieveVMDetail", "", (*call).retrieveVMDetail),
		row(vimext.ManagerType, "RetrieveTaskDetail", "", (*call).retrieveTaskDetail),
		row(vimext.ManagerType, "RetrieveHostDetail", "", (*call).retrieveHostDetail),
		row(vimext.ManagerType, "RetrievePolicies", authz.ProfileView, (*call).retrievePolicies),
		row(vimext.ManagerType, "ClonePolicy", authz.ProfileUpdate, (*call).clonePolicy),
		row(vimext.ManagerType, "QueryKeys", authz.CryptoManageKeys, (*call).queryKeys),
		row(vimext.ManagerType, "CreateJoinToken", "", (*call).createJoinToken),
		row(vimext.ManagerType, "TrustKeyServer", authz.CryptoManageKeyServers, (*call).trustKeyServer),
		row(vimext.ManagerType, "RegisterVMFolder_Task", "", (*call).registerVMFolder),
		row(vimext.ManagerType, "SetTaskPace", "", (*call).setTaskPace),
	}
	for i := range rows {
		rows[i].limit = anonymousLimit
	}
	rows = append(rows, row(vimext.ManagerType, "EstimateReconfigVM", "", (*call).estimateReconfigVM)) // its spec may be long
	for i := range rows {
		rows[i].namespace = vimext.Namespace
	}
	return rows
}

func (c *call) retrieveVMDetail(q *vimext.RetrieveVMDetail) (*vimext.RetrieveVMDetailResponse, error) {
	r := c.reader()
	refs := q.VM
	if len(refs) == 0 {
		refs = morefs(c.s.view.All(inventory.KindVM))
	}
	var vms []*inventory.VM
	for _, m := range refs {
		vm, ok := inventory.Lookup[inventory.VM](c.s.view, ref(m))
		switch {
		case !ok && len(q.VM) > 0:
			return nil, objectNotFound(m)
		case !ok:
			continue
		}
		if err := c.s.auth.Check(c.principal(), authz.Read, vm.Ref); err != nil {
			if len(q.VM) > 0 {
				return nil, err
			}
			continue
		}
		vms = append(vms, vm)
	}
	d := detailer{c: c, r: r, policies: map[policy.ID]string{}, keys: map[inventory.KeyID]center.KeyInfo{}}
	if q.WithKeyState {
		d.ask(vms)
	}
	res := &vimext.RetrieveVMDetailResponse{}
	for _, vm := range vms {
		res.Returnval = append(res.Returnval, d.vm(vm))
	}
	return res, nil
}

// detailer writes the details of VMs, looking each policy and key up once.
type detailer struct {
	c        *call
	r        *reader
	policies map[policy.ID]string
	keys     map[inventory.KeyID]center.KeyInfo
}

// ask asks for the states of all keys. Who may not manage keys sees none.
func (d *detailer) ask(vms []*inventory.VM) {
	var keys []inventory.KeyID
	seen := map[inventory.KeyID]bool{}
	for _, vm := range vms {
		for _, k := range vm.Keys() {
			if !seen[k] {
				seen[k] = true
				keys = append(keys, k)
			}
		}
	}
	if len(keys) == 0 {
		return
	}
	infos, err := d.c.s.center.QueryKeys(d.c.ctx, d.c.principal(), keys)
	if err != nil {
		return
	}
	for _, info := range infos {
		d.keys[info.ID] = info
	}
}

func (d *detailer) policy(id policy.ID) string {
	if id == "" {
		return ""
	}
	name, known := d.policies[id]
	if !known {
		if p, err := d.c.s.center.Policy(d.c.ctx, id); err == nil {
			name = p.Name
		}
		d.policies[id] = name
	}
	return name
}

func (d *detailer) crypto(encrypted bool, key *inventory.KeyID, epoch uint64, profile policy.ID, conv *inventory.Conversion) vimext.CryptoDetail {
	out := vimext.CryptoDetail{Encrypted: encrypted, Epoch: int64(epoch), PolicyID: string(profile), PolicyName: d.policy(profile)}
	if key != nil {
		out.Provider, out.KeyID = key.Provider, key.Key
		info := d.keys[*key]
		out.KeyState, out.KeyProblem = info.State, info.Message
	}
	if conv != nil {
		out.Converting = &vimext.ConversionDetail{Kind: conv.Kind, BoundaryBytes: conv.BoundaryBytes}
		out.Target = optionalKeyID(conv.Target)
	}
	return out
}

func (d *detailer) vm(vm *inventory.VM) vimext.VMDetail {
	out := vimext.VMDetail{
		VM: moref(vm.Ref), Name: vm.Name, Host: reference(vm.Host), Path: d.r.vmPath(vm), Power: string(powerState(vm.Power)),
		PausedOnError: vm.PausedOnError, Problem: vm.Problem, CryptoState: vm.CryptoState, LockedReason: vm.LockedReason,
		MigrateEncryption: vm.MigrateEncryption, MissingKeys: keyIDs(vm.MissingKeys),
		Home: d.crypto(vm.Encrypted, vm.KeyID, vm.Epoch, vm.Profile, vm.Converting),
	}
	if h, ok := inventory.Lookup[inventory.Host](d.r.view, vm.Host); ok {
		out.HostName = h.Name
	}
	for i := range vm.Disks {
		k := &vm.Disks[i]
		out.Disks = append(out.Disks, vimext.DiskDetail{
			Key: k.Key, UUID: k.UUID, Controller: k.Controller, Path: d.r.onDatastore(vm.Datastore, k.Path), CapacityBytes: k.CapacityBytes,
			AllocatedBytes: k.AllocatedBytes, Thick: k.Thick, Cipher: k.Cipher, Crypto: d.crypto(k.Encrypted, k.KeyID, k.Epoch, k.Profile, k.Converting), Problem: k.Problem,
		})
	}
	return out
}

func (c *call) retrieveTaskDetail(q *vimext.RetrieveTaskDetail) (*vimext.RetrieveTaskDetailResponse, error) {
	r := c.reader()
	refs := q.Task
	if len(refs) == 0 {
		refs = morefs(r.recentTasks(100))
	}
	res := &vimext.RetrieveTaskDetailResponse{}
	for _, m := range refs {
		t, ok := inventory.Lookup[task.Record](c.s.view, ref(m))
		if !ok || r.visible(t.Ref) == nil {
			if len(q.Task) > 0 {
				return nil, objectNotFound(m)
			}
			continue
		}
		d := vimext.TaskDetail{
			Task: m, Name: t.Name, State: string(t.State), Stage: t.Stage, Progress: t.Progress, DoneBytes: t.DoneBytes, TotalBytes: t.TotalBytes,
			Rate: t.Rate, Left: t.Left, Paceable: t.Paceable, Paused: t.Pace.Paused, Limit: t.Pace.Limit, Undoing: t.Undoing,
			Started: optionalTime(t.Started), Finished: optionalTime(t.Finished), Cancelable: t.Cancelable, Cancelled: t.Cancelled,
		}
		if t.Error != nil {
			d.Error = t.Error.Message
		}
		res.Returnval = append(res.Returnval, d)
	}
	return res, nil
}

func (c *call) retrieveHostDetail(*vimext.RetrieveHostDetail) (*vimext.RetrieveHostDetailResponse, error) {
	r := c.reader()
	names := func(refs []inventory.Ref) (out []string) {
		for _, ref := range refs {
			if rec, ok := r.view.Get(ref); ok {
				out = append(out, rec.Self().Name)
			}
		}
		return out
	}
	res := &vimext.RetrieveHostDetailResponse{}
	for _, id := range c.s.view.All(inventory.KindHost) {
		h, ok := inventory.Lookup[inventory.Host](c.s.view, id)
		if !ok || c.s.auth.Check(c.principal(), authz.Read, id) != nil {
			continue
		}
		res.Returnval = append(res.Returnval, vimext.HostDetail{
			Host: moref(id), Name: h.Name, Address: h.Address, Connection: h.Connection, CryptoState: h.CryptoState, CryptoReasons: h.CryptoReasons,
			Version: h.Info.Version, Hypervisor: h.Info.Hypervisor, KVM: h.Info.KVM, AES: h.Info.AES, XTS: h.Info.XTS, CertThumbprint: h.CertThumbprint,
			HostKey: optionalKeyID(h.HostKey), VMs: int32(len(r.relations().vms[id])), Datastores: names(h.Datastores), Networks: names(h.Networks), Problem: h.Problem,
		})
	}
	return res, nil
}

func policyDetail(p policy.Policy) vimext.PolicyDetail {
	return vimext.PolicyDetail{ID: string(p.ID), Name: p.Name, Description: p.Description, Encrypts: p.Encrypts, Bundled: p.Bundled}
}

func (c *call) retrievePolicies(*vimext.RetrievePolicies) (*vimext.RetrievePoliciesResponse, error) {
	list, err := c.s.center.Policies(c.ctx, c.principal())
	res := &vimext.RetrievePoliciesResponse{}
	for _, p := range list {
		res.Returnval = append(res.Returnval, policyDetail(p))
	}
	return res, err
}

func (c *call) clonePolicy(q *vimext.ClonePolicy) (*vimext.ClonePolicyResponse, error) {
	p, err := c.s.center.ClonePolicy(c.ctx, c.principal(), policy.ID(q.ID), q.Name, q.Description)
	return &vimext.ClonePolicyResponse{Returnval: policyDetail(p)}, err
}

func (c *call) queryKeys(q *vimext.QueryKeys) (*vimext.QueryKeysResponse, error) {
	var keys []inventory.KeyID
	for _, k := range q.Key {
		keys = append(keys, fromKeyID(k))
	}
	infos, err := c.s.center.QueryKeys(c.ctx, c.principal(), keys)
	res := &vimext.QueryKeysResponse{}
	for _, k := range infos {
		res.Returnval = append(res.Returnval, vimext.KeyDetail{
			Key: keyID(k.ID), State: k.State, Available: k.Available, Reason: k.Reason, Message: k.Message, VMs: morefs(k.VMs), Hosts: morefs(k.Hosts),
		})
	}
	return res, err
}

func (c *call) createJoinToken(q *vimext.CreateJoinToken) (*vimext.CreateJoinTokenResponse, error) {
	if q.TTLSeconds < 0 || q.TTLSeconds > 365*24*3600 {
		return nil, invalidArgument("ttlSeconds", "a join token lives for at most a year, not %d seconds", q.TTLSeconds)
	}
	text, err := c.s.center.CreateJoinToken(c.ctx, c.principal(), q.Name, time.Duration(q.TTLSeconds)*time.Second)
	return &vimext.CreateJoinTokenResponse{Returnval: text}, err
}

func (c *call) trustKeyServer(q *vimext.TrustKeyServer) (*vimext.TrustKeyServerResponse, error) {
	return &vimext.TrustKeyServerResponse{}, c.s.center.TrustServerCertificate(c.ctx, c.principal(), q.Provider, q.Server, q.Certificate)
}

func (c *call) registerVMFolder(q *vimext.RegisterVMFolder_Task) (*vimext.RegisterVMFolder_TaskResponse, error) {
	t, err := c.register(q.Folder, q.Path, q.Name, q.Pool, q.Host, q.AcceptOlderEpoch)
	return &vimext.RegisterVMFolder_TaskResponse{Returnval: moref(t)}, err
}

func (c *call) register(folder types.ManagedObjectReference, path, name string, pool, host *types.ManagedObjectReference, older bool) (inventory.Ref, error) {
	return c.s.center.RegisterVM(c.ctx, c.principal(), center.RegisterVMSpec{
		Path: path, Name: name, Folder: ref(folder), Host: optionalRef(host), Pool: optionalRef(pool), AcceptOlderEpoch: older,
	})
}

func (c *call) setTaskPace(q *vimext.SetTaskPace) (*vimext.SetTaskPaceResponse, error) {
	err := c.s.center.SetTaskPace(c.ctx, c.principal(), ref(q.Task), center.PaceChange{Limit: q.Limit, Paused: q.Paused})
	return &vimext.SetTaskPaceResponse{}, err
}

func (c *call) estimateReconfigVM(q *vimext.EstimateReconfigVM) (*vimext.EstimateReconfigVMResponse, error) {
	vm, spec, err := c.changeOf(q.VM, &q.Spec)
	if err != nil {
		return nil, err
	}
	e, err := c.s.center.EstimateReconfigure(c.ctx, c.principal(), vm.Ref, spec)
	if err != nil {
		return nil, err
	}
	res := &vimext.EstimateReconfigVMResponse{Returnval: vimext.Estimate{Bytes: e.Bytes, IdleSeconds: e.Idle.Seconds(), BusySeconds: e.Busy.Seconds()}}
	for _, d := range e.Disks {
		res.Returnval.Disks = append(res.Returnval.Disks, vimext.DiskEstimate{Key: d.Key, Controller: d.Controller, Kind: d.Kind, Bytes: d.Bytes,
			BytesPerSecond: d.Rate, IdleSeconds: d.Idle.Seconds(), BusySeconds: d.Busy.Seconds()})
	}
	return res, nil
}
