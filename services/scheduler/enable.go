package scheduler

import (
	"context"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// enable takes a VM from EnablingProtection to its initial replication: checks, containers, relationship. The record
// has the machine once the checks have passed; every step can be repeated.
func (v *vmRun) enable(ctx context.Context) (next, error) {
	if v.rec.GetMachine() == nil {
		resp, err := v.check(ctx)
		if err != nil {
			return v.enableFailed(ctx, err)
		}
		return atOnce, v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.Machine, rec.Retry = resp.GetMachine(), nil
		})
	}
	sctx, cancel := context.WithTimeout(ctx, v.cfg.StorageTimeout)
	chain, err := replica.Create(sctx, v.blobs, replica.Lineage(v.rec.GetLineage()))
	cancel()
	if err != nil {
		return v.enableFailed(ctx, storageError(err, "create the storage of %s", v.rec.GetName()))
	}
	v.m.chain = chain
	if err := v.writeOnce(ctx); err != nil {
		return v.enableFailed(ctx, err)
	}
	_, err = v.track(ctx)
	if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH) && v.dropEnded(ctx) {
		_, err = v.track(ctx)
	}
	if err != nil {
		return v.enableFailed(ctx, err)
	}
	e := EvRelationshipCreated
	if start := v.policy.GetInitialReplicationStartTime(); start != nil && start.AsTime().After(v.now()) {
		e = EvStartsLater
	}
	v.m.reconciled = false
	return atOnce, v.move(ctx, e, func(rec *schedulerv1.ProtectedVm) { rec.Retry = nil })
}

// dropEnded ends what the host still tracks of a protection that was ended without it, by force. That it has ended is
// proved by the close in its chain; anything else may be another installation's.
func (v *vmRun) dropEnded(ctx context.Context) bool {
	status, err := v.tracking(ctx)
	if err != nil || status.GetLineage() == "" || status.GetLineage() == v.rec.GetLineage() {
		return false
	}
	sctx, cancel := context.WithTimeout(ctx, v.cfg.StorageTimeout)
	defer cancel()
	chain, err := replica.Open(sctx, v.blobs, replica.Lineage(status.GetLineage()))
	if err != nil {
		return false
	}
	state, err := chain.Refresh(sctx)
	if err != nil || !state.Closed() {
		return false
	}
	ended := state.Fence.Failover == disableFence(status.GetLineage())
	for _, f := range v.followed.of(v.rec.GetName(), status.GetLineage()) { // or by the failover that was committed before
		ended = ended || f.GetPhase() == phaseCommitted && isOf(f.GetName(), state.Fence.Failover)
	}
	if !ended {
		return false
	}
	hctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(hctx)
	if err == nil {
		_, err = host.RemoveReplicationRelationship(hctx, &hostproviderv1.RemoveReplicationRelationshipRequest{
			Vm: v.vmID(), Lineage: status.GetLineage(), Epoch: status.GetEpoch(),
		})
	}
	v.log.InfoContext(ctx, "host still tracked a protection that has ended", "vm", v.rec.GetName(), "lineage", status.GetLineage(), "error", err)
	return err == nil
}

// check runs the host's prerequisite checks; findings that forbid protection are one error with all of them.
func (v *vmRun) check(ctx context.Context) (*hostproviderv1.CheckPrerequisitesResponse, error) {
	ctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := host.CheckPrerequisites(ctx, &hostproviderv1.CheckPrerequisitesRequest{Vm: v.vmID()})
	if err != nil {
		return nil, err
	}
	return resp, findingsError(v.rec.GetName(), resp.GetFindings())
}

// findingsError is nil when no finding forbids protection. Otherwise one error lists all that do: each is a field of it
// with its check, its reason and what to do.
func findingsError(vm string, findings []*hostproviderv1.Finding) error {
	var bad []*hostproviderv1.Finding
	for _, f := range findings {
		if f.GetSeverity() == hostproviderv1.Severity_SEVERITY_ERROR {
			bad = append(bad, f)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	reasons := make([]string, len(bad))
	texts := make([]string, len(bad))
	for i, f := range bad {
		reasons[i], texts[i] = errcat.Code(f.GetReason()), f.GetWhat()
	}
	e := errcat.New(typesv1.ErrorReason_ERROR_REASON_PREREQUISITES_NOT_MET, "%s fails %d of its checks: %s", vm, len(bad), strings.Join(texts, "; ")).
		With("vm", vm).With("findings", strconv.Itoa(len(bad))).With("reasons", strings.Join(reasons, ","))
	for _, f := range bad {
		message := f.GetWhat()
		if f.GetAction() != "" {
			message += ". " + f.GetAction()
		}
		e.Fields = append(e.Fields, errcat.Field{Path: f.GetCheck(), Rule: errcat.Code(f.GetReason()), Message: message})
	}
	return e
}

// enableFailed climbs the ladder for what may pass by itself, and ends in EnablingFailed for the rest, with nothing left
// on the host.
func (v *vmRun) enableFailed(ctx context.Context, cause error) (next, error) {
	reason := errcat.Reason(errcat.FromError(cause))
	if Classify(reason) == ClassRecoverable && reason != typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND && int(v.rec.GetRetry().GetAttempt()) < len(rungs) {
		return v.climb(ctx, cause) // the whole ladder once; nobody waits for ever for a protection that does not begin
	}
	if host, err := v.hostClient(ctx); err == nil {
		rctx, cancel := v.call(ctx)
		_, err = host.RemoveReplicationRelationship(rctx, &hostproviderv1.RemoveReplicationRelationshipRequest{
			Vm: v.vmID(), Lineage: v.rec.GetLineage(), Epoch: v.rec.GetEpoch(),
		})
		cancel()
		if err != nil { // there may be nothing to remove; ending protection tries again
			v.log.InfoContext(ctx, "nothing removed from the host after a failed enable", "vm", v.rec.GetName(), "error", err)
		}
	}
	return atOnce, v.move(ctx, EvEnablingFailed, func(rec *schedulerv1.ProtectedVm) {
		now := v.now()
		rec.Retry = climb(rec.GetRetry(), detailOf(cause, now), now, v.cfg.RetryUnit)
		rec.Retry.NextTime = nil
	})
}

// awaitStart waits for the start time of initial replication.
func (v *vmRun) awaitStart(ctx context.Context) (next, error) {
	if start := v.policy.GetInitialReplicationStartTime(); start != nil {
		if wait := start.AsTime().Sub(v.now()); wait > 0 {
			return later(wait), nil
		}
	}
	return atOnce, v.move(ctx, EvStart, nil)
}

// replicate runs what a VM that replicates needs next: the pass or cycle in hand, else a pass if the host asks for one
// or has no base yet, else a cycle when it is due.
func (v *vmRun) replicate(ctx context.Context) (next, error) {
	if !v.m.reconciled || v.m.adoptedEpoch != v.rec.GetEpoch() {
		if n, done, err := v.adopt(ctx); !done {
			return n, err
		}
	}
	switch {
	case v.rec.GetPass() != nil:
		return v.pass(ctx)
	case v.rec.GetCycle() != nil:
		return v.cycle(ctx)
	}
	status := v.m.status
	switch v.rec.GetState() {
	case InitialReplicating:
		if status.GetBase() == 0 || status.GetResyncReason() == typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST {
			return v.beginPass(ctx, typesv1.PassScope_PASS_SCOPE_FULL)
		}
	case Resynchronizing:
		if v.rec.GetResyncReason() != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED { // not compared yet
			chain, err := v.chainState(ctx)
			if err != nil {
				return v.failed(ctx, err)
			}
			if chain.Base == 0 { // there is nothing to compare with
				return v.beginPass(ctx, typesv1.PassScope_PASS_SCOPE_FULL)
			}
			return v.beginPass(ctx, typesv1.PassScope_PASS_SCOPE_COMPARE)
		}
		if r := status.GetResyncReason(); r != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
			return v.baselineLost(ctx, r, status.GetResyncDetail())
		}
	case Protected:
		if due := v.rec.GetNextCycleTime(); due != nil {
			if wait := waitFor(due.AsTime(), v.now(), v.policy.GetCopyInterval().AsDuration()); wait > 0 {
				return later(wait), nil
			}
		}
	}
	if status.GetPassRequired() {
		return v.beginPass(ctx, typesv1.PassScope_PASS_SCOPE_DIRTY)
	}
	return v.beginCycle(ctx)
}

// startResync begins a resynchronisation that nobody asked for by hand.
func (v *vmRun) startResync(ctx context.Context) (next, error) {
	job := newJob(typesv1.JobKind_JOB_KIND_RESYNCHRONIZE, v.rec.GetName(), "", serviceName, v.now())
	if err := v.jobs.create(ctx, job); err != nil {
		return next{}, err
	}
	v.m.reconciled = false
	return atOnce, v.move(ctx, EvResync, func(rec *schedulerv1.ProtectedVm) { enterResync(rec, job.GetName()) })
}

// enterResync is what the move to Resynchronizing does to the record.
func enterResync(rec *schedulerv1.ProtectedVm, job string) {
	if rec.GetResyncReason() == typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
		rec.ResyncReason = typesv1.ResyncReason_RESYNC_REASON_MANUAL
	}
	rec.Epoch++ // what was issued before must not be taken for part of it
	rec.Cycle, rec.Pass, rec.Retry = nil, nil, nil
	rec.Resynchronizing, rec.CurrentJob = true, job
}

// tellMissed publishes missed cycles that were counted: they fell due while another was in hand, or while the ladder waited.
func (v *vmRun) tellMissed(ctx context.Context, n int64) {
	if n <= 0 {
		return
	}
	v.m.cycles.add(v.now(), n, n)
	v.views.missed(ctx, n)
	v.jobs.announce(ctx, v.rec.GetName(), "replication-cycle.missed", bus.EventID(v.rec.GetLineage(), "missed", revText(v.rev)),
		&eventsv1.ReplicationCycleMissed{Vm: v.rec.GetName(), Missed: n, Interval: v.policy.GetCopyInterval()})
}

func stamp(v *vmRun) *timestamppb.Timestamp { return timestamppb.New(v.now()) }
