package qemu

import (
	"context"
	"strings"

	"github.com/landfall-dr/landfall/libs/errcat"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	hostprovider "github.com/landfall-dr/landfall/services/host-provider"
)

// Settle ends a point. The record decides; it works without QEMU, which is tidied when it answers.
func (d *Driver) Settle(ctx context.Context, s hostprovider.Settle) (*typesv1.TrackingStatus, error) {
	return d.settle(ctx, s, false)
}

// SettlePass ends a pass, likewise.
func (d *Driver) SettlePass(ctx context.Context, s hostprovider.Settle) (*typesv1.TrackingStatus, error) {
	return d.settle(ctx, s, true)
}

func (d *Driver) settle(ctx context.Context, s hostprovider.Settle, pass bool) (*typesv1.TrackingStatus, error) {
	id := strings.ToLower(s.VM)
	h, err := d.hold(ctx, id)
	if errcat.Is(err, typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND) {
		h, err = d.holdRecord(ctx, id) // gone from the inventory; what was begun must still be ended
		if err == nil && h.rec.Lineage == "" {
			h.release()
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_VM_NOT_FOUND, "no machine %s", id)
		}
	}
	if err != nil {
		return nil, err
	}
	defer h.release()
	if err := h.admit(s.Lineage, s.Epoch); err != nil {
		return nil, err
	}
	outcome := committed
	if s.Outcome == typesv1.SettleOutcome_SETTLE_OUTCOME_ABANDONED {
		outcome = abandoned
	}
	r := h.rec
	if p, ok := r.outcome(s.Point); ok {
		if p.Phase != outcome {
			return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "ordinal %d is %s", s.Point, p.Phase)
		}
		return h.status(), nil
	}
	if s.Point <= r.Floor {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_SETTLED, "ordinal %d is too old", s.Point)
	}
	o := r.Open
	if o == nil || o.Ordinal != s.Point || o.Phase != open {
		return h.forbid(ctx, s, pass, outcome)
	}
	if o.pass() != pass {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_INVALID_STATE, "ordinal %d is a pass or a point, and the call says otherwise", s.Point)
	}
	decide := func(r *record) {
		p := o.point
		p.Phase = outcome
		r.settle(p)
		r.Open = nil
		switch {
		case outcome == committed:
			r.Base = p.Ordinal
			if pass {
				r.Reason, r.Detail = none, ""
			}
			if r.Reason == none {
				r.Active = o.New
			}
		case pass:
			r.noBase(p.Ordinal)
		}
	}
	if err = h.update(decide); err != nil && h.crowded() != "" {
		h.followSoon(ctx) // the point's own copy takes the room that its end needs
		err = h.update(decide)
	}
	if err != nil {
		return nil, err
	}
	h.detach(ctx, s.Lineage, s.Point)
	h.followSoon(ctx)
	return h.status(), nil
}

// forbid settles an ordinal that was never cut or begun: it cannot be any more.
func (h *held) forbid(ctx context.Context, s hostprovider.Settle, pass bool, outcome phase) (*typesv1.TrackingStatus, error) {
	err := h.update(func(r *record) {
		if r.Open != nil && r.Open.Phase == making {
			r.undo()
		}
		p := point{Ordinal: s.Point, Phase: abandoned, Epoch: s.Epoch}
		if pass {
			p.Scope = typesv1.PassScope_PASS_SCOPE_FULL
		}
		r.settle(p)
	})
	if err != nil {
		return nil, err
	}
	if outcome == committed && pass {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_PASS_NOT_OPEN, "pass %d was never begun; it cannot be any more", s.Point)
	}
	if outcome == committed {
		return nil, errcat.New(typesv1.ErrorReason_ERROR_REASON_POINT_NOT_CUT, "point %d was never cut; it cannot be any more", s.Point)
	}
	h.followSoon(ctx)
	return h.status(), nil
}
