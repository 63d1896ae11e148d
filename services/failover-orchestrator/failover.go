package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Short names of the phases.
const (
	starting      = failoverv1.FailoverPhase_FAILOVER_PHASE_STARTING
	waitingCommit = failoverv1.FailoverPhase_FAILOVER_PHASE_WAITING_COMMIT
	committing    = failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTING
	committed     = failoverv1.FailoverPhase_FAILOVER_PHASE_COMMITTED
	cancelling    = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLING
	cancelled     = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCELLED
	failed        = failoverv1.FailoverPhase_FAILOVER_PHASE_FAILED
	cancelFailed  = failoverv1.FailoverPhase_FAILOVER_PHASE_CANCEL_FAILED
)

func planned(f *failoverv1.Failover) bool {
	return f.Kind == failoverv1.FailoverKind_FAILOVER_KIND_PLANNED
}

// jobOf is the job that works on a failover in its phase.
func jobOf(f *failoverv1.Failover) string {
	switch f.Phase {
	case committing, committed:
		return f.CommitJob
	case cancelling, cancelled, cancelFailed:
		return f.CancelJob
	}
	return f.Job
}

// errAsked ends the work of a failover that somebody asked to cancel.
var errAsked = errors.New("somebody asked to cancel the failover")

// start brings a machine up for real.
func (s *Service) start(ctx context.Context, f *failoverv1.Failover) {
	if cause := errcat.FromDetail(f.Error); cause != nil { // a process died after it had given up
		s.giveUp(ctx, f, cause)
		return
	}
	if f.CancelJob != "" {
		s.turnBack(ctx, f)
		return
	}
	work, stop := s.untilAsked(ctx, f)
	defer stop()
	var files []string
	err := s.attempts(work, f, func(ctx context.Context, f *failoverv1.Failover) (err error) {
		files, err = s.bringUp(ctx, f)
		return err
	})
	stopped := errors.Is(context.Cause(work), errAsked)
	stop()
	switch {
	case ctx.Err() != nil: // the lease is over: the next holder goes on
	case err == nil:
		s.rest(ctx, f, resting{phase: waitingCommit, job: f.Job, files: files, change: func(r *failoverv1.Failover) {
			r.Files, r.ReadyTime = files, timestamppb.New(s.deps.Clock())
		}})
	case stopped:
		s.turnBack(ctx, f)
	case errors.As(err, &unproven{}): // the copy stays, and a person decides
		s.rest(ctx, f, resting{phase: waitingCommit, job: f.Job, cause: err, files: files, change: func(r *failoverv1.Failover) { r.Files = files }})
	default:
		s.giveUp(ctx, f, err)
	}
}

// untilAsked is a context for the steps of a failover, which may be given up at any instruction: it ends when somebody
// asks to cancel. Call stop; it may be called twice.
func (s *Service) untilAsked(ctx context.Context, f *failoverv1.Failover) (work context.Context, stop func()) {
	work, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for work.Err() == nil {
			for u, err := range s.failovers.Watch(work, failoverKey(f.Name)) {
				if err != nil {
					break
				}
				if u.Value.GetPhase() == starting && u.Value.GetCancelJob() != "" {
					cancel(errAsked)
				}
			}
			s.pause(work)
		}
	}()
	return work, func() {
		cancel(context.Canceled)
		<-done
	}
}

// bringUp carries a failover out, step by step, and answers the files that the copy consists of. What the journal has is
// not repeated. Nothing is written to the target's disks before the lineage is closed. The replica is set back beside the
// copying, which does not need it. An unproven error comes with the files: all is done, but the machine has not shown
// that it is up.
func (s *Service) bringUp(ctx context.Context, f *failoverv1.Failover) ([]string, error) {
	kind := typesv1.JobKind_JOB_KIND_UNPLANNED_FAILOVER
	if planned(f) {
		kind = typesv1.JobKind_JOB_KIND_PLANNED_FAILOVER
	}
	if err := s.ensureJob(ctx, newJob(f.Job, kind, f.Vm, "", "", timestamppb.New(s.deps.Clock()), s.startSteps(f))); err != nil {
		return nil, storeError(err)
	}
	c, err := s.open(ctx, f)
	if err != nil {
		return nil, err
	}
	if err := s.settleHere(ctx, c.t, f, c.j); err != nil {
		return nil, err
	}
	check := c.check(func(ctx context.Context) error {
		other, err := s.rivalFailover(ctx, f)
		if err == nil && other != nil {
			err = failoverActive(f.Machine.GetDisplayName(), other)
		}
		return storeError(err)
	})
	fence := &fencing{copying: c}
	first := []step{check}
	if planned(f) {
		first = append(first, fence.stopSource())
	}
	if err := s.perform(ctx, f.Job, c.j, append(first, fence.close(), fence.choose())...); err != nil {
		return nil, err
	}
	if f.Point == 0 { // chosen by an instance that worked on it since the record was read
		if err := s.reread(ctx, f); err != nil {
			return nil, err
		}
	}
	group, both := errgroup.WithContext(ctx)
	var late error
	group.Go(func() error {
		err := c.bringUp(both)
		if errors.As(err, &unproven{}) { // the copy stays: the replica is set back all the same
			late, err = err, nil
		}
		return err
	})
	group.Go(func() error { return s.perform(both, f.Job, c.j, fence.rewind(), fence.drain()) })
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return c.files, late
}

// resting is how a piece of work on a failover ended.
type resting struct {
	phase  failoverv1.FailoverPhase
	job    string
	cause  error
	files  []string
	change func(*failoverv1.Failover)
}

// succeeds says whether what was made stands, whatever became of the job.
func (e resting) succeeds() bool { return e.cause == nil || e.phase == waitingCommit }

// rest writes how work on a failover ended: the job first, so that a record at rest never has a running job. A failover
// that somebody asked to cancel meanwhile goes on being cancelled.
func (s *Service) rest(ctx context.Context, f *failoverv1.Failover, e resting) {
	for attempt := 0; attempt < s.config.Attempts && ctx.Err() == nil; attempt++ {
		moved, err := s.restOnce(ctx, f, e)
		if err == nil {
			if moved != nil {
				s.moved(ctx, moved)
				s.metrics.failovers.Add(ctx, 1, metric.WithAttributes(attribute.String("kind", kindName(f)), attribute.String("phase", word(moved.Phase.String(), "FAILOVER_PHASE_"))))
				if e.phase == waitingCommit && e.cause == nil {
					s.metrics.seconds.Record(ctx, s.deps.Clock().Sub(f.CreateTime.AsTime()).Seconds(), metric.WithAttributes(attribute.String("kind", kindName(f))))
				}
			}
			return
		}
		s.log.WarnContext(ctx, "write failover record", "failover", f.Name, "error", err)
		s.pause(ctx)
	}
}

// restOnce returns the record as it moved; nil when another instance was faster.
func (s *Service) restOnce(ctx context.Context, f *failoverv1.Failover, e resting) (moved *failoverv1.Failover, err error) {
	if r, _, err := s.failovers.Get(ctx, failoverKey(f.Name)); err != nil || elsewhere(r, f, e.succeeds()) {
		return nil, err
	}
	err = s.endJob(ctx, e.job, e.cause, func(j *typesv1.Job) {
		if e.job == f.Job && (e.phase == waitingCommit || f.Boot != nil) {
			j.Result = &typesv1.Job_Failover{Failover: &typesv1.FailoverDetail{
				Failover: f.Name, Point: f.Point, CutTime: f.CutTime, Target: targetName(f.Target), OutDir: f.OutDir, Files: e.files, Boot: f.Boot,
			}}
		}
	})
	if err != nil {
		return nil, err
	}
	if err := failpoint.Hit("failover-orchestrator/before-rest"); err != nil {
		return nil, err
	}
	r, _, err := s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
		moved = nil
		if elsewhere(r, f, e.succeeds()) {
			return bus.NoChange
		}
		moved = r
		r.Error = errcat.Detail(e.cause, s.deps.Clock())
		if e.change != nil {
			e.change(r)
		}
		if r.Phase == starting && r.CancelJob != "" {
			r.Phase, r.Error = cancelling, nil
			return nil
		}
		r.Phase = e.phase
		return nil
	})
	if err != nil || moved == nil {
		return nil, err
	}
	return r, nil
}

// elsewhere says whether another instance has moved the record of a failover since f was read: then this one has no say any
// more. One that was given up cannot succeed: what it made is being removed.
func elsewhere(r, f *failoverv1.Failover, succeeds bool) bool {
	return r.State != f.State || r.Phase != f.Phase || jobOf(r) != jobOf(f) || r.Job != f.Job || succeeds && r.Error != nil && f.Error == nil
}

// reread brings f up to date with its record.
func (s *Service) reread(ctx context.Context, f *failoverv1.Failover) error {
	r, err := s.current(ctx, f)
	if err != nil {
		return err
	}
	proto.Reset(f)
	proto.Merge(f, r)
	return nil
}

// current reads the record of a failover that this instance works on still.
func (s *Service) current(ctx context.Context, f *failoverv1.Failover) (*failoverv1.Failover, error) {
	r, _, err := s.failovers.Get(ctx, failoverKey(f.Name))
	if err != nil {
		return nil, storeError(err)
	}
	if elsewhere(r, f, true) {
		return nil, takenOver(f)
	}
	return r, nil
}

func takenOver(f *failoverv1.Failover) error {
	return final{fmt.Errorf("failover %s was taken over by another instance", lastPart(f.Name))}
}

// turnBack goes from bringing up to cancelling: somebody asked, and every instruction of the steps is a safe point.
func (s *Service) turnBack(ctx context.Context, f *failoverv1.Failover) {
	s.rest(ctx, f, resting{phase: cancelling, job: f.Job, cause: errCancelled, change: func(r *failoverv1.Failover) { r.Error = nil }})
}

// giveUp ends a failover whose steps failed: the decision is stored, then what was made on the target is removed, then
// the record says that it failed. The lineage stays closed if it was: the source must not go on by itself.
func (s *Service) giveUp(ctx context.Context, f *failoverv1.Failover, cause error) {
	same := func(r *failoverv1.Failover) bool { return r.Phase == f.Phase && r.Job == f.Job }
	if !s.decideFailure(ctx, f, cause, same) {
		return
	}
	s.letGo(ctx, f)
	end := resting{phase: failed, job: f.Job, cause: cause}
	if _, err := s.remove(ctx, f); err != nil {
		// What is left is named, so that the next attempt elsewhere does not forget it.
		end.cause = errcat.Wrap(errcat.Reason(cause), cause, "the folder could not be cleaned (%v) after", err)
		end.change = func(r *failoverv1.Failover) { r.Files = []string{"."} }
	} else {
		f.Boot = shown(f.Boot)
		end.change = func(r *failoverv1.Failover) { r.Files, r.Boot = nil, f.Boot }
	}
	if failpoint.Hit("failover-orchestrator/after-undo") == nil {
		s.rest(ctx, f, end)
	}
}

// over says whether a failover holds nothing any more.
func over(f *failoverv1.Failover) bool { return f.Phase == cancelled || f.Phase == committed }

// failoversOf lists the planned and unplanned failovers of a VM, newest first.
func (s *Service) failoversOf(ctx context.Context, vm string) ([]*failoverv1.Failover, error) {
	entries, err := s.failovers.List(ctx, "")
	if err != nil {
		return nil, storeError(err)
	}
	var out []*failoverv1.Failover
	for _, e := range entries {
		if e.Value.Vm != vm || isTest(e.Value) {
			continue
		}
		f := e.Value
		if !over(f) { // a list takes a while: what stands in the way must do so now
			if f, _, err = s.failovers.Get(ctx, e.Key); errors.Is(err, bus.ErrNotFound) {
				continue
			} else if err != nil {
				return nil, storeError(err)
			}
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b *failoverv1.Failover) int { return -age(a, b) })
	return out, nil
}

// rivalFailover is another failover of the same VM that goes before f: one that is not over, or of two that begin at
// once the one asked for first, also when the other one has given way to it meanwhile. A failed one that f replaces is ended
// by this.
func (s *Service) rivalFailover(ctx context.Context, f *failoverv1.Failover) (*failoverv1.Failover, error) {
	all, err := s.failoversOf(ctx, f.Vm)
	if err != nil {
		return nil, err
	}
	for _, o := range all {
		if o.Name == f.Name || over(o) || (o.Phase == starting || o.Phase == failed) && age(o, f) >= 0 {
			continue
		}
		if ended, err := s.replaced(ctx, o); err != nil {
			return nil, err
		} else if !ended {
			return o, nil
		}
	}
	return nil, nil
}

// replaced ends a failed failover of which it was decided that it never closes the lineage, because another one takes its
// place; false when it is not one.
func (s *Service) replaced(ctx context.Context, o *failoverv1.Failover) (bool, error) {
	if o.Phase != failed {
		return false, nil
	}
	lineage, err := lineageOf(o)
	if err != nil {
		return false, err
	}
	stands := ""
	if _, err := s.fateJournal(lineage, o).done(ctx, fate, &stands); err != nil || stands != fateCancel {
		return false, storeError(err)
	}
	r, _, err := s.failovers.Mutate(ctx, failoverKey(o.Name), func(r *failoverv1.Failover) error {
		if r.Phase != failed {
			return bus.NoChange
		}
		r.Phase = cancelled
		return nil
	})
	return r.GetPhase() == cancelled, storeError(err)
}

func lineageOf(f *failoverv1.Failover) (replica.Lineage, error) {
	lineage, err := replica.ParseLineage(f.Lineage)
	if err != nil {
		return "", errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INTERNAL, err, "failover %s", lastPart(f.Name))
	}
	return lineage, nil
}
