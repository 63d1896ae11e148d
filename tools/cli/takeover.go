package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) plannedFailoverCommand() *cobra.Command {
	var where targetFlags
	c := &cobra.Command{
		Use: "planned VM --out DIR", Short: "Stop the source in order, send its last changes and bring the machine up: nothing is lost", Args: cobra.ExactArgs(1),
		Example: "  landfall failover planned web-01 --target qemu --out /srv/web-01 --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.takeOver(cmd, &where, &failoverv1.StartFailoverRequest{
				Vm: a.vmName(args[0]), Kind: failoverv1.FailoverKind_FAILOVER_KIND_PLANNED,
			})
		},
	}
	where.register(c)
	return c
}

func (a *app) unplannedFailoverCommand() *cobra.Command {
	var where targetFlags
	var point string
	var acceptUnfenced bool
	c := &cobra.Command{
		Use: "unplanned VM --out DIR", Short: "Bring a machine up whose site is lost, at a recovery point", Args: cobra.ExactArgs(1),
		Long: `Close the lineage, so that nothing of the source counts any more, and bring the
machine up at a recovery point. Landfall cannot know that a site that does not
answer is really down: --accept-unfenced says that you have made sure, or that you
accept two machines at once. The VM stays critical until its host says that the
source is off.`,
		Example: "  landfall failover unplanned web-01 --accept-unfenced --target qemu --out /srv/web-01 --wait\n  landfall failover unplanned web-01 --point 42 --accept-unfenced --out /srv/web-01 --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			selector, err := parsePoint(point)
			if err != nil {
				return &usageError{err, cmd.UsageString()}
			}
			return a.takeOver(cmd, &where, &failoverv1.StartFailoverRequest{
				Vm: a.vmName(args[0]), Kind: failoverv1.FailoverKind_FAILOVER_KIND_UNPLANNED, Point: selector, AcceptUnfenced: acceptUnfenced,
			})
		},
	}
	c.Flags().StringVar(&point, "point", "latest", "latest, latest-processed, latest-app, or a point's number")
	c.Flags().BoolVar(&acceptUnfenced, "accept-unfenced", false, "go on although the source is not proven to be off")
	where.register(c)
	return c
}

// takeOver starts a failover that is not a test.
func (a *app) takeOver(cmd *cobra.Command, where *targetFlags, req *failoverv1.StartFailoverRequest) error {
	target, dir, settings, err := where.request(cmd)
	if err != nil {
		return err
	}
	req.Target, req.OutDir, req.Qemu, req.RequestId, req.ValidateOnly = target, dir, settings, uuid.NewString(), where.check
	ctx, cancel := a.call(cmd)
	defer cancel()
	client, err := a.failovers(ctx)
	if err != nil {
		return err
	}
	r, err := client.StartFailover(ctx, req)
	if err != nil {
		return err
	}
	if where.check {
		fmt.Fprintln(a.err, "nothing stands against it")
		return nil
	}
	return a.followFailover(cmd, client, r.Job, where.wait)
}

func (a *app) commitFailoverCommand() *cobra.Command {
	return a.decideCommand("commit", "Make a failover final: the recovered machine is the machine from now on",
		func(ctx context.Context, client failoverv1.FailoverServiceClient, vm, failover string) (*typesv1.Job, error) {
			r, err := client.CommitFailover(ctx, &failoverv1.CommitFailoverRequest{Vm: vm, Failover: failover, RequestId: uuid.NewString()})
			return r.GetJob(), err
		})
}

func (a *app) cancelFailoverCommand() *cobra.Command {
	var force bool
	c := a.decideCommand("cancel", "Give a failover up: the recovered machine is removed with all it wrote, the source may run again",
		func(ctx context.Context, client failoverv1.FailoverServiceClient, vm, failover string) (*typesv1.Job, error) {
			r, err := client.CancelFailover(ctx, &failoverv1.CancelFailoverRequest{Vm: vm, Failover: failover, RequestId: uuid.NewString(), Force: force})
			return r.GetJob(), err
		})
	c.Flags().BoolVar(&force, "force", false, "go on although the copy cannot be removed, because its machine is gone for good; make sure that it never runs again; the job names what is left")
	return c
}

// decideCommand ends a failover one way or the other.
func (a *app) decideCommand(verb, short string, act func(ctx context.Context, client failoverv1.FailoverServiceClient, vm, failover string) (*typesv1.Job, error)) *cobra.Command {
	var wait bool
	var failover string
	c := &cobra.Command{
		Use: verb + " [VM]", Short: short, Args: cobra.MaximumNArgs(1), Example: "  landfall failover " + verb + " web-01 --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			vm, name, err := a.whose(cmd, args, failover)
			if err != nil {
				return err
			}
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.failovers(ctx)
			if err != nil {
				return err
			}
			job, err := act(ctx, client, vm, name)
			if err != nil {
				return err
			}
			return a.followFailover(cmd, client, job, wait)
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait for the job")
	c.Flags().StringVar(&failover, "failover", "", "this failover")
	return c
}

// whose names what a command acts on: the failover of a flag, or the only one of the VM in the arguments.
func (a *app) whose(cmd *cobra.Command, args []string, failover string) (vm, name string, err error) {
	switch {
	case failover != "":
		return "", resource("failovers", failover), nil
	case len(args) == 1:
		return a.vmName(args[0]), "", nil
	}
	return "", "", &usageError{errors.New("name the VM, or --failover"), cmd.UsageString()}
}
