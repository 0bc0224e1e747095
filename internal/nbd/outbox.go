package nbd

import "sync"

// What a connection may have in hand, between the reading of a request and the
// sending of its reply: a client that does not take its replies is not read
// from any more.
const (
	maxInHand      = 1024
	maxInHandBytes = 64 << 20
)

// Replies are sent when so many or so much of them wait, though there is more to
// read.
const (
	maxBatch      = 8
	maxBatchBytes = 64 << 10
)

// outbox holds finished requests until their replies are sent, and counts all
// that are in hand.
type outbox struct {
	mu      sync.Mutex
	sent    sync.Cond // signalled when something was sent
	queue   []*request
	waits   int        // bytes of the replies in queue
	spare   []*request // a former queue, empty
	list    [][]byte   // what the sender sends
	sending bool       // one worker is at it
	broken  bool       // the client takes nothing more
	n       int        // requests in hand
	bytes   int        // of their buffers
	free    []*request
}

func (o *outbox) init() { o.sent.L = &o.mu }

// take makes a request of h.
func (c *conn) take(h header) *request {
	o := &c.out
	o.mu.Lock()
	defer o.mu.Unlock()
	var r *request
	if n := len(o.free); n > 0 {
		r, o.free = o.free[n-1], o.free[:n-1]
	} else {
		r = newRequest()
	}
	o.n++
	r.reset(h)
	return r
}

// drop takes a request back that was not admitted.
func (c *conn) drop(r *request) {
	o := &c.out
	o.mu.Lock()
	defer o.mu.Unlock()
	o.n--
	o.free = append(o.free, r)
}

// admit gives r the place for its result, or its payload, when the connection
// has room for it.
func (c *conn) admit(r *request) error {
	if r.errno == 0 {
		switch r.cmd {
		case cmdRead, cmdWrite:
			r.cost = int(r.n)
		case cmdBlockStatus:
			r.cost = c.contexts.count() * statusSize
		}
	}
	c.makeRoom(r)
	if r.cost > 0 {
		r.buf = c.srv.pool.get(r.cost)
	}
	switch {
	case r.cmd != cmdWrite || r.n == 0:
		return nil
	case r.errno != 0:
		return c.discard(int(r.n))
	}
	return c.payload(r.buf.b[:r.n])
}

// makeRoom waits until the connection may have r in hand.
func (c *conn) makeRoom(r *request) {
	o := &c.out
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.n > 1 && (o.n > maxInHand || o.bytes+r.cost > maxInHandBytes) && !o.broken {
		if len(o.queue) > 0 && !o.sending {
			c.sendBatch()
		} else {
			o.sent.Wait()
		}
	}
	o.bytes += r.cost
}

// answer sends the reply to r at once, or with the next ones.
func (c *conn) answer(r *request, now bool) {
	o := &c.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if r.whole != nil && r.cmd == cmdRead && !r.silent && r.whole.finish(nil) {
		r.head[5] |= chunkDone // the last in the queue of all its pieces
		c.srv.wholes.Put(r.whole)
	}
	if len(r.tail) == 0 {
		c.release(r) // so that the next request gets the same, still in the CPU's cache
	}
	if r.silent {
		o.n--
		o.free = append(o.free, r)
		o.sent.Broadcast()
	} else {
		o.queue = append(o.queue, r)
		o.waits += len(r.tail)
	}
	if now || len(o.queue) >= maxBatch || o.waits >= maxBatchBytes {
		c.sendQueue()
	}
}

// flush makes sure that all replies are sent or about to be.
func (c *conn) flush() {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.sendQueue()
}

// sendQueue sends the queued replies, unless another worker is at it; that one
// then sends these too. The caller holds out.mu.
func (c *conn) sendQueue() {
	o := &c.out
	for len(o.queue) > 0 && !o.sending {
		c.sendBatch()
	}
}

// sendBatch sends what is queued now. The caller holds out.mu, which is released
// meanwhile, and nobody else sends.
func (c *conn) sendBatch() {
	o := &c.out
	o.sending = true
	batch := o.queue
	o.queue, o.waits = o.spare[:0], 0
	broken := o.broken
	o.mu.Unlock()
	if !broken {
		broken = c.send(batch) != nil
	}
	o.mu.Lock()
	for _, r := range batch {
		c.release(r)
	}
	if broken && !o.broken {
		o.broken = true
		c.w.Break()
	}
	o.n -= len(batch)
	o.free = append(o.free, batch...)
	clear(batch)
	o.spare = batch[:0]
	o.sending = false
	o.sent.Broadcast()
}

// release gives the buffer of r back. The caller holds out.mu.
func (c *conn) release(r *request) {
	if r.buf != nil {
		c.srv.pool.put(r.buf)
		c.out.bytes -= r.cost
		r.buf, r.tail = nil, nil
	}
}

// send writes a batch in as few system calls as possible.
func (c *conn) send(batch []*request) error {
	list := c.out.list[:0]
	for _, r := range batch {
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
