package scheduler

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// projectJob makes the job say what the record says. A job is a view: it can be computed again at any time, so no kill
// leaves it behind the truth. It never takes back progress.
func projectJob(job *typesv1.Job, rec *schedulerv1.ProtectedVm, h *hints, now time.Time) {
	w := jobWriter{job: job, now: timestamppb.New(now)}
	switch job.GetKind() {
	case typesv1.JobKind_JOB_KIND_ENABLE_PROTECTION:
		w.enable(rec, h)
	case typesv1.JobKind_JOB_KIND_RESYNCHRONIZE:
		w.resync(rec, h)
	}
}

type jobWriter struct {
	job *typesv1.Job
	now *timestamppb.Timestamp
}

const (
	jobRunning   = typesv1.JobState_JOB_STATE_IN_PROGRESS
	jobSucceeded = typesv1.JobState_JOB_STATE_SUCCEEDED
	jobFailed    = typesv1.JobState_JOB_STATE_FAILED
	jobCancelled = typesv1.JobState_JOB_STATE_CANCELLED
	jobSuspended = typesv1.JobState_JOB_STATE_SUSPENDED
)

// at says that step i is the present one: those before it are done.
func (w jobWriter) at(i int, state typesv1.JobState, detail string, err *typesv1.ErrorDetail) {
	for k, s := range w.job.GetSteps() {
		switch {
		case k < i:
			w.step(s, jobSucceeded)
		case k == i:
			w.step(s, state)
			if detail != "" {
				s.Detail = detail
			}
			s.Error = nil
			if state == jobFailed {
				s.Error = err
			}
		}
	}
	w.state(state, err)
}

// done says that all steps are.
func (w jobWriter) done() {
	for _, s := range w.job.GetSteps() {
		w.step(s, jobSucceeded)
	}
	w.state(jobSucceeded, nil)
}

func (w jobWriter) step(s *typesv1.JobStep, state typesv1.JobState) {
	if s.State == state {
		return
	}
	s.State = state
	if s.StartTime == nil {
		s.StartTime = w.now
	}
	s.EndTime = nil
	if state == jobSucceeded {
		s.Detail = "" // what it did last is no result
	}
	if state == jobSucceeded || state == jobFailed || state == jobCancelled {
		s.EndTime = w.now
	}
}

func (w jobWriter) state(state typesv1.JobState, err *typesv1.ErrorDetail) {
	if w.job.StartTime == nil {
		w.job.StartTime = w.now
	}
	if w.job.State != state {
		w.job.State, w.job.EndTime = state, nil
		if jobEnded(w.job) {
			w.job.EndTime = w.now
		}
	}
	w.job.Error = nil
	if state == jobFailed {
		w.job.Error = err
	}
}

// waiting is the line that a step shows between two rungs of the ladder.
func waiting(rec *schedulerv1.ProtectedVm, text string) string {
	if r := rec.GetRetry(); r.GetNextTime() != nil {
		return fmt.Sprintf("attempt %d failed: %s; next at %s", r.GetAttempt(), r.GetError().GetWhat(), r.GetNextTime().AsTime().UTC().Format(time.TimeOnly))
	}
	return text
}

func (w jobWriter) enable(rec *schedulerv1.ProtectedVm, h *hints) {
	checked := 0
	if rec.GetMachine() != nil {
		checked = 1
	}
	switch rec.GetState() {
	case EnablingProtection:
		w.at(checked, jobRunning, waiting(rec, ""), nil)
	case EnablingFailed:
		w.at(checked, jobFailed, "", rec.GetRetry().GetError())
	case ReadyForInitialReplication:
		w.at(2, jobRunning, "waits for the start time of the policy", nil)
	case InitialReplicating:
		w.progress(rec, h)
		w.at(2, jobRunning, waiting(rec, copyLine(rec)), nil)
	case InitialReplicationPaused:
		w.progress(rec, h)
		w.at(2, jobSuspended, "paused", nil)
	case InitialReplicationFailed:
		w.at(2, jobFailed, "", rec.GetRetry().GetError())
	case FinalizingProtection:
		w.at(3, jobRunning, "", nil)
	case ResyncRequired:
		w.at(2, jobFailed, "", detail(typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED, resyncText(rec.GetResyncReason()), w.now.AsTime()))
	default:
		w.allCopied(rec, h)
		w.done()
	}
}

// allCopied is progress at its end: a copy may have been faster than anybody looked.
func (w jobWriter) allCopied(rec *schedulerv1.ProtectedVm, h *hints) {
	if w.job.Progress == nil {
		w.job.Progress = &typesv1.JobProgress{}
	}
	p := w.job.Progress
	if p.TotalBytes == 0 {
		for _, d := range rec.GetMachine().GetDisks() {
			p.TotalBytes += d.GetSizeBytes()
		}
	}
	p.DoneBytes, p.SentBytes = p.TotalBytes, max(p.SentBytes, h.lastStored())
}

// cancelled says that something has overtaken the job.
func (w jobWriter) cancelled(why string) {
	for _, s := range w.job.GetSteps() {
		if s.State == jobRunning || s.State == jobSuspended {
			w.step(s, jobCancelled)
			s.Detail = why
		}
	}
	w.state(jobCancelled, nil)
}

func (w jobWriter) resync(rec *schedulerv1.ProtectedVm, h *hints) {
	found := w.job.GetResync()
	if found == nil {
		found = &typesv1.ResyncDetail{Reason: rec.GetResyncReason()}
		w.job.Result = &typesv1.Job_Resync{Resync: found}
	}
	switch rec.GetState() {
	case PlannedFailoverInProgress, UnplannedFailoverInProgress, FailoverFailed, FailedOver, CancellingFailover:
		w.cancelled("a failover has overtaken it")
	case Resynchronizing:
		w.progress(rec, h)
		if p := rec.GetPass(); p.GetScope() == typesv1.PassScope_PASS_SCOPE_COMPARE {
			_, _, differing := h.passSums(p.GetOrdinal())
			found.ComparedBytes = max(found.ComparedBytes, w.job.GetProgress().GetDoneBytes())
			found.DifferingBytes = max(found.DifferingBytes, differing)
		}
		step := 0
		if rec.GetResyncReason() == typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED {
			step = 1
		}
		w.at(step, jobRunning, waiting(rec, copyLine(rec)), nil)
	case ResyncPaused:
		w.progress(rec, h)
		w.at(0, jobSuspended, "paused", nil)
	case ReplicationError:
		w.at(0, jobFailed, "", rec.GetRetry().GetError())
	case ResyncRequired:
		w.at(0, jobFailed, "", detail(typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED, resyncText(rec.GetResyncReason()), w.now.AsTime()))
	default:
		w.allCopied(rec, h)
		found.ComparedBytes = max(found.ComparedBytes, w.job.GetProgress().GetTotalBytes())
		w.done()
	}
}

// progress counts a full or comparing pass; what follows it is small, and told in words.
func (w jobWriter) progress(rec *schedulerv1.ProtectedVm, h *hints) {
	p := rec.GetPass()
	if p == nil || p.GetScope() == typesv1.PassScope_PASS_SCOPE_DIRTY || p.GetTotalBytes() == 0 {
		return
	}
	if w.job.Progress == nil {
		w.job.Progress = &typesv1.JobProgress{}
	}
	covered, stored, _ := h.passSums(p.GetOrdinal())
	if p.GetScope() != typesv1.PassScope_PASS_SCOPE_COMPARE {
		covered = 0
		for _, win := range p.GetWindows() {
			if win.GetCommitted() {
				covered += win.GetWindow().GetLength()
			}
		}
	}
	w.job.Progress.TotalBytes = p.GetTotalBytes()
	w.job.Progress.DoneBytes = min(max(w.job.Progress.DoneBytes, covered), p.GetTotalBytes())
	w.job.Progress.SentBytes = max(w.job.Progress.SentBytes, stored)
}

// copyLine says in a few words what the copy does now.
func copyLine(rec *schedulerv1.ProtectedVm) string {
	switch p, c := rec.GetPass(), rec.GetCycle(); {
	case p.GetScope() == typesv1.PassScope_PASS_SCOPE_COMPARE:
		return fmt.Sprintf("pass %d: comparing", p.GetOrdinal())
	case p != nil && len(p.GetWindows()) > 0:
		done := 0
		for _, w := range p.GetWindows() {
			if w.GetCommitted() {
				done++
			}
		}
		what := "copying"
		if p.GetScope() == typesv1.PassScope_PASS_SCOPE_DIRTY {
			what = "catching up"
		}
		return fmt.Sprintf("pass %d: %s, %d of %d tasks done", p.GetOrdinal(), what, done, len(p.GetWindows()))
	case c != nil:
		return fmt.Sprintf("point %d: final cut", c.GetPoint())
	}
	return "starting"
}
