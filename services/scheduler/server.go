package scheduler

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/rpc"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

type protectionServer struct {
	schedulerv1.UnimplementedProtectionServiceServer
	*Service
}

// present is a record as callers see it: with its revision and RPO.
func (s *Service) present(rec *schedulerv1.ProtectedVm, rev uint64) *schedulerv1.ProtectedVm {
	rec.Revision = rev
	rec.Rpo = nil
	if rec.GetLastPoint() != 0 {
		rec.Rpo = durationpb.New(RPO(rec, s.now()))
	}
	return rec
}

// caller is who asks, as jobs keep it.
func caller(ctx context.Context) string {
	if p, ok := rpc.PeerFrom(ctx); ok {
		return p.String()
	}
	return ""
}

// ListHosts lists registered hosts.
func (s *protectionServer) ListHosts(ctx context.Context, _ *schedulerv1.ListHostsRequest) (*schedulerv1.ListHostsResponse, error) {
	hosts, err := s.registered(ctx, "")
	return &schedulerv1.ListHostsResponse{Hosts: hosts}, err
}

// ListVms lists the machines of all hosts with their states.
func (s *protectionServer) ListVms(ctx context.Context, _ *schedulerv1.ListVmsRequest) (*schedulerv1.ListVmsResponse, error) {
	hosts, err := s.registered(ctx, "")
	if err != nil {
		return nil, err
	}
	records, err := s.store.vms.List(ctx, "")
	if err != nil {
		return nil, busError(err, "list the records")
	}
	states := map[string]State{}
	for _, e := range records {
		states[e.Value.GetName()] = e.Value.GetState()
	}
	out := &schedulerv1.ListVmsResponse{}
	var mu sync.Mutex
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(askAtOnce)
	for _, h := range hosts {
		group.Go(func() error {
			list, problems, err := s.machines(gctx, h.GetName())
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				out.UnreachableHosts = append(out.UnreachableHosts, h.GetName())
				return nil
			}
			out.Problems = append(out.Problems, problems...)
			for _, m := range list {
				state, ok := states[m.GetName()]
				if !ok {
					state = Unprotected
				}
				out.Vms = append(out.Vms, &schedulerv1.VmSummary{Machine: m, State: state})
			}
			return nil
		})
	}
	_ = group.Wait() // the functions return nil
	slices.Sort(out.UnreachableHosts)
	slices.SortFunc(out.Vms, func(a, b *schedulerv1.VmSummary) int {
		return cmp.Or(cmp.Compare(a.GetMachine().GetDisplayName(), b.GetMachine().GetDisplayName()), cmp.Compare(a.GetMachine().GetName(), b.GetMachine().GetName()))
	})
	return out, nil
}

// GetProtectedVm reads one record.
func (s *protectionServer) GetProtectedVm(ctx context.Context, r *schedulerv1.GetProtectedVmRequest) (*schedulerv1.GetProtectedVmResponse, error) {
	_, rec, rev, err := s.mustRecord(ctx, r.GetVm())
	if err != nil {
		return nil, err
	}
	return &schedulerv1.GetProtectedVmResponse{Vm: s.present(rec, rev)}, nil
}

// ListProtectedVms reads all records, by name.
func (s *protectionServer) ListProtectedVms(ctx context.Context, r *schedulerv1.ListProtectedVmsRequest) (*schedulerv1.ListProtectedVmsResponse, error) {
	all, err := s.store.vms.List(ctx, "")
	if err != nil {
		return nil, busError(err, "list the records")
	}
	vms := make([]*schedulerv1.ProtectedVm, len(all))
	for i, e := range all {
		vms[i] = s.present(e.Value, e.Revision)
	}
	slices.SortFunc(vms, func(a, b *schedulerv1.ProtectedVm) int { return cmp.Compare(a.GetName(), b.GetName()) })
	out, token, err := page(vms, (*schedulerv1.ProtectedVm).GetName, ascending, r.GetPageSize(), r.GetPageToken())
	return &schedulerv1.ListProtectedVmsResponse{Vms: out, NextPageToken: token}, err
}

// WatchProtectedVms sends the present records and then every change.
func (s *protectionServer) WatchProtectedVms(r *schedulerv1.WatchProtectedVmsRequest, stream grpc.ServerStreamingServer[schedulerv1.WatchProtectedVmsResponse]) error {
	filter := ""
	if r.GetVm() != "" {
		key, _, _, err := s.mustRecord(stream.Context(), r.GetVm())
		if err != nil {
			return err
		}
		filter = key
	}
	for u, err := range s.store.vms.Watch(stream.Context(), filter) {
		if err != nil {
			return busError(err, "watch the records")
		}
		resp := &schedulerv1.WatchProtectedVmsResponse{}
		switch u.Kind {
		case bus.Put:
			resp.Vm = s.present(u.Value, u.Revision)
		case bus.Deleted:
			parts, err := bus.KeyParts(u.Key)
			if err != nil || len(parts) != 2 {
				continue
			}
			resp.Vm, resp.Deleted = &schedulerv1.ProtectedVm{Name: vmName(parts[0], parts[1]), State: Unprotected, Revision: u.Revision}, true
		default:
			continue
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
	return nil
}

// change edits a record by an action of a person, if the action is legal now. edit sees the record as stored and moves
// it; bus.NoChange means that it is as wanted already.
func (s *Service) change(ctx context.Context, name string, act Action, edit func(rec *schedulerv1.ProtectedVm) (Event, error)) (*schedulerv1.ProtectedVm, error) {
	key, rec, _, err := s.mustRecord(ctx, name)
	if err != nil {
		return nil, err
	}
	test := typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE
	if duringTest[act] {
		if test, err = s.store.testFailover(ctx, rec.GetName()); err != nil {
			return nil, err
		}
	}
	var from State
	var event Event
	rec, rev, err := s.store.vms.Mutate(ctx, key, func(rec *schedulerv1.ProtectedVm) error {
		from = rec.GetState()
		var err error
		if event, err = edit(rec); err != nil {
			return err
		}
		if Allowed(from, typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE, act) == Refused {
			return invalidState(&schedulerv1.ProtectedVm{Name: rec.GetName(), State: from}, act)
		}
		if Allowed(from, test, act) == Refused {
			return testActive(rec.GetName(), test, act)
		}
		to, _, err := Next(from, event)
		if err != nil {
			return stateError(rec.GetName(), from, act)
		}
		rec.State, rec.UpdateTime = to, timestamppb.New(s.now())
		return nil
	})
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return nil, notProtectedAnyMore(name)
	case err != nil:
		if known := (*errcat.Error)(nil); errors.As(err, &known) {
			return nil, known // what edit said, without the words of the store around it
		}
		return nil, busError(err, "%s of %s", act, name)
	}
	if rec.GetState() != from {
		s.jobs.announceState(ctx, rec, rev, from, event, rec.GetCurrentJob())
	}
	return s.present(rec, rev), nil
}

// PauseReplication stops cycles; the tracker goes on.
func (s *protectionServer) PauseReplication(ctx context.Context, r *schedulerv1.PauseReplicationRequest) (*schedulerv1.PauseReplicationResponse, error) {
	rec, err := s.change(ctx, r.GetVm(), ActPause, func(rec *schedulerv1.ProtectedVm) (Event, error) {
		switch rec.GetState() {
		case Paused, InitialReplicationPaused, ResyncPaused:
			return "", bus.NoChange
		}
		rec.PausedFrom = rec.GetState()
		return EvPause, nil
	})
	return &schedulerv1.PauseReplicationResponse{Vm: rec}, err
}

// ResumeReplication starts cycles again.
func (s *protectionServer) ResumeReplication(ctx context.Context, r *schedulerv1.ResumeReplicationRequest) (*schedulerv1.ResumeReplicationResponse, error) {
	if _, rec, _, err := s.mustRecord(ctx, r.GetVm()); err != nil {
		return nil, err
	} else if rec.GetState() == ResyncRequired { // to resume is to compare
		if _, err := s.Resynchronize(ctx, &schedulerv1.ResynchronizeRequest{Vm: r.GetVm()}); err != nil {
			return nil, err
		}
		_, rec, rev, err := s.mustRecord(ctx, r.GetVm())
		if err != nil {
			return nil, err
		}
		return &schedulerv1.ResumeReplicationResponse{Vm: s.present(rec, rev)}, nil
	}
	rec, err := s.change(ctx, r.GetVm(), ActResume, func(rec *schedulerv1.ProtectedVm) (Event, error) {
		now := timestamppb.New(s.now())
		lost := rec.GetResyncReason() != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED
		switch rec.GetState() {
		case Protected, InitialReplicating, Resynchronizing, FinalizingProtection:
			return "", bus.NoChange
		case ReadyForInitialReplication, ResyncPaused:
		case InitialReplicationPaused, InitialReplicationFailed:
			rec.CurrentJob = rec.GetEnableJob()
		case Paused, ReplicationError:
			rec.NextCycleTime = now
			if lost {
				rec.Cycle, rec.Pass, rec.Retry = nil, nil, nil
				rec.Epoch++
				return EvBaselineLost, nil
			}
		}
		rec.Retry, rec.PausedFrom = nil, typesv1.ProtectionState_PROTECTION_STATE_UNSPECIFIED
		return EvResume, nil
	})
	return &schedulerv1.ResumeReplicationResponse{Vm: rec}, err
}

// Resynchronize compares source and target now.
func (s *protectionServer) Resynchronize(ctx context.Context, r *schedulerv1.ResynchronizeRequest) (*schedulerv1.ResynchronizeResponse, error) {
	_, rec, _, err := s.mustRecord(ctx, r.GetVm())
	if err != nil {
		return nil, err
	}
	kind := typesv1.JobKind_JOB_KIND_RESYNCHRONIZE
	if job, err := s.jobs.find(ctx, kind, rec.GetName(), r.GetRequestId()); err != nil || job != nil {
		return &schedulerv1.ResynchronizeResponse{Job: job}, err
	}
	job := newJob(kind, rec.GetName(), r.GetRequestId(), caller(ctx), s.now())
	if err := s.jobs.create(ctx, job); err != nil {
		return nil, err
	}
	paused := ""
	_, err = s.change(ctx, rec.GetName(), ActResync, func(rec *schedulerv1.ProtectedVm) (Event, error) {
		paused = ""
		if rec.GetState() == ResyncPaused { // goes on with the job that it has
			paused = rec.GetCurrentJob()
			rec.Retry = nil
			return EvResync, nil
		}
		if held := rec.GetCurrentJob(); held != "" && Allowed(rec.GetState(), 0, ActResync) != Refused {
			return "", jobHeld(rec.GetName(), held)
		}
		enterResync(rec, job.GetName())
		return EvResync, nil
	})
	if err != nil || paused != "" {
		s.jobs.remove(context.WithoutCancel(ctx), job) // it never became one; the bus bounds the call
	}
	if err == nil && paused != "" {
		job, err = s.getJob(ctx, paused)
	}
	if err != nil {
		return nil, err
	}
	return &schedulerv1.ResynchronizeResponse{Job: job}, nil
}

func jobHeld(vm, job string) error {
	return reasonError(typesv1.ErrorReason_ERROR_REASON_JOB_IN_PROGRESS, vm, "%s is held by %s", vm, job).With("job", job)
}

// DisableProtection ends protection; the replica is kept.
func (s *protectionServer) DisableProtection(ctx context.Context, r *schedulerv1.DisableProtectionRequest) (*schedulerv1.DisableProtectionResponse, error) {
	kind := typesv1.JobKind_JOB_KIND_DISABLE_PROTECTION
	_, rec, _, err := s.mustRecord(ctx, r.GetVm())
	if err != nil {
		if job := s.endedDisable(ctx, r); job != nil {
			return &schedulerv1.DisableProtectionResponse{Job: job}, nil
		}
		return nil, err
	}
	if job, err := s.jobs.find(ctx, kind, rec.GetName(), r.GetRequestId()); err != nil || job != nil {
		return &schedulerv1.DisableProtectionResponse{Job: job}, err
	}
	job := newJob(kind, rec.GetName(), r.GetRequestId(), caller(ctx), s.now())
	if err := s.jobs.create(ctx, job); err != nil {
		return nil, err
	}
	held := ""
	_, err = s.change(ctx, rec.GetName(), ActDisable, func(rec *schedulerv1.ProtectedVm) (Event, error) {
		held = rec.GetCurrentJob()
		rec.Epoch++
		rec.Cycle, rec.Pass, rec.Retry = nil, nil, nil
		rec.CurrentJob, rec.ForceDisable = job.GetName(), r.GetForce()
		return EvDisable, nil
	})
	if err != nil {
		s.jobs.remove(context.WithoutCancel(ctx), job)
		return nil, err
	}
	if held != "" {
		if err := s.jobs.cancel(ctx, held, "protection is being ended"); err != nil {
			s.log.WarnContext(ctx, "job not cancelled", "job", held, "error", err)
		}
	}
	return &schedulerv1.DisableProtectionResponse{Job: job}, nil
}

// endedDisable finds the job of a request whose record is gone already.
func (s *Service) endedDisable(ctx context.Context, r *schedulerv1.DisableProtectionRequest) *typesv1.Job {
	site, vm, err := splitVM(r.GetVm())
	if err != nil || site == "" {
		return nil
	}
	job, err := s.jobs.find(ctx, typesv1.JobKind_JOB_KIND_DISABLE_PROTECTION, vmName(site, vm), r.GetRequestId())
	if err != nil {
		return nil
	}
	return job
}

// newLineage is a fresh lineage id.
func newLineage(id func() string) string { return strings.ReplaceAll(id(), "-", "") }

// clone is a deep copy.
func clone[T proto.Message](m T) T { return proto.Clone(m).(T) }
