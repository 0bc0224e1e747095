package vdisk

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"mortise/internal/keysafe"
)

// torture is a disk on a powerFS, and for each sector what it may hold.
type torture struct {
	w       world
	r       *rand.Rand
	fs      *powerFS
	d       *Disk
	size    int64
	sectors []sectorModel
	record  Expect // what the VM's bundle says
	log     []string

	flushing bool           // the guest
	bug      func(*torture) // put in on purpose once the disk is made
	leaky    bool           // one: the guest writes into the hot zone
	wrong    error          // what a read in the middle of a conversion found
}

// A sectorModel has the content that the guest sees, and what it was at the last
// flush and since: after a power cut it may be any of these.
type sectorModel struct {
	now   string
	maybe []string
}

const torturePath = "/ds/vm.vmdk"

var zeroSector = string(make([]byte, SectorSize))

func newTorture(t testing.TB, w world, seed uint64) *torture {
	r := rand.New(rand.NewPCG(seed, 1))
	x := &torture{w: w, r: r, fs: newPowerFS(r)}
	x.size = (20 + r.Int64N(60)) * UnitSize
	if r.IntN(4) == 0 {
		x.size -= SectorSize * (1 + r.Int64N(7))
	}
	x.sectors = make([]sectorModel, x.size/SectorSize)
	for i := range x.sectors {
		x.sectors[i] = sectorModel{now: zeroSector, maybe: []string{zeroSector}}
	}
	return x
}

func (x *torture) notef(format string, args ...any) {
	x.log = append(x.log, fmt.Sprintf(format, args...))
}

// guest does some random requests outside of the hot zone.
func (x *torture) guest(n int) error {
	for range n {
		e := x.d.ext
		from, to := int64(0), x.size
		if x.leaky && x.r.IntN(4) == 0 {
			defer func(was span) { e.frozen = was }(e.frozen)
			e.frozen = span{}
		}
		if e.frozen.off < e.frozen.end {
			if x.r.IntN(2) == 0 {
				to = min(to, e.frozen.off)
			} else {
				from = e.frozen.end
			}
		}
		if to-from < SectorSize {
			continue
		}
		if x.r.IntN(3) == 0 {
			if err := x.glance(); err != nil {
				return err
			}
		}
		off := from + x.r.Int64N((to-from)/SectorSize)*SectorSize
		size := min(to-off, (1+x.r.Int64N(20))*SectorSize)
		var err error
		var value func(i int64) string
		switch x.r.IntN(8) {
		case 0:
			x.notef("flush")
			x.flushing = true
			if err = x.d.Flush(context.Background()); err == nil {
				for i := range x.sectors {
					x.sectors[i].maybe = []string{x.sectors[i].now}
				}
			}
			x.flushing = false
		case 1, 2:
			x.notef("punch %d+%d", off, size)
			value = func(int64) string { return zeroSector }
			err = x.d.WriteZeroes(off, size, true)
		case 3:
			x.notef("zero %d+%d", off, size)
			value = func(int64) string { return zeroSector }
			err = x.d.WriteZeroes(off, size, false)
		default:
			x.notef("write %d+%d", off, size)
			b := randomBytes(x.r.Uint64(), size)
			if x.r.IntN(3) == 0 {
				clear(b[:SectorSize])
			}
			plain := string(b)
			value = func(i int64) string { return plain[i : i+SectorSize] }
			err = x.d.WriteAt(b, off)
		}
		for i := int64(0); value != nil && i < size; i += SectorSize {
			s := &x.sectors[(off+i)/SectorSize]
			s.maybe = append(s.maybe, value(i))
			if err == nil {
				s.now = value(i)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// glance reads some sectors, hot or not, and compares them with what the guest
// wrote.
func (x *torture) glance() error {
	i := x.r.IntN(len(x.sectors))
	n := min(len(x.sectors)-i, 1+x.r.IntN(40))
	b := make([]byte, n*SectorSize)
	if err := x.d.ReadAt(b, int64(i)*SectorSize); err != nil {
		return err
	}
	for j := range n {
		if got, want := string(b[j*SectorSize:][:SectorSize]), x.sectors[i+j].now; got != want && x.wrong == nil {
			x.wrong = fmt.Errorf("sector %d: read %x…, want %x…", i+j, got[:8], want[:8])
		}
	}
	return nil
}

// verify compares every sector with what it may be, which it then is.
func (x *torture) verify() error {
	b := make([]byte, x.size)
	if err := x.d.ReadAt(b, 0); err != nil {
		return err
	}
	for i := range x.sectors {
		s := &x.sectors[i]
		got := string(b[i*SectorSize:][:SectorSize])
		if !slices.Contains(s.maybe, got) {
			return fmt.Errorf("sector %d (unit %d): read %x…, was none of the %d things it may be, the last %x…", i, i/8, got[:8], len(s.maybe), s.now[:8])
		}
		s.now = got
	}
	return nil
}

// live checks that the guest sees its own writes.
func (x *torture) live() error {
	for i := range x.sectors {
		x.sectors[i].maybe = append(x.sectors[i].maybe, x.sectors[i].now)
	}
	b := make([]byte, x.size)
	if err := x.d.ReadAt(b, 0); err != nil {
		return err
	}
	for i, s := range x.sectors {
		if got := string(b[i*SectorSize:][:SectorSize]); got != s.now {
			return fmt.Errorf("sector %d: read %x…, want %x…", i, got[:8], s.now[:8])
		}
	}
	return nil
}

func (x *torture) open() (err error) {
	o := x.w.options()
	o.fs, o.zone = x.fs, (1+x.r.Int64N(6))*UnitSize
	o.at = func(point string) {
		if x.d != nil && strings.HasPrefix(point, "convert.") {
			_ = x.guest(x.r.IntN(4)) // a crash shows in the conversion too
		}
	}
	o.Expect = x.record
	x.d = nil
	x.d, err = Open(context.Background(), torturePath, o)
	return err
}

// step does one thing that an administrator or a guest does.
func (x *torture) step() error {
	switch x.r.IntN(5) {
	case 0, 1:
		return x.guest(10)
	case 2:
		if x.d.kind == NotConverting && x.d.key != nil {
			to := []keysafe.KeyID{kekA, kekB}[x.r.IntN(2)]
			x.notef("shallow recrypt to %s", to)
			return x.d.ShallowRecrypt(context.Background(), to)
		}
		return nil
	default:
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		zones := x.r.IntN(12)
		report := func(p Progress) {
			x.notef("%s at %d, back %v", p.Kind, p.Done, p.Back)
			if zones--; zones < 0 {
				cancel()
			}
		}
		var err error
		x.d.SetPace(Pace{Limit: x.r.Int64N(2) << 40}) // too much to be felt; still it goes the slow way
		if x.d.kind != NotConverting && x.r.IntN(2) == 0 {
			x.notef("cancel: %s", x.d.kind)
			err = x.d.Cancel(ctx, report)
		} else if x.d.kind != NotConverting {
			err = x.d.Resume(ctx, report)
		} else {
			t := Target{Kind: Encrypting, Key: kekA, Epoch: x.record.Epoch + 1}
			if x.d.key != nil {
				t = Target{Kind: Recrypting, Key: kekB}
				if x.r.IntN(2) == 0 {
					t = Target{Kind: Decrypting}
				}
			}
			if t.Kind == Decrypting {
				x.record.Encrypted = false
			}
			x.notef("convert: %s", t.Kind)
			err = x.d.Convert(ctx, t, report)
		}
		if errors.Is(err, context.Canceled) {
			err = nil
		}
		if err == nil && x.d.kind == NotConverting {
			i := x.d.Info()
			x.record = Expect{Encrypted: i.Encrypted, Epoch: max(x.record.Epoch, i.Epoch)}
		}
		return err
	}
}

// run does steps on a fresh disk until the storage dies, reboots, checks, and
// goes on, for the given number of crashes.
func (x *torture) run(crashes int) error {
	spec := x.w.spec(x.size, keysafe.KeyID{})
	if x.r.IntN(2) == 0 {
		spec.Key, x.record = kekA, Expect{true, 1}
	}
	spec.fs, spec.Thick = x.fs, x.r.IntN(3) == 0
	for {
		if x.r.IntN(3) == 0 {
			x.fs.left = x.r.IntN(20)
		}
		err := Create(context.Background(), torturePath, spec)
		if err == nil {
			break
		}
		if !errors.Is(err, errPower) {
			return fmt.Errorf("creating: %w", err)
		}
		x.fs.reboot(x.r.IntN(2) == 0)
		if _, err := describeIn(x.fs, torturePath); err == nil {
			break // the descriptor got there, so everything did
		}
	}
	x.fs.left = -1
	if err := x.open(); err != nil {
		return fmt.Errorf("opening the new disk: %w", err)
	}
	if x.bug != nil {
		x.bug(x)
	}
	for n := 0; n < crashes; n++ {
		x.fs.left = x.r.IntN(60)
		for {
			err := x.step()
			if err == nil {
				err = x.live()
			}
			if x.wrong != nil {
				return x.wrong
			}
			if err == nil {
				continue
			}
			if !x.fs.crashed {
				return err
			}
			break
		}
		// A crash may come while a crash is being recovered from.
		for {
			x.d, x.fs.left = nil, -1
			cut := x.r.IntN(3) > 0
			x.notef("crash, power cut %v", cut)
			x.fs.reboot(cut)
			if x.r.IntN(3) == 0 {
				x.fs.left = x.r.IntN(8)
			}
			err := x.open()
			if err == nil {
				break
			}
			if !x.fs.crashed {
				return fmt.Errorf("opening after a crash: %w", err)
			}
		}
		if !x.fs.crashed {
			if err := x.verify(); err != nil {
				return err
			}
		}
	}
	x.fs.left = -1
	if err := x.d.Resume(context.Background(), nil); err != nil && !x.fs.crashed {
		return err
	}
	if x.fs.crashed {
		return nil
	}
	return x.live()
}

var seeds = flag.Uint64("seeds", 300, "how many disks TestPowerCut tortures; a tenth of them with -short")

func TestPowerCut(t *testing.T) {
	w := newWorld(t)
	if testing.Short() {
		*seeds /= 10
	}
	for seed := range *seeds {
		x := newTorture(t, w, seed)
		if err := x.run(6); err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, strings.Join(x.log, "\n"))
		}
	}
}

// A test that finds nothing proves nothing: bugs put in on purpose are found.
func TestPowerCutFindsBugs(t *testing.T) {
	if testing.Short() {
		t.Skip("one process does one thing after the other here; see build/test.sh")
	}
	w := newWorld(t)
	isExtent := func(name string) bool { return strings.HasSuffix(name, "-flat.vmdk") }
	for name, bug := range map[string]func(*torture){
		"boundary early: a zone's data is not durable when the boundary passes it": func(x *torture) {
			x.fs.lie = func(name string) bool { return isExtent(name) && !x.flushing }
		},
		"flush skipped": func(x *torture) {
			x.fs.lie = func(name string) bool { return isExtent(name) && x.flushing }
		},
		"checksums not durable when their zone is overwritten": func(x *torture) {
			x.fs.lie = func(name string) bool { return strings.HasSuffix(name, stateSuffix) }
		},
		"key safe not durable when the first zone is overwritten": func(x *torture) {
			x.fs.lie = func(name string) bool { return name == "." }
		},
		"write let through into the hot zone": func(x *torture) { x.leaky = true },
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(300) {
				x := newTorture(t, w, seed)
				x.bug = bug
				if err := x.run(6); err != nil {
					t.Logf("found by seed %d: %v", seed, err)
					return
				}
			}
			t.Fatal("not found")
		})
	}
}
