package failoverorchestrator

import (
	"context"
	"errors"
	"path/filepath"
	"slices"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// startable are the states of a VM in which a failover of a kind is legal (domain: legal actions). They are those of the
// VM's record, which a dead scheduler does not move; what other failovers allow is judged by their own records.
var startable = map[failoverv1.FailoverKind][]typesv1.ProtectionState{
	failoverv1.FailoverKind_FAILOVER_KIND_PLANNED: {typesv1.ProtectionState_PROTECTION_STATE_PROTECTED},
	failoverv1.FailoverKind_FAILOVER_KIND_UNPLANNED: {
		typesv1.ProtectionState_PROTECTION_STATE_PROTECTED, typesv1.ProtectionState_PROTECTION_STATE_PAUSED,
		typesv1.ProtectionState_PROTECTION_STATE_REPLICATION_ERROR, typesv1.ProtectionState_PROTECTION_STATE_RESYNC_REQUIRED,
		typesv1.ProtectionState_PROTECTION_STATE_RESYNCHRONIZING, typesv1.ProtectionState_PROTECTION_STATE_RESYNC_PAUSED,
	},
}

// following are the states in which a VM's record follows a failover. When that one is over, or failed before it closed the
// lineage, and the record is still there, then the scheduler is dead or waits for a host: a disaster does not wait for
// either.
var following = []typesv1.ProtectionState{
	typesv1.ProtectionState_PROTECTION_STATE_PLANNED_FAILOVER_IN_PROGRESS, typesv1.ProtectionState_PROTECTION_STATE_UNPLANNED_FAILOVER_IN_PROGRESS,
	typesv1.ProtectionState_PROTECTION_STATE_FAILOVER_FAILED, typesv1.ProtectionState_PROTECTION_STATE_FAILED_OVER,
	typesv1.ProtectionState_PROTECTION_STATE_CANCELLING_FAILOVER,
}

// legal says whether a failover of a kind may begin, as far as the VM's state goes. all are its failovers, newest first.
func legal(kind failoverv1.FailoverKind, state typesv1.ProtectionState, all []*failoverv1.Failover) bool {
	if slices.Contains(startable[kind], state) {
		return true
	}
	return kind == failoverv1.FailoverKind_FAILOVER_KIND_UNPLANNED && slices.Contains(following, state) &&
		len(all) > 0 && (all[0].Phase == cancelled || all[0].Phase == failed)
}

// StartFailover implements the contract.
func (h *server) StartFailover(ctx context.Context, r *failoverv1.StartFailoverRequest) (*failoverv1.StartFailoverResponse, error) {
	t, err := h.s.target(r.Target)
	if err != nil {
		return nil, err
	}
	if err := sensible(r); err != nil {
		return nil, err
	}
	vm, err := h.s.findVM(ctx, r.Vm)
	if err != nil {
		return nil, err
	}
	id := uuid.Must(uuid.NewV7()).String()
	if r.RequestId != "" && !r.ValidateOnly {
		id = uuid.NewSHA1(requests, []byte(vm.Name+"\x00"+r.RequestId)).String()
	}
	all, err := h.s.failoversOf(ctx, vm.Name)
	if err != nil {
		return nil, err
	}
	if f := h.repeated(ctx, all, "failovers/"+id, r.RequestId); f != nil {
		return h.failoverStarted(ctx, f, r.RequestId)
	}
	b := &beginning{h: h, r: r, vm: vm}
	if err := b.judge(ctx, all); err != nil {
		return nil, err
	}
	f := b.record(id)
	if _, err := t.Check(ctx, checkPlan(f, r.OutDir)); err != nil {
		return nil, err
	}
	if r.ValidateOnly {
		return &failoverv1.StartFailoverResponse{}, nil
	}
	if b.again != nil {
		f, err = b.restart(ctx, f)
	} else {
		f, err = b.create(ctx, f)
	}
	if err != nil {
		return nil, err
	}
	out, err := h.failoverStarted(ctx, f, r.RequestId)
	if err != nil {
		return nil, err
	}
	h.s.moved(ctx, f)
	h.s.poke()
	return out, nil
}

// sensible refuses what makes no sense for the kind.
func sensible(r *failoverv1.StartFailoverRequest) error {
	if r.Kind != failoverv1.FailoverKind_FAILOVER_KIND_PLANNED {
		return nil
	}
	switch {
	case r.Point != nil:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "a planned failover brings up the point that it cuts itself: name none")
	case r.AcceptUnfenced:
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "a planned failover stops its source: there is nothing to accept")
	}
	return nil
}

// repeated finds the failover that this very request started.
func (h *server) repeated(ctx context.Context, all []*failoverv1.Failover, name, request string) *failoverv1.Failover {
	if request == "" {
		return nil
	}
	for _, f := range all {
		if f.Name == name {
			return f
		}
		if over(f) {
			continue
		}
		if j, _, err := h.s.jobs.Get(ctx, jobKey(f.Job)); err == nil && j.RequestId == request {
			return f
		}
	}
	return nil
}

// beginning is a request to start a failover that is being judged.
type beginning struct {
	h  *server
	r  *failoverv1.StartFailoverRequest
	vm *schedulerv1.ProtectedVm
	// again is the failed failover that is started again: its close stands in the chain, so that no other may follow.
	again *failoverv1.Failover
	// before is a failed one that never closed the lineage and of which nothing is left: it is put away.
	before *failoverv1.Failover
}

// judge says whether the failover may begin.
func (b *beginning) judge(ctx context.Context, all []*failoverv1.Failover) error {
	s, r, vm := b.h.s, b.r, b.vm
	lineage, err := replica.ParseLineage(vm.Lineage)
	if err != nil {
		return errcat.Wrap(typesv1.ErrorReason_ERROR_REASON_INTERNAL, err, "lineage of %s", vm.DisplayName)
	}
	chain, err := replica.Open(ctx, s.deps.Store, lineage)
	if err != nil {
		return chainError(err, "open the replica of %s", vm.DisplayName)
	}
	state, err := chain.Refresh(ctx)
	if err != nil {
		return chainError(err, "read the chain of %s", vm.DisplayName)
	}
	allowed := legal(r.Kind, vm.State, all)
	for _, o := range all {
		if over(o) {
			continue
		}
		closed, _ := state.FenceSeqs(lastPart(o.Name))
		switch {
		case o.Phase != failed, len(o.Files) > 0, closed != 0 && r.Kind == failoverv1.FailoverKind_FAILOVER_KIND_PLANNED && !planned(o), closed == 0 && !allowed:
			return failoverActive(vm.DisplayName, o)
		case closed != 0:
			b.again = o
		default:
			b.before = o
		}
	}
	switch {
	case b.again == nil && !allowed:
		return illegal(article(word(r.Kind.String(), "FAILOVER_KIND_"))+" failover", vm)
	case b.again == nil && state.Closed():
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_LINEAGE_CLOSED, "the lineage of %s is closed by %s", vm.DisplayName, state.Fence.Failover)
	}
	if r.Kind == failoverv1.FailoverKind_FAILOVER_KIND_PLANNED {
		other, err := b.h.active(ctx, vm.Name)
		if err == nil && other != nil {
			err = testActive(vm.DisplayName, other)
		}
		return err
	}
	if !r.AcceptUnfenced && !b.again.GetAcceptUnfenced() && !fenced(vm, all) {
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_SOURCE_NOT_FENCED, "%s is not known to be off at its site", vm.DisplayName)
	}
	points, err := chain.Points(ctx)
	if err != nil {
		return chainError(err, "list the recovery points of %s", vm.DisplayName)
	}
	_, err = choose(points, b.selector())
	return err
}

// fenced says whether the VM's host has said that the source is fenced and off. That is for one failover: when it is
// cancelled the source is started, and the record may not say so yet.
func fenced(vm *schedulerv1.ProtectedVm, all []*failoverv1.Failover) bool {
	p := vm.GetFailover()
	for _, o := range all {
		if o.Name == p.GetFailover() && (o.Phase == cancelling || o.Phase == cancelled || o.Phase == cancelFailed) {
			return false
		}
	}
	return p.GetSourceFenced()
}

// selector is the point that was asked for: the newest, if none was.
func (b *beginning) selector() *failoverv1.PointSelector {
	if b.r.Point == nil && b.r.Kind == failoverv1.FailoverKind_FAILOVER_KIND_UNPLANNED {
		return newest
	}
	return b.r.Point
}

// record is the failover as asked for.
func (b *beginning) record(id string) *failoverv1.Failover {
	now := timestamppb.New(b.h.s.deps.Clock())
	f := &failoverv1.Failover{
		Name: "failovers/" + id, Vm: b.vm.Name, Lineage: b.vm.Lineage, Kind: b.r.Kind, Phase: starting, Selector: b.selector(),
		Target: b.r.Target, OutDir: filepath.Clean(b.r.OutDir), Qemu: b.r.Qemu, AcceptUnfenced: b.r.AcceptUnfenced,
		Job: "jobs/" + uuid.Must(uuid.NewV7()).String(), CreateTime: now, Machine: b.vm.Machine,
	}
	if o := b.again; o != nil {
		f.Name, f.AcceptUnfenced = o.Name, f.AcceptUnfenced || o.AcceptUnfenced
		f.CloseSequence, f.RewindSequence = o.CloseSequence, o.RewindSequence
	}
	return f
}

// create stores a new failover.
func (b *beginning) create(ctx context.Context, f *failoverv1.Failover) (*failoverv1.Failover, error) {
	s := b.h.s
	if b.before != nil { // from here on it can never close the lineage
		lineage, err := lineageOf(b.before)
		if err != nil {
			return nil, err
		}
		switch stands, err := s.fateOf(ctx, lineage, b.before, fateCancel); {
		case err != nil:
			return nil, err
		case stands != fateCancel: // it was about to close: only a cancellation settles that
			return nil, failoverActive(b.vm.DisplayName, b.before)
		}
	}
	rev, err := s.failovers.Create(ctx, failoverKey(f.Name), f)
	if errors.Is(err, bus.ErrExists) { // the same request, twice at once
		f, _, err = s.failovers.Get(ctx, failoverKey(f.Name))
		return f, storeError(err)
	}
	if err != nil {
		return nil, storeError(err)
	}
	// The one that f replaces is over only now: of a VM whose failover is over, and that has no other, the scheduler starts
	// the source. Two requests may have passed the look at what is active together. If this process dies here, the step
	// check-target does both.
	if err := failpoint.Hit("failover-orchestrator/before-replace"); err != nil {
		return nil, err
	}
	if other, err := s.rivalFailover(ctx, f); err == nil && other != nil {
		if err := s.failovers.Delete(ctx, failoverKey(f.Name), rev); err == nil {
			return nil, failoverActive(b.vm.DisplayName, other)
		}
	}
	return f, nil
}

// restart begins a failed failover anew, with another target, folder or point. It keeps its id, under which the lineage is
// closed.
func (b *beginning) restart(ctx context.Context, f *failoverv1.Failover) (*failoverv1.Failover, error) {
	out, _, err := b.h.s.failovers.Mutate(ctx, failoverKey(f.Name), func(r *failoverv1.Failover) error {
		if r.Phase != failed || r.Job != b.again.Job {
			return failoverActive(b.vm.DisplayName, r)
		}
		created := r.CreateTime
		r.Reset()
		proto.Merge(r, f)
		r.CreateTime = created
		return nil
	})
	return out, storeError(err)
}

// failoverStarted answers with the failover's job, which may have to be made still.
func (h *server) failoverStarted(ctx context.Context, f *failoverv1.Failover, request string) (*failoverv1.StartFailoverResponse, error) {
	kind := typesv1.JobKind_JOB_KIND_UNPLANNED_FAILOVER
	if planned(f) {
		kind = typesv1.JobKind_JOB_KIND_PLANNED_FAILOVER
	}
	j, err := h.madeJob(ctx, f.Job, kind, f, request, h.s.startSteps(f))
	return &failoverv1.StartFailoverResponse{Job: j}, err
}

// madeJob makes a job of a failover, if it is not there yet, and reads it.
func (h *server) madeJob(ctx context.Context, name string, kind typesv1.JobKind, f *failoverv1.Failover, request string, steps []*typesv1.JobStep) (*typesv1.Job, error) {
	if err := h.s.ensureJob(ctx, newJob(name, kind, f.Vm, caller(ctx), request, timestamppb.New(h.s.deps.Clock()), steps)); err != nil {
		return nil, storeError(err)
	}
	return h.readJob(ctx, name)
}

// named finds the failover that a request means: by name, or the VM's newest.
func (h *server) named(ctx context.Context, name, vm string) (string, error) {
	if name != "" {
		return name, nil
	}
	if vm == "" {
		return "", errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "name the VM or the failover")
	}
	v, err := h.s.findVM(ctx, vm)
	if err != nil {
		return "", err
	}
	all, err := h.s.failoversOf(ctx, v.Name)
	if err != nil {
		return "", err
	}
	for _, f := range all {
		if !over(f) {
			return f.Name, nil
		}
	}
	if len(all) > 0 {
		return all[0].Name, nil
	}
	return "", errcat.New(typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND, "%s has no failover", v.DisplayName)
}

// change moves a failover's record.
func (h *server) change(ctx context.Context, name string, change func(*failoverv1.Failover) error) (*failoverv1.Failover, error) {
	f, _, err := h.s.failovers.Mutate(ctx, failoverKey(name), func(f *failoverv1.Failover) error {
		if isTest(f) {
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "%s is a test failover: clean it up", lastPart(name))
		}
		return change(f)
	})
	if errors.Is(err, bus.ErrNotFound) {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_FAILOVER_NOT_FOUND, "there is no failover %s", lastPart(name))
	}
	return f, storeError(err)
}

func phaseName(f *failoverv1.Failover) string { return word(f.Phase.String(), "FAILOVER_PHASE_") }

// CommitFailover implements the contract.
func (h *server) CommitFailover(ctx context.Context, r *failoverv1.CommitFailoverRequest) (*failoverv1.CommitFailoverResponse, error) {
	name, err := h.named(ctx, r.Failover, r.Vm)
	if err != nil {
		return nil, err
	}
	f, err := h.change(ctx, name, func(f *failoverv1.Failover) error {
		switch f.Phase {
		case waitingCommit:
			f.Phase, f.Error = committing, nil
			f.CommitJob = "jobs/" + uuid.Must(uuid.NewV7()).String()
			return nil
		case committing, committed:
			return bus.NoChange // the same job is the answer
		}
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "a failover that is %s cannot be committed: only one that is up", phaseName(f)).With("phase", f.Phase.String())
	})
	if err != nil {
		return nil, err
	}
	j, err := h.madeJob(ctx, f.CommitJob, typesv1.JobKind_JOB_KIND_COMMIT_FAILOVER, f, r.RequestId, commitSteps)
	if err != nil {
		return nil, err
	}
	if f.Phase == committing {
		h.s.moved(ctx, f)
		h.s.poke()
	}
	return &failoverv1.CommitFailoverResponse{Job: j}, nil
}

// force adds the wish to go on without the copy to a removal that is under way.
func force(f *failoverv1.Failover, asked bool) error {
	if f.Force || !asked {
		return bus.NoChange
	}
	f.Force = true
	return nil
}

// CancelFailover implements the contract. While steps run the wish is stored, and whoever runs them turns back at once:
// each of them can be given up at any instruction.
func (h *server) CancelFailover(ctx context.Context, r *failoverv1.CancelFailoverRequest) (*failoverv1.CancelFailoverResponse, error) {
	name, err := h.named(ctx, r.Failover, r.Vm)
	if err != nil {
		return nil, err
	}
	f, err := h.change(ctx, name, func(f *failoverv1.Failover) error {
		job := "jobs/" + uuid.Must(uuid.NewV7()).String()
		switch f.Phase {
		case starting:
			if f.CancelJob != "" {
				return force(f, r.Force)
			}
			f.CancelJob, f.Force = job, r.Force
			return nil
		case waitingCommit, failed, cancelFailed:
			f.Phase, f.Error, f.CancelJob, f.Force = cancelling, nil, job, r.Force
			return nil
		case cancelling:
			return force(f, r.Force)
		case cancelled:
			if f.CancelJob != "" {
				return bus.NoChange
			}
			return errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "the failover was put away already: a newer one took its place")
		}
		return errcat.New(typesv1.ErrorReason_ERROR_REASON_NOT_AT_SAFE_POINT, "a failover that is %s cannot be cancelled any more", phaseName(f)).With("phase", f.Phase.String())
	})
	if err != nil {
		return nil, err
	}
	j, err := h.madeJob(ctx, f.CancelJob, typesv1.JobKind_JOB_KIND_CANCEL_FAILOVER, f, r.RequestId, h.s.cancelSteps(f))
	if err != nil {
		return nil, err
	}
	if f.Phase == cancelling {
		h.s.moved(ctx, f)
	}
	h.s.poke()
	return &failoverv1.CancelFailoverResponse{Job: j}, nil
}
