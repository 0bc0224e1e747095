// Command generate makes the frozen artefacts of the present format version:
//
//	go run ./test/formats/generate test/formats/testdata/v1
//
// writes v1.tar.gz and v1.json. It never writes over files: what a version wrote is kept
// as it is.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"mortise/internal/keysafe"
	"mortise/internal/secret"
	"mortise/internal/vdisk"
	"mortise/internal/vmfiles"
	"mortise/internal/vmxfile"
	"mortise/test/formats"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 2 {
		log.Fatal("usage: generate NAME (writes NAME.tar.gz and NAME.json)")
	}
	if err := generate(context.Background(), os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

// A maker makes artefacts in a folder. Keys, nonces and content come from seeds.
type maker struct {
	ctx  context.Context
	dir  string
	keks keysafe.KEKSet
	seed io.Reader
	want formats.Expected
}

func generate(ctx context.Context, name string) (err error) {
	for _, f := range []string{name + ".tar.gz", name + ".json"} {
		if _, err := os.Lstat(f); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s is there: a version's artefacts are made once", f)
		}
	}
	dir, err := os.MkdirTemp("", "formats")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	keks, err := formats.KEKs()
	if err != nil {
		return err
	}
	m := &maker{ctx: ctx, dir: dir, keks: keks, seed: rand.NewChaCha8(sha256.Sum256([]byte("mortise frozen artefacts"))),
		want: formats.Expected{Version: 1, Disks: map[string]formats.Disk{}, Files: map[string]formats.File{}}}
	if err := m.all(); err != nil {
		return err
	}
	text, err := json.MarshalIndent(m.want, "", "  ")
	if err != nil {
		return err
	}
	out, err := os.OpenFile(name+".tar.gz", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	if err := errors.Join(formats.Pack(out, dir), out.Close()); err != nil {
		return err
	}
	return os.WriteFile(name+".json", append(text, '\n'), 0o644)
}

// size is not whole units, and several zones of a conversion.
const size = 24<<20 + 512

func (m *maker) all() error {
	plain, kinds := keysafe.KeyID{}, []vdisk.Conversion{vdisk.Encrypting, vdisk.Decrypting, vdisk.Recrypting}
	for name, key := range map[string]keysafe.KeyID{"plain": plain, "encrypted": formats.KEKA} {
		if err := m.disk(name, key); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, kind := range kinds {
		key := formats.KEKA
		if kind == vdisk.Encrypting {
			key = plain
		}
		for _, how := range []string{"stopped", "killed", "back", "back-killed"} {
			name := map[vdisk.Conversion]string{vdisk.Encrypting: "encrypt", vdisk.Decrypting: "decrypt", vdisk.Recrypting: "recrypt"}[kind] + "-" + how
			if err := m.converting(name, key, kind, how); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	for _, c := range []struct {
		name string
		key  keysafe.KeyID
		mid  vdisk.Conversion
	}{{"chain", formats.KEKA, vdisk.NotConverting}, {"chain-plain", plain, vdisk.NotConverting}, {"chain-recrypt", formats.KEKA, vdisk.Recrypting}, {"chain-encrypt", plain, vdisk.Encrypting}} {
		if err := m.chain(c.name, c.key, c.mid); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return m.vm()
}

func (m *maker) options() vdisk.Options {
	return vdisk.Options{VM: formats.VM, KEKs: m.keks, Random: m.seed, Live: filepath.Join(m.dir, "..", filepath.Base(m.dir)+".live")}
}

// make makes a disk with content in a few places, and opens it.
func (m *maker) make(name string, key keysafe.KeyID) (*vdisk.Chain, string, error) {
	dir := filepath.Join(m.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, "", err
	}
	path := filepath.Join(dir, "vm.vmdk")
	var id uuid.UUID
	if _, err := io.ReadFull(m.seed, id[:]); err != nil {
		return nil, "", err
	}
	s := vdisk.Spec{Size: size, VM: formats.VM, UUID: id, Key: key, KEKs: m.keks, Random: m.seed}
	if err := vdisk.Create(m.ctx, path, s); err != nil {
		return nil, "", err
	}
	c, err := vdisk.OpenChain(m.ctx, path, m.options())
	if err != nil {
		return nil, "", err
	}
	return c, path, m.write(c, 0, 9<<20+512, 17<<20+512, size-512)
}

// write writes a few sectors at some places: what is random is not packed smaller.
func (m *maker) write(c *vdisk.Chain, at ...int64) error {
	for _, off := range at {
		p := make([]byte, min(512+off%1024, size-off))
		if _, err := io.ReadFull(m.seed, p); err != nil {
			return err
		}
		if err := c.WriteAt(p, off); err != nil {
			return err
		}
	}
	return c.Flush(m.ctx)
}

func (m *maker) disk(name string, key keysafe.KeyID) error {
	c, path, err := m.make(name, key)
	if err != nil {
		return err
	}
	return m.done(name, path, c, false)
}

// done closes a disk and notes what it shows.
func (m *maker) done(name, path string, c *vdisk.Chain, hot bool) error {
	sum, err := vdisk.Hash(m.ctx, c, nil)
	if err != nil {
		return err
	}
	return errors.Join(c.Close(), m.note(name, path, fmt.Sprintf("%x", sum), hot))
}

func (m *maker) note(name, path, sum string, hot bool) error {
	i, links, err := vdisk.DescribeChain(path, nil)
	if err != nil {
		return err
	}
	m.want.Disks[name] = formats.Disk{Top: filepath.Base(path), Size: i.Size, SHA256: sum, Encrypted: i.Encrypted, Epoch: i.Epoch, Links: len(links),
		Conversion: i.Conversion.String(), Back: i.Back, Boundary: i.Boundary, Hot: hot}
	return nil
}

// converting makes a disk whose conversion was stopped, or killed in the middle of a zone,
// on its way there or back.
func (m *maker) converting(name string, key keysafe.KeyID, kind vdisk.Conversion, how string) error {
	c, path, err := m.make(name+".work", key)
	if err != nil {
		return err
	}
	sum, err := vdisk.Hash(m.ctx, c, nil)
	if err != nil {
		return err
	}
	work, dir := filepath.Dir(path), filepath.Join(m.dir, name)
	stop, cancel := context.WithCancel(m.ctx)
	defer cancel()
	// A zone that is done is hot until the next one begins: the files of that instant are
	// those of a kill in it. The old form is put back into a part of it.
	n := 0
	var failed error
	old, err := os.ReadFile(filepath.Join(work, "vm-flat.vmdk"))
	if err != nil {
		return err
	}
	killed := func(zone int) func(vdisk.Progress) {
		n = 0
		return func(vdisk.Progress) {
			if n++; n == zone+1 {
				failed = snapshot(work, dir)
				cancel()
			}
		}
	}
	stopped := func(zone int) func(vdisk.Progress) {
		n = 0
		return func(vdisk.Progress) {
			if n++; n == zone+1 {
				cancel()
			}
		}
	}
	t := vdisk.Target{Kind: kind, Key: formats.KEKB}
	if kind == vdisk.Decrypting {
		t.Key = keysafe.KeyID{}
	}
	report := stopped(2)
	if how == "killed" {
		report = killed(2)
	}
	if err := c.Convert(stop, t, report); !errors.Is(err, context.Canceled) {
		return fmt.Errorf("it was not stopped: %w", err)
	}
	if how == "back" || how == "back-killed" {
		if old, err = os.ReadFile(filepath.Join(work, "vm-flat.vmdk")); err != nil {
			return err
		}
		stop, cancel = context.WithCancel(m.ctx)
		defer cancel()
		if report = stopped(1); how == "back-killed" {
			report = killed(1)
		}
		if err := c.Cancel(stop, report); !errors.Is(err, context.Canceled) {
			return fmt.Errorf("it was not stopped on its way back: %w", err)
		}
	}
	if err := errors.Join(failed, c.Close()); err != nil {
		return err
	}
	hot := how == "killed" || how == "back-killed"
	if !hot {
		err = os.Rename(work, dir)
	} else {
		err = errors.Join(tear(filepath.Join(dir, "vm-flat.vmdk"), old), os.RemoveAll(work))
	}
	if err != nil {
		return err
	}
	return m.note(name, filepath.Join(dir, "vm.vmdk"), fmt.Sprintf("%x", sum), hot)
}

// snapshot copies the files of an instant.
func snapshot(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	names, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(from, n.Name()))
		if err != nil {
			return err
		}
		f, err := os.Create(filepath.Join(to, n.Name()))
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(int64(len(b))), writeData(f, b), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// writeData writes what is not zero, so that holes stay holes.
func writeData(f *os.File, b []byte) error {
	zeros := make([]byte, 4096)
	for off := 0; off < len(b); off += 4096 {
		p := b[off:min(off+4096, len(b))]
		if string(p) != string(zeros[:len(p)]) {
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				return err
			}
		}
	}
	return nil
}

// tear puts the old form back into every second sector that differs, of the zone that was
// written last: sectors of the same zone only differ there.
func tear(extent string, old []byte) error {
	f, err := os.OpenFile(extent, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	state, err := os.ReadFile(extent + ".state")
	if err != nil {
		return err
	}
	start, end := hotZone(state)
	if start == end {
		return errors.New("no zone is hot")
	}
	buf := make([]byte, 512)
	torn := 0
	for off, n := start, 0; off < end; off += 512 {
		k, err := f.ReadAt(buf, off)
		if err != nil && err != io.EOF {
			return err
		}
		was := make([]byte, 512)
		if off < int64(len(old)) {
			copy(was, old[off:])
		}
		if string(buf[:k]) == string(was[:k]) {
			continue
		}
		if n++; n%2 == 0 {
			continue
		}
		if _, err := f.WriteAt(was[:k], off); err != nil {
			return err
		}
		torn++
	}
	if torn == 0 {
		return errors.New("nothing differs in the hot zone")
	}
	return f.Sync()
}

// hotZone reads the hot zone from the newer slot; offsets are those of disk-format.md.
func hotZone(state []byte) (start, end int64) {
	le := func(at int) int64 {
		var n int64
		for i := 7; i >= 0; i-- {
			n = n<<8 | int64(state[at+i])
		}
		return n
	}
	slot := 0
	if le(4096+16) > le(16) {
		slot = 4096
	}
	return le(slot + 112), le(slot+112) + le(slot+120)
}

// chain makes a base and two snapshot links, the conversion of which was stopped.
func (m *maker) chain(name string, key keysafe.KeyID, mid vdisk.Conversion) error {
	c, _, err := m.make(name, key)
	if err != nil {
		return err
	}
	for i := range int64(2) {
		if _, err := c.Snapshot(m.ctx, vdisk.LinkSpec{}); err != nil {
			return err
		}
		if err := m.write(c, i*4096+512, 10<<20+i<<20); err != nil {
			return err
		}
		if err := c.Trim(9<<20, 4096); err != nil {
			return err
		}
	}
	if err := c.Flush(m.ctx); err != nil {
		return err
	}
	if mid != vdisk.NotConverting {
		stop, cancel := context.WithCancel(m.ctx)
		defer cancel()
		links := map[int64]bool{}
		err := c.Convert(stop, vdisk.Target{Kind: mid, Key: formats.KEKB}, func(p vdisk.Progress) {
			if links[p.Done/size] = true; len(links) > 1 && p.Done%size > 8<<20 { // in the middle of the second link
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) {
			return fmt.Errorf("it was not stopped: %w", err)
		}
	}
	return m.done(name, c.Path(), c, false)
}

// vm makes a VM's folder: a VMX with a bundle, a disk, encrypted files.
func (m *maker) vm() error {
	c, path, err := m.make("vm", formats.KEKA)
	if err != nil {
		return err
	}
	disk := c.Info().UUID
	if err := m.done("vm", path, c, false); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	kek, _ := m.keks.KEK(formats.KEKA)
	defer kek.Wipe()
	b, err := keysafe.NewBundle(m.seed, formats.VM, formats.KEKA, kek)
	if err != nil {
		return err
	}
	defer b.Wipe()
	b.Disks[disk] = keysafe.DiskRecord{Encrypted: true, Epoch: 1}
	m.want.Bundle = formats.Bundle{Disk: disk.String(), Epoch: 1, Files: map[string]string{}, Secrets: map[string]string{}}
	for name, length := range map[string]int64{"vm.nvram": 4500, "vm.vmss": 3000, "empty.vmem": 0} {
		key, err := secret.Random(m.seed, keysafe.DEKSize(keysafe.CipherXTS))
		if err != nil {
			return err
		}
		b.Files[name] = key
		m.want.Bundle.Files[name] = formats.Digest(key)
		if err := m.file(filepath.Join(dir, name), key, name, length); err != nil {
			return err
		}
	}
	key, err := secret.Random(m.seed, 48)
	if err != nil {
		return err
	}
	b.Secrets["vtpm"] = key
	m.want.Bundle.Secrets["vtpm"] = formats.Digest(key)
	f := vmxfile.New()
	for _, e := range [][2]string{{"config.version", "8"}, {"virtualHW.version", "19"}, {"displayName", "frozen"}, {"uuid.bios", vmxfile.FormatUUID(formats.VM)}, {"scsi0:0.fileName", "vm.vmdk"}} {
		if err := f.Set(e[0], e[1]); err != nil {
			return err
		}
	}
	if err := b.Seal(m.seed, f); err != nil {
		return err
	}
	m.want.Bundle.Generation = b.Generation()
	return f.Save(filepath.Join(dir, "vm.vmx"))
}

func (m *maker) file(path string, key *secret.Key, name string, length int64) error {
	f, err := vmfiles.Create(path, key)
	if err != nil {
		return err
	}
	p := make([]byte, length)
	if length > 0 { // content in the middle; the rest is zeros
		if _, err := io.ReadFull(m.seed, p[length/2:min(length/2+1000, length)]); err != nil {
			return err
		}
		if _, err := f.WriteAt(p, 0); err != nil {
			return err
		}
	}
	m.want.Files[name] = formats.File{Size: length, SHA256: fmt.Sprintf("%x", sha256.Sum256(p))}
	return errors.Join(f.Sync(), f.Close())
}
