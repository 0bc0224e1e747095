package nbd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
)

// loseWrites lets several connections write and flush at random, and compares what
// a power cut would leave after each flush with what had been acknowledged on any
// connection before it was sent. It is what flagCanMultiConn promises.
func loseWrites(t *testing.T, opt Options) error {
	const conns, slots, rounds = 3, 16, 60
	disk := newMemDisk(t, conns*slots*SectorSize)
	_, _, path := serve(t, disk, opt, false)
	var clients []*client
	for range conns {
		clients = append(clients, connect(t, path, true))
	}
	r := rand.New(rand.NewPCG(1, 2))
	acknowledged := disk.all()
	for round := range rounds {
		// All connections write at once, each to its own slots.
		var wg sync.WaitGroup
		for i, c := range clients {
			slot := uint64(i*slots + r.IntN(slots))
			content := bytes.Repeat([]byte{byte(round + 1)}, SectorSize)
			copy(acknowledged[slot*SectorSize:], content)
			wg.Go(func() { c.mustWrite(slot*SectorSize, content) })
		}
		wg.Wait()
		flusher := r.IntN(conns)
		var reply reply
		if r.IntN(2) == 0 {
			reply = clients[flusher].do(cmdFlush, 0, 0, 0, nil)
		} else { // FUA on one request is about that request only: no promise for the others
			slot := uint64(flusher*slots + r.IntN(slots))
			content := bytes.Repeat([]byte{byte(round + 1)}, SectorSize)
			copy(acknowledged[slot*SectorSize:], content)
			reply = clients[flusher].do(cmdWrite, cmdFlagFUA, slot*SectorSize, SectorSize, content)
			if left := disk.powerCut(); !bytes.Equal(left[slot*SectorSize:(slot+1)*SectorSize], content) {
				return fmt.Errorf("round %d: a write with FUA on connection %d was acknowledged and is lost", round, flusher)
			}
			continue
		}
		if reply.err != 0 {
			t.Fatalf("flush: error %d", reply.err)
		}
		if left := disk.powerCut(); !bytes.Equal(left, acknowledged) {
			return fmt.Errorf("round %d: a flush on connection %d was acknowledged and writes before it are lost", round, flusher)
		}
	}
	return nil
}

// A flush on any connection covers what was acknowledged on all; and a server that
// skipped it on one connection would be found out.
func TestFlushCoversAllConnections(t *testing.T) {
	if err := loseWrites(t, Options{}); err != nil {
		t.Error(err)
	}
	for deaf := range 3 {
		if err := loseWrites(t, Options{deafTo: func(conn int) bool { return conn == deaf }}); err == nil {
			t.Errorf("nobody noticed that flushes of connection %d are skipped", deaf)
		} else {
			t.Logf("planted and found: %v", err)
		}
	}
}
