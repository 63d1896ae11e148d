package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

// usageTimeout bounds the count of what a machine takes in storage, which lists its containers.
const usageTimeout = 3 * time.Minute

// pointsCommand lists points, and holds the commands about single ones. A machine that is named like one of them is reached
// after --, by `points list`, or by its id.
func (a *app) pointsCommand() *cobra.Command {
	var limit int
	var usage bool
	list := func(cmd *cobra.Command, args []string) error {
		if usage {
			return a.showUsage(cmd, args[0])
		}
		return a.listPoints(cmd, args[0], limit)
	}
	flags := func(c *cobra.Command) *cobra.Command {
		c.Flags().IntVar(&limit, "limit", 0, "at most this many; 0 lists all")
		c.Flags().BoolVar(&usage, "usage", false, "say what the machine takes in storage and what that costs a month instead")
		return c
	}
	c := flags(&cobra.Command{
		Use: "points VM", Short: "List a machine's recovery points, newest first", Args: cobra.ExactArgs(1), RunE: list,
		Long: `List a machine's recovery points, newest first.

Every point that is listed is received: durable in the journal. It is processed when the
replica disks have taken it in, and checkpointed when a snapshot of them marks exactly it.
TIER is why the policy keeps it, KEPT BY who keeps it besides.

A machine whose name is that of a subcommand is reached by "points list NAME", or after --.`,
		Example: "  landfall points web-01 --limit 20\n  landfall points web-01 --usage\n  landfall points -- open",
	})
	c.AddCommand(
		flags(&cobra.Command{
			Use: "list VM", Short: "The same as points VM, for any name", Args: cobra.ExactArgs(1), RunE: list,
			Example: "  landfall points list open",
		}),
		a.pointsHoldCommand(), a.pointsReleaseCommand(), a.pointsClearCommand(), a.pointsOpenCommand(),
	)
	return c
}

func (a *app) listPoints(cmd *cobra.Command, vm string, limit int) error {
	ctx, cancel := a.call(cmd)
	defer cancel()
	client, err := a.protection(ctx)
	if err != nil {
		return err
	}
	all := &schedulerv1.ListRecoveryPointsResponse{}
	for token := ""; ; {
		r, err := client.ListRecoveryPoints(ctx, &schedulerv1.ListRecoveryPointsRequest{Vm: a.vmName(vm), PageSize: 1000, PageToken: token})
		if err != nil {
			return err
		}
		all.Points = append(all.Points, r.Points...)
		if token = r.NextPageToken; token == "" || (limit > 0 && len(all.Points) >= limit) {
			break
		}
	}
	if limit > 0 && len(all.Points) > limit {
		all.Points = all.Points[:limit]
	}
	return a.print(all, func(w io.Writer) { pointRows(w, all.Points...) })
}

func pointRows(w io.Writer, points ...*schedulerv1.RecoveryPoint) {
	row(w, "POINT", "TIME", "KIND", "CONSISTENCY", "STORED", "PROCESSED", "CHECKPOINT", "TIER", "KEPT BY", "SUSPECTED")
	for _, p := range points {
		row(w, p.Ordinal, stamp(p.CutTime), label(p.Kind, "POINT_KIND_"), label(p.Consistency, "CONSISTENCY_"), human(p.StoredBytes), yes(p.Processed), yes(p.Checkpointed),
			dash(p.Tier), keptBy(p), yes(p.Suspected))
	}
}

// keptBy lists the owners of a point's pins.
func keptBy(p *schedulerv1.RecoveryPoint) string {
	owners := make([]string, len(p.Pins))
	for i, pin := range p.Pins {
		owners[i] = pin.Owner
	}
	slices.Sort(owners)
	return dash(strings.Join(slices.Compact(owners), ","))
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (a *app) showUsage(cmd *cobra.Command, vm string) error {
	ctx, cancel := context.WithTimeout(cmd.Context(), usageTimeout)
	defer cancel()
	client, err := a.protection(ctx)
	if err != nil {
		return err
	}
	r, err := client.GetStorageUsage(ctx, &schedulerv1.GetStorageUsageRequest{Vm: a.vmName(vm)})
	if err != nil {
		return err
	}
	return a.print(r, func(w io.Writer) { usageRows(w, r) })
}

func usageRows(w io.Writer, r *schedulerv1.GetStorageUsageResponse) {
	money := func(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) + " " + r.Currency }
	row(w, "KIND", "OBJECTS", "BYTES", "HIDDEN", "A MONTH")
	var objects, bytes, hidden int64
	for _, u := range r.Usage {
		row(w, u.Kind, u.Objects, human(u.Bytes), human(u.HiddenBytes), money(u.MonthlyCost))
		objects, bytes, hidden = objects+u.Objects, bytes+u.Bytes, hidden+u.HiddenBytes
	}
	row(w, "requests", r.MonthlyRequests, "-", "-", money(r.MonthlyRequestCost))
	row(w, "total", objects, human(bytes), human(hidden), money(r.MonthlyCost))
	fmt.Fprintln(w)
	row(w, "Points:", tiers(r.Points))
	row(w, "Prices:", r.PriceTable)
}

// tiers says how many points each tier keeps.
func tiers(points map[string]int64) string {
	var parts []string
	for _, tier := range []string{"all", "hourly", "daily", "newest", "pinned", "retiring"} {
		if n := points[tier]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, tier))
		}
	}
	return dash(strings.Join(parts, ", "))
}
