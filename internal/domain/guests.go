package domain

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"
)

// Start makes and runs a guest. It fails with ErrAlreadyRunning, ErrNoNetwork or
// ErrUnavailable, or with libvirt's reason.
func (c *Conn) Start(ctx context.Context, spec Spec) error {
	err := c.start(ctx, spec)
	if err != nil {
		return fmt.Errorf("guest %s: %w", spec.UUID, err)
	}
	for _, n := range spec.Notes {
		c.cfg.Log.Warn("guest's hardware", "vm", spec.UUID, "note", n)
	}
	return nil
}

func (c *Conn) start(ctx context.Context, spec Spec) error {
	if err := spec.Validate(); err != nil {
		return err
	}
	id := uuid.MustParse(spec.UUID).String() // Validate parsed it
	kvm, err := c.usesKVM(ctx)
	if err != nil {
		return err
	}
	m := Machine{KVM: kvm}
	if spec.Firmware == EFI {
		if m.Firmware, err = FindOVMF(spec.SecureBoot); err != nil {
			return err
		}
	}
	text, err := XML(spec, m)
	if err != nil {
		return err
	}
	if st, err := c.State(ctx, id); err != nil {
		return err
	} else if st != Off {
		return fmt.Errorf("%w (%s)", ErrAlreadyRunning, st)
	}
	if err := c.checkNetworks(ctx, spec); err != nil {
		return err
	}
	c.expect(id)
	_, err = call(ctx, c, func(v *libvirt.Libvirt) (libvirt.Domain, error) { return v.DomainCreateXML(text, 0) })
	if err != nil {
		// Someone may have been quicker.
		if st, serr := c.State(ctx, id); serr == nil && st != Off && !errors.Is(err, ErrUnavailable) && ctx.Err() == nil {
			return fmt.Errorf("%w: %w", ErrAlreadyRunning, err)
		} else if serr == nil && st == Off {
			c.unexpect(id)
		}
		return fmt.Errorf("libvirt: %w", err)
	}
	return nil
}

func (c *Conn) checkNetworks(ctx context.Context, spec Spec) error {
	if !slices.ContainsFunc(spec.NICs, func(n NIC) bool { return n.Connected }) {
		return nil
	}
	nets, err := c.Networks(ctx)
	if err != nil {
		return err
	}
	var names []string
	for _, n := range nets {
		names = append(names, n.Name)
	}
	for _, n := range spec.NICs {
		if n.Connected && !slices.Contains(names, n.Network) {
			return fmt.Errorf("%w: %s uses %q, and this host's active networks are %q; define it (virsh net-define, net-start), choose another, or set %[2]s.startConnected to FALSE", ErrNoNetwork, n.Place, n.Network, names)
		}
	}
	return nil
}

// PowerOff pulls the plug. A guest that does not run is no error.
func (c *Conn) PowerOff(ctx context.Context, id string) error {
	err := c.onGuest(ctx, id, func(v *libvirt.Libvirt, d libvirt.Domain) error { return v.DomainDestroyFlags(d, 0) })
	if errors.Is(err, ErrNotRunning) {
		return nil
	}
	return err
}

// Shutdown presses the ACPI power button and does not wait. A guest without an
// ACPI driver ignores it.
func (c *Conn) Shutdown(ctx context.Context, id string) error {
	return c.onGuest(ctx, id, func(v *libvirt.Libvirt, d libvirt.Domain) error {
		return v.DomainShutdownFlags(d, libvirt.DomainShutdownAcpiPowerBtn)
	})
}

// Reset presses the reset button.
func (c *Conn) Reset(ctx context.Context, id string) error {
	return c.onGuest(ctx, id, func(v *libvirt.Libvirt, d libvirt.Domain) error { return v.DomainReset(d, 0) })
}

// Resume lets a paused guest go on; QEMU repeats the requests that failed. When
// the disk is not back yet the guest pauses again, so call it again, with a
// pause between: it changes nothing when the guest runs.
func (c *Conn) Resume(ctx context.Context, id string) error {
	return c.onGuest(ctx, id, func(v *libvirt.Libvirt, d libvirt.Domain) error {
		err := v.DomainResume(d)
		if err != nil {
			if state, _, serr := v.DomainGetState(d, 0); serr == nil && libvirt.DomainState(state) == libvirt.DomainRunning {
				return nil
			}
		}
		return err
	})
}

// State is what the guest does; Off when libvirt does not know it.
func (c *Conn) State(ctx context.Context, id string) (State, error) {
	st := Off
	err := c.onGuest(ctx, id, func(v *libvirt.Libvirt, d libvirt.Domain) error {
		state, reason, err := v.DomainGetState(d, 0)
		if err == nil {
			st = stateOf(libvirt.DomainState(state), reason)
		}
		return err
	})
	if errors.Is(err, ErrNotRunning) {
		return Off, nil
	}
	return st, err
}

// onGuest calls f with a guest's domain; ErrNotRunning when there is none.
func (c *Conn) onGuest(ctx context.Context, id string, f func(*libvirt.Libvirt, libvirt.Domain) error) error {
	u, err := uuid.Parse(id)
	if err != nil {
		return fmt.Errorf("guest %.64q: want a UUID of 8-4-4-4-12 hexadecimal digits", id)
	}
	_, err = call(ctx, c, func(v *libvirt.Libvirt) (struct{}, error) {
		d, err := v.DomainLookupByUUID(libvirt.UUID(u))
		if err == nil {
			err = f(v, d)
		}
		return struct{}{}, err
	})
	switch {
	case err == nil:
		return nil
	case libvirt.IsNotFound(err):
		return fmt.Errorf("guest %s: %w", id, ErrNotRunning)
	}
	return fmt.Errorf("guest %s: %w", id, err)
}

// Running lists the UUIDs of our guests that libvirt has, in whatever state.
// Domains that others made are not among them.
func (c *Conn) Running(ctx context.Context) (uuids []string, err error) {
	s, err := c.current(ctx)
	if err != nil {
		return nil, err
	}
	guests, err := listOurs(ctx, s)
	for id := range guests {
		uuids = append(uuids, id)
	}
	slices.Sort(uuids)
	return uuids, err
}

func listOurs(ctx context.Context, s *session) (map[string]State, error) {
	return callOn(ctx, s, func(v *libvirt.Libvirt) (map[string]State, error) {
		list, _, err := v.ConnectListAllDomains(1, libvirt.ConnectListDomainsActive)
		if err != nil {
			return nil, err
		}
		guests := map[string]State{}
		for _, d := range list {
			if !ours(s, d) {
				continue
			}
			state, reason, err := v.DomainGetState(d, 0)
			if libvirt.IsNotFound(err) {
				continue // it ended since
			} else if err != nil {
				return nil, err
			}
			guests[uuidText(d.UUID)] = stateOf(libvirt.DomainState(state), reason)
		}
		return guests, nil
	})
}

// ours tells whether a domain carries our mark.
func ours(s *session, d libvirt.Domain) bool {
	_, err := s.virt.DomainGetMetadata(d, int32(libvirt.DomainMetadataElement), libvirt.OptString{namespace}, libvirt.DomainAffectCurrent)
	return err == nil
}

func uuidText(u libvirt.UUID) string { return uuid.UUID(u).String() }
