package vdisk

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"mortise/internal/keysafe"
)

// faultFS is the operating system's files, except where fault says otherwise. It
// is asked about each write, sync, and replacement by name.
type faultFS struct {
	osFS
	fault func(op, name string) error
}

func (f faultFS) Open(name string, flag int) (file, error) {
	h, err := f.osFS.Open(name, flag)
	if err != nil {
		return nil, err
	}
	return &faultFile{h, f.fault, name}, nil
}

func (f faultFS) ReplaceFile(name string, b []byte) error {
	if err := f.fault("replace", name); err != nil {
		return err
	}
	if err := f.osFS.ReplaceFile(name, b); err != nil {
		return err
	}
	return f.fault("replaced", name)
}

type faultFile struct {
	file
	fault func(op, name string) error
	name  string
}

func (f *faultFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fault("write", f.name); err != nil {
		n, _ := f.file.WriteAt(p[:roundDown(int64(len(p)/2), SectorSize)], off) // the first half gets there
		return n, err
	}
	return f.file.WriteAt(p, off)
}

func (f *faultFile) WriteDurably(p []byte, off int64) error {
	if _, err := f.WriteAt(p, off); err != nil {
		return err
	}
	return f.Sync()
}

func (f *faultFile) Sync() error {
	if err := f.fault("sync", f.name); err != nil {
		return err
	}
	return f.file.Sync()
}

func (f *faultFile) Allocate(size int64) error {
	if err := f.fault("allocate", f.name); err != nil {
		return err
	}
	return f.file.Allocate(size)
}

func isFlat(name string) bool  { return strings.HasSuffix(name, "-flat.vmdk") }
func isState(name string) bool { return strings.HasSuffix(name, stateSuffix) }

// After a failed fsync nothing is believed any more.
func TestFailedSyncIsFinal(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, kekA))
	var broken atomic.Bool
	o := w.options()
	o.fs = faultFS{fault: func(op, name string) error {
		if op == "sync" && isFlat(name) && broken.Load() {
			return syscall.EIO
		}
		return nil
	}}
	d := open(t, path, o)
	if err := d.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	broken.Store(true)
	if err := d.Flush(t.Context()); !errors.Is(err, ErrFailed) || !errors.Is(err, syscall.EIO) {
		t.Fatalf("the flush: %v", err)
	}
	broken.Store(false)
	b := make([]byte, 4096)
	for verb, err := range map[string]error{
		"flush": d.Flush(t.Context()), "read": d.ReadAt(b, 0), "write": d.WriteAt(b, 0), "trim": d.Trim(0, 4096), "zero": d.WriteZeroes(0, 4096, true),
		"convert": d.Convert(t.Context(), Target{Kind: Decrypting}, nil), "recrypt": d.ShallowRecrypt(t.Context(), kekB),
	} {
		if !errors.Is(err, ErrFailed) {
			t.Errorf("%s after a failed flush: %v", verb, err)
		}
	}
	if err := d.Failed(); !errors.Is(err, syscall.EIO) {
		t.Errorf("Failed says %v", err)
	}
	d.Close()
	d = open(t, path, w.options())
	if err := d.Failed(); err != nil {
		t.Errorf("Failed of a disk that is well: %v", err)
	}
	d.Close()
	if err := d.Failed(); err != nil {
		t.Errorf("Failed of a closed disk: %v", err)
	}
}

// A disk that runs full while it is converted says so, loses nothing, serves all
// but the zone that is half-written, and finishes when there is room again; in
// the same process and after opening it anew.
func TestDiskFullDuringConversion(t *testing.T) {
	w := newWorld(t)
	for _, what := range []string{"extent", "state"} {
		for _, reopen := range []bool{false, true} {
			for _, kind := range []Conversion{Encrypting, Decrypting, Recrypting} {
				t.Run(what+"/"+kind.String(), func(t *testing.T) {
					path := diskPath(t)
					target := Target{Kind: kind}
					spec := w.spec(1<<20, kekA)
					switch kind {
					case Encrypting:
						spec.Key, target.Key = keysafe.KeyID{}, kekA
					case Recrypting:
						target.Key = kekB
					}
					create(t, path, spec)
					var converting, full atomic.Bool
					writes := 0
					o := w.options()
					o.zone = 16 * UnitSize
					o.fs = faultFS{fault: func(op, name string) error {
						if op == "write" && converting.Load() && (what == "extent" && isFlat(name) || what == "state" && isState(name)) {
							if writes++; writes > 7 || full.Load() {
								full.Store(true)
								return syscall.ENOSPC
							}
						}
						return nil
					}}
					d := open(t, path, o)
					model := make([]byte, 1<<20)
					scribble(t, d, model, rand.New(rand.NewPCG(5, 6)), 100)
					converting.Store(true)
					err := d.Convert(t.Context(), target, nil)
					if !errors.Is(err, syscall.ENOSPC) || !errors.Is(err, ErrConverting) {
						t.Fatalf("converting on full storage: %v", err)
					}
					if info, err := Describe(path); err != nil || info.Conversion != kind || info.Boundary == 0 {
						t.Fatalf("stopped: %+v, %v", info, err)
					}
					// The first and the last unit are not in the hot zone.
					b := make([]byte, UnitSize)
					for _, off := range []int64{0, 1<<20 - UnitSize} {
						if err := d.ReadAt(b, off); err != nil || string(b) != string(model[off:off+UnitSize]) {
							t.Errorf("reading at %d beside the zone: %v", off, err)
						}
					}
					if err := d.ReadAt(b, d.state.cur.Load().hot); !errors.Is(err, syscall.ENOSPC) {
						t.Errorf("reading from the half-written zone: %v", err)
					}
					converting.Store(false)
					if reopen {
						d.Close()
						d = open(t, path, w.options())
						compare(t, d, model)
					}
					if err := d.Resume(t.Context(), nil); err != nil {
						t.Fatal(err)
					}
					compare(t, d, model)
					if info, err := Describe(path); err != nil || info.Conversion != NotConverting || info.Encrypted != (kind != Decrypting) {
						t.Fatalf("at the end: %+v, %v", info, err)
					}
				})
			}
		}
	}
}

// Storage that is full at the start of an encryption leaves a disk in clear and
// nothing beside it.
func TestDiskFullAtStart(t *testing.T) {
	w := newWorld(t)
	for _, op := range []string{"allocate", "replace"} {
		path := diskPath(t)
		create(t, path, w.spec(1<<20, keysafe.KeyID{}))
		o := w.options()
		o.fs = faultFS{fault: func(at, name string) error {
			if at == op {
				return syscall.ENOSPC
			}
			return nil
		}}
		d := open(t, path, o)
		if err := d.Convert(t.Context(), Target{Kind: Encrypting, Key: kekA}, nil); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("%s: %v", op, err)
		}
		if _, err := os.Stat(d.stateName()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the state file is still there: %v", op, err)
		}
		compare(t, d, make([]byte, 1<<20))
		d.Close()
		open(t, path, w.options())
	}
}

// If it is unknown whether the descriptor with the key safe is on storage, the
// disk goes on neither with nor without it. Opening it finds out.
func TestDescriptorNotDurable(t *testing.T) {
	w := newWorld(t)
	path := diskPath(t)
	create(t, path, w.spec(1<<20, keysafe.KeyID{}))
	o := w.options()
	o.fs = faultFS{fault: func(op, name string) error {
		if op == "replaced" {
			return syscall.EIO
		}
		return nil
	}}
	d := open(t, path, o)
	if err := d.Convert(t.Context(), Target{Kind: Encrypting, Key: kekA}, nil); !errors.Is(err, ErrFailed) {
		t.Fatal(err)
	}
	if err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, ErrFailed) {
		t.Fatalf("a write in clear after that: %v", err)
	}
	d.Close()
	d = open(t, path, w.options())
	if i := d.Info(); i.Conversion != Encrypting || i.Boundary != 0 {
		t.Fatalf("%+v", i)
	}
	if err := d.Resume(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
}

// Guests read and write in parallel while the disk goes through every form.
func TestConvertUnderLoad(t *testing.T) {
	w := newWorld(t)
	const size, guests = 4 << 20, 4
	path := diskPath(t)
	create(t, path, w.spec(size, keysafe.KeyID{}))
	o := w.options()
	o.zone = 16 * UnitSize
	d := open(t, path, o)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for g := range guests { // each with a share of the sectors of every unit
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 7))
			model := map[int64][]byte{}
			for n := 0; ctx.Err() == nil; n++ {
				off := r.Int64N(size/UnitSize)*UnitSize + int64(g)*2*SectorSize
				got := make([]byte, 2*SectorSize)
				if err := d.ReadAt(got, off); err != nil {
					t.Error(err)
					return
				}
				if want := model[off]; want != nil && string(want) != string(got) {
					t.Errorf("guest %d: sectors at %d are not what it wrote", g, off)
					return
				}
				var err error
				if r.IntN(5) == 0 {
					err = d.Trim(off, 2*SectorSize)
					model[off] = make([]byte, 2*SectorSize)
				} else {
					b := randomBytes(r.Uint64(), 2*SectorSize)
					model[off] = append([]byte(nil), b...)
					err = d.WriteAt(b, off)
				}
				if err == nil && n%64 == 0 {
					err = d.Flush(ctx)
				}
				if err != nil && ctx.Err() == nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for _, c := range []Target{{Kind: Encrypting, Key: kekA}, {Kind: Recrypting, Key: kekB}, {Kind: Decrypting}, {Kind: Encrypting, Key: kekB}} {
		if err := d.Convert(t.Context(), c, func(Progress) { d.Info() }); err != nil {
			t.Error(err)
		}
		if c.Kind == Recrypting {
			if err := d.ShallowRecrypt(t.Context(), kekA); err != nil {
				t.Error(err)
			}
		}
	}
	stop()
	wg.Wait()
}
