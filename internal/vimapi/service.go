package vimapi

import (
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/inventory"
)

// singletons are the objects that there is one of, outside the inventory.
func singletons() []*kind {
	open := func(k *kind) *kind { k.open = true; return k }
	return []*kind{
		open(newSingleton("ServiceInstance", "ServiceInstance", map[string]prop{
			"content":     always(func(r *reader) any { return r.s.content() }),
			"serverClock": always(func(r *reader) any { return r.s.clock().UTC() }),
			"capability": always(func(*reader) any {
				return types.Capability{ProvisioningSupported: true, MultiHostSupported: true}
			}),
		})),
		open(newSingleton("SessionManager", "SessionManager", sessionManagerProps())),
		newSingleton("ViewManager", "ViewManager", map[string]prop{
			"viewList": always(func(r *reader) any {
				refs := []types.ManagedObjectReference{}
				for _, v := range owned[*containerView](r.client) {
					refs = append(refs, v.ref)
				}
				return refs
			}),
		}),
		newSingleton("SearchIndex", "SearchIndex", nil),
		newSingleton("TaskManager", "TaskManager", map[string]prop{
			"recentTask":   always(func(r *reader) any { return morefs(r.recentTasks(200)) }),
			"maxCollector": always(func(*reader) any { return int32(maxOwned) }),
		}),
		newSingleton("OptionManager", "VpxSettings", map[string]prop{
			"supportedOption": always(func(*reader) any { return []types.OptionDef{} }),
			"setting":         always(func(*reader) any { return []types.BaseOptionValue{} }),
		}),
	}
}

func sessionManagerProps() map[string]prop {
	locales := []string{"en"}
	return map[string]prop{
		"currentSession": always(func(r *reader) any {
			if r.session == nil {
				return nil
			}
			return userSession(*r.session)
		}),
		"sessionList": always(func(r *reader) any {
			if r.session == nil {
				return nil
			}
			list := []types.UserSession{}
			all := r.s.auth.Check(r.principal(), authz.SessionsTerminate, inventory.RootFolder) == nil
			for _, s := range r.s.auth.Sessions() {
				if all || s.Key == r.session.Key {
					list = append(list, userSession(s))
				}
			}
			return list
		}),
		"defaultLocale":       always(func(*reader) any { return "en" }),
		"messageLocaleList":   always(func(*reader) any { return locales }),
		"supportedLocaleList": always(func(*reader) any { return locales }),
	}
}

func (s *Server) about() types.AboutInfo {
	return types.AboutInfo{
		Name: "Mortise center", FullName: "Mortise center " + s.opt.Version, Vendor: "Mortise", Version: s.opt.Version, Build: "0",
		LocaleVersion: "INTL", LocaleBuild: "000", OsType: "linux-x64",
		// Clients decide by these two what they may call.
		ProductLineId: "vpx", ApiType: "VirtualCenter",
		ApiVersion: newestVersion, InstanceUuid: s.opt.InstanceUUID,
	}
}

func (s *Server) content() types.ServiceContent {
	one := func(kind, id string) *types.ManagedObjectReference { return ptr(singleton(kind, id)) }
	return types.ServiceContent{
		RootFolder: moref(inventory.RootFolder), PropertyCollector: propertyCollectorRef(), About: s.about(),
		ViewManager: one("ViewManager", "ViewManager"), SessionManager: one("SessionManager", "SessionManager"),
		SearchIndex: one("SearchIndex", "SearchIndex"), TaskManager: one("TaskManager", "TaskManager"),
		Setting: one("OptionManager", "VpxSettings"),
	}
}

func (c *call) retrieveServiceContent(*types.RetrieveServiceContent) (*types.RetrieveServiceContentResponse, error) {
	return &types.RetrieveServiceContentResponse{Returnval: c.s.content()}, nil
}
