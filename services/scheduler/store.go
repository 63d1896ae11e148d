package scheduler

import (
	"context"
	"errors"
	"fmt"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	failoverorchestratorv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// store is the state behind the service: its own buckets vms, policies, sites and its jobs; hosts and failovers belong to
// others and are only read.
type store struct {
	vms       *bus.KV[*schedulerv1.ProtectedVm]
	policies  *bus.KV[*schedulerv1.Policy]
	sites     *bus.KV[*schedulerv1.SiteBandwidth]
	jobs      *bus.KV[*typesv1.Job]
	hosts     *bus.KV[*hostproviderv1.Host]
	failovers *bus.KV[*failoverorchestratorv1.Failover]
}

func openStore(ctx context.Context, b *bus.Bus) (*store, error) {
	var s store
	var err error
	if s.vms, err = bus.OpenKV[*schedulerv1.ProtectedVm](ctx, b, bus.BucketVMs); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if s.policies, err = bus.OpenKV[*schedulerv1.Policy](ctx, b, bus.BucketPolicies); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if s.sites, err = bus.OpenKV[*schedulerv1.SiteBandwidth](ctx, b, bus.BucketSites); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if s.jobs, err = bus.OpenKV[*typesv1.Job](ctx, b, bus.BucketJobs); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if s.hosts, err = bus.OpenKV[*hostproviderv1.Host](ctx, b, bus.BucketHosts); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	if s.failovers, err = bus.OpenKV[*failoverorchestratorv1.Failover](ctx, b, bus.BucketFailovers); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	return &s, nil
}

// busError gives an error of the bus the reason that a caller sees.
func busError(err error, format string, args ...any) error {
	reason := typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE
	switch {
	case errors.Is(err, bus.ErrRevision), errors.Is(err, bus.ErrExists):
		reason = typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION
	case errors.Is(err, bus.ErrVersion):
		reason = typesv1.ErrorReason_ERROR_REASON_INTERNAL
	case errors.Is(err, bus.ErrName):
		reason = typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT
	}
	if r := errcat.Reason(err); r != typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		reason = r
	}
	return errcat.Wrap(reason, err, format, args...)
}

// policy reads a policy by its resource name.
func (s *store) policy(ctx context.Context, name string) (*schedulerv1.Policy, error) {
	p, rev, err := s.policies.Get(ctx, bus.Key(lastPart(name)))
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_POLICY_NOT_FOUND, "no policy is named %q", name).With("policy", name)
	case err != nil:
		return nil, busError(err, "read policy %s", name)
	}
	p.Revision = rev
	return p, nil
}

// testFailover is the state of the VM's test failover, which the orchestrator runs beside the VM's own state.
func (s *store) testFailover(ctx context.Context, name string) (typesv1.TestFailoverState, error) {
	none := typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE
	all, err := s.failovers.List(ctx, "")
	if err != nil {
		return none, busError(err, "read failovers")
	}
	for _, f := range all {
		switch state := f.Value.GetState(); {
		case f.Value.GetVm() != name, takesOver(f.Value):
		case state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_UNSPECIFIED, state == none,
			state == typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED:
		default:
			return state, nil
		}
	}
	return none, nil
}
