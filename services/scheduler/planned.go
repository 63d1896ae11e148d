package scheduler

import (
	"context"
	"errors"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

const (
	stageRefused   = schedulerv1.FailoverStage_FAILOVER_STAGE_REFUSED
	stageQuiescing = schedulerv1.FailoverStage_FAILOVER_STAGE_QUIESCING
	stageStopping  = schedulerv1.FailoverStage_FAILOVER_STAGE_STOPPING_SOURCE
	stageSending   = schedulerv1.FailoverStage_FAILOVER_STAGE_SENDING_LAST_POINT
	stageReady     = schedulerv1.FailoverStage_FAILOVER_STAGE_READY_TO_CLOSE
	stageClosed    = schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED
)

// planned carries the source's side of a planned failover one step further. Each stage is written down before what it
// does, and what it does can be repeated.
func (v *vmRun) planned(ctx context.Context, f *failoverv1.Failover) (next, error) {
	p := v.rec.GetFailover()
	if p.GetStage() != stageClosed && closedOnly(f) {
		return atOnce, v.stage(ctx, stageClosed)
	}
	switch p.GetStage() {
	case stageRefused: // until the orchestrator has failed it
		return next{}, nil
	case stageReady:
		closed, poll, err := v.pollClose(ctx, f)
		if err != nil {
			return poll, err
		}
		if closed {
			return atOnce, v.stage(ctx, stageClosed)
		}
		n, err := v.watchSource(ctx, v.cfg.FenceRetry) // the close may be long in coming
		return sooner(n, poll), err
	case stageClosed:
		return v.keepFenced(ctx, f)
	}
	if wait := v.retryWait(); wait > 0 {
		return later(wait), nil
	}
	switch p.GetStage() {
	case stageSending:
		r := v.rec.GetRetry()
		if r.GetAttempt() >= int32(len(rungs)) && reasonOf(r.GetError()) == typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE {
			return v.refusePlanned(ctx, r.GetError(), typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED) // fenced: nobody starts it again
		}
		return v.replicate(ctx) // a cycle like any other, with a pass before it if the host asks for one
	case stageStopping:
		return v.stopSource(ctx)
	}
	if v.rec.GetPass() == nil && v.rec.GetCycle() == nil {
		v.restFence()
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.Failover.Stage, rec.Failover.Error, rec.Retry = stageStopping, nil, nil
			rec.Failover.StopTime = timestamppb.New(v.now()) // before the host hears of it
		})
	}
	if !v.m.reconciled || v.m.adoptedEpoch != v.rec.GetEpoch() {
		if n, done, err := v.adopt(ctx); !done {
			return n, err
		}
	}
	if v.rec.GetPass() != nil {
		return v.pass(ctx)
	}
	return v.cycle(ctx)
}

// stopSource asks until the guest is off. Landfall never forces it; after a while it says that it waits.
func (v *vmRun) stopSource(ctx context.Context) (next, error) {
	now := v.now()
	if now.Before(v.m.fenceAt) {
		return later(v.m.fenceAt.Sub(now)), nil
	}
	power, err := v.stopMachine(ctx)
	if errors.Is(err, failpoint.ErrInjected) || ctx.Err() != nil {
		return next{}, err
	}
	if err != nil {
		n, again, aerr := v.takeEpoch(ctx, err)
		if again || aerr != nil {
			return n, aerr
		}
		switch Classify(errcat.Reason(errcat.FromError(err))) {
		case ClassResync:
			return v.loseBaseline(ctx, err)
		case ClassFatal:
			return v.refusePlanned(ctx, detailOf(err, now), typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED)
		}
		return v.climb(ctx, err)
	}
	if power == typesv1.PowerState_POWER_STATE_OFF {
		v.m.reconciled = false // what the host holds is looked at once more before the last cut
		v.m.watchAt = time.Time{}
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.Failover.Stage, rec.Failover.SourceFenced, rec.Failover.Error, rec.Retry = stageSending, true, nil, nil
		})
	}
	v.m.fenceAt = now.Add(v.cfg.StopPoll)
	const late = typesv1.ErrorReason_ERROR_REASON_GUEST_DID_NOT_STOP
	since := now.Sub(v.rec.GetFailover().GetStopTime().AsTime())
	if since >= v.cfg.StopTimeout && reasonOf(v.rec.GetFailover().GetError()) != late {
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.Failover.Error = detail(late, "the guest was asked to power down "+v.cfg.StopTimeout.String()+" ago and still runs", now)
			rec.Retry = nil
		})
	}
	if v.rec.GetRetry() != nil { // the host answers again
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Retry, rec.Failover.Error = nil, nil })
	}
	return later(v.cfg.StopPoll), nil
}

// lastPointSent notes the last point of a planned failover in the write that closes its cycle. Cycles of the stage begin
// after the source was off, so whichever of them commits has everything.
func (v *vmRun) lastPointSent(rec *schedulerv1.ProtectedVm, point uint64) {
	if p := rec.GetFailover(); rec.GetState() == PlannedFailoverInProgress && p.GetStage() == stageSending {
		p.Stage, p.FinalPoint, p.Error = stageReady, point, nil
	}
}

// refusePlanned ends the source's side of a planned failover that cannot go on. The state stays: the orchestrator fails
// the failover, and cancelling it starts the source again.
func (v *vmRun) refusePlanned(ctx context.Context, d *typesv1.ErrorDetail, lost typesv1.ResyncReason) (next, error) {
	v.m.reconciled = false
	v.m.endRoot(refusalOf(d))
	v.log.ErrorContext(ctx, "planned failover cannot go on", "vm", v.rec.GetName(), "failover", v.rec.GetFailover().GetFailover(), "error", d.GetWhat())
	return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		dropWork(rec)
		rec.Failover.Stage, rec.Failover.Error, rec.Retry = stageRefused, d, nil
		if lost != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
			rec.ResyncReason = lost
		}
	})
}
