package scheduler

import (
	"context"
	"strconv"
	"time"

	"github.com/landfall-dr/landfall/libs/bus"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	crash       = typesv1.Consistency_CONSISTENCY_CRASH
	application = typesv1.Consistency_CONSISTENCY_APPLICATION

	// appRetry is how soon an application-consistent point that was missed is tried again, if the policy's interval is
	// longer: a freeze that fails holds the guest's writes for nothing.
	appRetry = 15 * time.Minute
)

// wantedConsistency is what the next cut asks for: application-consistent for the first one after the policy's interval
// since the last such point. Only a protected VM: a copy's end has no use for it, and a machine that is off is at rest.
func (v *vmRun) wantedConsistency(now time.Time) typesv1.Consistency {
	interval := v.policy.GetAppConsistentInterval().AsDuration()
	if interval <= 0 || v.rec.GetState() != Protected {
		return crash
	}
	if t := v.rec.GetLastAppPointTime(); t != nil && now.Sub(t.AsTime()) < interval {
		return crash
	}
	if e := v.rec.GetAppConsistencyError(); e != nil && now.Sub(e.GetTime().AsTime()) < min(interval, appRetry) {
		return crash
	}
	return application
}

// consistencyOf is what the cycle's cut asks for; a record of before there was a choice asks for crash-consistency.
func consistencyOf(c *schedulerv1.Cycle) typesv1.Consistency {
	if c.GetConsistency() == application {
		return application
	}
	return crash
}

// cutWithoutFreeze goes on with the same cut when the driver cannot give what was asked for: it has refused before it
// did anything. That is no failure of replication.
func (v *vmRun) cutWithoutFreeze(ctx context.Context, cause error) (next, error) {
	d, point := detailOf(cause, v.now()), v.rec.GetCycle().GetPoint()
	err := v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Cycle.Consistency, rec.AppConsistencyError = crash, d
	})
	if err == nil {
		v.tellDegraded(ctx, point, d)
	}
	return atOnce, err
}

// degraded says why a cut is only crash-consistent although more was asked for; nil when it is what was asked for.
func (v *vmRun) degraded(c *schedulerv1.Cycle, resp *hostproviderv1.CutPointResponse) *typesv1.ErrorDetail {
	if c.GetConsistency() != application || resp.GetConsistency() == application {
		return nil
	}
	d := clone(resp.GetDegraded())
	if d.GetReason() == "" { // a repeat of a cut need not know why
		d = detail(typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED, "the point is crash-consistent; the host did not say why", v.now())
	}
	d.Time = stamp(v)
	return d
}

func (v *vmRun) tellDegraded(ctx context.Context, point uint64, d *typesv1.ErrorDetail) {
	if d == nil {
		return
	}
	v.jobs.announce(ctx, v.rec.GetName(), "recovery-point.application-consistency-missed",
		bus.EventID(v.rec.GetLineage(), "app-missed", strconv.FormatUint(point, 10)),
		&eventsv1.ApplicationConsistencyMissed{Vm: v.rec.GetName(), Point: point, Error: d})
}
