package schedulertest

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/errcat"
	hostproviderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/hostprovider/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
)

// power is the machine's power and fence. A guest that is off writes nothing.
type power struct {
	off      bool
	stubborn bool   // the guest ignores the power button
	fence    string // failover
	released bool
	bitmaps  bool // what is tracked lives in the hypervisor's process

	exportGone typesv1.ErrorReason // what reading a pass whose bitmap was lost answers; PASS_NOT_OPEN's place
}

// Power is the state of the machine and the failover that holds its fence.
func (h *Host) Power() (off bool, fence string, released bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.off, h.fence, h.released
}

// Stubborn makes the guest ignore the power button, or not.
func (h *Host) Stubborn(yes bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stubborn = yes
}

// TurnOn is somebody who starts the machine at its host, past Landfall: a fence is no lock on the power button.
func (h *Host) TurnOn() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.off, h.released = false, false
}

// TrackByBitmaps has tracking live in the hypervisor's process: it does not survive ReleaseMachine.
func (h *Host) TrackByBitmaps() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bitmaps = true
}

// LoseBitmap is a restart of the hypervisor: what changed is not known any more, and a pass that is open has nothing that
// covers the writes since it began. Reading it fails for the given reason.
func (h *Host) LoseBitmap(reading typesv1.ErrorReason) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.loseBitmapLocked()
	h.exportGone = reading
}

func (h *Host) loseBitmapLocked() {
	h.resync = typesv1.ResyncReason_RESYNC_REASON_BITMAP_LOST
	clear(h.log)
	if h.open != nil {
		h.open.lost = true
	}
}

// StopMachine implements HostService.
func (h *Host) StopMachine(_ context.Context, r *hostproviderv1.StopMachineRequest) (*hostproviderv1.StopMachineResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enterFenced("StopMachine", r.GetVm(), r.GetLineage(), r.GetEpoch(), r.GetFailover()); err != nil {
		return nil, err
	}
	h.fence = r.GetFailover()
	if !h.stubborn {
		h.off = true
	}
	state := typesv1.PowerState_POWER_STATE_RUNNING
	if h.off {
		state = typesv1.PowerState_POWER_STATE_OFF
	}
	return &hostproviderv1.StopMachineResponse{PowerState: state}, nil
}

// ReleaseMachine implements HostService.
func (h *Host) ReleaseMachine(_ context.Context, r *hostproviderv1.ReleaseMachineRequest) (*hostproviderv1.ReleaseMachineResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enterFenced("ReleaseMachine", r.GetVm(), r.GetLineage(), r.GetEpoch(), r.GetFailover()); err != nil {
		return nil, err
	}
	if !h.off || h.fence == "" {
		return nil, refuse(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "the guest runs or is not fenced")
	}
	if h.open != nil {
		return nil, refuse(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "ordinal %d is open: its data is read from the hypervisor", h.open.point.GetOrdinal())
	}
	h.released = true
	if h.bitmaps {
		h.loseBitmapLocked()
	}
	return &hostproviderv1.ReleaseMachineResponse{}, nil
}

// StartMachine implements HostService.
func (h *Host) StartMachine(_ context.Context, r *hostproviderv1.StartMachineRequest) (*hostproviderv1.StartMachineResponse, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.enterFenced("StartMachine", r.GetVm(), r.GetLineage(), r.GetEpoch(), r.GetFailover()); err != nil {
		return nil, err
	}
	h.fence, h.off, h.released = "", false, false
	return &hostproviderv1.StartMachineResponse{PowerState: typesv1.PowerState_POWER_STATE_RUNNING}, nil
}

func (h *Host) enterFenced(method, vm, lineage string, epoch uint64, failover string) error {
	if err := h.enter(method); err != nil {
		return err
	}
	if err := h.allow(vm, lineage, epoch); err != nil {
		return err
	}
	if h.fence != "" && h.fence != failover {
		return refuse(typesv1.ErrorReason_ERROR_REASON_MACHINE_FENCED, "fenced by %s", h.fence)
	}
	return nil
}

// AppMode is what the guest does when it is to be frozen.
type AppMode int

// The modes.
const (
	// AppGiven: it freezes.
	AppGiven AppMode = iota
	// AppUnsupported: the driver refuses.
	AppUnsupported
	// AppFails: the freeze fails; the point is taken anyway.
	AppFails
)

// SetApp says what the guest does when it is to be frozen.
func (h *Host) SetApp(m AppMode) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.app = m
}

func (h *Host) freeze(want typesv1.Consistency) (typesv1.Consistency, *typesv1.ErrorDetail, error) {
	if want != typesv1.Consistency_CONSISTENCY_APPLICATION {
		return want, nil, nil
	}
	switch h.app {
	case AppUnsupported:
		return 0, nil, refuse(typesv1.ErrorReason_ERROR_REASON_CONSISTENCY_UNSUPPORTED, "the driver cannot freeze guests")
	case AppFails:
		return typesv1.Consistency_CONSISTENCY_CRASH, &typesv1.ErrorDetail{
			Reason: errcat.Code(typesv1.ErrorReason_ERROR_REASON_DEADLINE_EXCEEDED), What: "the guest agent does not answer", Time: timestamppb.New(time.Now()),
		}, nil
	}
	return want, nil, nil
}
