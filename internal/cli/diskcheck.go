package cli

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"mortise/internal/secret"
	"mortise/internal/vdisk"
)

func diskCheck(g *globals) *cobra.Command {
	var d diskFlags
	var read, hash bool
	cmd := &cobra.Command{
		Use:   "check DISK.vmdk",
		Short: "Verify a disk's files, MACs and key safes; with --read every sector",
		Long: `Looks at everything that a disk consists of, and changes nothing: the descriptor and its
MAC, each pair of the key safe whose key was given, the state file, whether they belong
together, whether the extent is long enough. --read also reads every sector that has
content. --hash makes a SHA-256 of the disk as a guest sees it.

Without a key only what needs none is checked, and it is said what was not proven. XTS
does not authenticate data: what somebody who can write to the storage did to ciphertext
is read as noise and not found here; compare --hash with an earlier one.

Exits with an error when something is wrong.
` + keysHelp + `

JSON: {"disk", "whole", "findings": [{"what", "result" (right, wrong, not proven),
"said"}], "read", "bad": [{"link", "offset", "length"}], "sha256"}.`,
		Example: `  mortise disk check vm1.vmdk --key-file vm1.key --read
  mortise disk check vm1.vmdk`,
		Args: needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return explainDisk(g.streams(cmd).checkDisk(cmd.Context(), args[0], &d, read, hash), args[0])
		},
	}
	f := cmd.Flags()
	f.BoolVar(&read, "read", false, "read every sector that has content")
	f.BoolVar(&hash, "hash", false, "SHA-256 of the whole disk as a guest sees it; reads it too")
	d.bind(f)
	d.bindExpect(f)
	return cmd
}

type checkedDisk struct {
	Disk     string         `json:"disk"`
	Whole    bool           `json:"whole"`
	Findings []checkFinding `json:"findings"`
	Read     int64          `json:"read"`
	Bad      []badRange     `json:"bad"`
	SHA256   string         `json:"sha256,omitempty"`
}

type checkFinding struct {
	What   string `json:"what"`
	Result string `json:"result"`
	Said   string `json:"said"`
}

type badRange struct {
	Link   string `json:"link"`
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
}

func (s *streams) checkDisk(ctx context.Context, path string, d *diskFlags, read, hash bool) error {
	if err := secret.LockDown(); err != nil {
		return err
	}
	path, err := topOf(path)
	if err != nil {
		return err
	}
	ring := newKeyring()
	defer ring.wipe()
	o := vdisk.CheckOptions{Read: read, Hash: hash}
	if len(d.keys.Files) > 0 || len(d.keys.KMIP) > 0 || read || hash {
		if o.Options, err = d.options(ctx, path, ring); err != nil && (!errors.As(err, new(*vdisk.Error)) || errors.Is(err, vdisk.ErrParent)) {
			return err // a damaged disk is Check's to tell
		}
	}
	v := checkedDisk{Disk: path, Whole: true, Findings: []checkFinding{}, Bad: []badRange{}}
	links := []vdisk.Info{{Path: path}}
	if _, all, err := vdisk.DescribeChain(path, besideIt(path)); err == nil {
		links = all
	}
	for _, l := range links {
		lo := o
		if filepath.Dir(l.Path) != filepath.Dir(path) {
			i := slices.IndexFunc(o.Bases, func(b vdisk.Base) bool { return b.Folder == filepath.Dir(l.Path) })
			if i < 0 {
				continue // another VM's, and --base does not say whose
			}
			lo.VM, lo.UUID, lo.Expect.Epoch = o.Bases[i].VM, uuid.Nil, 0
		}
		if err := s.checkLink(ctx, l.Path, len(links) > 1, lo, &v); err != nil {
			return err
		}
	}
	if len(links) > 1 && v.Whole && o.KEKs != nil {
		c, err := d.open(ctx, path, true, ring, s.logger(slog.LevelError))
		if err != nil {
			v.Whole = false
			v.Findings = append(v.Findings, checkFinding{"chain", "wrong", err.Error()})
		} else {
			v.Findings = append(v.Findings, checkFinding{"chain", "right", fmt.Sprintf("%d links fit together", len(links))})
			if v.SHA256, err = s.hashVolume(ctx, c, hash); err == nil {
				err = c.Close()
			}
			if err != nil {
				return err
			}
		}
	}
	if s.json {
		if err := s.printJSON(v); err != nil {
			return err
		}
	} else {
		s.sayChecked(v, read || hash)
	}
	if !v.Whole {
		return fmt.Errorf("%s is not whole", path)
	}
	return nil
}

// checkLink adds what is found of one link.
func (s *streams) checkLink(ctx context.Context, path string, several bool, o vdisk.CheckOptions, v *checkedDisk) error {
	name := ""
	if several {
		name, o.Read, o.Hash = filepath.Base(path)+": ", o.Read || o.Hash, false
	}
	p := s.progress("checking " + filepath.Base(path))
	o.Report = func(done, total int64) { p.update(state{done: done, total: total}) }
	r, err := vdisk.Check(ctx, path, o)
	p.end(err == nil && (o.Read || o.Hash))
	if err != nil {
		return err
	}
	v.Whole = v.Whole && r.Whole()
	v.Read += r.Read
	v.SHA256 = hex.EncodeToString(r.Hash)
	for _, f := range r.Findings {
		c := checkFinding{name + f.What, "right", f.Said}
		switch {
		case f.Err != nil:
			c.Result, c.Said = "wrong", f.Err.Error()
		case f.Open:
			c.Result = "not proven"
		}
		v.Findings = append(v.Findings, c)
	}
	for _, b := range r.Bad {
		v.Bad = append(v.Bad, badRange{path, b.Off, b.Len})
	}
	return nil
}

func (s *streams) sayChecked(v checkedDisk, read bool) {
	for _, f := range v.Findings {
		s.say("%-10s  %s: %s", f.Result, f.What, clean(f.Said))
	}
	if read && v.Whole {
		s.say("%-10s  sectors: all that have content can be read, %s", "right", size(v.Read))
	}
	for _, b := range v.Bad {
		s.say("%-10s  sectors: %d bytes at %d of %s cannot be read", "wrong", b.Length, b.Offset, clean(b.Link))
	}
	if v.SHA256 != "" {
		s.say("sha256      %s", v.SHA256)
	}
	if v.Whole {
		s.say("%s is whole, as far as was looked.", clean(v.Disk))
	}
}
