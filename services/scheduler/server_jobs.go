package scheduler

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

type jobServer struct {
	schedulerv1.UnimplementedJobServiceServer
	*Service
}

type eventServer struct {
	schedulerv1.UnimplementedEventServiceServer
	*Service
}

func jobNotFound(name string) error {
	return reasonError(typesv1.ErrorReason_ERROR_REASON_JOB_NOT_FOUND, name, "no job is named %q", name)
}

// getJob reads a job of any service.
func (s *Service) getJob(ctx context.Context, name string) (*typesv1.Job, error) {
	job, rev, err := s.store.jobs.Get(ctx, bus.Key(lastPart(name)))
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return nil, jobNotFound(name)
	case err != nil:
		return nil, busError(err, "read %s", name)
	}
	job.Revision = rev
	return job, nil
}

// GetJob reads one.
func (s *jobServer) GetJob(ctx context.Context, r *schedulerv1.GetJobRequest) (*schedulerv1.GetJobResponse, error) {
	job, err := s.getJob(ctx, r.GetName())
	return &schedulerv1.GetJobResponse{Job: job}, err
}

// ListJobs reads jobs, newest first: ids sort by creation.
func (s *jobServer) ListJobs(ctx context.Context, r *schedulerv1.ListJobsRequest) (*schedulerv1.ListJobsResponse, error) {
	all, err := s.store.jobs.List(ctx, "")
	if err != nil {
		return nil, busError(err, "list jobs")
	}
	target := r.GetTarget()
	if target != "" {
		if _, rec, _, ok, err := s.record(ctx, target); err == nil && ok {
			target = rec.GetName()
		}
	}
	var jobs []*typesv1.Job
	for _, e := range all {
		if target != "" && e.Value.GetTarget() != target {
			continue
		}
		e.Value.Revision = e.Revision
		jobs = append(jobs, e.Value)
	}
	slices.SortFunc(jobs, func(a, b *typesv1.Job) int { return cmp.Compare(b.GetName(), a.GetName()) })
	out, token, err := page(jobs, (*typesv1.Job).GetName, descending, r.GetPageSize(), r.GetPageToken())
	return &schedulerv1.ListJobsResponse{Jobs: out, NextPageToken: token}, err
}

// WatchJob sends the job and then every change until it has ended.
func (s *jobServer) WatchJob(r *schedulerv1.WatchJobRequest, stream grpc.ServerStreamingServer[schedulerv1.WatchJobResponse]) error {
	seen := false
	for u, err := range s.store.jobs.Watch(stream.Context(), bus.Key(lastPart(r.GetName()))) {
		if err != nil {
			return busError(err, "watch %s", r.GetName())
		}
		switch u.Kind {
		case bus.Put:
			seen = true
			u.Value.Revision = u.Revision
			if err := stream.Send(&schedulerv1.WatchJobResponse{Job: u.Value}); err != nil {
				return err
			}
			if jobEnded(u.Value) {
				return nil
			}
		case bus.Deleted:
			return jobNotFound(r.GetName())
		case bus.Current:
			if !seen {
				return jobNotFound(r.GetName())
			}
		}
	}
	return nil
}

// quietEnd is how long the event stream may be silent before a call that does not follow ends: what is stored comes at
// once.
const quietEnd = 500 * time.Millisecond

// errEnd ends a subscription from inside.
var errEnd = errors.New("end of events")

// WatchEvents sends stored events, then new ones while follow is set.
func (s *eventServer) WatchEvents(r *schedulerv1.WatchEventsRequest, stream grpc.ServerStreamingServer[schedulerv1.WatchEventsResponse]) error {
	filter := bus.Filter{}
	if r.GetVm() != "" {
		site, vm, err := splitVM(r.GetVm())
		if err != nil {
			return err
		}
		if _, rec, _, ok, err := s.record(stream.Context(), r.GetVm()); err == nil && ok {
			site, vm = siteOf(rec.GetName()), lastPart(rec.GetName())
		}
		filter.Site, filter.VM = site, strings.ToLower(vm)
	}
	sub := bus.Subscription{Start: bus.FromFirst}
	if filter != (bus.Filter{}) {
		sub.Filters = []bus.Filter{filter}
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	var idle *time.Timer
	if !r.GetFollow() {
		idle = time.AfterFunc(2*quietEnd, func() { cancel(errEnd) })
		defer idle.Stop()
	}
	opened := timestamppb.New(s.now())
	err := s.bus.Subscribe(ctx, sub, func(_ context.Context, e *bus.Received) error {
		if idle != nil {
			idle.Reset(quietEnd)
			if e.Time.After(opened.AsTime().Add(time.Second)) {
				return errEnd // published after the call: the stored ones are through
			}
		}
		if e.Sequence < r.GetFromSequence() {
			return nil
		}
		return stream.Send(&schedulerv1.WatchEventsResponse{
			Sequence: e.Sequence, Id: e.ID, Type: e.Type, Subject: e.Subject, Time: timestamppb.New(e.Time), Payload: string(e.JSON()),
		})
	})
	switch {
	case err == nil, errors.Is(err, errEnd):
		return nil
	case errors.Is(err, bus.ErrName):
		return reasonError(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, r.GetVm(), "%q cannot be the VM of an event", r.GetVm())
	}
	return busError(err, "watch events")
}
