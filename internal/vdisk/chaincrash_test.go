package vdisk

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"mortise/internal/keysafe"
)

// chainTorture is a disk with snapshots on a powerFS; for each sector what it may
// hold, and for each snapshot what it froze.
type chainTorture struct {
	w       world
	r       *rand.Rand
	fs      *powerFS
	d       *Chain
	size    int64
	sectors []sectorModel
	flying  map[int64]string    // by sector: what a request that failed would have written
	frozen  map[string][]string // by link: sectors
	top     string              // what the VMX says
	record  Expect              // what the VM's bundle says
	goal    Target              // of the conversion that was begun
	merging [2]string           // link and parent of the merge that was begun
	busy    bool                // an operation runs: at calls the guest
	wrong   error
	log     []string

	flushing bool
	bug      func(*chainTorture)
}

func newChainTorture(w world, seed uint64) *chainTorture {
	r := rand.New(rand.NewPCG(seed, 2))
	x := &chainTorture{w: w, r: r, fs: newPowerFS(r), flying: map[int64]string{}, frozen: map[string][]string{}, top: torturePath}
	x.size = (20 + r.Int64N(40)) * UnitSize
	if r.IntN(4) == 0 {
		x.size -= SectorSize * (1 + r.Int64N(7))
	}
	x.sectors = make([]sectorModel, x.size/SectorSize)
	x.become(slices.Repeat([]string{zeroSector}, len(x.sectors)))
	return x
}

func (x *chainTorture) notef(format string, args ...any) {
	x.log = append(x.log, fmt.Sprintf(format, args...))
}

// become makes the model that of a disk whose content is durable.
func (x *chainTorture) become(content []string) {
	for i := range x.sectors {
		x.sectors[i] = sectorModel{now: content[i], maybe: []string{content[i]}}
	}
}

func (x *chainTorture) content() []string {
	all := make([]string, len(x.sectors))
	for i, s := range x.sectors {
		all[i] = s.now
	}
	return all
}

func (x *chainTorture) options() Options {
	o := x.w.options()
	o.fs, o.zone, o.piece, o.Live = x.fs, (1+x.r.Int64N(6))*UnitSize, 1+x.r.Int64N(6), powerLive
	return o
}

func (x *chainTorture) open() (err error) {
	o := x.options()
	o.Expect = x.record
	o.at = func(point string) {
		if !x.busy || x.d == nil {
			return
		}
		verb, step, _ := strings.Cut(point, ".")
		if verb == "convert" || verb == "merge" && slices.Contains([]string{"begun", "copied", "durable", "moved", "lifted"}, step) {
			_ = x.guest(x.r.IntN(4)) // a crash shows in the operation too
		}
		if (point == "merge.moved" || point == "merge.lifted" || point == "convert.laid") && x.r.IntN(12) == 0 && len(x.d.links) < 6 {
			_ = x.snapshot()
		}
	}
	x.d = nil
	x.d, err = OpenChain(context.Background(), x.top, o)
	return err
}

// free is a range of the disk that nobody has frozen.
func (x *chainTorture) free() (from, to int64) {
	from, to = 0, x.size
	for _, f := range []span{x.d.frozen, x.d.top().ext.frozen, x.under()} {
		if f.off >= f.end {
			continue
		}
		if f.off-from >= to-f.end {
			to = min(to, f.off)
		} else {
			from = max(from, f.end)
		}
	}
	return roundUp(from, SectorSize), to
}

func (x *chainTorture) under() span {
	if x.d.under == nil {
		return span{}
	}
	return x.d.under.ext.frozen
}

func (x *chainTorture) guest(n int) error {
	for range n {
		if x.fs.crashed {
			return errPower
		}
		from, to := x.free()
		if to-from < SectorSize {
			continue
		}
		off := from + x.r.Int64N((to-from)/SectorSize)*SectorSize
		size := min(to-off, (1+x.r.Int64N(20))*SectorSize)
		if x.r.IntN(3) == 0 {
			b := make([]byte, size)
			if err := x.d.ReadAt(b, off); err != nil {
				return err
			}
			x.compare(b, off, "a guest reads")
		}
		var err error
		var value func(i int64) string
		switch x.r.IntN(8) {
		case 0:
			x.notef("flush")
			x.flushing = true
			if err = x.d.Flush(context.Background()); err == nil {
				x.become(x.content())
			}
			x.flushing = false
		case 1:
			x.notef("punch %d+%d", off, size)
			value = func(int64) string { return zeroSector }
			err = x.d.WriteZeroes(off, size, true)
		case 2:
			x.notef("zero %d+%d", off, size)
			value = func(int64) string { return zeroSector }
			err = x.d.WriteZeroes(off, size, false)
		default:
			x.notef("write %d+%d", off, size)
			b := randomBytes(x.r.Uint64(), size)
			plain := string(b)
			value = func(i int64) string { return plain[i : i+SectorSize] }
			err = x.d.WriteAt(b, off)
		}
		for i := int64(0); value != nil && i < size; i += SectorSize {
			s := &x.sectors[(off+i)/SectorSize]
			s.maybe = append(s.maybe, value(i))
			if err == nil {
				s.now = value(i)
			} else {
				x.flying[(off+i)/SectorSize] = value(i)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (x *chainTorture) compare(b []byte, off int64, who string) {
	for i := int64(0); i < int64(len(b)); i += SectorSize {
		s := (off + i) / SectorSize
		if got, want := string(b[i:i+SectorSize]), x.sectors[s].now; got != want && x.wrong == nil {
			x.wrong = fmt.Errorf("%s: sector %d (unit %d): %x…, want %x…", who, s, s/8, got[:8], want[:8])
		}
	}
}

func (x *chainTorture) snapshot() error {
	old := x.top
	_, err := x.d.Snapshot(context.Background(), LinkSpec{Commit: func(path string) error {
		x.notef("snapshot: %s on %s", path, old)
		x.frozen[old], x.top = x.content(), path
		x.become(x.content())
		return nil
	}})
	return err
}

// merged brings the model up to date when a merge may have ended.
func (x *chainTorture) merged() {
	link, parent := x.merging[0], x.merging[1]
	if link == "" {
		return
	}
	in := func(path string) bool {
		return slices.ContainsFunc(x.d.links, func(d *Disk) bool { return d.path == path })
	}
	switch {
	case in(link) && in(parent):
		return
	case !in(link): // down
		if f, ok := x.frozen[link]; ok {
			x.frozen[parent] = f
		}
		delete(x.frozen, link)
	}
	x.merging = [2]string{}
}

func (x *chainTorture) consolidate() error {
	if len(x.d.links) < 2 {
		return nil
	}
	i := 1 + x.r.IntN(len(x.d.links)-1)
	if x.merging[0] != "" {
		if i = slices.IndexFunc(x.d.links, func(d *Disk) bool { return d.path == x.merging[0] }); i < 1 {
			return nil // the disk was reverted; it stays half-merged
		}
	}
	link, parent := x.d.links[i].path, x.d.links[i-1].path
	x.notef("merge %s into %s", link, parent)
	was, had := x.frozen[parent]
	delete(x.frozen, parent)
	x.merging = [2]string{link, parent}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	pieces := x.r.IntN(20)
	err := x.d.Consolidate(ctx, MergeSpec{Link: link, Commit: func(top string) error { x.top = top; return nil }, Report: func(int64, int64) {
		if pieces--; pieces < 0 {
			cancel()
		}
	}})
	if errors.Is(err, ErrSealed) {
		x.merging = [2]string{}
		if had {
			x.frozen[parent] = was
		}
		return nil
	}
	if errors.Is(err, context.Canceled) {
		x.notef("merge cancelled")
		err = nil
	}
	if err == nil {
		x.merged()
	}
	return err
}

func (x *chainTorture) convert() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	zones := x.r.IntN(30)
	report := func(p Progress) {
		x.notef("%s at %d", p.Kind, p.Done)
		if zones--; zones < 0 {
			cancel()
		}
	}
	info := x.d.Info()
	middle := slices.ContainsFunc(x.d.Links(), func(i Info) bool { return i.Conversion != NotConverting })
	var err error
	switch {
	case middle && x.r.IntN(3) == 0:
		x.notef("cancel")
		err = x.d.Cancel(ctx, report)
	case middle && x.r.IntN(3) == 0:
		x.notef("resume")
		err = x.d.Resume(ctx, report)
	default:
		if !middle {
			x.goal = Target{Kind: Encrypting, Key: kekA, Epoch: x.record.Epoch + 1}
			if info.Conversion == NotConverting && info.Encrypted {
				x.goal = Target{Kind: Recrypting, Key: kekB}
				if x.r.IntN(2) == 0 {
					x.goal = Target{Kind: Decrypting}
				}
			}
		}
		if x.goal.Kind == Decrypting {
			x.record.Encrypted = false
		}
		x.notef("convert: %s", x.goal.Kind)
		err = x.d.Convert(ctx, x.goal, report)
	}
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	if err == nil {
		if i := x.d.Info(); i.Conversion == NotConverting {
			x.record = Expect{Encrypted: i.Encrypted, Epoch: max(x.record.Epoch, i.Epoch)}
		}
	}
	return err
}

func (x *chainTorture) revert() error {
	if len(x.frozen) == 0 || x.merging[0] != "" {
		return nil
	}
	names := slices.Sorted(maps.Keys(x.frozen))
	to := names[x.r.IntN(len(names))]
	old := x.top
	if err := x.d.Close(); err != nil {
		return err
	}
	x.d = nil
	x.notef("revert to %s", to)
	_, err := Revert(context.Background(), to, x.options(), LinkSpec{Commit: func(path string) error {
		x.top = path
		x.become(x.frozen[to])
		return nil
	}})
	if err != nil && !errors.Is(err, ErrConverting) {
		return err
	}
	if err == nil {
		if err := deleteIn(context.Background(), x.fs, old); err != nil {
			return err
		}
	}
	return x.open()
}

func (x *chainTorture) step() error {
	x.busy = true
	defer func() { x.busy = false }()
	switch x.r.IntN(9) {
	case 0, 1, 2:
		return x.guest(10)
	case 3:
		if len(x.d.links) < 6 {
			return x.snapshot()
		}
		return nil
	case 4, 5:
		return x.consolidate()
	case 6:
		return x.convert()
	case 7:
		if i := x.d.Info(); i.Encrypted && i.Conversion == NotConverting {
			to := []keysafe.KeyID{kekA, kekB}[x.r.IntN(2)]
			x.notef("shallow recrypt to %s", to)
			err := x.d.ShallowRecrypt(context.Background(), to)
			if errors.Is(err, ErrConverting) { // of another branch
				err = nil
			}
			return err
		}
		return nil
	default:
		return x.revert()
	}
}

// check compares every sector after a crash. After a kill what was acknowledged is
// there; a power cut may have taken what was not flushed.
func (x *chainTorture) check(powerCut bool) error {
	b := make([]byte, x.size)
	if err := x.d.ReadAt(b, 0); err != nil {
		return err
	}
	for i := range x.sectors {
		s := &x.sectors[i]
		got := string(b[i*SectorSize:][:SectorSize])
		ok := got == s.now || got == x.flying[int64(i)] && x.flying[int64(i)] != ""
		if powerCut {
			ok = slices.Contains(s.maybe, got)
		}
		if !ok {
			return fmt.Errorf("sector %d (unit %d): read %x…, is %x… or one of %d", i, i/8, got[:8], s.now[:8], len(s.maybe))
		}
		s.now = got
		s.maybe = append(s.maybe, got)
	}
	clear(x.flying)
	return nil
}

// checkFrozen compares what the snapshots of a closed disk show.
func (x *chainTorture) checkFrozen() error {
	for _, link := range slices.Sorted(maps.Keys(x.frozen)) {
		o := x.options()
		o.ReadOnly = true
		d, err := OpenChain(context.Background(), link, o)
		if errors.Is(err, ErrMissing) && link == x.merging[0] { // its parent has it now
			continue
		}
		if errors.Is(err, ErrConverting) { // a hot zone that only the next opening for writing settles
			continue
		}
		if err != nil {
			return fmt.Errorf("opening the snapshot of %s: %w", link, err)
		}
		b := make([]byte, x.size)
		err = d.ReadAt(b, 0)
		if err = errors.Join(err, d.Close()); err != nil {
			return err
		}
		for i, want := range x.frozen[link] {
			if got := string(b[i*SectorSize:][:SectorSize]); got != want {
				return fmt.Errorf("snapshot of %s: sector %d (unit %d): %x…, was frozen as %x…", link, i, i/8, got[:8], want[:8])
			}
		}
	}
	return nil
}

func (x *chainTorture) live() error {
	b := make([]byte, x.size)
	if err := x.d.ReadAt(b, 0); err != nil {
		return err
	}
	x.compare(b, 0, "the whole disk")
	return x.wrong
}

// run does steps until the storage dies, reboots, checks, and goes on.
func (x *chainTorture) run(crashes int) error {
	spec := x.w.spec(x.size, keysafe.KeyID{})
	if x.r.IntN(2) == 0 {
		spec.Key, x.record = kekA, Expect{true, 1}
	}
	spec.fs = x.fs
	if err := Create(context.Background(), torturePath, spec); err != nil {
		return err
	}
	if err := x.open(); err != nil {
		return fmt.Errorf("opening the new disk: %w", err)
	}
	if x.bug != nil {
		x.bug(x)
	}
	cut := false // there was a power cut since the last check
	for range crashes {
		x.fs.left = x.r.IntN(120)
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
		for {
			x.d, x.fs.left = nil, -1
			power := x.r.IntN(2) > 0
			cut = cut || power
			x.notef("crash, power cut %v", power)
			x.fs.reboot(power)
			if x.r.IntN(4) == 0 {
				x.fs.left = x.r.IntN(12)
			} else if err := x.checkFrozen(); err != nil {
				return fmt.Errorf("after a crash: %w", err)
			}
			err := x.open()
			if err == nil {
				break
			}
			if !x.fs.crashed {
				return fmt.Errorf("opening after a crash: %w", err)
			}
		}
		if x.fs.crashed {
			continue
		}
		x.merged()
		if err := x.check(cut); err != nil {
			if !x.fs.crashed {
				return err
			}
			continue
		}
		cut = false
	}
	return nil
}

func TestChainPowerCut(t *testing.T) {
	w := newWorld(t)
	n := *seeds / 5 // each has many links
	if testing.Short() {
		n = min(n, 15)
	}
	for seed := range n {
		x := newChainTorture(w, seed)
		if err := x.run(8); err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, strings.Join(x.log, "\n"))
		}
	}
}

// Bugs put in on purpose are found.
func TestChainPowerCutFindsBugs(t *testing.T) {
	if testing.Short() {
		t.Skip("one process does one thing after the other here; see build/test.sh")
	}
	w := newWorld(t)
	isExtent := func(name string) bool { return !strings.HasSuffix(name, stateSuffix) && name != "." }
	for name, bug := range map[string]func(*chainTorture){
		"bitmap bit before the data is durable": func(x *chainTorture) {
			x.fs.lie = func(name string) bool { return isExtent(name) && strings.Contains(name, "-delta") }
		},
		"flush skips the bitmap": func(x *chainTorture) {
			x.fs.lie = func(name string) bool { return strings.HasSuffix(name, "-delta.vmdk"+stateSuffix) && x.flushing }
		},
		"live bitmap lost by a kill": func(x *chainTorture) { x.fs.forgetful = true },
		"units taken from a link before its parent has them": func(x *chainTorture) {
			x.fs.lie = func(name string) bool { return filepath.Base(name) == "vm-flat.vmdk" && !x.flushing }
		},
		"descriptors not durable when the next step relies on them": func(x *chainTorture) {
			x.fs.lie = func(name string) bool { return name == "." }
		},
		"base committed while another link stands on it": func(x *chainTorture) { x.fs.childless = true },
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(400) {
				x := newChainTorture(w, seed)
				x.bug = bug
				if err := x.run(8); err != nil {
					t.Logf("found by seed %d: %v", seed, err)
					return
				}
			}
			t.Fatal("not found")
		})
	}
}
