package scheduler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/policy"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

type policyServer struct {
	schedulerv1.UnimplementedPolicyServiceServer
	*Service
}

// Bounds of a policy.
const (
	minInterval = time.Second
	maxInterval = 15 * time.Minute
	// A freeze holds the guest's writes: not more often than every minute.
	minAppInterval = time.Minute
	maxAppInterval = 12 * time.Hour
	maxStartAhead  = 7 * 24 * time.Hour
	maxParallel    = 64
	// What Azure takes for a write-once policy is up to 400 years; ten years is more than anybody meant.
	maxKept       = 3660 * 24 * time.Hour
	maxApplyDelay = time.Hour
	minFactor     = 2
	maxFactor     = 1000
)

var policyPattern = regexp.MustCompile(`^policies/[a-z0-9][a-z0-9-]{0,39}$`)

// validatePolicy reports everything that is wrong with a policy at once.
func validatePolicy(p *schedulerv1.Policy, now time.Time) error {
	var fields []errcat.Field
	bad := func(ok bool, path, format string, args ...any) {
		if !ok {
			fields = append(fields, errcat.Field{Path: "policy." + path, Message: fmt.Sprintf(format, args...)})
		}
	}
	bad(policyPattern.MatchString(p.GetName()), "name", "%q is not policies/NAME with up to 40 of a-z, 0-9 and hyphens", p.GetName())
	interval := p.GetCopyInterval().AsDuration()
	bad(interval >= minInterval && interval <= maxInterval, "copy_interval", "%s is not between %s and %s", interval, minInterval, maxInterval)
	validateTiers(p, bad)
	threshold := p.GetRpoAlertThreshold().AsDuration()
	bad(threshold == 0 || threshold >= interval, "rpo_alert_threshold", "%s is below the copy interval %s: it would always alert", threshold, interval)
	bad(p.GetParallelUploads() >= 0 && p.GetParallelUploads() <= maxParallel, "parallel_uploads", "%d is not in 0..%d", p.GetParallelUploads(), maxParallel)
	if app := p.GetAppConsistentInterval(); app != nil {
		d := app.AsDuration()
		bad(d >= minAppInterval && d <= maxAppInterval, "app_consistent_interval", "%s is not between %s and %s", d, minAppInterval, maxAppInterval)
		bad(d >= interval, "app_consistent_interval", "%s is below the copy interval %s", d, interval)
	}
	factor := p.GetSuspicionFactor()
	bad(factor == 0 || factor == policy.SuspicionOff || factor >= minFactor && factor <= maxFactor, "suspicion_factor",
		"%v is not 1 (off) or between %d and %d", factor, minFactor, maxFactor) // NaN is neither
	once := p.GetWriteOnce().AsDuration()
	bad(once >= 0 && once <= maxKept, "write_once", "%s is not between 0s and %s", once, maxKept)
	delay := p.GetApplyDelay().AsDuration()
	bad(delay >= 0 && delay <= maxApplyDelay, "apply_delay", "%s is not between 0s and %s", delay, maxApplyDelay)
	if start := p.GetInitialReplicationStartTime(); start != nil {
		bad(start.AsTime().Sub(now) <= maxStartAhead, "initial_replication_start_time", "is more than 7 days ahead")
	}
	if len(fields) == 0 {
		return nil
	}
	texts := make([]string, len(fields))
	for i, f := range fields {
		texts[i] = strings.TrimPrefix(f.Path, "policy.") + ": " + f.Message
	}
	e := reasonError(typesv1.ErrorReason_ERROR_REASON_POLICY_INVALID, p.GetName(), "%s: %s", p.GetName(), strings.Join(texts, "; "))
	e.Fields = fields
	return e
}

// validateTiers checks how long points are kept: each tier reaches at least as far as the one before.
func validateTiers(p *schedulerv1.Policy, bad func(ok bool, path, format string, args ...any)) {
	all, hourly, kept := p.GetKeepAll().AsDuration(), p.GetKeepHourly().AsDuration(), p.GetRetention().AsDuration()
	fits := true
	for _, tier := range []struct {
		path string
		d    time.Duration
	}{{"retention", kept}, {"keep_all", all}, {"keep_hourly", hourly}} {
		ok := tier.d >= 0 && tier.d <= maxKept
		fits = fits && ok
		bad(ok, tier.path, "%s is not between 0s and %s", tier.d, maxKept)
	}
	if !fits {
		return
	}
	limit := policy.Retention(p)
	said := ""
	if kept == 0 {
		said = " (the default)"
	}
	bad(all <= limit, "keep_all", "%s is above retention, %s%s", all, limit, said)
	bad(hourly <= limit, "keep_hourly", "%s is above retention, %s%s", hourly, limit, said)
	bad(hourly == 0 || all == 0 || hourly >= all, "keep_hourly", "%s is below keep_all, %s: every point is kept until then", hourly, all)
}

// ApplyPolicy creates a policy or replaces its values.
func (s *policyServer) ApplyPolicy(ctx context.Context, r *schedulerv1.ApplyPolicyRequest) (*schedulerv1.ApplyPolicyResponse, error) {
	want := clone(r.GetPolicy())
	if err := validatePolicy(want, s.now()); err != nil {
		return nil, err
	}
	expected := want.GetRevision()
	want.Revision = 0
	key := bus.Key(lastPart(want.GetName()))
	old, rev, err := s.store.policies.Get(ctx, key)
	switch {
	case errors.Is(err, bus.ErrNotFound):
		if expected != 0 {
			return nil, stale(want.GetName(), expected, 0)
		}
	case err != nil:
		return nil, busError(err, "read %s", want.GetName())
	case expected != 0 && expected != rev:
		return nil, stale(want.GetName(), expected, rev)
	}
	policy.Replace(old, want, s.now())
	if r.GetValidateOnly() {
		want.Revision = rev
		return &schedulerv1.ApplyPolicyResponse{Policy: want}, nil
	}
	if old == nil {
		rev, err = s.store.policies.Create(ctx, key, want)
	} else {
		rev, err = s.store.policies.Update(ctx, key, want, rev)
	}
	if err != nil {
		return nil, busError(err, "store %s", want.GetName())
	}
	want.Revision = rev
	return &schedulerv1.ApplyPolicyResponse{Policy: want}, nil
}

func stale(name string, expected, have uint64) error {
	return reasonError(typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION, name, "%s is at revision %d, not at %d", name, have, expected)
}

// GetPolicy reads one.
func (s *policyServer) GetPolicy(ctx context.Context, r *schedulerv1.GetPolicyRequest) (*schedulerv1.GetPolicyResponse, error) {
	p, err := s.store.policy(ctx, r.GetName())
	return &schedulerv1.GetPolicyResponse{Policy: p}, err
}

// ListPolicies reads all, by name.
func (s *policyServer) ListPolicies(ctx context.Context, r *schedulerv1.ListPoliciesRequest) (*schedulerv1.ListPoliciesResponse, error) {
	all, err := s.store.policies.List(ctx, "")
	if err != nil {
		return nil, busError(err, "list policies")
	}
	list := make([]*schedulerv1.Policy, len(all))
	for i, e := range all {
		list[i] = e.Value
		list[i].Revision = e.Revision
	}
	slices.SortFunc(list, func(a, b *schedulerv1.Policy) int { return cmp.Compare(a.GetName(), b.GetName()) })
	out, token, err := page(list, (*schedulerv1.Policy).GetName, ascending, r.GetPageSize(), r.GetPageToken())
	return &schedulerv1.ListPoliciesResponse{Policies: out, NextPageToken: token}, err
}

// DeletePolicy removes one that no VM uses.
func (s *policyServer) DeletePolicy(ctx context.Context, r *schedulerv1.DeletePolicyRequest) (*schedulerv1.DeletePolicyResponse, error) {
	p, err := s.store.policy(ctx, r.GetName())
	if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_POLICY_NOT_FOUND) {
		s.forgetPolicy(ctx, r.GetName())
		return &schedulerv1.DeletePolicyResponse{}, nil
	} else if err != nil {
		return nil, err
	}
	all, err := s.store.vms.List(ctx, "")
	if err != nil {
		return nil, busError(err, "list the records")
	}
	for _, e := range all {
		if e.Value.GetPolicy() == p.GetName() {
			return nil, reasonError(typesv1.ErrorReason_ERROR_REASON_POLICY_IN_USE, p.GetName(), "%s is used by %s", p.GetName(), e.Value.GetName()).With("vm", e.Value.GetName())
		}
	}
	if err := s.store.policies.Delete(ctx, bus.Key(lastPart(p.GetName())), p.GetRevision()); err != nil {
		return nil, busError(err, "delete %s", p.GetName())
	}
	return &schedulerv1.DeletePolicyResponse{}, nil
}
