// Command mortise holds every role of Mortise and the client verbs.
//
// The files here read flags and configuration, wire packages together and
// handle signals. What the roles do is in internal/: kms, center, host, vmx; the
// client verbs are in internal/cli.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"mortise/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second Ctrl-C ends the process the hard way: nothing that is durable
	// depends on a clean end.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	root := rootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var code exitCode
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "mortise: interrupted")
		return 130
	default:
		fmt.Fprintln(os.Stderr, "mortise:", err)
		return 1
	}
}

// exitCode ends the process with that code, without another message.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "mortise",
		Short: "VM encryption for KVM: key server, control plane, host agent and client",
		Long: `Mortise encrypts whole virtual machines on KVM hosts, as vSphere defines it.

Try it on this machine:   mortise dev
Then, as a client:        mortise login https://127.0.0.1:8443
Real installations start one role per machine: mortise kms serve,
mortise center serve, mortise host serve.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddGroup(
		&cobra.Group{ID: "client", Title: "Client verbs:"},
		&cobra.Group{ID: "role", Title: "Roles:"},
	)
	root.AddCommand(devCommand(), kmsCommand(), centerCommand(), hostCommand(), vmxCommand())
	cli.Add(root)
	return root
}

// version is set by the build; "dev" is a build of a working tree.
var version = "dev"
