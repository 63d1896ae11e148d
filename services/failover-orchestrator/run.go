package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/vhdtarget"
)

// run drives one failover to its next resting state. Whatever happens, the record says where it stands.
func (s *Service) run(ctx context.Context, key string) {
	f, _, err := s.failovers.Get(ctx, key)
	if err != nil {
		s.log.WarnContext(ctx, "read failover record", "failover", key, "error", err)
		s.pause(ctx)
		return
	}
	if !unfinished(f.State) {
		return
	}
	ctx, span := s.tracer.Start(ctx, "test failover", trace.WithAttributes(attribute.String("vm", lastPart(f.Vm)), attribute.String("failover", lastPart(f.Name))))
	defer span.End()
	if f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP {
		if err := s.attempts(ctx, f, s.runCleanup); err != nil && ctx.Err() == nil {
			span.RecordError(err)
			s.settle(ctx, f, ending{state: typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANUP_FAILED, job: f.CleanupJob, cause: err})
		}
		return
	}
	cause := errcat.FromDetail(f.Error) // set when a process died after it had given up
	if cause == nil {
		if cause = s.attempts(ctx, f, s.runTest); cause == nil || ctx.Err() != nil {
			return
		}
	}
	span.RecordError(cause)
	s.fail(ctx, f, cause)
}

// attempts repeats work while what stops it may pass, a bounded number of times.
func (s *Service) attempts(ctx context.Context, f *failoverv1.Failover, work func(context.Context, *failoverv1.Failover) error) error {
	for attempt := 1; ; attempt++ {
		err := work(ctx, f)
		if err == nil || ctx.Err() != nil {
			return err
		}
		if !errcat.Recoverable(err) || attempt >= s.config.Attempts {
			s.log.ErrorContext(ctx, "failover failed", "failover", f.Name, "vm", f.Vm, "error", err)
			return err
		}
		s.log.WarnContext(ctx, "failover step will be tried again", "failover", f.Name, "attempt", attempt, "error", err)
		s.pause(ctx)
	}
}

// fail gives a test failover up: the decision is stored, then what was made is removed, then the record is settled.
// Without the first a process that died in between would go on with steps whose files are gone.
func (s *Service) fail(ctx context.Context, f *failoverv1.Failover, cause error) {
	detail := errcat.Detail(cause, s.deps.Clock())
	_, _, err := s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
		if r.State != f.State || r.Error != nil {
			return bus.NoChange
		}
		r.Error = detail
		return nil
	})
	if err == nil {
		err = failpoint.Hit("failover-orchestrator/after-give-up")
	}
	if errors.Is(err, bus.ErrNotFound) { // the handler withdrew it: a rival was first
		_ = s.endJob(ctx, f.Job, cause, func(*typesv1.Job) {})
		return
	}
	if err != nil { // found again by the next look
		if ctx.Err() == nil {
			s.log.WarnContext(ctx, "write failover record", "failover", f.Name, "error", err)
			s.pause(ctx)
		}
		return
	}
	end := ending{state: typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED, job: f.Job, cause: cause}
	if _, err := s.remove(ctx, f); err != nil {
		// What is left makes it a failed clean-up, which can be tried again, of a failed job.
		end.state = typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANUP_FAILED
		end.cause = errcat.Wrap(errcat.Reason(cause), cause, "the folder could not be cleaned (%v) after", err)
	}
	if failpoint.Hit("failover-orchestrator/after-undo") == nil {
		s.settle(ctx, f, end)
	}
}

// remove takes away what a failover made, as far as the marker in the folder and the journal say so.
func (s *Service) remove(ctx context.Context, f *failoverv1.Failover) (detail string, err error) {
	id := lastPart(f.Name)
	folder, err := vhdtarget.New(f.OutDir, id)
	if err != nil {
		return "", err
	}
	owner, err := folder.Owner()
	if err != nil {
		return "", err
	}
	if owner != "" && owner != id {
		// A marker is never replaced, so ours was removed before the other failover could claim the folder.
		return fmt.Sprintf("%s belongs to failover %s now; nothing of this one is in it", f.OutDir, owner), nil
	}
	kept, err := folder.Remove()
	if err != nil {
		return "", err
	}
	if owner == "" { // never claimed, removed before, taken away by hand, or on another machine: say what is seen
		if detail = unclaimed(f.OutDir); detail != "" {
			return detail, nil
		}
	}
	if len(kept) > 0 {
		return "left what others put there: " + strings.Join(kept, " "), nil
	}
	// A process may have died between the marker's removal and the folder's. Clean-up does not depend on storage.
	existed := true
	if lineage, err := replica.ParseLineage(f.Lineage); err == nil {
		if _, err := newJournal(s.deps.Store, lineage, id, s.deps.Clock).done(ctx, stepCheck, &existed); err != nil {
			s.log.WarnContext(ctx, "read step journal", "failover", f.Name, "error", err)
		}
	}
	if !existed {
		if err := folder.Drop(); err != nil {
			return "", err
		}
	}
	return f.OutDir + " is as it was", nil
}

// unclaimed describes a folder without a marker from which nothing was removed; "" when it is there and empty.
func unclaimed(dir string) string {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		host, _ := os.Hostname() // only for people
		return fmt.Sprintf("nothing to remove: there is no folder %s on %s", dir, host)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("removed nothing: %s has no marker of this failover; it holds %s", dir, strings.Join(names, " "))
}

// ending is how a failover's work ended.
type ending struct {
	state typesv1.TestFailoverState
	job   string
	cause error
	files []string
}

// settle writes how a failover ended: the job first, so that a record at rest never has a running job.
func (s *Service) settle(ctx context.Context, f *failoverv1.Failover, e ending) {
	ready := e.state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP
	for attempt := 0; attempt < s.config.Attempts && ctx.Err() == nil; attempt++ {
		err := s.endJob(ctx, e.job, e.cause, func(j *typesv1.Job) {
			if ready {
				j.Result = &typesv1.Job_TestFailover{TestFailover: &typesv1.TestFailoverDetail{
					Failover: f.Name, Point: f.Point, CutTime: f.CutTime, Target: "vhd", OutDir: f.OutDir, Files: e.files,
				}}
			}
		})
		if err == nil {
			_, _, err = s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
				if r.State != f.State {
					return bus.NoChange // another instance was faster
				}
				r.State, r.Error = e.state, errcat.Detail(e.cause, s.deps.Clock())
				switch {
				case ready:
					r.ReadyTime, r.Files = timestamppb.New(s.deps.Clock()), e.files
				case e.cause == nil: // cleaned up
					r.Files = nil
				}
				return nil
			})
		}
		if err == nil {
			s.announce(ctx, f, e.state)
			s.metrics.tests.Add(ctx, 1, metric.WithAttributes(attribute.String("outcome", outcome(e.state))))
			if ready {
				s.metrics.seconds.Record(ctx, s.deps.Clock().Sub(f.CreateTime.AsTime()).Seconds())
			}
			return
		}
		s.log.WarnContext(ctx, "write failover record", "failover", f.Name, "error", err)
		s.pause(ctx)
	}
}

// outcome labels the counter of ended work.
func outcome(state typesv1.TestFailoverState) string {
	switch state {
	case typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP:
		return "ready"
	case typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE:
		return "cleaned_up"
	}
	return strings.ToLower(strings.TrimPrefix(state.String(), "TEST_FAILOVER_STATE_"))
}

// runTest makes the copy, step by step; steps that the journal has are not repeated.
func (s *Service) runTest(ctx context.Context, f *failoverv1.Failover) error {
	id := lastPart(f.Name)
	if err := s.ensureJob(ctx, newJob(f.Job, typesv1.JobKind_JOB_KIND_TEST_FAILOVER, f.Vm, "", "", f.CreateTime, testSteps)); err != nil {
		return storeError(err)
	}
	lineage, err := replica.ParseLineage(f.Lineage)
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INTERNAL, err, "failover %s", id)
	}
	folder, err := vhdtarget.New(f.OutDir, id)
	if err != nil {
		return err
	}
	r, err := replica.Open(ctx, s.deps.Store, lineage)
	if err != nil {
		return chainError(err, "open the replica")
	}
	j := newJournal(s.deps.Store, lineage, id, s.deps.Clock)
	var existed bool
	var files []string
	steps := []struct {
		id string
		do func(ctx context.Context) (result any, detail string, err error)
		// into receives a result that the journal has.
		into any
	}{
		{stepCheck, func(ctx context.Context) (any, string, error) {
			if other, err := s.rival(ctx, f); err != nil {
				return nil, "", storeError(err)
			} else if other != nil {
				return nil, "", testActive(f.Machine.GetDisplayName(), other)
			}
			var err error
			existed, err = folder.Check()
			return existed, folder.Path(), err
		}, &existed},
		{stepClaim, func(ctx context.Context) (any, string, error) {
			m, err := r.Find(ctx, replica.Ordinal(f.Point))
			if err != nil {
				return nil, "", chainError(err, "find point %d", f.Point)
			}
			for _, d := range m.Disks {
				files = append(files, vhdtarget.DiskFile(d.ID))
			}
			files = append(files, vhdtarget.MachineFile)
			return files, fmt.Sprintf("%d files", len(files)), folder.Claim(existed, files)
		}, &files},
		{stepMaterialise, func(ctx context.Context) (any, string, error) { return s.materialise(ctx, r, f, folder) }, nil},
		{stepDescribe, func(ctx context.Context) (any, string, error) {
			return nil, vhdtarget.MachineFile, s.describe(ctx, r, f, folder)
		}, nil},
	}
	for _, st := range steps {
		done, err := j.done(ctx, st.id, st.into)
		if err != nil {
			return storeError(err)
		}
		if done {
			if err := s.step(ctx, f.Job, st.id, typesv1.JobState_JOB_STATE_SUCCEEDED, "done before a restart"); err != nil {
				return storeError(err)
			}
			continue
		}
		if err := s.step(ctx, f.Job, st.id, typesv1.JobState_JOB_STATE_IN_PROGRESS, ""); err != nil {
			return storeError(err)
		}
		if err := failpoint.Hit("failover-orchestrator/before-" + st.id); err != nil {
			return err
		}
		detail, err := s.perform(ctx, j, st.id, st.do)
		if err != nil {
			return err
		}
		if err := failpoint.Hit("failover-orchestrator/after-" + st.id); err != nil {
			return err
		}
		if err := s.step(ctx, f.Job, st.id, typesv1.JobState_JOB_STATE_SUCCEEDED, detail); err != nil {
			return storeError(err)
		}
	}
	s.settle(ctx, f, ending{state: typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP, job: f.Job, files: files})
	return nil
}

// perform does one step and writes it to the journal, in its own span.
func (s *Service) perform(ctx context.Context, j *journal, id string, do func(context.Context) (any, string, error)) (string, error) {
	ctx, span := s.tracer.Start(ctx, id)
	defer span.End()
	result, detail, err := do(ctx)
	if err == nil {
		err = storeError(j.finish(ctx, id, result))
	}
	if err != nil {
		span.RecordError(err)
	}
	return detail, err
}

// materialise writes the disks. It begins anew after a kill: files get their names only when they are whole.
func (s *Service) materialise(ctx context.Context, r *replica.Replica, f *failoverv1.Failover, folder *vhdtarget.Folder) (any, string, error) {
	if err := folder.Require(); err != nil {
		return nil, "", err
	}
	point, err := r.Find(ctx, replica.Ordinal(f.Point))
	if err != nil {
		return nil, "", chainError(err, "find point %d", f.Point)
	}
	sink := folder.Sink()
	defer sink.Close()
	counted := &progress{sink: sink, report: s.reporter(ctx, f.Job), now: s.deps.Clock, total: diskBytes(point.Disks)}
	m, err := r.Materialise(ctx, replica.Ordinal(f.Point), counted, replica.MaterialiseOptions{Parallel: s.config.Parallel})
	if err != nil {
		return nil, "", replicaError(err, "write the disks of point %d", f.Point)
	}
	s.metrics.bytes.Add(ctx, m.Bytes)
	return materialised{Checkpoint: m.Checkpoint, Bytes: m.Bytes}, fmt.Sprintf("%d disks, %d bytes written", len(m.Disks), m.Bytes), nil
}

// materialised is the result of step materialise-disks in the journal.
type materialised struct {
	Checkpoint replica.Seq `json:"checkpoint"` // 0: from the chain alone
	Bytes      int64       `json:"bytes"`
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
	detail, err := s.remove(ctx, f)
	if err != nil {
		return err
	}
	if err := failpoint.Hit("failover-orchestrator/after-" + stepRemove); err != nil {
		return err
	}
	if err := s.step(ctx, f.CleanupJob, stepRemove, typesv1.JobState_JOB_STATE_SUCCEEDED, detail); err != nil {
		return storeError(err)
	}
	s.settle(ctx, f, ending{state: typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE, job: f.CleanupJob})
	return nil
}

// announce tells of a new state. An event that is lost is not repeated: the record is the truth.
func (s *Service) announce(ctx context.Context, f *failoverv1.Failover, state typesv1.TestFailoverState) {
	s.publish(ctx, "test-failover.changed", f.Vm, bus.EventID("test-failover", f.Name, state.String(), f.CleanupJob), &eventsv1.TestFailoverChanged{
		Vm: f.Vm, Failover: f.Name, State: state, Point: f.Point,
	})
}

func (s *Service) publish(ctx context.Context, kind, vm, id string, payload proto.Message) {
	err := s.deps.Bus.PublishEvent(ctx, bus.Event{Type: kind, Site: s.config.Site, VM: lastPart(vm), ID: id, Payload: payload})
	if err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "publish event", "type", kind, "error", err)
	}
}

// storeError gives an error of the bus or the store its reason, unless it has one.
func storeError(err error) error {
	var known *errcat.Error
	if err == nil || errors.As(err, &known) || errors.Is(err, context.Canceled) {
		return err
	}
	reason := typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE
	switch {
	case errors.Is(err, blobstore.ErrFull):
		reason = typesv1.ErrorReason_ERROR_REASON_STORAGE_FULL
	case errors.Is(err, bus.ErrRevision):
		reason = typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION
	}
	return errcat.Wrap(reason, err, "keep the failover's record")
}
