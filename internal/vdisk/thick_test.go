package vdisk

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"mortise/internal/keysafe"
)

// A thick disk has its whole space from the beginning, and nothing that is done to
// it takes that away; what nobody wrote is a hole to who asks, and stays unconverted.
func TestThick(t *testing.T) { testThick(t, newWorld(t)) }

func testThick(t *testing.T, w world) {
	const size = 24<<20 - 3*SectorSize
	for name, key := range map[string]keysafe.KeyID{"clear": {}, "encrypted": kekA} {
		t.Run(name, func(t *testing.T) {
			path := diskPath(t)
			s := w.spec(size, key)
			s.Thick = true
			create(t, path, s)
			c := openChain(t, path, w.chainOptions(t))
			full := func(after string) {
				t.Helper()
				if i := c.Links()[0]; !i.Thick || i.Allocated < c.Size() {
					t.Fatalf("after %s: %d bytes of %d are allocated, thick %v", after, i.Allocated, c.Size(), i.Thick)
				}
			}
			// Data, as BlockStatus has it, in whole blocks of the file system.
			data := func(after string, most int64) {
				t.Helper()
				var n int64
				c.links[0].ext.f.Forget(0, c.links[0].end()) // what was read counts as data
				if err := c.BlockStatus(0, c.Size(), func(run int64, s Status) bool {
					if s&Zero == 0 {
						n += run
					}
					return true
				}); err != nil || n > most {
					t.Fatalf("after %s: %d bytes of data, want at most %d (%v)", after, n, most, err)
				}
				if e, err := c.Estimate(t.Context()); err != nil || e.Bytes > n+UnitSize {
					t.Fatalf("after %s: estimate %+v (%v), data %d", after, e, err, n)
				}
			}
			full("creating")
			data("creating", 0)
			model := make([]byte, size)
			compare(t, c, model)
			data("reading", 0)

			scribble(t, c, model, rand.New(rand.NewPCG(1, 2)), 20)
			copy(model[1<<20:], randomBytes(3, 1<<20))
			if err := errors.Join(c.WriteAt(append([]byte(nil), model[1<<20:2<<20]...), 1<<20), c.Flush(t.Context())); err != nil {
				t.Fatal(err)
			}
			clear(model[1<<20+4096 : 2<<20-512])
			if err := errors.Join(c.Trim(1<<20+4096, 1<<19), c.WriteZeroes(1<<20+1<<19, 1<<19-512, true), c.Flush(t.Context())); err != nil {
				t.Fatal(err)
			}
			full("trimming")
			data("trimming", 1<<20)
			compare(t, c, model)

			convert := func(target Target, cancel bool) {
				t.Helper()
				ctx, stop := context.WithCancel(t.Context())
				defer stop()
				c.links[0].opts.zone = 64 << 10
				zones := 0
				err := c.Convert(ctx, target, func(Progress) {
					if zones++; cancel && zones == 5 {
						stop()
					}
				})
				if cancel && errors.Is(err, context.Canceled) {
					err = c.Cancel(t.Context(), nil)
				}
				if err != nil {
					t.Fatal(err)
				}
				full(fmt.Sprintf("%s, cancelled %v", target.Kind, cancel))
				data("converting", 2<<20)
				compare(t, c, model)
			}
			if key == (keysafe.KeyID{}) {
				convert(Target{Kind: Encrypting, Key: kekA}, true)
				convert(Target{Kind: Encrypting, Key: kekA}, false)
			}
			convert(Target{Kind: Recrypting, Key: kekB}, true)
			convert(Target{Kind: Recrypting, Key: kekB}, false)
			convert(Target{Kind: Decrypting}, false)

			if err := c.Grow(t.Context(), 32<<20); err != nil {
				t.Fatal(err)
			}
			model = append(model, make([]byte, 32<<20-size)...)
			full("growing")
			data("growing", 2<<20)
			compare(t, c, model)

			// A snapshot link is thin, and what it is merged into stays thick.
			link := takeSnapshot(t, c)
			if i := c.Links()[1]; i.Thick || i.Allocated > 1<<20 {
				t.Fatalf("the snapshot link: %+v", i)
			}
			if i, _, err := DescribeChain(link, nil); err != nil || !i.Thick {
				t.Fatalf("the disk with its links: %+v, %v", i, err)
			}
			if err := c.WriteZeroes(0, 16<<20, true); err != nil {
				t.Fatal(err)
			}
			clear(model[:16<<20])
			if err := c.Consolidate(t.Context(), MergeSpec{Link: link}); err != nil {
				t.Fatal(err)
			}
			full("consolidating")
			compare(t, c, model)
		})
	}
}

// A thick disk for which there is no space, or on storage that cannot reserve it, is
// refused with the reason, and leaves nothing.
func TestThickRefused(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		size  int64
		fault error // of reserving
		kind  error
		says  string
	}{
		"larger than what is free": {MaxSize - UnitSize, errors.New("not asked"), syscall.ENOSPC, "are free"},
		"taken meanwhile":          {1 << 20, syscall.ENOSPC, syscall.ENOSPC, "choose other storage"},
		"over quota":               {1 << 20, syscall.EDQUOT, syscall.EDQUOT, "choose other storage"},
		"cannot reserve":           {1 << 20, syscall.EOPNOTSUPP, ErrUnsupported, "XFS"},
	} {
		t.Run(name, func(t *testing.T) {
			path := diskPath(t)
			s := w.spec(c.size, kekA)
			s.Thick = true
			s.fs = faultFS{fault: func(op, name string) error {
				if op == "allocate" && isFlat(name) {
					return c.fault
				}
				return nil
			}}
			err := Create(t.Context(), path, s)
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "vm-flat.vmdk") {
				t.Errorf("%v", err)
			}
			if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// Growing without space leaves the disk as it was.
func TestThickCannotGrow(t *testing.T) {
	w, path := newWorld(t), diskPath(t)
	s := w.spec(1<<20, kekA)
	s.Thick = true
	create(t, path, s)
	o := w.options()
	o.fs = faultFS{fault: func(op, name string) error {
		if op == "allocate" && isFlat(name) {
			return syscall.ENOSPC
		}
		return nil
	}}
	c := openChain(t, path, o)
	if err := c.Grow(t.Context(), 2<<20); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v", err)
	}
	if st, err := os.Stat(filepath.Join(filepath.Dir(path), "vm-flat.vmdk")); err != nil || st.Size() != 1<<20 || c.Size() != 1<<20 {
		t.Errorf("the extent: %v, %v", st, err)
	}
	compare(t, c, make([]byte, 1<<20))
}

// One that lost its space, as by a restore, has it again when it is opened.
func TestThickAgain(t *testing.T) {
	w, path := newWorld(t), diskPath(t)
	s := w.spec(4<<20, kekA)
	s.Thick = true
	create(t, path, s)
	f, err := (osFS{}).Open(filepath.Join(filepath.Dir(path), "vm-flat.vmdk"), os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Punch(1<<20, 1<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	if i, err := Describe(path); err != nil || i.Allocated >= i.Size {
		t.Fatalf("%+v, %v", i, err)
	}
	d := open(t, path, w.options())
	if i := d.Info(); i.Allocated < i.Size {
		t.Errorf("%+v", i)
	}
	compare(t, d, make([]byte, 4<<20))
}
