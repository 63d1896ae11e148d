package schedulertest

import (
	"context"

	"google.golang.org/protobuf/proto"

	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

func (h *Host) machineLocked() *typesv1.Machine {
	m := proto.Clone(h.machine).(*typesv1.Machine)
	m.Fence = h.fence
	return m
}

func (h *Host) mine(vm string) error {
	if vm != h.machine.GetId() && vm != h.machine.GetDisplayName() {
		return refuse(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "no machine %q on %s", vm, h.name)
	}
	return nil
}

// ListMachines implements HostService.
func (h *Host) ListMachines(context.Context, *hostproviderv1.ListMachinesRequest) (*hostproviderv1.ListMachinesResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("ListMachines"); err != nil {
		return nil, err
	}
	return &hostproviderv1.ListMachinesResponse{Machines: []*typesv1.Machine{h.machineLocked()}}, nil
}

// GetMachine implements HostService.
func (h *Host) GetMachine(_ context.Context, r *hostproviderv1.GetMachineRequest) (*hostproviderv1.GetMachineResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("GetMachine"); err != nil {
		return nil, err
	}
	return &hostproviderv1.GetMachineResponse{Machine: h.machineLocked()}, h.mine(r.GetVm())
}

// CheckPrerequisites implements HostService.
func (h *Host) CheckPrerequisites(_ context.Context, r *hostproviderv1.CheckPrerequisitesRequest) (*hostproviderv1.CheckPrerequisitesResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("CheckPrerequisites"); err != nil {
		return nil, err
	}
	return &hostproviderv1.CheckPrerequisitesResponse{Findings: h.findings, Machine: h.machineLocked()}, h.mine(r.GetVm())
}

// CreateReplicationRelationship implements HostService.
func (h *Host) CreateReplicationRelationship(_ context.Context, r *hostproviderv1.CreateReplicationRelationshipRequest) (*hostproviderv1.CreateReplicationRelationshipResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("CreateReplicationRelationship"); err != nil {
		return nil, err
	}
	if h.lineage == "" {
		h.forgetLocked()
		h.lineage = r.GetLineage()
	}
	if err := h.allow(r.GetVm(), r.GetLineage(), r.GetEpoch()); err != nil {
		return nil, err
	}
	return &hostproviderv1.CreateReplicationRelationshipResponse{Status: h.statusLocked(), Machine: h.machineLocked()}, nil
}

// RemoveReplicationRelationship implements HostService.
func (h *Host) RemoveReplicationRelationship(_ context.Context, r *hostproviderv1.RemoveReplicationRelationshipRequest) (*hostproviderv1.RemoveReplicationRelationshipResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("RemoveReplicationRelationship"); err != nil {
		return nil, err
	}
	if h.lineage != "" {
		if err := h.allow(r.GetVm(), r.GetLineage(), r.GetEpoch()); err != nil {
			return nil, err
		}
		h.forgetLocked()
	}
	// The machine is not started, and a fence stays.
	return &hostproviderv1.RemoveReplicationRelationshipResponse{}, nil
}

// CutPoint implements HostService.
func (h *Host) CutPoint(_ context.Context, r *hostproviderv1.CutPointRequest) (*hostproviderv1.CutPointResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("CutPoint"); err != nil {
		return nil, err
	}
	if err := h.allow(r.GetVm(), r.GetLineage(), r.GetEpoch()); err != nil {
		return nil, err
	}
	p, err := h.admit(r.GetPoint())
	switch {
	case err != nil:
		return nil, err
	case p != nil:
	case h.resync != typesv1.ResyncReason_RESYNC_REASON_UNSPECIFIED:
		return nil, refuse(typesv1.ErrorReason_ERROR_REASON_RESYNC_REQUIRED, "resync is required: %s", h.resync)
	case len(h.dirty) > 0, h.base == 0:
		return nil, refuse(typesv1.ErrorReason_ERROR_REASON_PASS_REQUIRED, "%d blocks are dirty", len(h.dirty))
	default:
		consistency, degraded, err := h.freeze(r.GetConsistency())
		if err != nil {
			return nil, err
		}
		p = h.cutLocked(r.GetPoint())
		h.open.consistency, h.open.degraded = consistency, degraded
	}
	return &hostproviderv1.CutPointResponse{
		Point: proto.Clone(p).(*typesv1.HostPoint), Consistency: h.open.consistency, Degraded: h.open.degraded, Machine: h.machineLocked(),
	}, nil
}

// SettlePoint implements HostService.
func (h *Host) SettlePoint(_ context.Context, r *hostproviderv1.SettlePointRequest) (*hostproviderv1.SettlePointResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("SettlePoint"); err != nil {
		return nil, err
	}
	if err := h.allow(r.GetVm(), r.GetLineage(), r.GetEpoch()); err != nil {
		return nil, err
	}
	err := h.settle(r.GetPoint(), r.GetOutcome())
	return &hostproviderv1.SettlePointResponse{Status: h.statusLocked()}, err
}

// ListPoints implements HostService.
func (h *Host) ListPoints(_ context.Context, r *hostproviderv1.ListPointsRequest) (*hostproviderv1.ListPointsResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("ListPoints"); err != nil {
		return nil, err
	}
	return &hostproviderv1.ListPointsResponse{Status: h.statusLocked()}, h.mine(r.GetVm())
}

// BeginPass implements HostService.
func (h *Host) BeginPass(_ context.Context, r *hostproviderv1.BeginPassRequest) (*hostproviderv1.BeginPassResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("BeginPass"); err != nil {
		return nil, err
	}
	if err := h.allow(r.GetVm(), r.GetLineage(), r.GetEpoch()); err != nil {
		return nil, err
	}
	p, err := h.admit(r.GetPass())
	if err != nil {
		return nil, err
	}
	if p == nil {
		ranges := map[Block]bool{}
		switch r.GetScope() {
		case typesv1.PassScope_PASS_SCOPE_FULL:
			for b := range h.live {
				ranges[b] = true
			}
			clear(h.log)
		case typesv1.PassScope_PASS_SCOPE_COMPARE:
			clear(h.log)
		default:
			for b := range h.dirty {
				ranges[b] = true
			}
		}
		clear(h.dirty)
		p = &typesv1.HostPoint{
			Ordinal: r.GetPass(), Phase: typesv1.PointPhase_POINT_PHASE_OPEN, Pass: true, Scope: r.GetScope(), Epoch: h.epoch, Disks: h.sizes(ranges),
		}
		if r.GetScope() == typesv1.PassScope_PASS_SCOPE_DIRTY {
			p.Base = h.base
		}
		h.open = &open{point: p, ranges: ranges}
		h.points = append(h.points, p)
		h.highest = max(h.highest, r.GetPass())
	}
	return &hostproviderv1.BeginPassResponse{Pass: proto.Clone(p).(*typesv1.HostPoint)}, nil
}

// SettlePass implements HostService.
func (h *Host) SettlePass(_ context.Context, r *hostproviderv1.SettlePassRequest) (*hostproviderv1.SettlePassResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enter("SettlePass"); err != nil {
		return nil, err
	}
	if err := h.allow(r.GetVm(), r.GetLineage(), r.GetEpoch()); err != nil {
		return nil, err
	}
	err := h.settle(r.GetPass(), r.GetOutcome())
	return &hostproviderv1.SettlePassResponse{Status: h.statusLocked()}, err
}
