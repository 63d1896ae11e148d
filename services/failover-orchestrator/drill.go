package failoverorchestrator

import (
	"context"
	"errors"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// drive makes or removes the copy of a test failover.
func (s *Service) drive(ctx context.Context, f *failoverv1.Failover) {
	if f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP {
		if err := s.attempts(ctx, f, s.runCleanup); err != nil && ctx.Err() == nil {
			s.settle(ctx, f, ending{state: typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANUP_FAILED, job: f.CleanupJob, cause: err})
		}
		return
	}
	cause := errcat.FromDetail(f.Error) // set when a process died after it had given up
	if cause == nil {
		if cause = s.attempts(ctx, f, s.runTest); cause == nil || ctx.Err() != nil {
			return
		}
		if errors.As(cause, &unproven{}) { // runTest has settled it
			return
		}
	}
	s.fail(ctx, f, cause)
}

// fail gives a test failover up: the decision is stored, then what was made is removed, then the record is settled.
// Without the first a process that died in between would go on with steps whose files are gone.
func (s *Service) fail(ctx context.Context, f *failoverv1.Failover, cause error) {
	same := func(r *failoverv1.Failover) bool { return r.State == f.State }
	if !s.decideFailure(ctx, f, cause, same) {
		return
	}
	s.letGo(ctx, f)
	end := ending{state: typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED, job: f.Job, cause: cause}
	if _, err := s.remove(ctx, f); err != nil {
		// What is left makes it a failed clean-up, which can be tried again, of a failed job.
		end.state = typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANUP_FAILED
		end.cause = errcat.Wrap(errcat.Reason(cause), cause, "the folder could not be cleaned (%v) after", err)
	} else {
		f.Boot = shown(f.Boot)
	}
	if failpoint.Hit("failover-orchestrator/after-undo") == nil {
		s.settle(ctx, f, end)
	}
}

// ending is how a test failover's work ended.
type ending struct {
	state typesv1.TestFailoverState
	job   string
	cause error
	files []string
}

// settle writes how a test failover ended: the job first, so that a record at rest never has a running job.
func (s *Service) settle(ctx context.Context, f *failoverv1.Failover, e ending) {
	ready := e.state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP
	for attempt := 0; attempt < s.config.Attempts && ctx.Err() == nil; attempt++ {
		err := s.endJob(ctx, e.job, e.cause, func(j *typesv1.Job) {
			if e.job == f.Job && (ready || f.Boot != nil) {
				j.Result = &typesv1.Job_TestFailover{TestFailover: &typesv1.TestFailoverDetail{
					Failover: f.Name, Point: f.Point, CutTime: f.CutTime, Target: targetName(f.Target), OutDir: f.OutDir, Files: e.files, Boot: f.Boot,
				}}
			}
		})
		if err == nil {
			_, _, err = s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
				if r.State != f.State || ready && r.Error != nil {
					return bus.NoChange // another instance was faster
				}
				r.State, r.Error = e.state, errcat.Detail(e.cause, s.deps.Clock())
				switch {
				case ready:
					r.Files = e.files
					if e.cause == nil {
						r.ReadyTime = timestamppb.New(s.deps.Clock())
					}
				case e.cause == nil: // cleaned up
					r.Files, r.Boot = nil, shown(r.Boot)
				case e.state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED:
					r.Boot = f.Boot
				}
				return nil
			})
		}
		if err == nil {
			s.announce(ctx, f, e.state)
			s.metrics.tests.Add(ctx, 1, metric.WithAttributes(attribute.String("outcome", e.outcome())))
			if ready && e.cause == nil {
				s.metrics.seconds.Record(ctx, s.deps.Clock().Sub(f.CreateTime.AsTime()).Seconds(), metric.WithAttributes(attribute.String("kind", "test")))
			}
			return
		}
		s.log.WarnContext(ctx, "write failover record", "failover", f.Name, "error", err)
		s.pause(ctx)
	}
}

// outcome labels the counter of ended work.
func (e ending) outcome() string {
	switch {
	case e.state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP && e.cause != nil:
		return "did_not_boot"
	case e.state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP:
		return "ready"
	case e.state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE:
		return "cleaned_up"
	}
	return strings.ToLower(strings.TrimPrefix(e.state.String(), "TEST_FAILOVER_STATE_"))
}

// runTest makes the copy, step by step; steps that the journal has are not repeated.
func (s *Service) runTest(ctx context.Context, f *failoverv1.Failover) error {
	if err := s.ensureJob(ctx, newJob(f.Job, typesv1.JobKind_JOB_KIND_TEST_FAILOVER, f.Vm, "", "", f.CreateTime, s.testSteps(f))); err != nil {
		return storeError(err)
	}
	c, err := s.open(ctx, f)
	if err != nil {
		return err
	}
	if err := s.settleHere(ctx, c.t, f, c.j); err != nil {
		return err
	}
	check := c.check(func(ctx context.Context) error {
		other, err := s.rival(ctx, f)
		if err == nil && other != nil {
			err = testActive(f.Machine.GetDisplayName(), other)
		}
		return storeError(err)
	})
	if err = s.perform(ctx, f.Job, c.j, check); err == nil {
		err = c.bringUp(ctx)
	}
	if err == nil || errors.As(err, &unproven{}) { // a drill that did not come up is evidence, until somebody has looked
		s.settle(ctx, f, ending{state: typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP, job: f.Job, cause: err, files: c.files})
	}
	return err
}

// runCleanup removes the copy.
func (s *Service) runCleanup(ctx context.Context, f *failoverv1.Failover) error {
	if err := s.ensureJob(ctx, newJob(f.CleanupJob, typesv1.JobKind_JOB_KIND_CLEAN_UP_TEST_FAILOVER, f.Vm, "", "", timestamppb.New(s.deps.Clock()), cleanupSteps)); err != nil {
		return storeError(err)
	}
	if err := s.step(ctx, f.CleanupJob, stepRemove, typesv1.JobState_JOB_STATE_IN_PROGRESS, ""); err != nil {
		return storeError(err)
	}
	if err := failpoint.Hit("failover-orchestrator/before-" + stepRemove); err != nil {
		return err
	}
	detail, err := s.removeOrLeave(ctx, f)
	state, left := typesv1.JobState_JOB_STATE_SUCCEEDED, notNeeded{}
	if errors.As(err, &left) {
		state, detail, err = typesv1.JobState_JOB_STATE_SKIPPED, left.why, nil
	}
	if err != nil {
		return err
	}
	if err := failpoint.Hit("failover-orchestrator/after-" + stepRemove); err != nil {
		return err
	}
	if err := s.step(ctx, f.CleanupJob, stepRemove, state, detail); err != nil {
		return storeError(err)
	}
	s.settle(ctx, f, ending{state: typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE, job: f.CleanupJob})
	return nil
}

func testActive(vm string, other *failoverv1.Failover) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_TEST_FAILOVER_ACTIVE, "%s has a test failover already, %s in %s", vm, lastPart(other.Name), other.OutDir).With("failover", other.Name)
}

func failoverActive(vm string, other *failoverv1.Failover) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_FAILOVER_ACTIVE, "%s has %s failover, %s, which is %s", vm, article(kindName(other)), lastPart(other.Name),
		strings.ReplaceAll(word(other.Phase.String(), "FAILOVER_PHASE_"), "-", " ")).With("failover", other.Name)
}
