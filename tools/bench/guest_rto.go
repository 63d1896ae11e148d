package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/tools/guest"
	"github.com/landfall-dr/landfall/tools/guest/image"
)

// The failovers of the row guest-rto.
const (
	testFailover      = "test"
	plannedFailover   = "planned"
	unplannedFailover = "unplanned"
)

// rtoGoal is the longest that a failover may take beside the guest's own boot, in seconds.
const rtoGoal = 3

// often is a policy that makes points soon.
const often = "name: bench\ncopy_interval: 5s\n"

// guestRTO fails the lab guest over in three ways, each from a new installation.
func guestRTO(o *Options) []subject {
	var list []subject
	for _, kind := range []string{testFailover, unplannedFailover, plannedFailover} {
		check := "the recovered guest: every file, the ledger across disks, nothing acknowledged lost"
		if kind == plannedFailover {
			check += "; qemu-img compare with the source"
		}
		list = append(list, subject{
			name: "landfall failover " + kind + " --target qemu", check: check,
			run: func(ctx context.Context, folder string) (sample, error) { return failOver(ctx, o, folder, kind) },
		})
	}
	return list
}

// failoverResult is what a failover's job says, of either kind.
type failoverResult struct {
	Boot    *typesv1.BootEvidence
	CutTime time.Time
	Job     *typesv1.Job
}

// failover runs a failover to a machine that boots and waits for it.
func (p *product) failover(ctx context.Context, out string, args ...string) (failoverResult, error) {
	var raw json.RawMessage
	args = append(append([]string{"failover"}, args...), "--target", "qemu", "--out", out, "--boot-timeout", bootTimeout.String(), "--console-pattern", guest.ReadyLine, "--wait")
	if err := p.cli(ctx, &raw, args...); err != nil {
		return failoverResult{}, err
	}
	f := failoverResult{Job: &typesv1.Job{}}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, f.Job); err != nil {
		return f, err
	}
	if d := f.Job.GetTestFailover(); d != nil {
		f.Boot, f.CutTime = d.GetBoot(), d.GetCutTime().AsTime()
	} else {
		f.Boot, f.CutTime = f.Job.GetFailover().GetBoot(), f.Job.GetFailover().GetCutTime().AsTime()
	}
	if f.Boot == nil {
		return f, errors.New("the job has no evidence of a boot")
	}
	return f, nil
}

func failOver(ctx context.Context, o *Options, folder, kind string) (s sample, err error) {
	g, err := startGuest(ctx, o, folder, image.VHDX)
	if err != nil {
		return s, err
	}
	defer g.end()
	p, err := startGuestProduct(ctx, o.Bin, folder, g, often)
	if err != nil {
		return s, err
	}
	defer p.kill()
	if err := p.havePoints(ctx, 3); err != nil {
		return s, err
	}
	args := []string{kind, machine}
	switch kind {
	case testFailover:
		args = append(args, "--point", "latest")
	case unplannedFailover:
		args = append(args, "--point", "latest", "--accept-unfenced")
		if err := g.vm.Kill(); err != nil {
			return s, err
		}
	}
	out, err := filepath.Abs(filepath.Join(folder, "out"))
	if err != nil {
		return s, err
	}
	begin := p.mark()
	f, err := p.failover(ctx, out, args...)
	s.usage = p.since(begin)
	defer func() { err = errors.Join(err, endRecovered(out)) }() // a clean-up left nothing to end
	if err != nil {
		return s, err
	}
	s.figures = split(f, begin.at, begin.at.Add(s.wall))
	if err := g.recovered(out, f); err != nil {
		return s, err
	}
	switch kind {
	case testFailover:
		err = p.cli(ctx, nil, "failover", "cleanup", machine, "--wait")
	case plannedFailover:
		if !strings.Contains(g.vm.Console(), guest.PowerLine) {
			return s, errors.New("the source's guest did not power down in good order")
		}
		err = errors.Join(sameAsSource(ctx, g, g.config.OS.Path, filepath.Join(out, "os.vhd"), image.VPC), sameAsSource(ctx, g, g.config.Data.Path, filepath.Join(out, "data.vhd"), image.VPC))
	}
	return s, err
}

// split says where the time from the command to its return went.
func split(f failoverResult, began, ended time.Time) []figure {
	rto := ended.Sub(began).Seconds()
	list := []figure{
		{name: "RTO: command to its return", unit: "s", value: rto},
		{name: "guest boot (power on to READY)", unit: "s", value: f.Boot.Seconds},
		{name: "RTO minus guest boot", unit: "s", value: rto - f.Boot.Seconds, most: rtoGoal},
	}
	created := f.Job.GetCreateTime().AsTime()
	list = append(list, figure{name: "command to job", unit: "s", value: created.Sub(began).Seconds()})
	steps := slices.DeleteFunc(slices.Clone(f.Job.Steps), func(st *typesv1.JobStep) bool { return st.StartTime == nil || st.EndTime == nil })
	slices.SortStableFunc(steps, func(a, b *typesv1.JobStep) int { return a.StartTime.AsTime().Compare(b.StartTime.AsTime()) })
	last, between := created, time.Duration(0)
	for _, st := range steps {
		start, end := st.StartTime.AsTime(), st.EndTime.AsTime()
		between += max(0, start.Sub(last))
		if end.After(last) {
			last = end
		}
		list = append(list, figure{name: "step " + st.Id, unit: "s", value: end.Sub(start).Seconds()})
	}
	return append(list,
		figure{name: "waits between steps", unit: "s", value: between.Seconds()},
		figure{name: "last step to the command's return", unit: "s", value: ended.Sub(last).Seconds()})
}

// havePoints waits until so many points are received.
func (p *product) havePoints(ctx context.Context, n int) error {
	return p.until(ctx, func() (bool, error) {
		list, err := p.points(ctx)
		return err == nil && len(list) >= n, errors.Join(err, fmt.Errorf("%d points of %d", len(list), n))
	})
}
