package nbd

import (
	"sync"
	"sync/atomic"
	"time"
)

// The workers of a connection take turns: the one with the token reads the next
// request. A request that is quick is served by the worker that read it, which
// keeps the token, and its reply waits for others until there is nothing more
// to read: then a burst of small requests costs one read and one write on the
// socket and no switch of goroutines, and large requests go through one buffer
// that stays in the CPU's cache. Before a request that may take long the worker
// passes the token on, so that requests run in parallel and replies leave as
// they finish. What turns out to be slow loses the token to the guard.
type crew struct {
	token   chan struct{}  // holds the token while nobody does
	done    chan struct{}  // closed when nothing more is read
	idle    atomic.Int32   // workers that wait for the token
	workers sync.WaitGroup // and the guard

	// wary counts the requests to come that are not trusted to be quick.
	wary atomic.Int32

	// kept tells what the holder of the token does instead of reading: 0 for
	// nothing, else a number that is even at the device, and odd while
	// sending. Who swaps it to 0 has the token.
	kept   atomic.Uint64
	asleep atomic.Bool   // the guard sees no need to look
	wake   chan struct{} // it does again

	// What the holder of the token knows.
	turns   uint64 // numbers for kept
	running int    // workers started
	err     error  // why reading ended
}

const (
	// Serving is slow if it takes longer than a device answers that has the
	// data in memory. Then for the next waryFor requests the token is passed
	// on, so that the device gets all that the client wants of it at once.
	slowService = 40 * time.Microsecond // and
	slowPerKiB  = time.Microsecond
	waryFor     = 16

	// The guard looks so often, and takes the token if it sees the same twice.
	guardEvery = time.Millisecond
	// So long after the last request the guard goes to sleep.
	guardSleep = 100 * time.Millisecond
)

func newCrew() crew {
	return crew{token: make(chan struct{}, 1), done: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// transmit serves requests until reading ends and the last is answered.
func (c *conn) transmit() {
	c.workers.Add(1)
	go c.guard()
	c.passToken()
	c.workers.Wait()
	c.flush()
}

func (c *conn) work() {
	defer c.workers.Done()
	for c.awaitToken() {
		for c.turn() {
		}
	}
}

// turn serves the next request and reports whether the worker still has the
// token.
func (c *conn) turn() bool {
	r, err := c.next()
	if err != nil {
		c.err = err
		close(c.done)
		return false
	}
	if !c.quick(r) {
		c.passToken()
		c.serve(r)
		c.answer(r, true)
		return false
	}
	c.turns += 2
	n := c.turns
	c.kept.Store(n)
	if c.asleep.Load() && c.asleep.CompareAndSwap(true, false) {
		c.wake <- struct{}{}
	}
	c.serve(r)
	held := c.kept.CompareAndSwap(n, n+1)
	c.answer(r, !held)
	if !held {
		return false
	}
	if !c.kept.CompareAndSwap(n+1, 0) {
		c.flush() // the new holder may be waiting for the client
		return false
	}
	return true
}

// quick reports whether r is expected to take less than it is worth to wake
// another worker.
func (c *conn) quick(r *request) bool {
	return r.errno != 0 || r.plain() && (c.wary.Load() <= 0 || c.wary.Add(-1) < 0)
}

// plain reports whether r only moves data.
func (r *request) plain() bool {
	return (r.cmd == cmdRead || r.cmd == cmdWrite) && r.flags&cmdFlagFUA == 0
}

// took remembers whether a request to the device was slow.
func (c *conn) took(r *request, d time.Duration) {
	if r.plain() && d > slowService+time.Duration(r.n>>10)*slowPerKiB {
		c.wary.Store(waryFor)
	}
}

// passToken lets another worker read, and starts one if all are busy.
func (c *conn) passToken() {
	if c.idle.Load() == 0 && c.running < c.srv.opt.Parallel {
		c.running++
		c.workers.Add(1)
		go c.work()
	}
	c.token <- struct{}{}
}

// awaitToken returns false when there is nothing more to read.
func (c *conn) awaitToken() bool {
	c.idle.Add(1)
	defer c.idle.Add(-1)
	select {
	case <-c.token:
		return true
	case <-c.done:
		return false
	}
}

// guard takes the token from a worker that kept it for a request which then
// turned out to be slow, so that no request holds up others for long. It ends
// with the connection.
func (c *conn) guard() {
	defer c.workers.Done()
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	seen, quiet := uint64(0), time.Duration(0)
	for {
		select {
		case <-tick.C:
		case <-c.done:
			return
		}
		switch n := c.kept.Load(); {
		case n == 0:
			quiet += guardEvery
		case n != seen:
			seen, quiet = n, 0
		case c.kept.CompareAndSwap(n, 0):
			if n%2 == 0 {
				c.wary.Store(waryFor)
			}
			c.passToken()
		}
		if quiet < guardSleep {
			continue
		}
		tick.Stop()
		c.asleep.Store(true)
		// A turn that began before it could see that has to be seen here.
		if c.kept.Load() == 0 || !c.asleep.CompareAndSwap(true, false) {
			select {
			case <-c.wake:
			case <-c.done:
				return
			}
		}
		quiet = 0
		tick.Reset(guardEvery)
	}
}
