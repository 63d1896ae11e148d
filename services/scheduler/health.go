package scheduler

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// Reasons of health that are no errors of a call. They stand in ErrorDetail.reason.
const (
	HealthRPO            = "RPO_ABOVE_THRESHOLD"
	HealthBehind         = "BEHIND_BY_MORE_THAN_AN_HOUR"
	HealthMissedCycles   = "CYCLES_MISSED"
	HealthPaused         = "REPLICATION_PAUSED"
	HealthInitial        = "INITIAL_REPLICATION_UNFINISHED"
	HealthResyncRequired = "RESYNC_REQUIRED"
	HealthResyncing      = "RESYNCHRONIZING"
	HealthCannotSend     = "REPLICATION_FAILING"
	HealthError          = "REPLICATION_ERROR"
	HealthNotReversed    = "FAILED_OVER_WITHOUT_REVERSE"
	HealthEnableFailed   = "ENABLING_FAILED"
	HealthFailoverFailed = "FAILOVER_FAILED"
	HealthAppConsistency = "APPLICATION_CONSISTENCY_MISSED"
	// HealthNotFenced is the reason of the catalogue: two copies of the machine may run.
	HealthNotFenced = "SOURCE_NOT_FENCED"
	// HealthSuspected is the reason of the catalogue: nobody has looked at a suspected point yet.
	HealthSuspected = "RANSOMWARE_SUSPECTED"
	// HealthBacklog is the reason of the catalogue: a failover to the newest point waits for what is not applied.
	HealthBacklog = "APPLY_BACKLOG_HIGH"
)

const (
	behindLimit   = time.Hour
	missedPercent = 20
	// missedWindow is the span over which missed cycles are counted.
	missedWindow = 12 * time.Hour
)

// Cycles counts what was due within the last 12 hours.
type Cycles struct {
	// Due is how many cycles were due, Missed how many of them did not run.
	Due, Missed int64
}

// Assess computes health from the reasons that hold at now, the worst first; it is pure and never drives the state.
func Assess(vm *schedulerv1.ProtectedVm, p *schedulerv1.Policy, recent Cycles, now time.Time) (typesv1.Health, []*typesv1.ErrorDetail) {
	const (
		warning  = typesv1.Health_HEALTH_WARNING
		critical = typesv1.Health_HEALTH_CRITICAL
	)
	worst := typesv1.Health_HEALTH_NORMAL
	var bad, odd []*typesv1.ErrorDetail
	add := func(h typesv1.Health, reason, what, action string) {
		d := &typesv1.ErrorDetail{Reason: reason, What: what, Action: action, Time: timestamppb.New(now)}
		if h == critical {
			bad = append(bad, d)
		} else {
			odd = append(odd, d)
		}
		worst = max(worst, h)
	}
	behind := false
	if notFenced(vm) { // whatever the state says: two copies may run
		text, todo := "two copies of the VM may run: its host has not said that the source is stopped", "Stop the machine at its site and keep it off; Landfall goes on asking its host."
		if e := vm.GetFailover().GetError(); e != nil {
			text += ": " + e.GetWhat()
		}
		add(critical, HealthNotFenced, text, todo)
	}
	if s := vm.GetSuspicion(); s != nil {
		add(critical, HealthSuspected, suspicionText(s), adviceOf(typesv1.ErrorReason_ERROR_REASON_RANSOMWARE_SUSPECTED))
	}
	switch vm.GetState() {
	case Unprotected, Disabling, DisablingFailed, MigrationCompleted, EnablingProtection:
		if e := vm.GetRetry().GetError(); vm.GetState() == EnablingProtection && e != nil { // it goes on trying, and somebody waits
			h, reason := warning, e.GetReason()
			if byHand[reasonOf(e)] {
				h = critical
			}
			add(h, reason, fmt.Sprintf("protection does not begin, attempt %d failed: %s", vm.GetRetry().GetAttempt(), e.GetWhat()), e.GetAction())
			return worst, append(bad, odd...)
		}
		if worst == critical {
			return worst, bad
		}
		return typesv1.Health_HEALTH_NOT_APPLICABLE, nil
	case EnablingFailed:
		add(critical, HealthEnableFailed, what(vm, "protection could not be enabled"), "Resolve the findings of the job, then protect the VM again or end its protection.")
	case ReadyForInitialReplication, InitialReplicating, FinalizingProtection:
		add(warning, HealthInitial, "initial replication has not finished: the VM cannot be failed over yet", "Wait for it: `landfall jobs`, then `landfall jobs show JOB --watch`.")
	case InitialReplicationPaused:
		add(warning, HealthPaused, "initial replication is paused", "Run `landfall resume VM`.")
	case InitialReplicationFailed:
		add(critical, HealthError, what(vm, "initial replication stopped"), action(vm, "Resolve the cause, then run `landfall resume VM`."))
	case Protected:
		behind = true
	case Paused:
		add(warning, HealthPaused, "replication is paused", "Run `landfall resume VM`.")
		behind = true
	case ReplicationError:
		add(critical, HealthError, what(vm, "replication stopped"), action(vm, "Resolve the cause, then run `landfall resume VM`."))
	case ResyncRequired:
		add(critical, HealthResyncRequired, "what changed since the last point is not known: "+resyncText(vm.GetResyncReason()), "Run `landfall resync VM`.")
	case Resynchronizing:
		add(warning, HealthResyncing, "source and target are being compared", "Wait for it: `landfall jobs`, then `landfall jobs show JOB --watch`.")
	case ResyncPaused:
		add(critical, HealthPaused, "resynchronisation is paused", "Run `landfall resume VM`.")
	case PlannedFailoverInProgress:
		if e := vm.GetFailover().GetError(); e != nil {
			add(warning, e.GetReason(), e.GetWhat(), e.GetAction())
		}
	case FailoverFailed:
		text := "the failover failed"
		if e := vm.GetFailover().GetError(); e != nil {
			text += ": " + e.GetWhat()
		}
		add(critical, HealthFailoverFailed, text, "See the failover's job; then try again or cancel the failover.")
	case CancellingFailover:
		if e := vm.GetFailover().GetError(); e != nil {
			add(critical, HealthFailoverFailed, "the failover could not be cancelled: "+e.GetWhat(), "See the cancellation's job; then cancel the failover again.")
		}
	case CommitFailed:
		add(critical, HealthFailoverFailed, "the failover could not be committed", "See the commit's job; then commit the failover again, or cancel it.")
	case FailedOver, Committing, Committed, FailedBack, AwaitingReverse:
		add(warning, HealthNotReversed, "the VM is not protected in its present place", "Commit or cancel the failover. After the commit, protect the recovered machine as a new one: reverse protection is later work.")
	}
	if behind {
		rpo := RPO(vm, now)
		switch {
		case rpo > behindLimit:
			add(critical, HealthBehind, fmt.Sprintf("the newest point is %s old", rpo.Round(time.Second)), "See the error below, or give replication more bandwidth.")
		case rpo > AlertThreshold(p):
			add(warning, HealthRPO, fmt.Sprintf("the newest point is %s old, the policy warns above %s", rpo.Round(time.Second), AlertThreshold(p)), "See `landfall events`; check bandwidth and churn.")
		}
		if recent.Due > 0 && recent.Missed*100 > recent.Due*missedPercent {
			add(warning, HealthMissedCycles, fmt.Sprintf("%d of %d cycles were missed within %s", recent.Missed, recent.Due, missedWindow), "Lengthen the copy interval or give replication more bandwidth.")
		}
	}
	if e := vm.GetAppConsistencyError(); e != nil && p.GetAppConsistentInterval() != nil && vm.GetState() == Protected {
		add(warning, HealthAppConsistency, "points are only crash-consistent: "+e.GetWhat(), e.GetAction())
	}
	if b := vm.GetApplyBacklog(); b.GetHigh() && !afterFailover(vm.GetState()) {
		add(warning, HealthBacklog, backlogText(b), adviceOf(typesv1.ErrorReason_ERROR_REASON_APPLY_BACKLOG_HIGH))
	}
	if e := vm.GetApplyError(); e != nil && !afterFailover(vm.GetState()) && e.GetReason() != vm.GetRetry().GetError().GetReason() {
		h := warning
		if r := reasonOf(e); byHand[r] || Classify(r) == ClassFatal { // the next attempt will not get past it by itself
			h = critical
		}
		add(h, e.GetReason(), "points are received and not applied to the replica disks: "+e.GetWhat(), e.GetAction())
	}
	if r := vm.GetRetry(); r.GetAttempt() > 0 && !afterFailover(vm.GetState()) && vm.GetState() != ReplicationError && vm.GetState() != InitialReplicationFailed && vm.GetState() != EnablingFailed {
		h := warning
		if reasonOf(r.GetError()) == typesv1.ErrorReason_ERROR_REASON_HYPERVISOR_UNREACHABLE {
			// Most often the machine is simply off, and then nothing is lost: how far it is behind decides.
		} else if r.GetAttempt() >= int32(len(rungs)) || now.Sub(r.GetFirstFailureTime().AsTime()) > behindLimit {
			h = critical
		}
		reason := HealthCannotSend
		if byHand[reasonOf(r.GetError())] { // the ladder goes on, and will not get past it by itself
			h, reason = critical, r.GetError().GetReason()
		}
		add(h, reason, fmt.Sprintf("attempt %d failed: %s", r.GetAttempt(), r.GetError().GetWhat()), r.GetError().GetAction())
	}
	return worst, append(bad, odd...)
}

// byHand are the refusals of storage that pass only when a person sets something right. Replication is tried again all the
// same, so that nobody has to resume it afterwards.
var byHand = map[typesv1.ErrorReason]bool{
	typesv1.ErrorReason_ERROR_REASON_STORAGE_CREDENTIALS: true,
	typesv1.ErrorReason_ERROR_REASON_STORAGE_PERMISSION:  true,
	typesv1.ErrorReason_ERROR_REASON_STORAGE_CLOCK_SKEW:  true,
}

// adviceOf is what the catalogue says to do.
func adviceOf(reason typesv1.ErrorReason) string {
	entry, _ := errcat.Lookup(reason)
	return entry.Action
}

// suspicionText names the last good point, which is what an operator needs first.
func suspicionText(s *schedulerv1.Suspicion) string {
	text := fmt.Sprintf("point %d of %s changed %s, usual is %s, and hardly compresses; ", s.GetPoint(), clock(s.GetCutTime()),
		bytesText(s.GetSignals().GetChangedBytes()), bytesText(s.GetUsualBytes()))
	if s.GetLastGoodPoint() == 0 {
		return text + "there is no point before it"
	}
	text += fmt.Sprintf("the last good point is %d of %s", s.GetLastGoodPoint(), clock(s.GetLastGoodTime()))
	if !s.GetPinned() {
		text += " (it is not pinned in storage yet)"
	}
	return text
}

func backlogText(b *typesv1.ApplyBacklog) string {
	text := fmt.Sprintf("%s in %d manifests wait to be applied", bytesText(b.GetBytes()), b.GetManifests())
	if b.GetEstimate() != nil {
		text += fmt.Sprintf(": a failover to the newest point waits about %s", b.GetEstimate().AsDuration().Round(time.Second))
	}
	return text
}

func clock(t *timestamppb.Timestamp) string {
	if t == nil {
		return "an unknown time"
	}
	return t.AsTime().UTC().Format("2006-01-02 15:04:05 UTC")
}

// bytesText is a size with a binary unit.
func bytesText(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}

func what(vm *schedulerv1.ProtectedVm, text string) string {
	if e := vm.GetRetry().GetError(); e != nil {
		return text + ": " + e.GetWhat()
	}
	return text
}

func action(vm *schedulerv1.ProtectedVm, text string) string {
	if a := vm.GetRetry().GetError().GetAction(); a != "" {
		return a + " " + text
	}
	return text
}

var resyncTexts = map[typesv1.ResyncReason]string{
	typesv1.ResyncReason_RESYNC_REASON_MANUAL:               "a person asked for it",
	typesv1.ResyncReason_RESYNC_REASON_DISK_CHANGED_OFFLINE: "a disk changed while it was not tracked",
	typesv1.ResyncReason_RESYNC_REASON_LOG_LIMIT:            "the change log reached its limit",
	typesv1.ResyncReason_RESYNC_REASON_LOG_WRITE_FAILED:     "the change log could not be written",
	typesv1.ResyncReason_RESYNC_REASON_TRACKING_BROKEN:      "the change log is damaged",
	typesv1.ResyncReason_RESYNC_REASON_TRACKING_GAP:         "some time passed without tracking",
	typesv1.ResyncReason_RESYNC_REASON_BASE_AHEAD:           "the host's base is newer than the journal",
	typesv1.ResyncReason_RESYNC_REASON_HOST_STATE_LOST:      "the host does not know the protection any more",
	typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST:          "the hypervisor lost its dirty bitmap: it was restarted, or the bitmap was removed",
	typesv1.ResyncReason_RESYNC_REASON_SOURCE_DIVERGED:      "a failover was cancelled and the host holds no base to go on from",
}

func resyncText(r typesv1.ResyncReason) string {
	if t, ok := resyncTexts[r]; ok {
		return t
	}
	return "no reason was recorded"
}
