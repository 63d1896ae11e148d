package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// owner is the service name in the jobs that this service writes.
const owner = "failover-orchestrator"

// Steps of jobs.
const (
	stepCheck       = "check-target"
	stepStopSource  = "stop-source"
	stepClose       = "close-lineage"
	stepChoose      = "choose-point"
	stepClaim       = "claim-target"
	stepMaterialise = "materialise-disks"
	stepDescribe    = "describe-machine"
	stepBoot        = "boot-machine"
	stepRewind      = "rewind-replica"
	stepDrain       = "drain-journal"
	stepRemove      = "remove-copy"
	stepShutdown    = "stop-machine"
	stepOpen        = "open-lineage"
	stepCommit      = "confirm-close"
)

// titles are what people read.
var titles = map[string]string{
	stepCheck:       "Check the target folder",
	stepStopSource:  "Stop the source and send its last changes",
	stepClose:       "Close the lineage: nothing of the source counts any more",
	stepChoose:      "Choose the recovery point",
	stepClaim:       "Claim the target folder",
	stepMaterialise: "Write the disks of the recovery point",
	stepDescribe:    "Describe the machine",
	stepBoot:        "Boot the machine",
	stepRewind:      "Set the replica back to the recovery point",
	stepDrain:       "Ask for the journal to be applied",
	stepRemove:      "Remove what the failover made",
	stepShutdown:    "Stop the recovered machine",
	stepOpen:        "Open the lineage again",
	stepCommit:      "Confirm that the lineage stays closed",
}

func stepList(ids ...string) (out []*typesv1.JobStep) {
	for _, id := range ids {
		out = append(out, &typesv1.JobStep{Id: id, Title: titles[id]})
	}
	return out
}

var (
	cleanupSteps = []*typesv1.JobStep{{Id: stepRemove, Title: "Remove what the test failover made"}}
	commitSteps  = stepList(stepCommit)
)

// testSteps are those of the job that makes a test failover, in order.
func (s *Service) testSteps(f *failoverv1.Failover) []*typesv1.JobStep {
	return stepList(append([]string{stepCheck}, s.copySteps(f)...)...)
}

func (s *Service) copySteps(f *failoverv1.Failover) []string {
	ids := []string{stepClaim, stepMaterialise, stepDescribe}
	if s.boots(f) {
		ids = append(ids, stepBoot)
	}
	return ids
}

func (s *Service) boots(f *failoverv1.Failover) bool {
	t, err := s.target(f.Target)
	return err == nil && t.Boots()
}

// startSteps are those of the job that carries out a planned or unplanned failover. The last two run beside the ones
// that bring the copy up.
func (s *Service) startSteps(f *failoverv1.Failover) []*typesv1.JobStep {
	ids := []string{stepCheck}
	if f.Kind == failoverv1.FailoverKind_FAILOVER_KIND_PLANNED {
		ids = append(ids, stepStopSource)
	}
	ids = append(ids, stepClose, stepChoose)
	ids = append(ids, s.copySteps(f)...)
	return stepList(append(ids, stepRewind, stepDrain)...)
}

// cancelSteps are those of the job that cancels a failover.
func (s *Service) cancelSteps(f *failoverv1.Failover) []*typesv1.JobStep {
	if s.boots(f) {
		return stepList(stepShutdown, stepRemove, stepOpen)
	}
	return stepList(stepRemove, stepOpen)
}

func newJob(name string, kind typesv1.JobKind, target, by, request string, now *timestamppb.Timestamp, steps []*typesv1.JobStep) *typesv1.Job {
	j := &typesv1.Job{Name: name, Kind: kind, Target: target, State: typesv1.JobState_JOB_STATE_NOT_STARTED, CreateTime: now, RequestedBy: by, Owner: owner, RequestId: request}
	for _, s := range steps {
		j.Steps = append(j.Steps, &typesv1.JobStep{Id: s.Id, Title: s.Title, State: typesv1.JobState_JOB_STATE_NOT_STARTED})
	}
	return j
}

// ensureJob makes the job's record exist: the failover's record is written first, so a kill may have left it out. Whoever
// is first makes it; who asked is only known to the handler, which fills that in.
func (s *Service) ensureJob(ctx context.Context, j *typesv1.Job) error {
	_, err := s.jobs.Create(ctx, jobKey(j.Name), j)
	if err == nil {
		return nil
	}
	if !errors.Is(err, bus.ErrExists) {
		return fmt.Errorf("create job: %w", err)
	}
	if j.RequestedBy == "" && j.RequestId == "" {
		return nil
	}
	_, _, err = s.jobs.Mutate(ctx, jobKey(j.Name), func(have *typesv1.Job) error {
		if have.RequestedBy != "" || have.RequestId != "" {
			return bus.NoChange
		}
		have.RequestedBy, have.RequestId = j.RequestedBy, j.RequestId
		return nil
	})
	if err != nil {
		return fmt.Errorf("write job: %w", err)
	}
	return nil
}

func jobKey(name string) string { return bus.Key(lastPart(name)) }

// job changes a job's record; an ended job is left as it is.
func (s *Service) job(ctx context.Context, name string, change func(j *typesv1.Job)) (*typesv1.Job, error) {
	j, rev, err := s.jobs.Mutate(ctx, jobKey(name), func(j *typesv1.Job) error {
		if j.EndTime != nil {
			return bus.NoChange
		}
		change(j)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("write job: %w", err)
	}
	j.Revision = rev
	return j, nil
}

// step moves one step of a job; a step that is done is left as it is.
func (s *Service) step(ctx context.Context, job, id string, state typesv1.JobState, detail string) error {
	now := timestamppb.New(s.deps.Clock())
	begun := false
	j, err := s.job(ctx, job, func(j *typesv1.Job) {
		begun = j.State != typesv1.JobState_JOB_STATE_IN_PROGRESS
		if j.StartTime == nil {
			j.StartTime = now
		}
		j.State = typesv1.JobState_JOB_STATE_IN_PROGRESS
		for _, st := range j.Steps {
			if st.Id != id || st.State == typesv1.JobState_JOB_STATE_SUCCEEDED || st.State == typesv1.JobState_JOB_STATE_SKIPPED {
				continue
			}
			st.State, st.Detail = state, detail
			if st.StartTime == nil {
				st.StartTime = now
			}
			if state != typesv1.JobState_JOB_STATE_IN_PROGRESS {
				st.EndTime = now
			}
		}
	})
	if err == nil && begun {
		s.changed(ctx, j)
	}
	return err
}

// changed tells that a job has another state.
func (s *Service) changed(ctx context.Context, j *typesv1.Job) {
	s.publish(ctx, "job.changed", j.Target, bus.EventID("job", j.Name, j.State.String()), &eventsv1.JobChanged{Job: j})
}

// errCancelled ends a job that a person gave up.
var errCancelled = errors.New("cancelled")

// endJob ends a job, with an error or without, and tells everybody.
func (s *Service) endJob(ctx context.Context, name string, cause error, result func(*typesv1.Job)) error {
	now := timestamppb.New(s.deps.Clock())
	j, err := s.job(ctx, name, func(j *typesv1.Job) {
		j.EndTime = now
		switch {
		case cause == nil:
			j.State = typesv1.JobState_JOB_STATE_SUCCEEDED
		case errors.Is(cause, errCancelled):
			j.State = typesv1.JobState_JOB_STATE_CANCELLED
		default:
			j.State, j.Error = typesv1.JobState_JOB_STATE_FAILED, errcat.Detail(cause, s.deps.Clock())
		}
		for _, st := range j.Steps {
			if cause != nil && st.State == typesv1.JobState_JOB_STATE_IN_PROGRESS {
				st.State, st.Error, st.EndTime = j.State, j.Error, now
			}
		}
		result(j)
	})
	if err != nil {
		return err
	}
	s.changed(ctx, j)
	return nil
}
