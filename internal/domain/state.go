package domain

import (
	"fmt"

	"github.com/digitalocean/go-libvirt"
)

// State is what a guest does.
type State int

// States.
const (
	Off           State = iota
	Running             // it has CPU time
	Paused              // stopped on request, or not begun
	PausedOnError       // stopped because a disk answered with an error; Resume
	ShuttingDown        // the guest is on its way down
)

func (s State) String() string {
	switch s {
	case Off:
		return "off"
	case Running:
		return "running"
	case Paused:
		return "paused"
	case PausedOnError:
		return "paused on a disk error"
	case ShuttingDown:
		return "shutting down"
	}
	return fmt.Sprintf("state %d", int(s))
}

// stateOf translates libvirt's state and reason.
func stateOf(state libvirt.DomainState, reason int32) State {
	switch state {
	case libvirt.DomainPaused, libvirt.DomainPmsuspended:
		if state == libvirt.DomainPaused && libvirt.DomainPausedReason(reason) == libvirt.DomainPausedIoerror {
			return PausedOnError
		}
		return Paused
	case libvirt.DomainShutdown:
		return ShuttingDown
	case libvirt.DomainShutoff, libvirt.DomainCrashed:
		return Off
	}
	return Running
}

// An Event says that a guest's state changed.
type Event struct {
	UUID   string
	State  State
	Reason string // in words, for the log; may be empty
}

// eventOf translates a life cycle event; ok is false for those that change no
// state.
func eventOf(m libvirt.DomainEventLifecycleMsg) (ev Event, ok bool) {
	ev.UUID = uuidText(m.Dom.UUID)
	switch libvirt.DomainEventType(m.Event) {
	case libvirt.DomainEventStarted, libvirt.DomainEventResumed:
		ev.State = Running
	case libvirt.DomainEventSuspended:
		ev.State = Paused
		if libvirt.DomainEventSuspendedDetailType(m.Detail) == libvirt.DomainEventSuspendedIoerror {
			ev.State, ev.Reason = PausedOnError, "a disk answered with an error"
		}
	case libvirt.DomainEventStopped:
		switch libvirt.DomainEventStoppedDetailType(m.Detail) {
		case libvirt.DomainEventStoppedShutdown:
			ev.Reason = "the guest shut down"
		case libvirt.DomainEventStoppedDestroyed:
			ev.Reason = "powered off"
		case libvirt.DomainEventStoppedCrashed:
			ev.Reason = "QEMU crashed"
		case libvirt.DomainEventStoppedMigrated:
			ev.Reason = "moved to another host"
		default:
			ev.Reason = "QEMU ended"
		}
	default:
		return ev, false
	}
	return ev, true
}
