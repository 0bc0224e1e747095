package center

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"mortise/internal/authz"
	"mortise/internal/event"
	"mortise/internal/hostapi"
	"mortise/internal/inventory"
)

// Console opens the serial console of a running VM (I1). It ends with ctx, when
// it is closed, or when the guest ends.
func (c *Center) Console(ctx context.Context, p Principal, ref Ref) (Console, error) {
	vm, err := lookup[inventory.VM](c, p, ref)
	if err != nil {
		return nil, err
	}
	privileges := []string{authz.VMConsole}
	if vm.AnyEncrypted() {
		privileges = append(privileges, authz.CryptoAccess)
	}
	if err := c.checkAll(p, ref, privileges...); err != nil {
		return nil, err
	}
	if vm.Power != inventory.PoweredOn {
		return nil, wrongPower(vm, inventory.PoweredOn, "opening the console")
	}
	_, client, ok := c.links.connected(vm.Host)
	h, found := inventory.Lookup[inventory.Host](c.view, vm.Host)
	if !found {
		return nil, c.mustReach(vm.Host, "opening the console")
	}
	if !ok {
		return nil, hostDown(h, "opening the console")
	}
	r, err := c.vmRef(vm)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := client.Console(ctx)
	if err == nil {
		err = stream.Send(&hostapi.ConsoleData{Ref: r})
	}
	if err != nil {
		cancel()
		return nil, hostFault(h, vm, fmt.Sprintf("opening the console of VM %q", vm.Name), err)
	}
	c.events.Post(ctx, Event{Type: event.VMConsole, User: p.User, Entity: ref, Message: fmt.Sprintf("The console of VM %q was opened", vm.Name)})
	return &console{stream: stream, cancel: cancel, fail: func(err error) error {
		return hostFault(h, vm, fmt.Sprintf("the console of VM %q", vm.Name), err)
	}}, nil
}

// console makes a byte stream of the messages. One goroutine may read while
// another writes.
type console struct {
	stream hostapi.Host_ConsoleClient
	cancel context.CancelFunc
	fail   func(error) error

	rest    []byte
	writing sync.Mutex
}

func (c *console) Read(b []byte) (int, error) {
	for len(c.rest) == 0 {
		m, err := c.stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, c.fail(err)
		}
		c.rest = m.GetData()
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *console) Write(b []byte) (n int, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	for n < len(b) {
		part := b[n:min(len(b), n+32<<10)]
		// The stream may still hold the message when Send has returned.
		if err := c.stream.Send(&hostapi.ConsoleData{Data: append([]byte(nil), part...)}); err != nil {
			return n, c.fail(err)
		}
		n += len(part)
	}
	return n, nil
}

func (c *console) Close() error {
	c.cancel()
	return nil
}
