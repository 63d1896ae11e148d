package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) failoverCommand() *cobra.Command {
	return group("failover", "Bring machines up at the recovery site", a.testFailoverCommand(), a.cleanUpCommand(), a.listFailoversCommand())
}

func (a *app) testFailoverCommand() *cobra.Command {
	var point, target, out string
	var wait, check bool
	c := &cobra.Command{
		Use: "test VM --out DIR", Short: "Make a copy of a recovery point; replication goes on and the replica is not touched", Args: cobra.ExactArgs(1),
		Example: "  landfall failover test web-01 --point latest --out /srv/drill --wait\n  landfall failover test web-01 --point 42 --out /srv/drill --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			selector, err := parsePoint(point)
			if err != nil {
				return &usageError{err, cmd.UsageString()}
			}
			if target != "vhd" {
				return &usageError{fmt.Errorf("target %q: this version has vhd only", target), cmd.UsageString()}
			}
			dir, err := filepath.Abs(out)
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
				Vm: a.vmName(args[0]), Point: selector, Target: failoverv1.TargetKind_TARGET_KIND_VHD, OutDir: dir,
				RequestId: uuid.NewString(), ValidateOnly: check,
			})
			if err != nil {
				return err
			}
			if check {
				fmt.Fprintln(a.err, "nothing stands against it")
				return nil
			}
			return a.followFailover(cmd, client, r.Job, wait)
		},
	}
	c.Flags().StringVar(&point, "point", "latest", "latest, latest-processed, latest-app, or a point's number")
	c.Flags().StringVar(&target, "target", "vhd", "recovery target: vhd")
	c.Flags().StringVar(&out, "out", "", "folder for the result, on the machine of the failover-orchestrator; empty or absent")
	c.Flags().BoolVar(&wait, "wait", false, "wait for the job, with progress")
	c.Flags().BoolVar(&check, "check", false, "check only")
	_ = c.MarkFlagRequired("out")
	return c
}

// followFailover is followJob; who waits sees the failover at rest afterwards.
func (a *app) followFailover(cmd *cobra.Command, client failoverv1.FailoverServiceClient, j *typesv1.Job, wait bool) error {
	if err := a.followJob(cmd.Context(), j, wait); err != nil || !wait {
		return err
	}
	return a.settled(cmd, func(ctx context.Context) (bool, error) {
		r, err := client.ListFailovers(ctx, &failoverv1.ListFailoversRequest{Vm: j.Target, PageSize: 1000})
		return !slices.ContainsFunc(r.GetFailovers(), func(f *failoverv1.Failover) bool {
			return f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_STARTING || f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP
		}), err
	})
}

func parsePoint(s string) (*failoverv1.PointSelector, error) {
	switch s {
	case "latest":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Latest{Latest: true}}, nil
	case "latest-processed":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestProcessed{LatestProcessed: true}}, nil
	case "latest-app":
		return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_LatestApp{LatestApp: true}}, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("point %q is not latest, latest-processed, latest-app or a number", s)
	}
	return &failoverv1.PointSelector{Selector: &failoverv1.PointSelector_Ordinal{Ordinal: n}}, nil
}

func (a *app) cleanUpCommand() *cobra.Command {
	var wait bool
	var failover, notes string
	c := &cobra.Command{
		Use: "cleanup [VM]", Short: "Remove everything that a test failover made, and nothing else", Args: cobra.MaximumNArgs(1),
		Example: "  landfall failover cleanup web-01 --wait --notes 'booted, services answered'",
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &failoverv1.CleanUpTestFailoverRequest{RequestId: uuid.NewString(), Notes: notes}
			switch {
			case failover != "":
				req.Failover = resource("failovers", failover)
			case len(args) == 1:
				req.Vm = a.vmName(args[0])
			default:
				return &usageError{errors.New("name the VM, or --failover"), cmd.UsageString()}
			}
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
	c.Flags().StringVar(&notes, "notes", "", "what the test showed, for the record")
	return c
}

func (a *app) listFailoversCommand() *cobra.Command {
	return &cobra.Command{
		Use: "list [VM]", Short: "List failovers, newest first", Args: cobra.MaximumNArgs(1), Example: "  landfall failover list",
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &failoverv1.ListFailoversRequest{PageSize: 1000}
			if len(args) == 1 {
				req.Vm = a.vmName(args[0])
			}
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.failovers(ctx)
			if err != nil {
				return err
			}
			r, err := client.ListFailovers(ctx, req)
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				row(w, "FAILOVER", "VM", "STATE", "POINT", "OF", "FOLDER")
				for _, f := range r.Failovers {
					row(w, last(f.Name), last(f.Vm), failoverLabel(f.State), f.Point, stamp(f.CutTime), f.OutDir)
				}
			})
		},
	}
}

// failoverLabel says in words where a failover is; one without a copy any more has been cleaned up.
func failoverLabel(s typesv1.TestFailoverState) string {
	if s == typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE {
		return "cleaned up"
	}
	return label(s, "TEST_FAILOVER_STATE_")
}
