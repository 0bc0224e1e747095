package nbd

import "sync"

// What a connection may have in hand, between the reading of a request and the
// sending of its reply: a client that does not take its replies is not read
// from any more.
const (
	maxInHand      = 128
	maxInHandBytes = 64 << 20
)

// outbox holds finished requests until their replies are sent, and counts all
// that are in hand.
type outbox struct {
	mu      sync.Mutex
	room    sync.Cond // signalled when something was sent
	queue   []*request
	spare   []*request // a former queue, empty
	list    [][]byte   // what the sender sends
	sending bool
	broken  bool // the client takes nothing more
	n       int  // requests in hand
	bytes   int  // of their buffers
	free    []*request
}

func (o *outbox) init() { o.room.L = &o.mu }

// admit makes a request of h: checked, and with its payload or a place for its
// result.
func (c *conn) admit(h header) (*request, error) {
	o := &c.out
	o.mu.Lock()
	var r *request
	if n := len(o.free); n > 0 {
		r, o.free = o.free[n-1], o.free[:n-1]
	} else {
		r = newRequest()
	}
	o.n++
	o.mu.Unlock()

	r.header = h
	r.errno, r.reason, r.dropped = 0, "", false
	r.extents, r.covered, r.cost = 0, 0, 0
	c.check(r)
	if r.errno == 0 {
		switch h.cmd {
		case cmdRead, cmdWrite:
			r.cost = int(h.n)
		case cmdBlockStatus:
			r.cost = 4 + 8*maxExtents
		}
	}
	o.mu.Lock()
	for o.n > 1 && (o.n > maxInHand || o.bytes+r.cost > maxInHandBytes) && !o.broken {
		if len(o.queue) > 0 && !o.sending {
			o.mu.Unlock()
			c.flush()
			o.mu.Lock()
			continue
		}
		o.room.Wait()
	}
	o.bytes += r.cost
	o.mu.Unlock()
	if r.cost > 0 {
		r.buf = c.srv.pool.get(r.cost)
	}
	switch {
	case h.cmd != cmdWrite || h.n == 0:
		return r, nil
	case r.errno != 0:
		return r, c.discard(int(h.n))
	}
	return r, c.payload(r.buf.b[:h.n])
}

// answer queues the reply to r and returns how many wait.
func (c *conn) answer(r *request) int {
	o := &c.out
	o.mu.Lock()
	o.queue = append(o.queue, r)
	n := len(o.queue)
	o.mu.Unlock()
	return n
}

// flush sends the queued replies, unless another worker is at it; that one
// then sends these too.
func (c *conn) flush() {
	o := &c.out
	o.mu.Lock()
	for len(o.queue) > 0 && !o.sending {
		o.sending = true
		batch := o.queue
		o.queue = o.spare[:0]
		broken := o.broken
		o.mu.Unlock()
		if !broken {
			broken = c.send(batch) != nil
		}
		bytes := 0
		for _, r := range batch {
			bytes += r.cost
			if r.buf != nil {
				c.srv.pool.put(r.buf)
				r.buf, r.tail = nil, nil
			}
		}
		o.mu.Lock()
		if broken && !o.broken {
			o.broken = true
			c.w.Break()
		}
		o.bytes -= bytes
		o.n -= len(batch)
		o.free = append(o.free, batch...)
		clear(batch)
		o.spare = batch[:0]
		o.sending = false
		o.room.Broadcast()
	}
	o.mu.Unlock()
}

// send writes a batch in as few system calls as possible.
func (c *conn) send(batch []*request) error {
	list := c.out.list[:0]
	for _, r := range batch {
		if r.dropped {
			continue
		}
		list = append(list, r.head[:r.headLen])
		if len(r.tail) > 0 {
			list = append(list, r.tail)
		}
	}
	c.out.list = list
	err := c.w.Writev(list)
	clear(list)
	return err
}
