package vimapi

import (
	"context"
	"slices"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/center"
	"mortise/internal/inventory"
	"mortise/internal/task"
)

// cryptoMethods are the CryptoManagerKmip: key providers and keys. center checks
// the privileges of each; the rows say the static ones once more.
func cryptoMethods() []method {
	on := "CryptoManagerKmip"
	return []method{
		row(on, "RegisterKmipServer", authz.CryptoManageKeyServers, (*call).registerKmipServer).small(),
		row(on, "UpdateKmipServer", authz.CryptoManageKeyServers, (*call).updateKmipServer).small(),
		row(on, "RemoveKmipServer", authz.CryptoManageKeyServers, (*call).removeKmipServer).small(),
		row(on, "RegisterKmsCluster", authz.CryptoManageKeyServers, (*call).registerKmsCluster).small(),
		row(on, "UnregisterKmsCluster", authz.CryptoManageKeyServers, (*call).unregisterKmsCluster).small(),
		row(on, "ListKmipServers", authz.CryptoReadKeyServersInfo, (*call).listKmipServers).small(),
		row(on, "ListKmsClusters", authz.CryptoReadKeyServersInfo, (*call).listKmsClusters).small(),
		row(on, "RetrieveKmipServersStatus_Task", authz.CryptoReadKeyServersInfo, (*call).retrieveKmipServersStatus),
		row(on, "RetrieveKmipServerCert", authz.CryptoReadKeyServersInfo, (*call).retrieveKmipServerCert).small(),
		row(on, "IsKmsClusterActive", authz.CryptoReadKeyServersInfo, (*call).isKmsClusterActive).small(),
		row(on, "UploadKmipServerCert", authz.CryptoManageKeyServers, (*call).uploadKmipServerCert).small(),
		row(on, "GenerateSelfSignedClientCert", authz.CryptoManageKeyServers, (*call).generateSelfSignedClientCert).small(),
		row(on, "RetrieveSelfSignedClientCert", authz.CryptoManageKeyServers, (*call).retrieveSelfSignedClientCert).small(),
		row(on, "UpdateSelfSignedClientCert", authz.CryptoManageKeyServers, (*call).updateSelfSignedClientCert).small(),
		row(on, "GenerateClientCsr", authz.CryptoManageKeyServers, (*call).generateClientCsr).small(),
		row(on, "RetrieveClientCsr", authz.CryptoManageKeyServers, (*call).retrieveClientCsr).small(),
		row(on, "UpdateKmsSignedCsrClientCert", authz.CryptoManageKeyServers, (*call).updateKmsSignedCsrClientCert).small(),
		row(on, "RetrieveClientCert", authz.CryptoManageKeyServers, (*call).retrieveClientCert).small(),
		row(on, "UploadClientCert", authz.CryptoManageKeyServers, (*call).uploadClientCert).small(),
		row(on, "MarkDefault", authz.CryptoManageKeyServers, (*call).markDefault).small(),
		row(on, "SetDefaultKmsCluster", authz.CryptoManageKeyServers, (*call).setDefaultKmsCluster).small(),
		row(on, "GetDefaultKmsCluster", "", (*call).getDefaultKmsCluster).small(),
		row(on, "GenerateKey", authz.CryptoManageKeys, (*call).generateKey).small(),
		row(on, "QueryCryptoKeyStatus", authz.CryptoManageKeys, (*call).queryCryptoKeyStatus),
		row(on, "ListKeys", authz.CryptoManageKeys, (*call).listKeys).small(),
	}
}

func cryptoProps() map[string]prop {
	return map[string]prop{
		"enabled": always(func(r *reader) any {
			found := false
			inventory.Each(r.view, func(h *inventory.Host) bool {
				found = found || h.CryptoState != inventory.HostIncapable
				return !found
			})
			return found
		}),
		"kmipServers": always(func(r *reader) any {
			list, err := r.s.center.ListProviders(r.s.ctx, r.principal())
			if err != nil {
				return err
			}
			return clusterInfos(list, true)
		}),
	}
}

func provider(id types.KeyProviderId) string { return id.Id }

func kmipServer(i types.KmipServerInfo) center.KmipServer {
	return center.KmipServer{
		Name: i.Name, Address: i.Address, Port: i.Port, Protocol: i.Protocol, User: i.UserName, ProxyAddress: i.ProxyAddress, ProxyPort: i.ProxyPort,
		Timeout: i.Timeout, NBIO: i.Nbio,
	}
}

func clusterInfos(list []center.ProviderInfo, servers bool) []types.KmipClusterInfo {
	out := []types.KmipClusterInfo{}
	for _, p := range list {
		info := types.KmipClusterInfo{
			ClusterId: types.KeyProviderId{Id: p.ID}, UseAsDefault: p.Default, ManagementType: p.Kind, UseAsEntityDefault: morefs(p.DefaultFor),
		}
		for _, s := range p.Servers {
			if !servers {
				break
			}
			info.Servers = append(info.Servers, types.KmipServerInfo{
				Name: s.Name, Address: s.Address, Port: s.Port, Protocol: s.Protocol, UserName: s.User, ProxyAddress: s.ProxyAddress, ProxyPort: s.ProxyPort,
				Timeout: s.Timeout, Nbio: s.NBIO,
			})
		}
		out = append(out, info)
	}
	return out
}

// serverSpec refuses a password: log-in at a KMS is by client certificate, and a
// password would have to be kept.
func serverSpec(s types.KmipServerSpec) (center.KmipServer, error) {
	if s.Password != "" {
		return center.KmipServer{}, notSupported("key servers are logged in to with a client certificate, not with a password; leave it out")
	}
	return kmipServer(s.Info), nil
}

func (c *call) registerKmipServer(q *types.RegisterKmipServer) (*types.RegisterKmipServerResponse, error) {
	s, err := serverSpec(q.Server)
	if err != nil {
		return nil, err
	}
	return &types.RegisterKmipServerResponse{}, c.s.center.RegisterKmipServer(c.ctx, c.principal(), provider(q.Server.ClusterId), s)
}

func (c *call) updateKmipServer(q *types.UpdateKmipServer) (*types.UpdateKmipServerResponse, error) {
	s, err := serverSpec(q.Server)
	if err != nil {
		return nil, err
	}
	return &types.UpdateKmipServerResponse{}, c.s.center.UpdateKmipServer(c.ctx, c.principal(), provider(q.Server.ClusterId), s)
}

func (c *call) removeKmipServer(q *types.RemoveKmipServer) (*types.RemoveKmipServerResponse, error) {
	return &types.RemoveKmipServerResponse{}, c.s.center.RemoveKmipServer(c.ctx, c.principal(), provider(q.ClusterId), q.ServerName)
}

func (c *call) registerKmsCluster(q *types.RegisterKmsCluster) (*types.RegisterKmsClusterResponse, error) {
	switch types.KmipClusterInfoKmsManagementType(q.ManagementType) {
	case "", types.KmipClusterInfoKmsManagementTypeVCenter:
	default:
		return nil, notSupported("key providers of the type %q are not supported yet; use a standard one (vCenter)", clip(q.ManagementType))
	}
	return &types.RegisterKmsClusterResponse{}, c.s.center.RegisterProvider(c.ctx, c.principal(), provider(q.ClusterId))
}

func (c *call) unregisterKmsCluster(q *types.UnregisterKmsCluster) (*types.UnregisterKmsClusterResponse, error) {
	return &types.UnregisterKmsClusterResponse{}, c.s.center.RemoveProvider(c.ctx, c.principal(), provider(q.ClusterId))
}

func (c *call) listKmipServers(q *types.ListKmipServers) (*types.ListKmipServersResponse, error) {
	list, err := c.s.center.ListProviders(c.ctx, c.principal())
	if err != nil {
		return nil, err
	}
	infos := clusterInfos(list, true)
	if q.Limit != nil && *q.Limit > 0 && int(*q.Limit) < len(infos) {
		infos = infos[:*q.Limit]
	}
	return &types.ListKmipServersResponse{Returnval: infos}, nil
}

func (c *call) listKmsClusters(q *types.ListKmsClusters) (*types.ListKmsClustersResponse, error) {
	list, err := c.s.center.ListProviders(c.ctx, c.principal())
	if err != nil {
		return nil, err
	}
	return &types.ListKmsClustersResponse{Returnval: clusterInfos(list, q.IncludeKmsServers != nil && *q.IncludeKmsServers)}, nil
}

// retrieveKmipServersStatus asks the servers of the named providers, or of all.
func (c *call) retrieveKmipServersStatus(q *types.RetrieveKmipServersStatus_Task) (*types.RetrieveKmipServersStatus_TaskResponse, error) {
	p := c.principal()
	asked := q.Clusters
	t, err := c.background("CryptoManagerKmip.retrieveKmipServersStatus", q.This, func(ctx context.Context) (any, error) {
		all, err := c.s.center.ListProviders(ctx, p)
		if err != nil {
			return nil, err
		}
		out := []types.CryptoManagerKmipClusterStatus{}
		for _, info := range all {
			i := slices.IndexFunc(asked, func(k types.KmipClusterInfo) bool { return k.ClusterId.Id == info.ID })
			if len(asked) > 0 && i < 0 {
				continue
			}
			var servers []types.KmipServerInfo
			if i >= 0 {
				servers = asked[i].Servers
			}
			st, err := c.s.clusterStatus(ctx, p, info, servers)
			if err != nil {
				return nil, err
			}
			out = append(out, st)
		}
		return out, nil
	})
	return &types.RetrieveKmipServersStatus_TaskResponse{Returnval: t}, err
}

// clusterStatus is how a provider does: as well as its best server, because one
// suffices.
func (s *Server) clusterStatus(ctx context.Context, p center.Principal, info center.ProviderInfo, only []types.KmipServerInfo) (types.CryptoManagerKmipClusterStatus, error) {
	st := types.CryptoManagerKmipClusterStatus{
		ClusterId: types.KeyProviderId{Id: info.ID}, ManagementType: info.Kind, OverallStatus: types.ManagedEntityStatusRed,
		Servers: []types.CryptoManagerKmipServerStatus{},
	}
	list, err := s.center.ProviderStatus(ctx, p, info.ID)
	if err != nil {
		return st, err
	}
	if info.ClientCertThumbprint != "" {
		st.ClientCertInfo = &types.CryptoManagerKmipCertificateInfo{
			Fingerprint: info.ClientCertThumbprint, NotAfter: info.ClientCertNotAfter.UTC(), CheckTime: s.clock().UTC(),
			SecondsBeforeExpire: s.secondsTo(info.ClientCertNotAfter),
		}
	}
	rank := map[types.ManagedEntityStatus]int{types.ManagedEntityStatusRed: 0, types.ManagedEntityStatusYellow: 1, types.ManagedEntityStatusGreen: 2}
	worst := types.ManagedEntityStatusGreen
	for _, one := range list {
		if len(only) > 0 && !slices.ContainsFunc(only, func(k types.KmipServerInfo) bool { return k.Name == one.Server }) {
			continue
		}
		n := types.CryptoManagerKmipServerStatus{
			Name: one.Server, Status: types.ManagedEntityStatus(one.State), ConnectionStatus: one.Description,
			ClientTrustServer: ptr(one.ServerTrusted), ServerTrustClient: ptr(one.ClientTrusted),
		}
		if one.ServerThumbprint != "" {
			n.CertInfo = &types.CryptoManagerKmipCertificateInfo{
				Fingerprint: one.ServerThumbprint, NotAfter: one.ServerCertNotAfter.UTC(), CheckTime: s.clock().UTC(),
				SecondsBeforeExpire: s.secondsTo(one.ServerCertNotAfter),
			}
		}
		if rank[n.Status] > rank[st.OverallStatus] {
			st.OverallStatus = n.Status
		}
		if rank[n.Status] < rank[worst] {
			worst = n.Status
		}
		st.Servers = append(st.Servers, n)
	}
	if st.OverallStatus == types.ManagedEntityStatusGreen && worst != types.ManagedEntityStatusGreen {
		st.OverallStatus = types.ManagedEntityStatusYellow
	}
	return st, nil
}

func (c *call) retrieveKmipServerCert(q *types.RetrieveKmipServerCert) (*types.RetrieveKmipServerCertResponse, error) {
	id, p := provider(q.KeyProvider), c.principal()
	text, thumbprint, err := c.s.center.FetchServerCertificate(c.ctx, p, id, q.Server.Name)
	if task.Is(err, task.NotFound) && q.Server.Address != "" { // a server that is still to be registered
		text, thumbprint, err = c.s.center.FetchCertificateAt(c.ctx, p, kmipServer(q.Server))
	}
	if err != nil {
		return nil, err
	}
	res := &types.RetrieveKmipServerCertResponse{}
	res.Returnval.Certificate = text
	res.Returnval.CertInfo = c.s.certificateInfo(text, thumbprint)
	if list, err := c.s.center.ListProviders(c.ctx, p); err == nil {
		for _, info := range list {
			if info.ID == id {
				res.Returnval.ClientTrustServer = ptr(slices.ContainsFunc(info.TrustedThumbprints, func(t string) bool { return strings.EqualFold(t, thumbprint) }))
			}
		}
	}
	return res, nil
}

func (c *call) isKmsClusterActive(q *types.IsKmsClusterActive) (*types.IsKmsClusterActiveResponse, error) {
	p := c.principal()
	var id string
	if q.Cluster != nil {
		id = q.Cluster.Id
	} else {
		var ok bool
		var err error
		if id, ok, err = c.s.center.DefaultProvider(c.ctx, p, inventory.RootFolder, false); err != nil || !ok {
			return &types.IsKmsClusterActiveResponse{}, err
		}
	}
	list, err := c.s.center.ProviderStatus(c.ctx, p, id)
	res := &types.IsKmsClusterActiveResponse{}
	for _, s := range list {
		res.Returnval = res.Returnval || s.State != "red"
	}
	return res, err
}

// uploadKmipServerCert confirms a certificate for all servers of a provider;
// vSphere's call names no server.
func (c *call) uploadKmipServerCert(q *types.UploadKmipServerCert) (*types.UploadKmipServerCertResponse, error) {
	return &types.UploadKmipServerCertResponse{}, c.s.center.TrustServerCertificate(c.ctx, c.principal(), provider(q.Cluster), "", q.Certificate)
}

func (c *call) generateSelfSignedClientCert(q *types.GenerateSelfSignedClientCert) (*types.GenerateSelfSignedClientCertResponse, error) {
	text, err := c.s.center.GenerateSelfSignedClientCert(c.ctx, c.principal(), provider(q.Cluster))
	return &types.GenerateSelfSignedClientCertResponse{Returnval: text}, err
}

func (c *call) retrieveSelfSignedClientCert(q *types.RetrieveSelfSignedClientCert) (*types.RetrieveSelfSignedClientCertResponse, error) {
	text, err := c.s.center.RetrieveSelfSignedClientCert(c.ctx, c.principal(), provider(q.Cluster))
	return &types.RetrieveSelfSignedClientCertResponse{Returnval: text}, err
}

func (c *call) updateSelfSignedClientCert(q *types.UpdateSelfSignedClientCert) (*types.UpdateSelfSignedClientCertResponse, error) {
	return &types.UpdateSelfSignedClientCertResponse{}, c.s.center.UpdateSelfSignedClientCert(c.ctx, c.principal(), provider(q.Cluster), q.Certificate)
}

func (c *call) generateClientCsr(q *types.GenerateClientCsr) (*types.GenerateClientCsrResponse, error) {
	text, err := c.s.center.GenerateClientCSR(c.ctx, c.principal(), provider(q.Cluster))
	return &types.GenerateClientCsrResponse{Returnval: text}, err
}

func (c *call) retrieveClientCsr(q *types.RetrieveClientCsr) (*types.RetrieveClientCsrResponse, error) {
	text, err := c.s.center.RetrieveClientCSR(c.ctx, c.principal(), provider(q.Cluster))
	return &types.RetrieveClientCsrResponse{Returnval: text}, err
}

func (c *call) updateKmsSignedCsrClientCert(q *types.UpdateKmsSignedCsrClientCert) (*types.UpdateKmsSignedCsrClientCertResponse, error) {
	return &types.UpdateKmsSignedCsrClientCertResponse{}, c.s.center.UploadSignedCSR(c.ctx, c.principal(), provider(q.Cluster), q.Certificate)
}

func (c *call) retrieveClientCert(q *types.RetrieveClientCert) (*types.RetrieveClientCertResponse, error) {
	text, err := c.s.center.ClientCert(c.ctx, c.principal(), provider(q.Cluster))
	return &types.RetrieveClientCertResponse{Returnval: text}, err
}

func (c *call) uploadClientCert(q *types.UploadClientCert) (*types.UploadClientCertResponse, error) {
	return &types.UploadClientCertResponse{}, c.s.center.UploadClientCert(c.ctx, c.principal(), provider(q.Cluster), q.Certificate, q.PrivateKey)
}

func (c *call) markDefault(q *types.MarkDefault) (*types.MarkDefaultResponse, error) {
	return &types.MarkDefaultResponse{}, c.s.center.SetDefaultProvider(c.ctx, c.principal(), provider(q.ClusterId), "")
}

// setDefaultKmsCluster sets the default of an entity, or the global one; no
// provider takes the default away.
func (c *call) setDefaultKmsCluster(q *types.SetDefaultKmsCluster) (*types.SetDefaultKmsClusterResponse, error) {
	var id string
	if q.ClusterId != nil {
		id = q.ClusterId.Id
	}
	entity := optionalRef(q.Entity)
	if q.Entity != nil && entity == "" {
		return nil, objectNotFound(*q.Entity)
	}
	return &types.SetDefaultKmsClusterResponse{}, c.s.center.SetDefaultProvider(c.ctx, c.principal(), id, entity)
}

func (c *call) getDefaultKmsCluster(q *types.GetDefaultKmsCluster) (*types.GetDefaultKmsClusterResponse, error) {
	entity := optionalRef(q.Entity)
	if q.Entity != nil && entity == "" {
		return nil, objectNotFound(*q.Entity)
	}
	exact := q.Entity != nil && (q.DefaultsToParent == nil || !*q.DefaultsToParent)
	id, ok, err := c.s.center.DefaultProvider(c.ctx, c.principal(), entity, exact)
	res := &types.GetDefaultKmsClusterResponse{}
	if ok {
		res.Returnval = &types.KeyProviderId{Id: id}
	}
	return res, err
}

// generateKey makes a key. As in vSphere, a key server that refuses is a result
// and no fault.
func (c *call) generateKey(q *types.GenerateKey) (*types.GenerateKeyResponse, error) {
	var id string
	if q.KeyProvider != nil {
		id = q.KeyProvider.Id
	}
	key, err := c.s.center.GenerateKey(c.ctx, c.principal(), id)
	if task.Is(err, task.ProviderDown) || task.Is(err, task.ProviderError) {
		return &types.GenerateKeyResponse{Returnval: types.CryptoKeyResult{
			KeyId: keyID(inventory.KeyID{Provider: id}), Reason: err.Error(), Fault: ptr(localized(err)),
		}}, nil
	}
	return &types.GenerateKeyResponse{Returnval: types.CryptoKeyResult{KeyId: keyID(key), Success: err == nil}}, err
}

// What QueryCryptoKeyStatus is asked to find out.
const (
	checkAvailable = 1
	checkVMs       = 2
	checkHosts     = 4
)

func (c *call) queryCryptoKeyStatus(q *types.QueryCryptoKeyStatus) (*types.QueryCryptoKeyStatusResponse, error) {
	var keys []inventory.KeyID
	for _, k := range q.KeyIds {
		keys = append(keys, fromKeyID(k))
	}
	infos, err := c.s.center.QueryKeys(c.ctx, c.principal(), keys)
	if err != nil {
		return nil, err
	}
	res := &types.QueryCryptoKeyStatusResponse{}
	for _, info := range infos {
		st := types.CryptoManagerKmipCryptoKeyStatus{KeyId: keyID(info.ID)}
		if q.CheckKeyBitMap&checkAvailable != 0 {
			st.KeyAvailable, st.Reason = ptr(info.Available), info.Reason
		}
		if q.CheckKeyBitMap&checkVMs != 0 {
			st.EncryptedVMs = morefs(info.VMs)
		}
		if q.CheckKeyBitMap&checkHosts != 0 {
			st.AffectedHosts = morefs(info.Hosts)
		}
		res.Returnval = append(res.Returnval, st)
	}
	return res, nil
}

// listKeys lists the keys that VMs and hosts of the inventory use.
func (c *call) listKeys(q *types.ListKeys) (*types.ListKeysResponse, error) {
	seen := map[inventory.KeyID]bool{}
	var keys []inventory.KeyID
	add := func(k inventory.KeyID) {
		if !seen[k] {
			seen[k] = true
			keys = append(keys, k)
		}
	}
	inventory.Each(c.s.view, func(vm *inventory.VM) bool {
		for _, k := range vm.Keys() {
			add(k)
		}
		return true
	})
	inventory.Each(c.s.view, func(h *inventory.Host) bool {
		if h.HostKey != nil {
			add(*h.HostKey)
		}
		return true
	})
	slices.SortFunc(keys, func(a, b inventory.KeyID) int { return strings.Compare(a.String(), b.String()) })
	if q.Limit != nil && *q.Limit > 0 && int(*q.Limit) < len(keys) {
		keys = keys[:*q.Limit]
	}
	return &types.ListKeysResponse{Returnval: keyIDs(keys)}, nil
}
