package scheduler

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/storagereason"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"

	"github.com/landfall-dr/landfall/libs/bus"
)

// storageError gives an error of storage or of the chain the reason an operator sees.
func storageError(err error, format string, args ...any) error {
	return storagereason.Wrap(err, format, args...)
}

// chainState reads the chain of the VM's lineage from storage.
func (v *vmRun) chainState(ctx context.Context) (*replica.State, error) {
	ctx, cancel := context.WithTimeout(ctx, v.cfg.StorageTimeout)
	defer cancel()
	if v.m.chain == nil || string(v.m.chain.Lineage()) != v.rec.GetLineage() {
		chain, err := replica.Open(ctx, v.blobs, replica.Lineage(v.rec.GetLineage()))
		if err != nil {
			return nil, storageError(err, "open the chain of %s", v.rec.GetName())
		}
		v.m.chain = chain
	}
	state, err := v.m.chain.Refresh(ctx)
	if err != nil {
		return nil, storageError(err, "read the chain of %s", v.rec.GetName())
	}
	return state, nil
}

// tracking asks the host what it holds.
func (v *vmRun) tracking(ctx context.Context) (*typesv1.TrackingStatus, error) {
	ctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := host.ListPoints(ctx, &hostproviderv1.ListPointsRequest{Vm: v.vmID()})
	if err != nil {
		return nil, err
	}
	if resp.GetStatus() == nil {
		return &typesv1.TrackingStatus{}, nil
	}
	return resp.GetStatus(), nil
}

// adopt compares record, host and chain, and makes them agree: the highest epoch, the newest open and the highest
// ordinal count, wherever they stand; points that the host holds open and the record does not know are settled. It is
// done once per term and after each surprise. done is false when it ended in a wait or in another state.
func (v *vmRun) adopt(ctx context.Context) (n next, done bool, err error) {
	status, err := v.tracking(ctx)
	if reason := errcat.Reason(err); reason == typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED {
		status, err = &typesv1.TrackingStatus{}, nil
	}
	if err != nil {
		n, err = v.failed(ctx, err)
		return n, false, err
	}
	chain, err := v.chainState(ctx)
	if err != nil {
		n, err = v.failed(ctx, err)
		return n, false, err
	}
	resyncing := v.rec.GetState() == Resynchronizing
	initial := v.rec.GetState() == InitialReplicating
	idle := v.rec.GetCycle() == nil && v.rec.GetPass() == nil
	switch {
	case chain.Closed() && v.rec.GetState() == PlannedFailoverInProgress && isOf(v.rec.GetFailover().GetFailover(), chain.Fence.Failover):
		return atOnce, false, v.stage(ctx, schedulerv1.FailoverStage_FAILOVER_STAGE_CLOSED)
	case chain.Closed():
		n, err = v.failed(ctx, errcat.New(typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED,
			"failover %s has closed the lineage of %s", chain.Fence.Failover, v.rec.GetName()))
		return n, false, err
	case status.GetLineage() != "" && status.GetLineage() != v.rec.GetLineage():
		n, err = v.failed(ctx, errcat.New(typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH,
			"host %s tracks %s for lineage %s, not for %s", lastPart(v.rec.GetHost()), v.rec.GetName(), status.GetLineage(), v.rec.GetLineage()))
		return n, false, err
	case !status.GetTracking() && (initial || resyncing):
		if status, err = v.track(ctx); err != nil { // nothing to lose: begin again there
			n, err = v.failed(ctx, err)
			return n, false, err
		}
	case !status.GetTracking():
		n, err = v.baselineLost(ctx, typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST, "the host does not track the VM")
		return n, false, err
	case v.rec.GetState() == Protected && chain.Base == 0:
		n, err = v.failed(ctx, errcat.New(typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN, "the chain of %s has no base any more", v.rec.GetName()))
		return n, false, err
	case initial && idle && status.GetResyncReason() == typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST:
		// There is nothing to compare with: the copy begins again.
	case !resyncing && idle && status.GetResyncReason() != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED:
		n, err = v.baselineLost(ctx, status.GetResyncReason(), status.GetResyncDetail())
		return n, false, err
	case !resyncing && idle && status.GetBase() > uint64(chain.StateOrdinal):
		n, err = v.baselineLost(ctx, typesv1.ResyncReason_RESYNC_REASON_BASE_AHEAD, "the host's base is above the state of the chain")
		return n, false, err
	case !resyncing && (!initial || status.GetBase() != 0) && wentBack(status, chain):
		n, err = v.baselineLost(ctx, typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST, wentBackDetail)
		return n, false, err
	}
	if err := v.agree(ctx, status, chain); err != nil {
		return next{}, false, err
	}
	status, err = v.settleStrangers(ctx, status, chain)
	if err != nil {
		n, err = v.failed(ctx, err)
		return n, false, err
	}
	v.m.status, v.m.reconciled, v.m.adoptedEpoch = status, true, v.rec.GetEpoch()
	return next{}, true, nil
}

const wentBackDetail = "the host does not know what it shipped last: its disks or its tracking were put back to an earlier state"

// wentBack reports whether the host has forgotten the cut or the pass that the chain's state comes from, as one does whose
// volume was restored from a backup. Its base is then below the chain's state as after a point that committed late, but
// that point the host remembers. What is older than all that it lists is not judged.
func wentBack(status *typesv1.TrackingStatus, chain *replica.State) bool {
	state := uint64(chain.StateOrdinal)
	if status.GetBase() >= state {
		return false
	}
	older := len(status.GetPoints()) == 0
	for _, p := range status.GetPoints() {
		if p.GetOrdinal() == state && len(p.GetDisks()) > 0 { // without disks: settled, and never cut
			return false
		}
		older = older || p.GetOrdinal() < state
	}
	return older
}

// agree raises the record to what host and chain have seen.
func (v *vmRun) agree(ctx context.Context, status *typesv1.TrackingStatus, chain *replica.State) error {
	epoch := max(v.rec.GetEpoch(), status.GetEpoch(), uint64(chain.Epoch))
	ordinal := max(v.rec.GetNextOrdinal(), status.GetHighestOrdinal()+1, uint64(chain.Highest)+1)
	last, lastTime := v.rec.GetLastPoint(), v.rec.GetLastPointTime()
	if chain.Newest != 0 && v.m.chain != nil {
		m, err := v.m.chain.Manifest(ctx, chain.Newest)
		if err == nil && uint64(m.Point) != last {
			last, lastTime = uint64(m.Point), timestamppb.New(m.CutTime)
		}
	}
	if epoch == v.rec.GetEpoch() && ordinal == v.rec.GetNextOrdinal() && uint64(chain.Open) == v.rec.GetOpen() && last == v.rec.GetLastPoint() {
		return nil
	}
	v.log.InfoContext(ctx, "record brought up to host and chain", "vm", v.rec.GetName(), "epoch", epoch, "next_ordinal", ordinal,
		"open", chain.Open, "last_point", last)
	return v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Epoch, rec.NextOrdinal, rec.Open = epoch, ordinal, uint64(chain.Open)
		rec.LastPoint, rec.LastPointTime = last, lastTime
	})
}

// settleStrangers ends points and passes that the host holds open and the record knows nothing of: COMMITTED if the
// chain has them, ABANDONED otherwise. The host deletes nothing of an abandoned one; its changes go into the next point.
func (v *vmRun) settleStrangers(ctx context.Context, status *typesv1.TrackingStatus, chain *replica.State) (*typesv1.TrackingStatus, error) {
	for _, p := range status.GetPoints() {
		o := p.GetOrdinal()
		if p.GetPhase() != typesv1.PointPhase_POINT_PHASE_OPEN || o == v.rec.GetCycle().GetPoint() || o == v.rec.GetPass().GetOrdinal() {
			continue
		}
		outcome := typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED
		if _, ok := chain.PointSeq(replica.Ordinal(o)); ok && !p.GetPass() {
			outcome = typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED
		}
		if prog, ok := chain.Pass(replica.Ordinal(o)); ok && p.GetPass() && prog.Complete {
			outcome = typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED
		}
		v.log.WarnContext(ctx, "host holds a point that the record does not know", "vm", v.rec.GetName(), "ordinal", o,
			"pass", p.GetPass(), "outcome", outcome.String())
		var after *typesv1.TrackingStatus
		var err error
		if p.GetPass() {
			after, err = v.settlePassOnHost(ctx, o, outcome)
			if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST) && outcome == typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED {
				after, err = v.settlePassOnHost(ctx, o, typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED)
			}
		} else {
			after, err = v.settlePointOnHost(ctx, o, outcome)
		}
		switch reason := errcat.Reason(err); {
		case reason == typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED:
		case err != nil:
			return nil, err
		default:
			status = after
		}
	}
	return status, nil
}

// settlePointOnHost is one SettlePoint call.
func (v *vmRun) settlePointOnHost(ctx context.Context, ordinal uint64, outcome typesv1.SettleOutcome) (*typesv1.TrackingStatus, error) {
	ctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := host.SettlePoint(ctx, &hostproviderv1.SettlePointRequest{
		Vm: v.vmID(), Lineage: v.rec.GetLineage(), Point: ordinal, Epoch: v.rec.GetEpoch(), Outcome: outcome,
	})
	return resp.GetStatus(), err
}

// settlePassOnHost is one SettlePass call.
func (v *vmRun) settlePassOnHost(ctx context.Context, ordinal uint64, outcome typesv1.SettleOutcome) (*typesv1.TrackingStatus, error) {
	ctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := host.SettlePass(ctx, &hostproviderv1.SettlePassRequest{
		Vm: v.vmID(), Lineage: v.rec.GetLineage(), Pass: ordinal, Epoch: v.rec.GetEpoch(), Outcome: outcome,
	})
	return resp.GetStatus(), err
}

// track makes sure that the host tracks the VM for our lineage.
func (v *vmRun) track(ctx context.Context) (*typesv1.TrackingStatus, error) {
	ctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := host.CreateReplicationRelationship(ctx, &hostproviderv1.CreateReplicationRelationshipRequest{
		Vm: v.vmID(), Lineage: v.rec.GetLineage(), Epoch: v.rec.GetEpoch(),
	})
	return resp.GetStatus(), err
}

// failed is what a step does about an error of a host or of storage when no cycle or pass has to be given up for it.
func (v *vmRun) failed(ctx context.Context, cause error) (next, error) {
	v.m.reconciled = false
	switch class := Classify(errcat.Reason(cause)); class {
	case ClassFatal:
		return v.stop(ctx, cause)
	case ClassResync:
		return v.loseBaseline(ctx, cause)
	}
	return v.climb(ctx, cause)
}

// stop ends replication until a person acts.
func (v *vmRun) stop(ctx context.Context, cause error) (next, error) {
	if v.rec.GetState() == PlannedFailoverInProgress {
		return v.refusePlanned(ctx, detailOf(cause, v.now()), typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED)
	}
	to, _, err := Next(v.rec.GetState(), EvNonRecoverableError)
	if err != nil || to == v.rec.GetState() {
		return v.climb(ctx, cause) // no such state from here: keep trying, health says so
	}
	v.log.ErrorContext(ctx, "replication stopped", "vm", v.rec.GetName(), "error", cause)
	return atOnce, v.move(ctx, EvNonRecoverableError, func(rec *schedulerv1.ProtectedVm) {
		now := v.now()
		rec.Retry = climb(rec.GetRetry(), detailOf(cause, now), now, v.cfg.RetryUnit)
		rec.Retry.NextTime = nil
		rec.Resynchronizing = false
	})
}

// hostForgot tells a host that lost its state from one that works for somebody else.
func (v *vmRun) hostForgot(ctx context.Context, cause error) bool {
	if !errcat.Is(cause, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH) {
		return false
	}
	status, err := v.tracking(ctx)
	if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED) {
		return true
	}
	return err == nil && !status.GetTracking()
}

// loseBaseline asks the host why, and goes to ResyncRequired.
func (v *vmRun) loseBaseline(ctx context.Context, cause error) (next, error) {
	reason := resyncReasons[errcat.Reason(cause)]
	if status, err := v.tracking(ctx); err == nil {
		if !status.GetTracking() {
			reason = typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST
		} else if r := status.GetResyncReason(); r != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED && reason != typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST {
			reason = r
		}
	}
	return v.baselineLost(ctx, reason, cause.Error())
}

// baselineLost gives up what is in hand and waits for a resynchronisation.
func (v *vmRun) baselineLost(ctx context.Context, reason typesv1.ResyncReason, detailText string) (next, error) {
	v.m.reconciled = false
	event := EvBaselineLost
	switch v.rec.GetState() {
	case InitialReplicating, Resynchronizing:
		if reason == typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST {
			return v.copyAgain(ctx, detailText)
		}
	case PlannedFailoverInProgress:
		return v.refusePlanned(ctx, detail(typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED,
			clip("the last point cannot be cut: "+resyncText(reason)+": "+detailText, maxErrorText), v.now()), reason)
	case CancellingFailover:
		event = EvCancelledDiverged
	}
	if _, _, err := Next(v.rec.GetState(), event); err != nil {
		return v.climb(ctx, errcat.New(typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED, "%s", detailText))
	}
	v.m.endRoot(errcat.New(typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED, "%s", detailText))
	err := v.move(ctx, event, func(rec *schedulerv1.ProtectedVm) {
		if event == EvCancelledDiverged {
			cancelled(rec)
		}
		if rec.GetCycle() != nil || rec.GetPass() != nil {
			rec.Epoch++
		}
		rec.Cycle, rec.Pass, rec.Retry = nil, nil, nil
		rec.ResyncReason, rec.Resynchronizing = reason, false
	})
	if err == nil {
		v.jobs.announce(ctx, v.rec.GetName(), "resync.became-required", bus.EventID(v.rec.GetLineage(), "resync", revText(v.rev)),
			&eventsv1.ResyncBecameRequired{Vm: v.rec.GetName(), Reason: reason, Detail: clip(detailText, maxErrorText)})
	}
	return atOnce, err
}

// copyAgain begins an initial replication or a comparison anew after the hypervisor lost what tracked the writes during
// it. Nothing of the old copy is a baseline, so nobody has to be asked. The ladder keeps it from spinning.
func (v *vmRun) copyAgain(ctx context.Context, why string) (next, error) {
	v.m.reconciled = false
	cause := errcat.New(typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST, "the copy begins again: %s", why)
	v.m.endRoot(cause)
	v.log.WarnContext(ctx, "copy begins again", "vm", v.rec.GetName(), "error", cause)
	now := v.now()
	err := v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Epoch++
		rec.Cycle, rec.Pass = nil, nil // what the host holds of them is settled when it is adopted
		if rec.GetState() == Resynchronizing && rec.GetResyncReason() == typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
			rec.ResyncReason = typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST
		}
		v.climbed(rec, detailOf(cause, now))
		rec.Retry.Error.Recoverable = true
	})
	return atOnce, err
}
