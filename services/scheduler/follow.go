package scheduler

import (
	"context"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// duringFailover are the states in which the record follows a failover.
var duringFailover = map[State]bool{
	PlannedFailoverInProgress: true, UnplannedFailoverInProgress: true, FailoverFailed: true, FailedOver: true,
	ChangingRecoveryPoint: true, CancellingFailover: true, Committing: true, CommitFailed: true, Committed: true,
}

// afterFailover are those of them in which nothing replicates: what the ladder remembers is of before.
func afterFailover(s State) bool {
	return duringFailover[s] && s != PlannedFailoverInProgress && s != CancellingFailover
}

// followFailover brings the record in line with the failover that it follows, or with one that calls for being followed.
// It is the same whether the failover began a moment ago or was over before this process was started: the state walks
// the table's rows until it agrees with the failover's phase. took is false when replication goes on.
func (v *vmRun) followFailover(ctx context.Context) (n next, took bool, err error) {
	f := v.failoverInHand()
	if !duringFailover[v.rec.GetState()] {
		if f != nil {
			return v.beginFailover(ctx, f)
		}
		return v.forgetRefusal(ctx)
	}
	if f == nil {
		if v.rec.GetFailover().GetStage() == stageClosed && v.rec.GetState() != CancellingFailover {
			n, err = v.keepFenced(ctx, nil) // its record is gone: nothing moves, and the source stays off
			return n, true, err
		}
		// A record that is gone before its close is one that lost against another: it is over, and has no right to close.
		f = &failoverv1.Failover{Name: v.rec.GetFailover().GetFailover(), Phase: phaseCancelled}
	}
	n, err = v.walk(ctx, f)
	return n, true, err
}

// failoverInHand is the failover that the record follows, or the oldest that calls for it: of two that began at once the
// orchestrator lets the older one go on. It is nil when there is none, and when the record of the present one is gone.
func (v *vmRun) failoverInHand() *failoverv1.Failover {
	all := v.followed.of(v.rec.GetName(), v.rec.GetLineage())
	name := v.rec.GetFailover().GetFailover()
	if !duringFailover[v.rec.GetState()] {
		for _, f := range slices.Backward(all) {
			if calls(f) && f.GetName() != name { // the same one: refused, which is final, or committed and on its way out
				return f
			}
		}
		return nil
	}
	i := slices.IndexFunc(all, func(f *failoverv1.Failover) bool { return f.GetName() == name })
	if i < 0 {
		i = len(all)
	}
	for _, g := range all { // another try; what was asked for first is no matter: clocks are put back
		if g.GetName() != name && calls(g) && v.mayReplace(g, i == len(all) || all[i].GetPhase() == phaseCancelled) {
			return g
		}
	}
	if i == len(all) {
		return nil
	}
	return all[i]
}

// mayReplace reports whether another failover may take the place of the one that the record follows: after a failure, or
// when the cancellation has ended and only the host does not answer, which must not stand in the way of an unplanned one.
func (v *vmRun) mayReplace(g *failoverv1.Failover, ended bool) bool {
	switch v.rec.GetState() {
	case FailoverFailed:
		return true
	case CancellingFailover:
		return ended && g.GetKind() == failoverv1.FailoverKind_FAILOVER_KIND_UNPLANNED
	}
	return false
}

// beginFailover takes a failover up, or refuses it: in storage it may go on all the same, storage has the lock.
func (v *vmRun) beginFailover(ctx context.Context, f *failoverv1.Failover) (n next, took bool, err error) {
	state, starting := v.rec.GetState(), f.GetPhase() == phaseStarting
	if state == FinalizingProtection { // for a moment only
		return next{}, false, nil
	}
	act := ActUnplannedFailover
	if f.GetKind() == failoverv1.FailoverKind_FAILOVER_KIND_PLANNED {
		act = ActPlannedFailover
	}
	if starting {
		test := typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE
		if duringTest[act] {
			if test, err = v.store.testFailover(ctx, v.rec.GetName()); err != nil {
				return next{}, true, err
			}
		}
		switch {
		case Allowed(state, typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE, act) == Refused:
			return v.refuseFailover(ctx, f, invalidState(v.rec, act))
		case Allowed(state, test, act) == Refused:
			return v.refuseFailover(ctx, f, testActive(v.rec.GetName(), test, act))
		}
	}
	event := v.entry(f, state)
	if _, _, err := Next(state, event); err != nil {
		return v.refuseFailover(ctx, f, invalidState(v.rec, act))
	}
	return atOnce, true, v.enterFailover(ctx, f, event)
}

// entry is the event by which a failover is entered. A planned one that has happened where no planned one may begin is
// taken for an unplanned one: what it was to be does not matter any more.
func (v *vmRun) entry(f *failoverv1.Failover, state State) Event {
	if f.GetKind() != failoverv1.FailoverKind_FAILOVER_KIND_PLANNED {
		return EvUnplannedFailover
	}
	if _, _, err := Next(state, EvPlannedFailover); err != nil {
		return EvUnplannedFailover
	}
	return EvPlannedFailover
}

// refuseFailover says so in the record, once, and leaves the state where it is. It is final for that failover.
func (v *vmRun) refuseFailover(ctx context.Context, f *failoverv1.Failover, cause error) (next, bool, error) {
	v.log.WarnContext(ctx, "failover refused", "vm", v.rec.GetName(), "failover", f.GetName(), "error", cause)
	d := detailOf(cause, v.now())
	return atOnce, true, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Failover = &schedulerv1.FailoverProgress{
			Failover: f.GetName(), Stage: schedulerv1.FailoverStage_FAILOVER_STAGE_REFUSED, Error: d, From: rec.GetState(),
		}
	})
}

// forgetRefusal takes a refusal off the record when its failover has ended.
func (v *vmRun) forgetRefusal(ctx context.Context) (next, bool, error) {
	p := v.rec.GetFailover()
	if p.GetStage() != schedulerv1.FailoverStage_FAILOVER_STAGE_REFUSED {
		return next{}, false, nil
	}
	for _, f := range v.followed.of(v.rec.GetName(), v.rec.GetLineage()) {
		if f.GetName() == p.GetFailover() && f.GetPhase() != phaseCancelled {
			return next{}, false, nil
		}
	}
	return atOnce, true, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Failover = nil })
}

// enterFailover moves to a failover in progress. An unplanned one gives up at once what is in hand, without the host: the
// epoch rises in the same write, and what the host still holds is settled when it is adopted again.
func (v *vmRun) enterFailover(ctx context.Context, f *failoverv1.Failover, event Event) error {
	v.m.reconciled, v.m.quiet = false, 0
	v.restFence()
	was := v.rec.GetState()
	return v.move(ctx, event, func(rec *schedulerv1.ProtectedVm) {
		p := &schedulerv1.FailoverProgress{Failover: f.GetName(), From: was}
		if old := rec.GetFailover(); duringFailover[was] && old != nil { // another try: the machine may be fenced already
			p.From, p.StopTime = old.GetFrom(), old.GetStopTime()
			p.SourceFenced = old.GetSourceFenced() && was != CancellingFailover
		}
		switch {
		case closedOnly(f):
			p.Stage = schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED
		case event == EvPlannedFailover:
			p.Stage, p.SourceFenced = schedulerv1.FailoverStage_FAILOVER_STAGE_QUIESCING, false
		}
		rec.Failover = p
		if event == EvUnplannedFailover {
			dropWork(rec)
		}
		if was != ReplicationError { // its error is what a cancellation comes back to
			rec.Retry = nil
		}
	})
}

// dropWork gives up the cycle or pass in hand. Their tasks have no right to commit any more.
func dropWork(rec *schedulerv1.ProtectedVm) {
	if rec.GetCycle() != nil || rec.GetPass() != nil {
		rec.Epoch++
		rec.Counters.AbandonedPoints += int64(btoi(rec.GetCycle().GetPhase() == schedulerv1.CyclePhase_CYCLE_PHASE_CUT))
	}
	rec.Cycle, rec.Pass, rec.Resynchronizing = nil, nil, false
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// walk makes the one move that the failover's phase asks for in the present state, or what the state itself has to do.
func (v *vmRun) walk(ctx context.Context, f *failoverv1.Failover) (next, error) {
	cancels := f.GetPhase() == phaseCancelling || f.GetPhase() == phaseCancelled || f.GetPhase() == phaseCancelFailed
	commits := f.GetPhase() == phaseCommitting || f.GetPhase() == phaseCommitted
	state := v.rec.GetState()
	switch state {
	case PlannedFailoverInProgress, UnplannedFailoverInProgress:
		switch {
		case cancels:
			return v.leave(ctx, EvCancelFailover)
		case f.GetPhase() == phaseFailed:
			return v.leave(ctx, EvTargetFailed)
		case commits, f.GetPhase() == phaseWaiting:
			return v.leave(ctx, EvTargetRunning)
		case state == PlannedFailoverInProgress:
			return v.planned(ctx, f)
		}
	case FailoverFailed:
		switch {
		case f.GetName() != v.rec.GetFailover().GetFailover(): // another try
			return atOnce, v.enterFailover(ctx, f, v.entry(f, state))
		case cancels:
			return v.leave(ctx, EvCancelFailover)
		case f.GetPhase() == phaseFailed && v.rec.GetFailover().GetStage() != schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED && !closedOnly(f):
			return next{}, nil // nothing is closed: the source is not taken down for it
		case f.GetPhase() != phaseFailed:
			return atOnce, v.enterFailover(ctx, f, v.entry(f, state))
		}
	case FailedOver:
		switch {
		case commits:
			return atOnce, v.move(ctx, EvCommit, nil)
		case cancels:
			return v.leave(ctx, EvCancelFailover)
		}
	case Committing:
		switch {
		case f.GetPhase() == phaseCommitted:
			return atOnce, v.move(ctx, EvCommitted, nil)
		case !commits:
			return atOnce, v.move(ctx, EvCommitError, nil)
		}
	case CommitFailed:
		switch {
		case commits:
			return atOnce, v.move(ctx, EvCommit, nil)
		case cancels:
			return v.leave(ctx, EvCancelFailover)
		}
	case CancellingFailover:
		switch {
		case f.GetName() != v.rec.GetFailover().GetFailover():
			return atOnce, v.enterFailover(ctx, f, EvUnplannedFailover)
		case f.GetPhase() == phaseCancelled:
			return v.finishCancel(ctx, f)
		}
		return v.awaitCancel(ctx, f)
	}
	return v.keepFenced(ctx, f)
}

// awaitCancel is what a VM does while its failover is being cancelled. When that failed the recovered machine may be there
// still: the source is kept off as before, but not released, until the cancellation is tried again.
func (v *vmRun) awaitCancel(ctx context.Context, f *failoverv1.Failover) (next, error) {
	p := v.rec.GetFailover()
	if f.GetPhase() != phaseCancelFailed {
		if p.GetError() == nil {
			return next{}, nil
		}
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Failover.Error = nil })
	}
	if p.GetError() == nil {
		d := clone(f.GetError())
		if d.GetReason() == "" {
			d = detail(typesv1.ErrorReason_ERROR_REASON_INTERNAL, "no reason was recorded", v.now())
		}
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Failover.Error = d })
	}
	switch now := v.now(); {
	case p.GetStage() != stageClosed || !closedOnly(f):
		return next{}, nil
	case p.GetSourceFenced():
		return v.watchSource(ctx, v.cfg.FenceRetryMax)
	case now.Before(v.m.fenceAt):
		return later(v.m.fenceAt.Sub(now)), nil
	}
	return v.fence(ctx, next{})
}

// leave moves on from a failover in progress. A cycle that was in hand for it is given up.
func (v *vmRun) leave(ctx context.Context, event Event) (next, error) {
	v.m.endRoot(nil)
	v.m.reconciled = false
	v.restFence()
	return atOnce, v.move(ctx, event, func(rec *schedulerv1.ProtectedVm) {
		dropWork(rec)
		if rec.GetFailover().GetFrom() != ReplicationError {
			rec.Retry = nil
		}
		if event == EvCancelFailover { // what was asked of the host until now is refused from here on: it may still arrive
			rec.Epoch++
			rec.Failover.Error = nil
		}
		if event == EvTargetRunning {
			rec.ActiveLocation = typesv1.ActiveLocation_ACTIVE_LOCATION_RECOVERY
			rec.Failover.Stage = schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED
		}
	})
}

// stage writes how far the source's side is.
func (v *vmRun) stage(ctx context.Context, s schedulerv1.FailoverStage) error {
	return v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Failover.Stage, rec.Failover.Error, rec.Retry = s, nil, nil
	})
}

// isOf reports whether a fence in the chain is a failover's: it may carry the resource name or the bare id.
func isOf(failover, fence string) bool {
	return failover != "" && (fence == failover || fence == lastPart(failover))
}

// fencesOf are the close and the open of a failover in the chain; 0 for those that are not there.
func fencesOf(chain *replica.State, failover string) (closed, opened replica.Seq) {
	if closed, opened = chain.FenceSeqs(failover); closed == 0 {
		closed, opened = chain.FenceSeqs(lastPart(failover))
	}
	return closed, opened
}

// finishCancel starts the source again and lets replication go on. Nothing of the recovered machine is in the chain, and
// the host has tracked every write of its machine all the time, whether or not it was stopped: so the next point is right
// if its base is not above the chain's state (rules 3, 5, 6), and adopting finds out whether it is. Only a host that holds
// no base, or has lost track, needs a comparison.
func (v *vmRun) finishCancel(ctx context.Context, f *failoverv1.Failover) (next, error) {
	if wait := v.retryWait(); wait > 0 {
		return later(wait), nil
	}
	chain, err := v.chainState(ctx)
	if err != nil {
		return v.climb(ctx, err)
	}
	if chain.Closed() { // the open comes before the cancellation has ended: never start a machine under a close
		if v.rec.GetFailover().GetError() != nil {
			return later(v.cfg.Poll), nil
		}
		// Another failover, which is about to be followed, or one whose record was lost: that would wait for ever.
		d := detail(typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED, "failover "+chain.Fence.Failover+" holds the lineage closed", v.now())
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Failover.Error = d })
	}
	p := v.rec.GetFailover()
	if p.GetStopTime() != nil { // else the host was never asked to stop it, and holds no fence
		if n, ok, err := v.startMachine(ctx); !ok {
			return n, err
		}
	}
	closed, _ := fencesOf(chain, f.GetName())
	if closed != 0 {
		if n, done, err := v.adopt(ctx); !done {
			return n, err
		}
		if v.m.status.GetBase() == 0 {
			return v.baselineLost(ctx, typesv1.ResyncReason_RESYNC_REASON_SOURCE_DIVERGED, "the host holds no base to go on from")
		}
	}
	event := EvCancelledClean
	switch from := p.GetFrom(); {
	case v.rec.GetResyncReason() != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED,
		from == ResyncRequired, from == Resynchronizing, from == ResyncPaused:
		event = EvCancelledDiverged
	case from == Paused:
		event = EvCancelledPaused
	case closed != 0: // an error of before was most often that very close
	case from == ReplicationError:
		event = EvCancelledError
	}
	v.m.reconciled = false
	return atOnce, v.move(ctx, event, func(rec *schedulerv1.ProtectedVm) {
		if event == EvCancelledDiverged && rec.GetResyncReason() == typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
			rec.ResyncReason = typesv1.ResyncReason_RESYNC_REASON_MANUAL // a comparison was under way and has to run again
		}
		cancelled(rec)
		if event != EvCancelledError {
			rec.Retry = nil
		}
		rec.NextCycleTime = timestamppb.New(v.now())
	})
}

// cancelled is what the end of a cancellation does to the record.
func cancelled(rec *schedulerv1.ProtectedVm) {
	rec.Failover = nil
	rec.ActiveLocation = typesv1.ActiveLocation_ACTIVE_LOCATION_PRIMARY
}

// notFenced reports whether two copies of the VM may run.
func notFenced(vm *schedulerv1.ProtectedVm) bool {
	p := vm.GetFailover()
	if p == nil || p.GetSourceFenced() || vm.GetState() == CancellingFailover && p.GetError() == nil {
		return false
	}
	return vm.GetState() == UnplannedFailoverInProgress || p.GetStage() == schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED
}

// refusalOf names why a planned failover does not go on although the source was stopped for it.
func refusalOf(d *typesv1.ErrorDetail) error {
	return errcat.New(reasonOf(d), "%s", d.GetWhat())
}
