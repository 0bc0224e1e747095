package cli

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"mortise/internal/secret"
	"mortise/internal/vdisk"
)

// Import and export let qemu-img read or write the other format, and connect it to
// the disk by NBD on a socket that nobody else knows: what it writes is encrypted on its
// way, in one pass, and no plaintext lies anywhere meanwhile.

func diskImport(g *globals) *cobra.Command {
	var d diskFlags
	var format string
	var plain, noVerify, hash bool
	cmd := &cobra.Command{
		Use:   "import SOURCE DISK.vmdk",
		Short: "Make an encrypted disk of a raw, qcow2, vmdk, vdi, vhdx … image",
		Long: `Makes a new disk of an image that qemu-img reads, encrypting in the same pass: no
plaintext is written anywhere. What is a hole or zero in the source takes no space. Then
both are compared, sector by sector, unless --no-verify.

The source must not be in use. Files that it refers to must lie in its own folder. The
new disk is removed again if the import fails or is interrupted.
` + keysHelp + `

JSON: as mortise disk info, with "verified", and "sha256" with --hash.`,
		Example: `  mortise disk import old.qcow2 vm2.vmdk --key-file vm2.key
  mortise disk import /dev/vg0/vm2 vm2.vmdk --format raw --kmip kmip://kms1 \
    --client-cert me.pem --ca ca.pem --key new`,
		Args: needs("SOURCE", "DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.streams(cmd).importDisk(cmd.Context(), args[0], args[1], &d, importOptions{format, plain, !noVerify, hash})
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", "format of the source (default: qemu-img finds out; say raw where a guest could write the first sector)")
	f.BoolVar(&plain, "plain", false, "make a disk in clear")
	f.BoolVar(&noVerify, "no-verify", false, "do not compare the result with the source")
	f.BoolVar(&hash, "hash", false, "SHA-256 of the result as a guest sees it")
	d.bind(f)
	d.keys.bindNew(f, false)
	return cmd
}

type importOptions struct {
	format       string
	plain        bool
	verify, hash bool
}

func (s *streams) importDisk(ctx context.Context, source, path string, d *diskFlags, o importOptions) (err error) {
	if o.format == "" && strings.EqualFold(filepath.Ext(source), ".raw") {
		o.format = "raw" // whatever the guest has written into its first sector
	}
	if err := checkNotEncrypted(source); err != nil {
		return err
	}
	info, err := inspect(ctx, source, o.format)
	if err != nil {
		return err
	}
	if info.VirtualSize <= 0 {
		return fmt.Errorf("%s is empty", source)
	}
	length := (info.VirtualSize + sectorSize - 1) / sectorSize * sectorSize
	if err := d.create(ctx, path, length, o.plain, ""); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, vdisk.Delete(context.WithoutCancel(ctx), path))
		}
	}()
	ring := newKeyring()
	defer ring.wipe()
	v, err := d.open(ctx, path, false, ring, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	// The new disk reads as zeros already.
	err = s.throughNBD(ctx, v, false, "importing "+filepath.Base(source), func(uri string) []string {
		return []string{"convert", "-p", "-n", "--target-is-zero", "-W", "-t", "writeback", "-f", info.Format, "-O", "raw", source, uri}
	})
	if err == nil {
		err = v.Flush(ctx)
	}
	if err == nil && o.verify {
		err = s.compareDisk(ctx, v, source, info.Format)
	}
	if err != nil {
		return err
	}
	return s.transferred(ctx, path, v, "Imported ", o)
}

// compareDisk compares a disk with an image, sector by sector.
func (s *streams) compareDisk(ctx context.Context, v volume, image, format string) error {
	err := s.throughNBD(ctx, v, true, "comparing with "+filepath.Base(image), func(uri string) []string {
		return []string{"compare", "-p", "-f", format, "-F", "raw", image, uri}
	})
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("the copy is not the same as %s: %w; is the image in use? run it again when it is not", image, err)
	}
	return err
}

// throughNBD runs qemu-img with a volume on a private socket.
func (s *streams) throughNBD(ctx context.Context, v volume, readOnly bool, title string, args func(uri string) []string) error {
	uri, stop, err := serveQuietly(v, readOnly)
	if err != nil {
		return err
	}
	p := s.progress(title)
	cmd := exec.CommandContext(ctx, "qemu-img", args(uri)...)
	cmd.Stdout = &percentWriter{tell: func(percent float64) { p.update(state{percent: percent}) }}
	err = runQemuImg(ctx, cmd)
	p.end(err == nil)
	return errors.Join(err, stop())
}

// transferred tells what an import has made.
func (s *streams) transferred(ctx context.Context, path string, v volume, done string, o importOptions) error {
	sum, err := s.hashVolume(ctx, v, o.hash)
	if err != nil {
		return err
	}
	if s.json {
		return s.printJSON(struct {
			diskState
			Verified bool   `json:"verified"`
			SHA256   string `json:"sha256,omitempty"`
		}{newDiskState(v.Info()), o.verify, sum})
	}
	if err := s.diskInfo(path, done); err != nil {
		return err
	}
	if o.verify {
		s.say("  verified    every sector was compared with the source")
	}
	if sum != "" {
		s.say("  sha256      %s", sum)
	}
	return nil
}

func (s *streams) hashVolume(ctx context.Context, v volume, wanted bool) (string, error) {
	if !wanted {
		return "", nil
	}
	p := s.progress("hashing")
	sum, err := vdisk.Hash(ctx, v, func(done, total int64) { p.update(state{done: done, total: total}) })
	p.end(err == nil)
	return hex.EncodeToString(sum), err
}

// exportFormats are those that qemu-img makes well of a disk.
var exportFormats = []string{"raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc"}

func diskExport(g *globals) *cobra.Command {
	var d diskFlags
	var format, options string
	var clear, noVerify, hash bool
	cmd := &cobra.Command{
		Use:   "export DISK.vmdk TARGET --in-clear",
		Short: "Write a disk's content in clear to a raw, qcow2, vmdk … image",
		Long: `Writes what a guest sees to a new image file, which qemu-img makes. The result is in
clear: --in-clear says that this is meant. Holes stay holes. Then both are compared,
sector by sector, unless --no-verify.

The disk is opened for reading: it must not be in use for writing. A TARGET that exists is
not written over; one that is not finished is removed.
` + keysHelp + `

JSON: {"disk", "target", "format", "size", "verified", "sha256"}.`,
		Example: `  mortise disk export vm1.vmdk vm1.qcow2 --in-clear --key-file vm1.key
  mortise disk export vm1.vmdk vm1-stream.vmdk --in-clear --key-file vm1.key \
    --options subformat=streamOptimized`,
		Args: needs("DISK.vmdk", "TARGET"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !clear {
				return errors.New("the image would hold the disk in clear: give --in-clear if that is meant")
			}
			s := g.streams(cmd)
			return explainDisk(s.exportDisk(cmd.Context(), args[0], args[1], &d, exportOptions{format, options, !noVerify, hash}), args[0])
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", "format of the image: "+strings.Join(exportFormats, ", ")+" (default: by TARGET's ending)")
	f.StringVar(&options, "options", "", "options of qemu-img for it, e.g. subformat=streamOptimized")
	f.BoolVar(&clear, "in-clear", false, "agree that the image holds the disk in clear")
	f.BoolVar(&noVerify, "no-verify", false, "do not compare the result with the disk")
	f.BoolVar(&hash, "hash", false, "SHA-256 of the disk as a guest sees it")
	d.bind(f)
	d.bindExpect(f)
	return cmd
}

type exportOptions struct {
	format, options string
	verify, hash    bool
}

func (s *streams) exportDisk(ctx context.Context, path, target string, d *diskFlags, o exportOptions) (err error) {
	if o.format == "" {
		o.format = strings.TrimPrefix(strings.ToLower(filepath.Ext(target)), ".")
		if o.format == "img" {
			o.format = "raw"
		}
	}
	if !slices.Contains(exportFormats, o.format) {
		return fmt.Errorf("--format %q: want one of %s", o.format, strings.Join(exportFormats, ", "))
	}
	if err := secret.LockDown(); err != nil {
		return err
	}
	ring := newKeyring()
	defer ring.wipe()
	v, err := d.open(ctx, path, true, ring, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	f, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) // plaintext is the owner's only
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already, and is not written over: choose another name", target)
	}
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(target))
		}
	}()
	err = s.throughNBD(ctx, v, true, "exporting "+filepath.Base(path), func(uri string) []string {
		args := []string{"convert", "-p", "-f", "raw", "-O", o.format}
		if o.options != "" {
			args = append(args, "-o", o.options)
		}
		return append(args, uri, target)
	})
	if err == nil && o.verify {
		err = s.compareDisk(ctx, v, target, o.format)
	}
	if err != nil {
		return err
	}
	sum, err := s.hashVolume(ctx, v, o.hash)
	if err != nil {
		return err
	}
	if s.json {
		return s.printJSON(map[string]any{"disk": path, "target": target, "format": o.format, "size": v.Size(), "verified": o.verify, "sha256": sum})
	}
	s.say("Exported %s to %s, %s, in clear.", clean(path), clean(target), o.format)
	if o.verify {
		s.say("  verified    every sector was compared")
	}
	if sum != "" {
		s.say("  sha256      %s", sum)
	}
	return nil
}
