package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// retainer gives points up. All rules about what may go are package replica's; this is only the loop around its steps.
type retainer struct {
	config   Config
	replicas *replicas
	metrics  *metrics
	logger   *slog.Logger
}

// retired is what the steps of one task did together.
type retired struct {
	points, manifests int
	objects           int64
	bytes             int64
	hiddenBytes       int64
	oldest            replica.Ordinal
	floor             replica.Seq
	ranges            int
	more              bool
}

// nothing reports whether nothing was given up and nothing deleted.
func (d *retired) nothing() bool { return d.points == 0 && d.manifests == 0 && d.objects == 0 }

// retain runs steps until nothing is left to do or their bound is reached. What it leaves, the next task finds: an error
// comes with what was done before it.
func (r *retainer) retain(ctx context.Context, t *uploaderv1.RetainTask) (done retired, err error) {
	chain, err := r.replicas.get(ctx, t.GetLineage())
	if err != nil {
		return done, err
	}
	done.more = true
	for step := 0; done.more && step < r.config.Retain.Steps; step++ {
		if err := failpoint.Hit(fpBeforeRetain); err != nil {
			return done, err
		}
		result, err := r.step(ctx, chain, t)
		done.add(&result)
		r.metrics.retained(ctx, &result)
		if err != nil {
			return done, fmt.Errorf("retire points: %w", err)
		}
		if err := failpoint.Hit(fpAfterRetain); err != nil {
			return done, err
		}
	}
	if done.nothing() {
		return done, nil
	}
	ctx, cancel := context.WithTimeout(ctx, r.config.StorageTimeout)
	defer cancel()
	points, err := chain.Points(ctx)
	if err != nil {
		return done, fmt.Errorf("list the points that are kept: %w", err)
	}
	if len(points) > 0 {
		done.oldest = points[0].Ordinal
	}
	return done, nil
}

func (r *retainer) step(ctx context.Context, chain *replica.Replica, t *uploaderv1.RetainTask) (replica.RetainResult, error) {
	ctx, cancel := context.WithTimeout(ctx, r.config.Retain.StepTimeout)
	defer cancel()
	c := r.config.Retain
	result, err := chain.Retain(ctx, replica.RetainOptions{
		Keep: replica.Keep{
			All: t.GetKeepAll().AsDuration(), Hourly: t.GetKeepHourly().AsDuration(), Limit: t.GetRetention().AsDuration(),
		},
		Ended: t.GetEnded(), OrphanAge: c.OrphanAge, MaxDeletes: c.StepDeletes, Parallel: c.Parallel,
	})
	for _, p := range result.Dropped {
		r.logger.InfoContext(ctx, "pin ended", "vm", t.GetVm(), "owner", p.Owner, "sequence", uint64(p.Seq), "until", p.Until)
	}
	return result, err
}

func (d *retired) add(r *replica.RetainResult) {
	d.points += r.RetiredPoints
	d.manifests += r.RetiredManifests
	for _, n := range r.Deleted {
		d.objects += int64(n)
	}
	d.bytes += r.DeletedBytes
	d.hiddenBytes, d.floor, d.ranges, d.more = r.HiddenBytes, r.Floor, r.Ranges, r.More // as they are after the last step
}

// staleRetain is how long a task may wait. It says what the policy was when it was published, and that no suspicion was open and
// no failover under way; what it deletes does not come back, and the scheduler asks again every few minutes.
const staleRetain = 30 * time.Minute

// handleRetain is the consumer of queue retain. Nothing of it is urgent and all of it can be repeated: a failure is reported
// and the scheduler's next task tries again.
func (s *Service) handleRetain(ctx context.Context, task *bus.Task) error {
	var t uploaderv1.RetainTask
	if err := decode(task, &t); err != nil {
		return err
	}
	if waited := s.clock().Sub(task.Published); waited > staleRetain {
		s.logger.WarnContext(ctx, "task to retire points came too late, the next one has what is decided now", "vm", t.GetVm(), "waited", waited)
		return nil
	}
	end, ok := s.begin(work{role: RoleRetain, lineage: t.GetLineage()}, "retain "+t.GetVm())
	if !ok {
		s.logger.InfoContext(ctx, "points of the VM are being retired here already", "vm", t.GetVm())
		return nil
	}
	started, outcome := s.clock(), outcomeLost
	defer func() {
		end()
		s.metrics.task(ctx, RoleRetain, outcome, s.clock().Sub(started))
	}()
	done, err := s.retainer.retain(ctx, &t)
	if ctx.Err() != nil || errors.Is(err, failpoint.ErrInjected) {
		return err
	}
	if !done.nothing() { // also when a later step failed: what is gone is gone
		s.logger.InfoContext(ctx, "points retired", "vm", t.GetVm(), "points", done.points, "manifests", done.manifests, "objects", done.objects,
			"bytes", done.bytes, "hidden_bytes", done.hiddenBytes, "oldest", uint64(done.oldest), "more", done.more)
		if perr := s.publishRetired(ctx, task, &t, &done); perr != nil {
			return perr
		}
	}
	if err != nil {
		outcome = outcomeFailed
		return s.reportFailure(ctx, task, RoleRetain, t.GetVm(), t.GetLineage(), 0, 0, err)
	}
	outcome = outcomeDone
	return failpoint.Hit(fpBeforeAck)
}

// publishRetired says what went. The id has the task in it, since every task that retires something is a fact of its own; one
// that was lost after it is not told, which storage heals: the next one tells the oldest point.
func (s *Service) publishRetired(ctx context.Context, task *bus.Task, t *uploaderv1.RetainTask, done *retired) error {
	e, err := event(t.GetVm(), "recovery-points.retired", &eventsv1.RecoveryPointsRetired{
		Vm: t.GetVm(), Lineage: t.GetLineage(), Points: int64(done.points), OldestPoint: uint64(done.oldest),
		DeletedObjects: done.objects, DeletedBytes: done.bytes, HiddenBytes: done.hiddenBytes,
	}, t.GetLineage(), task.ID, task.Published.UTC().Format(time.RFC3339Nano))
	if err != nil {
		return bus.Permanent(err)
	}
	return s.publish(ctx, e)
}
