package resyncengine

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/landfall-dr/landfall/libs/bus"
	"github.com/landfall-dr/landfall/libs/errcat"
	"github.com/landfall-dr/landfall/libs/failpoint"
	"github.com/landfall-dr/landfall/libs/shipping"
	eventsv1 "github.com/landfall-dr/landfall/proto/gen/landfall/events/v1"
	resyncenginev1 "github.com/landfall-dr/landfall/proto/gen/landfall/resyncengine/v1"
)

// durableCompare is the name of the consumer.
const durableCompare = "resync-engine-compare"

// handle is the consumer of queue resync. Nil acknowledges: the pass is in the chain, its failure was reported, or this
// process has the same pass in work already.
func (s *Service) handle(ctx context.Context, task *bus.Task) error {
	var t resyncenginev1.CompareTask
	if err := task.Decode(&t); err != nil {
		return err
	}
	if err := protovalidate.Validate(&t); err != nil {
		return bus.Permanent(errcat.Invalid(err))
	}
	end, ok := s.begin(&t)
	if !ok {
		s.logger.InfoContext(ctx, "the same pass is in work here, this task adds nothing", "task", describe(&t))
		return nil
	}
	started, outcome := s.clock(), "lost"
	defer func() {
		end()
		s.metrics.task(ctx, outcome, s.clock().Sub(started))
	}()
	err := s.comparer.compare(ctx, &t, func(ctx context.Context, d done) error { return s.shipped(ctx, &t, d) })
	switch {
	case ctx.Err() != nil, errors.Is(err, failpoint.ErrInjected), errors.Is(err, errPublish):
		return err // the worker is going away, or cannot say what it did: the task comes again
	case err != nil:
		outcome = "failed"
		return s.failed(ctx, task, &t, err)
	}
	outcome = "done"
	s.logger.InfoContext(ctx, "compared", "task", describe(&t))
	return failpoint.Hit(fpBeforeAck)
}

var errPublish = errors.New("event not published")

// shipped says that a partial is in the chain.
func (s *Service) shipped(ctx context.Context, t *resyncenginev1.CompareTask, d done) error {
	machine, err := shipping.ParseMachine(t.GetVm())
	if err != nil {
		return err
	}
	if err := failpoint.Hit(fpBeforePublish); err != nil {
		return err
	}
	const typ = "pass-task.shipped"
	err = s.bus.PublishEvent(ctx, bus.Event{
		Type: typ, Site: machine.Site, VM: machine.VM,
		ID: bus.EventID(typ, t.GetLineage(), strconv.FormatUint(t.GetPass(), 10), strconv.FormatUint(uint64(d.index), 10)),
		Payload: &eventsv1.PassTaskShipped{
			Vm: t.GetVm(), Lineage: t.GetLineage(), Pass: t.GetPass(), Index: int32(d.index), Tasks: int32(d.tasks),
			Sequence: uint64(d.seq), CoveredBytes: d.covered, StoredBytes: d.stored, DifferingBytes: d.differing,
		},
	})
	if err != nil {
		return fmt.Errorf("publish %s: %w: %w", typ, errPublish, err)
	}
	return failpoint.Hit(fpAfterPublish)
}

// failed says that a task ended without success. Nil: it was said, so the task is acknowledged.
func (s *Service) failed(ctx context.Context, task *bus.Task, t *resyncenginev1.CompareTask, cause error) error {
	detail := shipping.Detail(cause)
	detail.Time = timestamppb.New(s.clock())
	s.logger.WarnContext(ctx, "task failed", "task", describe(t), "reason", detail.GetReason(), "error", cause)
	machine, err := shipping.ParseMachine(t.GetVm())
	if err != nil {
		return bus.Permanent(errors.Join(err, cause))
	}
	const typ = "ship.failed"
	err = s.bus.PublishEvent(ctx, bus.Event{
		Type: typ, Site: machine.Site, VM: machine.VM,
		ID: bus.EventID(typ, "resync", task.Site, task.ID, task.Published.UTC().Format(time.RFC3339Nano)),
		Payload: &eventsv1.ShipFailed{
			Vm: t.GetVm(), Lineage: t.GetLineage(), Ordinal: t.GetPass(), Epoch: t.GetEpoch(), Error: detail, Work: "compare",
		},
	})
	if err != nil {
		return fmt.Errorf("publish %s: %w", typ, errors.Join(err, cause))
	}
	return nil
}
