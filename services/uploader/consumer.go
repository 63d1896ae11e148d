package uploader

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/shipping"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	typesv1 "github.com/landfall-dr/landfall/proto/gen/landfall/types/v1"
	uploaderv1 "github.com/landfall-dr/landfall/proto/gen/landfall/uploader/v1"
)

// Durable names of the consumers.
const (
	durableShip   = "uploader-ship"
	durableCopy   = "uploader-copy"
	durableApply  = "uploader-apply"
	durableRetain = "uploader-retain"
)

// Outcomes of tasks in metrics.
const (
	outcomeDone     = "done"
	outcomeRepeated = "repeated"
	outcomeFailed   = "failed"
	outcomeBusy     = "busy"
	outcomeDeferred = "deferred"
	outcomeLost     = "lost"
)

// handleShip is the consumer of queue ship. Nil acknowledges: the task is in the chain, or its failure was reported.
func (s *Service) handleShip(ctx context.Context, task *bus.Task) (err error) {
	var t uploaderv1.ShipTask
	if err := decode(task, &t); err != nil {
		return err
	}
	end, ok := s.begin(workOf(&t), describe(&t))
	if !ok { // its own delivery is not acknowledged before it is done, so this one is not needed
		s.logger.InfoContext(ctx, "the same task is in work here", "task", describe(&t))
		return nil
	}
	started, outcome := s.clock(), outcomeLost
	defer func() {
		end()
		s.metrics.task(ctx, RoleShip, outcome, s.clock().Sub(started))
	}()
	done, err := s.shipper.ship(ctx, &t)
	switch {
	case ctx.Err() != nil, errors.Is(err, failpoint.ErrInjected):
		return err // the worker is going away, or a test plays that it did: the task comes again
	case err != nil:
		outcome = outcomeFailed
		ordinal := t.GetPoint().GetOrdinal() + t.GetPass().GetOrdinal()
		return s.reportFailure(ctx, task, RoleShip, t.GetVm(), t.GetLineage(), ordinal, t.GetEpoch(), err)
	}
	outcome = outcomeDone
	if done.already {
		outcome = outcomeRepeated
	}
	s.logger.InfoContext(ctx, "shipped", "task", describe(&t), "sequence", uint64(done.manifest.Seq), "stored_bytes", done.stored(),
		"changed_bytes", done.changed, "already", done.already)
	event, err := shippedEvent(&t, done)
	if err != nil {
		return bus.Permanent(err)
	}
	if err := s.suspectPoint(ctx, &t, done); err != nil {
		return err // the task comes again, and finds the same in the chain
	}
	return s.publish(ctx, event)
}

// shippedEvent is the fact that a task is in the chain; its id depends on what was committed alone.
func shippedEvent(t *uploaderv1.ShipTask, done *shipped) (bus.Event, error) {
	m := done.manifest
	if t.GetPoint() != nil {
		kind := typesv1.PointKind_POINT_KIND_POINT
		if m.Kind == replica.KindBase {
			kind = typesv1.PointKind_POINT_KIND_BASE
		}
		consistency := typesv1.Consistency_CONSISTENCY_CRASH
		if m.Consistency == replica.ConsistencyApp {
			consistency = typesv1.Consistency_CONSISTENCY_APPLICATION
		}
		return event(t.GetVm(), "recovery-point.received", &eventsv1.RecoveryPointReceived{
			Vm: t.GetVm(), Lineage: t.GetLineage(), Point: uint64(m.Point), Sequence: uint64(m.Seq), Kind: kind,
			CutTime: timestamppb.New(m.CutTime), Consistency: consistency, StoredBytes: done.stored(),
			ChangedBytes: done.changed, AlreadyCommitted: done.already, Signals: signalsProto(m.Signals),
		}, t.GetLineage(), number(m.Point))
	}
	p := t.GetPass()
	covered := p.GetWindow().GetLength()
	for _, d := range t.GetDisks() {
		if d.GetId() == p.GetDisk() && p.GetWindow() == nil {
			covered = d.GetSizeBytes()
		}
	}
	return event(t.GetVm(), "pass-task.shipped", &eventsv1.PassTaskShipped{
		Vm: t.GetVm(), Lineage: t.GetLineage(), Pass: p.GetOrdinal(), Index: p.GetIndex(), Tasks: p.GetTasks(),
		Sequence: uint64(m.Seq), CoveredBytes: covered, StoredBytes: done.stored(),
	}, t.GetLineage(), number(p.GetOrdinal()), number(p.GetIndex()))
}

// decode reads and validates a task; one that breaks its contract is parked, since nobody can carry it out.
func decode(task *bus.Task, into proto.Message) error {
	if err := task.Decode(into); err != nil {
		return err
	}
	if err := protovalidate.Validate(into); err != nil {
		return bus.Permanent(errcat.Invalid(err))
	}
	return nil
}

// event makes an event whose id depends on its type and parts.
func event(vm, typ string, payload proto.Message, parts ...string) (bus.Event, error) {
	machine, err := shipping.ParseMachine(vm)
	if err != nil {
		return bus.Event{}, err
	}
	id := bus.EventID(append([]string{typ}, parts...)...)
	return bus.Event{Type: typ, Site: machine.Site, VM: machine.VM, ID: id, Payload: payload}, nil
}

func number[N ~uint64 | ~int32](n N) string { return strconv.FormatInt(int64(n), 10) }

// publish puts the event and passes the points before the acknowledgement.
func (s *Service) publish(ctx context.Context, e bus.Event) error {
	if err := failpoint.Hit(fpBeforePublish); err != nil {
		return err
	}
	if err := s.bus.PublishEvent(ctx, e); err != nil {
		return fmt.Errorf("publish %s: %w", e.Type, err)
	}
	if err := failpoint.Hit(fpAfterPublish); err != nil {
		return err
	}
	return failpoint.Hit(fpBeforeAck)
}

// reportFailure says that a task ended without success. Nil: it was said, so the task is acknowledged; the ladder of
// the scheduler decides what follows.
func (s *Service) reportFailure(ctx context.Context, task *bus.Task, role Role, vm, lineage string, ordinal, epoch uint64, cause error) error {
	detail := shipping.Detail(cause)
	detail.Time = timestamppb.New(s.clock())
	s.logger.WarnContext(ctx, "task failed", "vm", vm, "ordinal", ordinal, "reason", detail.GetReason(), "error", cause)
	e, err := event(vm, "ship.failed", &eventsv1.ShipFailed{Vm: vm, Lineage: lineage, Ordinal: ordinal, Epoch: epoch, Error: detail, Work: string(role)},
		task.Site, task.ID, task.Published.UTC().Format(time.RFC3339Nano))
	if err != nil {
		return bus.Permanent(errors.Join(err, cause))
	}
	if err := s.bus.PublishEvent(ctx, e); err != nil {
		return fmt.Errorf("publish %s: %w", e.Type, errors.Join(err, cause))
	}
	return nil
}
