package scheduler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// serviceName is the owner of the jobs that this service runs.
const serviceName = "scheduler"

// jobThrottle is how often the progress of one job is written at most.
const jobThrottle = 500 * time.Millisecond

// jobBook writes jobs and publishes facts.
type jobBook struct {
	bus *bus.Bus
	kv  *bus.KV[*typesv1.Job]
	log *slog.Logger
	now func() time.Time
}

func revText(rev uint64) string { return strconv.FormatUint(rev, 10) }

// jobSteps are the steps of the kinds of jobs that this service runs, in order: id and title.
var jobSteps = map[typesv1.JobKind][][2]string{
	typesv1.JobKind_JOB_KIND_ENABLE_PROTECTION: {
		{"check-prerequisites", "Check prerequisites"}, {"create-relationship", "Create the replication relationship"},
		{"initial-replication", "Initial replication"}, {"finalize-protection", "Finalize protection"},
	},
	typesv1.JobKind_JOB_KIND_RESYNCHRONIZE: {
		{"compare", "Compare source and target"}, {"final-cut", "Cut and commit a new base"},
	},
	typesv1.JobKind_JOB_KIND_DISABLE_PROTECTION: {
		{"stop-tracking", "Stop tracking on the host"}, {"close-lineage", "Close the lineage in storage"},
	},
}

// newJob is a job that has not begun.
func newJob(kind typesv1.JobKind, target, requestID, requestedBy string, now time.Time) *typesv1.Job {
	job := &typesv1.Job{
		Name: "jobs/" + uuid.Must(uuid.NewV7()).String(), Kind: kind, Target: target, State: typesv1.JobState_JOB_STATE_NOT_STARTED,
		CreateTime: timestamppb.New(now), RequestedBy: requestedBy, Owner: serviceName, RequestId: requestID,
	}
	for _, s := range jobSteps[kind] {
		job.Steps = append(job.Steps, &typesv1.JobStep{Id: s[0], Title: s[1], State: typesv1.JobState_JOB_STATE_NOT_STARTED})
	}
	return job
}

func (b *jobBook) create(ctx context.Context, job *typesv1.Job) error {
	rev, err := b.kv.Create(ctx, bus.Key(lastPart(job.GetName())), job)
	if err != nil {
		return busError(err, "store job %s", job.GetName())
	}
	job.Revision = rev
	b.announceJob(ctx, job)
	return nil
}

// remove deletes a job that never became one.
func (b *jobBook) remove(ctx context.Context, job *typesv1.Job) {
	if err := b.kv.Delete(ctx, bus.Key(lastPart(job.GetName())), job.GetRevision()); err != nil {
		b.log.WarnContext(ctx, "job without work not removed", "job", job.GetName(), "error", err)
	}
}

// find looks for a job by the request that made it.
func (b *jobBook) find(ctx context.Context, kind typesv1.JobKind, target, requestID string) (*typesv1.Job, error) {
	if requestID == "" {
		return nil, nil
	}
	all, err := b.kv.List(ctx, "")
	if err != nil {
		return nil, busError(err, "list jobs")
	}
	for _, e := range all {
		if j := e.Value; j.GetKind() == kind && j.GetTarget() == target && j.GetRequestId() == requestID {
			j.Revision = e.Revision
			return j, nil
		}
	}
	return nil, nil
}

// cancel ends a job that something else has overtaken.
func (b *jobBook) cancel(ctx context.Context, name, why string) error {
	job, rev, err := b.kv.Mutate(ctx, bus.Key(lastPart(name)), func(j *typesv1.Job) error {
		if jobEnded(j) {
			return bus.NoChange
		}
		j.State, j.EndTime = typesv1.JobState_JOB_STATE_CANCELLED, timestamppb.New(b.now())
		for _, s := range j.Steps {
			if s.State == typesv1.JobState_JOB_STATE_IN_PROGRESS || s.State == typesv1.JobState_JOB_STATE_SUSPENDED {
				s.State, s.Detail, s.EndTime = typesv1.JobState_JOB_STATE_CANCELLED, why, j.EndTime
			}
		}
		return nil
	})
	if errors.Is(err, bus.ErrNotFound) {
		return nil
	}
	if err == nil {
		job.Revision = rev
		b.announceJob(ctx, job)
	}
	return err
}

// jobAge is how long an ended job is kept.
const jobAge = 30 * 24 * time.Hour

// sweep ends jobs of this service that no record holds any more, because a kill fell between two writes, and deletes its
// old ones.
func (b *jobBook) sweep(ctx context.Context, held map[string]bool) error {
	all, err := b.kv.List(ctx, "")
	if err != nil {
		return err
	}
	for _, e := range all {
		j := e.Value
		if j.GetOwner() == serviceName && jobEnded(j) && b.now().Sub(j.GetEndTime().AsTime()) > jobAge {
			if err := b.kv.Delete(ctx, e.Key, e.Revision); err != nil && !errors.Is(err, bus.ErrRevision) {
				return err
			}
			continue
		}
		if j.GetOwner() != serviceName || jobEnded(j) || held[j.GetName()] || b.now().Sub(j.GetCreateTime().AsTime()) < time.Minute {
			continue
		}
		if err := b.cancel(ctx, j.GetName(), "nothing works on it"); err != nil {
			return err
		}
	}
	return nil
}

func jobEnded(j *typesv1.Job) bool {
	switch j.GetState() {
	case typesv1.JobState_JOB_STATE_SUCCEEDED, typesv1.JobState_JOB_STATE_FAILED, typesv1.JobState_JOB_STATE_CANCELLED:
		return true
	}
	return false
}

// announce publishes a fact about a VM. The state is what counts: a fact that cannot be published is logged, and
// whoever needs certainty reads the record.
func (b *jobBook) announce(ctx context.Context, vm, typ, id string, payload proto.Message) {
	err := b.bus.PublishEvent(ctx, bus.Event{Type: typ, Site: siteOf(vm), VM: lastPart(vm), ID: id, Time: b.now(), Payload: payload})
	if err != nil {
		b.log.WarnContext(ctx, "event not published", "type", typ, "vm", vm, "error", err)
	}
}

func (b *jobBook) announceState(ctx context.Context, rec *schedulerv1.ProtectedVm, rev uint64, from State, e Event, job string) {
	b.announce(ctx, rec.GetName(), "protection-state.changed", bus.EventID(rec.GetLineage(), "state", revText(rev)), &eventsv1.ProtectionStateChanged{
		Vm: rec.GetName(), From: from, To: rec.GetState(), Cause: string(e), Job: job, Error: rec.GetRetry().GetError(), Revision: rev,
	})
}

func (b *jobBook) announceJob(ctx context.Context, job *typesv1.Job) {
	b.announce(ctx, job.GetTarget(), "job.changed", bus.EventID(job.GetName(), revText(job.GetRevision())), &eventsv1.JobChanged{Job: job})
}

// syncJob brings the VM's job in line with its record. ended says that the job is over and was taken off the record;
// wait, that progress is held back for so long.
func (v *vmRun) syncJob(ctx context.Context) (ended bool, wait time.Duration, err error) {
	name := v.rec.GetCurrentJob()
	if name == "" || v.rec.GetState() == Disabling {
		return false, 0, nil // the job of a disable is written by its step: the record goes with it
	}
	job := v.m.job
	if job.GetName() != name {
		job, v.m.jobRev, err = v.jobs.kv.Get(ctx, bus.Key(lastPart(name)))
		if errors.Is(err, bus.ErrNotFound) {
			return true, 0, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.CurrentJob = "" })
		} else if err != nil {
			return false, 0, err
		}
		v.m.job = job
	}
	now := v.now()
	want := proto.Clone(job).(*typesv1.Job)
	projectJob(want, v.rec, &v.m.hints, now)
	moved := !sameShape(job, want)
	if !proto.Equal(job, want) {
		if since := now.Sub(v.m.jobAt); !moved && since < jobThrottle {
			return false, jobThrottle - since, nil
		}
		rev, err := v.jobs.kv.Update(ctx, bus.Key(lastPart(name)), want, v.m.jobRev)
		if err != nil {
			v.m.job = nil
			return false, 0, fmt.Errorf("write job: %w", err)
		}
		v.m.job, v.m.jobRev, v.m.jobAt = want, rev, now
		if moved {
			told := proto.Clone(want).(*typesv1.Job)
			told.Revision = rev
			v.jobs.announceJob(ctx, told)
		}
	}
	if !jobEnded(want) {
		return false, 0, nil
	}
	v.m.job = nil
	return true, 0, v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.CurrentJob = "" })
}

// sameShape compares the states of a job and of its steps.
func sameShape(a, b *typesv1.Job) bool {
	if a.GetState() != b.GetState() || len(a.GetSteps()) != len(b.GetSteps()) {
		return false
	}
	for i := range a.GetSteps() {
		if a.GetSteps()[i].GetState() != b.GetSteps()[i].GetState() {
			return false
		}
	}
	return true
}
