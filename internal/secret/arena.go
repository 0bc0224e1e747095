package secret

import (
	"fmt"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Keys are small (a KEK has 32 bytes, an XTS DEK 64) and a host keeps
// thousands, so pages are cut into slots of slotSize; a longer secret takes
// consecutive slots of one page, and one longer than a page has pages of its own.
const (
	pageSize = 4096
	slotSize = 64
	slots    = pageSize / slotSize
)

type page struct {
	mem  []byte
	used uint64 // bit i: slot i is taken
}

// arena protects pages.
var arena struct {
	sync.Mutex
	pages map[uintptr]*page // by address; the kernel aligns a page to its size
}

func alloc(n int) (*Key, error) {
	if n < 1 || n > MaxLen {
		return nil, fmt.Errorf("secret: a key has 1 to %d bytes, not %d", MaxLen, n)
	}
	if n > pageSize {
		mem, err := lockedPages((n + pageSize - 1) / pageSize)
		if err != nil {
			return nil, err
		}
		return newKey(mem[:n]), nil
	}
	want := (n + slotSize - 1) / slotSize
	arena.Lock()
	defer arena.Unlock()
	for _, p := range arena.pages {
		if b := p.take(want, n); b != nil {
			return newKey(b), nil
		}
	}
	mem, err := lockedPages(1)
	if err != nil {
		return nil, err
	}
	p := &page{mem: mem}
	if arena.pages == nil {
		arena.pages = map[uintptr]*page{}
	}
	arena.pages[address(mem)] = p
	return newKey(p.take(want, n)), nil
}

// newKey arms a finalizer: a key that its owner lost is zeroed late, not never.
func newKey(b []byte) *Key {
	k := &Key{b: b}
	runtime.SetFinalizer(k, (*Key).Wipe)
	return k
}

// take finds want free consecutive slots and returns their first n bytes.
func (p *page) take(want, n int) []byte {
	mask := ^uint64(0) >> (slots - want)
	for i := 0; i+want <= slots; i++ {
		if p.used&(mask<<i) == 0 {
			p.used |= mask << i
			return p.mem[i*slotSize : i*slotSize+n : i*slotSize+want*slotSize]
		}
	}
	return nil
}

// release zeroes the slots that b came from and frees them; an empty page goes
// back to the kernel.
func release(b []byte) {
	b = b[:cap(b)]
	clear(b)
	if len(b) > pageSize {
		_ = unix.Munmap(b) // cannot fail for our own mapping
		return
	}
	arena.Lock()
	defer arena.Unlock()
	at := address(b)
	first := at &^ (pageSize - 1)
	p := arena.pages[first]
	p.used &^= (^uint64(0) >> (slots - len(b)/slotSize)) << ((at - first) / slotSize)
	if p.used == 0 {
		delete(arena.pages, first)
		_ = unix.Munmap(p.mem) // cannot fail for our own mapping
	}
}

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// lockedPages maps n pages that are never swapped, dumped or forked.
func lockedPages(n int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, n*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("secret: mapping a page for keys: %w", err)
	}
	if err := unix.Mlock(mem); err != nil {
		_ = unix.Munmap(mem)
		return nil, fmt.Errorf("secret: locking a page for keys (raise LimitMEMLOCK, see ulimit -l): %w", err)
	}
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_WIPEONFORK} {
		if err := unix.Madvise(mem, advice); err != nil {
			_ = unix.Munmap(mem)
			return nil, fmt.Errorf("secret: keeping a page of keys out of dumps: %w", err)
		}
	}
	return mem, nil
}

// LockDown makes the whole process refuse core dumps and debuggers of other
// processes; every role that holds keys calls it first.
func LockDown() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("secret: forbidding core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("secret: making the process undumpable: %w", err)
	}
	return nil
}
