"""Reads VMs as pyVmomi's users do: every property by attribute (Fetch), in bulk
with the property collector, and by waiting for updates (WaitForUpdates)."""

import os
import ssl
import sys

from pyVim.connect import Disconnect, SmartConnect
from pyVmomi import vim, vmodl

VMS = int(sys.argv[1])


def connect(user=None, password=None):
    return SmartConnect(
        host=os.environ["VI_HOST"], port=int(os.environ["VI_PORT"]),
        user=user or os.environ["VI_USER"], pwd=password or os.environ["VI_PASSWORD"],
        sslContext=ssl._create_unverified_context())


def fetched(obj, depth=2):
    """Reads every property of obj; a type error in any of them raises."""
    count = 0
    for info in obj._GetPropertyList():
        try:
            value = getattr(obj, info.name)
        except vmodl.fault.InvalidProperty:
            raise
        count += value is not None
    return count


def main():
    try:
        connect(password="wrong")
    except vim.fault.InvalidLogin as e:
        print("wrong password:", e.msg)
    else:
        raise SystemExit("a wrong password logged in")

    si = connect()
    content = si.RetrieveContent()
    print("about:", content.about.fullName, content.about.apiVersion)
    assert content.about.apiType == "VirtualCenter"

    view = content.viewManager.CreateContainerView(content.rootFolder, [], True)
    kinds = set()
    for obj in view.view:
        n = fetched(obj)
        kinds.add(type(obj).__name__)
        if isinstance(obj, vim.VirtualMachine):
            assert obj.runtime.faultToleranceState == "notConfigured", obj.runtime
            assert obj.config.hardware.device, obj.name
            assert obj.summary.config.name == obj.name
            assert obj.parent.name == "vm"
        assert n > 5, (obj, n)
    print("kinds:", " ".join(sorted(kinds)))
    view.Destroy()
    for manager in (content.sessionManager, content.taskManager, content.eventManager, content.cryptoManager, content.searchIndex,
                    content.viewManager, content.authorizationManager, content.setting, si):
        fetched(manager)
    assert content.cryptoManager.enabled is True

    # In bulk.
    view = content.viewManager.CreateContainerView(content.rootFolder, [vim.VirtualMachine], True)
    walk = vmodl.query.PropertyCollector.TraversalSpec(name="v", path="view", skip=False, type=vim.view.ContainerView)
    spec = vmodl.query.PropertyCollector.FilterSpec(
        objectSet=[vmodl.query.PropertyCollector.ObjectSpec(obj=view, skip=True, selectSet=[walk])],
        propSet=[vmodl.query.PropertyCollector.PropertySpec(type=vim.VirtualMachine, pathSet=["name", "runtime.powerState", "config.uuid"])])
    got = []
    result = content.propertyCollector.RetrievePropertiesEx([spec], vmodl.query.PropertyCollector.RetrieveOptions(maxObjects=2))
    while True:
        got += result.objects
        if not result.token:
            break
        result = content.propertyCollector.ContinueRetrievePropertiesEx(result.token)
    assert len(got) == VMS, len(got)
    assert all(len(o.propSet) == 3 for o in got), got
    vm = got[0].obj
    assert content.searchIndex.FindByUuid(None, vm.config.uuid, True) == vm
    assert content.searchIndex.FindByInventoryPath("Datacenter/vm/" + vm.name) == vm

    # By waiting, the old way.
    pc = content.propertyCollector
    f = pc.CreateFilter(spec, True)
    updates = pc.WaitForUpdates("")
    assert sum(len(s.objectSet) for s in updates.filterSet) == VMS
    task = vm.PowerOn()
    while True:
        updates = pc.WaitForUpdates(updates.version)
        changes = [(u.obj, c.name, c.val) for s in updates.filterSet for u in s.objectSet for c in u.changeSet]
        print("update:", changes)
        if (vm, "runtime.powerState", "poweredOn") in changes:
            break
    f.Destroy()
    from pyVim.task import WaitForTask
    WaitForTask(task)
    WaitForTask(vm.PowerOff())
    assert vm.runtime.powerState == "poweredOff"

    try:
        vm.PowerOff()
    except vim.fault.InvalidPowerState as e:
        print("refused:", e.msg)
    else:
        raise SystemExit("a VM that is off was powered off")
    Disconnect(si)
    try:
        content.rootFolder.name
    except vim.fault.NotAuthenticated:
        print("logged out")
    else:
        raise SystemExit("the session lived on")


main()
