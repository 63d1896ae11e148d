package scheduler

import (
	"context"
	"errors"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// EnableProtection checks, stores record and job, and answers; the reconciler does the rest.
func (s *protectionServer) EnableProtection(ctx context.Context, r *schedulerv1.EnableProtectionRequest) (*schedulerv1.EnableProtectionResponse, error) {
	policy, err := s.store.policy(ctx, r.GetPolicy())
	if err != nil {
		return nil, err
	}
	if job, err := s.alreadyEnabled(ctx, r.GetVm(), r.GetRequestId()); err != nil || job != nil {
		return &schedulerv1.EnableProtectionResponse{Job: job}, err
	}
	hit, err := s.machine(ctx, r.GetVm())
	if err != nil {
		return nil, err
	}
	name := vmName(siteOf(hit.host), hit.machine.GetId())
	// Once more by the id: the name may have been a display name, and another host may protect that id.
	if job, err := s.alreadyEnabled(ctx, name, r.GetRequestId()); err != nil || job != nil {
		return &schedulerv1.EnableProtectionResponse{Job: job}, err
	}
	findings, err := s.findings(ctx, hit)
	if err != nil {
		return nil, err
	}
	if err := findingsError(name, findings); err != nil {
		return nil, err
	}
	if err := s.canBeWriteOnce(policy); err != nil {
		return nil, err
	}
	if r.GetValidateOnly() {
		return &schedulerv1.EnableProtectionResponse{Findings: findings}, nil
	}
	job := newJob(typesv1.JobKind_JOB_KIND_ENABLE_PROTECTION, name, r.GetRequestId(), caller(ctx), s.now())
	if err := s.jobs.create(ctx, job); err != nil {
		return nil, err
	}
	if err := s.storeProtection(ctx, name, hit, policy, job); err != nil {
		s.jobs.remove(context.WithoutCancel(ctx), job)
		if errors.Is(err, bus.ErrExists) || errors.Is(err, bus.ErrRevision) { // the same request was faster elsewhere, or another
			job, ferr := s.alreadyEnabled(ctx, name, r.GetRequestId())
			if ferr != nil || job != nil {
				return &schedulerv1.EnableProtectionResponse{Job: job, Findings: findings}, ferr
			}
		}
		return nil, busError(err, "store the record of %s", name)
	}
	return &schedulerv1.EnableProtectionResponse{Job: job, Findings: findings}, nil
}

// alreadyEnabled finds the job of the same request, or refuses a VM that has a record. A record whose enabling failed
// stands in nobody's way.
func (s *Service) alreadyEnabled(ctx context.Context, name, requestID string) (*typesv1.Job, error) {
	_, rec, _, ok, err := s.record(ctx, name)
	if err != nil || !ok {
		return nil, err
	}
	job, err := s.jobs.find(ctx, typesv1.JobKind_JOB_KIND_ENABLE_PROTECTION, rec.GetName(), requestID)
	if err != nil || job != nil || rec.GetState() == EnablingFailed {
		return job, err
	}
	return nil, reasonError(typesv1.ErrorReason_ERROR_REASON_ALREADY_PROTECTED, rec.GetName(), "%s (%s) is protected already, on host %s, and is %s",
		rec.GetName(), rec.GetDisplayName(), lastPart(rec.GetHost()), StateName(rec.GetState())).With("host", rec.GetHost()).With("state", StateName(rec.GetState()))
}

func (s *Service) findings(ctx context.Context, hit found) ([]*hostproviderv1.Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.CallTimeout)
	defer cancel()
	host, err := s.hostClient(ctx, hit.host)
	if err != nil {
		return nil, err
	}
	resp, err := host.CheckPrerequisites(ctx, &hostproviderv1.CheckPrerequisitesRequest{Vm: hit.machine.GetId()})
	return resp.GetFindings(), err
}

// storeProtection writes the record of a new protection, in place of one whose enabling failed.
func (s *Service) storeProtection(ctx context.Context, name string, hit found, policy *schedulerv1.Policy, job *typesv1.Job) error {
	now := timestamppb.New(s.now())
	rec := &schedulerv1.ProtectedVm{
		Name: name, DisplayName: hit.machine.GetDisplayName(), Host: hit.host, Policy: policy.GetName(), Lineage: newLineage(uuid.NewString),
		State: EnablingProtection, Health: typesv1.Health_HEALTH_NOT_APPLICABLE, ActiveLocation: typesv1.ActiveLocation_ACTIVE_LOCATION_PRIMARY,
		Epoch: 1, NextOrdinal: 1, CurrentJob: job.GetName(), EnableJob: job.GetName(), Counters: &schedulerv1.ReplicationCounters{},
		CreateTime: now, UpdateTime: now,
	}
	key := vmKey(siteOf(name), lastPart(name))
	old, rev, err := s.store.vms.Get(ctx, key)
	switch {
	case errors.Is(err, bus.ErrNotFound):
		rev, err = s.store.vms.Create(ctx, key, rec)
	case err != nil:
		return err
	case old.GetState() != EnablingFailed:
		return bus.ErrExists
	default:
		rec.Epoch = old.GetEpoch() + 1
		if reasonOf(old.GetRetry().GetError()) == typesv1.ErrorReason_ERROR_REASON_STORAGE_NOT_WRITE_ONCE {
			// Somebody was told to set a policy on that lineage's container. It is empty: nothing is shipped before enabling ends.
			rec.Lineage = old.GetLineage()
		}
		rev, err = s.store.vms.Update(ctx, key, rec, rev)
	}
	if err == nil {
		from := Unprotected
		if old != nil {
			from = old.GetState()
		}
		s.jobs.announceState(ctx, rec, rev, from, EvEnable, job.GetName())
	}
	return err
}
