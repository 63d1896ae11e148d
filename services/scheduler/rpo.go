package scheduler

import (
	"time"

	"github.com/landfall-dr/landfall/libs/policy"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
)

// RPO is the age of the newest received point at now, by the scheduler's clock, which also made the point's cut time:
// what would be lost if the site went now. Without a point it is the age of the protection. Never negative.
func RPO(vm *schedulerv1.ProtectedVm, now time.Time) time.Duration {
	since := vm.GetLastPointTime()
	if since == nil {
		since = vm.GetCreateTime()
	}
	if since == nil {
		return 0
	}
	return max(now.Sub(since.AsTime()), 0)
}

// AlertThreshold is the RPO above which health turns to Warning: the policy's, or five copy intervals and at least
// 15 minutes.
func AlertThreshold(p *schedulerv1.Policy) time.Duration {
	return policy.AlertThreshold(p)
}

// missed counts the cycles that fell due from due up to now, every interval, and says when the first later one is due.
func missed(due, now time.Time, interval time.Duration) (int64, time.Time) {
	if interval <= 0 || now.Before(due) {
		return 0, due
	}
	n := int64(now.Sub(due)/interval) + 1
	return n, due.Add(time.Duration(n) * interval)
}
