package scheduler

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
	schedulerv1 "github.com/landfall-dr/landfall/proto/gen/landfall/scheduler/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// consume handles the facts of other services until ctx ends. Most of them only wake a VM up. A failure changes its
// record, and is acknowledged after that.
func (r *reconciler) consume(ctx context.Context) error {
	err := r.bus.Subscribe(ctx, bus.Subscription{
		Durable: "scheduler-facts", Concurrency: 8, RetryDelay: 200 * time.Millisecond, RetryDelayMax: 5 * time.Second,
		Filters: []bus.Filter{
			{Type: "recovery-point.received"}, {Type: "recovery-point.processed"}, {Type: "pass-task.shipped"}, {Type: "ship.failed"}, {Type: "recovery-point.suspected"},
			{Type: "apply-backlog.raised"}, {Type: "apply-backlog.cleared"}, {Parked: true},
		},
	}, r.handle)
	if err != nil {
		return fmt.Errorf("follow the facts: %w", err)
	}
	return nil
}

func (r *reconciler) handle(ctx context.Context, e *bus.Received) error {
	switch e.Type {
	case "recovery-point.received":
		var p eventsv1.RecoveryPointReceived
		if err := e.Decode(&p); err != nil {
			return err
		}
		return r.hint(p.GetVm(), func(h *hints) { h.pointReceived(&p) })
	case "pass-task.shipped":
		var p eventsv1.PassTaskShipped
		if err := e.Decode(&p); err != nil {
			return err
		}
		return r.hint(p.GetVm(), func(h *hints) { h.taskShipped(&p) })
	case "recovery-point.processed":
		var p eventsv1.RecoveryPointProcessed
		if err := e.Decode(&p); err != nil {
			return err
		}
		return r.processed(ctx, &p)
	case "recovery-point.suspected":
		var p eventsv1.RecoveryPointSuspected
		if err := e.Decode(&p); err != nil {
			return err
		}
		return r.suspected(ctx, &p)
	case "apply-backlog.raised":
		var p eventsv1.ApplyBacklogRaised
		if err := e.Decode(&p); err != nil {
			return err
		}
		return r.backlog(ctx, p.GetVm(), p.GetBacklog(), true)
	case "apply-backlog.cleared":
		var p eventsv1.ApplyBacklogCleared
		if err := e.Decode(&p); err != nil {
			return err
		}
		return r.backlog(ctx, p.GetVm(), p.GetBacklog(), false)
	case "ship.failed":
		var p eventsv1.ShipFailed
		if err := e.Decode(&p); err != nil {
			return err
		}
		if p.GetWork() == workApply {
			return r.applyFailed(ctx, &p)
		}
		return r.taskFailed(ctx, p.GetVm(), p.GetLineage(), p.GetOrdinal(), p.GetEpoch(), p.GetError())
	case "parked." + string(bus.KindShip), "parked." + string(bus.KindCopy):
		var t uploaderv1.ShipTask
		d, err := decodeParked(e, &t)
		if err != nil {
			return err
		}
		return r.taskFailed(ctx, t.GetVm(), t.GetLineage(), max(t.GetPoint().GetOrdinal(), t.GetPass().GetOrdinal()), t.GetEpoch(), d)
	case "parked." + string(bus.KindResync):
		var t resyncenginev1.CompareTask
		d, err := decodeParked(e, &t)
		if err != nil {
			return err
		}
		return r.taskFailed(ctx, t.GetVm(), t.GetLineage(), t.GetPass(), t.GetEpoch(), d)
	}
	return nil
}

// decodeParked reads the task that was given up, and why.
func decodeParked(e *bus.Received, task proto.Message) (*typesv1.ErrorDetail, error) {
	var p eventsv1.TaskParked
	if err := e.Decode(&p); err != nil {
		return nil, err
	}
	if err := proto.Unmarshal(p.GetTask(), task); err != nil {
		return nil, bus.Permanent(fmt.Errorf("decode parked task: %w", err))
	}
	d := p.GetError()
	if reasonOf(d) == typesv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		d = &typesv1.ErrorDetail{
			Reason: errcat.Code(typesv1.ErrorReason_ERROR_REASON_REDELIVERIES_EXHAUSTED),
			What:   fmt.Sprintf("given up after %d deliveries: %s", p.GetDeliveries(), p.GetError().GetWhat()),
		}
	}
	return d, nil
}

func (r *reconciler) hint(vm string, note func(*hints)) error {
	key := keyOf(vm)
	if key == "" {
		return nil
	}
	note(&r.memoryOf(key).hints)
	r.queue.add(key)
	return nil
}

func (r *reconciler) processed(ctx context.Context, p *eventsv1.RecoveryPointProcessed) error {
	key := keyOf(p.GetVm())
	if key == "" {
		return nil
	}
	return r.with(ctx, key, func(v *vmRun) error {
		if v.rec.GetLineage() != p.GetLineage() {
			return nil
		}
		if p.GetCheckpoint() > v.m.checkpoint { // what lies below it may be retired now
			v.m.checkpointed, v.m.checkpoint = v.m.checkpointed || v.m.checkpoint != 0, p.GetCheckpoint()
		}
		fresh := newer(p.GetBacklog(), v.rec.GetApplyBacklog())
		if p.GetPoint() <= v.rec.GetProcessedPoint() && !fresh {
			return nil
		}
		return v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.ApplyError = nil
			rec.ProcessedPoint = max(rec.GetProcessedPoint(), p.GetPoint())
			if fresh {
				rec.ApplyBacklog = p.GetBacklog()
			}
		})
	})
}

// backlog stores what waits to be applied, when it was measured later than what the record has. Events may overtake each
// other.
func (r *reconciler) backlog(ctx context.Context, vm string, b *typesv1.ApplyBacklog, high bool) error {
	key := keyOf(vm)
	if key == "" {
		return nil
	}
	return r.with(ctx, key, func(v *vmRun) error {
		if !newer(b, v.rec.GetApplyBacklog()) {
			return nil
		}
		return v.save(ctx, func(rec *schedulerv1.ProtectedVm) {
			rec.ApplyBacklog = clone(b)
			rec.ApplyBacklog.High = high
		})
	})
}

// workApply is how a ship.failed of an apply task says what failed.
const workApply = "apply"

// applyFailed keeps why points are received and not applied, until some are. Replication goes on.
func (r *reconciler) applyFailed(ctx context.Context, p *eventsv1.ShipFailed) error {
	key := keyOf(p.GetVm())
	if key == "" {
		return nil
	}
	return r.with(ctx, key, func(v *vmRun) error {
		at := p.GetError().GetTime().AsTime()
		measured := v.rec.GetApplyBacklog().GetTime()
		switch {
		case v.rec.GetLineage() != p.GetLineage():
			return nil
		case measured != nil && measured.AsTime().After(at): // a later attempt went well: this event was overtaken
			return nil
		case v.rec.GetApplyError() != nil && !at.After(v.rec.GetApplyError().GetTime().AsTime()):
			return nil
		}
		return v.save(ctx, func(rec *schedulerv1.ProtectedVm) { rec.ApplyError = p.GetError() })
	})
}

// newer reports whether a was measured after b.
func newer(a, b *typesv1.ApplyBacklog) bool {
	return a.GetTime() != nil && (b.GetTime() == nil || a.GetTime().AsTime().After(b.GetTime().AsTime()))
}

func (r *reconciler) taskFailed(ctx context.Context, vm, lineage string, ordinal, epoch uint64, d *typesv1.ErrorDetail) error {
	key := keyOf(vm)
	if key == "" {
		return nil
	}
	return r.with(ctx, key, func(v *vmRun) error {
		if v.rec.GetLineage() != lineage {
			return nil
		}
		return v.taskFailed(ctx, ordinal, epoch, d)
	})
}
