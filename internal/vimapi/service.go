package vimapi

import (
	"context"
	"strings"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/inventory"
	"mortise/internal/vimapi/vimext"
)

// singletons are the objects that there is one of, outside the inventory.
func singletons() []*kind {
	open := func(k *kind) *kind { k.open = true; return k }
	return append(pbmSingletons(), []*kind{
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
			"description": always(func(*reader) any {
				return types.TaskDescription{MethodInfo: []types.BaseElementDescription{}, State: []types.BaseElementDescription{}, Reason: []types.BaseTypeDescription{}}
			}),
		}),
		newSingleton("EventManager", "EventManager", map[string]prop{
			"maxCollector": always(func(*reader) any { return int32(maxOwned) }),
			"description":  always(func(*reader) any { return eventDescription() }),
			"latestEvent":  always((*reader).latestEvent),
		}),
		newSingleton("CryptoManagerKmip", "CryptoManager", cryptoProps()),
		newSingleton(vimext.ManagerType, vimext.ManagerType, nil),
		newSingleton("AuthorizationManager", "AuthorizationManager", map[string]prop{
			"roleList":      always((*reader).roles),
			"privilegeList": always(func(*reader) any { return privilegeList() }),
		}),
		newSingleton("OptionManager", "VpxSettings", map[string]prop{
			"supportedOption": always(func(*reader) any { return []types.OptionDef{} }),
			"setting":         always(func(*reader) any { return []types.BaseOptionValue{} }),
		}),
	}...)
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
		SearchIndex: one("SearchIndex", "SearchIndex"), EventManager: one("EventManager", "EventManager"),
		CryptoManager: one("CryptoManagerKmip", "CryptoManager"), AuthorizationManager: one("AuthorizationManager", "AuthorizationManager"),
		TaskManager: one("TaskManager", "TaskManager"),
		Setting:     one("OptionManager", "VpxSettings"),
	}
}

func (c *call) retrieveServiceContent(*types.RetrieveServiceContent) (*types.RetrieveServiceContentResponse, error) {
	return &types.RetrieveServiceContentResponse{Returnval: c.s.content()}, nil
}

// eventDescription tells the categories of events.
func eventDescription() types.EventDescription {
	var d types.EventDescription
	for _, c := range []string{"info", "warning", "error", "user"} {
		d.Category = append(d.Category, &types.ElementDescription{Description: types.Description{Label: c, Summary: c}, Key: c})
	}
	for name, category := range map[string]string{
		event.LoginSuccess: "info", event.LoginFailure: "warning", event.VMCreated: "info", event.VMRegistered: "info", event.VMReconfigured: "info",
		event.VMRemoved: "info", event.VMPoweredOn: "info", event.VMPoweredOff: "info", event.VMReset: "info", event.VMGuestShutdown: "info",
	} {
		key := strings.TrimPrefix(name, vimEvents)
		d.EventInfo = append(d.EventInfo, types.EventDescriptionEventDetail{Key: key, Category: category, Description: key})
	}
	return d
}

func (r *reader) latestEvent() any {
	list, err := r.s.center.Events(context.Background(), r.principal(), 0, 1)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return nil
	}
	return r.toEvent(&list[len(list)-1])
}

// roles lists the built-in roles; those of the administrator's own making are
// not shown yet.
func (r *reader) roles() any {
	list := []types.AuthorizationRole{}
	for _, role := range authz.BuiltinRoles() {
		list = append(list, types.AuthorizationRole{
			RoleId: role.ID, System: true, Name: role.Name, Info: &types.Description{Label: role.Label, Summary: role.Label}, Privilege: role.Privileges,
		})
	}
	return list
}

func privilegeList() []types.AuthorizationPrivilege {
	list := []types.AuthorizationPrivilege{}
	for _, id := range authz.Privileges() {
		group, name := "", id
		if i := strings.LastIndexByte(id, '.'); i >= 0 {
			group, name = id[:i], id[i+1:]
		}
		list = append(list, types.AuthorizationPrivilege{PrivId: id, Name: name, PrivGroupName: group})
	}
	return list
}
