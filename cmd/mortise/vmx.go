package main

import (
	"os"

	"github.com/spf13/cobra"

	"mortise/internal/secret"
	"mortise/internal/vmx"
)

// vmxCommand is how a host agent starts its vmx processes; nobody types it.
func vmxCommand() *cobra.Command {
	var cfg vmx.Config
	var log logFlags
	cmd := &cobra.Command{
		Use:    "vmx",
		Short:  "Serve one VM's disks and files (started by mortise host)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if err := secret.LockDown(); err != nil {
				return err
			}
			if cfg.Logger, err = log.logger(os.Stderr, "vmx"); err != nil {
				return err
			}
			return vmx.Run(cmd.Context(), cfg)
		},
	}
	cmd.Flags().StringVar(&cfg.VMX, "vmx", "", "path of the VM's VMX")
	cmd.Flags().StringVar(&cfg.RunDir, "run-dir", "", "folder for sockets")
	cmd.Flags().IntVar(&cfg.UID, "qemu-uid", 0, "user that QEMU runs as")
	cmd.Flags().IntVar(&cfg.GID, "qemu-gid", 0, "its group")
	cmd.Flags().BoolVar(&cfg.Direct, "direct-io", false, "round the page cache")
	log.bind(cmd.Flags())
	return cmd
}
