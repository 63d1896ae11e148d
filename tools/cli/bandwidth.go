package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/landfall-dr/landfall/libs/bandwidth"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

func (a *app) bandwidthCommand() *cobra.Command {
	get := &cobra.Command{
		Use: "get [SITE]", Short: "Show a site's schedule, what holds now and until when", Args: cobra.MaximumNArgs(1), Example: "  landfall bandwidth get",
		RunE: func(cmd *cobra.Command, args []string) error {
			name, client, err := a.siteService(args)
			if err != nil {
				return err
			}
			ctx, cancel := a.call(cmd)
			defer cancel()
			return a.showBandwidth(ctx, client, name)
		},
	}
	var file, limit string
	var check bool
	set := &cobra.Command{
		Use: "set [SITE]", Short: "Limit what a site sends to storage: always, or by a schedule", Args: cobra.MaximumNArgs(1),
		Long: `Limits what all uploaders and resync engines of a site send to storage together. It holds
within seconds, also for what is on its way. Points go before initial copies and
resynchronisations, and nobody is starved.

--limit sets one limit for all times. -f reads a schedule, - is standard input:

  time_zone: Europe/Berlin      # of the windows; UTC without it
  default: 100MiB/s             # outside of all windows; no limit without it
  windows:                      # the first one that holds decides
    - days: mon-fri             # a day, a range, or a list of them; every day without it
      start: 08:00
      end: 18:00                # at or before start: on the next day
      limit: 160Mbit/s          # none is no limit`,
		Example: "  landfall bandwidth set --limit 20MiB/s\n  landfall bandwidth set berlin -f office-hours.yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			b := &schedulerv1.SiteBandwidth{}
			var err error
			if file != "" {
				if b, err = a.readBandwidth(file); err != nil {
					return err
				}
			} else if b.DefaultBytesPerSecond, err = parseRate(limit); err != nil {
				return &usageError{fmt.Errorf("--limit: %w", err), cmd.UsageString()}
			}
			return a.setBandwidth(cmd, args, b, check)
		},
	}
	set.Flags().StringVarP(&file, "file", "f", "", "file with the schedule")
	set.Flags().StringVar(&limit, "limit", "", "one limit for all times, as 20MiB/s or 160Mbit/s")
	set.Flags().BoolVar(&check, "check", false, "check the schedule and change nothing")
	set.MarkFlagsMutuallyExclusive("file", "limit")
	set.MarkFlagsOneRequired("file", "limit")
	remove := &cobra.Command{
		Use: "clear [SITE]", Short: "Take the limit of a site away", Args: cobra.MaximumNArgs(1), Example: "  landfall bandwidth clear",
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.setBandwidth(cmd, args, &schedulerv1.SiteBandwidth{}, false)
		},
	}
	return group("bandwidth", "How much of its link a site may use, and when", get, set, remove)
}

// siteService is the service and the site that the command is about: the one of client.yaml where none is named.
func (a *app) siteService(args []string) (string, schedulerv1.SiteServiceClient, error) {
	c, err := a.conn("scheduler")
	if err != nil {
		return "", nil, err
	}
	site := a.conns.config.Site
	if len(args) > 0 {
		site = args[0]
	}
	return resource("sites", site), schedulerv1.NewSiteServiceClient(c), nil
}

func (a *app) setBandwidth(cmd *cobra.Command, args []string, b *schedulerv1.SiteBandwidth, check bool) error {
	named := b.GetName()
	if len(args) == 0 && named != "" {
		args = []string{named}
	}
	name, client, err := a.siteService(args)
	if err != nil {
		return err
	}
	if named != "" && resource("sites", named) != name {
		return &usageError{fmt.Errorf("the schedule is of %s, not of %s", resource("sites", named), name), cmd.UsageString()}
	}
	b.Name = name
	ctx, cancel := a.call(cmd)
	defer cancel()
	r, err := client.SetBandwidth(ctx, &schedulerv1.SetBandwidthRequest{Bandwidth: b, ValidateOnly: check})
	if err != nil {
		return err
	}
	if check {
		return a.print(r.Bandwidth, func(w io.Writer) { bandwidthRows(w, r.Bandwidth, time.Now()) })
	}
	return a.showBandwidth(ctx, client, name)
}

func (a *app) showBandwidth(ctx context.Context, client schedulerv1.SiteServiceClient, name string) error {
	r, err := client.GetBandwidth(ctx, &schedulerv1.GetBandwidthRequest{Name: name})
	if err != nil {
		return err
	}
	return a.print(r, func(w io.Writer) { bandwidthRows(w, r.GetBandwidth(), time.Now()) })
}

// bandwidthRows shows what holds at an instant and until when, and the windows.
func bandwidthRows(w io.Writer, b *schedulerv1.SiteBandwidth, now time.Time) {
	schedule, err := bandwidth.NewSchedule(b)
	if err != nil {
		fmt.Fprintln(w, err)
		return
	}
	rate, holds := schedule.At(now)
	until, then := "for good", "-"
	if next, ok := schedule.Next(now); ok {
		until, then = next.Format("Mon 2006-01-02 15:04 MST"), showRate(schedule.Rate(next))
	}
	row(w, "SITE", "NOW", "UNTIL", "THEN", "TIME ZONE")
	row(w, last(b.GetName()), showRate(rate), until, then, schedule.Zone())
	if len(b.GetWindows()) == 0 {
		return
	}
	fmt.Fprintln(w)
	mark := func(i int) string {
		if i == holds {
			return "now"
		}
		return ""
	}
	row(w, "WINDOW", "DAYS", "START", "END", "LIMIT", "HOLDS")
	for i, win := range b.GetWindows() {
		row(w, i+1, showDays(win.GetDays()), showTime(win.GetStart().AsDuration()), showTime(win.GetEnd().AsDuration()), showRate(win.GetBytesPerSecond()), mark(i))
	}
	row(w, "default", "", "", "", showRate(b.GetDefaultBytesPerSecond()), mark(-1))
}

func showRate(n int64) string {
	if n == 0 {
		return "no limit"
	}
	return human(n) + "/s"
}

func showTime(d time.Duration) string {
	if d%time.Minute == 0 {
		return fmt.Sprintf("%02d:%02d", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%02d:%02d:%02d", int(d.Hours()), int(d.Minutes())%60, int(d.Seconds())%60)
}

var dayNames = []string{"mon", "tue", "wed", "thu", "fri", "sat", "sun"}

// showDays folds neighbours: mon-fri,sun.
func showDays(days []schedulerv1.Weekday) string {
	if len(days) == 0 || len(days) == len(dayNames) {
		return "daily"
	}
	var on [9]bool // one more at both ends
	for _, d := range days {
		on[d] = true
	}
	var out []string
	for d := 1; d <= 7; d++ {
		if !on[d] || on[d-1] {
			continue
		}
		end := d
		for on[end+1] {
			end++
		}
		text := dayNames[d-1]
		switch {
		case end == d+1:
			text += "," + dayNames[end-1]
		case end > d:
			text += "-" + dayNames[end-1]
		}
		out = append(out, text)
	}
	return strings.Join(out, ",")
}
