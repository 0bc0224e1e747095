package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"mortise/internal/host"
	"mortise/internal/storage"
)

func hostDatastore() *cobra.Command {
	cmd := &cobra.Command{Use: "datastore", Short: "Prepare folders that hold VMs"}
	var d host.Datastore
	initCmd := &cobra.Command{
		Use:   "init",
		Short: "Make a mounted folder a datastore",
		Long: `Probes the folder's storage, and writes a marker file into it. Every host that
mounts the same storage recognises it by the marker, and none ever writes into the
empty mount point while the storage is away. Running it again changes nothing.
Storage that would lose disks is refused; see "mortise host datastore check".`,
		Example: `  mortise host datastore init --name ds1 --path /srv/ds1`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := host.InitDatastore(d); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is datastore %s.\n", d.Path, d.Name)
			return nil
		},
	}
	initCmd.Flags().StringVar(&d.Name, "name", "", "name of the datastore, the same on every host")
	initCmd.Flags().StringVar(&d.Path, "path", "", "the folder")
	_ = initCmd.MarkFlagRequired("name")
	_ = initCmd.MarkFlagRequired("path")

	var path string
	var asJSON bool
	checkCmd := &cobra.Command{
		Use:   "check",
		Short: "Say what a folder's storage can do, and what is unsafe about it",
		Long: `Finds out how the folder is mounted, and tries out in a small file there what
disks need: locks, durable writes and renames, holes, direct I/O. It fails if the
storage must not hold disks, with the reason and what to do instead.`,
		Example: `  mortise host datastore check --path /srv/ds1`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			r, err := storage.Probe(ctx, path)
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				err = e.Encode(r)
			} else {
				printStorage(cmd.OutOrStdout(), r)
			}
			return errors.Join(err, r.Err())
		},
	}
	checkCmd.Flags().StringVar(&path, "path", "", "the folder")
	checkCmd.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	_ = checkCmd.MarkFlagRequired("path")
	cmd.AddCommand(initCmd, checkCmd)
	return cmd
}

func printStorage(w io.Writer, r *storage.Report) {
	fmt.Fprintf(w, "%s is on %s (%s), mounted at %s with %s\n", r.Path, r.Source, r.Type, r.Mount, r.Options)
	fmt.Fprintf(w, "  free          %d of %d MiB\n", r.Free>>20, r.Capacity>>20)
	if len(r.Unsafe) == 0 {
		can := func(b bool) string { return map[bool]string{true: "yes", false: "no"}[b] }
		direct := "no"
		if r.Direct.Offset > 0 {
			direct = fmt.Sprintf("aligned to %d bytes, buffers to %d", r.Direct.Offset, r.Direct.Memory)
		}
		sector := "unknown, 512 is assumed"
		if r.Sector > 0 {
			sector = fmt.Sprintf("%d bytes", r.Sector)
		}
		fmt.Fprintf(w, "  largest disk  %d GiB\n  direct I/O    %s\n  whole writes  %s\n  holes         made %s, found %s\n  zeros, space  %s, %s\n  locks         %s\n  durable write %s\n",
			r.MaxFile>>30, direct, sector, can(r.Punch), can(r.Sparse), can(r.Zero), can(r.Reserve), can(r.Locks), can(r.DSync))
	}
	for _, f := range r.Warnings {
		fmt.Fprintf(w, "note: %s\n", f)
	}
}
