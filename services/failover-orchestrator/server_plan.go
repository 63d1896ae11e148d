package failoverorchestrator

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	failoverv1 "github.com/landfall-dr/landfall/proto/gen/landfall/failoverorchestrator/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// planServer keeps plans in bucket "plans". Their mirror in storage follows by itself (plan_catalogue.go).
type planServer struct {
	failoverv1.UnimplementedPlanServiceServer
	s *Service
}

// ApplyPlan creates a plan or replaces its values.
func (h *planServer) ApplyPlan(ctx context.Context, r *failoverv1.ApplyPlanRequest) (*failoverv1.ApplyPlanResponse, error) {
	want := proto.CloneOf(r.GetPlan())
	meaning, err := h.meaning(ctx)
	if err != nil {
		return nil, err
	}
	if err := CheckPlan(want, meaning); err != nil {
		return nil, err
	}
	expected := want.GetRevision()
	want.Revision = 0
	key := bus.Key(lastPart(want.GetName()))
	old, rev, err := h.s.plans.Get(ctx, key)
	switch {
	case errors.Is(err, bus.ErrNotFound):
		rev = 0
	case err != nil:
		return nil, planStoreError(err)
	}
	if expected != 0 && expected != rev {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION, "%s is at revision %d, not at %d", want.GetName(), rev, expected).With("plan", want.GetName())
	}
	switch {
	case r.GetValidateOnly(), old != nil && proto.Equal(old, want): // nothing to store
	case old == nil:
		rev, err = h.s.plans.Create(ctx, key, want)
	default:
		rev, err = h.s.plans.Update(ctx, key, want, rev)
	}
	if errors.Is(err, bus.ErrExists) {
		err = fmt.Errorf("%w: %w", bus.ErrRevision, err)
	}
	if err != nil && !errors.Is(err, bus.ErrNotFound) {
		return nil, planStoreError(err)
	}
	want.Revision = rev
	return &failoverv1.ApplyPlanResponse{Plan: want}, nil
}

// meaning resolves names of machines by the records of VMs as they are now.
func (h *planServer) meaning(ctx context.Context) (func(string) (string, error), error) {
	all, err := h.s.vms.List(ctx, "")
	if err != nil {
		return nil, planStoreError(err)
	}
	ids, titles := map[string]bool{}, map[string][]string{}
	for _, e := range all {
		name := e.Value.GetName()
		ids[name] = true
		if title := e.Value.GetDisplayName(); title != "" {
			alias := strings.ToLower("sites/" + siteOf(name, "") + "/vms/" + title)
			titles[alias] = append(titles[alias], name)
		}
	}
	return func(vm string) (string, error) {
		if ids[vm] {
			return vm, nil
		}
		switch hits := titles[strings.ToLower(vm)]; len(hits) {
		case 0:
			return vm, nil
		case 1:
			return hits[0], nil
		default:
			return "", fmt.Errorf("%s means %s and %s: use the id", vm, hits[0], hits[1])
		}
	}, nil
}

// GetPlan reads one.
func (h *planServer) GetPlan(ctx context.Context, r *failoverv1.GetPlanRequest) (*failoverv1.GetPlanResponse, error) {
	p, rev, err := h.s.plans.Get(ctx, bus.Key(lastPart(r.GetName())))
	switch {
	case errors.Is(err, bus.ErrNotFound):
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_PLAN_NOT_FOUND, "no plan is named %q", lastPart(r.GetName())).With("plan", r.GetName())
	case err != nil:
		return nil, planStoreError(err)
	}
	p.Revision = rev
	return &failoverv1.GetPlanResponse{Plan: p}, nil
}

// ListPlans reads all, by name.
func (h *planServer) ListPlans(ctx context.Context, r *failoverv1.ListPlansRequest) (*failoverv1.ListPlansResponse, error) {
	entries, err := h.s.plans.List(ctx, "") // by key, which is the name
	if err != nil {
		return nil, planStoreError(err)
	}
	size := int(r.GetPageSize())
	if size == 0 {
		size = defaultPage
	}
	size = min(size, maxPage)
	out := &failoverv1.ListPlansResponse{}
	if _, err := bus.KeyParts(r.GetPageToken()); r.GetPageToken() != "" && err != nil {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT, "page_token is not one of ours")
	}
	for _, e := range entries {
		if e.Key <= r.GetPageToken() {
			continue
		}
		if len(out.Plans) == size {
			out.NextPageToken = bus.Key(lastPart(out.Plans[size-1].GetName()))
			break
		}
		e.Value.Revision = e.Revision
		out.Plans = append(out.Plans, e.Value)
	}
	return out, nil
}

// DeletePlan removes one. One that is not there, or only in storage, is gone afterwards too.
func (h *planServer) DeletePlan(ctx context.Context, r *failoverv1.DeletePlanRequest) (*failoverv1.DeletePlanResponse, error) {
	key := bus.Key(lastPart(r.GetName()))
	_, rev, err := h.s.plans.Get(ctx, key)
	if errors.Is(err, bus.ErrNotFound) {
		h.s.forgetPlan(ctx, r.GetName())
		return &failoverv1.DeletePlanResponse{}, nil
	}
	if err == nil {
		err = h.s.plans.Delete(ctx, key, rev)
	}
	if err != nil {
		return nil, planStoreError(err)
	}
	return &failoverv1.DeletePlanResponse{}, nil
}

// planStoreError gives an error of the bus its reason.
func planStoreError(err error) error {
	reason := typesv1.ErrorReason_ERROR_REASON_UNAVAILABLE
	switch {
	case errors.Is(err, bus.ErrRevision):
		reason = typesv1.ErrorReason_ERROR_REASON_CONCURRENT_MODIFICATION
	case errors.Is(err, bus.ErrName):
		reason = typesv1.ErrorReason_ERROR_REASON_INVALID_ARGUMENT
	}
	return errcat.Wrap(reason, err, "keep the plan")
}
