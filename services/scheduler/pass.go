package scheduler

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// defaultParallel is how many tasks of one pass may be out when the policy does not say.
const defaultParallel = 4

// beginPass assigns the ordinal of a pass and writes it down before the host hears of it.
func (v *vmRun) beginPass(ctx context.Context, scope typesv1.PassScope) (next, error) {
	ordinal := v.rec.GetNextOrdinal()
	traceparent := v.beginRoot(ctx, spanPass, ordinal)
	v.m.hints.startPass(ordinal)
	return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.NextOrdinal = ordinal + 1
		rec.Pass = &schedulerv1.Pass{
			Ordinal: ordinal, Epoch: rec.GetEpoch(), Phase: schedulerv1.PassPhase_PASS_PHASE_BEGINNING, Scope: scope,
			PhaseTime: stamp(v), Traceparent: traceparent, Job: rec.GetCurrentJob(),
		}
	})
}

// pass carries the pass in hand one step further.
func (v *vmRun) pass(ctx context.Context) (next, error) {
	switch v.rec.GetPass().GetPhase() {
	case schedulerv1.PassPhase_PASS_PHASE_BEGINNING:
		return v.openPass(ctx)
	case schedulerv1.PassPhase_PASS_PHASE_SHIPPING:
		return v.shipPass(ctx)
	case schedulerv1.PassPhase_PASS_PHASE_COMMITTING:
		return v.settlePass(ctx)
	case schedulerv1.PassPhase_PASS_PHASE_ABANDONING:
		return v.settleAbandonedPass(ctx)
	}
	return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Pass = nil })
}

// openPass has the host fix the ranges, and splits them into tasks.
func (v *vmRun) openPass(ctx context.Context) (next, error) {
	if err := failpoint.Hit(fpBeforeCut); err != nil {
		return next{}, err
	}
	p := v.rec.GetPass()
	sctx, span := v.span(ctx, p.GetTraceparent(), spanBegin)
	host, err := v.beginPassOnHost(sctx, p)
	endSpan(span, err)
	if err != nil {
		return v.giveUpPass(ctx, err)
	}
	if err := failpoint.Hit(fpAfterCut); err != nil {
		return next{}, err
	}
	windows := []*schedulerv1.PassWindow{{}} // a comparing pass is one task
	if p.GetScope() != typesv1.PassScope_PASS_SCOPE_COMPARE {
		windows = planWindows(p.GetScope(), host.GetDisks(), v.cfg.WindowBytes)
	}
	var total int64
	for _, d := range host.GetDisks() {
		if p.GetScope() == typesv1.PassScope_PASS_SCOPE_DIRTY {
			total += d.GetChangeBytes()
		} else {
			total += d.GetSizeBytes()
		}
	}
	base := uint64(0) // a full or comparing pass stands on nothing
	if p.GetScope() == typesv1.PassScope_PASS_SCOPE_DIRTY {
		base = host.GetBase()
	}
	return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Pass.Phase, rec.Pass.PhaseTime = schedulerv1.PassPhase_PASS_PHASE_SHIPPING, stamp(v)
		rec.Pass.Windows, rec.Pass.TotalBytes, rec.Pass.Base = windows, total, base
	})
}

func (v *vmRun) beginPassOnHost(ctx context.Context, p *schedulerv1.Pass) (*typesv1.HostPoint, error) {
	ctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := host.BeginPass(ctx, &hostproviderv1.BeginPassRequest{
		Vm: v.vmID(), Lineage: v.rec.GetLineage(), Pass: p.GetOrdinal(), Epoch: v.rec.GetEpoch(), Scope: p.GetScope(),
	})
	return resp.GetPass(), err
}

// shipPass keeps a bounded number of tasks in the queue until the chain has them all. The chain alone says what is
// done, so a pass resumes at the window where it was, whatever was lost.
func (v *vmRun) shipPass(ctx context.Context) (next, error) {
	now := v.now()
	if v.m.published != v.rec.GetPass().GetOrdinal() { // the first look of this process
		if err := v.republishPass(ctx); err != nil {
			return next{}, err
		}
		v.m.published, v.m.nextPoll = v.rec.GetPass().GetOrdinal(), time.Time{}
	}
	if !now.Before(v.m.nextPoll) || v.m.hints.takePoll() {
		v.m.nextPoll = now.Add(v.cfg.Poll)
		chain, err := v.chainState(ctx)
		if err != nil {
			return v.climb(ctx, err)
		}
		if n, done, err := v.markCommitted(ctx, chain); done || err != nil {
			return n, err
		}
	}
	if n, err := v.publishWindows(ctx, now); err != nil {
		return n, err
	}
	return later(v.m.nextPoll.Sub(now)), nil
}

// markCommitted takes over what the chain has of the pass.
func (v *vmRun) markCommitted(ctx context.Context, chain *replica.State) (n next, done bool, err error) {
	p := v.rec.GetPass()
	progress, ok := chain.Pass(replica.Ordinal(p.GetOrdinal()))
	if !ok {
		return next{}, false, nil
	}
	fresh := false
	committed := make([]bool, len(p.GetWindows()))
	if p.GetScope() != typesv1.PassScope_PASS_SCOPE_COMPARE {
		for i, w := range p.GetWindows() {
			committed[i] = !slices.Contains(progress.Missing, uint32(i)+1)
			fresh = fresh || committed[i] && !w.GetCommitted()
		}
	}
	if !progress.Complete && !fresh {
		return next{}, false, nil
	}
	err = v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		for i, w := range rec.Pass.Windows {
			w.Committed = w.Committed || committed[i] || progress.Complete
		}
		if progress.Complete {
			rec.Pass.Phase, rec.Pass.PhaseTime = schedulerv1.PassPhase_PASS_PHASE_COMMITTING, stamp(v)
		}
		rec.Retry = nil
	})
	return atOnce, progress.Complete, err
}

// publishWindows puts tasks into the queue up to the policy's limit. The time of publishing is written first; it is
// part of the task's id, so a repeat of one attempt is dropped and a new attempt is not.
func (v *vmRun) publishWindows(ctx context.Context, now time.Time) (next, error) {
	limit := int(v.policy.GetParallelUploads())
	if limit <= 0 {
		limit = defaultParallel
	}
	kind := bus.KindCopy
	if v.rec.GetPass().GetScope() == typesv1.PassScope_PASS_SCOPE_COMPARE {
		kind = bus.KindResync
	}
	var due []int
	out := 0
	for i, w := range v.rec.GetPass().GetWindows() {
		if w.GetCommitted() {
			continue
		}
		if t := w.GetPublishTime(); t != nil && !v.lost(ctx, kind, now.Sub(t.AsTime())) {
			out++
			continue
		}
		if out+len(due) < limit {
			due = append(due, i)
		}
	}
	if out+len(due) > limit {
		due = due[:max(limit-out, 0)]
	}
	if len(due) == 0 {
		return next{}, nil
	}
	err := v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		for _, i := range due {
			rec.Pass.Windows[i].PublishTime = timestamppb.New(now)
		}
	})
	if err != nil {
		return next{}, err
	}
	return next{}, v.publishTasks(ctx, due)
}

// lost says whether a task that was put into its queue so long ago has to be put there again. A worker may take very
// long; while the queue still holds tasks, ours may be among them, and a second copy would be shipped twice.
func (v *vmRun) lost(ctx context.Context, kind bus.Kind, age time.Duration) bool {
	if age < v.cfg.Republish || age < v.cfg.ShipTimeout && v.backlog(ctx, kind) {
		return false
	}
	return true
}

// backlog reports whether the queue holds tasks, in work or waiting. Not knowing counts as yes.
func (v *vmRun) backlog(ctx context.Context, kind bus.Kind) bool {
	ctx, cancel := v.call(ctx)
	defer cancel()
	n, err := v.bus.Backlog(ctx, kind, v.site())
	return err != nil || n > 0
}

// republishPass repeats, under the same ids, the tasks that the record says are out: the process that wrote them down may
// have been killed before it published them.
func (v *vmRun) republishPass(ctx context.Context) error {
	var out []int
	for i, w := range v.rec.GetPass().GetWindows() {
		if !w.GetCommitted() && w.GetPublishTime() != nil {
			out = append(out, i)
		}
	}
	if len(out) == 0 {
		return nil
	}
	return v.publishTasks(ctx, out)
}

func (v *vmRun) publishTasks(ctx context.Context, windows []int) error {
	p := v.rec.GetPass()
	if err := failpoint.Hit(fpBeforePublish); err != nil {
		return err
	}
	sctx, span := v.span(ctx, p.GetTraceparent(), spanPublish)
	defer span.End()
	for _, i := range windows {
		w := p.GetWindows()[i]
		id := fmt.Sprintf("%s/pass/%d/%d/%d/%d", v.rec.GetLineage(), p.GetOrdinal(), p.GetEpoch(), i+1, w.GetPublishTime().AsTime().UnixMilli())
		var err error
		if p.GetScope() == typesv1.PassScope_PASS_SCOPE_COMPARE {
			err = v.bus.PublishTask(sctx, bus.KindResync, v.site(), id, &resyncenginev1.CompareTask{
				Vm: v.rec.GetName(), Host: v.rec.GetHost(), Lineage: v.rec.GetLineage(), Epoch: p.GetEpoch(), Open: v.rec.GetOpen(),
				Pass: p.GetOrdinal(), Disks: v.rec.GetMachine().GetDisks(), ChunkBytes: v.cfg.ChunkBytes, Job: p.GetJob(),
			})
		} else {
			task := v.shipTask(p.GetEpoch(), p.GetBase(), v.passReason(p.GetScope()))
			task.Work = &uploaderv1.ShipTask_Pass{Pass: &uploaderv1.PassTask{
				Ordinal: p.GetOrdinal(), Index: int32(i + 1), Tasks: int32(len(p.GetWindows())), Scope: p.GetScope(),
				Disk: w.GetDisk(), Window: w.GetWindow(),
			}}
			err = v.bus.PublishTask(sctx, bus.KindCopy, v.site(), id, task)
		}
		if err != nil {
			return err
		}
	}
	return failpoint.Hit(fpAfterPublish)
}

func (v *vmRun) passReason(scope typesv1.PassScope) string {
	if scope == typesv1.PassScope_PASS_SCOPE_DIRTY {
		return "catch-up"
	}
	return v.copyReason()
}

// settlePass tells the host that the pass is in the chain. It then is the host's base.
func (v *vmRun) settlePass(ctx context.Context) (next, error) {
	p := v.rec.GetPass()
	chain, err := v.chainState(ctx)
	if err != nil {
		return v.climb(ctx, err)
	}
	progress, ok := chain.Pass(replica.Ordinal(p.GetOrdinal()))
	if !ok || !progress.Complete { // rule 11: only a complete pass may be settled
		return v.climb(ctx, errcat.New(typesv1.ErrorReason_ERROR_REASON_CHAIN_BROKEN, "pass %d of %s left the chain", p.GetOrdinal(), v.rec.GetName()))
	}
	if err := failpoint.Hit(fpBeforeSettle); err != nil {
		return next{}, err
	}
	sctx, span := v.span(ctx, p.GetTraceparent(), spanSettle)
	status, err := v.settlePassOnHost(sctx, p.GetOrdinal(), typesv1.SettleOutcome_SETTLE_OUTCOME_COMMITTED)
	endSpan(span, err)
	if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST) && p.GetScope() != typesv1.PassScope_PASS_SCOPE_DIRTY {
		return v.copyAgain(ctx, err.Error()) // nothing covers the writes since the pass began
	}
	settled := err == nil
	if ok, n, err := v.afterSettle(ctx, status, err); !ok {
		return n, err
	}
	if err := failpoint.Hit(fpAfterSettle); err != nil {
		return next{}, err
	}
	actx, span := v.span(ctx, p.GetTraceparent(), spanPublish)
	err = v.publishApply(actx, uint64(progress.Last), "pass", p.GetOrdinal())
	endSpan(span, err)
	if err != nil {
		return next{}, err
	}
	err = v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Counters.ShippedBytes += progress.Bytes
		switch p.GetScope() {
		case typesv1.PassScope_PASS_SCOPE_FULL:
			rec.Counters.FullPasses++
		case typesv1.PassScope_PASS_SCOPE_DIRTY:
			rec.Counters.DirtyPasses++
		case typesv1.PassScope_PASS_SCOPE_COMPARE:
			rec.Counters.ComparePasses++
		}
		if settled && p.GetScope() != typesv1.PassScope_PASS_SCOPE_DIRTY {
			rec.ResyncReason = typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED
		}
		rec.Pass, rec.Retry = nil, nil
	})
	if err == nil {
		v.m.quiet = 0
		v.m.endRoot(nil)
	}
	return atOnce, err
}

// giveUpPass ends a pass that cannot go on, with the epoch raised in the same write. A failed task alone is no reason:
// it is published again.
func (v *vmRun) giveUpPass(ctx context.Context, cause error) (next, error) {
	if ctx.Err() != nil {
		return next{}, ctx.Err()
	}
	p, now := v.rec.GetPass(), v.now()
	v.m.reconciled = false
	beginning := p.GetPhase() == schedulerv1.PassPhase_PASS_PHASE_BEGINNING
	class := Classify(errcat.Reason(cause))
	switch {
	case class == ClassResync && p.GetScope() == typesv1.PassScope_PASS_SCOPE_DIRTY:
		return v.loseBaseline(ctx, cause)
	case class == ClassResync && beginning && v.rec.GetState() == PlannedFailoverInProgress:
		return v.loseBaseline(ctx, cause)
	case class == ClassRecoverable && beginning: // same ordinal again: BeginPass is idempotent
		return v.climb(ctx, cause)
	}
	quiet := class == ClassReopen && beginning && v.m.quiet < maxQuiet
	if quiet {
		v.m.quiet++
	}
	v.log.WarnContext(ctx, "pass given up", "vm", v.rec.GetName(), "pass", p.GetOrdinal(), "error", cause)
	err := v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		rec.Epoch++
		rec.Pass.Phase, rec.Pass.PhaseTime = schedulerv1.PassPhase_PASS_PHASE_ABANDONING, timestamppb.New(now)
		if !quiet {
			v.climbed(rec, detailOf(cause, now))
			rec.Retry.NextTime = nil
		}
	})
	if err == nil {
		v.m.endRoot(cause)
	}
	return atOnce, err
}

func (v *vmRun) settleAbandonedPass(ctx context.Context) (next, error) {
	p := v.rec.GetPass()
	sctx, span := v.span(ctx, p.GetTraceparent(), spanSettle)
	status, err := v.settlePassOnHost(sctx, p.GetOrdinal(), typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED)
	endSpan(span, err)
	if ok, n, err := v.afterSettle(ctx, status, err); !ok {
		return n, err
	}
	v.m.reconciled = false
	return v.nextRung(ctx, func(rec *schedulerv1.ProtectedVm) { rec.Pass = nil })
}

// maxBadExports is how often tasks of a pass may find their exports unusable before the pass is begun anew.
const maxBadExports = 3

// taskFailed is what a worker reported of the point or pass in hand; reports of anything else change nothing.
func (v *vmRun) taskFailed(ctx context.Context, ordinal, epoch uint64, d *typesv1.ErrorDetail) error {
	reason := reasonOf(d)
	cause := errcat.New(reason, "%s", d.GetWhat())
	if reason == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		cause.Reason = typesv1.ErrorReason_ERROR_REASON_INTERNAL
	}
	if c := v.rec.GetCycle(); c.GetPoint() == ordinal && ordinal != 0 && c.GetEpoch() == epoch && c.GetPhase() == schedulerv1.CyclePhase_CYCLE_PHASE_CUT {
		chain, err := v.chainState(ctx)
		if err == nil {
			if _, ok := chain.PointSeq(replica.Ordinal(ordinal)); ok {
				return nil // another delivery had committed it
			}
		}
		_, err = v.giveUp(ctx, cause)
		return err
	}
	p := v.rec.GetPass()
	if p.GetOrdinal() != ordinal || ordinal == 0 || p.GetEpoch() != epoch || p.GetPhase() != schedulerv1.PassPhase_PASS_PHASE_SHIPPING {
		return nil
	}
	switch Classify(reason) {
	case ClassReopen:
		_, err := v.giveUpPass(ctx, cause)
		return err
	case ClassResync:
		_, err := v.loseBaseline(ctx, cause)
		return err
	case ClassRecoverable:
		if reason != typesv1.ErrorReason_ERROR_REASON_SOURCE_EXPORT_INVALID {
			v.m.badExports = 0
		} else if v.m.badExports++; v.m.badExports >= maxBadExports { // the hypervisor that served the pass is gone
			v.m.badExports = 0
			_, err := v.giveUpPass(ctx, cause)
			return err
		}
	case ClassFatal:
		v.forgetPublished()
		_, err := v.stop(ctx, cause)
		return err
	}
	now := v.now()
	return v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
		for _, w := range rec.Pass.Windows {
			if !w.GetCommitted() {
				w.PublishTime = nil
			}
		}
		v.climbed(rec, detailOf(cause, now))
	})
}

// forgetPublished has the tasks of the pass published again when it goes on.
func (v *vmRun) forgetPublished() {
	for _, w := range v.rec.GetPass().GetWindows() {
		w.PublishTime = nil
	}
}
