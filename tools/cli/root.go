// Package cli is Landfall's command line: the contract for people and
// scripts. Every command takes -o table|json|yaml, exits 0 only on success,
// and prints errors with what happened, the reason code, the likely cause and
// what to do.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/landfall-dr/landfall/libs/errcat"
)

// callTimeout bounds one unary call.
const callTimeout = 30 * time.Second

// app is what the commands share.
type app struct {
	in       io.Reader
	out, err io.Writer
	format   string
	state    string
	conns    *connections
}

// errSilent marks a failure that has been printed already.
var errSilent = errors.New("failed")

// Main runs the command line and returns the exit code: 0 on success, 1 on failure, 2 on wrong usage.
func Main(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	a := &app{in: in, out: out, err: errOut}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	defer func() { a.conns.close() }()
	err := root.ExecuteContext(ctx)
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errSilent):
		return 1
	case errors.As(err, &usage):
		fmt.Fprintf(errOut, "landfall: %v\n\n%s", usage.error, usage.help)
		return 2
	default:
		fmt.Fprintln(errOut, errcat.Explain(err))
		return 1
	}
}

// usageError is a wrong command line.
type usageError struct {
	error
	help string
}

func (u *usageError) Unwrap() error { return u.error }

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "landfall",
		Short: "Disaster recovery for virtual machines",
		Long: `Landfall keeps a bootable copy of every protected virtual machine at a recovery
site, brings it up there when the site is lost, and brings it home.

Start with:  landfall up --images DIR      (everything in one process)
Then:        landfall vms                  (what can be protected)
             landfall protect VM --policy default --wait
             landfall failover test VM --out DIR --wait`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.PersistentFlags().StringVarP(&a.format, "output", "o", "table", "output format: table, json or yaml")
	root.PersistentFlags().StringVar(&a.state, "state", defaultState(), "folder where 'landfall up' keeps its state, with client.yaml for this command; also LANDFALL_STATE")
	root.Args = cobra.NoArgs // an unknown command is wrong usage
	root.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := cmd.ValidateRequiredFlags(); err != nil {
			return &usageError{err, cmd.UsageString()}
		}
		if err := cmd.ValidateFlagGroups(); err != nil {
			return &usageError{err, cmd.UsageString()}
		}
		switch a.format {
		case "table", "json", "yaml":
			return nil
		}
		return &usageError{fmt.Errorf("output format %q is not table, json or yaml", a.format), cmd.UsageString()}
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return &usageError{err, c.UsageString()} })
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(
		a.upCommand(), a.hostsCommand(), a.vmsCommand(), a.protectCommand(), a.unprotectCommand(), a.statusCommand(),
		a.pointsCommand(), a.pauseCommand(), a.resumeCommand(), a.resyncCommand(), a.failoverCommand(), a.recoverCommand(), a.policyCommand(), a.bandwidthCommand(), a.planCommand(),
		a.jobsCommand(), a.eventsCommand(), a.hrlCommand(), a.diskCommand(), a.storageCommand(), a.certificatesCommand(), a.versionCommand(),
	)
	wrapArgs(root)
	return root
}

// wrapArgs makes wrong arguments usage errors.
func wrapArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return &usageError{err, cmd.UsageString()}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		wrapArgs(sub)
	}
}

// group is a command that only holds others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return &usageError{fmt.Errorf("%s wants a subcommand", cmd.CommandPath()), cmd.UsageString()}
	}}
	c.AddCommand(subs...)
	return c
}
