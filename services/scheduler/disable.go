package scheduler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// disable ends protection: the host stops tracking, the lineage is closed, the record goes. Storage stays: whoever wants
// the space back deletes it. Each step can be repeated; the job is told before the record goes.
func (v *vmRun) disable(ctx context.Context) (next, error) {
	unfenced := v.fenceOnce(ctx)
	stopped := "tracking has stopped" + unfenced
	if err := v.removeOnHost(ctx); err != nil {
		switch reason := errcat.Reason(errcat.FromError(err)); {
		case reason == typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, reason == typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED,
			reason == typesv1.ErrorReason_ERROR_REASON_LINEAGE_MISMATCH:
			stopped = "the host does not track the VM for this protection any more"
		case ctx.Err() != nil:
			return next{}, err
		case v.rec.GetForceDisable():
			stopped = fmt.Sprintf("forced: the host was not told (%s); it cleans up when the VM is protected again", err)
		case Classify(reason) == ClassFatal:
			return v.disableFailed(ctx, err)
		default:
			if werr := v.writeDisableJob(ctx, 0, jobRunning, "waiting for the host: "+err.Error(), ""); werr != nil {
				return next{}, werr
			}
			return v.climb(ctx, err)
		}
	}
	closed, err := v.closeLineage(ctx)
	if err != nil {
		if Classify(errcat.Reason(err)) == ClassFatal && !v.rec.GetForceDisable() {
			return v.disableFailed(ctx, err)
		}
		if !v.rec.GetForceDisable() {
			return v.climb(ctx, err)
		}
		closed = fmt.Sprintf("forced: the lineage was not closed (%s)", err)
	}
	if err := v.writeDisableJob(ctx, 2, jobSucceeded, stopped, closed); err != nil {
		return next{}, err
	}
	if _, _, err := Next(v.rec.GetState(), EvDisabled); err != nil {
		return next{}, err
	}
	from, job := v.rec.GetState(), v.rec.GetCurrentJob()
	if err := v.store.vms.Delete(ctx, v.key, v.rev); err != nil {
		return next{}, err
	}
	v.rec.State = Unprotected
	v.log.InfoContext(ctx, "protection ended", "vm", v.rec.GetName(), "lineage", v.rec.GetLineage())
	v.jobs.announceState(ctx, v.rec, v.rev+1, from, EvDisabled, job)
	return atOnce, nil // the next look finds no record
}

func (v *vmRun) removeOnHost(ctx context.Context) error {
	ctx, cancel := v.call(ctx)
	defer cancel()
	host, err := v.hostClient(ctx)
	if err != nil {
		return err
	}
	_, err = host.RemoveReplicationRelationship(ctx, &hostproviderv1.RemoveReplicationRelationshipRequest{
		Vm: v.vmID(), Lineage: v.rec.GetLineage(), Epoch: v.rec.GetEpoch(),
	})
	return err
}

// closeLineage puts the fence: nothing of this protection commits after it.
func (v *vmRun) closeLineage(ctx context.Context) (string, error) {
	if _, err := v.chainState(ctx); err != nil {
		if errors.Is(err, replica.ErrNoLineage) {
			return "there is no storage to close", nil
		}
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, v.cfg.StorageTimeout)
	defer cancel()
	result, err := v.m.chain.Commit(ctx, replica.Proposal{
		Kind: replica.KindClose, Failover: disableFence(v.rec.GetLineage()), Reason: "protection ended",
	})
	if errors.Is(err, replica.ErrClosed) {
		return "the lineage is closed already; its storage is kept", nil
	}
	if err != nil {
		return "", storageError(err, "close the lineage of %s", v.rec.GetName())
	}
	return fmt.Sprintf("lineage %s closed by manifest %d; its storage is kept until it is deleted by hand", v.rec.GetLineage(), result.Seq), nil
}

// disableFence names the close that ends a protection.
func disableFence(lineage string) string { return "disable-" + lineage }

func (v *vmRun) disableFailed(ctx context.Context, cause error) (next, error) {
	now := v.now()
	d := detailOf(cause, now)
	_, _, err := v.jobs.kv.Mutate(ctx, bus.Key(lastPart(v.rec.GetCurrentJob())), func(j *typesv1.Job) error {
		jobWriter{job: j, now: timestamppb.New(now)}.at(0, jobFailed, "", d)
		return nil
	})
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return next{}, err
	}
	return atOnce, v.move(ctx, EvDisableFailed, func(rec *schedulerv1.ProtectedVm) {
		rec.Retry = climb(rec.GetRetry(), d, now, v.cfg.RetryUnit)
		rec.Retry.NextTime, rec.CurrentJob = nil, ""
	})
}

// writeDisableJob shows how far the disable is. at 2 is its end.
func (v *vmRun) writeDisableJob(ctx context.Context, at int, state typesv1.JobState, stopped, closed string) error {
	if v.rec.GetCurrentJob() == "" {
		return nil
	}
	job, rev, err := v.jobs.kv.Mutate(ctx, bus.Key(lastPart(v.rec.GetCurrentJob())), func(j *typesv1.Job) error {
		w := jobWriter{job: j, now: timestamppb.New(v.now().Truncate(time.Millisecond))}
		if at >= 2 {
			w.done()
		} else {
			w.at(at, state, "", nil)
		}
		for i, text := range []string{stopped, closed} { // results, which stay
			if i < len(j.GetSteps()) && text != "" {
				j.Steps[i].Detail = text
			}
		}
		return nil
	})
	if errors.Is(err, bus.ErrNotFound) {
		return nil
	}
	if err == nil {
		job.Revision = rev
		v.jobs.announceJob(ctx, job)
	}
	return err
}
