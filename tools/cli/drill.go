package cli

import (
	"fmt"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
)

func (a *app) testFailoverCommand() *cobra.Command {
	var point string
	var where targetFlags
	c := &cobra.Command{
		Use: "test VM --out DIR", Short: "Make a copy of a recovery point; replication goes on and the replica is not touched", Args: cobra.ExactArgs(1),
		Example: "  landfall failover test web-01 --point latest --out /srv/drill --wait\n  landfall failover test web-01 --point 42 --target qemu --out /srv/drill --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			selector, err := parsePoint(point)
			if err != nil {
				return &usageError{err, cmd.UsageString()}
			}
			target, dir, settings, err := where.request(cmd)
			if err != nil {
				return err
			}
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.failovers(ctx)
			if err != nil {
				return err
			}
			r, err := client.StartTestFailover(ctx, &failoverv1.StartTestFailoverRequest{
				Vm: a.vmName(args[0]), Point: selector, Target: target, OutDir: dir, Qemu: settings,
				RequestId: uuid.NewString(), ValidateOnly: where.check,
			})
			if err != nil {
				return err
			}
			if where.check {
				fmt.Fprintln(a.err, "nothing stands against it")
				return nil
			}
			return a.followFailover(cmd, client, r.Job, where.wait)
		},
	}
	c.Flags().StringVar(&point, "point", "latest", "latest, latest-processed, latest-app, or a point's number")
	where.register(c)
	return c
}

func (a *app) cleanUpCommand() *cobra.Command {
	var wait, force bool
	var failover, notes string
	c := &cobra.Command{
		Use: "cleanup [VM]", Short: "Remove everything that a test failover made, and nothing else", Args: cobra.MaximumNArgs(1),
		Example: "  landfall failover cleanup web-01 --wait --notes 'booted, services answered'",
		RunE: func(cmd *cobra.Command, args []string) error {
			vm, name, err := a.whose(cmd, args, failover)
			if err != nil {
				return err
			}
			req := &failoverv1.CleanUpTestFailoverRequest{Vm: vm, Failover: name, RequestId: uuid.NewString(), Notes: notes, Force: force}
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.failovers(ctx)
			if err != nil {
				return err
			}
			r, err := client.CleanUpTestFailover(ctx, req)
			if err != nil {
				return err
			}
			return a.followFailover(cmd, client, r.Job, wait)
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait for the job")
	c.Flags().StringVar(&failover, "failover", "", "this failover, when the VM has several")
	c.Flags().BoolVar(&force, "force", false, "go on although the copy cannot be removed, for example because its machine is gone; the job names what is left")
	c.Flags().StringVar(&notes, "notes", "", "what the test showed, for the record")
	return c
}
