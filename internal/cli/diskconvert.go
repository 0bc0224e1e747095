package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mortise/internal/keysafe"
	"mortise/internal/vdisk"
)

// A conversionKind is what is to be done to a disk, as flags and the control socket
// name it.
type conversionKind string

const (
	doEncrypt conversionKind = "encrypt"
	doDecrypt conversionKind = "decrypt"
	doRecrypt conversionKind = "recrypt"
	doShallow conversionKind = "shallow"
	doResume  conversionKind = "resume"
	doCancel  conversionKind = "cancel"
)

var conversionKinds = []conversionKind{doEncrypt, doDecrypt, doRecrypt, doShallow, doResume, doCancel}

func parseConversion(text string) (conversionKind, error) {
	for _, k := range conversionKinds {
		if string(k) == text {
			return k, nil
		}
	}
	return "", fmt.Errorf("%q is none of encrypt, decrypt, recrypt, shallow, resume and cancel", text)
}

// kind is the vdisk conversion that a verb asks for; none for the others.
func (k conversionKind) kind() vdisk.Conversion {
	switch k {
	case doEncrypt:
		return vdisk.Encrypting
	case doDecrypt:
		return vdisk.Decrypting
	case doRecrypt:
		return vdisk.Recrypting
	}
	return vdisk.NotConverting
}

// A convertRequest is one conversion to do.
type convertRequest struct {
	Kind  conversionKind `json:"kind"`
	Keys  diskKeys       `json:"keys"`
	Limit int64          `json:"limit"` // bytes per second; 0: none
}

// convertVolume does what r says to an open disk. When ctx ends it stops at a
// durable boundary. What was interrupted goes on when it is asked for again, under
// the key that it was begun with.
func convertVolume(ctx context.Context, v volume, ring *keyring, r convertRequest, report func(vdisk.Progress)) error {
	if r.Limit > 0 {
		v.SetPace(vdisk.Pace{Limit: r.Limit})
	}
	i := v.Info()
	switch r.Kind {
	case doCancel, doResume:
		if i.Conversion == vdisk.NotConverting {
			return fmt.Errorf("%s: no conversion of it is unfinished: there is nothing to %s", i.Path, r.Kind)
		}
		if r.Kind == doCancel {
			return v.Cancel(ctx, report)
		}
		if err := v.Resume(ctx, report); err != nil {
			return err
		}
		if i := v.Info(); i.Conversion != vdisk.NotConverting {
			return fmt.Errorf("%s: that link is done, others are not: go on with --encrypt or --decrypt, whichever is meant", i.Path)
		}
		return nil
	case doShallow:
		to, err := r.Keys.newKey(ctx, ring)
		if err != nil {
			return err
		}
		return v.ShallowRecrypt(ctx, to)
	}
	t := vdisk.Target{Kind: r.Kind.kind()}
	var err error
	switch {
	case i.Conversion == t.Kind && len(i.TargetKeys) > 0: // its key is among those that opened the disk
		t.Key = i.TargetKeys[0]
	case r.Kind == doEncrypt && i.Encrypted && i.Conversion == vdisk.NotConverting:
		err = fmt.Errorf("%s: it is encrypted already, by key %s; --recrypt gives it another data key, --shallow another KEK", i.Path, i.Keys[0])
	case r.Kind == doEncrypt:
		t.Key, err = r.Keys.target(ctx, ring)
	case r.Kind == doRecrypt:
		t.Key, err = r.Keys.newKey(ctx, ring)
	}
	if err != nil {
		return err
	}
	return v.Convert(ctx, t, report)
}

// newKey is target for what changes a key: the new one is named apart from those that
// open the disk.
func (k *diskKeys) newKey(ctx context.Context, ring *keyring) (keysafe.KeyID, error) {
	if k.NewFile == "" && k.KeyID == "" {
		return keysafe.KeyID{}, errors.New(`under which key from now on? give --new-key-file, or --kmip with --key ID or "--key new"`)
	}
	return k.target(ctx, ring)
}

func parseLimit(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	n, err := parseSize(strings.TrimSuffix(text, "/s"), 1)
	if err != nil {
		return 0, fmt.Errorf("--limit: %w", err)
	}
	return n, nil
}

func diskConvert(g *globals) *cobra.Command {
	var d diskFlags
	var want struct {
		encrypt, decrypt, recrypt, shallow, resume, cancel, estimate bool
	}
	var limit, socket string
	cmd := &cobra.Command{
		Use:   "convert DISK.vmdk --encrypt | --decrypt | --recrypt | --shallow | --resume | --cancel",
		Short: "Encrypt, decrypt or re-key a disk in place, also while a guest uses it",
		Long: `Gives a disk another form in place:

  --encrypt   a disk in clear gets a data key, and every sector is encrypted
  --decrypt   the other way round: the result is a flat VMDK
  --recrypt   a new data key and a new KEK; every sector is rewritten (deep recrypt)
  --shallow   a new KEK for the same data key: only the key safe is rewritten

Nothing is copied, and no second disk's space is needed. Ctrl-C stops it at a durable
boundary within a moment; after that, or after a kill or a power cut, the disk works as it
is, part of it in the old form. --resume goes on, and so does the same command again;
--cancel runs back to the old form and the old key.

A disk that mortise disk serve has open is converted there, under the running guest: give
--socket with the control socket that serve named.

--estimate tries the storage and says how much there is to do and how long it takes.
` + keysHelp + `
The new key is --new-key-file, or --key at --kmip; for --encrypt also the one --key-file.

JSON: {"path", …} as mortise disk info, with "seconds", when it is done; or for
--estimate {"bytes", "rate", "seconds", "secondsBeside": of a guest that is never idle}.`,
		Example: `  mortise disk convert vm1.vmdk --encrypt --key-file vm1.key
  mortise disk convert vm1.vmdk --recrypt --key-file old.key --new-key-file new.key --limit 100M
  mortise disk convert vm1.vmdk --shallow --key-file vm1.key --kmip kmip://kms1 \
    --client-cert me.pem --ca ca.pem --key new
  mortise disk convert vm1.vmdk --resume --key-file vm1.key
  mortise disk convert vm1.vmdk --encrypt --key-file vm1.key --socket /run/vm1.sock.control`,
		Args: needs("DISK.vmdk"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s := g.streams(cmd)
			var kinds []conversionKind
			for k, given := range map[conversionKind]bool{doEncrypt: want.encrypt, doDecrypt: want.decrypt, doRecrypt: want.recrypt, doShallow: want.shallow, doResume: want.resume, doCancel: want.cancel} {
				if given {
					kinds = append(kinds, k)
				}
			}
			if want.estimate && len(kinds) <= 1 {
				return explainDisk(s.estimateDisk(cmd.Context(), args[0], &d), args[0])
			}
			if len(kinds) != 1 {
				return errors.New("give one of --encrypt, --decrypt, --recrypt, --shallow, --resume and --cancel")
			}
			r := convertRequest{Kind: kinds[0], Keys: d.keys}
			var err error
			if r.Limit, err = parseLimit(limit); err != nil {
				return err
			}
			begun := time.Now()
			if socket != "" {
				if err := r.Keys.absolute(); err != nil {
					return err
				}
				p, report := s.diskProgress(string(r.Kind) + " " + filepath.Base(args[0]))
				_, err = s.askServed(cmd.Context(), args[0], socket, controlRequest{Convert: &r}, report)
				p.end(err == nil && r.Kind != doShallow)
			} else {
				err = s.convertCold(cmd.Context(), args[0], &d, r)
			}
			if err != nil {
				return explainDisk(s.sayStopped(cmd.Context(), args[0], socket, err), args[0])
			}
			return s.converted(args[0], r.Kind, time.Since(begun))
		},
	}
	f := cmd.Flags()
	f.BoolVar(&want.encrypt, "encrypt", false, "encrypt a disk in clear")
	f.BoolVar(&want.decrypt, "decrypt", false, "decrypt it")
	f.BoolVar(&want.recrypt, "recrypt", false, "give it a new data key and a new KEK")
	f.BoolVar(&want.shallow, "shallow", false, "give its data key a new KEK")
	f.BoolVar(&want.resume, "resume", false, "go on with what was interrupted")
	f.BoolVar(&want.cancel, "cancel", false, "run what was interrupted back to the old form")
	f.BoolVar(&want.estimate, "estimate", false, "only say how long it would take")
	f.StringVar(&limit, "limit", "", "rewrite at most so many bytes per second: 50M, 1G")
	f.StringVar(&socket, "socket", "", "control socket of the mortise disk serve that has the disk open")
	d.bind(f)
	d.keys.bindNew(f, true)
	return cmd
}

func (s *streams) convertCold(ctx context.Context, path string, d *diskFlags, r convertRequest) (err error) {
	ring := newKeyring()
	defer ring.wipe()
	if i, err := vdisk.Describe(path); err == nil {
		d.frozen = i.Sealed != ""
	}
	v, err := d.open(ctx, path, false, ring, s.logger(slog.LevelError))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	p, report := s.diskProgress(string(r.Kind) + " " + filepath.Base(path))
	err = convertVolume(ctx, v, ring, r, report)
	p.end(err == nil && r.Kind != doShallow)
	return err
}

// sayStopped tells how to go on with a conversion that did not end.
func (s *streams) sayStopped(ctx context.Context, path, socket string, err error) error {
	if top, terr := topOf(path); terr == nil {
		path = top
	}
	i, _, derr := vdisk.DescribeChain(path, besideIt(path))
	if derr != nil || i.Conversion == vdisk.NotConverting {
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			return ctx.Err()
		}
		return err
	}
	at := i.Boundary
	if i.Back {
		at = i.Size - at
	}
	how := "mortise disk convert " + path
	if socket != "" {
		how += " --socket " + socket
	}
	said := fmt.Sprintf("the conversion (%s) stopped at %.0f%%, on a durable boundary; nothing is lost and the disk works as it is.\n  go on:  %s --resume …\n  back:   %s --cancel …\nwith the same keys", i.Conversion, 100*float64(at)/float64(i.Size), how, how)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		fmt.Fprintln(s.err, said)
		return ctx.Err()
	}
	return fmt.Errorf("%w\n%s", err, said)
}

// converted tells the result of a conversion.
func (s *streams) converted(path string, kind conversionKind, took time.Duration) error {
	if !s.json {
		return s.diskInfo(path, map[conversionKind]string{doEncrypt: "Encrypted ", doDecrypt: "Decrypted ", doRecrypt: "Recrypted ", doShallow: "Recrypted ", doResume: "Done: ", doCancel: "Back: "}[kind])
	}
	path, err := topOf(path)
	if err != nil {
		return err
	}
	i, _, err := vdisk.DescribeChain(path, besideIt(path))
	if err != nil {
		return err
	}
	return s.printJSON(struct {
		diskState
		Seconds float64 `json:"seconds"`
	}{newDiskState(i), took.Seconds()})
}

func (s *streams) estimateDisk(ctx context.Context, path string, d *diskFlags) (err error) {
	ring := newKeyring()
	defer ring.wipe()
	v, err := d.open(ctx, path, true, ring, s.logger(slog.LevelError))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	e, err := v.Estimate(ctx)
	if err != nil {
		return err
	}
	if s.json {
		return s.printJSON(map[string]any{"bytes": e.Bytes, "rate": e.Rate, "seconds": e.Took.Seconds(), "secondsBeside": e.Busy.Seconds()})
	}
	if e.Rate == 0 {
		s.say("%s has no data: a conversion takes a moment.", clean(path))
		return nil
	}
	s.say("%s to rewrite at about %s/s: %s, and up to %s beside a guest that is never idle.", size(e.Bytes), size(int64(e.Rate)), short(e.Took), short(e.Busy))
	return nil
}
