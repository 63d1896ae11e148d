package failoverorchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/encoding/protojson"
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

// progressEvery bounds how often a job's bytes are written to its record.
const progressEvery = 500 * time.Millisecond

// run drives one failover to its next resting state. Whatever happens, the record says where it stands.
func (s *Service) run(ctx context.Context, key string) {
	f, _, err := s.failovers.Get(ctx, key)
	if err != nil || !unfinished(f.State) {
		return
	}
	ctx, span := s.tracer.Start(ctx, "test failover", trace.WithAttributes(attribute.String("vm", lastPart(f.Vm)), attribute.String("failover", lastPart(f.Name))))
	defer span.End()
	cleaning := f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP
	work := s.runTest
	if cleaning {
		work = s.runCleanup
	}
	for attempt := 1; ; attempt++ {
		err = work(ctx, f)
		if err == nil || ctx.Err() != nil {
			return
		}
		if !errcat.Recoverable(err) || attempt >= s.config.Attempts {
			break
		}
		s.log.WarnContext(ctx, "failover step will be tried again", "failover", f.Name, "attempt", attempt, "error", err)
		s.pause(ctx)
	}
	span.RecordError(err)
	s.log.ErrorContext(ctx, "failover failed", "failover", f.Name, "vm", f.Vm, "error", err)
	if cleaning {
		s.settle(ctx, f, typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANUP_FAILED, f.CleanupJob, err, nil)
		return
	}
	if folder, ferr := vhdtarget.New(f.OutDir, lastPart(f.Name)); ferr == nil {
		if _, rerr := folder.Remove(); rerr != nil {
			err = errcat.Wrap(errcat.Reason(err), err, "and the folder could not be cleaned (%v)", rerr)
		}
	}
	s.settle(ctx, f, typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED, f.Job, err, nil)
}

// settle writes how a failover ended: the job first, so that a record at rest never has a running job.
func (s *Service) settle(ctx context.Context, f *failoverv1.Failover, state typesv1.TestFailoverState, job string, cause error, result func(*typesv1.Job)) {
	for attempt := 0; attempt < s.config.Attempts && ctx.Err() == nil; attempt++ {
		err := s.endJob(ctx, job, cause, result)
		if err == nil {
			_, _, err = s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
				r.State, r.Error = state, errcat.Detail(cause, s.deps.Clock())
				if state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP {
					r.ReadyTime = timestamppb.New(s.deps.Clock())
				}
				return nil
			})
		}
		if err == nil {
			s.announce(ctx, f, state)
			s.metrics.tests.Add(ctx, 1, metric.WithAttributes(attribute.String("outcome", outcome(state))))
			return
		}
		s.log.WarnContext(ctx, "write failover record", "failover", f.Name, "error", err)
		s.pause(ctx)
	}
}

func outcome(state typesv1.TestFailoverState) string {
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
		return replicaError(err, "open the replica")
	}
	j := newJournal(s.deps.Store, lineage, id, s.deps.Clock)
	var existed bool
	var files []string
	steps := []struct {
		id string
		do func() (result any, detail string, err error)
		// into receives a result that the journal has.
		into any
	}{
		{stepCheck, func() (any, string, error) {
			var err error
			existed, err = folder.Check()
			return existed, folder.Path(), err
		}, &existed},
		{stepClaim, func() (any, string, error) {
			m, err := r.Find(ctx, replica.Ordinal(f.Point))
			if err != nil {
				return nil, "", replicaError(err, "find point %d", f.Point)
			}
			for _, d := range m.Disks {
				files = append(files, vhdtarget.DiskFile(d.ID))
			}
			files = append(files, vhdtarget.MachineFile)
			return files, fmt.Sprintf("%d files", len(files)), folder.Claim(existed, files)
		}, &files},
		{stepMaterialise, func() (any, string, error) { return s.materialise(ctx, r, f, folder) }, nil},
		{stepDescribe, func() (any, string, error) { return nil, vhdtarget.MachineFile, s.describe(ctx, r, f, folder) }, nil},
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
		stepCtx, span := s.tracer.Start(ctx, st.id)
		result, detail, err := st.do()
		span.End()
		if err != nil {
			return err
		}
		if err := j.finish(stepCtx, st.id, result); err != nil {
			return storeError(err)
		}
		if err := failpoint.Hit("failover-orchestrator/after-" + st.id); err != nil {
			return err
		}
		if err := s.step(ctx, f.Job, st.id, typesv1.JobState_JOB_STATE_SUCCEEDED, detail); err != nil {
			return storeError(err)
		}
	}
	s.settle(ctx, f, typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP, f.Job, nil, func(job *typesv1.Job) {
		job.Result = &typesv1.Job_TestFailover{TestFailover: &typesv1.TestFailoverDetail{
			Failover: f.Name, Point: f.Point, CutTime: f.CutTime, Target: "vhd", OutDir: f.OutDir, Files: files,
		}}
	})
	s.metrics.seconds.Record(ctx, s.deps.Clock().Sub(f.CreateTime.AsTime()).Seconds())
	return nil
}

// materialise writes the disks. It begins anew after a kill: files get their names only when they are whole.
func (s *Service) materialise(ctx context.Context, r *replica.Replica, f *failoverv1.Failover, folder *vhdtarget.Folder) (any, string, error) {
	sink := folder.Sink()
	defer sink.Close()
	report := s.reporter(ctx, f.Job, machineBytes(f.Machine))
	m, err := r.Materialise(ctx, replica.Ordinal(f.Point), sink, replica.MaterialiseOptions{Parallel: s.config.Parallel, Progress: report})
	if err != nil {
		return nil, "", replicaError(err, "write the disks of point %d", f.Point)
	}
	s.metrics.bytes.Add(ctx, m.Bytes)
	return map[string]any{"checkpoint": m.Checkpoint, "bytes": m.Bytes}, fmt.Sprintf("%d disks, %d bytes written", len(m.Disks), m.Bytes), nil
}

// machineBytes is the size of a machine's disks: the most that can be written.
func machineBytes(m *typesv1.Machine) (n int64) {
	for _, d := range m.GetDisks() {
		n += d.SizeBytes
	}
	return n
}

// reporter writes progress to the job's record, not too often; a lost report is no harm.
func (s *Service) reporter(ctx context.Context, job string, total int64) func(done int64) {
	var mu sync.Mutex
	var last time.Time
	return func(done int64) {
		mu.Lock()
		now := s.deps.Clock()
		due := now.Sub(last) >= progressEvery
		if due {
			last = now
		}
		mu.Unlock()
		if !due {
			return
		}
		_, err := s.job(ctx, job, func(j *typesv1.Job) {
			if j.Progress == nil || done > j.Progress.DoneBytes {
				j.Progress = &typesv1.JobProgress{DoneBytes: done, TotalBytes: total, SentBytes: done}
			}
		})
		if err != nil && ctx.Err() == nil {
			s.log.DebugContext(ctx, "report progress", "job", job, "error", err)
		}
	}
}

// describe writes vm.json: the machine as it was at the point, with the files of its disks.
func (s *Service) describe(ctx context.Context, r *replica.Replica, f *failoverv1.Failover, folder *vhdtarget.Folder) error {
	m, err := r.Find(ctx, replica.Ordinal(f.Point))
	if err != nil {
		return replicaError(err, "find point %d", f.Point)
	}
	machine := &typesv1.Machine{}
	if m.Config != "" {
		raw, err := r.Config(ctx, m.Config)
		if err != nil {
			return replicaError(err, "read the machine's configuration at point %d", f.Point)
		}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, machine); err != nil {
			return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_MANIFEST_CORRUPT, err, "read the machine's configuration at point %d", f.Point)
		}
	}
	for _, d := range machine.Disks {
		d.Path, d.Format, d.ExportUri = vhdtarget.DiskFile(d.Id), typesv1.DiskFormat_DISK_FORMAT_VHD, ""
	}
	described, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(machine)
	if err != nil {
		return fmt.Errorf("encode machine: %w", err)
	}
	doc := map[string]any{
		"version": 1, "failover": f.Name, "lineage": f.Lineage, "point": f.Point, "sequence": m.Seq,
		"cut_time": m.CutTime.UTC().Format(time.RFC3339Nano), "consistency": m.Consistency, "machine": json.RawMessage(described),
	}
	raw, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", vhdtarget.MachineFile, err)
	}
	return folder.WriteMachine(append(raw, '\n'))
}

// runCleanup removes the copy.
func (s *Service) runCleanup(ctx context.Context, f *failoverv1.Failover) error {
	if err := s.ensureJob(ctx, newJob(f.CleanupJob, typesv1.JobKind_JOB_KIND_CLEAN_UP_TEST_FAILOVER, f.Vm, "", "", timestamppb.New(s.deps.Clock()), cleanupSteps)); err != nil {
		return storeError(err)
	}
	if err := s.step(ctx, f.CleanupJob, stepRemove, typesv1.JobState_JOB_STATE_IN_PROGRESS, ""); err != nil {
		return storeError(err)
	}
	folder, err := vhdtarget.New(f.OutDir, lastPart(f.Name))
	if err != nil {
		return err
	}
	if err := failpoint.Hit("failover-orchestrator/before-" + stepRemove); err != nil {
		return err
	}
	kept, err := folder.Remove()
	if err != nil {
		return err
	}
	detail := f.OutDir + " is as it was"
	if len(kept) > 0 {
		detail = "left what others put there: " + strings.Join(kept, " ")
	}
	if err := s.step(ctx, f.CleanupJob, stepRemove, typesv1.JobState_JOB_STATE_SUCCEEDED, detail); err != nil {
		return storeError(err)
	}
	s.settle(ctx, f, typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE, f.CleanupJob, nil, nil)
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
