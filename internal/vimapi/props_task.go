package vimapi

import (
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"mortise/internal/inventory"
	"mortise/internal/task"
)

func taskProps() map[string]prop {
	return map[string]prop{"info": func(_ *reader, o object) any {
		switch t := o.of.(type) {
		case *task.Record:
			return taskInfo(t)
		case *localTask:
			return t.snapshot()
		}
		return nil
	}}
}

// taskInfo shows a task. Its stage and bytes are in the description and in the
// progress details, where clients of 8.0.1 and later see them.
func taskInfo(t *task.Record) types.TaskInfo {
	info := types.TaskInfo{
		Key: string(t.Ref), Task: moref(t.Ref), DescriptionId: t.Name, Name: methodOf(t.Name), EntityName: t.EntityName, Entity: reference(t.Entity),
		State: types.TaskInfoState(t.State), Cancelable: t.Cancelable, Cancelled: t.Cancelled,
		Reason:    &types.TaskReasonUser{UserName: t.User},
		QueueTime: t.Queued.UTC(), StartTime: optionalTime(t.Started), CompleteTime: optionalTime(t.Finished),
	}
	if t.Stage != "" {
		info.Description = &types.LocalizableMessage{Key: t.Name, Message: t.Stage}
		info.ProgressDetails = append(info.ProgressDetails, types.KeyAnyValue{Key: "stage", Value: t.Stage})
	}
	if t.TotalBytes > 0 {
		info.ProgressDetails = append(info.ProgressDetails,
			types.KeyAnyValue{Key: "doneBytes", Value: t.DoneBytes}, types.KeyAnyValue{Key: "totalBytes", Value: t.TotalBytes})
	}
	detail := func(key string, n int64) {
		if n > 0 && !t.Done() {
			info.ProgressDetails = append(info.ProgressDetails, types.KeyAnyValue{Key: key, Value: n})
		}
	}
	detail("bytesPerSecond", t.Rate)
	detail("secondsLeft", t.Left)
	detail("limitBytesPerSecond", t.Pace.Limit)
	if t.Pace.Paused && !t.Done() {
		info.ProgressDetails = append(info.ProgressDetails, types.KeyAnyValue{Key: "paused", Value: true})
	}
	if t.State == task.Running {
		info.Progress = t.Progress
	}
	if t.Error != nil {
		f, message := fromFault(t.Error)
		info.Error = &types.LocalizedMethodFault{Fault: f, LocalizedMessage: message}
	}
	if ref := reference(t.Result); ref != nil {
		info.Result = *ref
	} else if vm, id, ok := t.Result.Snapshot(); ok {
		info.Result = snapshotMoref(vm, id)
	}
	return info
}

// methodOf is the method that a task of a name came from; empty when it is none
// of vSphere's. pyVmomi fails at a name that it does not know.
func methodOf(name string) string {
	switch name {
	case "Folder.createVm":
		return "CreateVM_Task"
	case "Folder.registerVm":
		return "RegisterVM_Task"
	case "VirtualMachine.reconfigure":
		return "ReconfigVM_Task"
	case "VirtualMachine.powerOn":
		return "PowerOnVM_Task"
	case "VirtualMachine.powerOff":
		return "PowerOffVM_Task"
	case "VirtualMachine.reset":
		return "ResetVM_Task"
	case "VirtualMachine.createSnapshot":
		return "CreateSnapshot_Task"
	case "VirtualMachine.revertToCurrentSnapshot":
		return "RevertToCurrentSnapshot_Task"
	case "VirtualMachine.removeAllSnapshots":
		return "RemoveAllSnapshots_Task"
	case "VirtualMachine.consolidateDisks":
		return "ConsolidateVMDisks_Task"
	case "vm.Snapshot.revert":
		return "RevertToSnapshot_Task"
	case "vm.Snapshot.remove":
		return "RemoveSnapshot_Task"
	case "vm.Snapshot.rename":
		return "RenameSnapshot"
	case "VirtualMachine.destroy", "HostSystem.destroy":
		return "Destroy_Task"
	case "VirtualMachine.cryptoUnlock":
		return "CryptoUnlock_Task"
	case "Datacenter.powerOnVm":
		return "PowerOnMultiVM_Task"
	case "CryptoManagerKmip.retrieveKmipServersStatus":
		return "RetrieveKmipServersStatus_Task"
	}
	return ""
}

func optionalTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return ptr(t.UTC())
}

// recent lists the newest tasks that the reader may see, oldest first.
func (r *reader) recentTasks(most int) []inventory.Ref {
	all := r.view.All(inventory.KindTask)
	var refs []inventory.Ref
	for i := len(all) - 1; i >= 0 && len(refs) < most; i-- {
		if r.visible(all[i]) != nil {
			refs = append(refs, all[i])
		}
	}
	for i, j := 0, len(refs)-1; i < j; i, j = i+1, j-1 {
		refs[i], refs[j] = refs[j], refs[i]
	}
	return refs
}
