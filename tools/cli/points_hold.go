package cli

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

func (a *app) pointsHoldCommand() *cobra.Command {
	req := &schedulerv1.HoldRecoveryPointRequest{}
	c := &cobra.Command{
		Use: "hold VM --point P --hold NAME", Short: "Keep a point until the hold is released, whatever the policy says", Args: cobra.ExactArgs(1),
		Long: `Keep a point until the hold is released, whatever the policy says (legal hold). What reaching the point needs is
kept with it. A name may hold several points. Releasing it takes the role admin.`,
		Example: "  landfall points hold web-01 --point 4711 --hold case-17 --reason 'asked for by the auditors'",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.protection(ctx)
			if err != nil {
				return err
			}
			req.Vm = a.vmName(args[0])
			r, err := client.HoldRecoveryPoint(ctx, req)
			if err != nil {
				return err
			}
			return a.print(r.Point, func(w io.Writer) { pointRows(w, r.Point) })
		},
	}
	c.Flags().Uint64Var(&req.Point, "point", 0, "the point's number")
	c.Flags().StringVar(&req.Hold, "hold", "", "name of the hold, for example a case number")
	c.Flags().StringVar(&req.Reason, "reason", "", "why")
	_ = c.MarkFlagRequired("point")
	_ = c.MarkFlagRequired("hold")
	return c
}

func (a *app) pointsReleaseCommand() *cobra.Command {
	var hold string
	c := &cobra.Command{
		Use: "release VM --hold NAME", Short: "End a hold; the policy decides again", Args: cobra.ExactArgs(1),
		Example: "  landfall points release web-01 --hold case-17",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.protection(ctx)
			if err != nil {
				return err
			}
			r, err := client.ReleaseRecoveryPoint(ctx, &schedulerv1.ReleaseRecoveryPointRequest{Vm: a.vmName(args[0]), Hold: hold})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				if len(r.Points) == 0 {
					fmt.Fprintf(w, "no point was held by %s\n", hold)
					return
				}
				for _, p := range r.Points {
					fmt.Fprintf(w, "point %d is no longer held by %s\n", p, hold)
				}
			})
		},
	}
	c.Flags().StringVar(&hold, "hold", "", "name of the hold")
	_ = c.MarkFlagRequired("hold")
	return c
}

func (a *app) pointsClearCommand() *cobra.Command {
	return &cobra.Command{
		Use: "clear-suspicion VM", Short: "Say that a suspected point was looked at and is harmless", Args: cobra.ExactArgs(1),
		Long: `Say that a person looked at a suspected point and found nothing. The pin of the last good point ends, and retention
goes on. Points that were received until now are not suspected again.`,
		Example: "  landfall points clear-suspicion web-01",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.call(cmd)
			defer cancel()
			client, err := a.protection(ctx)
			if err != nil {
				return err
			}
			r, err := client.ClearSuspicion(ctx, &schedulerv1.ClearSuspicionRequest{Vm: a.vmName(args[0])})
			if err != nil {
				return err
			}
			return a.print(r.Vm, func(w io.Writer) { describe(w, r.Vm) })
		},
	}
}
