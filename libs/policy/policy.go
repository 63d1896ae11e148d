// Package policy says what a replication policy means where it says nothing. A policy is stored as it was written
// (landfall.scheduler.v1.Policy): an absent value stays absent, so that a later default holds for it. Whoever acts by a
// policy, or shows one, asks here.
package policy

import (
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

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

// ShorteningGrace is for how long retention still goes by the longer tiers after a policy was made to keep less.
const ShorteningGrace = 24 * time.Hour

// Tiers are how long points are kept by the policy's own values.
func Tiers(p *schedulerv1.Policy) *schedulerv1.RetentionTiers {
	return tiers(KeepAll(p), KeepHourly(p), Retention(p))
}

func tiers(all, hourly, limit time.Duration) *schedulerv1.RetentionTiers {
	return &schedulerv1.RetentionTiers{KeepAll: durationpb.New(all), KeepHourly: durationpb.New(hourly), Retention: durationpb.New(limit)}
}

// TiersAt are what retention goes by at an instant: the policy's, or the longer ones of before while a shortening is young.
func TiersAt(p *schedulerv1.Policy, now time.Time) *schedulerv1.RetentionTiers {
	before := p.GetKeptBefore()
	if before == nil || !now.Before(p.GetShortenedTime().AsTime().Add(ShorteningGrace)) {
		return Tiers(p)
	}
	return longer(Tiers(p), before)
}

func longer(a, b *schedulerv1.RetentionTiers) *schedulerv1.RetentionTiers {
	return tiers(max(a.GetKeepAll().AsDuration(), b.GetKeepAll().AsDuration()),
		max(a.GetKeepHourly().AsDuration(), b.GetKeepHourly().AsDuration()), max(a.GetRetention().AsDuration(), b.GetRetention().AsDuration()))
}

// Replace fills the output-only fields of a policy that takes the place of old (nil: none) now.
func Replace(old, p *schedulerv1.Policy, now time.Time) {
	p.KeptBefore, p.ShortenedTime = nil, nil
	if old == nil {
		return
	}
	held := TiersAt(old, now)
	if proto.Equal(longer(held, Tiers(p)), Tiers(p)) {
		return // nothing is kept for less long than retention went by until now
	}
	p.KeptBefore, p.ShortenedTime = held, timestamppb.New(now)
	if proto.Equal(Tiers(old), Tiers(p)) { // other values changed: the grace does not begin again
		p.ShortenedTime = old.GetShortenedTime()
	}
}
