package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/landfall-dr/landfall/libs/errcat"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (a *app) protectCommand() *cobra.Command {
	var policy string
	var wait, check bool
	c := &cobra.Command{
		Use: "protect VM --policy P", Short: "Protect a machine: check it, copy it, then replicate its changes", Args: cobra.ExactArgs(1),
		Example: "  landfall protect web-01 --policy default --wait\n  landfall protect web-01 --policy default --check",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.protection(ctx)
			if err != nil {
				return err
			}
			r, err := client.EnableProtection(ctx, &schedulerv1.EnableProtectionRequest{
				Vm: a.vmName(args[0]), Policy: resource("policies", policy), RequestId: uuid.NewString(), ValidateOnly: check,
			})
			if err != nil {
				return err
			}
			a.printFindings(r.Findings)
			if check {
				if len(r.Findings) == 0 {
					fmt.Fprintln(a.err, "nothing stands against protecting it")
				}
				return nil
			}
			return a.followJob(cmd.Context(), r.Job, wait)
		},
	}
	c.Flags().StringVar(&policy, "policy", defaultPolicy, "replication policy")
	c.Flags().BoolVar(&wait, "wait", false, "wait until the machine is protected, with progress")
	c.Flags().BoolVar(&check, "check", false, "run the prerequisite checks only")
	return c
}

func (a *app) unprotectCommand() *cobra.Command {
	var wait, force bool
	c := &cobra.Command{
		Use: "unprotect VM", Short: "End a machine's protection; its replica is kept", Args: cobra.ExactArgs(1),
		Example: "  landfall unprotect web-01 --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.protection(ctx)
			if err != nil {
				return err
			}
			r, err := client.DisableProtection(ctx, &schedulerv1.DisableProtectionRequest{Vm: a.vmName(args[0]), RequestId: uuid.NewString(), Force: force})
			if err != nil {
				return err
			}
			if err := a.followJob(cmd.Context(), r.Job, wait); err != nil || !wait {
				return err
			}
			return a.settled(cmd, func(ctx context.Context) (bool, error) { // who waited may protect the machine again next
				g, err := client.GetProtectedVm(ctx, &schedulerv1.GetProtectedVmRequest{Vm: r.Job.Target})
				if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_NOT_PROTECTED) {
					return true, nil
				}
				return g.GetVm().GetState() != typesv1.ProtectionState_PROTECTION_STATE_DISABLING, err
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait for the job")
	c.Flags().BoolVar(&force, "force", false, "go on when the host cannot be reached")
	return c
}

func (a *app) pauseCommand() *cobra.Command {
	return a.vmAction("pause VM", "Pause a machine's replication; changes are still tracked", "  landfall pause web-01",
		func(ctx context.Context, c schedulerv1.ProtectionServiceClient, vm string) (*schedulerv1.ProtectedVm, error) {
			r, err := c.PauseReplication(ctx, &schedulerv1.PauseReplicationRequest{Vm: vm})
			return r.GetVm(), err
		})
}

func (a *app) resumeCommand() *cobra.Command {
	return a.vmAction("resume VM", "Resume a machine's replication, also after an error that waited for you", "  landfall resume web-01",
		func(ctx context.Context, c schedulerv1.ProtectionServiceClient, vm string) (*schedulerv1.ProtectedVm, error) {
			r, err := c.ResumeReplication(ctx, &schedulerv1.ResumeReplicationRequest{Vm: vm})
			return r.GetVm(), err
		})
}

func (a *app) vmAction(use, short, example string, act func(context.Context, schedulerv1.ProtectionServiceClient, string) (*schedulerv1.ProtectedVm, error)) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.ExactArgs(1), Example: example, RunE: func(cmd *cobra.Command, args []string) error {
		ctx, cancel := a.call(cmd)
		defer cancel()
		client, err := a.protection(ctx)
		if err != nil {
			return err
		}
		vm, err := act(ctx, client, a.vmName(args[0]))
		if err != nil {
			return err
		}
		return a.print(vm, func(w io.Writer) { row(w, vm.DisplayName, stateLabel(vm.State)) })
	}}
}

func (a *app) resyncCommand() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: "resync VM", Short: "Compare a machine with its replica now and send what differs", Args: cobra.ExactArgs(1),
		Example: "  landfall resync web-01 --wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.protection(ctx)
			if err != nil {
				return err
			}
			r, err := client.Resynchronize(ctx, &schedulerv1.ResynchronizeRequest{Vm: a.vmName(args[0]), RequestId: uuid.NewString()})
			if err != nil {
				return err
			}
			return a.followJob(cmd.Context(), r.Job, wait)
		},
	}
	c.Flags().BoolVar(&wait, "wait", false, "wait for the job, with progress")
	return c
}

func (a *app) statusCommand() *cobra.Command {
	var watch bool
	c := &cobra.Command{
		Use: "status [VM]", Short: "Show protected machines: state, health, RPO", Args: cobra.MaximumNArgs(1),
		Example: "  landfall status\n  landfall status web-01 --watch",
		RunE: func(cmd *cobra.Command, args []string) error {
			if watch {
				return a.watchStatus(cmd, args)
			}
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.protection(ctx)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				r, err := client.GetProtectedVm(ctx, &schedulerv1.GetProtectedVmRequest{Vm: a.vmName(args[0])})
				if err != nil {
					return err
				}
				return a.print(r.Vm, func(w io.Writer) { describe(w, r.Vm) })
			}
			all := &schedulerv1.ListProtectedVmsResponse{}
			for token := ""; ; {
				r, err := client.ListProtectedVms(ctx, &schedulerv1.ListProtectedVmsRequest{PageSize: 1000, PageToken: token})
				if err != nil {
					return err
				}
				all.Vms = append(all.Vms, r.Vms...)
				if token = r.NextPageToken; token == "" {
					break
				}
			}
			return a.print(all, func(w io.Writer) {
				row(w, "NAME", "STATE", "HEALTH", "RPO", "LAST POINT", "POINTS", "SHIPPED", "MISSED", "BACKLOG")
				for _, v := range all.Vms {
					statusRow(w, v)
				}
			})
		},
	}
	c.Flags().BoolVar(&watch, "watch", false, "go on printing changes until interrupted")
	return c
}

func statusRow(w io.Writer, v *schedulerv1.ProtectedVm) {
	row(w, v.DisplayName, stateLabel(v.State), label(v.Health, "HEALTH_"), span(v.Rpo), stamp(v.LastPointTime),
		v.GetCounters().GetPoints(), human(v.GetCounters().GetShippedBytes()), v.GetCounters().GetMissedCycles(), backlog(v.ApplyBacklog))
}

// backlog is what waits to be applied: its stored bytes, and the minutes that a failover to the newest point waits for it.
func backlog(b *typesv1.ApplyBacklog) string {
	switch {
	case b == nil:
		return "-"
	case b.Manifests == 0:
		return "none"
	case b.Estimate == nil:
		return human(b.Bytes)
	}
	return fmt.Sprintf("%s, %.1f min", human(b.Bytes), b.Estimate.AsDuration().Minutes())
}

func describe(w io.Writer, v *schedulerv1.ProtectedVm) {
	row(w, "Name:", v.DisplayName)
	row(w, "Id:", last(v.Name))
	row(w, "Host:", last(v.Host))
	row(w, "Policy:", last(v.Policy))
	row(w, "State:", stateLabel(v.State))
	row(w, "Health:", label(v.Health, "HEALTH_"))
	for _, e := range v.HealthReasons {
		row(w, "  because:", e.Reason+": "+e.What)
		row(w, "  what to do:", e.Action)
	}
	row(w, "RPO:", span(v.Rpo))
	row(w, "Newest point:", fmt.Sprintf("%d at %s", v.LastPoint, stamp(v.LastPointTime)))
	row(w, "Processed point:", v.ProcessedPoint)
	row(w, "Apply backlog:", backlog(v.ApplyBacklog))
	if s := v.Suspicion; s != nil {
		row(w, "Suspected point:", fmt.Sprintf("%d at %s; retention stands still", s.Point, stamp(s.CutTime)))
		if s.LastGoodPoint != 0 {
			row(w, "  last good point:", fmt.Sprintf("%d at %s, pinned: %s", s.LastGoodPoint, stamp(s.LastGoodTime), yes(s.Pinned)))
		}
	}
	if v.ResyncReason != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
		row(w, "Resync due:", label(v.ResyncReason, "RESYNC_REASON_"))
	}
	if f := v.Failover; f != nil {
		row(w, "Failover:", last(f.Failover)+", "+label(f.Stage, "FAILOVER_STAGE_"))
		row(w, "Source is off:", yes(f.SourceFenced))
		if f.Error != nil {
			row(w, "  because:", f.Error.Reason+": "+f.Error.What)
			row(w, "  what to do:", f.Error.Action)
		}
	}
	if t := v.LastAppPointTime; t != nil {
		row(w, "Application-consistent:", stamp(t))
	}
	if r := v.Retry; r != nil {
		row(w, "Retry:", fmt.Sprintf("attempt %d failed (%s), next at %s", r.Attempt, r.Error.GetReason(), stamp(r.NextTime)))
	}
	c := v.GetCounters()
	row(w, "Points:", fmt.Sprintf("%d received, %d abandoned, %d cycles missed", c.GetPoints(), c.GetAbandonedPoints(), c.GetMissedCycles()))
	row(w, "Passes:", fmt.Sprintf("%d full, %d over dirty extents, %d comparing", c.GetFullPasses(), c.GetDirtyPasses(), c.GetComparePasses()))
	row(w, "Changed:", human(c.GetChangedBytes())+" in deltas, each block once a cycle")
	row(w, "Shipped:", human(c.GetShippedBytes())+" of segments, copies and deltas")
	row(w, "Lineage:", v.Lineage)
}

func (a *app) watchStatus(cmd *cobra.Command, args []string) error {
	ctx := cmd.Context()
	client, err := a.protection(ctx)
	if err != nil {
		return err
	}
	req := &schedulerv1.WatchProtectedVmsRequest{}
	if len(args) == 1 {
		req.Vm = a.vmName(args[0])
	}
	stream, err := client.WatchProtectedVms(ctx, req)
	if err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return endOfWatch(ctx, err)
		}
		if err := a.print(r.Vm, func(w io.Writer) {
			if r.Deleted {
				row(w, time.Now().Format("15:04:05"), r.Vm.DisplayName, "no longer protected")
				return
			}
			fmt.Fprint(w, time.Now().Format("15:04:05"), "\t")
			statusRow(w, r.Vm)
		}); err != nil {
			return err
		}
	}
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "-"
}
