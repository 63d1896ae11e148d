package scheduler

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"

	"github.com/landfall-dr/landfall/libs/errcat"
)

// rungs are the gaps before the next attempts, in units; the last one repeats.
var rungs = [...]int{1, 2, 4, 8, 10, 30}

// Gap is how long to wait after the given failed attempt (the first is 1). unit is one minute outside of tests.
func Gap(attempt int32, unit time.Duration) time.Duration {
	i := min(max(int(attempt), 1), len(rungs)) - 1
	return time.Duration(rungs[i]) * unit
}

// offAttempts is how far the ladder is climbed for a hypervisor that does not answer: most often its machine is simply
// off, and the first point after it was started should not wait for half an hour.
const offAttempts = 3

// gap is how long to wait after the given failed attempt in the VM's present state: a planned failover, for which
// people wait, does not wait long.
func (v *vmRun) gap(attempt int32, cause *typesv1.ErrorDetail) time.Duration {
	if reasonOf(cause) == typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE {
		attempt = min(attempt, offAttempts)
	}
	gap := Gap(attempt, v.cfg.RetryUnit)
	if v.rec.GetState() == PlannedFailoverInProgress {
		gap = min(gap, v.cfg.FenceRetry)
	}
	return gap
}

// climbed puts one more failure into the record. A planned failover shows it.
func (v *vmRun) climbed(rec *schedulerv1.ProtectedVm, e *typesv1.ErrorDetail) {
	now := v.now()
	rec.Retry = climb(rec.GetRetry(), e, now, v.cfg.RetryUnit)
	rec.Retry.NextTime = timestamppb.New(now.Add(v.gap(rec.Retry.Attempt, e)))
	if rec.GetState() == PlannedFailoverInProgress && rec.GetFailover() != nil {
		rec.Failover.Error = e
	}
}

// retryWait is how long the ladder still waits.
func (v *vmRun) retryWait() time.Duration {
	at := v.rec.GetRetry().GetNextTime()
	if at == nil {
		return 0
	}
	return waitFor(at.AsTime(), v.now(), Gap(int32(len(rungs)), v.cfg.RetryUnit))
}

// waitFor is how long it is until a time that was set at most gap ahead. One that is much further away was set by a clock
// that was put back since: it is due.
func waitFor(at, now time.Time, gap time.Duration) time.Duration {
	wait := at.Sub(now)
	if wait < 0 || wait > 2*gap {
		return 0
	}
	return wait
}

// climb is the retry record after one more failure at now. Climbing from nil begins a new series.
func climb(r *schedulerv1.Retry, e *typesv1.ErrorDetail, now time.Time, unit time.Duration) *schedulerv1.Retry {
	next := &schedulerv1.Retry{Attempt: r.GetAttempt() + 1, FirstFailureTime: r.GetFirstFailureTime(), Error: e}
	if next.FirstFailureTime == nil {
		next.FirstFailureTime = timestamppb.New(now)
	}
	next.NextTime = timestamppb.New(now.Add(Gap(next.Attempt, unit)))
	return next
}

// resyncReasons are the errors of a host that mean: what changed since the base is not known any more.
var resyncReasons = map[typesv1.ErrorReason]typesv1.ResyncReason{
	typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED:      typesv1.ResyncReason_RESYNC_REASON_TRACKING_GAP,
	typesv1.ErrorReason_ERROR_REASON_TRACKING_BROKEN:      typesv1.ResyncReason_RESYNC_REASON_TRACKING_BROKEN,
	typesv1.ErrorReason_ERROR_REASON_DISK_CHANGED_OFFLINE: typesv1.ResyncReason_RESYNC_REASON_DISK_CHANGED_OFFLINE,
	typesv1.ErrorReason_ERROR_REASON_BASE_AHEAD:           typesv1.ResyncReason_RESYNC_REASON_BASE_AHEAD,
	typesv1.ErrorReason_ERROR_REASON_LOG_LIMIT_REACHED:    typesv1.ResyncReason_RESYNC_REASON_LOG_LIMIT,
	typesv1.ErrorReason_ERROR_REASON_TRACKING_NOT_STARTED: typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST,
	typesv1.ErrorReason_ERROR_REASON_BITMAP_LOST:          typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST,
}

// reopen are refusals that another task of a fresh ordinal and the present epoch and open can get past: the work in
// hand is given up, the cycle that follows is right.
var reopen = map[typesv1.ErrorReason]bool{
	typesv1.ErrorReason_ERROR_REASON_STALE_EPOCH:       true,
	typesv1.ErrorReason_ERROR_REASON_STALE_OPEN:        true,
	typesv1.ErrorReason_ERROR_REASON_ORDINAL_USED:      true,
	typesv1.ErrorReason_ERROR_REASON_PASS_OUT_OF_ORDER: true,
	typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN:     true,
	typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT:     true,
	typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED:     true,
	typesv1.ErrorReason_ERROR_REASON_POINT_OPEN:        true,
	typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED:     true,
}

// Class is what the scheduler does about an error.
type Class int

// The classes.
const (
	// ClassRecoverable: the ladder goes on. Unknown errors are here: health turns Critical when the VM falls behind.
	ClassRecoverable Class = iota
	// ClassReopen: give up the point or pass in hand, reconcile, begin another at the next rung.
	ClassReopen
	// ClassResync: the baseline is lost.
	ClassResync
	// ClassFatal: a person must act.
	ClassFatal
)

// Classify sorts a reason by errcat's word on whether it is recoverable, and by what the protocol says of it.
func Classify(reason typesv1.ErrorReason) Class {
	if _, ok := resyncReasons[reason]; ok {
		return ClassResync
	}
	if reopen[reason] {
		return ClassReopen
	}
	switch reason {
	case typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED, typesv1.ErrorReason_ERROR_REASON_INTERNAL,
		typesv1.ErrorReason_ERROR_REASON_REDELIVERIES_EXHAUSTED, typesv1.ErrorReason_ERROR_REASON_CANCELLED,
		typesv1.ErrorReason_ERROR_REASON_HOST_NOT_FOUND, // it may register again
		typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND:   // its folder may be mounted again, its host may be starting
		return ClassRecoverable
	}
	if e, ok := errcat.Lookup(reason); ok && !e.Recoverable {
		return ClassFatal
	}
	return ClassRecoverable
}

// detailOf is an error as records and events carry it.
func detailOf(err error, now time.Time) *typesv1.ErrorDetail {
	if err == nil {
		return nil
	}
	reason := errcat.Reason(errcat.FromError(err))
	if reason == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		reason = typesv1.ErrorReason_ERROR_REASON_INTERNAL
	}
	return detail(reason, clip(err.Error(), maxErrorText), now)
}

// maxErrorText bounds what a record keeps of an error, in bytes.
const maxErrorText = 1024

func detail(reason typesv1.ErrorReason, what string, now time.Time) *typesv1.ErrorDetail {
	entry, _ := errcat.Lookup(reason)
	class := Classify(reason)
	return &typesv1.ErrorDetail{
		Reason: errcat.Code(reason), What: what, Cause: entry.Cause, Action: entry.Action,
		Time: timestamppb.New(now), Recoverable: class == ClassRecoverable || class == ClassReopen,
	}
}

// reasonOf is the reason that a stored error carries.
func reasonOf(d *typesv1.ErrorDetail) typesv1.ErrorReason {
	r, _ := errcat.Parse(d.GetReason())
	return r
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xC0 == 0x80 { // not inside a character
		n--
	}
	return s[:n]
}
