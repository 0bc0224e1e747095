package vimapi

import (
	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/authz"
)

// method is one row of the API: what it is called and on what, what it needs,
// and who answers. center checks privileges that depend on arguments or records;
// the row has one only where it is the same for every call.
type method struct {
	namespace string
	object    string // managed object type, or a base type of several
	name      string
	privilege string // on the object, or on the root folder for what is not in the inventory
	anonymous bool   // may be called before log-in
	limit     int64  // bytes of the request; 0: bodyLimit, and anonymousLimit before log-in
	request   func() any
	serve     func(*call, any) (any, error)
}

// row makes a method of a handler.
func row[Q, R any](object, name, privilege string, f func(*call, *Q) (R, error)) method {
	return method{
		namespace: "vim25", object: object, name: name, privilege: privilege,
		request: func() any { return new(Q) },
		serve:   func(c *call, q any) (any, error) { return f(c, q.(*Q)) },
	}
}

func (m method) public() method { m.anonymous = true; return m }

func (m method) small() method { m.limit = anonymousLimit; return m }

func methodTable() map[string]*method {
	all := map[string]*method{}
	for _, rows := range [][]method{coreMethods(), vmMethods(), snapshotMethods(), taskMethods(), eventMethods(), cryptoMethods(), pbmMethods(), mortiseMethods()} {
		for _, m := range rows {
			all[m.namespace+" "+m.name] = &m
		}
	}
	return all
}

// coreMethods are sessions, the property collector, views and searches.
func coreMethods() []method {
	return []method{
		row("ServiceInstance", "RetrieveServiceContent", "", (*call).retrieveServiceContent).public().small(),
		row("ServiceInstance", "CurrentTime", "", (*call).currentTime).small(),

		row("SessionManager", "Login", "", (*call).login).public().small(),
		row("SessionManager", "Logout", "", (*call).logout).small(),
		row("SessionManager", "SessionIsActive", authz.SessionsTerminate, (*call).sessionIsActive).small(),
		row("SessionManager", "SetLocale", "", (*call).setLocale).small(),

		row("PropertyCollector", "RetrieveProperties", "", (*call).retrieveProperties).public(),
		row("PropertyCollector", "RetrievePropertiesEx", "", (*call).retrievePropertiesEx).public(),
		row("PropertyCollector", "ContinueRetrievePropertiesEx", "", (*call).continueRetrieveProperties).small(),
		row("PropertyCollector", "CancelRetrievePropertiesEx", "", (*call).cancelRetrieveProperties).small(),
		row("", "Fetch", "", (*call).fetch).public().small(),
		row("PropertyCollector", "CreatePropertyCollector", "", (*call).createPropertyCollector).small(),
		row("PropertyCollector", "DestroyPropertyCollector", "", (*call).destroyPropertyCollector).small(),
		row("PropertyCollector", "CreateFilter", "", (*call).createFilter),
		row("PropertyFilter", "DestroyPropertyFilter", "", (*call).destroyPropertyFilter).small(),
		row("PropertyCollector", "WaitForUpdates", "", (*call).waitForUpdates).small(),
		row("PropertyCollector", "WaitForUpdatesEx", "", (*call).waitForUpdatesEx).small(),
		row("PropertyCollector", "CheckForUpdates", "", (*call).checkForUpdates).small(),
		row("PropertyCollector", "CancelWaitForUpdates", "", (*call).cancelWaitForUpdates).small(),

		row("ViewManager", "CreateContainerView", "", (*call).createContainerView).small(),
		row("ViewManager", "CreateListView", "", (*call).createListView),
		row("ListView", "ModifyListView", "", (*call).modifyListView),
		row("ListView", "ResetListView", "", (*call).resetListView),
		row("", "DestroyView", "", (*call).destroyView).small(),

		row("SearchIndex", "FindByUuid", "", (*call).findByUUID).small(),
		row("SearchIndex", "FindAllByUuid", "", (*call).findAllByUUID).small(),
		row("SearchIndex", "FindByInventoryPath", "", (*call).findByInventoryPath).small(),
		row("SearchIndex", "FindChild", "", (*call).findChild).small(),
		row("SearchIndex", "FindByDatastorePath", "", (*call).findByDatastorePath).small(),
		row("SearchIndex", "FindByDnsName", "", (*call).findByDNSName).small(),
	}
}

// fetchRequest reads one property of any object. The method is not in vSphere's
// documentation, but pyVmomi and ovftool read every property with it.
type fetchRequest struct {
	This types.ManagedObjectReference `xml:"_this"`
	Prop string                       `xml:"prop"`
}

type fetchResponse struct {
	//lint:ignore SA5008 govmomi's XML package knows typeattr
	Returnval types.AnyType `xml:"returnval,omitempty,typeattr"`
}
