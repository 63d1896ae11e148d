// Package policy says what a replication policy means where it says nothing. A policy is stored as it was written
// (landfall.scheduler.v1.Policy): an absent value stays absent, so that a later default holds for it. Whoever acts by a
// policy, or shows one, asks here.
package policy

import (
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

// What absent values mean.
const (
	// DefaultRetention is how long points are kept at all.
	DefaultRetention = 24 * time.Hour
	// DefaultKeepAll is how long every point is kept, where retention is not shorter.
	DefaultKeepAll = 4 * time.Hour
	// DefaultKeepHourly is how long one point an hour is kept, where retention is not shorter.
	DefaultKeepHourly = 48 * time.Hour
	// DefaultSuspicionFactor is how many times the usual unique churn is suspicious.
	DefaultSuspicionFactor = 5
	// SuspicionOff is the factor that turns suspicion off.
	SuspicionOff = 1
	// alertFloor is the least RPO that alerts by default, alertIntervals the number of copy intervals.
	alertFloor     = 15 * time.Minute
	alertIntervals = 5
	// defaultParallel is how many uploaders may work on one VM at once.
	defaultParallel = 4
)

func or(d *durationpb.Duration, def time.Duration) time.Duration {
	if v := d.AsDuration(); v > 0 {
		return v
	}
	return def
}

// Retention is how long points are kept at all, one a day at the end.
func Retention(p *schedulerv1.Policy) time.Duration { return or(p.GetRetention(), DefaultRetention) }

// KeepAll is how long every point is kept; never longer than Retention.
func KeepAll(p *schedulerv1.Policy) time.Duration {
	return min(or(p.GetKeepAll(), DefaultKeepAll), Retention(p))
}

// KeepHourly is how long one point an hour is kept; never longer than Retention, never shorter than KeepAll.
func KeepHourly(p *schedulerv1.Policy) time.Duration {
	return max(min(or(p.GetKeepHourly(), DefaultKeepHourly), Retention(p)), KeepAll(p))
}

// SuspicionFactor is how many times the usual unique churn makes a point suspect; SuspicionOff never.
func SuspicionFactor(p *schedulerv1.Policy) float64 {
	if f := p.GetSuspicionFactor(); f > 0 {
		return f
	}
	return DefaultSuspicionFactor
}

// AlertThreshold is the RPO above which health turns to warning: the policy's, or five copy intervals and at least 15
// minutes.
func AlertThreshold(p *schedulerv1.Policy) time.Duration {
	return or(p.GetRpoAlertThreshold(), max(alertIntervals*p.GetCopyInterval().AsDuration(), alertFloor))
}

// ParallelUploads is how many uploaders may work on one VM at once.
func ParallelUploads(p *schedulerv1.Policy) int {
	if n := p.GetParallelUploads(); n > 0 {
		return int(n)
	}
	return defaultParallel
}
