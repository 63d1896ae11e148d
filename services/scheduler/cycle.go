package scheduler

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/policy"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

const (
	spanCycle   = "replication cycle"
	spanPass    = "replication pass"
	spanCut     = "cut"
	spanBegin   = "begin pass"
	spanPublish = "publish tasks"
	spanSettle  = "settle"

	// maxQuiet bounds refusals in a row that are answered by reconciling at once; then the ladder slows them down.
	maxQuiet = 3
)

// beginRoot opens the trace of a cycle or pass and returns its traceparent for the record, which carries it to every
// later step, also in another process.
func (v *vmRun) beginRoot(ctx context.Context, name string, ordinal uint64) string {
	v.m.endRoot(nil)
	ctx, span := v.tracer.Start(ctx, name, trace.WithNewRoot(), trace.WithAttributes(
		attribute.String("landfall.vm", v.rec.GetName()), attribute.Int64("landfall.ordinal", int64(ordinal))))
	v.m.root, v.m.rootOrdinal = span, ordinal
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}

// endRoot ends the trace that this process opened, if it did.
func (m *memory) endRoot(err error) {
	if m.root == nil {
		return
	}
	if err != nil {
		m.root.RecordError(err)
		m.root.SetStatus(codes.Error, errcat.Code(errcat.Reason(err)))
	}
	m.root.End()
	m.root, m.rootOrdinal = nil, 0
}

// span opens a step of the trace that the record carries.
func (v *vmRun) span(ctx context.Context, traceparent, name string) (context.Context, trace.Span) {
	ctx = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": traceparent})
	return v.tracer.Start(ctx, name, trace.WithAttributes(attribute.String("landfall.vm", v.rec.GetName())))
}

func endSpan(span trace.Span, err error) {
	if err != nil {
		span.RecordError(err)
		span.SetStatus(codes.Error, errcat.Code(errcat.Reason(err)))
	}
	span.End()
}

// kind is what a cut commits as: base at the end of a copy or a comparison, point otherwise.
func (v *vmRun) kind() typesv1.PointKind {
	if v.rec.GetState() == Protected || v.rec.GetState() == PlannedFailoverInProgress {
		return typesv1.PointKind_POINT_KIND_POINT
	}
	return typesv1.PointKind_POINT_KIND_BASE
}

// beginCycle assigns the ordinal and writes it down before the host hears of it.
func (v *vmRun) beginCycle(ctx context.Context) (next, error) {
	now := v.now()
	interval := v.policy.GetCopyInterval().AsDuration()
	due := now
	if t := v.rec.GetNextCycleTime(); t != nil {
		due = t.AsTime()
	}
	if due.After(now) { // by a clock that was put back
		due = now
	}
	late := int64(0)
	if interval > 0 && v.rec.GetState() == Protected {
		late = int64(max(now.Sub(due), 0) / interval) // fell due while the ladder waited
	}
	ordinal := v.rec.GetNextOrdinal()
	traceparent := v.beginRoot(ctx, spanCycle, ordinal)
	consistency := v.wantedConsistency(now)
	err := v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Counters.MissedCycles += late
		rec.NextOrdinal = ordinal + 1
		rec.NextCycleTime = timestamppb.New(due.Add(time.Duration(late+1) * interval))
		rec.Cycle = &schedulerv1.Cycle{
			Point: ordinal, Epoch: rec.GetEpoch(), Phase: schedulerv1.CyclePhase_CYCLE_PHASE_CUTTING, Kind: v.kind(),
			CutTime: timestamppb.New(now), PhaseTime: timestamppb.New(now), Traceparent: traceparent, Consistency: consistency,
		}
	})
	if err == nil {
		v.m.cycles.add(now, 1, 0)
		v.tellMissed(ctx, late)
	}
	return atOnce, err
}

// cycle carries the cycle in hand one step further.
func (v *vmRun) cycle(ctx context.Context) (next, error) {
	if v.rec.GetState() == Protected && v.rec.GetNextCycleTime() != nil {
		interval := v.policy.GetCopyInterval().AsDuration()
		if n, due := missed(v.rec.GetNextCycleTime().AsTime(), v.now(), interval); n > 0 {
			err := v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
				rec.Counters.MissedCycles += n
				rec.NextCycleTime = timestamppb.New(due)
			})
			if err != nil {
				return atOnce, err
			}
			v.tellMissed(ctx, n)
		}
	}
	switch v.rec.GetCycle().GetPhase() {
	case schedulerv1.CyclePhase_CYCLE_PHASE_CUTTING:
		return v.cut(ctx)
	case schedulerv1.CyclePhase_CYCLE_PHASE_CUT:
		return v.awaitPoint(ctx)
	case schedulerv1.CyclePhase_CYCLE_PHASE_COMMITTING:
		return v.settleCommitted(ctx)
	case schedulerv1.CyclePhase_CYCLE_PHASE_ABANDONING:
		return v.settleAbandoned(ctx)
	}
	return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Cycle = nil })
}

// cut asks the host for the instant. A repeat with the same ordinal gets the same answer; the cut time stays the one
// taken before the first try, so RPO is never told better than it is.
func (v *vmRun) cut(ctx context.Context) (next, error) {
	if err := failpoint.Hit(fpBeforeCut); err != nil {
		return next{}, err
	}
	c := v.rec.GetCycle()
	sctx, span := v.span(ctx, c.GetTraceparent(), spanCut)
	resp, err := v.cutOnHost(sctx, c)
	endSpan(span, err)
	if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED) && c.GetConsistency() == typesv1.Consistency_CONSISTENCY_APPLICATION {
		return v.cutWithoutFreeze(ctx, err)
	}
	if err != nil {
		return v.giveUp(ctx, err)
	}
	if err := failpoint.Hit(fpAfterCut); err != nil {
		return next{}, err
	}
	if resp.GetPoint().GetBase() < v.m.status.GetBase() { // bases only grow
		return v.baselineLost(ctx, typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST, wentBackDetail)
	}
	var bytes int64
	for _, d := range resp.GetPoint().GetDisks() {
		bytes += d.GetChangeBytes()
	}
	v.m.cutHere = c.GetPoint()
	degraded := v.degraded(c, resp)
	err = v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Cycle.Phase, rec.Cycle.PhaseTime = schedulerv1.CyclePhase_CYCLE_PHASE_CUT, stamp(v)
		rec.Cycle.Base, rec.Cycle.Consistency, rec.Cycle.ChangeBytes = resp.GetPoint().GetBase(), resp.GetConsistency(), bytes
		if resp.GetMachine() != nil {
			rec.Machine = resp.GetMachine()
			rec.Machine.Fence = "" // of the source now, not of what is recovered from the point
		}
		if degraded != nil {
			rec.AppConsistencyError = degraded
		}
	})
	if err == nil {
		v.tellDegraded(ctx, c.GetPoint(), degraded)
	}
	return atOnce, err
}

func (v *vmRun) cutOnHost(ctx context.Context, c *schedulerv1.Cycle) (*hostproviderv1.CutPointResponse, error) {
	ctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return nil, err
	}
	return host.CutPoint(ctx, &hostproviderv1.CutPointRequest{
		Vm: v.vmID(), Lineage: v.rec.GetLineage(), Point: c.GetPoint(), Epoch: v.rec.GetEpoch(),
		Consistency: consistencyOf(c),
	})
}

// awaitPoint puts the ship task into its queue and waits until the point is seen in the chain. The queue drops a
// second task of the same id; a task that was lost, or that nobody confirmed in time, comes again under another.
func (v *vmRun) awaitPoint(ctx context.Context) (next, error) {
	c, now := v.rec.GetCycle(), v.now()
	if v.m.published != c.GetPoint() || v.lost(ctx, bus.KindShip, now.Sub(v.m.publishedAt)) {
		if v.m.published == c.GetPoint() {
			v.m.attempt++
		} else {
			v.m.attempt = 0
			v.m.nextPoll = time.Time{} // it may have been shipped before this process looked
			if v.m.cutHere == c.GetPoint() {
				v.m.nextPoll = now.Add(v.cfg.Poll)
			}
		}
		if n, err := v.publishPoint(ctx); err != nil {
			return n, err
		}
	}
	c = v.rec.GetCycle()
	if now.Before(v.m.nextPoll) && !v.m.hints.takePoll() {
		return v.waitInCycle(now), nil
	}
	v.m.nextPoll = now.Add(v.cfg.Poll)
	chain, err := v.chainState(ctx)
	if err != nil {
		return v.climb(ctx, err)
	}
	if _, ok := chain.PointSeq(replica.Ordinal(c.GetPoint())); ok {
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.Cycle.Phase, rec.Cycle.PhaseTime, rec.Retry = schedulerv1.CyclePhase_CYCLE_PHASE_COMMITTING, stamp(v), nil
		})
	}
	if now.Sub(c.GetPhaseTime().AsTime()) > v.cfg.ShipTimeout {
		return v.giveUp(ctx, errcat.New(typesv1.ErrorReason_ERROR_REASON_REDELIVERIES_EXHAUSTED,
			"point %d of %s was not shipped within %s", c.GetPoint(), v.rec.GetName(), v.cfg.ShipTimeout))
	}
	return v.waitInCycle(now), nil
}

// waitInCycle is until the next look at storage, or until the next cycle falls due, to be counted as missed.
func (v *vmRun) waitInCycle(now time.Time) next {
	wait := v.m.nextPoll.Sub(now)
	if v.rec.GetState() == Protected && v.rec.GetNextCycleTime() != nil {
		wait = min(wait, v.rec.GetNextCycleTime().AsTime().Sub(now))
	}
	return later(wait)
}

func (v *vmRun) publishPoint(ctx context.Context) (next, error) {
	c := v.rec.GetCycle()
	reason := "delta"
	if c.GetKind() == typesv1.PointKind_POINT_KIND_BASE {
		reason = "end of " + v.copyReason()
	}
	task := v.shipTask(c.GetEpoch(), c.GetBase(), reason)
	task.Work = &uploaderv1.ShipTask_Point{Point: &uploaderv1.PointTask{
		Ordinal: c.GetPoint(), Kind: c.GetKind(), CutTime: c.GetCutTime(), Consistency: c.GetConsistency(),
	}}
	id := fmt.Sprintf("%s/point/%d/%d", v.rec.GetLineage(), c.GetPoint(), c.GetEpoch())
	if v.m.attempt > 0 {
		id += "/" + strconv.Itoa(v.m.attempt)
	}
	if err := failpoint.Hit(fpBeforePublish); err != nil {
		return next{}, err
	}
	sctx, span := v.span(ctx, c.GetTraceparent(), spanPublish)
	err := v.bus.PublishTask(sctx, bus.KindShip, v.site(), id, task)
	endSpan(span, err)
	if err != nil {
		return next{}, err
	}
	if err := failpoint.Hit(fpAfterPublish); err != nil {
		return next{}, err
	}
	v.m.published, v.m.publishedAt = c.GetPoint(), v.now()
	if c.GetTaskPublished() {
		return next{}, nil
	}
	return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Cycle.TaskPublished = true })
}

// copyReason names the copy that a base ends.
func (v *vmRun) copyReason() string {
	if v.rec.GetResynchronizing() {
		return "resynchronisation"
	}
	return "initial replication"
}

func (v *vmRun) shipTask(epoch, base uint64, reason string) *uploaderv1.ShipTask {
	return &uploaderv1.ShipTask{
		Vm: v.rec.GetName(), Host: v.rec.GetHost(), Lineage: v.rec.GetLineage(), Epoch: epoch, Open: v.rec.GetOpen(), Base: base,
		Disks: v.rec.GetMachine().GetDisks(), Machine: v.rec.GetMachine(), Reason: reason,
		SuspicionFactor: v.policy.GetSuspicionFactor(),
	}
}

// settleCommitted tells the host that the point is in the chain, asks for it to be applied, and closes the cycle.
func (v *vmRun) settleCommitted(ctx context.Context) (next, error) {
	c := v.rec.GetCycle()
	chain, err := v.chainState(ctx)
	if err != nil {
		return v.climb(ctx, err)
	}
	seq, ok := chain.PointSeq(replica.Ordinal(c.GetPoint()))
	if !ok { // it was seen there; never settle what is not
		return v.climb(ctx, errcat.New(typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN, "point %d of %s left the chain", c.GetPoint(), v.rec.GetName()))
	}
	if err := failpoint.Hit(fpBeforeSettle); err != nil {
		return next{}, err
	}
	sctx, span := v.span(ctx, c.GetTraceparent(), spanSettle)
	status, err := v.settlePointOnHost(sctx, c.GetPoint(), typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED)
	endSpan(span, err)
	if ok, n, err := v.afterSettle(ctx, status, err); !ok {
		return n, err
	}
	if err := failpoint.Hit(fpAfterSettle); err != nil {
		return next{}, err
	}
	actx, span := v.span(ctx, c.GetTraceparent(), spanPublish)
	err = v.publishApply(actx, uint64(seq), "point", c.GetPoint())
	endSpan(span, err)
	if err != nil {
		return next{}, err
	}
	stored, changed := v.sizes(ctx, seq)
	change := func(rec *schedulerv1.ProtectedVm) {
		rec.LastPoint, rec.LastPointTime = c.GetPoint(), c.GetCutTime()
		rec.Counters.Points++
		rec.Counters.ShippedBytes += stored
		rec.Counters.ChangedBytes += changed
		rec.Cycle, rec.Retry, rec.Resynchronizing = nil, nil, false
		if c.GetConsistency() == typesv1.Consistency_CONSISTENCY_APPLICATION {
			rec.LastAppPointTime, rec.AppConsistencyError = c.GetCutTime(), nil
		}
		v.lastPointSent(rec, c.GetPoint())
		if interval := v.policy.GetCopyInterval().AsDuration(); v.rec.GetState() != Protected || v.now().Sub(c.GetCutTime().AsTime()) >= interval {
			rec.NextCycleTime = stamp(v) // late already: the next one starts at once
		}
	}
	v.m.quiet = 0
	switch v.rec.GetState() {
	case InitialReplicating:
		err = v.move(ctx, EvDisksSent, change)
	case Resynchronizing:
		err = v.move(ctx, EvResyncCompleted, change)
	default:
		err = v.save(ctx, change)
	}
	if err == nil {
		v.m.endRoot(nil)
		v.views.received(ctx, changed)
	}
	return atOnce, err
}

// afterSettle judges the answer to a settle. Refusals do not change what is true: the point is in the chain, or is given
// up; what the host then holds is found out by adopting.
func (v *vmRun) afterSettle(ctx context.Context, status *typesv1.TrackingStatus, err error) (ok bool, n next, _ error) {
	if err == nil {
		if status != nil {
			v.m.status = status
		}
		return true, next{}, nil
	}
	v.m.reconciled = false
	switch reason := errcat.Reason(err); {
	case reason == typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH:
		// Somebody raised the host's epoch: take it over, then settle again.
		n, done, aerr := v.adopt(ctx)
		if !done || aerr != nil {
			return false, n, aerr
		}
		if v.m.quiet++; v.m.quiet > maxQuiet {
			n, err = v.climb(ctx, err)
			return false, n, err
		}
		return false, atOnce, nil
	case Classify(reason) == ClassRecoverable:
		n, err = v.climb(ctx, err)
		return false, n, err
	}
	return true, next{}, nil
}

// sizes are the stored bytes of a manifest's segments and the distinct bytes changed, as far as they are known.
func (v *vmRun) sizes(ctx context.Context, seq replica.Seq) (stored, changed int64) {
	if m, err := v.m.chain.Manifest(ctx, seq); err == nil {
		for _, d := range m.Disks {
			for _, s := range d.Segments {
				stored += s.Bytes
			}
		}
	}
	if r := v.m.hints.point(); r.GetPoint() == v.rec.GetCycle().GetPoint() {
		return stored, r.GetChangedBytes()
	}
	return stored, v.rec.GetCycle().GetChangeBytes()
}

// Bounds of how old the newest checkpoint may get before the next point applied becomes one: a failover replays the journal
// above the nearest one, and nothing above the newest is ever retired.
const (
	maxCheckpointAge = time.Hour
	minCheckpointAge = time.Minute
)

// checkpointAge is a quarter of the time for which every point is kept, within bounds: a short retention would keep far more
// than it says otherwise.
func checkpointAge(p *schedulerv1.Policy) time.Duration {
	return min(max(policy.KeepAll(p)/4, minCheckpointAge), maxCheckpointAge)
}

// publishApply asks for the chain to be applied at least up to seq.
func (v *vmRun) publishApply(ctx context.Context, seq uint64, what string, ordinal uint64) error {
	id := fmt.Sprintf("%s/apply/%s/%d", v.rec.GetLineage(), what, ordinal)
	return v.bus.PublishTask(ctx, bus.KindApply, v.site(), id, &uploaderv1.ApplyTask{
		Vm: v.rec.GetName(), Lineage: v.rec.GetLineage(), Sequence: seq, CheckpointAge: durationpb.New(checkpointAge(v.policy)),
		Delay: v.policy.GetApplyDelay(),
	})
}

// giveUp abandons the cycle in hand: the epoch rises in the same write, so that no task of it is granted any more, then
// the host is told. What may be tried again at once does not climb the ladder, a few times in a row.
func (v *vmRun) giveUp(ctx context.Context, cause error) (next, error) {
	if ctx.Err() != nil {
		return next{}, ctx.Err()
	}
	c, now := v.rec.GetCycle(), v.now()
	class := Classify(errcat.Reason(cause))
	if class == ClassResync || v.hostForgot(ctx, cause) {
		return v.loseBaseline(ctx, cause)
	}
	v.m.reconciled = false
	quiet := class == ClassReopen && c.GetPhase() == schedulerv1.CyclePhase_CYCLE_PHASE_CUTTING && v.m.quiet < maxQuiet
	if quiet {
		v.m.quiet++
	}
	v.log.WarnContext(ctx, "point given up", "vm", v.rec.GetName(), "point", c.GetPoint(), "phase", c.GetPhase().String(), "error", cause)
	wasCut := c.GetPhase() == schedulerv1.CyclePhase_CYCLE_PHASE_CUT
	err := v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Epoch++
		rec.Cycle.Phase, rec.Cycle.PhaseTime = schedulerv1.CyclePhase_CYCLE_PHASE_ABANDONING, timestamppb.New(now)
		if wasCut {
			rec.Counters.AbandonedPoints++
		}
		if !quiet {
			v.climbed(rec, detailOf(cause, now))
			rec.Retry.NextTime = nil // the host is told first, then the gap counts
		}
	})
	if err == nil {
		v.m.endRoot(cause)
		v.views.abandoned(ctx)
		v.jobs.announce(ctx, v.rec.GetName(), "recovery-point.abandoned", bus.EventID(v.rec.GetLineage(), "abandoned", strconv.FormatUint(c.GetPoint(), 10)),
			&eventsv1.RecoveryPointAbandoned{Vm: v.rec.GetName(), Point: c.GetPoint(), Error: detailOf(cause, now)})
	}
	return atOnce, err
}

// settleAbandoned tells the host, then waits for the next rung, or stops for good.
func (v *vmRun) settleAbandoned(ctx context.Context) (next, error) {
	c := v.rec.GetCycle()
	if err := failpoint.Hit(fpBeforeSettle); err != nil {
		return next{}, err
	}
	sctx, span := v.span(ctx, c.GetTraceparent(), spanSettle)
	status, err := v.settlePointOnHost(sctx, c.GetPoint(), typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED)
	endSpan(span, err)
	if ok, n, err := v.afterSettle(ctx, status, err); !ok {
		return n, err
	}
	if err := failpoint.Hit(fpAfterSettle); err != nil {
		return next{}, err
	}
	v.m.reconciled = false
	return v.nextRung(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Cycle = nil })
}

// nextRung ends what was given up: by waiting as the ladder says, or for good when its error was not recoverable.
func (v *vmRun) nextRung(ctx context.Context, change func(rec *schedulerv1.ProtectedVm)) (next, error) {
	retry := v.rec.GetRetry()
	if retry != nil && Classify(reasonOf(retry.GetError())) == ClassFatal {
		if v.rec.GetState() == PlannedFailoverInProgress {
			return v.refusePlanned(ctx, retry.GetError(), typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED)
		}
		if to, _, err := Next(v.rec.GetState(), EvNonRecoverableError); err == nil && to != v.rec.GetState() {
			return atOnce, v.move(ctx, EvNonRecoverableError, func(rec *schedulerv1.ProtectedVm) {
				change(rec)
				rec.Retry.NextTime, rec.Resynchronizing = nil, false
			})
		}
	}
	return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		change(rec)
		if rec.GetRetry() != nil {
			rec.Retry.NextTime = timestamppb.New(v.now().Add(v.gap(rec.GetRetry().GetAttempt(), rec.GetRetry().GetError())))
		}
	})
}
