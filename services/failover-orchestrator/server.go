package failoverorchestrator

import (
	"cmp"
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/rpc"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	"github.com/landfall-dr/landfall/services/failover-orchestrator/target"
)

// requests is the name space of failover ids made from request ids, so that a repeated request finds its failover.
var requests = uuid.MustParse("5d0a0f0e-2d0c-4a39-9f5e-7c1c6a1c5b11")

type server struct {
	failoverv1.UnimplementedFailoverServiceServer
	s *Service
}

// testable are the states in which a test failover is legal (domain: legal actions).
var testable = []typesv1.ProtectionState{
	typesv1.ProtectionState_PROTECTION_STATE_PROTECTED, typesv1.ProtectionState_PROTECTION_STATE_PAUSED,
	typesv1.ProtectionState_PROTECTION_STATE_REPLICATION_ERROR, typesv1.ProtectionState_PROTECTION_STATE_RESYNC_REQUIRED,
}

func (h *server) StartTestFailover(ctx context.Context, r *failoverv1.StartTestFailoverRequest) (*failoverv1.StartTestFailoverResponse, error) {
	t, err := h.s.target(r.Target)
	if err != nil {
		return nil, err
	}
	vm, err := h.s.findVM(ctx, r.Vm)
	if err != nil {
		return nil, err
	}
	id := uuid.Must(uuid.NewV7()).String()
	if r.RequestId != "" && !r.ValidateOnly {
		id = uuid.NewSHA1(requests, []byte(vm.Name+"\x00"+r.RequestId)).String()
		if f, _, err := h.s.failovers.Get(ctx, bus.Key(id)); err == nil {
			return h.started(ctx, f, r.RequestId)
		} else if !errors.Is(err, bus.ErrNotFound) {
			return nil, storeError(err)
		}
	}
	if !slices.Contains(testable, vm.State) {
		return nil, illegal("a test failover", vm)
	}
	if err := h.nothingActive(ctx, vm, true); err != nil {
		return nil, err
	}
	point, machine, err := h.point(ctx, vm, r.Point)
	if err != nil {
		return nil, err
	}
	f := &failoverv1.Failover{
		Name: "failovers/" + id, Vm: vm.Name, Lineage: vm.Lineage, State: typesv1.TestFailoverState_TEST_FAILOVER_STATE_STARTING,
		Kind: failoverv1.FailoverKind_FAILOVER_KIND_TEST, Selector: r.Point,
		Point: uint64(point.Ordinal), CutTime: timestamppb.New(point.CutTime), Target: r.Target, OutDir: filepath.Clean(r.OutDir), Qemu: r.Qemu,
		Job: "jobs/" + uuid.Must(uuid.NewV7()).String(), CreateTime: timestamppb.New(h.s.deps.Clock()), Machine: machine,
	}
	if _, err := t.Check(ctx, checkPlan(f, r.OutDir)); err != nil {
		return nil, err
	}
	if r.ValidateOnly {
		return &failoverv1.StartTestFailoverResponse{}, nil
	}
	rev, err := h.s.failovers.Create(ctx, bus.Key(id), f)
	if errors.Is(err, bus.ErrExists) { // the same request, twice at once
		if f, _, err = h.s.failovers.Get(ctx, bus.Key(id)); err != nil {
			return nil, storeError(err)
		}
		return h.started(ctx, f, r.RequestId)
	}
	if err != nil {
		return nil, storeError(err)
	}
	// Two requests may have passed the look at what is active together. If this process dies here, the step
	// check-target finds it out.
	if other, err := h.s.rival(ctx, f); err == nil && other != nil {
		if err := h.s.failovers.Delete(ctx, bus.Key(id), rev); err == nil {
			return nil, testActive(vm.DisplayName, other)
		}
	}
	out, err := h.started(ctx, f, r.RequestId)
	if err != nil {
		return nil, err
	}
	h.s.announce(ctx, f, f.State)
	h.s.poke()
	return out, nil
}

// checkPlan is the plan with the folder as the caller gave it, which the target judges.
func checkPlan(f *failoverv1.Failover, dir string) target.Plan {
	p := planOf(f)
	p.Dir = dir
	return p
}

func illegal(what string, vm *schedulerv1.ProtectedVm) error {
	return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "%s is not possible while %s is %s", what, vm.DisplayName, stateName(vm.State)).With("state", vm.State.String())
}

// nothingActive refuses while another failover of the VM stands in the way: a test (where that matters), or one for real.
func (h *server) nothingActive(ctx context.Context, vm *schedulerv1.ProtectedVm, tests bool) error {
	if tests {
		if other, err := h.active(ctx, vm.Name); err != nil {
			return err
		} else if other != nil {
			return testActive(vm.DisplayName, other)
		}
	}
	all, err := h.s.failoversOf(ctx, vm.Name)
	if err != nil {
		return err
	}
	for _, o := range all {
		if !over(o) && o.Phase != failed { // one that failed is judged by the VM's state
			return failoverActive(vm.DisplayName, o)
		}
	}
	return nil
}

// started answers with the failover's job, which may have to be made still.
func (h *server) started(ctx context.Context, f *failoverv1.Failover, request string) (*failoverv1.StartTestFailoverResponse, error) {
	job := newJob(f.Job, typesv1.JobKind_JOB_KIND_TEST_FAILOVER, f.Vm, caller(ctx), request, f.CreateTime, h.s.testSteps(f))
	if err := h.s.ensureJob(ctx, job); err != nil {
		return nil, storeError(err)
	}
	j, err := h.readJob(ctx, f.Job)
	if err != nil {
		return nil, err
	}
	return &failoverv1.StartTestFailoverResponse{Job: j}, nil
}

func (h *server) readJob(ctx context.Context, name string) (*typesv1.Job, error) {
	j, rev, err := h.s.jobs.Get(ctx, jobKey(name))
	if err != nil {
		return nil, storeError(err)
	}
	j.Revision = rev
	return j, nil
}

// point finds the point that a selector means, and the machine as it was then.
func (h *server) point(ctx context.Context, vm *schedulerv1.ProtectedVm, s *failoverv1.PointSelector) (replica.Point, *typesv1.Machine, error) {
	lineage, err := replica.ParseLineage(vm.Lineage)
	if err != nil {
		return replica.Point{}, nil, errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INTERNAL, err, "lineage of %s", vm.DisplayName)
	}
	r, err := replica.Open(ctx, h.s.deps.Store, lineage)
	if err != nil {
		return replica.Point{}, nil, chainError(err, "open the replica of %s", vm.DisplayName)
	}
	points, err := r.Points(ctx)
	if err != nil {
		return replica.Point{}, nil, chainError(err, "list the recovery points of %s", vm.DisplayName)
	}
	point, err := choose(points, s)
	if err != nil {
		return point, nil, err
	}
	m, err := r.Find(ctx, point.Ordinal)
	if err != nil {
		return point, nil, chainError(err, "find point %d", point.Ordinal)
	}
	machine, err := machineAt(ctx, r, m, vm.Machine)
	return point, machine, err
}

// rival is another test failover of the same VM that goes before f: one that is under way or up, or of two that begin
// at once the one asked for first.
func (s *Service) rival(ctx context.Context, f *failoverv1.Failover) (*failoverv1.Failover, error) {
	entries, err := s.failovers.List(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		o := e.Value
		if o.Vm != f.Vm || o.Name == f.Name || !active(o) {
			continue
		}
		if o.State != typesv1.TestFailoverState_TEST_FAILOVER_STATE_STARTING || age(o, f) < 0 {
			return o, nil
		}
	}
	return nil, nil
}

// age orders failovers, oldest first.
func age(a, b *failoverv1.Failover) int {
	return cmp.Or(a.CreateTime.AsTime().Compare(b.CreateTime.AsTime()), strings.Compare(a.Name, b.Name))
}

// active says whether a failover is a test that has, or may have, something to clean up.
func active(f *failoverv1.Failover) bool {
	return isTest(f) && f.State != typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE && f.State != typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED
}

// active finds a test failover of the VM that is not cleaned up. One that failed has removed what it made.
func (h *server) active(ctx context.Context, vm string) (*failoverv1.Failover, error) {
	entries, err := h.s.failovers.List(ctx, "")
	if err != nil {
		return nil, storeError(err)
	}
	for _, e := range entries {
		if e.Value.Vm == vm && active(e.Value) {
			return e.Value, nil
		}
	}
	return nil, nil
}

// cleanable finds what "clean up this VM" means: the active test failover; else the one that this very request cleaned
// up already; else the newest, if it failed.
func (h *server) cleanable(ctx context.Context, vm *schedulerv1.ProtectedVm, request string) (string, error) {
	if f, err := h.active(ctx, vm.Name); err != nil {
		return "", err
	} else if f != nil {
		return f.Name, nil
	}
	entries, err := h.s.failovers.List(ctx, "")
	if err != nil {
		return "", storeError(err)
	}
	var newest *failoverv1.Failover
	for _, e := range entries {
		if e.Value.Vm == vm.Name && isTest(e.Value) && (newest == nil || e.Value.CreateTime.AsTime().After(newest.CreateTime.AsTime())) {
			newest = e.Value
		}
	}
	switch {
	case newest == nil:
	case newest.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED:
		return newest.Name, nil
	case request != "" && newest.CleanupJob != "":
		j, err := h.readJob(ctx, newest.CleanupJob)
		if err != nil {
			return "", err
		}
		if j.RequestId == request {
			return newest.Name, nil
		}
	}
	return "", errcat.New(typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND, "%s has no test failover to clean up", vm.DisplayName)
}

func (h *server) CleanUpTestFailover(ctx context.Context, r *failoverv1.CleanUpTestFailoverRequest) (*failoverv1.CleanUpTestFailoverResponse, error) {
	name := r.Failover
	if name == "" {
		if r.Vm == "" {
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "name the VM or the failover")
		}
		vm, err := h.s.findVM(ctx, r.Vm)
		if err != nil {
			return nil, err
		}
		if name, err = h.cleanable(ctx, vm, r.RequestId); err != nil {
			return nil, err
		}
	}
	f, _, err := h.s.failovers.Mutate(ctx, failoverKey(name), func(f *failoverv1.Failover) error {
		if !isTest(f) {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "%s is %s failover: commit or cancel it", lastPart(name), article(kindName(f)))
		}
		switch f.State {
		case typesv1.TestFailoverState_TEST_FAILOVER_STATE_WAITING_CLEANUP, typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANUP_FAILED, typesv1.TestFailoverState_TEST_FAILOVER_STATE_FAILED:
			f.State, f.Error, f.Force = typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP, nil, r.Force
			f.CleanupJob = "jobs/" + uuid.Must(uuid.NewV7()).String()
			return nil
		case typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP:
			return force(f, r.Force)
		case typesv1.TestFailoverState_TEST_FAILOVER_STATE_NONE:
			if f.CleanupJob != "" {
				return bus.NoChange // done: the same job is the answer
			}
		}
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "the test failover is still being made: clean it up when it is ready").With("state", f.State.String())
	})
	if errors.Is(err, bus.ErrNotFound) {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND, "there is no failover %s", lastPart(name))
	}
	if err != nil {
		return nil, storeError(err)
	}
	job := newJob(f.CleanupJob, typesv1.JobKind_JOB_KIND_CLEAN_UP_TEST_FAILOVER, f.Vm, caller(ctx), r.RequestId, timestamppb.New(h.s.deps.Clock()), cleanupSteps)
	if err := h.s.ensureJob(ctx, job); err != nil {
		return nil, storeError(err)
	}
	if r.Notes != "" {
		h.s.log.InfoContext(ctx, "test failover notes", "failover", f.Name, "vm", f.Vm, "notes", r.Notes, "by", caller(ctx))
	}
	if f.State == typesv1.TestFailoverState_TEST_FAILOVER_STATE_CLEANING_UP {
		h.s.announce(ctx, f, f.State)
		h.s.poke()
	}
	j, err := h.readJob(ctx, f.CleanupJob)
	if err != nil {
		return nil, err
	}
	return &failoverv1.CleanUpTestFailoverResponse{Job: j}, nil
}

func (h *server) GetFailover(ctx context.Context, r *failoverv1.GetFailoverRequest) (*failoverv1.GetFailoverResponse, error) {
	f, rev, err := h.s.failovers.Get(ctx, failoverKey(r.Name))
	if errors.Is(err, bus.ErrNotFound) {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND, "there is no failover %s", lastPart(r.Name))
	}
	if err != nil {
		return nil, storeError(err)
	}
	f.Revision = rev
	return &failoverv1.GetFailoverResponse{Failover: f}, nil
}

// Page sizes of ListFailovers.
const (
	defaultPage = 100
	maxPage     = 1000
)

func (h *server) ListFailovers(ctx context.Context, r *failoverv1.ListFailoversRequest) (*failoverv1.ListFailoversResponse, error) {
	vm := r.Vm
	if vm != "" {
		// A VM that is no longer protected keeps its records under its resource name.
		v, err := h.s.findVM(ctx, vm)
		switch {
		case err == nil:
			vm = v.Name
		case errcat.Recoverable(err):
			return nil, err
		}
	}
	entries, err := h.s.failovers.List(ctx, "")
	if err != nil {
		return nil, storeError(err)
	}
	slices.SortFunc(entries, func(a, b bus.Entry[*failoverv1.Failover]) int {
		if c := b.Value.CreateTime.AsTime().Compare(a.Value.CreateTime.AsTime()); c != 0 {
			return c
		}
		return strings.Compare(b.Key, a.Key)
	})
	size := int(r.PageSize)
	if size == 0 {
		size = defaultPage
	}
	size = min(size, maxPage)
	out, skipping := &failoverv1.ListFailoversResponse{}, r.PageToken != ""
	for _, e := range entries {
		if skipping {
			skipping = e.Key != r.PageToken
			continue
		}
		if vm != "" && e.Value.Vm != vm {
			continue
		}
		if len(out.Failovers) == size {
			out.NextPageToken = bus.Key(lastPart(out.Failovers[size-1].Name))
			break
		}
		e.Value.Revision = e.Revision
		out.Failovers = append(out.Failovers, e.Value)
	}
	if skipping {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "page_token is not one of ours")
	}
	return out, nil
}

func failoverKey(name string) string { return bus.Key(lastPart(name)) }

func lastPart(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

func stateName(s typesv1.ProtectionState) string {
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(s.String(), "PROTECTION_STATE_"), "_", " "))
}

// caller is who asked, as in the peer's certificate.
func caller(ctx context.Context) string {
	if p, ok := rpc.PeerFrom(ctx); ok {
		return p.String()
	}
	return ""
}
